"""nuScenes for detection (arXiv:1903.11027): key frames with the sweeps before them, and the training recipe of CBGS.

    source = nuscenes_objects("nuscenes", "train")            # its tables in nuscenes/v1.0-trainval
    source[0]                 # {"points": float32 [n, 5], "boxes": float32 [m, 9], "names": [m]}
    objects = training_objects("runs/objects", source, ("bus",))           # cut out at the first call
    transform = functools.partial(paste, objects=objects, wanted={"bus": 4})       # into other scans
    source = class_balanced(source, classes, seed=0)                       # scans of rare classes come more often

Boxes are (x, y, z, length, width, height, heading, vx, vy) as in `lumen.sparse.boxes`, in the frame of the LiDAR at the
key frame. nuScenes has (width, length, height), quaternions (w, x, y, z) and the global frame.
"""

import concurrent.futures
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tqdm

from lumen.evaluation.detection import Scan, inside_box
from lumen.evaluation.nuscenes import CLASSES, Sample, likely_attribute
from lumen.io import DataError
from lumen.training.data import Record
from lumen.training.lidar import NUSCENES_VALIDATION, read_scan

Version = Literal["v1.0-trainval", "v1.0-mini", "v1.0-test"]
Split = Literal["train", "validation", "test"]

# The classes of the detection task; other categories keep their name, which is none of a class.
_CATEGORIES = {
    "movable_object.barrier": "barrier",
    "movable_object.trafficcone": "traffic_cone",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}
_RACK = "static_object.bicycle_rack"
# Seconds between two annotations up to which their difference is a velocity; twice that across one in the middle.
_LONGEST_STEP = 1.5
# Returns of a sweep that are so near the sensor along x and along y, metres, come from the vehicle.
_VEHICLE_RADIUS = 1.0
# Objects with fewer points do not show what they are and are not pasted.
_LEAST_POINTS = 5


# --- Tables -----------------------------------------------------------------------------------------------------------


class _Tables:
    """The JSON tables of a release in a folder, whose rows name each other by tokens."""

    def __init__(self, folder: Path):
        self._folder = folder

    def rows(self, name: str, fields: Sequence[str], keep: Callable[[dict[str, Any]], bool] | None = None):
        """The named fields of a table's rows that `keep` wants. Others are dropped as they are parsed: some tables have
        millions of rows, of which one sensor needs a seventh."""
        path = self._folder / f"{name}.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"nuscenes: {path} is missing; wanted the tables of nuScenes there. Unpack its metadata archive, or "
                "correct the path and the version."
            )

        def read(row):
            return tuple(row[field] for field in fields) if keep is None or keep(row) else None

        try:
            return [row for row in json.loads(path.read_bytes(), object_hook=read) if row is not None]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"nuscenes: {path} is no table with the fields {', '.join(fields)} ({error!r}); wanted a list of "
                "objects. It is cut off, or of another release: unpack it again."
            ) from error

    def find[Row](self, table: Mapping[str, Row], name: str, token: str, by: str) -> Row:
        """What a table, {token: row}, has for a token that `by` names."""
        if token not in table:
            raise DataError(
                f"nuscenes: {by} of {self._folder} names the token {token!r}, which {name}.json does not have; wanted "
                "tables of one release. Unpack all of them again."
            )
        return table[token]


def rotation(quaternions) -> np.ndarray:
    """Rotation matrices [..., 3, 3] of quaternions (w, x, y, z) [..., 4] of any length but 0."""
    quaternions = np.asarray(quaternions, np.float64)
    w, x, y, z = np.moveaxis(quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def _poses(rows: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """Transforms [n, 4, 4] out of frames whose translation and rotation are given."""
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3, 3] = np.array([translation for translation, _ in rows]).reshape(-1, 3)
    poses[:, :3, :3] = rotation(np.array([turned for _, turned in rows]).reshape(-1, 4))
    return poses


def move_boxes(boxes, transform) -> np.ndarray:
    """Boxes [m, 9] in another frame: centres go through the rigid transform [4, 4], headings and velocities, both
    horizontal, through its rotation, of which the part along the new x and y stays."""
    turn = transform[:3, :3]
    moved = np.array(boxes, np.float64)
    moved[:, :3] = boxes[:, :3] @ turn.T + transform[:3, 3]
    ahead = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) @ turn[:2, :2].T
    moved[:, 6] = np.arctan2(ahead[:, 1], ahead[:, 0])
    moved[:, 7:9] = boxes[:, 7:9] @ turn[:2, :2].T
    return moved


