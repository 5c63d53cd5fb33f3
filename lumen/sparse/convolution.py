"""Layers on sparse tensors: TorchSparse++'s convolutions (arXiv:2311.12862), norms, pooling and ways out.

A convolution is one layer whatever its kind; the map it is handed decides (lumen/sparse/kernel_maps.py):

    down = strided_map(x.sites, 2, 2, rule="floor")
    y = convolution(x, down)                    # coarse
    z = another(y, down.inverse())              # fine again, on the sites of x
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lumen import layers
from lumen.sparse.kernel_maps import SiteMap
from lumen.sparse.tensor import Sites, SparseError, SparseTensor
from pallas_kernels.sparse_convolution import sparse_convolution


class SparseConv(nnx.Module):
    """y[q] = b + sum_k W_kᵀ x[u_k(q)], over the offsets k of the window of q that hold an input site u_k(q).

    Attributes:
      kernel: [*kernel_size, Cin, Cout].
      bias: [Cout], or None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        dimensions: int = 3,
        bias: bool = False,
        transposed: bool = False,
        rngs: nnx.Rngs,
    ):
        """A layer with U(-a, a) weights, a = 1 / sqrt(K Cin), of transposed layers 1 / sqrt(K Cout).

        Args:
          inputs, outputs: Cin and Cout.
          kernel_size: for all axes or per axis.
          dimensions: axes, if kernel_size is one number.
          bias: whether there is one.
          transposed: the layer is meant for an inverse or generative map; only initialisation depends on it.
          rngs: for the weights.
        Source: torchsparse/nn/modules/conv.py.
        """
        self.kernel_size = (kernel_size,) * dimensions if isinstance(kernel_size, int) else tuple(kernel_size)
        offsets = math.prod(self.kernel_size)
        bound = (offsets * (outputs if transposed else inputs)) ** -0.5
        shape = (*self.kernel_size, inputs, outputs)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        uniform = jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound) if bias else None
        self.bias = None if uniform is None else nnx.Param(uniform)

    def __call__(self, x: SparseTensor, site_map: SiteMap) -> SparseTensor:
        _check_map("SparseConv", x, site_map)
        kernel = self.kernel[...].reshape(-1, *self.kernel.shape[-2:])  # [K, Cin, Cout]
        _check_features("SparseConv", x, kernel.shape[1])
        offsets = site_map.kernel_map.table.shape[0]
        if offsets != kernel.shape[0]:
            raise SparseError(
                f"SparseConv: the map has {offsets} offsets and the kernel {kernel.shape[0]}, {self.kernel_size}; "
                "wanted a map of the kernel's size. Make both with the same kernel_size."
            )
        y = sparse_convolution(x.features, kernel, site_map.kernel_map)
        if self.bias is None:
            return SparseTensor(y, site_map.outputs)
        bias = self.bias[...].astype(y.dtype)
        return SparseTensor(y, site_map.outputs).map(lambda rows: rows + bias)


class SparseLinear(nnx.Module):
    """A convolution with a window of one site: y = x W + b, row by row; needs no map.

    Attributes:
      kernel: [Cin, Cout].
      bias: [Cout], or None.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs):
        bound = inputs**-0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (inputs, outputs), minval=-bound, maxval=bound))
        uniform = jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound) if bias else None
        self.bias = None if uniform is None else nnx.Param(uniform)

    def __call__(self, x: SparseTensor) -> SparseTensor:
        _check_features("SparseLinear", x, self.kernel.shape[0])

        def apply(rows):
            y = jnp.matmul(rows, self.kernel[...].astype(rows.dtype), preferred_element_type=jnp.float32)
            y = y if self.bias is None else y + self.bias[...]
            return y.astype(rows.dtype)

        return x.map(apply)


class BatchNorm(layers.BatchNorm):
    """`lumen.layers.BatchNorm` with statistics over the rows in use, never over padding."""

    def __call__(self, x: SparseTensor, *, train: bool) -> SparseTensor:
        _check_features("BatchNorm", x, self.scale.shape[0])
        return SparseTensor(self.normalise(x.features, x.sites.used, train=train), x.sites)


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias, with statistics over the channels of each row."""

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x: SparseTensor) -> SparseTensor:
        _check_features("LayerNorm", x, self.scale.shape[0])

        def normalise(rows):
            wide = rows.astype(jnp.float32)
            centred = wide - wide.mean(1, keepdims=True)
            unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + self.epsilon)
            return (unit * self.scale[...] + self.bias[...]).astype(rows.dtype)

        return x.map(normalise)


class ConvBlock(nnx.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        transposed: bool = False,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        rngs: nnx.Rngs,
    ):
        self.conv = SparseConv(inputs, outputs, kernel_size, transposed=transposed, rngs=rngs)
        self.norm = BatchNorm(outputs, epsilon=epsilon, momentum=momentum)

    def __call__(self, x: SparseTensor, site_map: SiteMap, *, train: bool) -> SparseTensor:
        return relu(self.norm(self.conv(x, site_map), train=train))


