"""LiDAR scans for segmentation: street scenes cast on the fly, readers of two benchmarks, voxels, batches.

A source gives record i as {"points": float32 [n, 4], x, y, z in metres with the sensor at 0 and z up, and intensity
about 0..1; "labels": int32 [n], IGNORE where there is none}; street scenes also have boxes. It knows its `classes`,
names and colours in the order of the labels, and `largest`, at least the points of its largest scan.

    source = semantic_kitti("kitti/dataset", "train")
    with contextlib.closing(training_batches(source, ScanOptions(), batch_size=16, seed=0)) as batches:
        batch = next(batches)  # {"coordinates": int32 [16, N, 4], "features", "labels", "count"}

A batch is groups of scans, one sparse tensor each, so that every device has its own. Their capacity N is one of three.
"""

import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lumen.evaluation.segmentation import IGNORE, NUSCENES, SEMANTIC_KITTI, STREET, Classes
from lumen.io import DataError
from lumen.sparse.tensor import CapacityError, SparseError, bucket, whole_tiles
from lumen.sparse.voxels import voxelize
from lumen.training.data import Batches, Record, make_batches

Split = Literal["train", "validation", "test"]


class ScanSource(Protocol):
    """What a source of scans has; see the module's text."""

    classes: Classes

    @property
    def largest(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


# --- Street scenes ----------------------------------------------------------------------------------------------------

SENSOR_HEIGHT = 1.73  # metres above the ground
MAX_RANGE = 80.0
_GROUND, _CAR, _POLE, _BUILDING = range(4)
# Means of the four classes' intensities; they overlap, so that intensity alone does not tell classes apart.
_INTENSITY = np.array([0.25, 0.5, 0.4, 0.35])
_INTENSITY_NOISE = 0.1
_RANGE_NOISE = 0.01
# Fewer points than this do not show what a box is.
_LEAST_POINTS = 5


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Boxes that stand on the ground.

    Attributes:
      centres: float64 [n, 2], x and y.
      sizes: float64 [n, 3], length, width, height.
      headings: float64 [n], radians from x towards y.
      labels: int32 [n].
    """

    centres: np.ndarray
    sizes: np.ndarray
    headings: np.ndarray
    labels: np.ndarray


def random_street(rng: np.random.Generator, boxes: int = 60, reach: float = 60.0) -> Boxes:
    """Half cars of 4.5 x 1.9 x 1.6 m, a quarter poles of 0.3 x 0.3 x 5 m, a quarter buildings of 8..20 m a side.

    They stand anywhere within +-reach metres, turned anyhow, but none within 2 m of the sensor.
    """
    labels = np.repeat([_CAR, _POLE, _BUILDING], [boxes - boxes // 2, boxes // 4, boxes // 2 - boxes // 4])
    sizes = np.where((labels == _CAR)[:, None], [4.5, 1.9, 1.6], [0.3, 0.3, 5.0])
    sizes[labels == _BUILDING] = rng.uniform(8, 20, (np.count_nonzero(labels == _BUILDING), 3))
    clearance = np.hypot(sizes[:, 0], sizes[:, 1]) / 2 + 2
    centres = np.zeros((boxes, 2))
    waiting = np.arange(boxes)
    while len(waiting):
        centres[waiting] = rng.uniform(-reach, reach, (len(waiting), 2))
        waiting = waiting[np.hypot(*centres[waiting].T) < clearance[waiting]]
    return Boxes(centres, sizes, rng.uniform(0, 2 * np.pi, boxes), labels.astype(np.int32))


def cast_rays(boxes: Boxes, beams: int, azimuths: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the rays of a spinning LiDAR, 1.73 m above the ground, first meet a box or the ground.

    Args:
      boxes: none of which may hold the sensor.
      beams: rays from +2.0 to -24.8 degrees of elevation, first to last.
      azimuths: rays around, from x towards y.
    Returns:
      Directions [beams, azimuths, 3] of length 1, distances [beams, azimuths] in metres, inf where nothing is met, and
      which box is met, int32 [beams, azimuths], -1 for the ground and where nothing is met.
    """
    elevation = np.deg2rad(np.linspace(2.0, -24.8, beams))[:, None]
    azimuth = np.arange(azimuths) * (2 * np.pi / azimuths)
    rise = np.broadcast_to(np.sin(elevation), (beams, azimuths))
    directions = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), rise], -1)
    distances = np.full(rise.shape, np.inf)
    np.divide(-SENSOR_HEIGHT, rise, out=distances, where=rise < 0)
    hits = np.full(rise.shape, -1, np.int32)
    for box, (centre, size, heading) in enumerate(zip(boxes.centres, boxes.sizes, boxes.headings, strict=True)):
        # Only rays within the circle around the box can meet it.
        half = np.arcsin(min(1.0, math.hypot(size[0], size[1]) / 2 / math.hypot(*centre)))
        apart = np.abs((azimuth - math.atan2(centre[1], centre[0]) + np.pi) % (2 * np.pi) - np.pi)
        near_box = np.flatnonzero(apart <= half)
        cos, sin = math.cos(heading), math.sin(heading)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])  # into the box's own axes
        origin = turn @ [-centre[0], -centre[1], SENSOR_HEIGHT]
        rays = directions[:, near_box] @ turn.T
        # A ray is inside the box where it is between all three pairs of planes.
        with np.errstate(divide="ignore", invalid="ignore"):
            low = (np.array([-size[0] / 2, -size[1] / 2, 0]) - origin) / rays
            high = (np.array([size[0] / 2, size[1] / 2, size[2]]) - origin) / rays
        enter, leave = np.minimum(low, high).max(-1), np.maximum(low, high).min(-1)
        first = (enter <= leave) & (enter > 0) & (enter < distances[:, near_box])
        distances[:, near_box] = np.where(first, enter, distances[:, near_box])
        hits[:, near_box] = np.where(first, box, hits[:, near_box])
    return directions, distances, hits


