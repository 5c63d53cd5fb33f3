"""The attention entry: what each description of a mask shows, and every way of computing it against NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumen.attention import Full, Grouped, Mask, Streaming, attend
from lumen.sharding import make_mesh
from pallas_kernels.block_sparse_attention import RangeMask, dense_mask


def visible(mask: Mask, queries: int, keys: int) -> np.ndarray:
    return np.asarray(dense_mask(mask.ranges(queries, keys), keys))


def inputs(batch=2, queries=12, slots=12, heads=4, keys=2, width=8, dtype=jnp.float32):
    random = [jax.random.key(i) for i in range(3)]
    q = jax.random.normal(random[0], (batch, queries, heads, width), dtype)
    return q, *(jax.random.normal(key, (batch, slots, keys, width), dtype) for key in random[1:])


def softmax_attention(q, k, v, seen, *, scale=None, soft_cap=None):
    """float64: (o, lse), zero and -inf for a query that sees nothing."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    group = q.shape[2] // k.shape[2]
    logits = np.einsum("BTNH,BSNH->BNTS", q, k.repeat(group, axis=2)) * (scale or q.shape[3] ** -0.5)
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
    weights = np.exp(logits) * np.broadcast_to(seen, logits.shape)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0])
    return np.einsum("BNTS,BSNH->BTNH", weights / np.where(total == 0, 1, total), v.repeat(group, axis=2)), lse


def rounding(want, terms):
    """Largest difference of float32 sums of `terms` products, four sums deep."""
    return 4 * terms * 2**-24 * np.abs(np.asarray(want)).max()


