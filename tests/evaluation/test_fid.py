"""Metrics of image generation against SciPy, closed forms and brute force."""

import warnings
import zipfile

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen.evaluation import fid
from lumen.evaluation.inception import InceptionFeatures


def covariance(rng, d, rank=None):
    factor = rng.standard_normal((d, rank or 2 * d))
    return factor @ factor.T / factor.shape[1]


# --- Moments ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_streaming_equals_one_shot(sizes, seed):
    # Mean a million times the spread: sums of squares would lose 12 of 16 digits here.
    x = np.random.default_rng(seed).standard_normal((sum(sizes) + 1, 4)) + 1e6
    parts = np.split(x, np.cumsum(sizes))
    merged = fid.moments(parts[0])
    for part in parts[1:]:
        merged = fid.merge(merged, fid.moments(part))
    got = merged.gaussian()
    assert merged.count == len(x)
    # 1e6 * 2**-53 = 1.1e-10 is how well a value is known at all; products with deviations of a few units.
    np.testing.assert_allclose(got.mean, x.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(got.covariance, np.cov(x, rowvar=False), atol=1e-8)


def test_moments_of_float32_are_summed_in_float64():
    x = np.full((20_000, 1), 0.1, np.float32)
    assert abs(fid.moments(x).mean[0] - np.float64(np.float32(0.1))) < 1e-15  # float32 sums drift by 1e-6


def test_moments_errors():
    with pytest.raises(ValueError, match=r"\[n, D\] with n >= 1"):
        fid.moments(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="NaN"):
        fid.moments(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        fid.moments(np.zeros((1, 3))).gaussian()
    with pytest.raises(ValueError, match="3 and 4 features"):
        fid.merge(fid.moments(np.zeros((2, 3))), fid.moments(np.zeros((2, 4))))


# --- Fréchet distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_frechet_matches_sqrtm(d):
    rng = np.random.default_rng(d)
    m1, m2 = rng.standard_normal((2, d))
    s1, s2 = covariance(rng, d), covariance(rng, d)
    root = scipy.linalg.sqrtm(s1 @ s2)
    want = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * np.real(root))
    # sqrtm of an unsymmetric product is the less exact side: condition 1e3, float64.
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-9)


def test_frechet_of_commuting_gaussians():
    # Diagonal covariances: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2 = 9 + (1 - 3)^2 + (2 - 5)^2 + (0 - 4)^2.
    got = fid.frechet_distance([0, 0, 3], np.diag([1.0, 4, 0]), [0, 0, 0], np.diag([9.0, 25, 16]))
    assert got == pytest.approx(9 + 4 + 9 + 16, abs=1e-12)


def test_frechet_of_singular_covariances():
    rng = np.random.default_rng(0)
    s = covariance(rng, 200, rank=20)  # 180 directions without variance, as with fewer samples than features
    m = rng.standard_normal(200)
    # Identical statistics: roots of rounding errors would leave 180 * 1e-8.
    assert abs(fid.frechet_distance(m, s, m, s)) < 1e-11
    # Scaling one side by 4 doubles the deviations: tr(S) (2 - 1)^2.
    assert fid.frechet_distance(m, 4 * s, m, s) == pytest.approx(np.trace(s), rel=1e-12)


def test_frechet_is_symmetric_and_rotation_invariant():
    rng = np.random.default_rng(1)
    m1, m2 = rng.standard_normal((2, 12))
    s1, s2 = covariance(rng, 12), covariance(rng, 12, rank=5)
    q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    want = fid.frechet_distance(m1, s1, m2, s2)
    assert fid.frechet_distance(m2, s2, m1, s1) == pytest.approx(want, rel=1e-12)
    # Rounding q @ s2 @ q.T moves the 7 zero eigenvalues of s2 by about 1e-16, their roots by 1e-8.
    assert fid.frechet_distance(q @ m1, q @ s1 @ q.T, q @ m2, q @ s2 @ q.T) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], np.eye(2), [0, 0, 0], np.eye(3)), "same feature extractor"),
        (([0, 0], np.eye(3), [0, 0], np.eye(2)), "same feature extractor"),
        (([0, 0], [[1, 0.5], [0, 1]], [0, 0], np.eye(2)), "sigma1 is not symmetric"),
        (([0, 0], np.eye(2), [0, 0], np.diag([1, -1])), "sigma2 has the eigenvalue -1"),
        (([0, 0], np.eye(2), [0, 0], np.diag([1, np.inf])), "sigma2 has NaN or infinite"),
        (([0, np.nan], np.eye(2), [0, 0], np.eye(2)), "mean has NaN"),
    ],
)
def test_frechet_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        fid.frechet_distance(*arguments)


