"""Kernel maps against convolution on whole grids, and the properties that every map has.

Values are small whole numbers where a comparison is with another computation: float32 sums are exact then, so it is
too. Where lumen is compared with itself, they are normal numbers, and equal means to the bit.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumen.sparse.kernel_maps import generative_map, strided_map, submanifold_map
from lumen.sparse.tensor import CapacityError, SparseError, SparseTensor, check_capacity, from_numpy
from pallas_kernels.sparse_convolution import Dataflow, Dataflows, sparse_convolution

CAPACITY = 256
GARBAGE = 1 << 20  # coordinates of padding rows
SORTED = Dataflow("sorted", 2, tile=64)
few = settings(max_examples=8, deadline=None, derandomize=True)
random_scenes = given(seed=st.integers(0, 2**20), density=st.floats(0.01, 0.6))


@dataclasses.dataclass(frozen=True)
class Case:
    """A map on a grid of at most 256 sites."""

    kind: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    batch: int = 2
    flow: Dataflow = SORTED

    @property
    def outputs(self):
        """The grid of the output, and of a generative map the other way round."""
        if self.kind == "submanifold":
            return self.shape
        if self.kind == "floor":
            return tuple(-(-n // s) for n, s in zip(self.shape, self.stride, strict=True))
        axes = zip(self.shape, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    def dense(self, dense_convolution):
        return dense_convolution(self.shape, self.outputs, self.kernel, self.stride, self.padding, self.dilation)

    def make(self, sites):
        flows = Dataflows(self.flow, self.flow, self.flow)
        options = {"kernel_size": self.kernel, "dilation": self.dilation, "dataflows": flows}
        if self.kind == "submanifold":
            return submanifold_map(sites, **options)
        options |= {"stride": self.stride, "padding": self.padding, "capacity": CAPACITY}
        return strided_map(sites, rule=self.kind, **options)


def cases():
    ones = (1, 1, 1)
    by_pairs, unsorted = Dataflow("fetch_on_demand", tile=64), Dataflow("unsorted")
    batched, in_place = Dataflow("gather_scatter", tile=64), Dataflow("tile_skip", tile=64)
    return {
        "submanifold 3x3x3": Case("submanifold", (5, 6, 4), (3, 3, 3), ones, ones, ones),
        "submanifold 2x2x2": Case("submanifold", (5, 6, 4), (2, 2, 2), ones, (0, 0, 0), ones, flow=by_pairs),
        "submanifold 3x1x5, dilated": Case(
            "submanifold", (7, 3, 9), (3, 1, 5), ones, (2, 0, 4), (2, 3, 2), 1, unsorted
        ),
        "submanifold 3x5, dilated": Case("submanifold", (9, 8), (3, 5), (1, 1), (3, 2), (3, 1), 3, batched),
        "submanifold on flat grids": Case("submanifold", (1, 9, 1), (3, 3, 3), ones, ones, ones, flow=in_place),
        "window 3x3x3 / 2": Case("window", (5, 6, 4), (3, 3, 3), (2, 2, 2), ones, ones),
        "window 2x2x2 / 2": Case("window", (5, 6, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), ones, flow=by_pairs),
        "window 3x1x2 / 2x1x3": Case("window", (6, 4, 5), (3, 1, 2), (2, 1, 3), (2, 1, 0), ones, flow=batched),
        "window 3x3 / 2, dilated": Case("window", (9, 8), (3, 3), (2, 1), (1, 2), (2, 3), flow=in_place),
        "window 1-D 4 / 3": Case("window", (40,), (4,), (3,), (2,), (1,), 3, unsorted),
        "window on a single site": Case("window", (1, 1, 1), (3, 3, 3), (2, 2, 2), ones, ones, 3),
        "floor 2x2x2 / 2": Case("floor", (5, 6, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), ones),
        "floor 3x3 / 3x2": Case("floor", (8, 9), (3, 3), (3, 2), (1, 1), (1, 1)),
    }


each_case = pytest.mark.parametrize("case", cases().values(), ids=cases().keys())


def poisoned(sites, *rows):
    """NaN in rows of padding."""
    return [jnp.where(sites.used[:, None], each, jnp.nan) for each in rows]


@functools.partial(jax.jit, static_argnames="case")
def both_ways(scene, w, u, v, dy, dz, case):
    """A convolution of the scene with w, and the inverse one of any rows u of its output's sites with v.

    Padding of u and of both cotangents is NaN.

    Returns:
      The map, its inverse, (y, dx, dw) and (z, du, dv).
    """
    x = SparseTensor.create(*scene, case.shape, case.batch)
    there = case.make(x.sites)
    back = there.inverse()
    (u, dy), dz = poisoned(there.outputs, u, dy), *poisoned(there.inputs, dz)
    y, pull = jax.vjp(lambda x, w: sparse_convolution(x, w, there.kernel_map), x.features, w)
    z, pull_back = jax.vjp(lambda u, v: sparse_convolution(u, v, back.kernel_map), u, v)
    return there, back, (y, *pull(dy)), (z, *pull_back(dz))


class Grid:
    """Rows of sites <-> whole grids."""

    def __init__(self, sites):
        self.count = int(sites.count)
        self.places = tuple(np.asarray(sites.coordinates)[: self.count].T)
        self.shape = (sites.batch_size, *sites.spatial_shape)

    def spread(self, rows):
        grid = np.zeros((*self.shape, rows.shape[-1]), np.int64)
        grid[self.places] = rows[: self.count]
        return grid

    def check(self, rows, grid, name):
        """Rows are what the grid says, and padding is zero."""
        np.testing.assert_array_equal(rows[: self.count], grid[self.places], err_msg=name)
        assert not np.asarray(rows[self.count :]).any(), name


def random_run(scene, whole, case, seed, density):
    """The scene and all arguments of `both_ways`, 3 and 4 channels, with NaN in all padding."""
    one = scene(seed, case.shape, case.batch, density)
    offsets = int(np.prod(case.kernel))
    padded = one.padded(CAPACITY, np.nan, GARBAGE)
    rows = [whole(seed + i, CAPACITY, channels) for i, channels in enumerate((4, 4, 3))]
    return one, padded, whole(seed + 3, offsets, 3, 4), whole(seed + 4, offsets, 4, 3), rows


@each_case
@few
@random_scenes
@example(seed=0, density=1.0)
def test_maps_give_dense_convolution(scene, whole, dense_convolution, case, seed, density):
    """Forward, both gradients, and the same of the inverse map; sites are where a window sees any input."""
    one, padded, w, v, (u, dy, dz) = random_run(scene, whole, case, seed, density)
    dense = case.dense(dense_convolution)
    there, back, (y, dx, dw), (z, du, dv) = both_ways(padded, w, u, v, dy, dz, case)
    fine, coarse = Grid(there.inputs), Grid(there.outputs)

    occupied = fine.spread(np.ones((len(one), 1), int))
    if case.kind == "submanifold":
        wanted = occupied > 0
    elif case.kind == "floor":
        wanted = np.zeros((case.batch, *case.outputs, 1), bool)
        wanted[(one.coordinates[:, 0], *(one.coordinates[:, 1:] // case.stride).T)] = True
    else:
        wanted = dense(occupied, np.ones((*case.kernel, 1, 1), int)) > 0
    assert coarse.shape == (case.batch, *case.outputs)
    np.testing.assert_array_equal(coarse.spread(np.ones((coarse.count, 1), int)), wanted)
    assert coarse.count == wanted.sum()
    np.testing.assert_array_equal(back.outputs.coordinates, there.inputs.coordinates)

    x, w, v = fine.spread(one.features), *(a.reshape(*case.kernel, *a.shape[1:]).astype(np.int64) for a in (w, v))
    transposed = [a.swapaxes(-1, -2) for a in (w, v)]
    u, dy, dz = coarse.spread(u), coarse.spread(dy), fine.spread(dz)
    coarse.check(y, dense(x, w), "y")
    fine.check(dx, dense.spread(dy, transposed[0]), "dx")
    np.testing.assert_array_equal(dw, dense.weight_gradient(x, dy).reshape(dw.shape), "dw")
    fine.check(z, dense.spread(u, v), "z")
    coarse.check(du, dense(dz, transposed[1]), "du")
    # The roles of the two grids are exchanged, and so are the axes of a weight.
    np.testing.assert_array_equal(dv, dense.weight_gradient(dz, u).swapaxes(-1, -2).reshape(dv.shape), "dv")


@each_case
def test_inverse_map_is_the_adjoint(scene, whole, case):
    """<conv x, u> = <x, conv_T u>."""
    one, _, w, _, (u, dy, dz) = random_run(scene, whole, case, 5, 0.4)
    _, _, (y, *_), (z, *_) = both_ways(one.padded(CAPACITY), w, u, w.swapaxes(1, 2), dy, dz, case)
    features = one.padded(CAPACITY)[0]
    assert np.vdot(np.asarray(y, np.int64), u.astype(np.int64)) == np.vdot(features, np.asarray(z, np.int64)) != 0


def test_the_measure_is_convolution(dense_convolution, whole):
    """DenseConvolution against lax.conv_general_dilated and its gradients."""
    dense = dense_convolution((6, 5, 7), (2, 2, 5), (3, 2, 3), (2, 3, 1), (1, 1, 2), (2, 1, 3))
    x, w, dy = whole(0, 2, 6, 5, 7, 3), whole(1, 3, 2, 3, 3, 4), whole(2, 2, 2, 2, 5, 4)

    @jax.jit
    def run(x, w, dy):
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=dense.stride,
            padding=[(p, p) for p in dense.padding],
            rhs_dilation=dense.dilation,
            dimension_numbers=("NXYZC", "XYZIO", "NXYZC"),
        )
        y, pull = jax.vjp(convolve, x, w)
        return y, *pull(dy)

    y, dx, dw = run(x, w, dy)
    np.testing.assert_array_equal(dense(x, w), y)
    np.testing.assert_array_equal(dense.spread(dy, w.swapaxes(-1, -2)), dx)
    np.testing.assert_array_equal(dense.weight_gradient(x, dy), dw)


GENERATIVE = {
    "3x3x3 / 2": Case("generative", (8, 7, 6), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 1),
    # So much padding that some coarse sites reach none of the fine grid.
    "2x3 / 3x2": Case("generative", (10, 9), (2, 3), (3, 2), (3, 1), (1, 1), 2),
}


@pytest.mark.parametrize("case", GENERATIVE.values(), ids=GENERATIVE.keys())
def test_generative_maps_give_dense_transposed_convolution(scene, whole, dense_convolution, case):
    dense = case.dense(dense_convolution)
    capacity = 384

    @jax.jit
    def run(coarse, w, dy):
        x = SparseTensor.create(*coarse, case.outputs, case.batch)
        site_map = generative_map(
            x.sites, case.kernel, case.stride, padding=case.padding, spatial_shape=case.shape, capacity=capacity
        )
        y, pull = jax.vjp(lambda x, w: sparse_convolution(x, w, site_map.kernel_map), x.features, w)
        return site_map, y, *pull(dy)

    for seed, density in ((0, 0.1), (1, 0.5), (2, 1.0)):
        one = scene(seed, case.outputs, case.batch, density)
        w, dy = whole(seed, int(np.prod(case.kernel)), 3, 4), whole(seed + 1, capacity, 4)
        site_map, y, dx, dw = run(one.padded(128, np.nan, GARBAGE), w, dy)
        fine, coarse = Grid(site_map.outputs), Grid(site_map.inputs)
        x, dy = coarse.spread(one.features), fine.spread(dy)
        w = w.reshape(*case.kernel, 3, 4).astype(np.int64)
        reached = dense.spread(coarse.spread(np.ones((len(one), 1), int)), np.ones((*case.kernel, 1, 1), int))
        assert fine.count == (reached > 0).sum()
        np.testing.assert_array_equal(fine.spread(np.ones((fine.count, 1), int)), reached > 0)
        fine.check(y, dense.spread(x, w), "y")
        coarse.check(dx, dense(dy, w.swapaxes(-1, -2)), "dx")
        np.testing.assert_array_equal(dw, dense.weight_gradient(dy, x).swapaxes(-1, -2).reshape(dw.shape), "dw")


@each_case
def test_tables_mirror_and_list_each_pair_once(scene, whole, case):
    one, padded, w, v, (u, dy, dz) = random_run(scene, whole, case, 7, 0.5)
    there, back, _, _ = both_ways(padded, w, u, v, dy, dz, case)
    table, transposed = np.asarray(there.kernel_map.table), np.asarray(there.kernel_map.transposed)
    np.testing.assert_array_equal(back.kernel_map.table, transposed)
    np.testing.assert_array_equal(back.kernel_map.transposed, table)
    assert (table[:, int(there.outputs.count) :] == -1).all()
    assert (transposed[:, len(one) :] == -1).all()
    for row, column in zip(table, transposed, strict=True):
        assert {(j, i) for i, j in enumerate(row) if j >= 0} == {(j, i) for j, i in enumerate(column) if i >= 0}
    if case.kind == "submanifold":
        odd = all(k % 2 for k in case.kernel)
        centre = np.ravel_multi_index([k // 2 if k % 2 else 0 for k in case.kernel], case.kernel)
        assert there.kernel_map.identity == back.kernel_map.identity == centre
        np.testing.assert_array_equal(table[centre, : len(one)], np.arange(len(one)))
        if odd:
            np.testing.assert_array_equal(transposed, table[::-1])
    elif case.kernel == case.stride and case.kind == "floor":
        # Windows that meet without overlap: every child has one parent.
        assert sorted(table[table >= 0]) == list(range(len(one)))


@functools.partial(jax.jit, static_argnames=("shape", "batch", "capacity"))
def network(scene, kernels, cotangents, *, shape, batch, capacity):
    """Submanifold 3x3x3, down by 2 with a window of 3, back up; the sites, all features and the gradients."""
    x = SparseTensor.create(*scene, shape, batch)
    same = submanifold_map(x.sites, 3)
    down = strided_map(x.sites, 3, 2, padding=1, capacity=capacity)
    up = down.inverse()

    def run(features, kernels):
        first = sparse_convolution(features, kernels[0], same.kernel_map)
        second = sparse_convolution(first, kernels[1], down.kernel_map)
        return first, second, sparse_convolution(second, kernels[2], up.kernel_map)

    rows, pull = jax.vjp(run, x.features, kernels)
    return x.sites, down.outputs, rows, pull(cotangents)


SHAPE, ROWS = (10, 9, 12), 128


@pytest.fixture(scope="module")
def base(scene):
    """(scene of two samples, kernels, cotangents of normal numbers, results)."""
    rng = np.random.default_rng(0)
    one = scene(0, SHAPE, 2, 100)
    one = dataclasses.replace(one, features=rng.standard_normal(one.features.shape, np.float32))
    kernels = [rng.standard_normal((27, *c), np.float32) for c in ((3, 4), (4, 6), (6, 5))]
    cotangents = [rng.standard_normal((n, c), np.float32) for n, c in ((ROWS, 4), (384, 6), (ROWS, 5))]
    cotangents = tuple(cotangents)
    results = network(one.padded(ROWS), kernels, cotangents, shape=SHAPE, batch=2, capacity=384)
    assert 150 < int(results[1].count) <= 384
    return one, kernels, cotangents, results


def equal_rows(got, want, rows):
    """The first rows of each array, to the bit."""
    for ours, theirs, count in zip(got, want, rows, strict=True):
        np.testing.assert_array_equal(ours[:count], theirs[:count])


def test_a_permutation_of_rows_is_a_permutation_of_results(base):
    """To the bit, for submanifold and inverse layers; strided ones have an order of their own, and do not change."""
    one, kernels, (first, second, third), (_, coarse, rows, (dx, _)) = base
    n, m = len(one), int(coarse.count)
    order = np.random.default_rng(1).permutation(n)
    moved = dataclasses.replace(one, features=one.features[order], coordinates=one.coordinates[order])
    where = np.r_[order, n:ROWS]
    _, sites, got, (moved_dx, _) = network(
        moved.padded(ROWS), kernels, (first[where], second, third[where]), shape=SHAPE, batch=2, capacity=384
    )
    np.testing.assert_array_equal(sites.coordinates, coarse.coordinates)
    equal_rows(got, (rows[0][order], rows[1], rows[2][order]), (n, m, n))
    equal_rows([moved_dx], [dx[order]], [n])


def test_padding_may_hold_anything(base):
    """NaN in features and cotangents, coordinates in and out of the grid: no result has a trace of it."""
    one, kernels, cotangents, results = base
    n, m = len(one), int(results[1].count)
    poisoned = [a.copy() for a in cotangents]
    for rows, count in zip(poisoned, (n, m, n), strict=True):
        rows[count:] = np.nan
    for coordinates in (0, GARBAGE, -1):
        got = network(
            one.padded(ROWS, np.nan, coordinates), kernels, tuple(poisoned), shape=SHAPE, batch=2, capacity=384
        )
        jax.tree.map(np.testing.assert_array_equal, got, results)


def test_no_sites_at_all(base):
    """A scan that was cropped to nothing gives nothing, and no gradient."""
    one, kernels, cotangents, _ = base
    features, coordinates, _ = one.padded(ROWS, np.nan)
    sites, coarse, rows, (dx, dkernels) = network(
        (features, coordinates, np.int32(0)), kernels, cotangents, shape=SHAPE, batch=2, capacity=384
    )
    assert (int(sites.count), int(coarse.count)) == (0, 0)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((rows, dx, dkernels)))


def test_a_larger_capacity_changes_nothing(base):
    one, kernels, cotangents, (sites, coarse, rows, (dx, dkernels)) = base
    n, m = len(one), int(coarse.count)
    larger = tuple(np.pad(a, ((0, 128), (0, 0))) for a in cotangents)
    got_sites, got_coarse, got, (got_dx, got_dkernels) = network(
        one.padded(ROWS + 128), kernels, larger, shape=SHAPE, batch=2, capacity=512
    )
    equal_rows(
        [got_sites.coordinates, got_coarse.coordinates, *got, got_dx],
        [sites.coordinates, coarse.coordinates, *rows, dx],
        [n, m, n, m, n, n],
    )
    for ours, theirs in zip(got_dkernels, dkernels, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (int(got_sites.count), int(got_coarse.count)) == (n, m)


def test_a_translation_by_the_stride_translates(base):
    """Scenes in the middle of a grid, where no window leaves it."""
    one, kernels, cotangents, _ = base
    inner = one.coordinates[:, 1:] // 2
    _, first = np.unique(np.c_[one.coordinates[:, 0], inner], axis=0, return_index=True)
    results = []
    for shift in ((2, 2, 2), (4, 2, 4)):
        moved = dataclasses.replace(
            one,
            features=one.features[first],
            coordinates=np.c_[one.coordinates[first, 0], inner[first] + shift].astype(np.int32),
        )
        results.append(network(moved.padded(ROWS), kernels, cotangents, shape=SHAPE, batch=2, capacity=384))
    (_, coarse, rows, _), (_, moved_coarse, moved_rows, _) = results
    n, m = len(first), int(coarse.count)
    assert int(moved_coarse.count) == m
    # Morton order depends on the place: compare site by site.
    ours = [np.asarray(sites.coordinates)[:m] for sites in (coarse, moved_coarse)]
    orders = [np.lexsort(coordinates.T[::-1]) for coordinates in ours]
    np.testing.assert_array_equal(ours[1][orders[1]], ours[0][orders[0]] + [0, 1, 0, 1])
    np.testing.assert_array_equal(moved_rows[1][orders[1]], rows[1][orders[0]])
    equal_rows([moved_rows[0], moved_rows[2]], [rows[0], rows[2]], [n, n])


def test_a_batch_is_its_samples_apart(base):
    one, kernels, cotangents, (_, coarse, rows, _) = base
    for sample in range(2):
        mine = one.coordinates[:, 0] == sample
        alone = dataclasses.replace(
            one, features=one.features[mine], coordinates=one.coordinates[mine] - [[sample, 0, 0, 0]]
        )
        _, sites, got, _ = network(alone.padded(ROWS), kernels, cotangents, shape=SHAPE, batch=1, capacity=384)
        theirs = np.asarray(coarse.coordinates)[:, 0] == sample
        m = int(sites.count)
        assert theirs.sum() == m
        np.testing.assert_array_equal(sites.coordinates[:m, 1:], coarse.coordinates[theirs][:, 1:])
        wanted = (rows[0][: len(one)][mine], rows[1][theirs], rows[2][: len(one)][mine])
        equal_rows(got, wanted, (mine.sum(), m, mine.sum()))


def test_search_keys_of_two_words_find_what_one_word_finds(scene):
    """The same scene in a corner of a grid of 2**37 sites, and at its far end."""
    one = scene(3, (16, 16, 16), 2, 120)
    shapes = {1: (16, 16, 16), 2: (2**14, 2**13, 2**9)}

    @functools.partial(jax.jit, static_argnames="shape")
    def maps(scene, shape):
        sites = SparseTensor.create(*scene, shape, 2).sites
        return sites, submanifold_map(sites, 3), strided_map(sites, 3, 2, padding=1, capacity=512)

    tables = {}
    for words, shape in shapes.items():
        # Placed so that the last sites of both grids are the same: windows leave both alike there.
        offset = np.asarray([0, *(big - 16 for big in shape)], np.int32)
        moved = dataclasses.replace(one, coordinates=one.coordinates + offset)
        sites, same, down = maps(moved.padded(128, coordinates=-5), shape)
        assert len(sites.keys) == words
        count = int(down.outputs.count)
        order = np.lexsort(np.asarray(down.outputs.coordinates)[:count].T[::-1])
        coordinates = np.asarray(down.outputs.coordinates)[:count][order] - offset // [1, 2, 2, 2]
        tables[words] = [same.kernel_map.table, down.kernel_map.table[:, order], coordinates]
    for one_word, two_words in zip(tables[1], tables[2], strict=True):
        np.testing.assert_array_equal(one_word, two_words)


def test_more_than_31_offsets(scene):
    """5x5x5 windows of a scene against all pairs of sites."""
    one = scene(4, (6, 6, 6), 1, 90)
    make = jax.jit(lambda scene: submanifold_map(SparseTensor.create(*scene, (6, 6, 6), 1).sites, 5))
    table = make(one.padded(128)).kernel_map.table
    wanted = np.full((125, 128), -1)
    for (i, here), (j, there) in itertools.product(enumerate(one.coordinates), repeat=2):
        apart = (there - here)[1:]
        if abs(apart).max() <= 2:
            wanted[np.ravel_multi_index(apart + 2, (5, 5, 5)), i] = j
    np.testing.assert_array_equal(table, wanted)


def test_output_rows_have_the_order_asked_for(scene):
    one = scene(6, (9, 12, 7), 2, 100)
    x = from_numpy(one.features, one.coordinates, spatial_shape=(9, 12, 7), batch_size=2)
    parents = np.unique(one.coordinates // [1, 2, 2, 2], axis=0)

    def morton(site):
        bits = [format(int(axis), "04b") for axis in site[1:]]
        return site[0], int("".join("".join(group) for group in zip(*bits, strict=True)), 2)

    for order, wanted in (("lexicographic", parents.tolist()), ("morton", sorted(parents.tolist(), key=morton))):
        down = jax.jit(functools.partial(strided_map, kernel_size=2, stride=2, rule="floor", order=order))(x.sites)
        assert down.outputs.capacity == x.sites.capacity
        assert down.outputs.coordinates[: len(parents)].tolist() == wanted


def test_too_many_output_sites_are_counted_and_named(scene):
    """A window of 3 over every second site reaches up to eight times as many."""
    one = scene(8, (20, 20, 20), 1, 100)
    x = from_numpy(one.features, one.coordinates, spatial_shape=(20, 20, 20), batch_size=1)
    down = jax.jit(functools.partial(strided_map, kernel_size=3, stride=2, padding=1, capacity=128))(x.sites)
    needed = len(np.unique(np.concatenate(list(reached(one.coordinates, 10))), axis=0))
    assert int(down.outputs.count) == needed > x.sites.capacity
    message = (
        rf"down has {needed} and a capacity of 128; wanted capacities of at least 384. .* run again with larger ones"
    )
    with pytest.raises(CapacityError, match=message) as caught:
        check_capacity({"input": x.sites, "down": down.outputs})
    assert caught.value.needed == needed
    enough = jax.jit(functools.partial(strided_map, kernel_size=3, stride=2, padding=1, capacity=384))(x.sites)
    check_capacity({"input": x.sites, "down": enough.outputs})
    # What rows there are, are right.
    assert int(enough.outputs.count) == needed
    np.testing.assert_array_equal(enough.outputs.coordinates[:128], down.outputs.coordinates)
    np.testing.assert_array_equal(enough.kernel_map.table[:, :128], down.kernel_map.table)


@pytest.mark.parametrize(
    ("spacing", "dilation", "windows", "capacity"), [(4, 1, 2, 256), (3, 1, 2, 256), (8, 2, 3, 384), (40, 3, 2, 384)]
)
def test_the_rows_of_an_output_are_enough_if_none_are_asked_for(spacing, dilation, windows, capacity):
    """Sites so far apart that no window holds two, at places that as many windows as possible hold."""
    coordinates = np.stack(
        [np.zeros(128, int), spacing * np.arange(128) + (spacing * np.arange(128) + dilation) % 2], 1
    )
    x = from_numpy(np.ones((128, 1)), coordinates, spatial_shape=(128 * spacing + 4,), batch_size=1, capacity=128)
    make = functools.partial(strided_map, kernel_size=3, stride=2, padding=dilation, dilation=dilation)
    outputs = jax.jit(make)(x.sites).outputs
    assert outputs.capacity == capacity
    reads = coordinates[:, 1:] + dilation - dilation * np.arange(3)
    q = reads[reads % 2 == 0] // 2
    assert int(outputs.count) == len(np.unique(q[(q >= 0) & (q < outputs.spatial_shape[0])])) <= capacity
    assert int(outputs.count) > (windows - 1) * 128


def reached(coordinates, size):
    """The sites of windows of 3, stride 2, padding 1, that see one of these, in a grid of `size` per axis."""
    for k in itertools.product(range(3), repeat=3):
        twice = coordinates[:, 1:] + 1 - k
        q = twice // 2
        ok = ((twice % 2 == 0) & (q >= 0) & (q < size)).all(1)
        yield np.c_[coordinates[ok, :1], q[ok]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda s: submanifold_map(s, (3, 3)),
            r"kernel_size=\(3, 3\) for sites of 3 axes; wanted one .* at least 1, or 3",
        ),
        (lambda s: submanifold_map(s, 0), "kernel_size=0 for sites of 3 axes; wanted one number of at least 1"),
        (lambda s: submanifold_map(s, 3, dilation=(1, 0, 1)), r"dilation=\(1, 0, 1\) for sites of 3 axes"),
        (lambda s: submanifold_map(s, 1.5), "kernel_size=1.5 for sites of 3 axes"),
        (lambda s: strided_map(s, (2.5, 2, 2), 2), r"kernel_size=\(2.5, 2, 2\) for sites of 3 axes"),
        (lambda s: strided_map(s, 2, 0), "stride=0 for sites of 3 axes; wanted one number of at least 1"),
        (lambda s: strided_map(s, 2, [2, 2]), r"stride=\[2, 2\] for sites of 3 axes"),
        (lambda s: strided_map(s, 3, 2, padding=-1), "padding=-1 for sites of 3 axes; wanted one number of at least 0"),
        (
            lambda s: strided_map(s, 7, 1),
            r"strided_map: a kernel of \(7, 7, 7\) .* does not fit into the grid \(8, 8, 4\)",
        ),
        (lambda s: strided_map(s, 2, 2, rule="ceil"), "strided_map: rule='ceil' is unknown; use 'window' or 'floor'"),
        (
            lambda s: strided_map(s, 2, 2, order="hilbert"),
            "order='hilbert' is unknown; use 'lexicographic' or 'morton'",
        ),
        (
            lambda s: generative_map(s, 2, 2, spatial_shape=(16, 16), capacity=128),
            r"generative_map: spatial_shape=\(16, 16\) for sites of 3 axes; wanted 3 sizes",
        ),
        (
            lambda s: generative_map(s, 2, 2, spatial_shape=(16, 16, 8), capacity=128, rule="spconv"),
            "generative_map: rule='spconv' is unknown; use 'torch' or 'torchsparse'",
        ),
        (
            lambda s: generative_map(s, 3, 2, spatial_shape=(16, 16, 8), padding=1, capacity=128, rule="torchsparse"),
            r"generative_map: padding=\(1, 1, 1\) with rule='torchsparse', which has none; wanted 0",
        ),
    ],
)
def test_numbers_that_make_no_map(scene, make, message):
    one = scene(9, (8, 8, 4), 1, 4)
    x = SparseTensor.create(*one.padded(4), (8, 8, 4), 1)
    with pytest.raises(SparseError, match=message):
        jax.eval_shape(make, x.sites)


def test_numpy_integers_are_numbers(scene):
    one = scene(9, (8, 8, 4), 1, 4)
    x = SparseTensor.create(*one.padded(4), (8, 8, 4), 1)

    def make(sites):
        return strided_map(sites, np.int64(2), np.asarray([2, 2, 1]), padding=np.zeros(3, int))

    assert jax.eval_shape(make, x.sites).outputs.spatial_shape == (4, 4, 3)
