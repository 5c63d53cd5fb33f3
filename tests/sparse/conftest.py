"""What tests of the sparse engine are measured against: random scenes, and convolution on whole grids in NumPy."""

import dataclasses
import itertools

import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Scene:
    """Distinct random sites in random order, with small integers as features: float32 sums of them are exact.

    Attributes:
      features: float32 [n, C], whole numbers from -3 to 3.
      coordinates: int32 [n, 1 + d].
    """

    features: np.ndarray
    coordinates: np.ndarray

    def __len__(self):
        return len(self.coordinates)

    def padded(self, capacity, features=0.0, coordinates=0):
        """(features, coordinates, count), with these numbers in the rows of padding."""
        missing = ((0, capacity - len(self)), (0, 0))
        return (
            np.pad(self.features, missing, constant_values=features),
            np.pad(self.coordinates, missing, constant_values=coordinates),
            np.int32(len(self)),
        )


@dataclasses.dataclass(frozen=True)
class DenseConvolution:
    """y[b, q] = sum_k x[b, q s - p + k d] @ w[k] on whole grids, one offset at a time; x is zero beyond its grid.

    Works in the arguments' dtypes. `spread` is the same with the arrows turned round: the gradient for x if it is given
    dy and the transpose of w, and a transposed convolution in its own right.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def _windows(self):
        """(k, the slices of the padded grid that the windows of all outputs see at offset k)."""
        axes = list(zip(self.outputs, self.stride, self.dilation, strict=True))
        for k in itertools.product(*map(range, self.kernel)):
            places = [slice(o * d, o * d + (q - 1) * s + 1, s) for o, (q, s, d) in zip(k, axes, strict=True)]
            yield k, (slice(None), *places)

    def _empty(self, batch, channels, dtype):
        """A padded grid of zeros, and the slices of it that are the input's grid."""
        axes = zip(self.inputs, self.outputs, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        size = [max(p + n, (q - 1) * s + (k - 1) * d + 1) for n, q, k, s, p, d in axes]
        middle = (slice(None), *(slice(p, p + n) for p, n in zip(self.padding, self.inputs, strict=True)))
        return np.zeros((batch, *size, channels), dtype), middle

    def __call__(self, x, w):
        grid, middle = self._empty(len(x), x.shape[-1], x.dtype)
        grid[middle] = x
        y = np.zeros((len(x), *self.outputs, w.shape[-1]), x.dtype)
        for k, places in self._windows():
            y += grid[places] @ w[k]
        return y

    def spread(self, y, w):
        """x[b, q s - p + k d] += y[b, q] @ w[k]: [B, *outputs, D] and [*K, D, C] -> [B, *inputs, C]."""
        grid, middle = self._empty(len(y), w.shape[-1], y.dtype)
        for k, places in self._windows():
            grid[places] += y @ w[k]
        return grid[middle]

    def weight_gradient(self, x, dy):
        """dw[k] = sum over b and q of the outer product of x[b, q s - p + k d] and dy[b, q]."""
        grid, middle = self._empty(len(x), x.shape[-1], x.dtype)
        grid[middle] = x
        dw = np.zeros((*self.kernel, x.shape[-1], dy.shape[-1]), x.dtype)
        for k, places in self._windows():
            dw[k] = grid[places].reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
        return dw


@pytest.fixture(scope="session")
def scene():
    """scene(seed, shape, batch, sites, channels=3) -> Scene with that many sites, or a share of the grid's."""

    def make(seed, shape, batch, sites, channels=3):
        rng = np.random.default_rng(seed)
        volume = batch * int(np.prod(shape))
        count = sites if isinstance(sites, int) else max(1, round(sites * volume))
        places = rng.choice(volume, count, replace=False)
        coordinates = np.stack(np.unravel_index(places, (batch, *shape)), 1).astype(np.int32)
        return Scene(rng.integers(-3, 4, (count, channels)).astype(np.float32), coordinates)

    return make


@pytest.fixture(scope="session")
def dense_convolution():
    """The class DenseConvolution."""
    return DenseConvolution


@pytest.fixture(scope="session")
def whole():
    """Small whole numbers from -3 to 3 of a shape, float32; drawn from a seed."""
    return lambda seed, *shape: np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)
