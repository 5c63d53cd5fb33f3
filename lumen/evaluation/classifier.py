"""Metrics for generated digits that need no download: a classifier fitted to real digits, and what its features tell.

Takes Inception's place where the embedded digits (`lumen.training.data.digits`) are generated. The classifier shares
nothing with the generators: kernel principal components of the training pixels and a ridge regression on them, both in
closed form, so the same digits always give the same figures (no seed, no iterations).

    classifier = fit_digit_classifier(train_images, train_labels)
    evaluate_samples(classifier, generated, wanted_labels, train_images)

What figures mean, by example. The 1297 digits of "train" fit the classifier and are the reference; samples are the 300
of "test", as they are or spoilt, or "stored" ones of "train", repeated to 300:

    samples                        accuracy  frechet_distance  diversity  precision  recall  nearest_train
    real digits                       0.990             0.011       0.98       0.92    0.91           1.02
    half way to the class mean        1.000             0.046       0.58       0.96    0.22           0.92
    noise, 2 of 16 grey levels        0.977             0.015       0.93       0.83    0.90           1.36
    noise, 6 of 16 grey levels        0.743             0.129       0.72       0.18    0.04           2.67
    one stored digit per class        1.000             0.305       0.00       1.00    0.01           0.00
    five stored digits per class      1.000             0.075       0.72       1.00    0.04           0.00

So accuracy alone hides most. Whatever moves samples towards the middle of their class, classifier-free guidance first,
raises it above that of real digits while diversity and recall fall; and a generator that stores a few digits has
accuracy 1. Read it beside the others: diversity sees a class shrink to one image, recall sees it shrink to a few,
nearest_train sees copies. The Fréchet distance of a perfect generator is not 0 but falls as 1/n with the number of
images on either side (0.011 above): compare equal numbers only.
"""

import dataclasses

import numpy as np

from lumen.evaluation.fid import frechet_distance, moments, precision_recall

SIZE = 8  # digits are compared at 8 x 8, the resolution they were recorded in
COMPONENTS = 300  # enough to classify with
FEATURES = 32  # the first of them; more would drown the Fréchet distance of some hundred images in sampling noise
KERNEL_WIDTH = 0.15  # gamma of exp(-gamma |x - y|^2), pixels in [0, 1]; neighbouring digits are about 1 apart
RIDGE = 1e-2


