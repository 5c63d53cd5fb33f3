"""Metrics of image generation on Inception features: FID, sFID, Inception Score, precision and recall.

The protocol is that of the ADM evaluator (openai/guided-diffusion evaluations/evaluator.py), which LPD, LlamaGen, DiT
and others report: 50,000 samples against a reference .npz with the statistics of the training set and 10,000 of its
images.

    extract = feature_extractor(load_inception("pt_inception-2015-12-05-6726825d.pth"))
    evaluate_generation(batches, "VIRTUAL_imagenet256_labeled.npz", extract)
    # {"fid": ..., "sfid": ..., "inception_score": ..., "precision": ..., "recall": ..., "samples": 50000}

Everything after the features is computed in float64, but the distances of precision and recall in float32.

Sources: FID, Heusel et al., arXiv:1706.08500; sFID, Nash et al., arXiv:2103.03841; Inception Score, Salimans et al.,
arXiv:1606.03498; precision and recall, Kynkäänniemi et al., arXiv:1904.06991.
"""

import dataclasses
import functools
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lumen.evaluation.inception import InceptionFeatures


class Gaussian(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Moments:
    """Statistics of features seen so far, in a form that merges without loss.

    Attributes:
      count: number of feature vectors n.
      mean: [D] float64.
      scatter: [D, D] float64, the sum over vectors of (x - mean) (x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance scatter / (n - 1), as np.cov gives it.

        Raises:
          ValueError: for fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"moments: a covariance needs at least 2 feature vectors, got {self.count}; add samples.")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def moments(features: ArrayLike) -> Moments:
    """Moments of features [n, D], n >= 1, summed in float64 about their own mean."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"moments: features have shape {list(x.shape)}; wanted [n, D] with n >= 1.")
    if not np.isfinite(x).all():
        raise ValueError(
            "moments: features have NaN or infinite values; look at the images or the weights they came from."
        )
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets; order and batch sizes change the result by rounding only.

    Nothing large is subtracted: with d = mean_b - mean_a and n = n_a + n_b,
    mean = mean_a + d n_b / n and scatter = scatter_a + scatter_b + d d^T n_a n_b / n.

    Raises:
      ValueError: if the numbers of features differ.
    Source: Chan, Golub & LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"merge: {a.mean.size} and {b.mean.size} features; both sets need the same feature extractor.")
    count = a.count + b.count
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + np.outer(difference, difference * (a.count * b.count / count)))


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    With S = R R^T from an eigendecomposition, the eigenvalues of S1 S2 are the squared singular values of R1^T R2, so
    the last trace is their sum. Unlike a square root of the unsymmetric product this needs no jitter for singular
    matrices and has no imaginary part; and identical statistics give 0 to rounding, where roots of the eigenvalues of
    S1^(1/2) S2 S1^(1/2) leave 1e-8 per direction without variance. 2048 features take some seconds.

    Args:
      mu1, mu2: [D] means.
      sigma1, sigma2: [D, D] covariances, symmetric and positive semidefinite; they may be singular.
    Returns:
      The distance; identical statistics give 0 up to about 1e-13 tr(S1).
    Raises:
      ValueError: for shapes that do not belong together, values that are not finite, or a matrix that is not a
        covariance.
    Source: Dowson & Landau 1982; FID is this figure on pool features (arXiv:1706.08500, eq. 6), sFID on spatial
    features.
    """
    mu1, mu2 = (np.atleast_1d(np.asarray(mu, np.float64)) for mu in (mu1, mu2))
    sigma1, sigma2 = (np.atleast_2d(np.asarray(sigma, np.float64)) for sigma in (sigma1, sigma2))
    d = mu1.size
    if mu1.shape != (d,) or mu2.shape != (d,) or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        raise ValueError(
            f"frechet_distance: means {list(mu1.shape)} and {list(mu2.shape)}, covariances {list(sigma1.shape)} and "
            f"{list(sigma2.shape)}; wanted [D], [D], [D, D], [D, D]: both sides need the same feature extractor."
        )
    roots = _root(sigma1, "sigma1"), _root(sigma2, "sigma2")
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    difference = mu1 - mu2
    if not np.isfinite(difference).all():
        raise ValueError("frechet_distance: a mean has NaN or infinite values.")
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def _root(sigma: np.ndarray, name: str) -> np.ndarray:
    """R [D, D] with R R^T = sigma."""
    if not np.isfinite(sigma).all():
        raise ValueError(f"frechet_distance: {name} has NaN or infinite values.")
    largest = np.abs(sigma).max()
    # Statistics computed in float32 are symmetric and semidefinite to about 2**-24 times sums of a few thousand terms.
    if np.abs(sigma - sigma.T).max() > 1e-3 * largest:
        raise ValueError(f"frechet_distance: {name} is not symmetric; wanted a covariance matrix.")
    values, vectors = np.linalg.eigh(sigma)
    if values[0] < -1e-3 * values[-1]:
        raise ValueError(f"frechet_distance: {name} has the eigenvalue {values[0]:.3g}; wanted a covariance matrix.")
    return vectors * np.sqrt(np.maximum(values, 0))


def inception_score(logits: ArrayLike, split_size: int = 5000) -> float:
    """Inception Score exp(mean over images of KL(p(y|x) || p(y))), averaged over splits of consecutive images.

    p(y) is the mean within the split. A split cannot score above its number of classes, so images sorted by class give
    a wrong, low figure: shuffle first (`evaluate_generation` does).

    Args:
      logits: [n, C] class logits; ADM and torch-fidelity take them without bias.
      split_size: 5000 in the ADM evaluator, hence 10 splits of 50,000; a last, smaller split counts as much as the
        others.
    Returns:
      The score, between 1 and C. The softmax is taken in float64, so no probability underflows to log 0.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"inception_score: logits have shape {list(logits.shape)}; wanted [n, C] with n >= 1.")
    scores = []
    for start in range(0, len(logits), split_size):
        x = logits[start : start + split_size].astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        # Where every p of a class underflows to 0 its mean is 0 too, and the term 0 * (log p - log 0) is 0.
        log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
    return float(np.mean(scores))


