"""Kernel maps, and the preparations of a map that the dataflows run on.

A kernel map says which input row each output row reads at each kernel offset. It knows nothing of coordinates, so the
same engine serves voxels of any dimension and the edges of a graph.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

Kind = Literal["unsorted", "sorted", "tile_skip", "gather_scatter", "fetch_on_demand"]
# Bits of an int32 that a mask of offsets may use.
MASK_BITS = 31


@dataclasses.dataclass(frozen=True)
class Dataflow:
    """How one product over a kernel map runs.

    Attributes:
      kind: "unsorted": implicit GEMM, every offset for every row. "sorted": implicit GEMM with rows sorted by their
        mask of present offsets, so that a tile of rows skips the offsets that none of them has. "tile_skip": the same
        without the sort, for rows whose neighbours in space are neighbours in memory (Morton order).
        "gather_scatter": per group of offsets, gather the pairs' rows, multiply, scatter-add. "fetch_on_demand": the
        same one tile of pairs at a time, with no intermediate buffer.
      splits: of a "sorted" flow, ranges of offsets that are sorted and skipped each on its own, and then summed.
      tile: rows that are multiplied at once; of "gather_scatter", pairs of each offset at once.
      groups: of a "gather_scatter" flow, the offsets that run as one batched product, padded to the longest of them
        (adaptive grouping, `group_offsets`); () for one offset at a time.
    """

    kind: Kind = "sorted"
    splits: int = 1
    tile: int = 128
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"Dataflow: kind={self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}.")
        if self.tile < 1 or self.splits < 1:
            raise ValueError(f"Dataflow: tile={self.tile}, splits={self.splits}; wanted numbers above 0.")
        if self.splits > 1 and self.kind != "sorted":
            raise ValueError(f"Dataflow: splits={self.splits} with {self.kind!r}; only 'sorted' has splits.")
        if self.groups and self.kind != "gather_scatter":
            raise ValueError(f"Dataflow: groups with {self.kind!r}; only 'gather_scatter' has groups.")


@dataclasses.dataclass(frozen=True)
class Dataflows:
    """The dataflows of a layer's three products: y = x * w, dx = dy * wᵀ, dw = xᵀ dy.

    A weight gradient walks its own map by tiles of rows ("unsorted", "tile_skip", "sorted") or by pairs, offset by
    offset: groups make no difference to it.
    """

    forward: Dataflow = Dataflow()
    dgrad: Dataflow = Dataflow()
    wgrad: Dataflow = Dataflow()


def default_dataflows() -> Dataflows:
    """What does well on the chip that a program is for, untuned: pairs on a CPU, else sorted masks and pairs."""
    pairs_of_offsets = Dataflow("fetch_on_demand", tile=512)
    if dispatch.device_kind() == "cpu":
        return Dataflows(pairs_of_offsets, pairs_of_offsets, pairs_of_offsets)
    return Dataflows(Dataflow("sorted"), Dataflow("sorted"), Dataflow("fetch_on_demand"))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["order", "table", "tiles", "tile_counts"], meta_fields=["offsets"]
)
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of output rows and the offsets that each has to visit, for one range of offsets.

    Attributes:
      order: int32 [M], the output row at each place; None if rows keep their places.
      table: int32 [k, M'], the range's part of the map, in that order, M' = M rounded up to whole tiles.
      tiles: int32 [k, M' / tile], for each offset the tiles that have it, ascending, then padding.
      tile_counts: int32 [k], how many.
      offsets: (begin, end) of the range.
    """

    order: Any
    table: Any
    tiles: Any
    tile_counts: Any
    offsets: tuple[int, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inputs", "outputs", "counts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of each offset, by ascending output row.

    Attributes:
      inputs, outputs: int32 [K, P], rows; beyond an offset's count, -1.
      counts: int32 [K].
    """

    inputs: Any
    outputs: Any
    counts: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "transposed", "count", "forward", "dgrad", "wgrad"],
    meta_fields=["dataflows", "identity"],
)
@dataclasses.dataclass(frozen=True)
class KernelMap:
    """A kernel map with what its dataflows need. Layers that share a map share all of it.

    Attributes:
      table: int32 [K, M], the input row that each output row reads at each offset; -1: none.
      transposed: int32 [K, N], the output row that reads each input row at each offset; -1: none.
      count: int32 [], output rows in use; the rest are padding and read nothing.
      forward, dgrad, wgrad: preparations for the dataflows; None for "unsorted".
      dataflows: which dataflow each of the three is for.
      identity: the offset at which every row in use reads the row of its own number (the centre of a submanifold
        convolution), or None. Flows by pairs leave it out of their lists and multiply without gathering.
    """

    table: Any
    transposed: Any
    count: Any
    forward: Any
    dgrad: Any
    wgrad: Any
    dataflows: Dataflows
    identity: int | None = None

    @property
    def offsets(self) -> int:
        """K."""
        return self.table.shape[0]

    def flipped(self, input_count, dataflows: Dataflows | None = None) -> "KernelMap":
        """The map of the adjoint (an inverse convolution): inputs and outputs exchanged, offsets kept.

        Args:
          input_count: int32 [], rows in use of what was the input.
          dataflows: of the new map; None for the old ones.
        """
        return prepare(self.transposed, self.table, input_count, dataflows or self.dataflows, self.identity)


def prepare(table, transposed, count, dataflows: Dataflows, identity: int | None = None) -> KernelMap:
    """A map with the preparations that the dataflows need; under jit the unused ones cost nothing.

    Raises:
      ValueError: for a dataflow whose groups are not the map's offsets.
    """
    for dataflow in (dataflows.forward, dataflows.dgrad, dataflows.wgrad):
        members = sorted(offset for group in dataflow.groups for offset in group)
        if dataflow.groups and members != list(range(table.shape[0])):
            raise ValueError(
                f"Dataflow: groups {dataflow.groups} hold offsets {members} and the map has {table.shape[0]}; wanted "
                "each of them once."
            )
    return KernelMap(
        table,
        transposed,
        jnp.asarray(count, jnp.int32),
        _preparation(table, dataflows.forward, identity),
        _preparation(transposed, dataflows.dgrad, identity),
        _preparation(table, dataflows.wgrad, identity),
        dataflows,
        identity,
    )


def transpose(table, inputs: int):
    """[K, M] -> [K, inputs]: transposed[k, table[k, i]] = i, else -1.

    Requires that an offset reads an input row at most once, which holds for every convolution.
    """
    offsets, outputs = table.shape
    empty = jnp.full((offsets, inputs), -1, jnp.int32)
    columns = jnp.where(table >= 0, table, inputs)
    rows = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), table.shape)
    return empty.at[jnp.arange(offsets)[:, None], columns].set(rows, mode="drop", unique_indices=True)


def group_offsets(counts: Sequence[int], epsilon: float) -> tuple[tuple[int, ...], ...]:
    """Adaptive grouping: walks the offsets by descending count, opens a group where 1 - min / max would pass epsilon.

    Args:
      counts: pairs of each offset, on a typical input.
      epsilon: in [0, 1): the share of a group's padded rows that may be padding of its shortest member.
    Source: TorchSparse, arXiv:2204.10319; torchsparse/nn/functional/conv. Deviation: the original walks the offsets in
    their own order.
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"group_offsets: epsilon={epsilon}; wanted 0 <= epsilon < 1.")
    groups: list[list[int]] = []
    for offset in np.argsort(-np.asarray(counts), kind="stable").tolist():
        if groups and 1 - counts[offset] / max(counts[groups[-1][0]], 1) <= epsilon:
            groups[-1].append(offset)
        else:
            groups.append([offset])
    return tuple(map(tuple, groups))