# --- Inception Score --------------------------------------------------------------------------------------------------


def test_inception_score_closed_forms():
    certain = 1e3 * np.eye(8)[np.arange(4000) % 8]  # every image sure of its class, classes equally frequent
    assert fid.inception_score(certain) == pytest.approx(8, rel=1e-12)
    assert fid.inception_score(np.zeros((50, 8))) == pytest.approx(1, rel=1e-12)
    # Two classes with p = (3/4, 1/4) and its mirror: KL to (1/2, 1/2) is log 2 - H(3/4).
    pair = np.log([[3.0, 1.0], [1.0, 3.0]])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert fid.inception_score(pair) == pytest.approx(2 * np.exp(-entropy), rel=1e-12)


def test_inception_score_splits():
    certain = 1e3 * np.eye(10)[np.repeat(np.arange(10), 10)]
    # Sorted by class, splits of 20 see two classes each; the last split of 5 after 95 images sees one.
    assert fid.inception_score(certain, split_size=20) == pytest.approx(2, rel=1e-12)
    assert fid.inception_score(certain[:95], split_size=30) == pytest.approx((3 + 3 + 3 + 1) / 4, rel=1e-12)


def test_inception_score_error():
    with pytest.raises(ValueError, match=r"wanted \[n, C\]"):
        fid.inception_score(np.zeros(8))


# --- Precision and recall ---------------------------------------------------------------------------------------------