# One block of distances: 1024 x 50,000 float32 are 200 MB.
_ROWS = 1024


def _squared_distances(u: jax.Array, v: jax.Array) -> jax.Array:
    """[n, D], [m, D] -> [n, m] in float32."""
    product = jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(u * u, axis=1)[:, None] - 2 * product + jnp.sum(v * v, axis=1), 0)


@functools.partial(jax.jit, static_argnames="k")
def _block_radii(features, rows, first, k):
    distances = _squared_distances(rows, features)
    index = jnp.arange(rows.shape[0])
    distances = distances.at[index, first + index].set(0)  # rounding leaves a little above 0
    return -jax.lax.top_k(-distances, k + 1)[0][:, k]


@jax.jit
def _block_membership(reference, reference_radii, rows, row_radii):
    distances = _squared_distances(rows, reference)
    return (distances <= reference_radii).any(axis=1), (distances <= row_radii[:, None]).any(axis=0)


def precision_recall(reference: ArrayLike, samples: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in the
    set (the point itself not counted). Precision is the share of samples inside the manifold of the reference: quality.
    Recall is the share of reference images inside the manifold of the samples: coverage.

    Args:
      reference: [n, D] features, 10,000 pool features in the ADM protocol.
      samples: [m, D] features.
      k: neighbours, fewer than n and m.
    Returns:
      (precision, recall), each in [0, 1].
    Raises:
      ValueError: for shapes that do not belong together or fewer than k + 1 vectors on a side.
    Source: arXiv:1904.06991, section 3; evaluator.py ManifoldEstimator. Deviations: features are centred on the
    reference mean first, which changes no distance but its rounding; and distances are float32 where ADM's are float16
    unless they overflow. Rounded to a coarse grid, a point just outside a ball can pass for inside: on simulated pool
    features float16 raised precision by 0.001 and recall by 0.007.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"precision_recall: features {list(reference.shape)} and {list(samples.shape)}; wanted [n, D] and [m, D]."
        )
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(
                f"precision_recall: {len(features)} {name} have no {k}-th neighbour; give at least {k + 1}."
            )
    centre = reference.mean(axis=0, dtype=np.float64)
    known, made = (jnp.asarray((x - centre).astype(np.float32)) for x in (reference, samples))

    def radii(features):
        blocks = [
            _block_radii(features, features[first : first + _ROWS], first, k)
            for first in range(0, len(features), _ROWS)
        ]
        return jnp.concatenate(blocks)

    known_radii, made_radii = radii(known), radii(made)
    inside, covered = 0, np.zeros(len(known), bool)
    for first in range(0, len(made), _ROWS):
        rows = slice(first, first + _ROWS)
        made_inside, known_covered = _block_membership(known, known_radii, made[rows], made_radii[rows])
        inside += int(made_inside.sum())
        covered |= np.asarray(known_covered)
    return inside / len(made), float(covered.mean())


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a reference file holds.

    Attributes:
      path: the .npz file.
      pool: statistics of pool features, for FID; None where the file has images only.
      spatial: statistics of spatial features, for sFID; None where the file has none.
      image_count: number of reference images in the file, for precision and recall; may be 0.
    """

    path: str
    pool: Gaussian | None
    spatial: Gaussian | None
    image_count: int

    def images(self, batch_size: int = 64) -> Iterator[np.ndarray]:
        """Batches uint8 [b, H, W, 3] of the reference images, read as they are asked for (10,000 at 512 are 8 GB).

        Raises:
          ValueError: if the file ends early.
        """
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            shape, dtype = _image_header(self.path, member)
            size = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                data = member.read(count * size)
                if len(data) != count * size:
                    raise ValueError(
                        f"reference: {self.path} ends within arr_0, after {start} of {shape[0]} images; get it again."
                    )
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _image_header(path: str, member) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array whose .npy stream starts here."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran_order:
        raise ValueError(
            f"reference: {path}: arr_0 is {dtype} {list(shape)}; wanted images, uint8 [n, H, W, 3] in C order."
        )
    return shape, dtype


def reference_statistics(path: str | os.PathLike) -> Reference:
    """Reads a reference file.

    Two kinds are understood: ADM's reference batches with `arr_0` (images), `mu`, `sigma` (pool features) and `mu_s`,
      `sigma_s`
    (spatial features); and the statistics files of pytorch-fid, torch-fidelity and MAR (fid_stats/adm_in256_stats.npz),
    with `mu` and `sigma` only. Other arrays are passed over; a file of samples, with `arr_0` only, is a reference too.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a .npz, has neither statistics nor images, has one of a pair only, or has shapes that do
        not fit.
    """
    path = os.fspath(path)
    try:
        # Opened here: np.load leaves a damaged file open.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: file[name].astype(np.float64) for name in names & {"mu", "sigma", "mu_s", "sigma_s"}}
    except (zipfile.BadZipFile, zlib.error, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"reference: {path} cannot be read as .npz: {error}; get the file again.") from error

    def pair(mean, covariance):
        if {mean, covariance}.isdisjoint(arrays):
            return None
        if not {mean, covariance} <= arrays.keys():
            raise ValueError(
                f"reference: {path} has one of '{mean}' and '{covariance}'; wanted both. It has {sorted(names)}."
            )
        shapes = arrays[mean].shape, arrays[covariance].shape
        if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
            raise ValueError(
                f"reference: {path}: '{mean}' has shape {list(shapes[0])} and '{covariance}' {list(shapes[1])}; "
                "wanted [D] and [D, D]."
            )
        return Gaussian(arrays[mean], arrays[covariance])

    pool, spatial = pair("mu", "sigma"), pair("mu_s", "sigma_s")
    image_count = 0
    if "arr_0" in names:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            image_count = _image_header(path, member)[0][0]
    if pool is None and not image_count:
        raise ValueError(
            f"reference: {path} has neither statistics ('mu', 'sigma') nor images ('arr_0'); it has {sorted(names)}."
        )
    return Reference(path, pool, spatial, image_count)


class _Collected(NamedTuple):
    """Pool features [n, D] and logits [n, C] of all images; of the spatial features only their moments."""

    pool: np.ndarray
    logits: np.ndarray
    spatial: Moments


# Spatial features of so many images are summed at once: one matrix product of full size instead of many thin ones.
_SPATIAL_ROWS = 4096


def _collect(
    images: Iterable[np.ndarray], inception, name: str, pool: Gaussian | None, spatial: Gaussian | None
) -> _Collected:
    """Features of all images, checked against the statistics they will be compared with, if there are any."""
    pools, logits, pending, seen = [], [], [], None
    for batch in images:
        features = InceptionFeatures(*map(np.asarray, inception(batch)))
        for came, wanted, kind in ((features.pool, pool, "pool"), (features.spatial, spatial, "spatial")):
            if wanted is not None and came.shape[1] != wanted.mean.size:
                raise ValueError(
                    f"evaluate_generation: {name} give {came.shape[1]} {kind} features, the reference statistics have "
                    f"{wanted.mean.size}; use the feature extractor that the reference was made with."
                )
        pools.append(features.pool)
        logits.append(features.logits)
        pending.append(features.spatial)
        if sum(map(len, pending)) >= _SPATIAL_ROWS:
            seen, pending = _add(seen, pending), []
    if not pools:
        raise ValueError(f"evaluate_generation: {name} hold nothing; give batches uint8 [b, H, W, 3].")
    if pending or seen is None:
        seen = _add(seen, pending)
    return _Collected(np.concatenate(pools), np.concatenate(logits), seen)


def _add(seen: Moments | None, batches: list[np.ndarray]) -> Moments:
    new = moments(np.concatenate(batches))
    return new if seen is None else merge(seen, new)


def evaluate_generation(
    images: Iterable[np.ndarray],
    reference: Reference | str | os.PathLike,
    inception: Callable[[np.ndarray], InceptionFeatures],
    *,
    shuffle_seed: int = 0,
) -> dict[str, float]:
    """Runs the ADM protocol on generated images.

    Args:
      images: batches uint8 [b, H, W, 3], 50,000 images in all in papers (50 of each ImageNet class). They are read
        once.
      reference: what `reference_statistics` returns, or the path it reads.
      inception: `lumen.evaluation.inception.feature_extractor(...)`, or any function from such a batch to
        `InceptionFeatures`.
      shuffle_seed: seed of the permutation before the splits of the Inception Score. ADM takes samples as they lie in
        the file, which is right only where classes are mixed; torch-fidelity shuffles too.
    Returns:
      fid, sfid, inception_score, precision, recall (the last two against all reference images) and samples, the number
      of images. What the reference cannot give is left out: sfid without spatial statistics, precision and recall
      without images. A reference with images only gets its statistics from those, as in ADM.
    Raises:
      ValueError: for no images, for NaN features, or a reference made with another feature extractor.
    Warns:
      UserWarning: with fewer samples than features plus one; the covariance is then singular and FID far too high.
    """
    if not isinstance(reference, Reference):
        reference = reference_statistics(reference)
    # The reference first: what is wrong with it shows before anything is generated.
    pool, spatial, known = reference.pool, reference.spatial, None
    if reference.image_count:
        known = _collect(reference.images(), inception, f"reference {reference.path}", pool, spatial)
    if pool is None:
        if known is None:
            raise ValueError(f"evaluate_generation: reference {reference.path} has neither statistics nor images.")
        pool, spatial = moments(known.pool).gaussian(), known.spatial.gaussian()
    made = _collect(images, inception, "images", pool, spatial)
    count, dimension = made.pool.shape
    if count <= dimension:
        warnings.warn(
            f"evaluate_generation: {count} samples for {dimension} features: the covariance is singular and the "
            "Fréchet distances are biased upwards; published figures use 50,000 samples.",
            stacklevel=2,
        )
    order = np.random.default_rng(shuffle_seed).permutation(count)
    results = {
        "samples": count,
        "fid": frechet_distance(*moments(made.pool).gaussian(), *pool),
        "inception_score": inception_score(made.logits[order]),
    }
    if spatial is not None:
        results["sfid"] = frechet_distance(*made.spatial.gaussian(), *spatial)
    if known is not None:
        results["precision"], results["recall"] = precision_recall(known.pool, made.pool)
    return results