class _StreetScans:
    """Records of `street_scans`, cast when read."""

    classes = STREET

    def __init__(self, scans: int, beams: int, azimuths: int, seeds: tuple[int, int]):
        self._scans, self._beams, self._azimuths, self._seeds = scans, beams, azimuths, seeds
        self.largest = beams * azimuths

    def __len__(self) -> int:
        return self._scans

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._scans:
            raise IndexError(f"street_scans: record {index} of {self._scans}.")
        rng = np.random.default_rng((*self._seeds, index))
        street = random_street(rng)
        directions, distances, hits = cast_rays(street, self._beams, self._azimuths)
        met = distances <= MAX_RANGE
        hits = hits[met]
        labels = np.where(hits >= 0, street.labels[hits], _GROUND)
        measured = distances[met] + rng.normal(0, _RANGE_NOISE, len(labels))
        intensity = np.clip(_INTENSITY[labels] + rng.normal(0, _INTENSITY_NOISE, len(labels)), 0, 1)
        points = np.concatenate([directions[met] * measured[:, None], intensity[:, None]], 1)
        boxes = np.zeros((len(street.labels), 9), np.float32)
        boxes[:, :2], boxes[:, 2] = street.centres, street.sizes[:, 2] / 2 - SENSOR_HEIGHT
        # Nothing tells the ends of a box apart: headings are those within a quarter turn of x.
        boxes[:, 3:6], boxes[:, 6] = street.sizes, (street.headings + np.pi / 2) % np.pi - np.pi / 2
        seen = np.bincount(hits[hits >= 0], minlength=len(boxes)) >= _LEAST_POINTS
        names = np.array(list(STREET))[street.labels]
        return {"points": points.astype(np.float32), "labels": labels, "boxes": boxes[seen], "names": names[seen]}


