"""Sparse tensors: what from_numpy refuses, how sites are found and ordered, and that padding stays out of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumen.sparse.tensor import (
    CapacityError,
    Sites,
    SparseError,
    SparseTensor,
    bucket,
    check_capacity,
    from_numpy,
    morton_key,
    pad_rows,
    unique_sites,
)

SHAPE = (5, 6, 4)
GOOD = np.asarray([[0, 0, 0, 0], [0, 4, 5, 3], [1, 2, 3, 1], [1, 2, 3, 2]])


def voxels(**changes):
    """from_numpy of four good voxels, but for these changes."""
    arguments = {"features": np.ones((4, 2), np.float32), "coordinates": GOOD, "spatial_shape": SHAPE, "batch_size": 2}
    arguments |= changes
    return from_numpy(arguments.pop("features"), arguments.pop("coordinates"), **arguments)


def changed(row, site):
    coordinates = GOOD.copy()
    coordinates[row] = site
    return coordinates


OUTSIDE = (
    r"voxels: 1 of 4 are outside the grid, first row 2 at \[.*\]; wanted 0 <= \(batch, ...\) < \[2, 5, 6, 4\]. Subtract"
)
HOSTILE = {
    "negative": ({"coordinates": changed(2, (1, 2, -1, 0))}, OUTSIDE),
    "too large": ({"coordinates": changed(2, (1, 2, 3, 4))}, OUTSIDE),
    "beyond 32 bits": ({"coordinates": changed(2, (1, 2**32, 3, 0))}, OUTSIDE),
    "no such sample": ({"coordinates": changed(2, (2, 2, 3, 0))}, OUTSIDE),
    "twice": (
        {"coordinates": changed(3, (0, 4, 5, 3))},
        r"voxels: rows 1 and 3 are both at \[0, 4, 5, 3\], of 1 duplicates; wanted each site once. `voxelize` merges",
    ),
    "none": (
        {"coordinates": GOOD[:0], "features": np.ones((0, 2))},
        "voxels: there are none; wanted at least one. Leave empty scans out",
    ),
    "float coordinates": (
        {"coordinates": GOOD.astype(np.float32)},
        r"voxels: coordinates are float32 \[4, 4\]; wanted integers \[n, 4\], the batch first",
    ),
    "no batch": ({"coordinates": GOOD[:, 1:]}, r"voxels: coordinates are int64 \[4, 3\]; wanted integers \[n, 4\]"),
    "flat coordinates": ({"coordinates": GOOD.reshape(-1)}, r"voxels: coordinates are int64 \[16\]; wanted integers"),
    "NaN": (
        {"features": np.asarray([[0, 1], [2, np.nan], [3, 4], [5, 6]])},
        r"voxels: features of row 1 are \[2.0, nan\]; wanted finite numbers",
    ),
    "infinity": (
        {"features": np.asarray([[0, 1], [2, 2], [-np.inf, 4], [5, 6]])},
        r"voxels: features of row 2 are \[-inf, 4.0\]; wanted finite numbers",
    ),
    "whole numbers": (
        {"features": np.ones((4, 2), np.int32)},
        r"voxels: features are int32; wanted a floating dtype, to which weights are cast",
    ),
    "too few features": (
        {"features": np.ones((3, 2))},
        r"voxels: features are \[3, 2\] for 4 sites; wanted \[n, C\], a row per site",
    ),
    "flat features": ({"features": np.ones(4)}, r"voxels: features are \[4\] for 4 sites; wanted \[n, C\]"),
    "grid of fewer axes": ({"spatial_shape": (5, 6)}, r"coordinates are int64 \[4, 4\]; wanted integers \[n, 3\]"),
    "grid without keys": (
        {"spatial_shape": (2**31, 2**31, 2**31)},
        r"Sites: a grid of \[2147483648, .*\] for 2 samples has no search keys; wanted batch x first axis and the "
        r"product of the other axes below 4294965247",
    ),
}


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_voxels_that_make_no_tensor(changes, message):
    with pytest.raises(SparseError, match=message):
        voxels(**changes)


def test_more_voxels_than_the_capacity():
    message = "voxels: there are 4 and the capacity is 3; wanted a capacity of at least 128"
    with pytest.raises(CapacityError, match=message) as caught:
        voxels(capacity=3)
    assert caught.value.needed == 4
    assert voxels(capacity=4).sites.capacity == 4


def test_a_level_too_small_is_named():
    counts = {"input": 4, "half": 5, "quarter": 300}
    levels = {name: Sites.create(GOOD, count, SHAPE, 2) for name, count in counts.items()}
    check_capacity({"input": levels["input"]})
    message = (
        "sparse tensor: too many sites, half has 5 and a capacity of 4; quarter has 300 and a capacity of 4; wanted "
        "capacities of at least 128, 384. The result misses rows: discard it and run again with larger ones"
    )
    with pytest.raises(CapacityError, match=message) as caught:
        check_capacity(levels)
    assert caught.value.needed == 300


def test_coordinates_of_another_dimension_than_the_grid():
    with pytest.raises(SparseError, match=r"Sites: coordinates are \[4, 4\] and spatial_shape has 2 axes; wanted"):
        Sites.create(GOOD, 4, (5, 6), 2)
    with pytest.raises(SparseError, match=r"Sites: coordinates are \[16\] and spatial_shape has 3 axes"):
        Sites.create(GOOD.reshape(-1), 4, SHAPE, 2)


def test_from_numpy_keeps_rows_and_pads():
    features = np.arange(8, dtype=np.float32).reshape(4, 2)
    for dtype in (np.int64, np.int32, np.uint8):
        x = voxels(features=features, coordinates=GOOD.astype(dtype))
        assert (x.features.shape, x.sites.capacity, int(x.sites.count)) == ((128, 2), 128, 4)
        np.testing.assert_array_equal(x.features[:4], features)
        np.testing.assert_array_equal(x.sites.coordinates[:4], GOOD)
        assert not np.asarray(x.features[4:]).any()
        assert (np.asarray(x.sites.coordinates[4:, 0]) == 2).all()
        np.testing.assert_array_equal(x.sites.used, np.arange(128) < 4)
    assert voxels(features=features.astype(jnp.bfloat16)).features.dtype == jnp.bfloat16


def test_buckets_are_few_and_close():
    counts = range(1, 200_000, 37)
    capacities = [bucket(count) for count in counts]
    assert all(capacity >= count and capacity % 128 == 0 for count, capacity in zip(counts, capacities, strict=True))
    # No more than a quarter, and what a multiple of 128 takes, is padding; all sizes together are few programs.
    assert all(capacity <= 1.25 * count + 2 * 128 for count, capacity in zip(counts, capacities, strict=True))
    assert len(set(capacities)) < 40
    assert [bucket(count) for count in (0, 128, 129, 256, 257)] == [128, 128, 256, 256, 384]
    assert all(bucket(capacity) == capacity for capacity in set(capacities))


def test_pad_rows_pads_any_rank_and_dtype():
    padded = pad_rows(np.ones((2, 3, 1), np.int16), 5)
    assert (padded.shape, padded.dtype, padded.sum()) == ((5, 3, 1), np.int16, 6)
    assert not padded[2:].any()


FIND = {
    "1-D": ((40,), 3),
    "2-D": ((9, 7), 2),
    "3-D": (SHAPE, 2),
    "3-D, one sample, a flat axis": ((6, 1, 9), 1),
    "two words": ((2**14, 2**13, 2**9), 4),
    "two words, last axis long": ((3, 1, 2**31 - 8), 2),
    "2-D, two words": ((2**20, 2**20), 2),
}


@functools.partial(jax.jit, static_argnames=("shape", "batch", "length"))
def find_all(coordinates, count, queries, shape, batch, length):
    sites = Sites.create(coordinates, count, shape, batch)
    return sites.find(queries), sites.find_runs(queries, length)


@pytest.mark.parametrize(("shape", "batch"), FIND.values(), ids=FIND.keys())
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), count=st.integers(1, 64))
@example(seed=0, count=64)
def test_sites_are_found_where_they_are_and_nowhere_else(shape, batch, seed, count):
    """Against a dictionary: single sites, runs along the last axis, and queries that leave the grid at any side.

    Up to 64 sites in 64 rows: there may be no padding at all.
    """
    rng = np.random.default_rng(seed)
    sizes = np.asarray([batch, *shape])
    # Both ends of every axis are crowded.
    axes = [np.unique(np.r_[0, 1, n // 2, n - 2, n - 1].clip(0, n - 1)) for n in sizes]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(sizes))
    chosen = rng.permutation(places)[:count].astype(np.int32)
    rows = {tuple(site): row for row, site in enumerate(chosen.tolist())}
    padded = np.full((64, len(sizes)), -3, np.int32)
    padded[: len(chosen)] = chosen
    near = chosen[rng.integers(len(chosen), size=50)] + rng.integers(-2, 3, (50, len(sizes)))
    queries = np.concatenate([chosen, near])
    queries = np.concatenate([queries, np.zeros((120 - len(queries), len(sizes)), int)]).astype(np.int32)
    found, runs = find_all(padded, len(chosen), queries, shape, batch, 4)
    wanted = [[rows.get((*site[:-1], site[-1] + step), -1) for site in queries.tolist()] for step in range(4)]
    np.testing.assert_array_equal(found, wanted[0])
    np.testing.assert_array_equal(runs, wanted)


def interleaved(site, dimensions):
    """(batch, Morton code), the first axis in the most significant bit of each group."""
    bits = [format(axis, "032b") for axis in site[1:]]
    return site[0], int("".join("".join(group) for group in zip(*bits, strict=True)), 2)


@pytest.mark.parametrize("shape", [(50,), (2**17, 9), (5, 2**31 - 1), (6, 700, 3), (2**12, 2**11, 2**12), (1, 1, 1)])
def test_morton_keys_sort_along_the_curve(shape):
    """NumPy's and JAX's keys are the same, and their order is that of interleaved bits of any length."""
    rng = np.random.default_rng(0)
    sites = np.stack([rng.integers(0, n, 200) for n in (3, *shape)], 1).astype(np.int32)
    words = morton_key(sites, shape)
    for ours, theirs in zip(words, morton_key(jnp.asarray(sites), shape), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    keys = list(zip(*(word.tolist() for word in words), strict=True))
    codes = [interleaved(site, len(shape)) for site in sites.tolist()]
    assert sorted(range(200), key=keys.__getitem__) == sorted(range(200), key=codes.__getitem__)


@functools.partial(jax.jit, static_argnames=("shape", "capacity", "order"))
def unique(coordinates, valid, shape, capacity, order):
    return unique_sites(coordinates, valid, shape, 2, capacity, order)


@pytest.mark.parametrize("order", ["lexicographic", "morton"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (2**14, 2**13, 2**9)], ids=["one word", "two words"])
def test_unique_sites(shape, order):
    """Against numpy.unique, of which lexicographic order is the order; with too few rows the first ones are kept."""
    rng = np.random.default_rng(1)
    for share in (1.0, 0.5, 0.0):
        low = rng.integers(0, (2, 4, 3, 5), (300, 4)).astype(np.int32)
        valid = rng.random(300) < share
        coordinates = np.where(valid[:, None], low, rng.integers(-9, 2**20, (300, 4)).astype(np.int32))
        wanted = np.unique(low[valid], axis=0).tolist()
        if order == "morton":
            wanted.sort(key=lambda site: interleaved(site, 3))
        sites = unique(coordinates, valid, shape, 128, order)
        assert int(sites.count) == len(wanted)
        assert sites.coordinates[: len(wanted)].tolist() == wanted
        few = unique(coordinates, valid, shape, 8, order)
        assert int(few.count) == len(wanted)
        assert few.coordinates[: len(wanted)].tolist() == wanted[:8]


def test_map_keeps_padding_zero_and_gradients_clean():
    """Padding is neither seen by the function, nor by its gradient, whatever it and a cotangent hold."""
    sites = Sites.create(np.resize(GOOD, (6, 4)), 4, SHAPE, 2)
    features = jnp.asarray([[1.0], [4.0], [9.0], [16.0], [jnp.nan], [-1.0]])

    def function(rows):
        assert rows.shape == (6, 1)
        return jnp.concatenate([jnp.sqrt(rows + 1), rows + 7], 1).astype(jnp.float16)

    @jax.jit
    def run(features, cotangent):
        y, pull = jax.vjp(lambda f: SparseTensor(f, sites).map(function).features, features)
        return y, *pull(cotangent)

    cotangent = np.full((6, 2), np.nan, np.float16)
    cotangent[:4] = 1
    y, gradient = run(features, cotangent)
    assert y.dtype == jnp.float16
    exact = np.c_[np.sqrt([2, 5, 10, 17]), [8, 11, 16, 23]]
    np.testing.assert_array_equal(y, np.r_[exact.astype(np.float16), np.zeros((2, 2))])
    # A half-precision cotangent, and a float32 derivative of the root.
    np.testing.assert_allclose(gradient[:4, 0], 1 + 0.5 / np.sqrt([2, 5, 10, 17]), rtol=2**-10)
    np.testing.assert_array_equal(gradient[4:], [[0], [0]])
