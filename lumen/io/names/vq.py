"""Tensor names of LlamaGen's published VQ tokenizers (FoundationVision/LlamaGen vq_ds16_c2i.pt, key "model")."""

from lumen.io.pretrained import Rule

_CONV = "o i h w -> h w i o"
_LINEAR = "o i 1 1 -> i o"


def _norm(original: str, ours: str) -> list[Rule]:
    return [Rule(f"{original}.weight", f"{ours}.scale"), Rule(f"{original}.bias", f"{ours}.bias")]


def _conv(original: str, ours: str, axes: str = _CONV) -> list[Rule]:
    return [Rule(f"{original}.weight", f"{ours}.kernel", axes), Rule(f"{original}.bias", f"{ours}.bias")]


def _residual(original: str, ours: str) -> list[Rule]:
    return [
        *_norm(f"{original}.norm1", f"{ours}.norm1"),
        *_conv(f"{original}.conv1", f"{ours}.conv1"),
        *_norm(f"{original}.norm2", f"{ours}.norm2"),
        *_conv(f"{original}.conv2", f"{ours}.conv2"),
    ]


def _attention(original: str, ours: str) -> list[Rule]:
    return [
        *_norm(f"{original}.norm", f"{ours}.norm"),
        *_conv(f"{original}.q", f"{ours}.query", _LINEAR),
        *_conv(f"{original}.k", f"{ours}.key", _LINEAR),
        *_conv(f"{original}.v", f"{ours}.value", _LINEAR),
        *_conv(f"{original}.proj_out", f"{ours}.projection", _LINEAR),
    ]


def _half(name: str) -> list[Rule]:
    """The rules that encoder and decoder share."""
    original, ours = f"{name}.conv_blocks.{{i}}", f"{name}.levels.{{i}}"
    return [
        *_conv(f"{name}.conv_in", f"{name}.conv_in"),
        *_residual(f"{original}.res.{{j}}", f"{ours}.blocks.{{j}}"),
        *_conv(f"{original}.res.{{j}}.nin_shortcut", f"{ours}.blocks.{{j}}.shortcut", _LINEAR),
        *_attention(f"{original}.attn.{{j}}", f"{ours}.attentions.{{j}}"),
        *_residual(f"{name}.mid.0", f"{name}.middle.block1"),
        *_attention(f"{name}.mid.1", f"{name}.middle.attention"),
        *_residual(f"{name}.mid.2", f"{name}.middle.block2"),
        *_norm(f"{name}.norm_out", f"{name}.norm_out"),
        *_conv(f"{name}.conv_out", f"{name}.conv_out"),
    ]


RULES = [
    *_half("encoder"),
    *_conv("encoder.conv_blocks.{i}.downsample.conv", "encoder.downsamples.{i}"),
    *_half("decoder"),
    *_conv("decoder.conv_blocks.{i}.upsample.conv", "decoder.upsamples.{i}.conv"),
    *_conv("quant_conv", "to_code", _LINEAR),
    *_conv("post_quant_conv", "from_code", _LINEAR),
    Rule("quantize.embedding.weight", "codebook"),
]

IGNORED = [r"quantize\.codebook_used"]