def street_scans(split: Split, *, scans: int, beams: int = 64, azimuths: int = 2048, seed: int = 0) -> ScanSource:
    """Scans of made-up streets, a new one each: ground, cars, poles and buildings, and the boxes of the latter three.

    A spinning sensor with the beams of an HDL-64E, 80 m far, measures distances with noise of 1 cm. A full scan has
    about 126 000 points and 85 000 voxels of 0.05 m. Its levels under k2s2 have 1, 0.60, 0.30, 0.13 and 0.05 times as
    many, with 4.0, 5.0, 6.3, 7.4 and 7.4 present in a 3 x 3 x 3 window.

    "boxes", float32 [m, 9], see `lumen.sparse.boxes`, and "names", [m], are of what at least 5 points are on. Nothing
    moves, so velocities are zero, and headings are in [-pi / 2, pi / 2), because both ends of a box look the same.

    Args:
      split: another split, other streets.
      scans: number of records; record i depends on (seed, split, i) alone.
      beams, azimuths: rays; fewer make a smaller scan of the same view.
      seed: >= 0; another seed, other streets.
    Raises:
      ValueError: for an unknown split or numbers out of range.
    """
    _check_split("street_scans", split, ("train", "validation", "test"))
    if min(scans, beams, azimuths) < 1 or seed < 0:
        raise ValueError(
            f"street_scans: scans={scans}, beams={beams}, azimuths={azimuths}, seed={seed}; wanted at least 1, 1, 1 "
            "and 0."
        )
    return _StreetScans(scans, beams, azimuths, (seed, ("train", "validation", "test").index(split)))


# --- Scans on disk ----------------------------------------------------------------------------------------------------


def read_scan(path: str | os.PathLike, *, columns: int = 4, name: str = "read_scan") -> np.ndarray:
    """The first four columns, x, y, z and intensity, of a file of float32 rows: [n, 4].

    Args:
      path: of the file; SemanticKITTI has 4 columns, nuScenes 5.
      columns: of a row.
      name: of the reader, for messages.
    Raises:
      FileNotFoundError: there is no such file.
      DataError: the file is cut off, empty, or holds numbers that are not finite.
    """
    path = Path(path)
    content, row = path.read_bytes(), 4 * columns
    if len(content) % row:
        raise DataError(
            f"{name}: {path} has {len(content)} bytes; wanted a multiple of {row}, a point being {columns} float32. It "
            "is cut off, or of another format: restore it from its source."
        )
    points = np.frombuffer(content, "<f4").reshape(-1, columns)[:, :4]
    finite = np.isfinite(points).all(1)
    if not len(points) or not finite.all():
        fault = f"row {finite.argmin()} is {points[finite.argmin()].tolist()}" if len(points) else "it is empty"
        raise DataError(
            f"{name}: {path}: {fault}; wanted points with finite coordinates. Restore the file from its source, or "
            "remove it and its labels."
        )
    return points


class _ScanFiles:
    """Records of files: float32 rows of points, and a label of one integer type per point."""

    def __init__(
        self,
        name: str,
        files: Sequence[tuple[Path, Path | None]],
        classes: Classes,
        *,
        columns: int,
        label_dtype: str,
        label_map: np.ndarray,
        intensity_unit: float = 1.0,
    ):
        self._name, self._files, self.classes = name, files, classes
        self._columns, self._label_dtype, self._label_map = columns, label_dtype, label_map
        self._intensity_unit = intensity_unit

    @property
    def largest(self) -> int:
        return max(points.stat().st_size for points, _ in self._files) // (4 * self._columns)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self._files):
            raise IndexError(f"{self._name}: record {index} of {len(self._files)}.")
        scan, labels = self._files[index]
        points = read_scan(scan, columns=self._columns, name=self._name)
        points = points / np.array([1, 1, 1, self._intensity_unit], np.float32)
        return {"points": points, "labels": self._read_labels(labels, len(points), scan)}

    def _read_labels(self, path: Path | None, points: int, scan: Path) -> np.ndarray:
        if path is None:
            return np.full(points, IGNORE, np.int32)
        dtype = np.dtype(self._label_dtype)
        size = path.stat().st_size
        if size != points * dtype.itemsize:
            raise DataError(
                f"{self._name}: {path} has {size} bytes, {size / dtype.itemsize:g} labels, and {scan} has {points} "
                f"points; wanted {points * dtype.itemsize} bytes, one {dtype.name} per point. Restore both from their "
                "source."
            )
        raw = np.fromfile(path, dtype).astype(np.int64) & 0xFFFF  # SemanticKITTI has instances above
        labels = self._label_map[np.minimum(raw, len(self._label_map) - 1)]
        unknown = (labels < 0) | (raw >= len(self._label_map))
        if unknown.any():
            raise DataError(
                f"{self._name}: {path} has the labels {np.unique(raw[unknown])[:8].tolist()}, which the data set does "
                "not define; wanted its original labels, not ones mapped already."
            )
        return labels


