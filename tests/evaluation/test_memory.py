"""Predictions of memory and work against real arrays, counted programs, and arithmetic on paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lumen import kv_cache, plan
from lumen.evaluation.memory import (
    PUBLISHED,
    Deployment,
    cache_bytes,
    decode_bytes,
    decode_flops,
    max_context,
    memory_report,
    memory_table,
    peak_bytes,
    prefill_flops,
    temporary_bytes,
    weight_bytes,
)
from lumen.kv_cache import StreamingHeads
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.qtensor import QuantizedLinear
from pallas_kernels.w4a16_matmul import pack

LLAMA = DecoderConfig.llama3_8b()
HALF = DecoderConfig.llama3_8b(streaming=StreamingHeads((4,) * 32))
K128 = 128 * 1024


def abstract(config):
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def test_caches_on_paper():
    """Llama 3 8B in bfloat16: 2 x 2 bytes x 128 for each head and token."""
    one = 2 * 2 * 128
    assert cache_bytes(Deployment(LLAMA), 1) == 32 * 8 * one == 128 * 1024
    # Per layer, four full heads at 128K tokens take 268 MB, and four streaming heads of 64 + 256 tokens 655 KB
    # (DuoAttention's sizes), here 16 KB more: room for the newest token, in rows of 8.
    layer = dataclasses.replace(HALF, depth=1, streaming=StreamingHeads((4,)))
    full, streaming = 268_435_456, 655_360
    assert full == 4 * K128 * one
    assert streaming == 4 * (64 + 256) * one
    assert cache_bytes(Deployment(layer), K128) == full + streaming + 4 * 8 * one
    # int8: a byte instead of two, and 4 bytes of scale and zero point for each token and head.
    assert cache_bytes(Deployment(layer, cache_bits=8), 1000) == 2 * (4 * 1000 + 4 * 328) * (128 + 4)
    assert cache_bytes(Deployment(layer, cache_bits=4, batch=3), 1000) == 3 * 2 * (4 * 1000 + 4 * 328) * (64 + 4)


@pytest.mark.parametrize("streaming", [None, StreamingHeads((1, 0), 3, 5), StreamingHeads((2, 1), 0, 4)])
@pytest.mark.parametrize("slots", [7, 40])
def test_caches_are_those_of_the_model(streaming, slots):
    config = DecoderConfig.debug(streaming=streaming)
    for bits, dtype in ((16, jnp.bfloat16), (8, "int8"), (4, "int4")):
        cache = jax.eval_shape(lambda dtype=dtype: abstract(config).empty_cache(3, slots, dtype))
        assert cache_bytes(Deployment(config, cache_bits=bits, batch=3), slots) == kv_cache.cache_bytes(cache)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_those_of_the_model(tied, bias):
    config = DecoderConfig.debug(width=128, hidden=320, tied=tied, qkv_bias=bias)

    def build(packed):
        model = Decoder(config, rngs=nnx.Rngs(0))
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
        for name in ("query", "key", "value", "output", "gate", "up", "down") if packed else ():
            linear = getattr(model.blocks, name)
            depth, inputs, outputs = linear.kernel.shape
            q = jnp.zeros((depth, inputs, outputs), jnp.uint8)
            side = jnp.ones((depth, inputs // 32, outputs), jnp.bfloat16)
            weight = jax.vmap(lambda q, scale, zero: pack(q, scale, zero, 32))(q, side, side)
            setattr(model.blocks, name, QuantizedLinear(weight, linear.bias, axes=(None, None)))
        return model

    for weights in ("bf16", "w4a16"):
        model = nnx.eval_shape(functools.partial(build, weights == "w4a16"))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
        assert weight_bytes(Deployment(config, weights=weights, group=32)) == size


def test_published_sizes():
    """8.03 and 7.62 billion parameters; 4-bit blocks of Llama 3 8B take 26.6 % of 13.96 GB (docs/awq.md)."""
    llama, qwen = (weight_bytes(Deployment(make())) for make in PUBLISHED.values())
    assert (round(llama / 2e9, 2), round(qwen / 2e9, 2)) == (8.03, 7.62)
    blocks = llama - 2 * (2 * 128_256 * 4096 + 4096)
    packed = weight_bytes(Deployment(LLAMA, weights="w4a16")) - (llama - blocks)
    assert blocks == pytest.approx(13.96e9, rel=1e-3)
    assert packed == pytest.approx(3.71e9, rel=1e-3)


def test_decode_step_counted():
    """A decode step's products are those that the traced program has; the model attends to all slots of its cache."""
    config = DecoderConfig.debug()
    model = abstract(config)
    cache = jax.eval_shape(lambda: model.empty_cache(2, 40, jnp.float32))

    def step(model, tokens, cache):
        hidden, _ = model(tokens, cache=cache)
        return model.logits(hidden)

    counted = plan.count_flops(jax.jit(step).trace(model, jax.ShapeDtypeStruct((2, 1), jnp.int32), cache).jaxpr)
    assert counted.matmul == decode_flops(Deployment(config, batch=2), 40)


