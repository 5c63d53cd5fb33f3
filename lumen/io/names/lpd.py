"""Tensor names of the published LPD checkpoints (mit-han-lab/lpd, key "model" of the .pth file)."""

from lumen.io.pretrained import Rule

_BLOCK = "blocks.{layer}."

RULES = [
    Rule("class_emb.weight", "class_embedding"),
    Rule("token_emb.weight", "token_embedding"),
    Rule("fake_latent", "null_class", "1 d -> d"),
    Rule("pos_embed", "position_embedding", "1 n d -> n d"),
    Rule("mask_token", "mask_token", "1 1 d -> d"),
    Rule("z_proj_ln.weight", "input_norm.scale"),
    Rule("z_proj_ln.bias", "input_norm.bias"),
    Rule(_BLOCK + "norm1.weight", "blocks.norm1.scale"),
    Rule(_BLOCK + "norm1.bias", "blocks.norm1.bias"),
    Rule(_BLOCK + "attn.qkv.weight", "blocks.qkv", "(c n h) d -> d c n h"),
    Rule(_BLOCK + "attn.qkv.bias", "blocks.qkv_bias", "(c n h) -> c n h"),
    Rule(_BLOCK + "attn.proj.weight", "blocks.projection", "d (n h) -> n h d"),
    Rule(_BLOCK + "attn.proj.bias", "blocks.projection_bias"),
    Rule(_BLOCK + "norm2.weight", "blocks.norm2.scale"),
    Rule(_BLOCK + "norm2.bias", "blocks.norm2.bias"),
    Rule(_BLOCK + "mlp.fc1.weight", "blocks.up.kernel", "o i -> i o"),
    Rule(_BLOCK + "mlp.fc1.bias", "blocks.up.bias"),
    Rule(_BLOCK + "mlp.fc2.weight", "blocks.down.kernel", "o i -> i o"),
    Rule(_BLOCK + "mlp.fc2.bias", "blocks.down.bias"),
    Rule("norm.weight", "norm.scale"),
    Rule("norm.bias", "norm.bias"),
    Rule("head.weight", "head.kernel", "o i -> i o"),
]

IGNORED: list[str] = []
