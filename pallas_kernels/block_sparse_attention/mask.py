"""What a query may see, as ranges of keys, and the blocks of keys that follow from it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

BLOCK = 128  # queries and keys of the blocks that logits are counted in: those of the kernel


class Extent(NamedTuple):
    """How much of a mask is seen, as far as that is known while tracing; for counting operations.

    Attributes:
      logits: for each pattern, how many logits of one head and sample `count_logits` finds.
      exact: False where data decide, and this is what full rows have.
    """

    logits: tuple[int, ...]
    exact: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RangeMask:
    """Each query sees at most two ranges of keys; heads choose among a few patterns.

    Query t of a head n sees key s if r0 <= s < r1 or r2 <= s < r3, where (r0, r1, r2, r3) = ranges[pattern[n], b, t].
    Causal attention is (0, t + 1, t + 1, t + 1), attention sinks with a sliding window (0, sink, t + 1 - recent,
    t + 1), a group of tokens or a packed sample (start, t + 1, t + 1, t + 1), padding four times the same number.

    Attributes:
      ranges: [P, B or 1, T, 4] int32 with 0 <= r0 <= r1 <= r2 <= r3 <= S in every row.
      pattern: [N] int32, the pattern of each query head; None where there is one pattern, P = 1.
      extent: what is known of ranges that are no NumPy array; None for nothing.
    """

    ranges: Any
    pattern: Any = None
    extent: Extent | None = dataclasses.field(default=None, metadata={"static": True})

    def logits(self, heads: int, batch: int, keys: int) -> tuple[int, bool]:
        """(How many logits the blocks of N heads and B samples hold, whether that is exact), known while tracing.

        Where neither the ranges are a NumPy array nor an extent is there, all T x S; where the pattern is traced, those
        of the fullest one.
        """
        samples, queries = self.ranges.shape[1:3]
        if isinstance(self.ranges, np.ndarray):
            counts, exact = (count_logits(self.ranges, keys).sum(1) * (batch // samples)).tolist(), True
        elif self.extent is None:
            return batch * heads * queries * keys, False
        else:
            counts, exact = [batch * count for count in self.extent.logits], self.extent.exact
        if self.pattern is None:
            return heads * counts[0], exact
        if isinstance(self.pattern, Tracer):
            return heads * max(counts), exact and len(set(counts)) == 1
        return sum(counts[pattern] for pattern in np.asarray(self.pattern).tolist()), exact


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """For each block of queries the blocks of keys it meets: the work to do and no more.

    A list holds the blocks that every query sees whole first, which need no mask, then those seen in part; what follows
    is never read.

    Attributes:
      indices: [P, B or 1, I, J] int32: a row's block numbers among J blocks of keys.
      whole: [P, B or 1, I] int32, how many of them need no mask.
      count: [P, B or 1, I] int32, how many there are.
    """

    indices: Any
    whole: Any
    count: Any


def block_lists(ranges, keys: int, *, rows: int, columns: int, transposed: bool = False) -> BlockLists:
    """The lists of blocks of `rows` queries and `columns` keys; the last block of either may be cut short.

    Args:
      ranges: [..., T, 4] of a `RangeMask`.
      keys: S.
      rows, columns: queries and keys of a block.
      transposed: for each block of keys, the blocks of queries that meet it: [..., J, I].

    A block is taken where the hull of its queries' first, or second, ranges touches it. For ranges that grow with t, as
    all of those above do, these are the blocks that a query sees, and no others.
    """
    seen, whole = block_table(ranges, keys, rows=rows, columns=columns)
    if transposed:
        seen, whole = seen.swapaxes(-1, -2), whole.swapaxes(-1, -2)
    order = jnp.argsort(jnp.where(whole, 0, jnp.where(seen, 1, 2)), axis=-1, stable=True)
    return BlockLists(
        order.astype(jnp.int32), jnp.sum(whole, axis=-1, dtype=jnp.int32), jnp.sum(seen, axis=-1, dtype=jnp.int32)
    )


def block_table(ranges, keys: int, *, rows: int, columns: int):
    """Which blocks are seen, and which of them are seen whole by every query: two booleans [..., I, J]."""
    queries = ranges.shape[-2]
    last = -queries % rows
    # Rows added to the last block are copies of the last query: they change neither hull nor wholeness.
    ranges = jnp.concatenate([ranges, jnp.repeat(ranges[..., -1:, :], last, axis=-2)], axis=-2)
    ranges = ranges.reshape(*ranges.shape[:-2], -1, rows, 4)
    begin = jnp.arange(-(-keys // columns), dtype=jnp.int32) * columns
    end = jnp.minimum(begin + columns, keys)

    def meets(low, high):
        some = low < high
        lowest = jnp.min(jnp.where(some, low, keys), axis=-1)[..., None]
        highest = jnp.max(jnp.where(some, high, 0), axis=-1)[..., None]
        return (lowest < end) & (highest > begin)

    r0, r1, r2, r3 = (ranges[..., i] for i in range(4))
    seen = meets(r0, r1) | meets(r2, r3)

    def covers(low, high):  # [..., I, J]: every query's range holds the block
        return (jnp.max(low, axis=-1)[..., None] <= begin) & (jnp.min(high, axis=-1)[..., None] >= end)

    touching = jnp.all(r1 == r2, axis=-1)[..., None]  # then the two ranges are one
    whole = covers(r0, r1) | covers(r2, r3) | (touching & covers(r0, r3))
    # The kernel reads whole blocks of `columns` keys: one that is cut short is masked.
    whole &= end - begin == columns
    return seen, whole & seen


def count_logits(ranges, keys: int):
    """How many logits lie in the blocks of 128 queries and 128 keys (or of all, where there are fewer) that are seen.

    Args:
      ranges: NumPy array [..., T, 4] as `RangeMask` has it.
      keys: S.
    Returns:
      [...] int64, the sizes of the blocks that `block_table` marks, added up: by arithmetic, in memory linear in T.
    """
    rows, columns = min(BLOCK, ranges.shape[-2]), min(BLOCK, keys)
    padding = [(0, 0)] * (ranges.ndim - 2) + [(0, -ranges.shape[-2] % rows), (0, 0)]
    ranges = np.pad(ranges.astype(np.int64), padding, mode="edge")
    ranges = ranges.reshape(*ranges.shape[:-2], -1, rows, 4)

    def blocks(low, high):
        some = low < high
        first = np.where(some, low, keys).min(-1) // columns
        return first, np.maximum(-(-np.where(some, high, 0).max(-1) // columns), first)

    r0, r1, r2, r3 = (ranges[..., i] for i in range(4))
    (first, end), (later, last) = blocks(r0, r1), blocks(r2, r3)
    both = np.maximum(np.minimum(end, last) - np.maximum(first, later), 0)
    return (end - first + last - later - both).sum(-1) * rows * columns


def dense_mask(mask: RangeMask, keys: int):
    """The mask as booleans [B or 1, N or 1, T, S]: for short inputs and for tests."""
    slot = jnp.arange(keys, dtype=jnp.int32)
    r0, r1, r2, r3 = (mask.ranges[..., i, None] for i in range(4))
    seen = ((slot >= r0) & (slot < r1)) | ((slot >= r2) & (slot < r3))  # [P, B, T, S]
    return seen.swapaxes(0, 1) if mask.pattern is None else seen[mask.pattern].swapaxes(0, 1)