def pairs(context, chunk, window, prefill):
    """Queries and keys that a streaming head brings together, one by one."""
    total = 0
    for query in range(context):
        start = query if prefill == "token" else query // chunk * chunk  # what had been read when its chunk began
        held = [key for key in range(start) if key < window[0] or key >= start - window[1]]
        total += len(held) + query - start + 1
    return total


@pytest.mark.parametrize("prefill", ["token", "chunk"])
@pytest.mark.parametrize(("context", "chunk"), [(1, 4), (9, 4), (40, 8), (43, 8), (43, 3), (43, 0)])
def test_prefill_pair_by_pair(prefill, context, chunk):
    heads = StreamingHeads((1, 0), 2, 5, prefill)
    config = DecoderConfig.debug(streaming=heads)
    seen = pairs(context, chunk or context, (2, 5), prefill)
    full = context * (context + 1) // 2
    # 4 H = 64 for each of two query heads per key head; one full and three streaming key heads.
    attention = 64 * 2 * (1 * full + 3 * seen)
    linears = 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 112)  # two layers
    want = 2 * 3 * (context * linears + 64 * 128) + 3 * attention
    assert prefill_flops(Deployment(config, batch=3, prefill_chunk=chunk), context) == want


def test_prefill_and_decode_on_paper():
    """Full heads at length T: 2 T^2 H a head and layer, causal; a head at decode 4 T H."""
    length = 10**6
    growth = prefill_flops(Deployment(LLAMA), 2 * length) - 2 * prefill_flops(Deployment(LLAMA), length)
    assert growth == pytest.approx(2 * (4 - 2) * length**2 * 128 * 32 * 32, rel=1e-3)
    assert decode_flops(Deployment(LLAMA), length) - decode_flops(Deployment(LLAMA), 1) == 4 * 128 * 32 * 32 * (
        length - 1
    )
    # Half of the heads cost half, but for 321 tokens.
    saved = decode_flops(Deployment(LLAMA), length) - decode_flops(Deployment(HALF), length)
    assert saved == 4 * 128 * 32 * 16 * (length - 321)


def test_decode_reads_weights_and_cache():
    deployment = Deployment(LLAMA, batch=4)
    embedding = 2 * 4096 * (128_256 - 4)
    assert decode_bytes(deployment, 5000) == weight_bytes(deployment) - embedding + cache_bytes(deployment, 5000)
    tied = Deployment(DecoderConfig.debug(tied=True))
    assert decode_bytes(tied, 9) == weight_bytes(tied) + cache_bytes(tied, 9)


def test_temporaries_hold_a_real_chunk():
    """The estimate is above what XLA needs for a pass over a chunk whose attention is small, and not far above."""
    config = DecoderConfig.debug(width=256, heads=4, kv_heads=2, head_dim=64, hidden=1024, vocabulary=64, depth=3)

    def read(model, tokens):
        hidden, _ = model(tokens)
        return model.logits(hidden[:, -1])

    compiled = jax.jit(read).lower(abstract(config), jax.ShapeDtypeStruct((64, 16), jnp.int32)).compile()
    used = compiled.memory_analysis().temp_size_in_bytes / 2  # float32 is twice bfloat16
    estimate = temporary_bytes(Deployment(config, batch=64), 16, 16)
    assert 0.3 * estimate < used < estimate


