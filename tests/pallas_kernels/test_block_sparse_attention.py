"""Masks as ranges, the lists of blocks that follow, and attention over them in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumen import plan
from pallas_kernels.block_sparse_attention import (
    RangeMask,
    block_lists,
    block_sparse_attention,
    block_table,
    count_logits,
    dense_mask,
    reference,
)


def causal(queries, keys):
    query = np.arange(queries) + keys - queries
    return np.stack([0 * query, query + 1, query + 1, query + 1], axis=-1).astype(np.int32)


def streaming(queries, keys, sink, recent):
    stop = np.arange(queries) + keys - queries + 1
    sink = np.minimum(sink, stop)
    return np.stack([0 * stop, sink, np.clip(stop - recent, sink, stop), stop], axis=-1).astype(np.int32)


def packed(queries, cuts):
    start = np.zeros(queries, np.int32)
    for cut in cuts:
        start[cut:] = cut
    stop = np.arange(queries) + 1
    return np.stack([start, stop, stop, stop], axis=-1).astype(np.int32)


CASES = {
    "causal": (causal(40, 40), 40),
    "more keys than queries": (causal(23, 61), 61),
    "streaming": (streaming(70, 70, 5, 11), 70),
    "one recent token": (streaming(33, 64, 8, 1), 64),
    "packed": (packed(50, (7, 8, 31)), 50),
    "nobody sees anything": (np.zeros((9, 4), np.int32), 20),
    "all": (np.broadcast_to(np.array([0, 26, 26, 26], np.int32), (17, 4)), 26),
}


class TestLists:
    @pytest.mark.parametrize("case", CASES)
    def test_blocks_are_those_of_the_dense_mask(self, case):
        """A block is listed if a query sees one of its keys; it needs no mask if all see all of it."""
        ranges, keys = CASES[case]
        dense = np.asarray(dense_mask(RangeMask(jnp.asarray(ranges)[None, None]), keys))[0, 0]
        rows, columns = 8, 12
        seen, whole = (np.asarray(a) for a in block_table(jnp.asarray(ranges), keys, rows=rows, columns=columns))
        for i, j in np.ndindex(seen.shape):
            block = dense[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            assert seen[i, j] == block.any()
            assert whole[i, j] == (block.all() and block.shape[1] == columns)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_lists_hold_the_table(self, transposed):
        ranges, keys = CASES["streaming"]
        table = block_table(jnp.asarray(ranges), keys, rows=8, columns=12)
        seen, whole = (np.asarray(a).T if transposed else np.asarray(a) for a in table)
        lists = block_lists(jnp.asarray(ranges), keys, rows=8, columns=12, transposed=transposed)
        for row in range(len(seen)):
            first, count = int(lists.whole[row]), int(lists.count[row])
            np.testing.assert_array_equal(np.sort(lists.indices[row, :first]), np.flatnonzero(whole[row]))
            np.testing.assert_array_equal(np.sort(lists.indices[row, :count]), np.flatnonzero(seen[row]))

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("longer", [1, 9])
    def test_logits_are_those_of_the_blocks(self, case, longer):
        """`count_logits` against the table of blocks of 128 x 128; longer: every query nine times, every key too."""
        ranges, keys = CASES[case]
        ranges, keys = np.repeat(ranges, longer, axis=0) * longer, keys * longer
        rows, columns = min(128, len(ranges)), min(128, keys)
        seen, _ = block_table(jnp.asarray(ranges), keys, rows=rows, columns=columns)
        assert count_logits(ranges, keys) == np.asarray(seen).sum() * rows * columns


class TestReference:
    def test_blocks_that_nobody_sees_are_never_read(self, monkeypatch):
        """They hold NaN, and neither outputs nor gradients have one. Keys 16-31 lie outside all of these masks."""
        monkeypatch.setattr(reference, "ROWS", 8)
        monkeypatch.setattr(reference, "COLUMNS", 8)
        ranges = streaming(8, 64, 12, 20)
        q = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
        k = jax.random.normal(jax.random.key(1), (1, 64, 1, 4)).at[:, 16:32].set(jnp.nan)

        def total(q, k):
            o, lse = block_sparse_attention(q, k, k, RangeMask(jnp.asarray(ranges)[None, None]), implementation="xla")
            return o.sum() + lse.sum()

        value, (dq, dk) = jax.value_and_grad(total, (0, 1))(q, k)
        assert np.isfinite(value)
        assert np.isfinite(dq).all()
        assert np.isfinite(dk).all()
        np.testing.assert_array_equal(dk[:, 16:32], 0)

    def test_shapes_that_do_not_fit(self):
        q, k = jnp.zeros((2, 8, 4, 4)), jnp.zeros((2, 8, 2, 4))
        good = jnp.zeros((1, 1, 8, 4), jnp.int32)
        two = jnp.zeros((2, 1, 8, 4), jnp.int32)
        for ranges, pattern in ((good[:, :, :7], None), (two, None), (good, jnp.zeros(3))):
            with pytest.raises(ValueError, match=r"q \[2, 8, 4, 4\], k \[2, 8, 2, 4\].*ranges.*wanted"):
                block_sparse_attention(q, k, k, RangeMask(ranges, pattern))
        with pytest.raises(ValueError, match="K dividing N"):
            block_sparse_attention(q[:, :, :3], k, k, RangeMask(good))

    def test_compiles_for_a_tpu(self, tmp_path):
        """Forward and backward, and no buffer of T x S."""
        (tmp_path / "step.py").write_text(STEP)
        code, output = plan.run_isolated([str(tmp_path / "step.py")], topology="v5p:2x2x1", timeout=300.0)
        assert code == 0, output
        # Inputs are 40 MiB; all logits of one head in float32 would be 1024.
        assert float(output.rpartition("MiB")[2]) < 512


STEP = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from lumen import plan, sharding
from pallas_kernels.block_sparse_attention import RangeMask, block_sparse_attention
devices = plan.topology("v5p:2x2x1").devices
place = NamedSharding(sharding.make_mesh({}, devices[:1]), PartitionSpec())
def step(q, k, v, ranges):
    o, lse = block_sparse_attention(q, k, v, RangeMask(ranges), implementation="xla")
    return o.astype(jnp.float32).sum() + lse.sum()
shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=place)
args = shape(1, 16384, 8, 128), shape(1, 16384, 2, 128), shape(1, 16384, 2, 128), shape(1, 1, 16384, 4, dtype=jnp.int32)
compiled = jax.jit(jax.value_and_grad(step, (0, 1, 2))).lower(*args).compile()
print("MiB", compiled.memory_analysis().temp_size_in_bytes / 2**20)
"""