class ResidualBlock(nnx.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + x), with x through a linear layer and a norm if widths differ."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        rngs: nnx.Rngs,
    ):
        """Windows of 3; `bias` is of the convolutions, epsilon and momentum of the norms."""
        norm = functools.partial(BatchNorm, outputs, epsilon=epsilon, momentum=momentum)
        self.conv1, self.norm1 = SparseConv(inputs, outputs, 3, bias=bias, rngs=rngs), norm()
        self.conv2, self.norm2 = SparseConv(outputs, outputs, 3, bias=bias, rngs=rngs), norm()
        self.shortcut = SparseLinear(inputs, outputs, rngs=rngs) if inputs != outputs else None
        self.shortcut_norm = norm() if inputs != outputs else None

    def __call__(self, x: SparseTensor, site_map: SiteMap, *, train: bool) -> SparseTensor:
        y = relu(self.norm1(self.conv1(x, site_map), train=train))
        y = self.norm2(self.conv2(y, site_map), train=train)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x), train=train)
        return relu(add(x, y))


def relu(x: SparseTensor) -> SparseTensor:
    """max(x, 0)."""
    return x.map(jax.nn.relu)


def add(x: SparseTensor, y: SparseTensor) -> SparseTensor:
    """x + y on the same sites."""
    _check_features("add: y", y, _same_sites("add", x, y).features.shape[-1])
    return SparseTensor(x.features + y.features, x.sites)


def concatenate(x: SparseTensor, y: SparseTensor) -> SparseTensor:
    """[N, C] and [N, D] on the same sites -> [N, C + D]."""
    return SparseTensor(jnp.concatenate([_same_sites("concatenate", x, y).features, y.features], 1), x.sites)


def _size(sites: Sites) -> str:
    return f"{sites.capacity} rows of {sites.batch_size} samples on a grid of {sites.spatial_shape}"


def _same_sites(name: str, x: SparseTensor, y: SparseTensor) -> SparseTensor:
    if _size(x.sites) != _size(y.sites):
        raise SparseError(f"{name}: {_size(x.sites)} and {_size(y.sites)}; wanted two tensors on the same sites.")
    return x


def _check_features(name: str, x: SparseTensor, channels: int) -> None:
    wanted = [x.sites.capacity, channels]
    if list(x.features.shape) != wanted:
        raise SparseError(
            f"{name}: features are {list(x.features.shape)} on {x.sites.capacity} rows of sites; wanted {wanted}. Give "
            "the layer as many channels as the one before it has outputs, and sites the features made on them."
        )


def _check_map(name: str, x: SparseTensor, site_map: SiteMap) -> None:
    if _size(x.sites) != _size(site_map.inputs):
        raise SparseError(
            f"{name}: x has {_size(x.sites)} and the map reads {_size(site_map.inputs)}; wanted the map of x's own "
            "sites."
        )


def _check_pooling(name: str, kind: str) -> None:
    if kind not in ("max", "mean"):
        raise SparseError(f"{name}: kind={kind!r} is unknown; use 'max' or 'mean'.")


def pool(x: SparseTensor, site_map: SiteMap, kind: Literal["max", "mean"] = "max") -> SparseTensor:
    """The largest or the mean of each window's sites, channel by channel; empty places of a window do not count.

    Means are taken in float32; the result has x's dtype, and is zero where a window is empty.
    """
    _check_pooling("pool", kind)
    _check_map("pool", x, site_map)
    table = site_map.kernel_map.table

    def visit(carry, rows):
        total, number = carry
        here = (rows >= 0)[:, None]
        values = x.features[jnp.maximum(rows, 0)]
        if kind == "max":
            return (jnp.where(here, jnp.maximum(total, values), total), number | here), None
        return (total + jnp.where(here, values, 0), number + here), None

    shape = (table.shape[1], x.features.shape[1])
    if kind == "max":
        start = (jnp.full(shape, -jnp.inf, x.features.dtype), jnp.zeros((shape[0], 1), bool))
    else:
        start = (jnp.zeros(shape, jnp.float32), jnp.zeros((shape[0], 1), jnp.int32))
    (total, number), _ = jax.lax.scan(visit, start, table)
    pooled = jnp.where(number, total, 0) if kind == "max" else total / jnp.maximum(number, 1)
    return SparseTensor(pooled.astype(x.features.dtype), site_map.outputs).map(lambda rows: rows)


def global_pool(x: SparseTensor, kind: Literal["max", "mean"] = "mean"):
    """The largest or the mean over the sites of each sample, [B, C]; zero for a sample without sites.

    Means are taken in float32; the result has x's dtype.
    """
    _check_pooling("global_pool", kind)
    sites = x.sites
    sample = jnp.where(sites.used, sites.coordinates[:, 0], sites.batch_size)
    number = jax.ops.segment_sum(jnp.ones(sites.capacity), sample, sites.batch_size + 1)[:-1, None]
    if kind == "max":
        largest = jax.ops.segment_max(x.features, sample, sites.batch_size + 1)[:-1]
        return jnp.where(number > 0, largest, 0)
    rows = jnp.where(sites.used[:, None], x.features, 0).astype(jnp.float32)
    mean = jax.ops.segment_sum(rows, sample, sites.batch_size + 1)[:-1] / jnp.maximum(number, 1)
    return mean.astype(x.features.dtype)


def to_dense(x: SparseTensor):
    """[B, *spatial_shape, C], zero where there is no site."""
    empty = jnp.zeros((x.sites.batch_size, *x.sites.spatial_shape, x.features.shape[1]), x.features.dtype)
    return empty.at[tuple(x.sites.coordinates.T)].set(x.features, mode="drop")  # padding is beyond the last sample
