"""Object detection: average precision by the distance of centres, as nuScenes has it, and pictures from above.

scans = [(found_boxes, scores, found_classes, true_boxes, true_classes), ...]        # NumPy arrays, a tuple per scan
metrics = detection_metrics(scans, ("car", "pole"))      # {"mean_ap", "ap": {class: value}, "absent": [...]}
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# Metres within which a detection counts as right; average precision is the mean over them.
DISTANCES = (0.5, 1.0, 2.0, 4.0)
# Precision below, and the part of the curve with less recall than this, are noise and do not count.
LEAST = 0.1
_TRUE, _FOUND, _POINTS = (60, 180, 75), (230, 60, 60), (150, 150, 150)


class Scan(NamedTuple):
    """What was found in a scan and what is there.

    Attributes:
      boxes: float [k, 7 or more], see `lumen.sparse.boxes`.
      scores: float [k].
      classes: integers [k].
      true_boxes: float [m, 7 or more].
      true_classes: integers [m].
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    true_boxes: np.ndarray
    true_classes: np.ndarray


def inside_box(points, box) -> np.ndarray:
    """Which points are in a box or on its surface, bool [n], of float [n, 3 or more] and [7 or more]."""
    away = points[:, :3] - box[:3]
    cos, sin = np.cos(box[6]), np.sin(box[6])
    along, across = away[:, 0] * cos + away[:, 1] * sin, away[:, 1] * cos - away[:, 0] * sin
    return (np.abs(np.stack([along, across, away[:, 2]], 1)) <= box[3:6] / 2).all(1)


class Matches(NamedTuple):
    """What became of the detections of one class in all scans, from the highest score to the lowest.

    Attributes:
      scores: float [k].
      scans: integers [k], the scan of each detection.
      found: integers [k], its place in the scan.
      true: integers [k], the place in the scan of the true box it takes; -1 where it is wrong.
      count: how many true boxes there are.
    """

    scores: np.ndarray
    scans: np.ndarray
    found: np.ndarray
    true: np.ndarray
    count: int


def match(scans: Sequence[Scan], class_id: int, distance: float) -> Matches:
    """Gives true boxes of one class to its detections.

    From the highest score of all scans to the lowest, of equal ones the last first, a detection takes the nearest true
    box of its scan that is not taken, if its centre is nearer than `distance`, seen from above.

    Source: nuScenes devkit, python-sdk/nuscenes/eval/detection/algo.py, accumulate.
    """
    parts, count = [(np.zeros(0), *(np.zeros(0, int) for _ in range(3)))], 0
    for number, scan in enumerate(scans):
        own, places = np.flatnonzero(scan.classes == class_id), np.flatnonzero(scan.true_classes == class_id)
        count += len(places)
        # Scans do not compete for boxes: the order of all detections is the order in each scan.
        own = own[np.argsort(scan.scores[own], kind="stable")[::-1]]
        apart = np.linalg.norm(scan.boxes[own, None, :2] - scan.true_boxes[None, places, :2], axis=-1)
        taken = np.full(len(own), -1)
        for row in range(len(own) if len(places) else 0):
            nearest = apart[row].argmin()
            if apart[row, nearest] < distance:
                taken[row] = places[nearest]
                apart[:, nearest] = np.inf
        parts.append((scan.scores[own], np.full(len(own), number), own, taken))
    scores, numbers, found, true = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.lexsort((found, numbers, scores))[::-1]
    return Matches(scores[order], numbers[order], found[order], true[order], count)


def precision_curve(matches: Matches) -> np.ndarray:
    """Precision at recalls of 0.00, 0.01, ... 1.00, interpolated, 0 beyond the highest one reached: float [101]."""
    hits = np.cumsum(matches.true >= 0)
    if not hits.any():
        return np.zeros(101)
    return np.interp(np.linspace(0, 1, 101), hits / matches.count, hits / np.arange(1, len(hits) + 1), right=0)


def average_precision(scans: Sequence[Scan], class_id: int, distance: float) -> float:
    """Of one class, counting detections as right as `match` does.

    `precision_curve` counts from recall 0.11 on, less 0.1 and not below 0, divided by 0.9.

    Returns:
      In [0, 1]; NaN if there is no true box of the class.
    Source: nuScenes devkit, python-sdk/nuscenes/eval/detection/algo.py, accumulate and calc_ap.
    """
    matches = match(scans, class_id, distance)
    if not matches.count:
        return float("nan")
    curve = precision_curve(matches)[round(100 * LEAST) + 1 :]
    return float(np.maximum(curve - LEAST, 0).mean() / (1 - LEAST))


def detection_metrics(scans: Sequence[Scan], classes: Sequence[str]) -> dict[str, Any]:
    """Mean average precision over classes and `DISTANCES`.

    Args:
      scans: of the evaluation.
      classes: names, in the order of class ids.
    Returns:
      {"mean_ap": over the classes that occur, "ap": {class: mean over the distances}, "absent": [classes that do not]}.
      (nuScenes counts absent classes as 0.)
    """
    each = {
        name: float(np.mean([average_precision(scans, class_id, distance) for distance in DISTANCES]))
        for class_id, name in enumerate(classes)
    }
    present = {name: value for name, value in each.items() if not np.isnan(value)}
    mean = float(np.mean(list(present.values()))) if present else 0.0
    return {"mean_ap": mean, "ap": present, "absent": [name for name in classes if name not in present]}


def boxes_from_above(points, scan: Scan, *, reach: float = 54.0, size: int = 800) -> np.ndarray:
    """A scan seen from above: points grey, true boxes green, found ones red, a line to each box's front.

    x points up and y to the left; where detections have a high score they are drawn opaque.

    Args:
      points: float [n, 3 or more], metres.
      scan: the boxes.
      reach: metres from the sensor to the edge.
      size: pixels per side.
    Returns:
      uint8 [size, size, 3].
    """
    scale = size / (2 * reach)

    def pixel(xy):
        return [tuple(place) for place in ((reach - np.asarray(xy))[..., ::-1] * scale).tolist()]

    canvas = np.full((size, size, 3), 255, np.uint8)
    rows, columns = np.floor((reach - np.asarray(points)[:, :2].T) * scale).astype(int)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    canvas[rows[inside], columns[inside]] = _POINTS
    picture = Image.fromarray(canvas).convert("RGB")
    draw = ImageDraw.Draw(picture, "RGBA")

    def outline(box, colour, width):
        cos, sin = np.cos(box[6]), np.sin(box[6])
        along, across = np.array([cos, sin]) * box[3] / 2, np.array([-sin, cos]) * box[4] / 2
        corners = [along + across, along - across, -along - across, -along + across]
        draw.line(pixel(box[:2] + np.array([*corners, corners[0]])), fill=colour, width=width)
        draw.line(pixel(box[:2] + np.array([along, 1.4 * along])), fill=colour, width=width)

    for box in scan.true_boxes:
        outline(box, (*_TRUE, 255), 3)
    for box, score in zip(scan.boxes, scan.scores, strict=True):
        outline(box, (*_FOUND, round(55 + 200 * float(score))), 2)
    return np.asarray(picture)
