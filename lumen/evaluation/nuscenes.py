"""The detection metric of nuScenes (arXiv:1903.11027): average precision, five errors of what was found, their score.

samples = [Sample(scan, attributes, true_attributes, vehicle, racks), ...]      # a key frame each, in the global frame
metrics = nuscenes_metrics(samples)                                         # {"nds", "mean_ap", "mean_errors", ...}
print(nuscenes_table(metrics))
write_results("nuscenes_results.json", tokens, samples)                     # what the evaluation server takes

Source: nuScenes devkit, python-sdk/nuscenes/eval, with configs/detection_cvpr_2019.json.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumen.evaluation.detection import DISTANCES, LEAST, Matches, Scan, average_precision, inside_box, match
from lumen.io import DataError

# The classes, and the distance from the vehicle in metres up to which objects of each count.
RANGES = {
    "car": 50.0,
    "truck": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "construction_vehicle": 50.0,
    "pedestrian": 40.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "traffic_cone": 30.0,
    "barrier": 30.0,
}
CLASSES = tuple(RANGES)
# What is wrong with a detection: metres, 1 - intersection over union of the sizes, radians, metres per second, and the
# share of wrong attributes.
ERRORS = ("translation", "scale", "orientation", "velocity", "attribute")
# Errors that mean nothing for a class.
_UNDEFINED = {"traffic_cone": ERRORS[2:], "barrier": ERRORS[3:]}
# Metres within which a detection counts as found when its errors are measured.
_ERROR_DISTANCE = 2.0
_AP_WEIGHT = 5
# In one sample.
MAX_DETECTIONS = 500
# What a submission says it was made from.
_META = {"use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}


class Sample(NamedTuple):
    """What was found at a key frame and what is there, in the global frame.

    Attributes:
      scan: boxes have 9 columns, see `lumen.sparse.boxes`, their z axis up; true velocities that are not known are NaN.
        Classes are places in `CLASSES`. True boxes are those that at least one LiDAR or radar point is in.
      attributes: strings [k], such as "vehicle.parked".
      true_attributes: strings [m]; "" where there is none, which then does not count.
      vehicle: float [2], where the vehicle is.
      racks: float [r, 7 or more], bicycle racks: what is in them does not count.
    """

    scan: Scan
    attributes: np.ndarray
    true_attributes: np.ndarray
    vehicle: np.ndarray
    racks: np.ndarray


def likely_attribute(name: str, speed: float) -> str:
    """The attribute of an object whose class and speed, metres per second, are all that is known; "" for none.

    Above 0.2 m/s what can move does; of the rest a bus has stopped, a pedestrian stands, and other vehicles are parked.

    Source: OpenPCDet, pcdet/datasets/nuscenes/nuscenes_utils.py.
    """
    moving = speed > 0.2
    if name in ("traffic_cone", "barrier"):
        return ""
    if name in ("motorcycle", "bicycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    if name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    return "vehicle.moving" if moving else "vehicle.stopped" if name == "bus" else "vehicle.parked"


def counted(sample: Sample) -> Sample:
    """The sample without what does not count: objects beyond their class's range, and bicycles and motorcycles whose
    centre is in a rack."""
    scan = sample.scan
    two_wheeled = [CLASSES.index(name) for name in ("bicycle", "motorcycle")]

    def kept(boxes, classes):
        near = np.linalg.norm(boxes[:, :2] - sample.vehicle, axis=1) < np.array(list(RANGES.values()))[classes]
        parked = np.zeros(len(boxes), bool)
        for rack in sample.racks:
            parked |= inside_box(boxes, rack) & np.isin(classes, two_wheeled)
        return near & ~parked

    found, true = kept(scan.boxes, scan.classes), kept(scan.true_boxes, scan.true_classes)
    scan = Scan(
        scan.boxes[found], scan.scores[found], scan.classes[found], scan.true_boxes[true], scan.true_classes[true]
    )
    return sample._replace(scan=scan, attributes=sample.attributes[found], true_attributes=sample.true_attributes[true])


def match_errors(samples: Sequence[Sample], matches: Matches, name: str) -> np.ndarray:
    """The `ERRORS` of the right detections of a class, in the order of `matches`: float [r, 5].

    NaN where the true velocity is not known or the true object has no attribute. Barriers look the same from both ends:
    their orientation is known up to half a turn.
    """
    right = np.flatnonzero(matches.true >= 0)
    period = np.pi if name == "barrier" else 2 * np.pi
    errors = np.zeros((len(right), len(ERRORS)))
    for row, place in enumerate(right):
        sample = samples[matches.scans[place]]
        i, j = matches.found[place], matches.true[place]
        box, true = sample.scan.boxes[i], sample.scan.true_boxes[j]
        shared = np.minimum(box[3:6], true[3:6]).prod()
        turn = (true[6] - box[6] + period / 2) % period - period / 2
        wanted = sample.true_attributes[j]
        errors[row] = (
            np.linalg.norm(box[:2] - true[:2]),
            1 - shared / (box[3:6].prod() + true[3:6].prod() - shared),
            abs(turn),
            np.linalg.norm(box[7:9] - true[7:9]),
            float(sample.attributes[i] != wanted) if wanted else np.nan,
        )
    return errors


def class_errors(samples: Sequence[Sample], name: str) -> dict[str, float | None]:
    """The five errors of one class, None where they are not defined.

    Detections match within 2 m. Of each error, the mean over the matches so far (those that are NaN left out; 0 before
    the first, 1 if all are) is a function of the score, taken at the scores at which recalls of 0.11, 0.12, ... up to
    the highest are reached; the result is the mean over these. It is 1 if recall 0.11 is not reached.
    """
    matches = match([sample.scan for sample in samples], CLASSES.index(name), _ERROR_DISTANCE)
    hits = matches.true >= 0
    first, last, scores, errors = round(100 * LEAST) + 1, 0, np.zeros(101), np.zeros((0, len(ERRORS)))
    if hits.any():
        errors = match_errors(samples, matches, name)
        recalls = np.cumsum(hits) / matches.count
        scores = np.interp(np.linspace(0, 1, 101), recalls, matches.scores, right=0)
        last = int(np.flatnonzero(scores).max(initial=0))
    result: dict[str, float | None] = {}
    for error, values in zip(ERRORS, errors.T, strict=True):
        if error in _UNDEFINED.get(name, ()):
            result[error] = None
        elif last < first:
            result[error] = 1.0
        else:
            known = ~np.isnan(values)
            means = np.nancumsum(values) / np.maximum(np.cumsum(known), 1) if known.any() else np.ones(len(values))
            curve = np.interp(scores[::-1], matches.scores[hits][::-1], means[::-1])[::-1]
            result[error] = float(curve[first : last + 1].mean())
    return result


def _check_counts(samples: Sequence[Sample]) -> None:
    for number, sample in enumerate(samples):
        if len(sample.scan.boxes) > MAX_DETECTIONS:
            raise ValueError(
                f"nuscenes: sample {number} has {len(sample.scan.boxes)} detections; nuScenes allows "
                f"{MAX_DETECTIONS}. Lower the model's suppression.detections."
            )


def nuscenes_metrics(samples: Sequence[Sample]) -> dict[str, Any]:
    """The metric over all key frames of a split.

    Args:
      samples: one for each key frame, also for those in which nothing was found.
    Returns:
      {"nds": (5 mean_ap + sum over the five of max(0, 1 - mean error)) / 10,
       "mean_ap": the mean over classes and `DISTANCES`, "mean_errors": {error: mean over the classes that have it},
       "ap": {class: mean over the distances}, "ap_within": {class: {distance: value}}, "errors": {class: {error: value
       or None}}}. A class that does not occur has an average precision of 0 and errors of 1.
    Raises:
      ValueError: for a sample with more than 500 detections.
    """
    _check_counts(samples)
    samples = [counted(sample) for sample in samples]
    scans = [sample.scan for sample in samples]
    within = {
        name: {f"{d:g}": float(np.nan_to_num(average_precision(scans, number, d))) for d in DISTANCES}
        for number, name in enumerate(CLASSES)
    }
    precisions = {name: float(np.mean(list(values.values()))) for name, values in within.items()}
    errors = {name: class_errors(samples, name) for name in CLASSES}
    means = {
        error: float(np.mean([value for each in errors.values() if (value := each[error]) is not None]))
        for error in ERRORS
    }
    mean_ap = float(np.mean(list(precisions.values())))
    gained = _AP_WEIGHT * mean_ap + sum(max(0.0, 1 - value) for value in means.values())
    return {
        "nds": gained / (_AP_WEIGHT + len(ERRORS)),
        "mean_ap": mean_ap,
        "mean_errors": means,
        "ap": precisions,
        "ap_within": within,
        "errors": errors,
    }


def nuscenes_table(metrics: dict[str, Any]) -> str:
    """The metrics of `nuscenes_metrics` as a Markdown table, a class a row."""

    def row(*cells):
        return "| " + " | ".join("" if one is None else one if isinstance(one, str) else f"{one:.3f}" for one in cells)

    heads = ("", "AP", *(f"AP {d:g} m" for d in DISTANCES), *(f"{error} error" for error in ERRORS))
    lines = [row(*heads), "|---" * len(heads)]
    for name in CLASSES:
        within = metrics["ap_within"][name].values()
        lines.append(row(name, metrics["ap"][name], *within, *metrics["errors"][name].values()))
    blank = [None] * len(DISTANCES)
    lines.append(row("mean", metrics["mean_ap"], *blank, *metrics["mean_errors"].values()))
    return "".join(f"{line} |\n" for line in [*lines, row("NDS", metrics["nds"], *[None] * (len(heads) - 2))])


def write_results(path: str | os.PathLike, tokens: Sequence[str], samples: Sequence[Sample]) -> None:
    """Writes detections as nuScenes' evaluation server and its devkit read them: whole, or not at all.

    {"meta": {"use_camera": false, "use_lidar": true, "use_radar": false, "use_map": false, "use_external": false},
     "results": {token: [{"sample_token": token, "translation": [x, y, z], "size": [width, length, height],
     "rotation": [w, x, y, z], "velocity": [vx, vy], "detection_name": class, "detection_score": 0 to 1,
     "attribute_name": "" for none}, ...], ...}}, in metres and the global frame; boxes stand upright, so that their
    quaternion is (cos(heading / 2), 0, 0, sin(heading / 2)).

    Args:
      path: of the file.
      tokens: of the samples, all those of a split.
      samples: what was found; the rest of them is not used.
    Raises:
      ValueError: for a sample with more than 500 detections.
      DataError: for a detection with a NaN or an infinity, which JSON does not have.
    Source: nuScenes devkit, python-sdk/nuscenes/eval/detection/README.md.
    """
    _check_counts(samples)
    for token, sample in zip(tokens, samples, strict=True):
        if not (np.isfinite(sample.scan.boxes).all() and np.isfinite(sample.scan.scores).all()):
            raise DataError(
                f"nuscenes: sample {token!r} has a detection with a NaN or an infinity; wanted numbers. The model has "
                "diverged: take an earlier checkpoint."
            )
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A sample at a time: as objects, the millions of rows of a split are many times the file.
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(f'{{"meta": {json.dumps(_META)}, "results": {{')
            for number, (token, sample) in enumerate(zip(tokens, samples, strict=True)):
                rows = [_result(token, *one) for one in zip(*sample.scan[:3], sample.attributes, strict=True)]
                file.write(f"{', ' if number else ''}{json.dumps(token)}: {json.dumps(rows)}")
            file.write("}}\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _result(token: str, box: np.ndarray, score: float, number: int, attribute: str) -> dict[str, Any]:
    x, y, z, length, width, height, heading, *velocity = box.tolist()
    return {
        "sample_token": token,
        "translation": [x, y, z],
        "size": [width, length, height],
        "rotation": [math.cos(heading / 2), 0.0, 0.0, math.sin(heading / 2)],
        "velocity": velocity,
        "detection_name": CLASSES[number],
        "detection_score": float(score),
        "attribute_name": attribute,
    }
