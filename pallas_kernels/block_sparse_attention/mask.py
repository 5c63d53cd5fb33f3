"""What a query may see, as ranges of keys, and the blocks of keys that follow from it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


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
    """

    ranges: Any
    pattern: Any = None


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


def dense_mask(mask: RangeMask, keys: int):
    """The mask as booleans [B or 1, N or 1, T, S]: for short inputs and for tests."""
    slot = jnp.arange(keys, dtype=jnp.int32)
    r0, r1, r2, r3 = (mask.ranges[..., i, None] for i in range(4))
    seen = ((slot >= r0) & (slot < r1)) | ((slot >= r2) & (slot < r3))  # [P, B, T, S]
    return seen.swapaxes(0, 1) if mask.pattern is None else seen[mask.pattern].swapaxes(0, 1)