SEMANTIC_KITTI_SPLITS = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "validation": ("08",),
    "test": tuple(str(number) for number in range(11, 22)),
}
# The labels in files that are no class of their own.
_SEMANTIC_KITTI_OTHERS = {
    0: "unlabeled",
    1: "outlier",
    13: "bus",
    16: "on-rails",
    52: "other-structure",
    60: "lane-marking",
    99: "other-object",
    252: "car",
    253: "bicyclist",
    254: "person",
    255: "motorcyclist",
    256: "on-rails",
    257: "bus",
    258: "truck",
    259: "other-vehicle",
}
_SEMANTIC_KITTI_IDS = (10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81)


def semantic_kitti_label_map(name: Literal["spvnas", "benchmark"]) -> np.ndarray:
    """int32 [260]: class 0..18 of each label in a file, IGNORE for those that do not count, -1 for undefined ones.

    Both maps give moving objects the class of their kind. "benchmark" also makes other vehicles of buses and of what
    runs on rails, and road of lane markings, as the benchmark's own evaluation does; "spvnas" ignores these.
    Source: core/datasets/semantic_kitti.py of mit-han-lab/spvnas (which calls undefined labels cars);
      config/semantic-kitti.yaml of PRBonn/semantic-kitti-api.
    """
    if name not in ("spvnas", "benchmark"):
        raise ValueError(f"semantic_kitti: label_map={name!r}; wanted 'spvnas' or 'benchmark'.")
    classes = {kind: number for number, kind in enumerate(SEMANTIC_KITTI)}
    merged = {"bus": "other-vehicle", "on-rails": "other-vehicle", "lane-marking": "road"}
    names = dict(zip(_SEMANTIC_KITTI_IDS, SEMANTIC_KITTI, strict=True)) | _SEMANTIC_KITTI_OTHERS
    table = np.full(260, -1, np.int32)
    for label, kind in names.items():
        kind = merged.get(kind, kind) if name == "benchmark" else kind
        table[label] = classes.get(kind, IGNORE)
    return table


def semantic_kitti(
    root: str | os.PathLike, split: Split, *, label_map: Literal["spvnas", "benchmark"] = "spvnas"
) -> ScanSource:
    """SemanticKITTI: root/sequences/NN/velodyne/*.bin, float32 [n, 4], and labels/*.label, uint32 [n], of 19 classes.

    Sequences 00-07, 09 and 10 are for training (19 130 scans), 08 for validation (4 071), 11-21 for the test (20 351),
    whose labels are not published: there all are IGNORE.

    Args:
      root: the folder with `sequences`, usually called dataset.
      split: which sequences.
      label_map: see `semantic_kitti_label_map`.
    Raises:
      FileNotFoundError: a missing folder or label file.
      ValueError: an unknown split or label map.
      DataError: when a record is read, a damaged file.
    """
    _check_split("semantic_kitti", split, tuple(SEMANTIC_KITTI_SPLITS))
    table = semantic_kitti_label_map(label_map)
    files: list[tuple[Path, Path | None]] = []
    for sequence in SEMANTIC_KITTI_SPLITS[split]:
        folder = Path(root) / "sequences" / sequence
        scans = _listed("semantic_kitti", folder / "velodyne", ".bin")
        if split == "test":
            files += [(scan, None) for scan in scans]
            continue
        labels = [folder / "labels" / f"{scan.stem}.label" for scan in scans]
        _check_labels("semantic_kitti", labels, _listed("semantic_kitti", folder / "labels", ".label"))
        files += zip(scans, labels, strict=True)
    return _ScanFiles("semantic_kitti", files, SEMANTIC_KITTI, columns=4, label_dtype="<u4", label_map=table)