def brute_force(reference, samples, k):
    def radii(x):
        return [sorted(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]

    def inside(x, manifold, radius):
        return np.mean([any(np.linalg.norm(a - b) <= r for b, r in zip(manifold, radius, strict=True)) for a in x])

    return inside(samples, reference, radii(reference)), inside(reference, samples, radii(samples))


@pytest.mark.parametrize(("n", "m", "k"), [(23, 17, 3), (8, 40, 1), (30, 30, 5)])
@pytest.mark.parametrize("rows", [7, 1024])
def test_precision_recall_matches_brute_force(monkeypatch, n, m, k, rows):
    monkeypatch.setattr(fid, "_ROWS", rows)  # ragged blocks and a single one
    rng = np.random.default_rng(n)
    reference = rng.standard_normal((n, 4)) + 100  # far from the origin, where float32 distances would cancel
    samples = rng.standard_normal((m, 4)) * 0.7 + 100.5
    got = fid.precision_recall(reference, samples, k)
    assert got == pytest.approx(brute_force(reference, samples, k), abs=1e-12)
    assert 0 < got[0] < 1 or 0 < got[1] < 1  # the case decides something


def test_precision_recall_of_hand_made_sets():
    rng = np.random.default_rng(0)
    cloud = rng.standard_normal((50, 3))
    assert fid.precision_recall(cloud, cloud) == (1, 1)
    assert fid.precision_recall(cloud, cloud + 100) == (0, 0)
    # All samples on one reference image: all of them real, next to nothing of the reference covered.
    assert fid.precision_recall(cloud, np.repeat(cloud[:1], 20, axis=0)) == (1, 1 / 50)
    # Half of the reference never appears.
    both = np.concatenate([cloud, cloud + 100])
    assert fid.precision_recall(both, cloud) == (1, 0.5)
    # On a line, k = 1: reference 0, 1, 3 has radii 1, 1, 2, so its manifold is [-1, 5]. Samples 4, 5.5 have radius 1.5,
    # so theirs is [2.5, 7], which holds 3 alone.
    got = fid.precision_recall(np.array([[0.0], [1], [3]]), np.array([[4.0], [5.5]]), k=1)
    assert got == pytest.approx((1 / 2, 1 / 3))


def test_precision_recall_errors():
    with pytest.raises(ValueError, match=r"\[n, D\] and \[m, D\]"):
        fid.precision_recall(np.zeros((9, 3)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="3 samples have no 3-th neighbour; give at least 4"):
        fid.precision_recall(np.zeros((9, 3)), np.zeros((3, 3)))


# --- Reference files --------------------------------------------------------------------------------------------------


def statistics(d, suffix=""):
    return {f"mu{suffix}": np.zeros(d, np.float32), f"sigma{suffix}": np.eye(d)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reference_with_everything(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / "VIRTUAL.npz"
    save(path, images, **statistics(5), **statistics(3, "_s"))
    reference = fid.reference_statistics(path)
    assert reference.pool is not None
    assert reference.spatial is not None
    assert reference.pool.mean.shape == (5,)
    assert reference.pool.mean.dtype == reference.pool.covariance.dtype == np.float64
    assert reference.spatial.covariance.shape == (3, 3)
    assert reference.image_count == 10
    batches = list(reference.images(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_reference_of_torch_fidelity(tmp_path):
    np.savez(tmp_path / "adm_in256_stats.npz", **statistics(5))
    reference = fid.reference_statistics(str(tmp_path / "adm_in256_stats.npz"))
    assert reference.pool is not None
    assert reference.spatial is None
    assert reference.image_count == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, r"neither statistics \('mu', 'sigma'\) nor images \('arr_0'\); it has \['mean'\]"),
        ({"mu": np.zeros(3)}, "has one of 'mu' and 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"'mu' has shape \[3\] and 'sigma' \[4, 4\]"),
        (statistics(3) | {"mu_s": np.zeros(3)}, "has one of 'mu_s' and 'sigma_s'"),
        ({"arr_0": np.zeros((5, 4, 4, 3))}, r"arr_0 is float64 \[5, 4, 4, 3\]; wanted images, uint8"),
    ],
)
def test_reference_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        fid.reference_statistics(tmp_path / "reference.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_reference_that_is_no_npz(tmp_path, content):
    (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        fid.reference_statistics(tmp_path / "reference.npz")
    with pytest.raises(FileNotFoundError):
        fid.reference_statistics(tmp_path / "absent.npz")


def test_reference_images_cut_short(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((10, 4, 4, 3), np.uint8))
    whole = (tmp_path / "images.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "reference.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole[:-100])
    with pytest.raises(ValueError, match="ends within arr_0, after 4 of 10 images"):
        list(fid.reference_statistics(tmp_path / "reference.npz").images(4))


# --- The protocol -----------------------------------------------------------------------------------------------------

PROJECTION = np.random.default_rng(7).standard_normal((48, 15)) / 100


def tiny_inception(images):
    """Random projections of 4 x 4 images in Inception's place: 6 pool features, 5 spatial ones, 4 classes."""
    features = images.reshape(len(images), -1) @ PROJECTION
    return InceptionFeatures(features[:, :6], features[:, 6:11], features[:, 11:])


def pictures(n, seed, low=0):
    return np.random.default_rng(seed).integers(low, 256, (n, 4, 4, 3), dtype=np.uint8)


def test_evaluate_generation(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "_SPATIAL_ROWS", 32)  # several merges
    train, samples = pictures(400, 0), pictures(150, 1, low=40)
    known, made = tiny_inception(train), tiny_inception(samples)
    statistics = {"mu": known.pool.mean(axis=0), "sigma": np.cov(known.pool, rowvar=False)}
    statistics |= {"mu_s": known.spatial.mean(axis=0), "sigma_s": np.cov(known.spatial, rowvar=False)}
    np.savez(tmp_path / "reference.npz", train[:100], **statistics)

    batches = np.split(samples, [20, 33, 90])
    got = fid.evaluate_generation(iter(batches), tmp_path / "reference.npz", tiny_inception)

    def distance(x, mean, sigma):
        return fid.frechet_distance(x.mean(axis=0), np.cov(x, rowvar=False), mean, sigma)

    assert got["samples"] == 150
    assert got["fid"] == pytest.approx(distance(made.pool, statistics["mu"], statistics["sigma"]), rel=1e-9)
    assert got["sfid"] == pytest.approx(distance(made.spatial, statistics["mu_s"], statistics["sigma_s"]), rel=1e-9)
    assert got["inception_score"] == pytest.approx(fid.inception_score(made.logits), rel=1e-12)  # one split: any order
    assert (got["precision"], got["recall"]) == fid.precision_recall(known.pool[:100], made.pool)
    assert got["fid"] > 0.01


def test_statistics_only_reference_leaves_figures_out(tmp_path):
    np.savez(tmp_path / "stats.npz", **statistics(6))
    got = fid.evaluate_generation([pictures(20, 0)], fid.reference_statistics(tmp_path / "stats.npz"), tiny_inception)
    assert got.keys() == {"samples", "fid", "inception_score"}


def test_images_only_reference(tmp_path):
    images = pictures(60, 0)
    np.savez(tmp_path / "samples.npz", images)
    got = fid.evaluate_generation([images], tmp_path / "samples.npz", tiny_inception)
    assert got.keys() == {"samples", "fid", "sfid", "inception_score", "precision", "recall"}
    assert abs(got["fid"]) < 1e-10
    assert abs(got["sfid"]) < 1e-10
    assert (got["precision"], got["recall"]) == (1, 1)


def test_inception_score_does_not_depend_on_class_order(tmp_path):
    np.savez(tmp_path / "stats.npz", **statistics(6))
    labels = np.repeat(np.arange(4), 2500)  # sorted by class: each split of 5000 would see two of four classes

    def sure(images):
        n = len(images)
        logits = 1e3 * np.eye(4)[images[:, 0, 0, 0]]
        noise = np.random.default_rng(0).standard_normal((n, 6))
        return InceptionFeatures(noise, noise[:, :2], logits)

    images = np.zeros((10_000, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = labels
    got = fid.evaluate_generation([images], tmp_path / "stats.npz", sure)
    # Class counts in a random half of 10,000 vary by 0.6 %; the score falls by about their squares.
    assert got["inception_score"] == pytest.approx(4, abs=0.01)


def test_few_samples_warn(tmp_path):
    np.savez(tmp_path / "stats.npz", **statistics(6))
    with pytest.warns(UserWarning, match="6 samples for 6 features: the covariance is singular"):
        fid.evaluate_generation([pictures(6, 0)], tmp_path / "stats.npz", tiny_inception)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid.evaluate_generation([pictures(7, 0)], tmp_path / "stats.npz", tiny_inception)


def test_evaluate_generation_errors_before_generating(tmp_path):
    generated = []

    def generator():
        for seed in range(3):
            generated.append(seed)
            yield pictures(10, seed)

    np.savez(tmp_path / "other.npz", **statistics(2048))
    with pytest.raises(ValueError, match="images give 6 pool features, the reference statistics have 2048"):
        fid.evaluate_generation(generator(), tmp_path / "other.npz", tiny_inception)
    assert generated == [0]  # one batch, not all of them

    np.savez(tmp_path / "with_images.npz", pictures(9, 0), **statistics(2048))
    with pytest.raises(ValueError, match=r"reference .*with_images.npz give 6 pool features"):
        fid.evaluate_generation(generator(), tmp_path / "with_images.npz", tiny_inception)
    assert generated == [0]

    np.savez(tmp_path / "stats.npz", **statistics(6))
    with pytest.raises(ValueError, match="images hold nothing"):
        fid.evaluate_generation([], tmp_path / "stats.npz", tiny_inception)
