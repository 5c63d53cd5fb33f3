"""Sparse tensors: rows of features at integer sites, of static capacity.

Everything compiles for a capacity, not for a number of rows: rows from `count` on are padding, kept at zero by every
layer and read by none. A ladder of capacities (`bucket`) lets a stream of scans of all sizes compile a few times.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

# Capacities are multiples of it, so that tiles of rows are whole.
ROW_TILE = 128
# Search keys start here: a query that leaves the grid by less has a key, and no other site's.
_KEY_ORIGIN = 1024
_NO_KEY = np.uint32(0xFFFFFFFF)

Order = Literal["lexicographic", "morton"]


class SparseError(ValueError):
    """Voxels that make no sparse tensor; the message says which."""


class CapacityError(SparseError):
    """More sites than a capacity holds; `needed` is how many."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["coordinates", "count", "keys", "rows"],
    meta_fields=["spatial_shape", "batch_size"],
)
@dataclasses.dataclass(frozen=True)
class Sites:
    """Where the rows of a sparse tensor are.

    Attributes:
      coordinates: int32 [N, 1 + d], (batch, x, y, z) or (batch, x, y); padding rows have batch = batch_size.
      count: int32 [], rows that are needed. If they are more than N the capacity was too small and rows are missing.
      keys: sorted search keys of all rows, one or two words of uint32 [N], the most significant first.
      rows: int32 [N], the row of each key.
      spatial_shape: sites per axis; coordinates are in [0, size).
      batch_size: samples.
    """

    coordinates: Any
    count: Any
    keys: tuple[Any, ...]
    rows: Any
    spatial_shape: tuple[int, ...]
    batch_size: int

    @property
    def capacity(self) -> int:
        """N."""
        return self.coordinates.shape[0]

    @property
    def used(self):
        """bool [N]: rows that are not padding."""
        return jnp.arange(self.capacity) < self.count

    @classmethod
    def create(cls, coordinates, count, spatial_shape: Sequence[int], batch_size: int) -> "Sites":
        """Sites in any order, without duplicates, padding last; works under jit and checks shapes only.

        Args:
          coordinates: int32 [N, 1 + d] in the grid; from row `count` on anything.
          count: int32 [].
          spatial_shape: d sizes.
          batch_size: samples.
        Raises:
          SparseError: for shapes that do not fit, or a grid so large that sites have no search keys.
        """
        shape = tuple(int(size) for size in spatial_shape)
        coordinates = jnp.asarray(coordinates, jnp.int32)
        if coordinates.ndim != 2 or coordinates.shape[1] != 1 + len(shape):
            raise SparseError(
                f"Sites: coordinates are {list(coordinates.shape)} and spatial_shape has {len(shape)} axes; wanted "
                "[N, 1 + d] with the batch first, and d sizes."
            )
        count = jnp.asarray(count, jnp.int32)
        used = jnp.arange(coordinates.shape[0]) < count
        nowhere = jnp.asarray([batch_size] + [0] * len(shape), jnp.int32)
        coordinates = jnp.where(used[:, None], coordinates, nowhere)
        words = [jnp.where(used, word, _NO_KEY) for word in _search_key(coordinates, shape, batch_size)]
        rows = jnp.arange(coordinates.shape[0], dtype=jnp.int32)
        *keys, rows = jax.lax.sort((*words, rows), num_keys=len(words))
        return cls(coordinates, count, tuple(keys), rows, shape, batch_size)

    def find(self, coordinates):
        """The rows of sites, int32 [...], of int32 [..., 1 + d]; -1 where there is no such site."""
        return self.find_runs(coordinates, 1)[0]

    def find_runs(self, coordinates, length: int):
        """The rows of runs of sites along the last axis, which cost one binary search each.

        Args:
          coordinates: int32 [..., 1 + d], the first site of each run; may leave the grid.
          length: sites per run.
        Returns:
          int32 [length, ...]; -1 where there is no such site.
        """
        shape = self.spatial_shape
        batch, *leading = jnp.moveaxis(coordinates, -1, 0)[:-1]
        last = coordinates[..., -1]
        inside = (batch >= 0) & (batch < self.batch_size)
        for axis, size in zip(leading, shape[:-1], strict=True):
            inside &= (axis >= 0) & (axis < size)
        *high, low = _search_key(coordinates, shape, self.batch_size)
        place = _lower_bound(self.keys, (*high, low))
        found = []
        for step in range(length):
            place = jnp.minimum(place, self.capacity - 1)
            here = self.keys[-1][place] == low + jnp.uint32(step)
            for word, key in zip(high, self.keys[:-1], strict=True):
                here &= key[place] == word
            in_grid = inside & (last + step >= 0) & (last + step < shape[-1])
            found.append(jnp.where(here & in_grid, self.rows[place], -1))
            place = place + here
        return jnp.stack(found)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["features", "sites"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SparseTensor:
    """Features at sites.

    Attributes:
      features: [N, C]; rows of padding are zero.
      sites: where.
    """

    features: Any
    sites: Sites

    @classmethod
    def create(cls, features, coordinates, count, spatial_shape: Sequence[int], batch_size: int) -> "SparseTensor":
        """From rows in any order, padding last; see `Sites.create`. What padding rows hold is forgotten."""
        sites = Sites.create(coordinates, count, spatial_shape, batch_size)
        return cls(features, sites).map(lambda rows: rows)

    def map(self, function) -> "SparseTensor":
        """The tensor with `function` applied to its features, row by row; padding stays zero."""
        used = self.sites.used[:, None]
        features = function(jnp.where(used, self.features, 0))
        return SparseTensor(jnp.where(used, features, 0), self.sites)


def from_numpy(
    features, coordinates, *, spatial_shape: Sequence[int], batch_size: int, capacity: int | None = None
) -> SparseTensor:
    """Checks voxels on the host and pads them to a capacity.

    Args:
      features: floating [n, C] of finite numbers.
      coordinates: integers [n, 1 + d], batch first, in any order.
      spatial_shape: d sizes.
      batch_size: samples.
      capacity: rows; None for the `bucket` of n.
    Raises:
      SparseError: no voxels, a coordinate outside the grid, a site that comes twice, features that are not finite or
        not as many as the sites.
      CapacityError: more voxels than the capacity.
    """
    features, coordinates = np.asarray(features), np.asarray(coordinates)
    check_voxels(features, coordinates, spatial_shape, batch_size)
    count = len(coordinates)
    capacity = bucket(count) if capacity is None else capacity
    padded = (pad_rows(features, capacity), pad_rows(coordinates.astype(np.int32), capacity))
    return SparseTensor.create(jnp.asarray(padded[0]), padded[1], count, spatial_shape, batch_size)


def check_voxels(features, coordinates, spatial_shape: Sequence[int], batch_size: int) -> None:
    """Raises SparseError for voxels that make no sparse tensor; see `from_numpy`."""
    axes = 1 + len(spatial_shape)
    if coordinates.ndim != 2 or coordinates.shape[1] != axes or not np.issubdtype(coordinates.dtype, np.integer):
        raise SparseError(
            f"voxels: coordinates are {coordinates.dtype} {list(coordinates.shape)}; wanted integers [n, {axes}], the "
            "batch first."
        )
    if features.ndim != 2 or len(features) != len(coordinates):
        raise SparseError(
            f"voxels: features are {list(features.shape)} for {len(coordinates)} sites; wanted [n, C], a row per site."
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise SparseError(
            f"voxels: features are {features.dtype}; wanted a floating dtype, to which weights are cast: convert them."
        )
    if len(coordinates) == 0:
        raise SparseError("voxels: there are none; wanted at least one. Leave empty scans out.")
    sizes = np.asarray([batch_size, *spatial_shape])
    outside = ((coordinates < 0) | (coordinates >= sizes)).any(1)
    if outside.any():
        row = int(outside.argmax())
        raise SparseError(
            f"voxels: {int(outside.sum())} of {len(coordinates)} are outside the grid, first row {row} at "
            f"{coordinates[row].tolist()}; wanted 0 <= (batch, ...) < {sizes.tolist()}. Subtract the minimum, crop the "
            "points, or give a larger spatial_shape."
        )
    if not np.isfinite(features).all():
        row = int((~np.isfinite(features)).any(1).argmax())
        raise SparseError(f"voxels: features of row {row} are {features[row].tolist()}; wanted finite numbers.")
    order = np.lexsort(coordinates.T[::-1])
    same = (coordinates[order[1:]] == coordinates[order[:-1]]).all(1)
    if same.any():
        first, second = sorted(order[int(same.argmax()) :][:2].tolist())
        raise SparseError(
            f"voxels: rows {first} and {second} are both at {coordinates[first].tolist()}, of {int(same.sum())} "
            "duplicates; wanted each site once. `voxelize` merges points of one voxel."
        )


def bucket(count: int, ratio: float = 1.25) -> int:
    """The capacity for `count` rows: of a geometric ladder of multiples of 128, so that few shapes ever compile."""
    capacity = ROW_TILE
    while capacity < count:
        capacity = max(capacity + ROW_TILE, math.ceil(capacity * ratio / ROW_TILE) * ROW_TILE)
    return capacity


def whole_tiles(rows: float) -> int:
    """The first multiple of ROW_TILE from `rows` on."""
    return math.ceil(rows / ROW_TILE) * ROW_TILE


def pad_rows(rows, capacity: int):
    """[n, ...] -> [capacity, ...] with rows of zeros, on the host.

    Raises:
      CapacityError: more rows than the capacity.
    """
    if len(rows) > capacity:
        raise CapacityError(
            f"voxels: there are {len(rows)} and the capacity is {capacity}; wanted a capacity of at least "
            f"{bucket(len(rows))}.",
            len(rows),
        )
    return np.pad(rows, [(0, capacity - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def check_capacity(levels: dict[str, Sites]) -> None:
    """Raises CapacityError if rows are missing on a level, naming all; for concrete arrays, after a program ran."""
    small = {name: (int(sites.count), sites.capacity) for name, sites in levels.items()}
    small = {name: sizes for name, sizes in small.items() if sizes[0] > sizes[1]}
    if small:
        raise CapacityError(
            "sparse tensor: too many sites, "
            + "; ".join(
                f"{name} has {needed} and a capacity of {capacity}" for name, (needed, capacity) in small.items()
            )
            + f"; wanted capacities of at least {', '.join(str(bucket(needed)) for needed, _ in small.values())}. The "
            "result misses rows: discard it and run again with larger ones.",
            max(needed for needed, _ in small.values()),
        )


def fail_on_missing_rows(loss, levels: dict[str, Sites]):
    """The loss, NaN if a level has more sites than rows, and {"most_missing_rows": by how many}, float32 scalars.

    What `check_capacity` is outside of programs: a training step cannot raise, but a loss that is not finite stops the
    run. Raise `level_fractions` then.
    """
    missing = functools.reduce(jnp.maximum, [one.count - one.capacity for one in levels.values()], jnp.int32(0))
    return jnp.where(missing > 0, jnp.nan, loss), {"most_missing_rows": missing.astype(jnp.float32)}


def unique_sites(
    coordinates, valid, spatial_shape: Sequence[int], batch_size: int, capacity: int, order: Order = "morton"
) -> Sites:
    """The distinct sites of a list, in order.

    Args:
      coordinates: int32 [M, 1 + d] in the grid where valid.
      valid: bool [M].
      spatial_shape: d sizes.
      batch_size: samples.
      capacity: rows of the result; its count says how many there would have to be.
      order: of rows. Morton order keeps neighbours in space together in memory.
    """
    shape = tuple(int(size) for size in spatial_shape)
    if order == "morton":
        words = morton_key(coordinates, shape)
    elif order == "lexicographic":
        words = _search_key(coordinates, shape, batch_size)
    else:
        raise SparseError(f"unique_sites: order={order!r} is unknown; use 'lexicographic' or 'morton'.")
    words = [jnp.where(valid, word, _NO_KEY) for word in words]
    places = jnp.arange(len(coordinates), dtype=jnp.int32)
    *words, places = jax.lax.sort((*words, places), num_keys=len(words))
    new = functools.reduce(jnp.logical_or, [word[1:] != word[:-1] for word in words])
    first = jnp.concatenate([jnp.ones((1,), bool), new]) & valid[places]
    rank = jnp.cumsum(first, dtype=jnp.int32) - 1
    chosen = jnp.zeros((capacity,), jnp.int32).at[jnp.where(first, rank, capacity)].set(places, mode="drop")
    return Sites.create(coordinates[chosen], first.sum(dtype=jnp.int32), shape, batch_size)


def morton_key(coordinates, spatial_shape: Sequence[int]):
    """Words of uint32, most significant first, that sort sites by sample and then along the Morton curve.

    Works on NumPy and JAX arrays, int32 [..., 1 + d].
    """
    xp = jnp if isinstance(coordinates, jax.Array) else np
    dimensions = len(spatial_shape)
    bits = max(int(size - 1).bit_length() for size in spatial_shape)
    width = 32 // dimensions  # bits of each axis in a word
    unsigned = coordinates.astype(xp.uint32)
    words = [unsigned[..., 0]]
    for begin in reversed(range(0, bits, width)):
        word = xp.zeros_like(words[0])
        for bit in range(min(width, bits - begin)):
            for axis in range(dimensions):
                one = (unsigned[..., 1 + axis] >> (begin + bit)) & xp.uint32(1)
                word = word | (one << (bit * dimensions + dimensions - 1 - axis))
        words.append(word)
    return words


def _search_key(coordinates, shape: tuple[int, ...], batch_size: int):
    """One word if the grid's volume allows, else the batch and the first axis apart from the others."""
    axes = [coordinates[..., i] for i in range(coordinates.shape[-1])]
    sizes = (batch_size, *shape)
    limit = int(_NO_KEY) - 2 * _KEY_ORIGIN
    if math.prod(sizes) < limit:
        return (_linear(axes, sizes) + jnp.uint32(_KEY_ORIGIN),)
    if math.prod(sizes[:2]) >= limit or math.prod(sizes[2:]) >= limit:
        raise SparseError(
            f"Sites: a grid of {list(shape)} for {batch_size} samples has no search keys; wanted batch x first axis "
            f"and the product of the other axes below {limit}."
        )
    return _linear(axes[:2], sizes[:2]), _linear(axes[2:], sizes[2:]) + jnp.uint32(_KEY_ORIGIN)


def _linear(axes, sizes):
    """Row-major index, modulo 2³²."""
    index = jnp.zeros_like(axes[0], jnp.uint32)
    for axis, size in zip(axes, sizes, strict=True):
        index = index * jnp.uint32(size) + axis.astype(jnp.uint32)
    return index


def _lower_bound(keys, queries):
    """int32: how many of the sorted keys are below each query."""
    length = keys[0].shape[0]
    steps = length.bit_length()

    def halve(step, place):
        ahead = place + (jnp.int32(1) << (steps - 1 - step))
        at = jnp.minimum(ahead, length) - 1
        below = keys[-1][at] < queries[-1]
        for key, query in zip(reversed(keys[:-1]), reversed(queries[:-1]), strict=True):
            here = key[at]
            below = (here < query) | ((here == query) & below)
        return jnp.where(below & (ahead <= length), ahead, place)

    return jax.lax.fori_loop(0, steps, halve, jnp.zeros(queries[0].shape, jnp.int32))