# The validation scenes of nuScenes; all others of its two versions with labels are for training.
NUSCENES_VALIDATION = {
    "v1.0-trainval": frozenset(
        f"scene-{number:04d}"
        for first, last in (
            *((3, 3), (12, 18), (35, 36), (38, 39), (92, 110), (221, 221), (268, 278), (329, 332), (344, 346)),
            *((519, 524), (552, 565), (625, 627), (629, 630), (632, 638), (770, 771), (775, 775), (777, 778)),
            *((780, 784), (794, 800), (802, 802), (904, 917), (919, 931), (962, 963), (966, 969), (971, 972)),
            (1059, 1073),
        )
        for number in range(first, last + 1)
    ),
    "v1.0-mini": frozenset({"scene-0103", "scene-0916"}),
}
# The class of each of the 32 labels in files, in their order.
_NUSCENES_LABELS = (
    *("noise", "animal", "pedestrian", "pedestrian", "pedestrian", "personal mobility", "pedestrian", "stroller"),
    *("wheelchair", "barrier", "debris", "pushable", "traffic cone", "bicycle rack", "bicycle", "bus", "bus", "car"),
    *("construction vehicle", "ambulance", "police car", "motorcycle", "trailer", "truck", "driveable surface"),
    *("other flat", "sidewalk", "terrain", "manmade", "other static", "vegetation", "ego vehicle"),
)


def nuscenes_label_map() -> np.ndarray:
    """int32 [32]: class 0..15 of each label in a file, IGNORE for those that do not count.

    The benchmark numbers the classes 1..16, with 0 for those that do not count.
    Source: python-sdk/nuscenes/eval/lidarseg/utils.py of nutonomy/nuscenes-devkit.
    """
    classes = {name: number for number, name in enumerate(NUSCENES)}
    return np.array([classes.get(name, IGNORE) for name in _NUSCENES_LABELS], np.int32)


def nuscenes(
    root: str | os.PathLike, split: Literal["train", "validation", "test", "mini_train", "mini_validation"]
) -> ScanSource:
    """nuScenes-lidarseg: key frames of LIDAR_TOP, .pcd.bin of float32 [n, 5], and uint8 [n] labels, of 16 classes.

    The tables scene, sample, sample_data and lidarseg of root/v1.0-trainval, v1.0-test or v1.0-mini say which files
    belong together. Records are ordered by scene name and time. Intensities, 0..255 there, are divided by 255; the
    fifth column, the beam, is left out. Labels of the test split are not published: all are IGNORE.

    Raises:
      FileNotFoundError: a missing table, or no scan of the split.
      ValueError: an unknown split.
      DataError: tables that do not fit together; when a record is read, a damaged file.
    """
    splits = ("train", "validation", "test", "mini_train", "mini_validation")
    _check_split("nuscenes", split, splits)
    version = "v1.0-test" if split == "test" else "v1.0-mini" if split.startswith("mini") else "v1.0-trainval"
    tables = {name: _table(Path(root) / version / f"{name}.json") for name in ("scene", "sample", "sample_data")}
    scenes = {row["token"]: row["name"] for row in tables["scene"]}
    held_out = NUSCENES_VALIDATION.get(version, frozenset())
    wanted = {name for name in scenes.values() if (name in held_out) == split.endswith("validation")}
    samples = {row["token"]: scenes.get(row["scene_token"], "") for row in tables["sample"]}
    labels = {}
    if split != "test":
        rows = _table(Path(root) / version / "lidarseg.json")
        labels = {row["sample_data_token"]: Path(root) / row["filename"] for row in rows}
    found = []
    for row in tables["sample_data"]:
        scene = samples.get(row["sample_token"], "")
        if row["is_key_frame"] and row["filename"].startswith("samples/LIDAR_TOP/") and scene in wanted:
            if labels and row["token"] not in labels:
                raise DataError(
                    f"nuscenes: {row['filename']} has no row in {Path(root) / version / 'lidarseg.json'}; wanted one "
                    "per key frame. Unpack the tables of nuScenes-lidarseg over those of nuScenes."
                )
            found.append((scene, row["timestamp"], Path(root) / row["filename"], labels.get(row["token"])))
    if not found:
        raise FileNotFoundError(
            f"nuscenes: the tables in {Path(root) / version} name no LIDAR_TOP key frame of split {split!r}; wanted "
            "those of the complete version."
        )
    return _nuscenes_files([(scan, label) for _, _, scan, label in sorted(found, key=lambda row: row[:2])])