def _preparation(table, dataflow: Dataflow, identity: int | None):
    if dataflow.kind == "unsorted":
        return None
    if dataflow.kind == "tile_skip":
        return (_tiles(table, None, dataflow.tile, (0, table.shape[0])),)
    if dataflow.kind == "sorted":
        return tuple(
            _tiles(table, _mask_order(table[begin:end]), dataflow.tile, (begin, end))
            for begin, end in split_offsets(table.shape[0], dataflow.splits)
        )
    return pairs(table if identity is None else table.at[identity].set(-1))


def split_offsets(offsets: int, splits: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges of ceil(K / splits) offsets, more of them if a range would not fit a mask."""
    length = min(-(-offsets // splits), MASK_BITS)
    return tuple((begin, min(begin + length, offsets)) for begin in range(0, offsets, length))


def _mask_order(table):
    """[k, M] -> [M] rows by descending mask of present offsets; rows that read nothing come last.

    The rarest offset is the most significant bit: its rows then lie together instead of all over the others. That
    saves up to a fifth of the work against bits in the order of the offsets, as the original has them.
    """
    present = table >= 0
    counts = present.sum(1)
    rank = jnp.argsort(jnp.argsort(-counts, stable=True))
    mask = jnp.where(present, jnp.left_shift(1, rank.astype(jnp.int32))[:, None], 0).sum(0, dtype=jnp.int32)
    rows = jnp.arange(table.shape[1], dtype=jnp.int32)
    return jax.lax.sort((-mask, rows), num_keys=1, is_stable=True)[1]


def _tiles(table, order, tile: int, offsets: tuple[int, int]) -> Tiles:
    table = table[slice(*offsets)]
    if order is not None:
        table = table[:, order]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % tile)), constant_values=-1)
    present = (table.reshape(table.shape[0], -1, tile) >= 0).any(2)  # [k, tiles]
    tiles, counts = compact(present)
    return Tiles(order, table, tiles, counts, offsets)


def pairs(table) -> Pairs:
    """The pairs of a map, offset by offset."""
    outputs, counts = compact(table >= 0)
    place = jnp.arange(table.shape[1])
    inputs = jnp.take_along_axis(table, outputs, 1)
    used = place < counts[:, None]
    return Pairs(jnp.where(used, inputs, -1), jnp.where(used, outputs, -1), counts)


def compact(present):
    """bool [K, n] -> (int32 [K, n] positions of the true entries, ascending, then zeros; int32 [K] how many)."""
    place = jnp.cumsum(present, 1, dtype=jnp.int32) - 1
    offsets, length = present.shape
    target = jnp.where(present, place, length)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), present.shape)
    compacted = (
        jnp.zeros_like(positions)
        .at[jnp.arange(offsets)[:, None], target]
        .set(positions, mode="drop", unique_indices=True)
    )
    return compacted, present.sum(1, dtype=jnp.int32)


def executed(kernel_map: KernelMap) -> dict[str, Any]:
    """Rows multiplied by each product, over all offsets, and the pairs that were needed: the map's redundancy.

    Returns:
      {"needed", "forward", "dgrad", "wgrad"}: int32 scalars; times Cin x Cout they are multiply-adds.
    """
    flows = kernel_map.dataflows
    return {
        "needed": (kernel_map.table >= 0).sum(),
        "forward": _executed(kernel_map, kernel_map.table, kernel_map.forward, flows.forward),
        "dgrad": _executed(kernel_map, kernel_map.transposed, kernel_map.dgrad, flows.dgrad),
        "wgrad": _executed(kernel_map, kernel_map.table, kernel_map.wgrad, dataclasses.replace(flows.wgrad, groups=())),
    }


def _executed(kernel_map: KernelMap, table, preparation, dataflow: Dataflow):
    if preparation is None:
        return jnp.int32(table.size)
    if isinstance(preparation, Pairs):
        direct = 0 if kernel_map.identity is None else (table[kernel_map.identity] >= 0).sum()
        if dataflow.kind == "fetch_on_demand" or not dataflow.groups:
            return direct + (-(-preparation.counts // dataflow.tile) * dataflow.tile).sum()
        longest = [preparation.counts[jnp.asarray(group)].max() for group in dataflow.groups]
        return direct + sum(
            len(group) * -(-most // dataflow.tile) * dataflow.tile
            for group, most in zip(dataflow.groups, longest, strict=True)
        )
    return sum(part.tile_counts.sum() for part in preparation) * dataflow.tile
