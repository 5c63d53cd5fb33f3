"""Voxels against the originals' outputs and against loops over points."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumen.sparse.tensor import SparseError, from_numpy, morton_key
from lumen.sparse.voxels import devoxelize, hard_voxelize, level_counts, voxelize


@pytest.fixture(scope="module")
def quantize(golden):
    return golden("torchsparse/quantize")


@pytest.mark.parametrize("variant", ["0", "1", "2"])
def test_floor_voxels_are_those_of_torchsparse(quantize, variant):
    size = quantize.meta["config"][variant]["voxel_size"]
    voxels = voxelize(quantize["in/points"], size, features=quantize["in/feats"], merge="mean")
    for name, got in (("coords", voxels.coordinates), ("index", voxels.first), ("inverse", voxels.inverse)):
        np.testing.assert_array_equal(got, quantize[f"out/{variant}/{name}"])
    np.testing.assert_array_equal(voxels.counts, quantize[f"out/{variant}/counts"])
    # From the golden's notes: theirs are sums in float32.
    np.testing.assert_allclose(voxels.features, quantize[f"out/{variant}/mean_feats"], rtol=1e-5, atol=1e-6)
    first = voxelize(quantize["in/points"], size, features=quantize["in/feats"]).features
    np.testing.assert_array_equal(first, quantize["in/feats"][voxels.first])


def test_round_voxels_start_at_zero_and_ties_go_to_even():
    points = np.array([[-0.25, 0, 0], [0.25, 0, 0], [0.75, 1, 0], [-0.26, 0, 0.1]], np.float32)
    voxels = voxelize(points, 0.5, rule="round")
    # x / 0.5 = -0.5, 0.5, 1.5, -0.52 -> 0, 0, 2, -1, less the minimum -1.
    np.testing.assert_array_equal(voxels.origin, [-1, 0, 0])
    np.testing.assert_array_equal(voxels.coordinates, [[0, 0, 0], [1, 0, 0], [3, 2, 0]])
    np.testing.assert_array_equal(voxels.first, [3, 0, 2])
    np.testing.assert_array_equal(voxels.inverse, [1, 1, 2, 0])
    np.testing.assert_array_equal(voxels.counts, [1, 2, 1])


@pytest.mark.parametrize("rule", ["floor", "round"])
def test_morton_order_permutes_the_same_voxels(rule):
    points = np.random.default_rng(0).normal(0, 20, (2000, 4)).astype(np.float32)
    plain = voxelize(points, 2.0, rule=rule, merge="mean")
    voxels = voxelize(points, 2.0, rule=rule, merge="mean", order="morton")
    # Row by row the same voxel, found through its first point.
    pair = np.argsort(voxels.first)[np.argsort(np.argsort(plain.first))]
    for name in ("coordinates", "features", "first", "counts"):
        np.testing.assert_array_equal(getattr(voxels, name)[pair], getattr(plain, name))
    np.testing.assert_array_equal(voxels.coordinates[voxels.inverse], plain.coordinates[plain.inverse])
    # The order is that of morton_key: the bits of x, y, z interleaved, here those of all axes in one number.
    relative = voxels.coordinates - voxels.coordinates.min(0)
    codes = [
        sum(((int(c[axis]) >> bit) & 1) << (3 * bit + 2 - axis) for bit in range(8) for axis in range(3))
        for c in relative
    ]
    assert codes == sorted(codes)
    shape = (relative.max(0) + 1).tolist()
    words = np.stack(morton_key(np.pad(relative, ((0, 0), (1, 0))), shape))
    np.testing.assert_array_equal(np.lexsort(words[::-1]), np.arange(len(relative)))


def test_hard_voxels_are_those_of_openpcdet(golden):
    z = golden("torchsparse/voxelize_mean_vfe")
    config = z.meta["config"]
    voxels = hard_voxelize(
        z["in/points"],
        config["voxel_size_xyz"],
        config["range_xyz"],
        max_points=config["max_points_per_voxel"],
        max_voxels=config["max_voxels"],
    )
    np.testing.assert_array_equal(voxels.points, z["out/voxels"])
    np.testing.assert_array_equal(voxels.coordinates[:, ::-1], z["out/coords_zyx"])
    np.testing.assert_array_equal(voxels.counts, z["out/num_points"])
    # From the golden's notes; sums of three numbers.
    np.testing.assert_allclose(voxels.features, z["out/mean_feats"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("max_points", "max_voxels"), [(1, 1000), (4, 40), (100, 7)])
def test_hard_voxels_match_a_loop(max_points, max_voxels):
    points = np.random.default_rng(1).uniform(-3, 3, (500, 4)).astype(np.float32)
    held = collections.OrderedDict()
    for point in points:
        cell = tuple(np.floor((point[:3] + np.float32(2)) / np.float32(0.5)).astype(int))
        if min(cell) < 0 or max(cell) >= 8 or (cell not in held and len(held) == max_voxels):
            continue
        rows = held.setdefault(cell, [])
        if len(rows) < max_points:
            rows.append(point)
    voxels = hard_voxelize(points, 0.5, (-2, -2, -2, 2, 2, 2), max_points=max_points, max_voxels=max_voxels)
    np.testing.assert_array_equal(voxels.coordinates, list(held))
    np.testing.assert_array_equal(voxels.counts, [len(rows) for rows in held.values()])
    for got, want in zip(voxels.points, held.values(), strict=True):
        np.testing.assert_array_equal(got[: len(want)], want)
        assert not got[len(want) :].any()


def test_level_counts_match_sets():
    rng = np.random.default_rng(2)
    coordinates = np.unique(np.c_[rng.integers(0, 3, 900), rng.integers(0, 40, (900, 3))], axis=0)
    want = [len({(b, x >> level, y >> level, z >> level) for b, x, y, z in coordinates.tolist()}) for level in range(7)]
    assert level_counts(coordinates, 6) == want
    assert want[-1] == 3  # 2^6 > 40: one site per sample


@pytest.fixture(scope="module")
def sparse():
    """Two samples on a grid of 6 x 5 x 4, about half full, and points in and around it."""
    rng = np.random.default_rng(3)
    full = np.stack(np.meshgrid(range(2), range(6), range(5), range(4), indexing="ij"), -1).reshape(-1, 4)
    sites = rng.permutation(full)[:110]
    features = rng.standard_normal((110, 3)).astype(np.float32)
    points = np.c_[rng.integers(0, 2, 300), rng.uniform(-1.5, 7, (300, 3))].astype(np.float32)
    points[:20] = sites[:20]  # on a voxel
    points[20, 0], points[21, 0] = 2, -1  # no such sample
    return from_numpy(features, sites, spatial_shape=(6, 5, 4), batch_size=2), features, sites, points


def weights_of(sites, points, kind):
    """[n, V] interpolation weights in float64, point by point."""
    rows = {tuple(site): row for row, site in enumerate(sites.tolist())}
    weights = np.zeros((len(points), len(sites)))
    for i, (sample, *place) in enumerate(points.astype(np.float64).tolist()):
        base = np.floor(place).astype(int)
        if kind == "nearest":
            row = rows.get((int(sample), *base.tolist()))
            if row is not None:
                weights[i, row] = 1
            continue
        for corner in np.ndindex(2, 2, 2):
            site = base + corner
            row = rows.get((int(sample), *site.tolist()))
            if row is not None:
                weights[i, row] = np.prod(1 - np.abs(place - site))
        if weights[i].sum() > 0:
            weights[i] /= weights[i].sum()
    return weights


def run(sparse, kind, cotangent):
    """devoxelize and its gradients with respect to features and places, in one program."""
    x, _, _, points = sparse

    @jax.jit
    def both(features, places):
        result, pull = jax.vjp(lambda f, p: devoxelize(type(x)(f, x.sites), p, kind), features, places)
        return result, *pull(jnp.asarray(cotangent))

    return both(x.features, jnp.asarray(points))


@pytest.mark.parametrize("kind", ["nearest", "trilinear"])
def test_devoxelize_and_its_gradients_match_a_loop(sparse, kind):
    _, features, sites, points = sparse
    cotangent = np.random.default_rng(4).standard_normal((300, 3)).astype(np.float32)
    result, gradient, places_gradient = run(sparse, kind, cotangent)
    weights = weights_of(sites, points, kind)
    near = weights.sum(1) > 0
    assert 30 < near.sum() < 200  # most points have no voxel near them
    # Places below 8 have 2^-21 of rounding, weights then a few times that relative to a sum that may be small; the
    # renormalised weights themselves are at most 1.
    np.testing.assert_allclose(result, weights @ features, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(gradient[:110], weights.T @ cotangent, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(result[:20], features[:20], rtol=1e-6)
    assert not gradient[110:].any()
    np.testing.assert_array_equal(result[20:22], 0)
    if kind == "nearest":
        assert not places_gradient.any()
        return
    # On a voxel the weights have a kink, elsewhere central differences in float64 are good to 1e-9 / (sum of w)^3.
    smooth = slice(20, None)
    for axis in (1, 2, 3):
        step = np.zeros(4)
        step[axis] = 1e-6
        ahead, behind = (weights_of(sites, points + sign * step, kind) @ features for sign in (1, -1))
        want = ((ahead - behind) / 2e-6 * cotangent).sum(1)
        np.testing.assert_allclose(places_gradient[smooth, axis], want[smooth], rtol=1e-3, atol=1e-3)


GOOD = np.zeros((3, 4), np.float32)
FAR = np.array([[0, 0, 0, 0], [1e9, 0, 0, 0]], np.float32)
BAD_NUMBER = np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]], np.float32)


@pytest.mark.parametrize(
    ("points", "size", "options", "message"),
    [
        (GOOD[:0], 0.1, {}, "no points; wanted at least one"),
        (BAD_NUMBER, 0.1, {}, r"1 of 2 points are not finite, first row 1: \[0.0, nan"),
        (GOOD[:, :2], 0.1, {}, r"float32 \[3, 2\]; wanted floats \[n, 3 or more\]"),
        (GOOD.astype(int), 0.1, {}, r"int64 \[3, 4\]; wanted floats"),
        (GOOD, 0.0, {}, "voxel_size=0.0; wanted metres above 0"),
        (GOOD, (0.1, 0.2), {}, "one number or three"),
        (GOOD, 0.1, {"features": GOOD[:2]}, r"features are \[2, 4\] for 3 points"),
        (FAR, 0.1, {}, "too many voxels"),
    ],
)
def test_bad_points_are_named(points, size, options, message):
    with pytest.raises(SparseError, match=message):
        voxelize(points, size, **options)


@pytest.mark.parametrize(
    ("point_range", "limits", "message"),
    [
        ((5, 5, 5, 6, 6, 6), (2, 2), r"none of 3 points is in the range \[5, 5, 5, 6, 6, 6\], they lie from \[0.0"),
        ((1, 1, 1, 0, 0, 0), (2, 2), r"is \[-10, -10, -10\] voxels"),
        ((-1, -1, -1, 1, 1, 1), (0, 2), "max_points=0, max_voxels=2; wanted at least 1 each"),
    ],
)
def test_bad_limits_are_named(point_range, limits, message):
    with pytest.raises(SparseError, match=message):
        hard_voxelize(GOOD, 0.1, point_range, max_points=limits[0], max_voxels=limits[1])


def test_points_of_other_dimensions_are_named(sparse):
    with pytest.raises(SparseError, match=r"points are \[3, 3\] for sites with 3 axes; wanted \[n, 1 \+ d\]"):
        devoxelize(sparse[0], GOOD[:, :3])