def nuscenes_folder(root: str | os.PathLike) -> ScanSource:
    """Scans in nuScenes' formats without its tables: root/points/NAME.pcd.bin and root/labels/NAME.bin.

    Raises:
      FileNotFoundError: a missing folder or label file.
      DataError: when a record is read, a damaged file.
    """
    scans = _listed("nuscenes_folder", Path(root) / "points", ".pcd.bin")
    labels = [Path(root) / "labels" / f"{scan.name.removesuffix('.pcd.bin')}.bin" for scan in scans]
    _check_labels("nuscenes_folder", labels, _listed("nuscenes_folder", Path(root) / "labels", ".bin"))
    return _nuscenes_files(list(zip(scans, labels, strict=True)))


def _nuscenes_files(files) -> ScanSource:
    return _ScanFiles(
        "nuscenes",
        files,
        NUSCENES,
        columns=5,
        label_dtype="u1",
        label_map=nuscenes_label_map(),
        intensity_unit=255.0,
    )


def _table(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"nuscenes: {path} is missing; wanted the tables of nuScenes and nuScenes-lidarseg there. For scans "
            "without tables use nuscenes_folder."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _listed(name: str, folder: Path, suffix: str) -> list[Path]:
    files = sorted(entry for entry in folder.iterdir() if entry.name.endswith(suffix)) if folder.is_dir() else []
    if not files:
        fault = f"holds no {suffix} files" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"{name}: {folder} {fault}; wanted the data set's files there. Unpack it there, or correct the root."
        )
    return files


def _check_labels(name: str, wanted: Sequence[Path], present: Sequence[Path]) -> None:
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {len(wanted)} scans have no labels, first {missing[0]}; wanted one label file "
            "per scan. Unpack the labels, or remove the scans."
        )


def _check_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise ValueError(f"{name}: split={split!r}; wanted one of {', '.join(map(repr, splits))}.")


# --- Augmentation and voxels ------------------------------------------------------------------------------------------


def turn_and_scale(points: np.ndarray, angle: float, scale: float) -> np.ndarray:
    """Turns points [n, 3 or more] about z, from x towards y, and scales them; other columns stay.

    (x, y, z) -> scale (x cos - y sin, x sin + y cos, z), in float64.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])  # for rows
    moved = points.copy()
    moved[:, :3] = points[:, :3] @ turn * scale
    return moved


def random_turn_and_scale(record: Record, rng: np.random.Generator) -> Record:
    """Transform: turns a scan about z by U(0, 2 pi) and scales it by U(0.95, 1.05), as SPVNAS does."""
    return record | {"points": turn_and_scale(record["points"], rng.uniform(0, 2 * np.pi), rng.uniform(0.95, 1.05))}


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """How scans become sparse tensors.

    Attributes:
      voxel_size: metres.
      spatial_shape: voxels per axis that a scan, from its lowest coordinates, has to fit into; nothing is computed for
        empty ones.
      scans_per_group: scans in a sparse tensor; a device has one.
      max_voxels: of a scan in training. From larger ones a random subset is taken, as in SPVNAS.
      capacity: rows of a group in evaluation; 0 is enough for the source's largest scans.
    """

    voxel_size: float = 0.05
    spatial_shape: tuple[int, ...] = (5120, 5120, 1024)
    scans_per_group: int = 1
    max_voxels: int = 80_000
    capacity: int = 0

    def __post_init__(self):
        if self.voxel_size <= 0:
            raise ValueError(f"voxel_size={self.voxel_size}; wanted metres above 0.")
        if len(self.spatial_shape) != 3 or min(self.spatial_shape) < 1:
            raise ValueError(f"spatial_shape={self.spatial_shape}; wanted three sizes of at least 1.")
        if min(self.scans_per_group, self.max_voxels) < 1 or self.capacity < 0:
            raise ValueError(
                f"scans_per_group={self.scans_per_group}, max_voxels={self.max_voxels}, capacity={self.capacity}; "
                "wanted at least 1, 1 and 0."
            )


def _to_voxels(record: Record, rng: np.random.Generator, *, options: ScanOptions, train: bool) -> Record:
    """Transform: points to voxels in Morton order. For evaluation nothing is left out and the points stay."""
    voxels = voxelize(record["points"], options.voxel_size, rule="round", order="morton")
    span = voxels.coordinates.max(0) + 1
    if (span > options.spatial_shape).any():
        raise SparseError(
            f"a scan spans {span.tolist()} voxels of {options.voxel_size} m and spatial_shape={options.spatial_shape}; "
            "wanted at least as many. Give a larger spatial_shape, which costs nothing, or larger voxels."
        )
    result = {
        "coordinates": voxels.coordinates,
        "features": voxels.features,
        "labels": record["labels"][voxels.first],
    }
    if not train:
        return result | {
            "inverse": voxels.inverse.astype(np.int32),
            "points": record["points"],
            "point_labels": record["labels"],
        }
    count = len(voxels.coordinates)
    if count > options.max_voxels:
        _say_subsampled(options.max_voxels)
        chosen = np.sort(rng.choice(count, options.max_voxels, replace=False))
        result = {name: rows[chosen] for name, rows in result.items()}
    return result


@functools.cache
def _say_subsampled(max_voxels: int) -> None:
    """Once per process and limit: most real scans are larger than SPVNAS's limit."""
    logging.warning("lidar: scans of more than max_voxels=%d voxels are cut to a random subset of as many.", max_voxels)