class TestKinds:
    """Each kind against its definition, written out with loops."""

    def check(self, mask, keys, rule):
        want = [[rule(i, j) for j in range(keys)] for i in range(keys)]
        np.testing.assert_array_equal(visible(mask, keys, keys)[0, 0], want)

    def test_causal(self):
        self.check(Mask(), 7, lambda i, j: j <= i)

    def test_everything(self):
        self.check(Mask(causal=False), 7, lambda i, j: True)

    @pytest.mark.parametrize(("sink", "recent"), [(3, 5), (0, 4), (4, 1), (20, 2)])
    def test_sink_and_recent(self, sink, recent):
        self.check(Mask((Streaming(sink, recent),)), 17, lambda i, j: j <= i and (j < sink or j > i - recent))

    def test_recent_besides_itself(self):
        mask = Mask((Streaming(2, 3, includes_self=False),))
        self.check(mask, 17, lambda i, j: j <= i and (j < 2 or j > i - 4))

    @pytest.mark.parametrize(("sink", "recent"), [(4, 8), (3, 5)])
    def test_whole_blocks(self, sink, recent):
        """One block of sinks, and two of recent tokens with the query's own."""
        mask = Mask((Streaming(sink, recent, block=4),))
        self.check(mask, 22, lambda i, j: j <= i and (j < 4 or j // 4 > i // 4 - 2))

    @pytest.mark.parametrize(("size", "shift"), [(4, 0), (4, 2), (5, 2), (32, 16)])
    def test_groups(self, size, shift):
        mask = Mask((Grouped(size, shift),))
        self.check(mask, 22, lambda i, j: j <= i and (i + shift) // size == (j + shift) // size)

    def test_groups_that_leak(self):
        def rule(i, j):
            same = (i + 2) // 4 == (j + 2) // 4
            return (j <= i and same) or (i < 2 and j >= 18)

        self.check(Mask((Grouped(4, 2, leak=True),)), 20, rule)

    @pytest.mark.parametrize("kind", [Full(), Streaming(2, 3), Streaming(2, 4, block=2), Grouped(4, 2)])
    def test_each_packed_sample_as_if_alone(self, kind):
        cuts = 0, 5, 6, 17, 22
        segments = jnp.asarray(np.repeat([3, 1, 3, 0], np.diff(cuts))[None], jnp.int32)
        got = visible(Mask((kind,), segments=segments), 22, 22)[0, 0]
        want = np.zeros((22, 22), bool)
        for start, end in itertools.pairwise(cuts):
            want[start:end, start:end] = visible(Mask((kind,)), end - start, end - start)[0, 0]
        np.testing.assert_array_equal(got, want)

    @pytest.mark.parametrize("kind", [Full(), Streaming(2, 3), Grouped(4, 2), Grouped(4, 2, leak=True)])
    def test_padding_is_not_seen_and_sees_nothing(self, kind):
        got = visible(Mask((kind,), lengths=jnp.array([9, 12, 0])), 12, 12)[:, 0]
        for row, length in zip(got, (9, 12, 0), strict=True):
            if length:
                np.testing.assert_array_equal(row[:length, :length], visible(Mask((kind,)), length, length)[0, 0])
            assert not row[length:].any()
            assert not row[:, length:].any()

    def test_offset(self):
        np.testing.assert_array_equal(visible(Mask(offset=5), 3, 8), visible(Mask(), 8, 8)[:, :, 5:])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Mask((Full(), Grouped(4))), "2 kinds and no heads"),
            (lambda: Mask((Grouped(4),), causal=False), "only Full can do without causal"),
            (lambda: Streaming(0, 0), "recent >= 1"),
            (lambda: Grouped(4, 4), "shift < size"),
        ],
    )
    def test_impossible_masks(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


MASKS = {
    "causal": Mask(),
    "everything": None,
    "kinds": Mask((Full(), Streaming(2, 3), Grouped(6, 3)), heads=(0, 1, 2, 1)),
    "padded": Mask(lengths=jnp.array([9, 0])),
}


class TestAttend:
    """At once and block by block (long inputs; DENSE_LOGITS is set to zero), against float64."""

    @pytest.fixture(params=["at once", "in blocks"])
    def way(self, request, monkeypatch):
        if request.param == "in blocks":
            monkeypatch.setattr("lumen.attention.DENSE_LOGITS", 0)
            monkeypatch.setattr("pallas_kernels.block_sparse_attention.reference.ROWS", 5)
            monkeypatch.setattr("pallas_kernels.block_sparse_attention.reference.COLUMNS", 4)
        return request.param

    @pytest.mark.parametrize("soft_cap", [None, 2.0])
    @pytest.mark.parametrize("name", MASKS)
    def test_outputs_and_gradients(self, way, name, soft_cap):
        mask, (q, k, v) = MASKS[name], inputs()
        run = functools.partial(attend, mask=mask, scale=0.3, soft_cap=soft_cap, with_lse=True)
        o, lse = run(q, k, v)
        seen = visible(mask or Mask(causal=False), 12, 12)
        want, want_lse = softmax_attention(q, k, v, seen, scale=0.3, soft_cap=soft_cap)
        np.testing.assert_allclose(o, want, rtol=0, atol=rounding(want, 12))
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=rounding(want_lse[np.isfinite(want_lse)], 12))

        # One directional derivative of both outputs against central differences of the float64 attention: h = 1e-4
        # leaves an error of h**2 = 1e-8, below float32's own.
        weight = np.random.default_rng(0).normal(size=o.shape), np.random.default_rng(1).normal(size=lse.shape)
        weight[1][~np.isfinite(want_lse)] = 0

        def total(o, lse, xp):
            return (o * weight[0]).sum() + (xp.where(xp.isfinite(lse), lse, 0) * weight[1]).sum()

        grads = jax.grad(lambda *qkv: total(*run(*qkv), jnp), (0, 1, 2))(q, k, v)
        for argument, grad in enumerate(grads):
            step = np.random.default_rng(2).normal(size=grad.shape) * 1e-4
            ends = []
            for sign in (1, -1):
                moved = [np.asarray(array, np.float64) for array in (q, k, v)]
                moved[argument] = moved[argument] + sign * step
                ends.append(total(*softmax_attention(*moved, seen, scale=0.3, soft_cap=soft_cap), np))
            slope = (ends[0] - ends[1]) / 2e-4
            got = (np.asarray(grad, np.float64) * step).sum() / 1e-4
            # The sum of 768 gradient elements, each of some 100 float32 roundings.
            bound = 2**-24 * 100 * np.abs(np.asarray(grad) * step).sum() / 1e-4 + 1e-6
            assert abs(got - slope) < bound

    def test_traced_heads(self, way):
        q, k, v = inputs()
        mask = MASKS["kinds"]
        run = jax.jit(lambda heads: attend(q, k, v, mask=Mask(mask.kinds, heads)))
        want = attend(q, k, v, mask=mask)
        np.testing.assert_allclose(run(jnp.asarray(mask.heads)), want, rtol=0, atol=rounding(want, 12))
        whole = jax.jit(lambda mask: attend(q, k, v, mask=mask))(mask)
        np.testing.assert_allclose(whole, want, rtol=0, atol=rounding(want, 12))

    def test_half_precision(self, way):
        q, k, v = inputs(dtype=jnp.bfloat16)
        got = attend(q, k, v, mask=Mask())
        assert got.dtype == jnp.bfloat16
        want, _ = softmax_attention(q, k, v, visible(Mask(), 12, 12))
        # Weights and output are rounded to bfloat16 once each.
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8, atol=2**-8 * np.abs(want).max())

    @pytest.mark.parametrize("pattern", ["traced", "known"])
    def test_on_a_mesh(self, way, pattern):
        """Samples over fsdp, heads over tensor: each device takes its own part of the pattern."""
        q, k, v = inputs(batch=4, heads=8, keys=4)
        heads = (0, 0, 1, 1, 2, 2, 1, 1)
        kinds = MASKS["kinds"].kinds
        segments = jnp.asarray(np.arange(4)[:, None] * 3 < np.arange(12), jnp.int32)
        mask = lambda heads: Mask(kinds, heads, segments=segments)  # noqa: E731
        want = attend(q, k, v, mask=mask(heads))
        with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
            if pattern == "traced":
                got = jax.jit(lambda heads: attend(q, k, v, mask=mask(heads)))(jnp.asarray(heads))
            else:
                got = jax.jit(lambda: attend(q, k, v, mask=mask(heads)))()
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 12))

    @pytest.mark.parametrize("shape", [(), (7,), (1, 7), (3, 1, 1, 7), (3, 4, 1, 7)])
    @pytest.mark.parametrize("queries", [1, 2])
    def test_boolean_masks(self, queries, shape):
        """One query a row has a path of its own, and so have a few."""
        q, k, v = inputs(3, queries, 7)
        mask = jax.random.bernoulli(jax.random.key(3), 0.6, shape).at[..., 2].set(True) if shape else None
        want, _ = softmax_attention(q, k, v, True if mask is None else mask)
        np.testing.assert_allclose(attend(q, k, v, mask=mask), want, rtol=0, atol=rounding(want, 7))

    def test_ranges_of_one_query(self):
        q, k, v = inputs(2, 1, 9)
        mask = RangeMask(jnp.array([[[[0, 2, 5, 7]], [[0, 9, 9, 9]]]], jnp.int32))
        want, want_lse = softmax_attention(q, k, v, np.asarray(dense_mask(mask, 9)))
        np.testing.assert_allclose(attend(q, k, v, mask=mask), want, rtol=0, atol=rounding(want, 9))
        o, lse = attend(q, k, v, mask=mask, with_lse=True)
        np.testing.assert_allclose(o, want, rtol=0, atol=rounding(want, 9))
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=rounding(want_lse, 9))

    def test_boolean_mask_with_more(self):
        with pytest.raises(ValueError, match="describe the mask with a Mask"):
            attend(*inputs(), mask=jnp.ones((12, 12), bool), with_lse=True)

    def test_memory_does_not_grow_with_the_square(self):
        def temporaries(length):
            shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
            lowered = jax.jit(functools.partial(attend, mask=Mask())).lower(*shapes)
            return lowered.compile().memory_analysis().temp_size_in_bytes

        # Block lists grow with (T / 256)**2, 4 bytes each and a few copies; all logits would be 4 T**2.
        assert temporaries(16384) - temporaries(4096) < 32 * 64**2 * 4
