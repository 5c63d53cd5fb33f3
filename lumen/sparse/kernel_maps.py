"""Which input site meets which output site at which kernel offset: maps and output sites of all kinds of convolution.

Built by sorting and binary search on the device: no hash tables, no 64-bit integers, nothing kept anywhere. A map is a
value; layers that can share one are handed the same.

With stride s, padding p and dilation d, offset k of a window at output site q reads input site q s - p + k d.
Offsets are numbered with the last axis fastest, as in a dense weight.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lumen.sparse.tensor import ROW_TILE, Order, Sites, SparseError, unique_sites
from pallas_kernels.sparse_convolution import Dataflows, KernelMap, default_dataflows, prepare, transpose

PerAxis = int | Sequence[int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel_map", "inputs", "outputs"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SiteMap:
    """A kernel map between two sets of sites.

    Attributes:
      kernel_map: rows to rows.
      inputs, outputs: the sites.
    """

    kernel_map: KernelMap
    inputs: Sites
    outputs: Sites

    def inverse(self, dataflows: Dataflows | None = None) -> "SiteMap":
        """The map of an inverse (transposed) convolution, back to the very sites this one came from.

        y[u] = sum over the offsets k and coarse sites q with u = q s - p + k d of W_kᵀ x[q]: `conv_transpose` on
        the fine sites. Sites without a coarse one get the bias.
        """
        return SiteMap(self.kernel_map.flipped(self.inputs.count, dataflows), self.outputs, self.inputs)


def submanifold_map(
    sites: Sites, kernel_size: PerAxis, *, dilation: PerAxis = 1, dataflows: Dataflows | None = None
) -> SiteMap:
    """Stride 1, outputs where the inputs are: windows are centred, p = (K - 1) / 2 d; of even kernels p = 0.

    Args:
      sites: of the input.
      kernel_size: K, for all axes or per axis.
      dilation: d, likewise.
      dataflows: how convolutions over the map run; None for `default_dataflows`.
    """
    kernel, dilations = _per_axis(sites, kernel_size=kernel_size, dilation=dilation)
    padding = tuple((k - 1) // 2 * d if k % 2 else 0 for k, d in zip(kernel, dilations, strict=True))
    table = _window_table(sites, sites, kernel, (1,) * len(kernel), padding, dilations)
    # Where windows are symmetric, u reads v at k exactly if v reads u at K - 1 - k.
    symmetric = all(k % 2 for k in kernel)
    transposed = table[::-1] if symmetric else transpose(table, sites.capacity)
    centre = np.ravel_multi_index([(k - 1) // 2 if k % 2 else 0 for k in kernel], kernel)
    kernel_map = prepare(table, transposed, sites.count, dataflows or default_dataflows(), int(centre))
    return SiteMap(kernel_map, sites, sites)


def strided_map(
    sites: Sites,
    kernel_size: PerAxis,
    stride: PerAxis,
    *,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    rule: Literal["window", "floor"] = "window",
    capacity: int | None = None,
    order: Order = "morton",
    dataflows: Dataflows | None = None,
) -> SiteMap:
    """Strided convolution.

    rule="window": outputs are the sites q with an input in their window and 0 <= q < floor((size + 2 p - d (K - 1) - 1)
    / s) + 1, as in torch and spconv. TorchSparse cuts at the largest coordinate present instead of at the size; give
    spatial_shape = that + 1 to reproduce it.
    rule="floor": outputs are the sites floor(u / s) of the inputs u, and none is lost, as in MinkowskiEngine; windows
    there are centred, p = (K - 1) // 2 d, which padding has to say.

    Args:
      sites: of the input.
      kernel_size, stride, padding, dilation: for all axes or per axis.
      rule: which sites the output has.
      capacity: rows of the output, of which `Sites.count` says whether they were enough; None for what always is:
        every input times the windows it can be in, or the whole grid.
      order: of output rows.
      dataflows: how convolutions over the map run; None for `default_dataflows`.
    """
    kernel, strides, paddings, dilations = _per_axis(
        sites, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation
    )
    if rule not in ("window", "floor"):
        raise SparseError(f"strided_map: rule={rule!r} is unknown; use 'window' or 'floor'.")
    axes = list(zip(sites.spatial_shape, kernel, strides, paddings, dilations, strict=True))
    if rule == "floor":
        shape = tuple(-(-size // s) for size, _, s, _, _ in axes)
        candidates = jnp.concatenate(
            [sites.coordinates[:, :1], sites.coordinates[:, 1:] // jnp.asarray(strides, jnp.int32)], 1
        )
        valid = sites.used
        windows = 1
    else:
        shape = tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)
        if min(shape) < 1:
            raise SparseError(
                f"strided_map: a kernel of {kernel} with padding {paddings} and dilation {dilations} does not fit into "
                f"the grid {sites.spatial_shape}; wanted a smaller one, or more padding."
            )
        candidates, valid = _window_candidates(sites, shape, axes)
        windows = math.prod(-(-k // s) if d == 1 else k for _, k, s, _, d in axes)
    if capacity is None:
        most = min(sites.capacity * windows, math.prod(shape) * sites.batch_size)
        capacity = -(-most // ROW_TILE) * ROW_TILE
    outputs = unique_sites(candidates, valid, shape, sites.batch_size, capacity, order)
    table = _window_table(sites, outputs, kernel, strides, paddings, dilations)
    kernel_map = prepare(table, transpose(table, sites.capacity), outputs.count, dataflows or default_dataflows())
    return SiteMap(kernel_map, sites, outputs)


def generative_map(
    sites: Sites,
    kernel_size: PerAxis,
    stride: PerAxis,
    *,
    spatial_shape: Sequence[int],
    padding: PerAxis = 0,
    rule: Literal["torch", "torchsparse"] = "torch",
    capacity: int,
    order: Order = "morton",
    dataflows: Dataflows | None = None,
) -> SiteMap:
    """Transposed convolution that makes its own sites: all that the windows of the inputs reach, within a grid.

    rule="torch": y[q s - p + k] += W_kᵀ x[q], `conv_transpose`.
    rule="torchsparse": y[q s - o_k] += W_kᵀ x[q] with centred o_k = k - (K - 1) // 2: a correlation, so the offsets are
    mirrored, at the sites q s + o_k moved into the grid; of even kernels most sites get nothing but the bias. For
    TorchSparse's checkpoints only.

    Args:
      sites: of the input, coarse.
      kernel_size, stride, padding: for all axes or per axis; "torchsparse" has no padding.
      spatial_shape: of the output.
      rule: see above.
      capacity: rows of the output. `Sites.count` says whether they were enough.
      order: of output rows.
      dataflows: how convolutions over the map run; None for `default_dataflows`.
    """
    kernel, strides, paddings = _per_axis(sites, kernel_size=kernel_size, stride=stride, padding=padding)
    if rule not in ("torch", "torchsparse"):
        raise SparseError(f"generative_map: rule={rule!r} is unknown; use 'torch' or 'torchsparse'.")
    if rule == "torchsparse" and any(paddings):
        raise SparseError(f"generative_map: padding={paddings} with rule='torchsparse', which has none; wanted 0.")
    if len(spatial_shape) != len(kernel):
        raise SparseError(
            f"generative_map: spatial_shape={tuple(spatial_shape)} for sites of {len(kernel)} axes; wanted "
            f"{len(kernel)} sizes."
        )
    offsets = np.asarray(list(itertools.product(*map(range, kernel))), np.int32)  # [K, d]
    centre = (np.asarray(kernel) - 1) // 2
    if rule == "torch":
        step, start = (1,) * len(kernel), paddings
        reach = offsets - np.asarray(paddings)
    else:
        step, start = (-1,) * len(kernel), tuple((-centre).tolist())
        reach = offsets - centre
    fine = sites.coordinates[None, :, 1:] * jnp.asarray(strides, jnp.int32) + jnp.asarray(reach, jnp.int32)[:, None]
    limit = jnp.asarray(spatial_shape, jnp.int32) - 1
    valid = jnp.broadcast_to(sites.used, fine.shape[:2])
    if rule == "torch":
        valid &= ((fine >= 0) & (fine <= limit)).all(-1)
    fine = jnp.clip(fine, 0, limit)
    batch = jnp.broadcast_to(sites.coordinates[None, :, :1], (*fine.shape[:2], 1))
    candidates = jnp.concatenate([batch, fine], -1).reshape(-1, 1 + len(kernel))
    outputs = unique_sites(candidates, valid.reshape(-1), spatial_shape, sites.batch_size, capacity, order)
    transposed = _window_table(outputs, sites, kernel, strides, start, step)
    kernel_map = prepare(transpose(transposed, capacity), transposed, outputs.count, dataflows or default_dataflows())
    return SiteMap(kernel_map, sites, outputs)


def _per_axis(sites: Sites, **values: PerAxis) -> list[tuple[int, ...]]:
    """Each value for every axis of the sites; paddings are at least 0, the others at least 1."""
    dimensions = len(sites.spatial_shape)
    result = []
    for name, value in values.items():
        each, least = np.asarray(value), 0 if name == "padding" else 1
        fits = np.issubdtype(each.dtype, np.integer) and each.shape in ((), (dimensions,)) and (each >= least).all()
        if not fits:
            raise SparseError(
                f"kernel map: {name}={value} for sites of {dimensions} axes; wanted one number of at least {least}, or "
                f"{dimensions} of them."
            )
        result.append(tuple(np.broadcast_to(each, dimensions).tolist()))
    return result


def _window_table(inputs: Sites, outputs: Sites, kernel, stride, padding, dilation):
    """int32 [K, M]: the input row at q s - p + k d of every output row and offset."""
    *leading, last = kernel
    # A run of offsets along the last axis is a run of keys: one search for all of it.
    runs, length = ((*map(range, leading), range(1)), last) if dilation[-1] == 1 else (map(range, kernel), 1)
    first = np.asarray(list(itertools.product(*runs)), np.int32) * np.asarray(dilation) - np.asarray(padding)
    begin = outputs.coordinates[:, 1:] * jnp.asarray(stride, jnp.int32)
    window = begin[None] + jnp.asarray(first, jnp.int32)[:, None]  # [runs, M, d]
    batch = jnp.broadcast_to(outputs.coordinates[None, :, :1], (*window.shape[:2], 1))
    found = inputs.find_runs(jnp.concatenate([batch, window], -1), length)  # [length, runs, M]
    return found.swapaxes(0, 1).reshape(math.prod(kernel), outputs.capacity)


def _window_candidates(sites: Sites, shape, axes) -> tuple[Any, Any]:
    """All q whose window holds an input site: coordinates [N c, 1 + d] and whether each is one."""
    per_axis = []
    for axis, (_, kernel, stride, padding, dilation) in enumerate(axes):
        u = sites.coordinates[:, 1 + axis] + padding
        span = dilation * (kernel - 1)
        newest = u // stride
        options = []
        for back in range(span // stride + 1):
            q = newest - back
            reach = u - q * stride
            options.append((q, (reach <= span) & (reach % dilation == 0) & (q >= 0) & (q < shape[axis])))
        per_axis.append(options)
    coordinates, valid = [], []
    for choice in itertools.product(*per_axis):
        coordinates.append(jnp.stack([sites.coordinates[:, 0], *(q for q, _ in choice)], 1))
        valid.append(functools.reduce(jnp.logical_and, [ok for _, ok in choice], sites.used))
    return jnp.concatenate(coordinates), jnp.concatenate(valid)
