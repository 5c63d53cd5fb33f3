"""Sparse layers against TorchSparse's outputs, and each by itself against NumPy.

The goldens' rows of strided layers are in lexicographic order, so that is the order asked for here. One recorded mode
is not offered, and not tested: `strided_k3s2_p0_hashmap_spconv`, in which upstream takes the sites of one convention
and the windows of another.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen import layers
from lumen.layers import Statistic
from lumen.sparse.convolution import (
    BatchNorm,
    LayerNorm,
    SparseConv,
    SparseLinear,
    add,
    concatenate,
    global_pool,
    pool,
    relu,
    to_dense,
)
from lumen.sparse.kernel_maps import generative_map, strided_map, submanifold_map
from lumen.sparse.tensor import SparseError, SparseTensor, from_numpy

# From the goldens' README: float32 sums of up to 125 x 7 products.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CAPACITY = 256


def with_weights(kernel, bias=None):
    """A SparseConv (a SparseLinear for [Cin, Cout]) with these weights; under jit, they may be traced."""
    kind = SparseLinear if kernel.ndim == 2 else functools.partial(SparseConv, kernel_size=kernel.shape[:-2])
    layer = nnx.eval_shape(lambda: kind(*kernel.shape[-2:], bias=bias is not None, rngs=nnx.Rngs(0)))
    layer.kernel = nnx.Param(kernel)
    layer.bias = None if bias is None else nnx.Param(bias)
    return layer


def from_torchsparse(array, size):
    """[K, ...] -> [*size, ...]: of an odd number of offsets the first axis is fastest, else the last one."""
    if len(array) % 2 == 0:
        return array.reshape(*size, *array.shape[1:])
    axes = range(len(size))
    return np.moveaxis(array.reshape(*size[::-1], *array.shape[1:]), axes, axes[::-1])


def grid_of(config):
    """Upstream's static range, or the range of the data, at which it cuts without one."""
    if config.get("spatial_range"):
        return tuple(config["spatial_range"][1:])
    return tuple(size + 1 for size in config["max_coordinate_present"])


def golden_tensor(file, shape):
    """The input, and the rows of it that are used; two-dimensional cases have a third coordinate, 0."""
    coordinates = file["in/coords"][:, : 1 + len(shape)]
    return from_numpy(file["in/feats"], coordinates, spatial_shape=shape, batch_size=3, capacity=CAPACITY)


def padded_cotangent(rows):
    """A loss may say anything of rows of padding."""
    return np.pad(rows, ((0, CAPACITY - len(rows)), (0, 0)), constant_values=np.nan)


def check_rows(got, want, **tolerance):
    """`got` is `want`, and zero in rows of padding."""
    np.testing.assert_allclose(got[: len(want)], want, **tolerance)
    assert not np.asarray(got[len(want) :]).any()


def run_layer(x, kernel, bias, cotangent, make_map):
    """(y, map, dx, dkernel, dbias) of one layer, as one program."""

    @jax.jit
    def run(x, kernel, bias, cotangent):
        site_map = make_map(x.sites)

        def layer(features, kernel, bias):
            return with_weights(kernel, bias)(SparseTensor(features, x.sites), site_map).features

        y, pull = jax.vjp(layer, x.features, kernel, bias)
        return y, site_map, *pull(cotangent)

    return run(x, kernel, bias, cotangent)


def check_layer(file, kernel, make_map, shape, layout):
    """A recorded layer: sites and map exactly, outputs and gradients closely."""
    bias = file.weights().get("bias")
    x = golden_tensor(file, shape)
    y, site_map, dx, dkernel, dbias = run_layer(x, kernel, bias, padded_cotangent(file["in/grad_out"]), make_map)
    sites, rows = site_map.outputs, len(file["out/coords"])
    assert int(sites.count) == rows
    np.testing.assert_array_equal(sites.coordinates[:rows], file["out/coords"][:, : 1 + len(shape)])
    table = layout(file["out/out_in_map"].T).reshape(-1, rows)
    np.testing.assert_array_equal(site_map.kernel_map.table[:, :rows], table)
    assert (np.asarray(site_map.kernel_map.table[:, rows:]) == -1).all()
    check_rows(y, file["out/feats"], **CLOSE)
    check_rows(dx, file["out/grad_feats"], **CLOSE)
    name = "out/grad_kernel" if "out/grad_kernel" in file else "out/grad_weight"
    np.testing.assert_allclose(dkernel, layout(file[name]), **CLOSE)
    if bias is not None:
        np.testing.assert_allclose(dbias, file["out/grad_bias"], **CLOSE)