def test_temporaries_on_paper():
    """Llama 3 8B: rows of 2 D + 3 F numbers, logits, one of 32 layers' 13.96 GB of weights, and of its cache."""
    rows = 2 * 1000 * (2 * 4096 + 3 * 14336)
    layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 5000 * 4096
    assert temporary_bytes(Deployment(LLAMA), 1000, 5000) == rows + 4 * 128_256 + layer


@pytest.mark.parametrize("capacity", [17e9, 30e9, 85e9, 3e12])
@pytest.mark.parametrize("config", [LLAMA, HALF])
def test_longest_context_is_the_longest(config, capacity):
    deployment = Deployment(config)
    longest = max_context(deployment, int(capacity))
    assert longest
    assert peak_bytes(deployment, longest) <= capacity < peak_bytes(deployment, longest + 1)


def test_longest_context_without_one():
    assert max_context(Deployment(LLAMA), 16_000_000_000) == 0
    streaming = DecoderConfig.llama3_8b(streaming=StreamingHeads((0,) * 32))
    assert max_context(Deployment(streaming), 20_000_000_000) is None


def test_published_claims():
    """DuoAttention on one A100 of 80 GB, arXiv:2410.10819: arithmetic gives about what was measured there."""
    a100 = plan.CHIPS["a100"].memory_bytes
    # "0.52M tokens" of Llama 3 8B in bfloat16, here with almost no activations.
    weights_alone = dataclasses.replace(Deployment(LLAMA), prefill_chunk=1)
    assert max_context(weights_alone, a100) == pytest.approx(0.52e6, rel=0.03)
    # Half of the heads at 320K tokens, measured: memory 1.67, decoding 1.50, prefill 1.63 times less.
    full, half = (
        Deployment(LLAMA),
        Deployment(dataclasses.replace(HALF, streaming=StreamingHeads((4,) * 32, prefill="chunk"))),
    )
    length = 320_000
    assert 1.5 < peak_bytes(full, length) / peak_bytes(half, length) < 1.67
    assert 1.5 < decode_bytes(full, length) / decode_bytes(half, length) < 1.67
    assert prefill_flops(full, length) / prefill_flops(half, length) == pytest.approx(1.63, abs=0.01)
    assert cache_bytes(full, length) / cache_bytes(half, length) == pytest.approx(2, rel=0.01)


def test_report_and_table():
    chip = plan.CHIPS["h200"]
    full, half = (memory_report(name, Deployment(c), 2**20, chip) for name, c in (("all", LLAMA), ("half", HALF)))
    assert (full.fits, half.fits) == (False, True)
    assert full.max_context is not None
    assert full.max_context < 2**20
    assert half.decode_seconds == half.decode_bytes / 4.8e12  # reading takes longer than computing
    assert half.prefill_seconds == half.prefill_flops / 989.4e12
    table = memory_table([full, half])
    assert table.startswith(
        "| 1,048,576 tokens, NVIDIA H200 | all | half |\n|---|---|---|\n| full heads | 256 of 256 | 128 of 256 |"
    )
    assert "| does not fit: 161.5 of 150.1 GB | fits: 90." in table
    unknown = memory_report("cpu", Deployment(HALF), 100, plan.Chip("somewhere", 10**12, None, None))
    assert unknown.decode_seconds is None
    assert "| decode time | unknown |" in memory_table([unknown])


def test_mistakes():
    with pytest.raises(ValueError, match=r"weights='int8', cache_bits=16; wanted 'bf16' or 'w4a16', and 16, 8 or 4"):
        Deployment(LLAMA, weights="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="group=100 does not divide the input channels of every linear, "):
        Deployment(LLAMA, weights="w4a16", group=100)
    with pytest.raises(ValueError, match="prefill_chunk=-1, batch=1; wanted 0 or more, and 1 or more"):
        Deployment(LLAMA, prefill_chunk=-1)
    with pytest.raises(ValueError, match="context=0; wanted 1 token or more"):
        memory_report("x", Deployment(LLAMA), 0, plan.CHIPS["h200"])