# --- Batches ----------------------------------------------------------------------------------------------------------


def capacity_ladder(largest: int, rungs: int) -> tuple[int, ...]:
    """`rungs` capacities or fewer, ascending by a factor of 1.25 to the first multiple of 128 from `largest` on."""
    return tuple(sorted({whole_tiles(largest / 1.25**step) for step in range(rungs)}))


def _collate(
    records: Sequence[Record], *, scans_per_group: int, capacities: tuple[int, ...], train: bool
) -> dict[str, np.ndarray]:
    """Joins records into groups on the lowest rung of the capacity ladder that holds them all."""
    groups = [records[i : i + scans_per_group] for i in range(0, len(records), scans_per_group)]
    counts = [sum(len(record["coordinates"]) for record in group) for group in groups]
    needed = max(counts)
    if needed > capacities[-1]:
        raise CapacityError(
            f"lidar: {scans_per_group} scans of a batch have {needed} voxels in all, and the capacity is "
            f"{capacities[-1]}; wanted at least {bucket(needed)}. Set capacity={bucket(needed)}, or larger voxels: in "
            "evaluation nothing is left out.",
            needed,
        )
    capacity = next(size for size in capacities if size >= needed)
    batch: dict[str, list[np.ndarray]] = {}
    width = 0 if train else max(sum(len(record["points"]) for record in group) for group in groups)
    for group in groups:
        joined = _join(group, train=train)
        for name, rows in joined.items():
            length = width if name in ("inverse", "points", "point_labels") else capacity
            fill = {"labels": IGNORE, "point_labels": IGNORE, "inverse": -1}.get(name, 0)
            padded = np.full((length, *rows.shape[1:]), fill, rows.dtype)
            padded[: len(rows)] = rows
            batch.setdefault(name, []).append(padded)
    stacked = {name: np.stack(rows) for name, rows in batch.items()}
    return stacked | {"count": np.array(counts, np.int32)}


def _join(group: Sequence[Record], *, train: bool) -> dict[str, np.ndarray]:
    """One group's rows, unpadded, with the scan's number before its coordinates."""
    numbered = [np.pad(r["coordinates"], ((0, 0), (1, 0)), constant_values=i) for i, r in enumerate(group)]
    joined = {"coordinates": np.concatenate(numbered)}
    names = ("features", "labels") if train else ("features", "labels", "points", "point_labels")
    for name in names:
        joined[name] = np.concatenate([record[name] for record in group])
    if not train:
        starts = np.cumsum([0, *(len(record["coordinates"]) for record in group)])
        joined["inverse"] = np.concatenate([r["inverse"] + start for r, start in zip(group, starts, strict=False)])
        joined["inverse"] = joined["inverse"].astype(np.int32)
        for name, size in (("labels", "coordinates"), ("point_labels", "points")):
            counted = np.concatenate([np.full(len(record[size]), record["mask"]) for record in group])
            joined[name] = np.where(counted, joined[name], IGNORE).astype(np.int32)
    return joined