SUBMANIFOLD = ["subm_k3", "subm_k5", "subm_asym_k133", "subm_asym_k315", "subm_even_k2", "subm2d_k3", "subm2d_k5"]
STRIDED = [
    "strided_asym_k133_s122_p011",
    "strided_asym_k231_s211",
    "strided_asym_k311_s211_range",
    "strided_k2s2_floor",
    "strided_k2s2_range",
    "strided_k2s2_window",
    "strided_k3s2_floor_centered",
    "strided_k3s2_p0_window",
    "strided_k3s2_p1_range",
    "strided_k3s3_range",
]
INVERSE = [
    "inverse_asym_k331_s221_window",
    "inverse_k2s2_floor",
    "inverse_k2s2_window",
    "inverse_k3s2_p0_window",
    "inverse_k3s2_p1_window",
]


@pytest.mark.parametrize("name", SUBMANIFOLD + STRIDED)
def test_layers_match_torchsparse(golden, name):
    """In the dataflows of a map that is told none; tests/pallas_kernels has some of the files in all dataflows."""
    file = golden(f"torchsparse/{name}")
    config = file.meta["config"]
    dimensions = 2 if name.startswith("subm2d") else 3
    shape, size = grid_of(config)[:dimensions], tuple(config["kernel_size"][:dimensions])
    layout = functools.partial(from_torchsparse, size=size)
    kernel = layout(file["weights/kernel"])
    dense = file["out/dense_weight"].reshape(*file["out/dense_weight"].shape[:2], *size)
    np.testing.assert_array_equal(kernel, np.moveaxis(dense, (0, 1), (-1, -2)))
    if name.startswith("subm"):
        make_map = functools.partial(submanifold_map, kernel_size=size)
    else:
        floor = config["downsample_mode"] == "minkowski"
        make_map = functools.partial(
            strided_map,
            kernel_size=size,
            stride=config["stride"],
            padding=[(k - 1) // 2 for k in size] if floor else config["effective_padding"],
            rule="floor" if floor else "window",
            capacity=CAPACITY,
            order="lexicographic",
        )
    check_layer(file, kernel, make_map, shape, layout)


def test_pointwise_layer_matches_torchsparse(golden):
    file = golden("torchsparse/conv_k1")
    x = golden_tensor(file, grid_of(file.meta["config"]))
    kernel, bias = file["weights/kernel"], file["weights/bias"]
    np.testing.assert_array_equal(kernel, file["out/dense_weight"][:, :, 0, 0, 0].T)

    @jax.jit
    def run(features, kernel, bias, cotangent):
        def layer(features, kernel, bias):
            return with_weights(kernel, bias)(SparseTensor(features, x.sites)).features

        y, pull = jax.vjp(layer, features, kernel, bias)
        return y, *pull(cotangent)

    y, dx, dkernel, dbias = run(x.features, kernel, bias, padded_cotangent(file["in/grad_out"]))
    check_rows(y, file["out/feats"], **CLOSE)
    check_rows(dx, file["out/grad_feats"], **CLOSE)
    np.testing.assert_allclose(dkernel, file["out/grad_kernel"], **CLOSE)
    np.testing.assert_allclose(dbias, file["out/grad_bias"], **CLOSE)


@pytest.mark.parametrize("name", INVERSE)
def test_inverse_layers_match_torchsparse(golden, name):
    file = golden(f"torchsparse/{name}")
    config = file.meta["config"]
    size, floor = tuple(config["kernel_size"]), config["downsample_mode"] == "minkowski"
    layout = functools.partial(from_torchsparse, size=size)
    x = golden_tensor(file, grid_of(config))

    @jax.jit
    def run(x, down, up, bias, cotangent):
        site_map = strided_map(
            x.sites,
            size,
            config["stride"],
            padding=config["padding"],
            rule="floor" if floor else "window",
            capacity=CAPACITY,
            order="lexicographic",
        )
        back = site_map.inverse()

        def coarse(features, kernel):
            return with_weights(kernel)(SparseTensor(features, x.sites), site_map).features

        def fine(features, kernel, bias):
            return with_weights(kernel, bias)(SparseTensor(features, site_map.outputs), back).features

        middle, pull_down = jax.vjp(coarse, x.features, down)
        y, pull_up = jax.vjp(fine, middle, up, bias)
        dmiddle, dup, dbias = pull_up(cotangent)
        return site_map, back, middle, y, *pull_down(dmiddle), dmiddle, dup, dbias

    site_map, back, middle, y, dx, ddown, dmiddle, dup, dbias = run(
        x,
        layout(file["weights/down.kernel"]),
        layout(file["weights/up.kernel"]),
        file["weights/up.bias"],
        padded_cotangent(file["in/grad_out"]),
    )
    fine, coarse = len(file["in/coords"]), len(file["out/mid_coords"])
    assert int(site_map.outputs.count) == coarse
    np.testing.assert_array_equal(site_map.outputs.coordinates[:coarse], file["out/mid_coords"])
    np.testing.assert_array_equal(back.outputs.coordinates, x.sites.coordinates)
    for kernel_map, table, rows in (
        (site_map.kernel_map, "out/out_in_map", coarse),
        (back.kernel_map, "out/inverse_map", fine),
    ):
        want = layout(file[table].T).reshape(-1, rows)
        np.testing.assert_array_equal(kernel_map.table[:, :rows], want)
    np.testing.assert_array_equal((np.asarray(back.kernel_map.table[:, :fine]) < 0).all(0), file["out/orphans"])
    check_rows(middle, file["out/mid_feats"], **CLOSE)
    check_rows(y, file["out/feats"], **CLOSE)
    check_rows(dx, file["out/grad_feats"], **CLOSE)
    check_rows(dmiddle, file["out/grad_mid"], **CLOSE)
    np.testing.assert_allclose(ddown, layout(file["out/grad_down_kernel"]), **CLOSE)
    np.testing.assert_allclose(dup, layout(file["out/grad_up_kernel"]), **CLOSE)
    np.testing.assert_allclose(dbias, file["out/grad_up_bias"], **CLOSE)


@pytest.mark.parametrize("name", ["generative_k2s2", "generative_k3s2"])
def test_generative_layers_match_torchsparse(golden, name):
    file = golden(f"torchsparse/{name}")
    config = file.meta["config"]
    size = tuple(config["kernel_size"])
    layout = functools.partial(from_torchsparse, size=size)
    x = golden_tensor(file, tuple(config["coarse_grid"]))
    order = np.lexsort(file["out/coords"].T[::-1])
    # Upstream makes its sites within what a strided layer would leave of the range it was told.
    ranges = zip(config["fine_range"], size, config["stride"], strict=True)
    grid = tuple((n - k) // s + 1 for n, k, s in ranges)
    make_map = functools.partial(
        generative_map,
        kernel_size=size,
        stride=config["stride"],
        spatial_shape=grid,
        rule="torchsparse",
        capacity=CAPACITY,
        order="lexicographic",
    )
    y, site_map, dx, dkernel, dbias = run_layer(
        x,
        layout(file["weights/kernel"]),
        file["weights/bias"],
        padded_cotangent(file["in/grad_out"][order]),
        make_map,
    )
    rows = len(order)
    assert int(site_map.outputs.count) == rows
    np.testing.assert_array_equal(site_map.outputs.coordinates[:rows], file["out/coords"][order])
    # Pairs are listed offset by offset, of the original rows.
    table = np.full((math.prod(size), rows), -1)
    offsets = np.repeat(np.arange(math.prod(size)), file["out/pair_counts"])
    inputs, outputs = file["out/pairs"].T
    table[offsets, np.argsort(order)[outputs]] = inputs
    want = layout(table).reshape(-1, rows)
    np.testing.assert_array_equal(site_map.kernel_map.table[:, :rows], want)
    assert int((want < 0).all(0).sum()) == config["output_sites_without_any_pair"]
    check_rows(y, file["out/feats"][order], **CLOSE)
    check_rows(dx, file["out/grad_feats"], **CLOSE)
    np.testing.assert_allclose(dkernel, layout(file["out/grad_kernel"]), **CLOSE)
    np.testing.assert_allclose(dbias, file["out/grad_bias"], **CLOSE)


@pytest.mark.parametrize("name", ["dilation_subm_k315_d231", "dilation_subm_k3d2", "dilation_strided_k3s2p2d2"])
def test_dilation_matches_torch(golden, name):
    """Upstream ignores dilation: dense torch in float64, and spconv, are the measure."""
    file = golden(f"torchsparse/{name}")
    config = file.meta["config"]
    size, shape = tuple(config["kernel_size"]), tuple(config["grid"])
    if config["kind"] == "subm":
        make_map = functools.partial(submanifold_map, kernel_size=size, dilation=config["dilation"])
    else:
        make_map = functools.partial(
            strided_map,
            kernel_size=size,
            stride=config["stride"],
            padding=config["padding"],
            dilation=config["dilation"],
            capacity=CAPACITY,
            order="lexicographic",
        )

    def layout(array):
        """Weights are [Cout, Cin, *size], as torch's; the map has the last axis fastest."""
        return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim == 5 else array

    check_layer(file, layout(file["weights/weight"]), make_map, shape, layout)


SHAPE = (7, 6, 5)


@pytest.fixture(scope="module")
def rough(scene):
    """(SparseTensor, features, coordinates) of three samples, the second without sites: normal numbers, off centre."""
    one = scene(0, SHAPE, 2, 90, channels=4)
    coordinates = one.coordinates * [2, 1, 1, 1]
    features = 3 + 2 * np.random.default_rng(0).standard_normal((90, 4), np.float32)
    x = from_numpy(features, coordinates, spatial_shape=SHAPE, batch_size=3, capacity=128)
    return x, features, coordinates


def poisoned(rows, count):
    """NaN from row `count` on."""
    return jnp.where(jnp.arange(len(rows))[:, None] < count, rows, jnp.nan)


def normalised(x, scale, bias, epsilon, axis):
    """(y, pull) of a norm over an axis in float64; pull(dy) -> dx, dscale, dbias."""
    centred = x - x.mean(axis, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis, keepdims=True) + epsilon)
    unit = centred / spread

    def pull(dy):
        inner = dy * scale
        both = inner.mean(axis, keepdims=True) + unit * (inner * unit).mean(axis, keepdims=True)
        return (inner - both) / spread, (dy * unit).sum(0), dy.sum(0)

    return unit * scale + bias, pull


# float32 sums of 90 numbers of size 10, and their gradients of size 1: 90 * 2**-24 * 10.
NORM = {"rtol": 1e-4, "atol": 5e-5}


def with_parameters(norm, rng):
    norm.scale[...] = jnp.asarray(1 + rng.random(4, np.float32))
    norm.bias[...] = jnp.asarray(rng.standard_normal(4, np.float32))
    return norm


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_sees_the_rows_in_use(rough, dtype):
    """Outputs, gradients and running statistics against NumPy on these rows alone, with NaN in all others."""
    x, features, _ = rough
    rng = np.random.default_rng(1)
    norm = with_parameters(BatchNorm(4, epsilon=1e-3, momentum=0.25), rng)
    norm.mean[...], norm.var[...] = jnp.asarray([1.0, -2, 3, 0]), jnp.asarray([2.0, 1, 0.5, 4])
    graphdef, params, statistics = nnx.split(norm, nnx.Param, ...)
    rows = poisoned(x.features, 90).astype(dtype)

    @jax.jit
    def train(params, rows, dy):
        def run(params, rows):
            norm = nnx.merge(graphdef, params, statistics, copy=True)
            y = norm(SparseTensor(rows, x.sites), train=True).features
            return y, nnx.to_pure_dict(nnx.state(norm, Statistic))

        y, pull, moved = jax.vjp(run, params, rows, has_aux=True)
        dparams, dx = pull(dy)
        return y, dx, nnx.to_pure_dict(dparams), moved

    dy = rng.standard_normal((128, 4), np.float32)
    y, dx, dparams, moved = train(params, rows, poisoned(dy, 90).astype(dtype))
    assert y.dtype == dx.dtype == dtype
    exact = np.asarray(features.astype(dtype), np.float64)
    wanted, pull = normalised(exact, np.asarray(norm.scale[...]), np.asarray(norm.bias[...]), 1e-3, 0)
    wanted_dx, dscale, dbias = pull(np.asarray(dy[:90].astype(dtype), np.float64))
    # bfloat16 results are rounded, to 2**-9 of themselves; what a parameter gets is float32 either way.
    rounding = {"rtol": 2**-8, "atol": 2**-8} if dtype == jnp.bfloat16 else NORM
    check_rows(y.astype(np.float32), wanted, **rounding)
    check_rows(dx.astype(np.float32), wanted_dx, **rounding)
    np.testing.assert_allclose(dparams["scale"], dscale, **NORM)
    np.testing.assert_allclose(dparams["bias"], dbias, **NORM)
    # torch's rule: the variance that is kept is divided by n - 1.
    np.testing.assert_allclose(moved["mean"], 0.75 * norm.mean[...] + 0.25 * exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved["var"], 0.75 * norm.var[...] + 0.25 * exact.var(0, ddof=1), rtol=1e-5)
    assert moved["mean"].dtype == moved["var"].dtype == jnp.float32

    evaluated = jax.jit(lambda rows: norm(SparseTensor(rows, x.sites), train=False).features)(rows)
    running = (exact - np.asarray(norm.mean[...])) / np.sqrt(np.asarray(norm.var[...]) + 1e-3)
    running = running * norm.scale[...] + norm.bias[...]
    check_rows(evaluated.astype(np.float32), running, **rounding)
    assert norm.mean[...].tolist() == [1, -2, 3, 0]


def test_batch_norm_of_pictures_is_that_of_their_pixels():
    """Every pixel counts: the same outputs and statistics as of a sparse tensor with a site per pixel."""
    pixels = 3 + np.random.default_rng(9).standard_normal((2, 3, 4, 4), np.float32)
    sites = np.stack(np.unravel_index(np.arange(24), (2, 3, 4)), 1)
    x = from_numpy(pixels.reshape(24, 4), sites, spatial_shape=(3, 4), batch_size=2, capacity=128)

    @jax.jit
    def run(pixels, x):
        dense, sparse = layers.BatchNorm(4, momentum=0.25), BatchNorm(4, momentum=0.25)
        results = dense(pixels, train=True).reshape(24, 4), sparse(x, train=True).features
        return results, [nnx.to_pure_dict(nnx.state(norm, Statistic)) for norm in (dense, sparse)]

    (picture, rows), (of_picture, of_rows) = run(pixels, x)
    exact = pixels.astype(np.float64).reshape(24, 4)
    wanted = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(picture, wanted, **NORM)
    check_rows(rows, wanted, **NORM)
    for moved in (of_picture, of_rows):
        np.testing.assert_allclose(moved["mean"], 0.25 * exact.mean(0), rtol=1e-5)
        np.testing.assert_allclose(moved["var"], 0.75 + 0.25 * exact.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_of_numbers_far_from_zero():
    """A variance from mean squares would lose all digits: 10000**2 * 2**-24 = 6."""
    rng = np.random.default_rng(2)
    features = 10_000 + rng.standard_normal((100, 2)).astype(np.float32)
    coordinates = np.stack([np.zeros(100, int), np.arange(100)], 1)
    x = from_numpy(features, coordinates, spatial_shape=(100,), batch_size=1)
    y = jax.jit(lambda x: BatchNorm(2)(x, train=True).features)(x)
    exact = features.astype(np.float64)
    # The mean itself is off by up to half a unit in the last place of 10000, 2**-11.
    check_rows(y, (exact - exact.mean(0)) / exact.std(0), rtol=1e-3, atol=2**-10)


def test_layer_norm_sees_one_row(rough):
    x, features, _ = rough
    norm = with_parameters(LayerNorm(4, epsilon=1e-3), np.random.default_rng(3))
    graphdef, params = nnx.split(norm)
    dy = np.random.default_rng(4).standard_normal((128, 4), np.float32)

    @jax.jit
    def run(params, rows, dy):
        def norm(params, rows):
            return nnx.merge(graphdef, params)(SparseTensor(rows, x.sites)).features

        y, pull = jax.vjp(norm, params, rows)
        dparams, dx = pull(dy)
        return y, dx, nnx.to_pure_dict(dparams)

    y, dx, dparams = run(params, poisoned(x.features, 90), poisoned(dy, 90))
    wanted, pull = normalised(
        features.astype(np.float64), np.asarray(norm.scale[...]), np.asarray(norm.bias[...]), 1e-3, 1
    )
    wanted_dx, dscale, dbias = pull(dy[:90].astype(np.float64))
    check_rows(y, wanted, **NORM)
    check_rows(dx, wanted_dx, **NORM)
    np.testing.assert_allclose(dparams["scale"], dscale, **NORM)
    np.testing.assert_allclose(dparams["bias"], dbias, **NORM)


def windows(coordinates, outputs, size, stride, padding):
    """The rows in the window of each output site, by comparing coordinates."""
    for site in outputs:
        inside = coordinates[:, 1:] - (site[1:] * stride - padding)
        yield np.flatnonzero((coordinates[:, 0] == site[0]) & (inside >= 0).all(1) & (inside < size).all(1))


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_pooling(rough, kind):
    """Overlapping windows of negative numbers, against NumPy; the gradient of a mean is spread, of a maximum is not."""
    x, features, coordinates = rough
    features = -np.abs(features)

    @jax.jit
    def run(rows, dy):
        down = strided_map(x.sites, 3, 2, padding=1, capacity=256)

        def pooled(rows):
            return pool(SparseTensor(rows, x.sites), down, kind).features

        y, pull = jax.vjp(pooled, rows)
        return down.outputs, y, *pull(poisoned(dy, down.outputs.count))

    dy = np.random.default_rng(5).standard_normal((256, 4), np.float32)
    outputs, y, dx = run(poisoned(np.pad(features, ((0, 38), (0, 0))), 90), dy)
    count = int(outputs.count)
    wanted, wanted_dx = np.zeros((count, 4)), np.zeros((90, 4))
    for i, rows in enumerate(windows(coordinates, np.asarray(outputs.coordinates[:count]), 3, 2, 1)):
        window = features[rows].astype(np.float64)
        wanted[i] = window.max(0) if kind == "max" else window.mean(0)
        if kind == "max":
            wanted_dx[rows[window.argmax(0)], range(4)] += dy[i]
        else:
            wanted_dx[rows] += dy[i] / len(rows)
    # Windows have at most 27 rows, and a row is in at most 8 windows.
    check_rows(y, wanted, rtol=27 * 2**-24, atol=0)
    check_rows(dx, wanted_dx, rtol=8 * 2**-24, atol=8 * 2**-22)


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_empty_windows_pool_to_zero(kind):
    """A site at the odd end of a grid has no parent, hence an inverse map that reads nothing there."""
    coordinates = np.asarray([[0, 0], [0, 1], [0, 4]])
    x = from_numpy(-np.ones((3, 1), np.float32), coordinates, spatial_shape=(5,), batch_size=1, capacity=8)

    @jax.jit
    def run(features):
        down = strided_map(x.sites, 2, 2)
        return pool(pool(SparseTensor(features, x.sites), down, kind), down.inverse(), kind).features

    assert run(x.features)[:, 0].tolist() == [-1, -1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_global_pooling(rough, kind):
    """Zero for the sample without sites, though all numbers are negative; nothing from padding."""
    x, features, coordinates = rough
    features = -np.abs(features)

    @jax.jit
    def run(rows, dy):
        pooled, pull = jax.vjp(lambda rows: global_pool(SparseTensor(rows, x.sites), kind), rows)
        return pooled, *pull(dy)

    dy = np.random.default_rng(6).standard_normal((3, 4), np.float32)
    pooled, dx = run(poisoned(np.pad(features, ((0, 38), (0, 0))), 90), dy)
    wanted, wanted_dx = np.zeros((3, 4)), np.zeros((90, 4))
    for sample in (0, 2):
        rows = np.flatnonzero(coordinates[:, 0] == sample)
        mine = features[rows].astype(np.float64)
        wanted[sample] = mine.max(0) if kind == "max" else mine.mean(0)
        if kind == "max":
            wanted_dx[rows[mine.argmax(0)], range(4)] = dy[sample]
        else:
            wanted_dx[rows] = dy[sample] / len(rows)
    # float32 sums of 90 numbers.
    np.testing.assert_allclose(pooled, wanted, rtol=90 * 2**-24)
    check_rows(dx, wanted_dx, rtol=2**-22, atol=0)


def test_means_of_half_precision_are_taken_in_float32():
    """In bfloat16, 256 + 1 is 256: the sum of 256, 1, 1 and 2 would be 258, and its quarter 64.5."""
    features = np.asarray([[256], [1], [1], [2]]).astype(jnp.bfloat16)
    coordinates = np.stack([np.zeros(4, int), np.arange(4)], 1)
    x = from_numpy(features, coordinates, spatial_shape=(4,), batch_size=1)

    @jax.jit
    def run(x):
        return global_pool(x, "mean"), pool(x, strided_map(x.sites, 4, 4, capacity=1), "mean").features

    everywhere, window = run(x)
    assert (everywhere.dtype, window.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert everywhere.tolist() == window.tolist() == [[65.0]]


def test_dense_there_and_back(rough):
    x, features, coordinates = rough

    @jax.jit
    def run(rows, dy):
        dense, pull = jax.vjp(lambda rows: to_dense(SparseTensor(rows, x.sites)), rows)
        return dense, *pull(dy)

    dy = np.random.default_rng(7).standard_normal((3, *SHAPE, 4), np.float32)
    dense, dx = run(poisoned(x.features, 90), dy)
    wanted = np.zeros((3, *SHAPE, 4), np.float32)
    wanted[tuple(coordinates.T)] = features
    np.testing.assert_array_equal(dense, wanted)
    check_rows(dx, dy[tuple(coordinates.T)], rtol=0, atol=0)


def test_row_by_row_functions(rough):
    x, features, _ = rough
    other = SparseTensor(x.features[:, :4] * -2, x.sites)
    check_rows(relu(other).features, np.maximum(-2 * features, 0), rtol=0, atol=0)
    check_rows(add(x, other).features, features - 2 * features, rtol=0, atol=0)
    narrow = SparseTensor(x.features[:, :1], x.sites)
    check_rows(concatenate(narrow, other).features, np.c_[features[:, :1], -2 * features], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_layers_accumulate_in_float32(dtype):
    """2048 + 26: a running sum in half precision would stay at 2048, in bfloat16 at 256. Parameters stay float32."""
    sites = np.stack(np.meshgrid([0], *3 * [np.arange(3)], indexing="ij"), -1).reshape(-1, 4)
    kernel = np.ones((3, 3, 3, 1, 1), np.float32)
    kernel[0, 0, 0] = 2048

    @jax.jit
    def run(x, kernel, linear):
        same = submanifold_map(x.sites, 3)
        y, pull = jax.vjp(lambda k: with_weights(k)(x, same).features, kernel)
        (dkernel,) = pull(jnp.ones_like(y))
        wide = SparseTensor(jnp.ones((32, 27), dtype), x.sites)
        return y, dkernel, with_weights(linear, jnp.zeros(1))(wide).features

    x = from_numpy(np.ones((27, 1), dtype), sites, spatial_shape=(3, 3, 3), batch_size=1, capacity=32)
    y, dkernel, pointwise = run(x, kernel, kernel.reshape(27, 1))
    centre = 13
    wanted = np.asarray(2048 + 26).astype(dtype)
    assert y.dtype == pointwise.dtype == dtype
    assert y[centre, 0] == pointwise[0, 0] == wanted
    assert dkernel.dtype == jnp.float32
    # The centre of the window is inside for all 27 sites, a corner for 8.
    assert (dkernel[1, 1, 1, 0, 0], dkernel[0, 0, 2, 0, 0]) == (27, 8)


def test_weights_are_drawn_as_upstream_draws_them():
    """U(-a, a), a = 1 / sqrt(K C), C the inputs, of transposed layers the outputs."""

    @jax.jit
    def draw():
        layers = (
            SparseConv(16, 4, 3, bias=True, rngs=nnx.Rngs(0)),
            SparseConv(4, 16, 3, transposed=True, rngs=nnx.Rngs(0)),
            SparseLinear(64, 32, rngs=nnx.Rngs(0)),
        )
        return [layer.kernel[...] for layer in layers], layers[0].bias[...]

    kernels, bias = draw()
    bounds = (27 * 16) ** -0.5, (27 * 16) ** -0.5, 64**-0.5
    for kernel, bound in zip(kernels, bounds, strict=True):
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        # Of n uniform numbers in (-a, a), the mean has the deviation a / sqrt(3 n).
        assert abs(kernel.mean()) < 5 * bound / np.sqrt(3 * kernel.size)
    assert bias.shape == (4,)
    assert 0.3 * bounds[0] < np.abs(bias).max() <= bounds[0]

    def shape(*size, **options):
        return nnx.eval_shape(lambda: SparseConv(5, 6, *size, **options, rngs=nnx.Rngs(0)))

    assert shape((3, 1, 2)).kernel.shape == (3, 1, 2, 5, 6)
    assert shape(3, dimensions=2).kernel.shape == (3, 3, 5, 6)
    assert shape(2).bias is None


class Everything(nnx.Module):
    """Every layer there is."""

    def __init__(self, rngs):
        self.stem = SparseConv(4, 6, 3, bias=True, rngs=rngs)
        self.norm = BatchNorm(6)
        self.down = SparseConv(6, 8, 3, bias=True, rngs=rngs)
        self.middle = LayerNorm(8)
        self.up = SparseConv(8, 6, 3, bias=True, transposed=True, rngs=rngs)
        self.head = SparseLinear(12, 3, bias=True, rngs=rngs)

    def __call__(self, x, same, down):
        first = relu(self.norm(self.stem(x, same), train=True))
        coarse = self.middle(self.down(first, down))
        coarse = add(coarse, pool(coarse, submanifold_map(coarse.sites, 3), "max"))
        fine = self.up(coarse, down.inverse())
        y = self.head(concatenate(first, fine))
        return y.features, global_pool(y, "mean"), to_dense(pool(y, down, "mean"))


def test_padding_reaches_nothing_and_runs_repeat(rough):
    """A network of all layers, its gradients and statistics, with NaN in the padding of the input and the cotangent."""
    x, _, _ = rough
    graphdef, params, statistics = nnx.split(Everything(nnx.Rngs(0)), nnx.Param, ...)
    rng = np.random.default_rng(8)

    @jax.jit
    def run(rows, params, cotangents):
        same, down = submanifold_map(x.sites, 3), strided_map(x.sites, 3, 2, padding=1, capacity=256)

        def network(rows, params):
            model = nnx.merge(graphdef, params, statistics, copy=True)
            y = model(SparseTensor(rows, x.sites), same, down)
            return y, nnx.to_pure_dict(nnx.state(model, Statistic))

        y, pull, moved = jax.vjp(network, rows, params, has_aux=True)
        drows, dparams = pull(cotangents)
        return y, moved, drows, nnx.to_pure_dict(dparams)

    cotangents = [rng.standard_normal(s, np.float32) for s in ((128, 3), (3, 3), (3, 4, 3, 3, 3))]
    clean = run(x.features, params, tuple(cotangents))
    cotangents[0] = poisoned(cotangents[0], 90)
    dirty = run(poisoned(x.features, 90), params, tuple(cotangents))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    jax.tree.map(np.testing.assert_array_equal, run(poisoned(x.features, 90), params, tuple(cotangents)), dirty)
    _, _, drows, dparams = clean
    assert not np.asarray(drows[90:]).any()
    # Every part has a share in the result: nothing above is zero for a reason of its own.
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(dparams))


@pytest.mark.parametrize(
    ("capacity", "shape", "batch", "other"),
    [
        (256, SHAPE, 3, "256 rows of 3 samples on a grid of (7, 6, 5)"),
        (128, (7, 6, 6), 3, "128 rows of 3 samples on a grid of (7, 6, 6)"),
        (128, SHAPE, 2, "128 rows of 2 samples on a grid of (7, 6, 5)"),
    ],
)
def test_maps_and_tensors_of_other_sites(rough, capacity, shape, batch, other):
    x = rough[0]
    y = jax.eval_shape(lambda: SparseTensor.create(jnp.ones((capacity, 4)), jnp.ones((capacity, 4)), 1, shape, batch))
    mine = "128 rows of 3 samples on a grid of (7, 6, 5)"
    layer = with_weights(jnp.ones((3, 3, 3, 4, 4)))
    message = re.escape(f": x has {mine} and the map reads {other}; wanted the map of x's own sites.")
    for name, call in {"SparseConv": layer, "pool": pool}.items():
        with pytest.raises(SparseError, match=name + message):
            jax.eval_shape(lambda x, y, call=call: call(x, submanifold_map(y.sites, 3)), x, y)
    message = re.escape(f": {mine} and {other}; wanted two tensors on the same sites.")
    for name, call in {"add": add, "concatenate": concatenate}.items():
        with pytest.raises(SparseError, match=name + message):
            jax.eval_shape(call, x, y)


def test_kernels_that_do_not_fit_the_map(rough):
    layer = with_weights(jnp.ones((2, 2, 2, 4, 4)))
    message = (
        "SparseConv: the map has 27 offsets and the kernel 8, (2, 2, 2); wanted a map of the kernel's size. Make both "
        "with the same kernel_size."
    )
    with pytest.raises(SparseError, match=re.escape(message)):
        jax.eval_shape(lambda x: layer(x, submanifold_map(x.sites, 3)), rough[0])


def test_features_that_do_not_fit_the_layer(rough):
    """Other channels, and rows of other sites: the error names the layer and both shapes."""
    x, _, _ = rough
    conv, linear, batch_norm = with_weights(jnp.ones((3, 3, 3, 5, 4))), with_weights(jnp.ones((5, 4))), BatchNorm(5)
    calls = {
        "SparseConv": lambda x: conv(x, submanifold_map(x.sites, 3)),
        "SparseLinear": linear,
        "BatchNorm": lambda x: batch_norm(x, train=True),
        "LayerNorm": LayerNorm(5),
        "add: y": lambda y: add(SparseTensor(jnp.ones((128, 5)), x.sites), y),
    }
    for name, call in calls.items():
        for shape in ((128, 4), (100, 5)):
            message = (
                f"{name}: features are {list(shape)} on 128 rows of sites; wanted [128, 5]. Give the layer as many"
            )
            with pytest.raises(SparseError, match=re.escape(message)):
                jax.eval_shape(call, SparseTensor(jnp.ones(shape), x.sites))
    message = "BatchNorm: x is [2, 3, 3, 4]; wanted 5 channels on the last axis. Make the norm for 4 channels, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        layers.BatchNorm(5)(jnp.ones((2, 3, 3, 4)), train=False)


def test_kinds_of_pooling_are_two(rough):
    x, _, _ = rough
    with pytest.raises(SparseError, match="pool: kind='avg' is unknown; use 'max' or 'mean'"):
        jax.eval_shape(lambda x: pool(x, submanifold_map(x.sites, 3), "avg"), x)
    with pytest.raises(SparseError, match="global_pool: kind='sum' is unknown; use 'max' or 'mean'"):
        jax.eval_shape(lambda x: global_pool(x, "sum"), x)
