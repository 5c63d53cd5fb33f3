"""Caches: whatever way tokens come in, they see what the mask says, and memory is what the formula says."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumen.attention import Full, Mask, Streaming, attend, attend_parts
from lumen.kv_cache import DenseCache, MixedCache, StreamingCache, StreamingHeads, cache_bytes
from lumen.sharding import make_mesh
from pallas_kernels.decode_attention import dequantize_kv, quantize_kv

SINK, RECENT = 3, 5
HEADS = StreamingHeads((2,), SINK, RECENT)
KINDS = Full(), Streaming(SINK, RECENT, includes_self=False)


def tokens(length, batch=2, heads=4, keys=2, width=8):
    random = [jax.random.key(i) for i in range(3)]
    q = jax.random.normal(random[0], (batch, length, heads, width))
    return q, *(jax.random.normal(key, (batch, length, keys, width)) for key in random[1:])


def feed(cache, q, k, v, sizes):
    """Attention of tokens that come in chunks of these sizes: [B, T, N, H], and the cache."""

    @jax.jit
    def step(cache, q, k, v):
        cache, parts = cache.extend(0, k, v)
        return attend_parts(q, parts), cache.advance(q.shape[1])

    outs, ends = [], [0, *itertools.accumulate(sizes)]
    for start, end in itertools.pairwise(ends):
        out, cache = step(cache, *(array[:, start:end] for array in (q, k, v)))
        outs.append(out)
    return jnp.concatenate(outs, axis=1), cache


def rounding(want, terms):
    """Largest difference of float32 sums of `terms` products, four sums deep."""
    return 4 * terms * 2**-24 * np.abs(np.asarray(want)).max()


CHUNKS = {
    "one by one": (1,) * 23,
    "at once": (23,),
    "chunks": (2, 1, 9, 1, 4, 6),
    "short chunks": (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1),
    "sinks alone first": (3, 20),
}


class TestStreaming:
    @pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
    def test_any_chunks_equal_the_mask(self, sizes):
        q, k, v = tokens(23)
        got, _ = feed(StreamingCache.empty((1, 2, 2, 8), jnp.float32, HEADS), q, k, v, sizes)
        want = attend(q, k, v, mask=Mask(KINDS[1:]))
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 23))

    def test_first_chunk_is_dense_and_later_ones_see_all_of_theirs(self):
        """DuoAttention's own prefill: queries 0-8 see all before them, 9-16 tokens 0-2, 4-8 and their chunk."""
        q, k, v = tokens(18)
        heads = dataclasses.replace(HEADS, prefill="chunk")
        got, _ = feed(StreamingCache.empty((1, 2, 2, 8), jnp.float32, heads), q, k, v, (9, 8, 1))
        seen = np.tril(np.ones((18, 18), bool))
        seen[9:17, 3:4] = False
        seen[17, 3:12] = False
        want = attend(q, k, v, mask=jnp.asarray(seen))
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 18))

    def test_holds_sinks_and_the_latest(self):
        _, k, v = tokens(23)
        _, cache = feed(StreamingCache.empty((1, 2, 2, 8), jnp.float32, HEADS), *tokens(23), CHUNKS["chunks"])
        for stored, given in ((cache.keys, k), (cache.values, v)):
            held = {tuple(row) for row in np.asarray(stored[0, 1, 1, : SINK + RECENT + 1])}
            kept = [*range(SINK), *range(23 - RECENT - 1, 23)]
            assert held == {tuple(row) for row in np.asarray(given[1, kept, 1])}

    def test_rows_of_several_lengths(self):
        """Padded prompts, then single tokens: each row as if it were alone."""
        q, k, v = tokens(20)
        lengths = np.array([14, 4])
        cache = StreamingCache.empty((1, 2, 2, 8), jnp.float32, HEADS).within(lengths)
        _, cache = feed(cache, q[:, :14], k[:, :14], v[:, :14], (8, 6))
        cache = cache.with_length(jnp.asarray(lengths, jnp.int32))
        got = []
        for step in range(4):
            one = [
                jnp.stack([array[row, length + step] for row, length in enumerate(lengths)])[:, None]
                for array in (q, k, v)
            ]
            out, cache = feed(cache, *one, (1,))
            got.append(out)
        got = jnp.concatenate(got, axis=1)
        for row, length in enumerate(lengths):
            alone = [array[row : row + 1, : length + 4] for array in (q, k, v)]
            want = attend(*alone, mask=Mask(KINDS[1:]))[0, length:]
            np.testing.assert_allclose(got[row], want, rtol=0, atol=rounding(want, 20))

    def test_memory_is_constant(self):
        cache = StreamingCache.empty((1, 2, 3, 8), jnp.bfloat16, HEADS)
        _, later = feed(cache, *tokens(400, heads=3, keys=3), (100,) * 4)
        assert cache_bytes(later) == cache_bytes(cache) == 2 * 2 * 3 * 16 * 8 * 2


