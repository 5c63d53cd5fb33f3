"""Tensor names of Llama and Qwen2 checkpoints (huggingface/transformers LlamaForCausalLM and Qwen2ForCausalLM)."""

from lumen.io.pretrained import Rule

LAYER = "model.layers.{layer}."
# Published name of each linear of a layer -> its name in lumen.language.decoder.Block.
LINEARS = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}

RULES = [
    Rule("model.embed_tokens.weight", "embedding"),
    Rule(LAYER + "input_layernorm.weight", "blocks.input_norm.scale"),
    Rule(LAYER + "post_attention_layernorm.weight", "blocks.mlp_norm.scale"),
    *[Rule(f"{LAYER}{theirs}.weight", f"blocks.{ours}.kernel", "o i -> i o") for theirs, ours in LINEARS.items()],
    *[Rule(f"{LAYER}{theirs}.bias", f"blocks.{ours}.bias") for theirs, ours in LINEARS.items()],
    Rule("model.norm.weight", "norm.scale"),
    Rule("lm_head.weight", "head.kernel", "o i -> i o"),
]

IGNORED = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
