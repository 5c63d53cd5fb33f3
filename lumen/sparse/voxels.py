"""Points to voxels on the host, voxels to points on the device.

voxels = voxelize(points, 0.05, rule="round", order="morton")      # NumPy
x = from_numpy(voxels.features, ...)                               # lumen.sparse.tensor
of_points = network(x).features[voxels.inverse]                    # exact, for the points the voxels were made of
of_others = devoxelize(network(x), places, kind="trilinear")       # for any place, differentiable
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lumen.sparse.tensor import Order, SparseError, SparseTensor, morton_key

VoxelSize = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Voxels:
    """The occupied voxels of one scan.

    Attributes:
      coordinates: int32 [V, 3], each once.
      features: [V, C].
      first: int64 [V], the first point of each voxel; labels of voxels are labels[first].
      inverse: int64 [n], the voxel of each point.
      counts: int64 [V], points in each voxel.
      origin: int64 [3], the cell at coordinates 0.
    """

    coordinates: np.ndarray
    features: np.ndarray
    first: np.ndarray
    inverse: np.ndarray
    counts: np.ndarray
    origin: np.ndarray


@dataclasses.dataclass(frozen=True)
class HardVoxels:
    """Voxels with a limited number of points.

    Attributes:
      points: [V, P, C], zero where a voxel has fewer than P points.
      coordinates: int32 [V, 3], (x, y, z) from the lower end of the range.
      counts: int64 [V], points kept in each voxel, 1..P.
      features: [V, C], means of the points kept (OpenPCDet's MeanVFE).
    """

    points: np.ndarray
    coordinates: np.ndarray
    counts: np.ndarray
    features: np.ndarray


def voxelize(
    points,
    voxel_size: VoxelSize,
    *,
    features=None,
    rule: Literal["floor", "round"] = "floor",
    merge: Literal["first", "mean"] = "first",
    order: Order = "lexicographic",
) -> Voxels:
    """The voxels that hold points.

    rule="floor": cells are floor(p / size), in float64, and may be negative; as torchsparse's sparse_quantize.
    rule="round": cells are round(p / size) in the points' precision, half to even, less their minimum; as SPVNAS.

    Args:
      points: float [n, 3 or more], x, y, z first, in metres.
      voxel_size: in metres, for all axes or per axis.
      features: float [n, C]; None takes all columns of the points.
      rule: how cells are found.
      merge: a voxel has the features of its first point, or the mean of its points'.
      order: of voxels.
    Raises:
      SparseError: no points, numbers that are not finite, shapes that do not fit, or cells beyond what integers hold.
    Source: torchsparse/utils/quantize.py; core/datasets/semantic_kitti.py of mit-han-lab/spvnas.
    """
    points, size = _checked_points("voxelize", points), _checked_size("voxelize", voxel_size)
    features = points if features is None else np.asarray(features)
    if features.ndim != 2 or len(features) != len(points):
        raise SparseError(
            f"voxelize: features are {list(features.shape)} for {len(points)} points; wanted [n, C], a row per point."
        )
    places = points[:, :3]
    cells = np.floor(places / size) if rule == "floor" else np.round(places / size.astype(points.dtype))
    lowest, highest = cells.min(0), cells.max(0)
    # Cells have to fit into int32 and their numbers within the scan into int64.
    if max(-lowest.min(), highest.max()) >= 2**31 or math.prod((highest - lowest + 1).tolist()) >= 2**63:
        raise SparseError(
            f"voxelize: points from {points[:, :3].min(0).tolist()} to {points[:, :3].max(0).tolist()} are too many "
            f"voxels of {size.tolist()} apart; wanted larger voxels, or points in metres without outliers."
        )
    low, sizes = lowest.astype(np.int64), (highest - lowest + 1).astype(np.int64)
    relative = cells.astype(np.int64) - low
    number = (relative[:, 0] * sizes[1] + relative[:, 1]) * sizes[2] + relative[:, 2]
    _, first, inverse, counts = np.unique(number, return_index=True, return_inverse=True, return_counts=True)
    if order == "morton":
        in_batch = np.pad(relative[first].astype(np.int32), ((0, 0), (1, 0)))
        chosen = np.lexsort(morton_key(in_batch, sizes.tolist())[::-1])
        place = np.empty_like(chosen)
        place[chosen] = np.arange(len(chosen))
        first, inverse, counts = first[chosen], place[inverse], counts[chosen]
    origin = low if rule == "round" else np.zeros(3, np.int64)
    coordinates = (relative[first] + low - origin).astype(np.int32)
    merged = features[first] if merge == "first" else _means(features, inverse, counts)
    return Voxels(coordinates, merged, first, inverse, counts, origin)


def hard_voxelize(
    points, voxel_size: VoxelSize, point_range: Sequence[float], *, max_points: int, max_voxels: int
) -> HardVoxels:
    """Voxels of at most `max_points` points, in the order in which points first fall into them.

    The cell of a point is floor((p - low) / size) in float32; points outside the range are left out. Later points of a
    full voxel and points of voxels after the first `max_voxels` are dropped.

    Args:
      points: float [n, C], x, y, z first.
      voxel_size: in metres, for all axes or per axis.
      point_range: (x, y, z) from, (x, y, z) to, in metres; a whole number of voxels, up to rounding.
      max_points, max_voxels: the limits.
    Returns:
      `HardVoxels`. OpenPCDet orders coordinates z, y, x: coordinates[:, ::-1].
    Raises:
      SparseError: as `voxelize`; if no point is in the range; for limits or a range that allow nothing.
    Source: the voxel generator of spconv as used in OpenPCDet, pcdet/datasets/processor/data_processor.py, and
      pcdet/models/backbones_3d/vfe/mean_vfe.py.
    """
    points, size = _checked_points("hard_voxelize", points), _checked_size("hard_voxelize", voxel_size)
    if max_points < 1 or max_voxels < 1:
        raise SparseError(f"hard_voxelize: max_points={max_points}, max_voxels={max_voxels}; wanted at least 1 each.")
    low, high = np.asarray(point_range, np.float64).reshape(2, 3)
    grid = np.round((high - low) / size).astype(np.int64)
    if grid.min() < 1:
        raise SparseError(
            f"hard_voxelize: the range {list(point_range)} is {grid.tolist()} voxels of {size.tolist()}; wanted "
            "(x, y, z) from, then (x, y, z) to, at least a voxel apart on each axis."
        )
    cells = np.floor((points[:, :3] - low.astype(np.float32)) / size.astype(np.float32))
    kept = np.flatnonzero(((cells >= 0) & (cells < grid)).all(1))
    if not len(kept):
        raise SparseError(
            f"hard_voxelize: none of {len(points)} points is in the range {list(point_range)}, they lie from "
            f"{points[:, :3].min(0).tolist()} to {points[:, :3].max(0).tolist()}; wanted a range in the points' own "
            "frame. Leave empty scans out."
        )
    x, y, z = cells[kept].astype(np.int64).T
    _, first, inverse = np.unique((x * grid[1] + y) * grid[2] + z, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    voxel = rank[inverse]  # of each point, numbered by first appearance
    order = np.argsort(voxel, kind="stable")
    counts = np.bincount(voxel)
    slot = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    fits = (slot < max_points) & (voxel[order] < max_voxels)
    rows, slot = order[fits], slot[fits]
    counts = np.minimum(counts[:max_voxels], max_points)
    packed = np.zeros((len(counts), max_points, points.shape[1]), points.dtype)
    packed[voxel[rows], slot] = points[kept[rows]]
    coordinates = cells[kept[np.sort(first)[:max_voxels]]].astype(np.int32)
    means = packed.sum(1) / counts[:, None].astype(points.dtype)
    return HardVoxels(packed, coordinates, counts, means)


def level_counts(coordinates, levels: int) -> list[int]:
    """How many sites the coarser levels of a U-Net have: distinct floor(u / 2^l) for l = 0..levels, on the host.

    Args:
      coordinates: integers [N, 1 + d], batch first; the batch is not halved.
      levels: strided layers of kernel 2 and stride 2 under the rule "floor", one after another.
    """
    coordinates = np.asarray(coordinates)
    sample, cells = coordinates[:, :1].astype(np.int64), coordinates[:, 1:].astype(np.int64)
    counts = []
    for _ in range(levels + 1):
        rows = np.concatenate([sample, cells], 1)
        low = rows.min(0)
        sizes = rows.max(0) - low + 1
        number = np.ravel_multi_index(tuple((rows - low).T), tuple(sizes))
        counts.append(len(np.unique(number)))
        cells = cells >> 1
    return counts


def devoxelize(x: SparseTensor, points, kind: Literal["nearest", "trilinear"] = "nearest"):
    """Features at points, differentiable in the features (and, if trilinear, in the points).

    kind="nearest": those of the voxel floor(p) that the point is in, zero if there is none.
    kind="trilinear": the features f_u of a voxel stand at its coordinates u, and

        y(p) = sum_u w_u f_u / sum_u w_u,   w_u = prod_i (1 - |p_i - u_i|),

    over those of the 2^d voxels around p that are present; zero where none is. Voxels made with rule="round" have their
    centres there; for rule="floor" subtract 0.5 from the points to interpolate between centres.

    Args:
      x: [N, C] features.
      points: float [n, 1 + d]: the sample, then the place in voxels, metres / voxel size - origin.
      kind: which.
    Returns:
      [n, C] in the features' dtype.
    Source: torchsparse/nn/functional/devoxelize.py. Deviation: SPVNAS's nearest keeps the trilinear weight of the one
      corner it uses; here it is 1.
    """
    points = jnp.asarray(points, jnp.float32)
    dimensions = len(x.sites.spatial_shape)
    if points.ndim != 2 or points.shape[1] != 1 + dimensions:
        raise SparseError(
            f"devoxelize: points are {list(points.shape)} for sites with {dimensions} axes; wanted [n, 1 + d], the "
            "sample first."
        )
    base = jnp.floor(points)
    cells = base.astype(jnp.int32)
    if kind == "nearest":
        rows = x.sites.find(cells)[None]  # [1, n]
        weights = (rows >= 0).astype(jnp.float32)
    else:
        corners = jnp.asarray(list(np.ndindex((2,) * dimensions)), jnp.int32)  # [2^d, d], the last axis fastest
        begins = jnp.pad(corners[::2], ((0, 0), (1, 0)))
        runs = x.sites.find_runs(cells + begins[:, None], 2)  # [2, 2^(d-1), n]
        rows = runs.swapaxes(0, 1).reshape(len(corners), -1)
        fraction = (points - base)[:, 1:]
        weights = jnp.where(corners[:, None] == 1, fraction, 1 - fraction).prod(-1)
        weights = jnp.where(rows >= 0, weights, 0)
        present = weights.sum(0)
        # A voxel of weight 0 is as good as absent; the inner `where` keeps gradients finite.
        weights = jnp.where(present > 0, weights / jnp.where(present > 0, present, 1), 0)

    def add(total, corner):
        rows, weights = corner
        return total + weights[:, None] * x.features[jnp.maximum(rows, 0)].astype(jnp.float32), None

    # Corner after corner, so that memory holds no feature eight times.
    zero = jnp.zeros((len(points), x.features.shape[1]), jnp.float32)
    return jax.lax.scan(add, zero, (rows, weights))[0].astype(x.features.dtype)


def _means(features, inverse, counts):
    """[V, C] means over the points of each voxel, summed in float64."""
    columns = [np.bincount(inverse, column, len(counts)) for column in features.T]
    return (np.stack(columns, 1) / counts[:, None]).astype(features.dtype)


def _checked_points(name: str, points) -> np.ndarray:
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] < 3 or not np.issubdtype(points.dtype, np.floating):
        raise SparseError(
            f"{name}: points are {points.dtype} {list(points.shape)}; wanted floats [n, 3 or more], x, y, z first."
        )
    if not len(points):
        raise SparseError(f"{name}: the scan has no points; wanted at least one. Leave empty scans out.")
    finite = np.isfinite(points).all(1)
    if not finite.all():
        row = int((~finite).argmax())
        raise SparseError(
            f"{name}: {int((~finite).sum())} of {len(points)} points are not finite, first row {row}: "
            f"{points[row].tolist()}; wanted numbers. Leave missing returns out."
        )
    return points


def _checked_size(name: str, voxel_size: VoxelSize) -> np.ndarray:
    size = np.asarray(voxel_size, np.float64)
    if size.shape not in ((), (3,)) or not np.all(size > 0):
        raise SparseError(f"{name}: voxel_size={voxel_size}; wanted metres above 0, one number or three.")
    return np.broadcast_to(size, 3)