class _Annotations(NamedTuple):
    """All boxes of a split in the global frame, those of key frame i from starts[i] to starts[i + 1].

    Attributes:
      starts: integers [k + 1].
      boxes: float64 [a, 9].
      names, attributes: strings [a].
      lidar, radar: integers [a], points that nuScenes counts in the box.
    """

    starts: np.ndarray
    boxes: np.ndarray
    names: np.ndarray
    attributes: np.ndarray
    lidar: np.ndarray
    radar: np.ndarray


def _velocity(token: str, rows: Mapping[str, tuple], times: Mapping[str, float]) -> tuple[float, float]:
    """Of an annotation, between those before and after it, or between it and the one that there is; else NaN.

    Source: nuScenes devkit, python-sdk/nuscenes/nuscenes.py, box_velocity.
    """
    _, sample, _, _, here, _, _, before, after, _, _ = rows[token]
    longest = _LONGEST_STEP * (2 if before and after else 1)
    (first, start), (last, end) = (
        (rows[other][4], times[rows[other][1]]) if other else (here, times[sample]) for other in (before, after)
    )
    if not (before or after) or end - start > longest:
        return math.nan, math.nan
    return (last[0] - first[0]) / (end - start), (last[1] - first[1]) / (end - start)


def _annotations(tables: _Tables, samples: Mapping[str, int], times: Mapping[str, float]) -> _Annotations:
    """The annotations of the samples, {token: place}."""
    categories = dict(tables.rows("category", ("token", "name")))
    kinds = dict(tables.rows("instance", ("token", "category_token")))
    named = dict(tables.rows("attribute", ("token", "name")))
    fields = ("token", "sample_token", "instance_token", "attribute_tokens", "translation", "size", "rotation")
    fields = (*fields, "prev", "next", "num_lidar_pts", "num_radar_pts")
    found = tables.rows("sample_annotation", fields, lambda row: row["sample_token"] in samples)
    rows = {row[0]: row for row in found}
    for row in found:
        for other in row[7:9]:
            if other:
                tables.find(rows, "sample_annotation", other, "sample_annotation.json")
    found.sort(key=lambda row: samples[row[1]])
    boxes = np.zeros((len(found), 9))
    names, attributes = [], []
    for i, row in enumerate(found):
        category = tables.find(kinds, "instance", row[2], "sample_annotation.json")
        category = tables.find(categories, "category", category, "instance.json")
        names.append(_CATEGORIES.get(category, category))
        attributes.append(tables.find(named, "attribute", row[3][0], "sample_annotation.json") if row[3] else "")
        width, length, height = row[5]
        boxes[i, :3], boxes[i, 3:6], boxes[i, 7:] = row[4], (length, width, height), _velocity(row[0], rows, times)
    turns = rotation(np.array([row[6] for row in found]).reshape(-1, 4))
    boxes[:, 6] = np.arctan2(turns[:, 1, 0], turns[:, 0, 0])
    places = np.array([samples[row[1]] for row in found], int)
    starts = np.searchsorted(places, np.arange(len(samples) + 1))
    lidar, radar = (np.array([row[i] for row in found], int) for i in (9, 10))
    return _Annotations(starts, boxes, np.array(names, str), np.array(attributes, str), lidar, radar)


# --- The source -------------------------------------------------------------------------------------------------------


