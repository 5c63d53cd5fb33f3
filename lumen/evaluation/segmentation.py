"""Semantic segmentation: confusion matrices, IoU, and pictures of labelled point clouds.

total = sum(confusion_matrix(predictions, labels, len(SEMANTIC_KITTI)) for predictions, labels in scans)
metrics = segmentation_metrics(total, SEMANTIC_KITTI)      # {"mean_iou", "accuracy", "iou": {class: value}, ...}
picture = from_above(points, labels, predictions, SEMANTIC_KITTI)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

IGNORE = 255  # the label of what does not count

# Names and RGB colours, in the order of the labels 0, 1, ...
Classes = Mapping[str, tuple[int, int, int]]

# Colours of config/semantic-kitti.yaml of PRBonn/semantic-kitti-api (which lists blue first).
SEMANTIC_KITTI: Classes = {
    "car": (100, 150, 245),
    "bicycle": (100, 230, 245),
    "motorcycle": (30, 60, 150),
    "truck": (80, 30, 180),
    "other-vehicle": (0, 0, 255),
    "person": (255, 30, 30),
    "bicyclist": (255, 40, 200),
    "motorcyclist": (150, 30, 90),
    "road": (255, 0, 255),
    "parking": (255, 150, 255),
    "sidewalk": (75, 0, 75),
    "other-ground": (175, 0, 75),
    "building": (255, 200, 0),
    "fence": (255, 120, 50),
    "vegetation": (0, 175, 0),
    "trunk": (135, 60, 0),
    "terrain": (150, 240, 80),
    "pole": (255, 240, 150),
    "traffic-sign": (255, 0, 0),
}

# Colours of the benchmark's classes in python-sdk/nuscenes/eval/lidarseg/utils.py of nutonomy/nuscenes-devkit.
NUSCENES: Classes = {
    "barrier": (112, 128, 144),
    "bicycle": (220, 20, 60),
    "bus": (255, 127, 80),
    "car": (255, 158, 0),
    "construction vehicle": (233, 150, 70),
    "motorcycle": (255, 61, 99),
    "pedestrian": (0, 0, 230),
    "traffic cone": (47, 79, 79),
    "trailer": (255, 140, 0),
    "truck": (255, 99, 71),
    "driveable surface": (0, 207, 191),
    "other flat": (175, 0, 75),
    "sidewalk": (75, 0, 75),
    "terrain": (112, 180, 60),
    "manmade": (222, 184, 135),
    "vegetation": (0, 175, 0),
}

# The classes of made-up streets, in SemanticKITTI's colours.
STREET: Classes = {
    "ground": (255, 0, 255),
    "car": (100, 150, 245),
    "pole": (255, 240, 150),
    "building": (255, 200, 0),
}


def confusion_matrix(predictions, labels, classes: int):
    """How often class j was predicted where class i is true: integers [classes, classes], rows the truth.

    Works on NumPy arrays, and on JAX arrays under jit; add the matrices of batches on the host, where they are int64.

    Args:
      predictions: integers [...] in 0..classes - 1.
      labels: integers [...]; where they are IGNORE nothing is counted.
      classes: their number.
    Raises:
      ValueError: for shapes that differ, or, for NumPy arrays, numbers that are no class. In JAX arrays such labels are
        ignored.
    """
    if np.shape(predictions) != np.shape(labels):
        raise ValueError(
            f"confusion_matrix: predictions are {list(np.shape(predictions))} and labels {list(np.shape(labels))}; "
            "wanted one prediction per label."
        )
    size = classes * classes
    if isinstance(predictions, jax.Array) or isinstance(labels, jax.Array):
        truth, guess = jnp.ravel(labels).astype(jnp.int32), jnp.ravel(predictions).astype(jnp.int32)
        counted = (truth >= 0) & (truth < classes)
        cells = jnp.where(counted, truth * classes + guess, size)
        return jnp.zeros(size, jnp.int32).at[cells].add(1, mode="drop").reshape(classes, classes)
    truth, guess = np.ravel(labels).astype(np.int64), np.ravel(predictions).astype(np.int64)
    truth, guess = truth[truth != IGNORE], guess[truth != IGNORE]
    for name, values in (("labels", truth), ("predictions", guess)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(
                f"confusion_matrix: {name} span {values.min()}..{values.max()}; wanted 0..{classes - 1}, or {IGNORE} "
                "for labels that do not count."
            )
    return np.bincount(truth * classes + guess, minlength=size).reshape(classes, classes)


def segmentation_metrics(confusion, classes: Sequence[str] | Classes) -> dict[str, Any]:
    """Intersection over union and accuracy from a confusion matrix.

    With TP, FP, FN of a class, IoU = TP / (TP + FP + FN). The mean is over the classes that occur, in the truth or in a
    prediction; the others have no IoU and are listed. Accuracy is the share of elements with the right class.

    Args:
      confusion: integers [C, C], rows the truth.
      classes: C names.
    Returns:
      "mean_iou", "accuracy", "iou": {name: value} of classes that occur, "absent": names of those that do not.
    Raises:
      ValueError: for a matrix of another shape, or of nothing.
    Source: deviation: SPVNAS counts an absent class as IoU 1 in the mean, SemanticKITTI's own evaluation as 0.
    """
    confusion = np.asarray(confusion, np.int64)
    names = list(classes)
    if confusion.shape != (len(names), len(names)):
        raise ValueError(
            f"segmentation_metrics: the confusion matrix is {list(confusion.shape)} for {len(names)} classes; wanted "
            f"[{len(names)}, {len(names)}]."
        )
    if not confusion.any():
        raise ValueError("segmentation_metrics: the confusion matrix is empty; wanted labels that count.")
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = {name: float(r / u) for name, r, u in zip(names, right, union, strict=True) if u}
    return {
        "mean_iou": float(np.mean(list(iou.values()))),
        "accuracy": float(right.sum() / confusion.sum()),
        "iou": iou,
        "absent": [name for name in names if name not in iou],
    }


# --- Pictures ---------------------------------------------------------------------------------------------------------

_BACKGROUND = (16, 16, 20)
_TEXT = (235, 235, 235)
_UNCOUNTED = (70, 70, 70)
_RIGHT, _WRONG = (95, 105, 120), (255, 45, 45)
_MARGIN = 8


def from_above(points, labels, predictions, classes: Classes, *, reach: float = 40.0, size: int = 480) -> np.ndarray:
    """Truth, prediction and errors of a scan seen from above, side by side, with a legend.

    x points up and y to the left; of points in the same pixel the highest is seen.

    Args:
      points: float [n, 3 or more], x, y, z in metres, the sensor at 0.
      labels: integers [n], IGNORE (dark grey) where there is none.
      predictions: integers [n].
      classes: names and colours.
      reach: metres from the sensor to the edge.
      size: pixels per side of a panel.
    Returns:
      uint8 [H, W, 3].
    """
    points, labels, predictions = _checked_cloud("from_above", points, labels, predictions, classes)
    cells = np.floor((reach - points[:, :2]) * (size / (2 * reach))).astype(int)
    inside = ((cells >= 0) & (cells < size)).all(1)
    # Two pixels across, so that single points are seen; later ones cover earlier ones.
    order = np.flatnonzero(inside)[np.argsort(points[inside, 2], kind="stable")]
    rows, columns = np.minimum(cells[order][:, None] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), size - 1).T
    return _compare((size, size), (rows.T, columns.T), labels[order], predictions[order], classes, side_by_side=True)


def from_sensor(points, labels, predictions, classes: Classes, *, rows: int = 64, width: int = 1024) -> np.ndarray:
    """Truth, prediction and errors of a scan as the sensor sees it, all around, one above the other, with a legend.

    The middle looks along x, the left end and the right end backwards; rows span the scan's own elevations, highest on
    top. Of points in the same pixel the nearest is seen. See `from_above` for the arguments.

    Args:
      rows: of the range image, the sensor's beams; each is drawn three pixels high.
      width: pixels around.
    Returns:
      uint8 [H, W, 3].
    """
    points, labels, predictions = _checked_cloud("from_sensor", points, labels, predictions, classes)
    distance = np.linalg.norm(points[:, :3], axis=1)
    elevation = np.arcsin(np.clip(points[:, 2] / np.maximum(distance, 1e-6), -1, 1))
    across = (0.5 - np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi)) * width
    column = np.minimum(across.astype(int), width - 1)
    low, high = elevation.min(), elevation.max()
    row = np.round((high - elevation) / max(high - low, 1e-6) * (rows - 1)).astype(int)
    order = np.argsort(-distance, kind="stable")
    tall = 3 * row[order][:, None] + np.arange(3)
    wide = np.broadcast_to(column[order][:, None], tall.shape)
    return _compare((3 * rows, width), (tall, wide), labels[order], predictions[order], classes, side_by_side=False)


def _checked_cloud(name: str, points, labels, predictions, classes: Classes):
    points, labels, predictions = np.asarray(points), np.asarray(labels), np.asarray(predictions)
    if points.ndim != 2 or points.shape[1] < 3 or labels.shape != points.shape[:1] or predictions.shape != labels.shape:
        raise ValueError(
            f"{name}: points are {list(points.shape)}, labels {list(labels.shape)}, predictions "
            f"{list(predictions.shape)}; wanted [n, 3 or more], [n] and [n]."
        )
    if not len(points):
        raise ValueError(f"{name}: there are no points; wanted a scan.")
    for what, values in (("labels", labels), ("predictions", predictions)):
        strange = np.unique(values[(values != IGNORE) & ((values < 0) | (values >= len(classes)))])
        if len(strange):
            raise ValueError(
                f"{name}: {what} hold {strange[:5].tolist()}; wanted 0..{len(classes) - 1} for {len(classes)} classes, "
                f"or {IGNORE}."
            )
    return points, labels, predictions


def _compare(shape, places, labels, predictions, classes: Classes, *, side_by_side: bool) -> np.ndarray:
    """Three panels and a legend. places: rows and columns [n, k] of the pixels of each point, the topmost last."""
    table = np.full((IGNORE + 1, 3), _UNCOUNTED, np.uint8)
    table[: len(classes)] = list(classes.values())
    wrong = np.where(labels == predictions, 0, 1)
    errors = np.array([_RIGHT, _WRONG, _UNCOUNTED], np.uint8)[np.where(labels == IGNORE, 2, wrong)]
    panels = []
    for title, colours in (("truth", table[labels]), ("prediction", table[predictions]), ("errors", errors)):
        canvas = np.full((*shape, 3), _BACKGROUND, np.uint8)
        canvas[places] = colours[:, None]
        panels.append((title, canvas))
    counted = labels != IGNORE
    share = float((labels == predictions)[counted].mean()) if counted.any() else 0.0
    seen = set(np.unique(labels).tolist()) | set(np.unique(predictions).tolist())
    legend = [(name, colour) for i, (name, colour) in enumerate(classes.items()) if i in seen]
    legend += [("not counted", _UNCOUNTED)] if IGNORE in seen else []
    legend += [(f"right: {share:.1%} of the points shown", _RIGHT), ("wrong", _WRONG)]
    return _sheet(panels, legend, side_by_side=side_by_side)


def _sheet(panels, legend, *, side_by_side: bool) -> np.ndarray:
    font = ImageFont.load_default(13)
    line = 20
    height, width = panels[0][1].shape[:2]
    columns = len(panels) if side_by_side else 1
    total = columns * (width + _MARGIN) + _MARGIN
    # The legend runs on in lines below the panels.
    entries, x, y = [], _MARGIN, 0
    for name, colour in legend:
        length = 18 + int(font.getlength(name)) + 14
        if x + length > total and x > _MARGIN:
            x, y = _MARGIN, y + line
        entries.append((x, y, name, colour))
        x += length
    block = line + height + _MARGIN
    below = block * (len(panels) // columns)
    picture = Image.new("RGB", (total, below + y + line + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, (title, canvas) in enumerate(panels):
        left, top = _MARGIN + (i % columns) * (width + _MARGIN), (i // columns) * block
        draw.text((left, top + 2), title, _TEXT, font)
        picture.paste(Image.fromarray(canvas), (left, top + line))
    for x, y, name, colour in entries:
        draw.rectangle((x, below + y + 3, x + 12, below + y + 15), colour)
        draw.text((x + 18, below + y + 1), name, _TEXT, font)
    return np.asarray(picture)