@dataclasses.dataclass(frozen=True)
class DigitClassifier:
    """A fitted classifier, n training images and c classes; all float64.

    Attributes:
      train: [n, 64] training pixels in [0, 1].
      kernel_mean: [n] mean of the kernel between each training image and all of them.
      projection: [n, p] from centred kernel values to components by falling variance, p <= 300.
      weights: [p + 1, c] ridge regression onto the classes, the last row the intercept.
      train_spacing: median distance of a training image to its nearest other training image.
    """

    train: np.ndarray
    kernel_mean: np.ndarray
    projection: np.ndarray
    weights: np.ndarray
    train_spacing: float

    def components(self, images: np.ndarray) -> np.ndarray:
        """Kernel principal components [n, p] of images uint8 [n, S, S, 3]."""
        kernel = _kernel(_pixels(images), self.train)
        centred = kernel - kernel.mean(axis=1, keepdims=True) - self.kernel_mean + self.kernel_mean.mean()
        return centred @ self.projection

    def features(self, images: np.ndarray) -> np.ndarray:
        """The features of the metrics: the first 32 components (or all, if there are fewer)."""
        return self.components(images)[:, :FEATURES]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes int [n] of images uint8 [n, S, S, 3]."""
        scores = self.components(images) @ self.weights[:-1] + self.weights[-1]
        return scores.argmax(axis=1)


def _pixels(images: np.ndarray) -> np.ndarray:
    """Grey 8 x 8 means in [0, 1], [n, 64] float64, of images uint8 [n, S, S, 3]."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"digits: images are {images.dtype} {list(images.shape)}; wanted uint8 [n, S, S, 3].")
    n, size = images.shape[:2]
    if size % SIZE or not n:
        raise ValueError(f"digits: {n} images of {size} x {size}; wanted at least one, of a multiple of {SIZE} pixels.")
    cells = images.reshape(n, SIZE, size // SIZE, SIZE, size // SIZE, 3).astype(np.float64)
    return cells.mean(axis=(2, 4, 5)).reshape(n, SIZE * SIZE) / 255


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, m] of the rows of [n, D] and [m, D]."""
    squares = (x * x).sum(axis=1)[:, None] - 2 * x @ y.T + (y * y).sum(axis=1)
    return np.sqrt(np.maximum(squares, 0))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.exp(-KERNEL_WIDTH * _distances(x, y) ** 2)


def fit_digit_classifier(images: np.ndarray, labels: np.ndarray) -> DigitClassifier:
    """Fits the classifier: kernel principal components, then ridge regression onto the classes.

    With K the kernel matrix exp(-0.15 |x_i - x_j|^2) centred in both directions and K = V diag(l) V^T, the components
    of an image are V^T k / sqrt(l) for its centred kernel values k. The regression is least squares onto 1 for the
    image's class and 0 for the others, plus 0.01 |weights|^2.

    Args:
      images: uint8 [n, S, S, 3] real digits, S a multiple of 8; keep some back for evaluation. Memory grows with n^2.
      labels: [n] integers 0 ... c - 1, each present.
    Returns:
      The classifier; from the 1297 digits of "train" it takes about a second and classifies 99.0 % of "test".
    Raises:
      ValueError: for images of another kind, labels that do not match them, a class without images, or mostly
        duplicates.
    Source: Schölkopf, Smola & Müller, Nonlinear component analysis as a kernel eigenvalue problem, 1998.
    """
    x, labels = _pixels(images), np.asarray(labels)
    if labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"fit_digit_classifier: labels are {labels.dtype} {list(labels.shape)}; wanted {len(x)} integers."
        )
    classes = int(labels.max()) + 1
    missing = sorted(set(range(classes)) - set(labels.tolist()))
    if labels.min() < 0 or missing or classes < 2:
        raise ValueError(
            f"fit_digit_classifier: labels are {labels.min()} ... {labels.max()} without {missing}; "
            "wanted two classes or more, counted from 0, each with images."
        )
    spacing = _distances(x, x)
    np.fill_diagonal(spacing, np.inf)
    train_spacing = float(np.median(spacing.min(axis=1)))
    # Rounding leaves duplicates about 1e-7 apart.
    if not 1e-6 < train_spacing < np.inf:
        raise ValueError("fit_digit_classifier: half of the images or more are duplicates; give different digits.")
    kernel = _kernel(x, x)
    kernel_mean = kernel.mean(axis=0)
    values, vectors = np.linalg.eigh(kernel - kernel_mean - kernel_mean[:, None] + kernel_mean.mean())
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = min(COMPONENTS, int((values > 1e-10 * values[0]).sum()))
    projection = vectors[:, :kept] / np.sqrt(values[:kept])
    # The components of the training images are V sqrt(l): orthogonal and centred, so the regression needs no solver.
    targets = np.eye(classes)[labels]
    weights = (np.sqrt(values[:kept]) / (values[:kept] + RIDGE))[:, None] * (vectors[:, :kept].T @ targets)
    return DigitClassifier(
        train=x,
        kernel_mean=kernel_mean,
        projection=projection,
        weights=np.concatenate([weights, targets.mean(axis=0, keepdims=True)]),
        train_spacing=train_spacing,
    )


def evaluate_samples(
    classifier: DigitClassifier, images: np.ndarray, labels: np.ndarray, reference_images: np.ndarray
) -> dict[str, float]:
    """Compares generated digits with real ones.

    Args:
      classifier: from `fit_digit_classifier` on the digits the generator was trained on.
      images: uint8 [n, S, S, 3], the samples; a few hundred at least.
      labels: [n] integers, the class each sample was asked to be.
      reference_images: uint8 [m, S', S', 3] real digits: the training digits, as in the module's table, or held-out
        ones, against which a generator gains nothing by storing the training digits.
    Returns:
      accuracy: share of samples classified as asked. High values alone prove little; see the module's table.
      frechet_distance: between the samples' and the reference's features (all classes together), >= 0, 0 is best.
      diversity: mean distance of two samples of the same predicted class, over the same for the reference, averaged
        over the classes of the reference. 1 as varied as real digits, 0 one image per class; a class without samples
        counts 0.
      precision, recall: of the features with k = 3, as `lumen.evaluation.fid.precision_recall`.
      nearest_train: median distance of a sample to its nearest training image in pixels, over the same from training
        image to training image. About 1 for real unseen digits, near 0 for copies, above 1 for images unlike any digit.
    Raises:
      ValueError: for images of another kind, labels that do not match them, or too few images for a covariance.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"evaluate_samples: {len(images)} images with labels {list(labels.shape)}; wanted one each.")
    features, reference = classifier.features(images), classifier.features(reference_images)
    predicted, reference_predicted = classifier.predict(images), classifier.predict(reference_images)
    diversity = []
    for label in np.unique(reference_predicted):
        real = _mean_distance(reference[reference_predicted == label])
        if real > 0:
            diversity.append(_mean_distance(features[predicted == label]) / real)
    if not diversity:
        raise ValueError("evaluate_samples: no class has two different reference images; give more of them.")
    precision, recall = precision_recall(reference, features)
    nearest = _distances(_pixels(images), classifier.train).min(axis=1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "frechet_distance": frechet_distance(*moments(features).gaussian(), *moments(reference).gaussian()),
        "diversity": float(np.mean(diversity)),
        "precision": precision,
        "recall": recall,
        "nearest_train": float(np.median(nearest)) / classifier.train_spacing,
    }


def _mean_distance(features: np.ndarray) -> float:
    """Mean distance of two different rows of [n, D]; 0 for fewer than two."""
    n = len(features)
    distances = _distances(features, features)
    np.fill_diagonal(distances, 0)  # a root of rounding errors of one row against itself is no small number
    return float(distances.sum()) / (n * (n - 1)) if n > 1 else 0.0