def training_batches(
    source: ScanSource,
    options: ScanOptions,
    *,
    batch_size: int,
    seed: int,
    augment: bool = True,
    workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches:
    """An endless iterator over groups of scans, whose position can be saved; see `lumen.training.data.make_batches`.

    Coordinates are round(p / voxel_size) less their minimum, features (x, y, z, intensity) and label those of a voxel's
    first point. N is the smallest of three capacities that holds the batch, the largest one being scans_per_group x
    max_voxels; where there are several processes it is always that, for they have to agree.

    Args:
      source: of scans.
      options: how they become sparse tensors.
      batch_size: scans per update over all devices, a multiple of scans_per_group x processes.
      seed: of order, augmentation and subsets.
      augment: `random_turn_and_scale`.
      workers, process_index, process_count: as of `make_batches`.
    Returns:
      Batches of, with G = batch_size / scans_per_group / processes: "coordinates" int32 [G, N, 4], the scan's number in
      its group first; "features" float32 [G, N, 4]; "labels" int32 [G, N], IGNORE where there is none; "count" int32
      [G], rows in use. Padding is zero, its labels IGNORE.
    Raises:
      ValueError: for a batch size that does not divide; while iterating, what the source and `voxelize` raise, and for
        a scan that exceeds spatial_shape.
    """
    process_count = jax.process_count() if process_count is None else process_count
    groups = options.scans_per_group * process_count
    if batch_size < 1 or batch_size % groups:
        raise ValueError(
            f"training_batches: batch_size={batch_size} is not a positive multiple of scans_per_group="
            f"{options.scans_per_group} x {process_count} processes; use {max(1, round(batch_size / groups)) * groups}."
        )
    capacities = capacity_ladder(options.scans_per_group * options.max_voxels, 1 if process_count > 1 else 3)
    return make_batches(
        source,
        batch_size=batch_size,
        seed=seed,
        transforms=[
            *([random_turn_and_scale] if augment else []),
            functools.partial(_to_voxels, options=options, train=True),
        ],
        workers=workers,
        process_index=process_index,
        process_count=process_count,
        collate=functools.partial(_collate, scans_per_group=options.scans_per_group, capacities=capacities, train=True),
    )


def batch_spec(options: ScanOptions, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch of `training_batches` of the largest capacity."""
    groups = batch_size // options.scans_per_group
    (rows,) = capacity_ladder(options.scans_per_group * options.max_voxels, 1)
    return {
        "coordinates": jax.ShapeDtypeStruct((groups, rows, 4), jnp.int32),
        "features": jax.ShapeDtypeStruct((groups, rows, 4), jnp.float32),
        "labels": jax.ShapeDtypeStruct((groups, rows), jnp.int32),
        "count": jax.ShapeDtypeStruct((groups,), jnp.int32),
    }


def evaluation_batches(
    source: ScanSource, options: ScanOptions, *, batch_size: int | None = None, workers: int = 0
) -> Batches:
    """One pass over whole scans, made by this process for itself: no augmentation, no subsets.

    Args:
      source: of scans.
      options: as in training. The largest of three capacities is options.capacity, or else what the source's largest
        scan can need.
      batch_size: scans, a multiple of scans_per_group; None for one group.
      workers: as of `make_batches`.
    Returns:
      Batches as of `training_batches`, and for all M points of a group: "points" float32 [G, M, 4]; "point_labels"
      int32 [G, M], IGNORE in padding; "inverse" int32 [G, M], the row of each point, -1 in padding. So predictions of
      points are predictions[inverse]. Scans that fill up the last batch have no labels, for voxels nor points.
    Raises:
      ValueError: for a batch size that does not divide; while iterating, as of `training_batches`.
      CapacityError: while iterating, naming the capacity that a batch needs.
    """
    batch_size = options.scans_per_group if batch_size is None else batch_size
    if batch_size < 1 or batch_size % options.scans_per_group:
        raise ValueError(
            f"evaluation_batches: batch_size={batch_size} is not a positive multiple of scans_per_group="
            f"{options.scans_per_group}."
        )
    capacities = capacity_ladder(options.capacity or options.scans_per_group * source.largest, 3)
    return make_batches(
        source,
        batch_size=batch_size,
        seed=0,
        transforms=[functools.partial(_to_voxels, options=options, train=False)],
        repeat=False,
        workers=workers,
        process_index=0,
        process_count=1,
        collate=functools.partial(
            _collate, scans_per_group=options.scans_per_group, capacities=capacities, train=False
        ),
    )