class TestMixed:
    @pytest.mark.parametrize("dense", [0, 1, 2])
    @pytest.mark.parametrize("sizes", [CHUNKS["one by one"], CHUNKS["chunks"]], ids=["one by one", "chunks"])
    def test_equals_the_mask(self, dense, sizes):
        q, k, v = tokens(23)
        heads = dataclasses.replace(HEADS, dense=(dense,))
        got, _ = feed(MixedCache.empty(heads, (2, 2, 23, 8), jnp.float32), q, k, v, sizes)
        want = attend(q, k, v, mask=Mask(KINDS, heads=(0,) * 2 * dense + (1,) * 2 * (2 - dense)))
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 23))

    def test_bytes_without_padding(self):
        """Layers of 3, 0 and 1 dense heads of 4, 4 + 16 + 1 slots in rows of 8: what each holds, and nothing else."""
        heads = StreamingHeads((3, 0, 1), 4, 16)
        cache = MixedCache.empty(heads, (2, 4, 100, 8), jnp.bfloat16)
        assert cache_bytes(cache) == 2 * 2 * 8 * 2 * (4 * 100 + 8 * 24)

    def test_impossible_counts(self):
        with pytest.raises(ValueError, match=r"\[5\] dense heads per layer; wanted 0 to 4 each"):
            MixedCache.empty(StreamingHeads((5,)), (1, 4, 8, 8), jnp.float32)
        with pytest.raises(ValueError, match="recent >= 1"):
            StreamingHeads((1,), 4, 0)

    def test_a_scan_over_layers_is_refused(self):
        cache = MixedCache.empty(HEADS, (2, 2, 8, 8), jnp.float32)
        with pytest.raises(TypeError, match=r"pass the model through lumen\.layers\.unstack"):
            jax.jit(lambda layer: cache.extend(layer, *tokens(1)[1:]))(0)


class TestDense:
    @pytest.mark.parametrize("sizes", [CHUNKS["one by one"], CHUNKS["chunks"]], ids=["one by one", "chunks"])
    def test_equals_causal_attention(self, sizes):
        q, k, v = tokens(23)
        got, _ = feed(DenseCache.empty((1, 2, 2, 23, 8), jnp.float32), q, k, v, sizes)
        want = attend(q, k, v, mask=Mask())
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 23))


class TestQuantized:
    """Keys and values in 8 and 4 bits behind the same protocol: attention to their rounded values."""

    def rounded(self, array, bits):
        return dequantize_kv(quantize_kv(array.swapaxes(1, 2), bits)).swapaxes(1, 2)

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("sizes", [CHUNKS["one by one"], CHUNKS["chunks"]], ids=["one by one", "chunks"])
    def test_dense(self, bits, sizes):
        q, k, v = tokens(23)
        got, _ = feed(DenseCache.empty((1, 2, 2, 23, 8), f"int{bits}"), q, k, v, sizes)
        want = attend(q, self.rounded(k, bits), self.rounded(v, bits), mask=Mask())
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 23))
        exact = attend(q, k, v, mask=Mask())
        # Half a step of the widest range, some four deviations of 8 normal numbers each way: it is really quantised.
        assert 0.01 / 2**bits < np.abs(got - exact).max() < 8 / 2**bits

    @pytest.mark.parametrize("bits", [8, 4])
    def test_mixed_token_by_token(self, bits):
        q, k, v = tokens(23)
        heads = dataclasses.replace(HEADS, dense=(1,))
        got, _ = feed(MixedCache.empty(heads, (2, 2, 23, 8), f"int{bits}"), q, k, v, CHUNKS["one by one"])
        want = attend(q, self.rounded(k, bits), self.rounded(v, bits), mask=Mask(KINDS, heads=(0, 0, 1, 1)))
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 23))

    def test_mixed_in_chunks(self):
        """New tokens see each other unrounded, and what is cached rounded: between exact and rounded attention."""
        q, k, v = tokens(23)
        heads = dataclasses.replace(HEADS, dense=(1,))
        got, _ = feed(MixedCache.empty(heads, (2, 2, 23, 8), "int8"), q, k, v, CHUNKS["chunks"])
        want = attend(q, k, v, mask=Mask(KINDS, heads=(0, 0, 1, 1)))
        np.testing.assert_allclose(got, want, rtol=0, atol=8 / 2**8)

    @pytest.mark.parametrize(("bits", "width"), [(8, 8), (4, 4)])
    def test_bytes(self, bits, width):
        """Codes, and a float16 scale and zero for each token of each head of keys and values."""
        cache = DenseCache.empty((3, 2, 4, 100, 8), f"int{bits}")
        assert cache_bytes(cache) == 2 * 3 * 2 * 4 * 100 * (width + 4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("sizes", [(9, 1, 1, 1), (5, 4, 3)])
def test_on_a_mesh(dtype, sizes):
    """Samples over fsdp, heads over tensor: each device its own, and the same numbers."""
    q, k, v = tokens(12, batch=4, heads=8, keys=4)
    heads = dataclasses.replace(HEADS, dense=(2,))
    for cache in (MixedCache.empty(heads, (4, 4, 16, 8), dtype), DenseCache.empty((1, 4, 4, 16, 8), dtype)):
        want, _ = feed(cache, q, k, v, sizes)
        with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
            got, _ = feed(cache, q, k, v, sizes)
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 23))