class NuScenes:
    """Records of `nuscenes_objects`."""

    def __init__(self, root: Path, version: Version, split: Split, sweeps: int):
        self._root, self.version, self.split, self.sweeps = root, version, split, sweeps
        tables = _Tables(root / version)
        held_out = NUSCENES_VALIDATION.get(version, frozenset())
        scenes = {
            token: name
            for token, name in tables.rows("scene", ("token", "name"))
            if (name in held_out) == (split == "validation")
        }
        rows = tables.rows("sample", ("token", "scene_token", "timestamp"), lambda row: row["scene_token"] in scenes)
        rows.sort(key=lambda row: (scenes[row[1]], row[2]))
        self.tokens = [token for token, _, _ in rows]
        if not self.tokens:
            raise FileNotFoundError(
                f"nuscenes: the tables in {root / version} name no sample of split {split!r}; wanted those of the "
                "complete version."
            )
        samples = {token: place for place, token in enumerate(self.tokens)}
        self._read_frames(tables, samples)
        times = {token: 1e-6 * time for token, _, time in rows}
        self._annotations = _annotations(tables, samples, times)

    def _read_frames(self, tables: _Tables, samples: Mapping[str, int]) -> None:
        """Files, times and poses of the LiDAR's frames, which frame is before each, and those of the samples."""
        lidars = {token for token, channel in tables.rows("sensor", ("token", "channel")) if channel == "LIDAR_TOP"}
        fields = ("token", "translation", "rotation")
        mounted = tables.rows("calibrated_sensor", fields, lambda row: row["sensor_token"] in lidars)
        mounted = {token: pose for (token, *_), pose in zip(mounted, _poses([r[1:] for r in mounted]), strict=True)}
        fields = ("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "filename")
        frames = tables.rows(
            "sample_data",
            (*fields, "prev", "is_key_frame"),
            lambda row: row["calibrated_sensor_token"] in mounted and row["sample_token"] in samples,
        )
        wanted = {row[2] for row in frames}
        driven = tables.rows("ego_pose", ("token", "translation", "rotation"), lambda row: row["token"] in wanted)
        driven = {token: pose for (token, *_), pose in zip(driven, _poses([r[1:] for r in driven]), strict=True)}
        places = {row[0]: place for place, row in enumerate(frames)}
        self._files = [row[5] for row in frames]
        self._times = np.array([1e-6 * row[4] for row in frames])
        vehicles = np.array([tables.find(driven, "ego_pose", row[2], "sample_data.json") for row in frames])
        self._vehicles = vehicles.reshape(-1, 4, 4)[:, :2, 3]
        self._poses = vehicles.reshape(-1, 4, 4) @ np.array([mounted[row[3]] for row in frames]).reshape(-1, 4, 4)
        self._before = np.array(
            [tables.find(places, "sample_data", row[6], "sample_data.json") if row[6] else -1 for row in frames]
        )
        self._keys = np.full(len(samples), -1)
        for place, row in enumerate(frames):
            if row[7]:
                self._keys[samples[row[1]]] = place
        if (self._keys < 0).any():
            token = self.tokens[int(np.argmin(self._keys))]
            raise DataError(
                f"nuscenes: sample {token!r} has no LIDAR_TOP key frame in sample_data.json; wanted one for each. "
                "Unpack the tables of the release again."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self.tokens):
            raise IndexError(f"nuscenes: record {index} of {len(self.tokens)}.")
        rows = self.annotated(index)
        boxes = move_boxes(self._annotations.boxes[rows], np.linalg.inv(self._poses[self._keys[index]]))
        return {
            "points": self._points(index),
            "boxes": boxes.astype(np.float32),
            "names": self._annotations.names[rows],
        }

    def _points(self, index: int) -> np.ndarray:
        key = frame = self._keys[index]
        parts = []
        for _ in range(self.sweeps):
            points = self._read(frame)
            if frame != key:
                points = points[(np.abs(points[:, :2]) >= _VEHICLE_RADIUS).any(1)]
                transform = np.linalg.inv(self._poses[key]) @ self._poses[frame]
                moved = points[:, :3] @ transform[:3, :3].T + transform[:3, 3]
                points = np.concatenate([moved.astype(np.float32), points[:, 3:]], 1)
            age = np.full((len(points), 1), self._times[key] - self._times[frame], np.float32)
            parts.append(np.concatenate([points, age], 1))
            frame = self._before[frame]
            if frame < 0:
                break
        return np.concatenate(parts)

    def _read(self, frame) -> np.ndarray:
        path = self._root / self._files[frame]
        try:
            return read_scan(path, columns=5, name="nuscenes")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"nuscenes: {path} is missing, which the tables of {self.version} name; wanted the files of all blobs "
                "in samples/ and sweeps/. Unpack the rest of them there."
            ) from error

    def annotated(self, index: int) -> np.ndarray:
        """Places among all annotations of the boxes of a record."""
        rows = np.arange(*self._annotations.starts[index : index + 2])
        return rows[self._annotations.lidar[rows] > 0]

    def names(self, rows) -> np.ndarray:
        """The names of annotations."""
        return self._annotations.names[rows]

    def sample(self, index: int, found: Scan, classes: Sequence[str]) -> Sample:
        """What `lumen.evaluation.nuscenes.nuscenes_metrics` needs of a record.

        Args:
          index: of the record.
          found: detections in the record's frame, [k, 7] or [k, 9]; without velocities they stand still. Its true boxes
            are not used: the metric has its own.
          classes: names, in the order of the detections' class ids.
        Raises:
          ValueError: if a name is no class of nuScenes.
        """
        foreign = sorted(set(classes) - set(CLASSES))
        if foreign:
            raise ValueError(
                f"nuscenes: the model has the classes {', '.join(foreign)}; wanted some of {', '.join(CLASSES)}. Set "
                "model.groups."
            )
        boxes = np.zeros((len(found.boxes), 9))
        boxes[:, : found.boxes.shape[1]] = found.boxes
        boxes = move_boxes(boxes, self._poses[self._keys[index]])
        speeds = np.hypot(boxes[:, 7], boxes[:, 8])
        guesses = [likely_attribute(classes[int(c)], float(v)) for c, v in zip(found.classes, speeds, strict=True)]
        numbers = np.array([CLASSES.index(name) for name in classes])
        everything = self._annotations
        rows = np.arange(*everything.starts[index : index + 2])
        racks = everything.boxes[rows[everything.names[rows] == _RACK]]
        rows = rows[(everything.lidar[rows] + everything.radar[rows] > 0) & np.isin(everything.names[rows], CLASSES)]
        true = np.array([CLASSES.index(name) for name in everything.names[rows]], int)
        scan = Scan(boxes, np.asarray(found.scores), numbers[found.classes], everything.boxes[rows], true)
        vehicle = self._vehicles[self._keys[index]]
        return Sample(scan, np.array(guesses, object), everything.attributes[rows], vehicle, racks)


def nuscenes_objects(
    root: str | os.PathLike,
    split: Split,
    *,
    version: Version = "v1.0-trainval",
    sweeps: int = 10,
) -> NuScenes:
    """nuScenes' key frames with boxes: root/samples, root/sweeps, and the tables in a folder named as the version.

    Record i, of the split's samples by name of the scene and time: {"points": float32 [n, 5], x, y, z in the LiDAR's
    frame at the key frame, intensity 0..255, age in seconds; "boxes": float32 [m, 9], those with at least one LiDAR
    point, velocities NaN where they are not known; "names": strings [m], classes of the detection task, or the category
    of what is none of them, such as "animal"}.

    The points are those of the key frame and then of the sweeps before it, latest first, moved from where the vehicle
    was into the frame of the key frame: sensor -> vehicle -> global -> vehicle' -> sensor'. Returns within 1 m of the
    sensor along x and y, the vehicle's own, are left out of the sweeps. A scene's first key frames have fewer sweeps
    (OpenPCDet repeats the last one).

    Args:
      root: the folder.
      split: "validation" are the 150 official scenes (two of v1.0-mini), "train" all others of the version;
        "test" is all of v1.0-test, whose annotations are not published: its records have no boxes.
      version: which tables.
      sweeps: frames whose points are joined, the key frame counted.
    Raises:
      FileNotFoundError: a missing table, or no sample of the split; when a record is read, a missing file.
      ValueError: sweeps below 1, a split that the version does not have, a table that is cut off, a token that no table
        has; when a record is read, a file that is cut off.
    Source: OpenPCDet, pcdet/datasets/nuscenes.
    """
    if sweeps < 1:
        raise ValueError(f"nuscenes: sweeps={sweeps}; wanted at least 1, the key frame.")
    if (split == "test") != (version == "v1.0-test"):
        raise DataError(
            f"nuscenes: version={version!r} has no split {split!r}; wanted 'test' of v1.0-test, which has no "
            "annotations, or 'train' or 'validation' of v1.0-trainval or v1.0-mini."
        )
    return NuScenes(Path(root), version, split, sweeps)


# --- Scans of rare classes --------------------------------------------------------------------------------------------


class _Resampled:
    """Records of a source in another number."""

    def __init__(self, source: NuScenes, places: np.ndarray):
        self._source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self.places[index])]


def class_balanced(source: NuScenes, classes: Sequence[str], *, seed: int) -> _Resampled:
    """The scans of a source, drawn with replacement so that every class gets equally many.

    With n_c scans that class c is in, and N = sum of n_c, floor(N / number of classes) of the scans with c are drawn
    for each c that occurs: once, for all epochs. A scan with several classes is in the draw of each.

    Raises:
      ValueError: if none of the classes occurs.
    Source: CBGS, arXiv:1908.09492; OpenPCDet, pcdet/datasets/nuscenes/nuscenes_dataset.py.
    """
    present = [set(source.names(source.annotated(i)).tolist()) for i in range(len(source))]
    having = [np.array([i for i, names in enumerate(present) if name in names], int) for name in classes]
    having = [places for places in having if len(places)]
    if not having:
        raise ValueError(f"class_balanced: no scan has one of {', '.join(classes)}; wanted classes of nuScenes.")
    rng = np.random.default_rng(seed)
    each = sum(map(len, having)) // len(having)
    return _Resampled(source, np.concatenate([rng.choice(places, each) for places in having]))


# --- Objects pasted into other scans ----------------------------------------------------------------------------------


def _points_in(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Places of the points in a box."""
    reach = math.hypot(box[3], box[4]) / 2
    near = np.flatnonzero(np.abs(points[:, 0] - box[0]) <= reach)
    return near[inside_box(points[near], box)]


def overlapping(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which boxes share area seen from above, bool [n, m]: those that no side of either separates."""
    away = b[None, :, :2] - a[:, None, :2]
    cos, sin = (np.abs(f(a[:, None, 6] - b[None, :, 6])) for f in (np.cos, np.sin))

    def reaches(one, other, angles):
        """Whether `other` reaches beyond the middle of the gap along both axes of `one`."""
        length, width = one[..., 3] / 2, one[..., 4] / 2
        along = np.abs(away[..., 0] * np.cos(angles) + away[..., 1] * np.sin(angles))
        across = np.abs(away[..., 1] * np.cos(angles) - away[..., 0] * np.sin(angles))
        half_length, half_width = other[..., 3] / 2, other[..., 4] / 2
        return (along < length + half_length * cos + half_width * sin) & (
            across < width + half_length * sin + half_width * cos
        )

    first, second = a[:, None], b[None]
    return reaches(first, second, first[..., 6]) & reaches(second, first, second[..., 6])


def _description(source: NuScenes, classes: Sequence[str], per_class: int) -> dict[str, Any]:
    return {
        "version": source.version,
        "split": source.split,
        "samples": len(source),
        "sweeps": source.sweeps,
        "classes": list(classes),
        "per_class": per_class,
    }


def write_objects(
    folder: str | os.PathLike, source: NuScenes, classes: Sequence[str], *, per_class: int = 20_000
) -> None:
    """Cuts the objects of a split out of its scans, for `paste`; all is written or nothing, with a progress bar.

    Of a class with more than `per_class` annotations as many are drawn at random, which keeps the files small; of the
    rare classes all are kept. Objects with fewer than 5 points, all sweeps counted, are left out.

    Writes points.bin, float32 [n, 5] relative to the centres; objects.npz with boxes, names and starts; description
    .json. A few scans are in memory at a time.

    Args:
      folder: does not exist yet. If it does at the end, because another process was faster, that one stays.
      source: the training split.
      classes: names.
    """
    folder = Path(folder)
    rng = np.random.default_rng(0)
    owners = np.concatenate([np.full(len(source.annotated(i)), i) for i in range(len(source))])
    rows = np.concatenate([source.annotated(i) for i in range(len(source))])
    names = source.names(rows)
    chosen = [np.flatnonzero(names == name) for name in classes]
    chosen = np.concatenate([rng.permutation(one)[:per_class] for one in chosen])
    wanted: dict[int, list[int]] = {}
    for place in np.sort(chosen):
        wanted.setdefault(int(owners[place]), []).append(int(rows[place]))

    def cut(index):
        record = source[index]
        objects = []
        for place in np.searchsorted(source.annotated(index), wanted[index]):
            box = record["boxes"][place]
            points = record["points"][_points_in(record["points"], box)]
            if len(points) >= _LEAST_POINTS:
                objects.append((record["names"][place], box, points - np.pad(box[:3], (0, 2))))
        return objects

    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    temporary.mkdir(parents=True)
    kept_boxes, kept_names, lengths = [], [], []
    try:
        threads = os.cpu_count() or 1
        with (
            open(temporary / "points.bin", "wb") as file,
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
            tqdm.tqdm(total=len(wanted), unit=" scans", desc="objects", disable=None) as progress,
        ):
            indices = list(wanted)
            for begin in range(0, len(indices), threads):
                block = indices[begin : begin + threads]
                for objects in pool.map(cut, block):
                    for name, box, points in objects:
                        file.write(points.astype("<f4").tobytes())
                        kept_names.append(name)
                        kept_boxes.append(box)
                        lengths.append(len(points))
                progress.update(len(block))
        if not lengths:
            raise DataError(
                f"write_objects: no object of {', '.join(classes)} has {_LEAST_POINTS} points; wanted a training split."
            )
        starts = np.concatenate([[0], np.cumsum(lengths)])
        np.savez(temporary / "objects.npz", boxes=np.array(kept_boxes), names=np.array(kept_names), starts=starts)
        text = json.dumps(_description(source, classes, per_class), indent=2) + "\n"
        (temporary / "description.json").write_text(text, encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Objects:
    """What `write_objects` wrote; points are read from the file as they are needed.

    Raises:
      DataError: if the folder's files cannot be read.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        try:
            with np.load(self._folder / "objects.npz", allow_pickle=False) as arrays:
                self.boxes, self.names, self._starts = (arrays[name] for name in ("boxes", "names", "starts"))
            self.description = json.loads((self._folder / "description.json").read_text(encoding="utf-8"))
            self._points = np.memmap(self._folder / "points.bin", "<f4", "r", shape=(int(self._starts[-1]), 5))
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise DataError(
                f"nuscenes: the objects in {self._folder} cannot be read ({error}); wanted what write_objects wrote. "
                "Remove the folder: it will be made again."
            ) from error
        self._places = {str(name): np.flatnonzero(self.names == name) for name in np.unique(self.names)}

    def __reduce__(self):  # not the arrays: another process maps the file itself
        return Objects, (self._folder,)

    def draw(self, name: str, number: int, rng: np.random.Generator) -> np.ndarray:
        """Places of `number` different objects of a class, or all of them."""
        places = self._places.get(name, np.zeros(0, int))
        return rng.choice(places, min(number, len(places)), replace=False)

    def points(self, place: int) -> np.ndarray:
        """The points of an object where it was, float32 [n, 5]."""
        points = np.array(self._points[self._starts[place] : self._starts[place + 1]])
        points[:, :3] += self.boxes[place, :3]
        return points


def training_objects(
    folder: str | os.PathLike, source: NuScenes, classes: Sequence[str], *, per_class: int = 20_000
) -> Objects:
    """The objects in a folder, which is written if it does not exist.

    Raises:
      DataError: if it was made of something else.
    """
    if not Path(folder).is_dir():
        write_objects(folder, source, classes, per_class=per_class)
    objects, wanted = Objects(folder), _description(source, classes, per_class)
    if objects.description != wanted:
        raise DataError(
            f"nuscenes: the objects in {folder} were made of {objects.description}; wanted {wanted}. Give another "
            "folder, or remove this one: it will be made again."
        )
    return objects


def paste(record: Record, rng: np.random.Generator, *, objects: Objects, wanted: Mapping[str, int]) -> Record:
    """Transform: adds objects of other scans, where they were there, until a scan has so many of each class.

    Class by class, as many as are missing are drawn; those that share area, seen from above, with a box of the scan,
    one pasted before, or another one of the draw are left out. Points of the scan within a pasted box go.

    Args:
      objects: to draw from.
      wanted: {class: objects in a scan}, in the order of the classes to fill up.
    Source: SECOND, Sensors 18(10), 2018, section 3.3; OpenPCDet, pcdet/datasets/augmentor/database_sampler.py, with
      LIMIT_WHOLE_SCENE.
    """
    boxes, pasted = record["boxes"], np.zeros(0, int)
    for name, number in wanted.items():
        missing = number - int(np.count_nonzero(record["names"] == name))
        if missing <= 0:
            continue
        drawn = objects.draw(name, missing, rng)
        candidates = objects.boxes[drawn]
        others = overlapping(candidates, candidates) & ~np.eye(len(drawn), dtype=bool)
        free = ~overlapping(candidates, boxes).any(1) & ~others.any(1)
        boxes, pasted = np.concatenate([boxes, candidates[free]]), np.concatenate([pasted, drawn[free]])
    covered = np.zeros(len(record["points"]), bool)
    for place in pasted:
        covered[_points_in(record["points"], objects.boxes[place])] = True
    points = [objects.points(place) for place in pasted]
    return {
        **record,
        "points": np.concatenate([*points, record["points"][~covered]]),
        "boxes": boxes,
        "names": np.concatenate([record["names"], objects.names[pasted]]),
    }
