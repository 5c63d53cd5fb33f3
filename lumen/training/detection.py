"""Training of CenterPoint and SECOND on LiDAR scans with boxes, and their evaluation.

A source gives record i as {"points": float32 [n, C], x, y, z in metres, intensity and, of five, age in seconds;
"boxes": float32 [m, 9], see `lumen.sparse.boxes`, with velocities; "names": the class of each box}.
"""

import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from lumen.evaluation.detection import Scan, boxes_from_above, detection_metrics
from lumen.evaluation.nuscenes import CLASSES, MAX_DETECTIONS, nuscenes_metrics, nuscenes_table, write_results
from lumen.io import DataError, pretrained
from lumen.io.names.openpcdet import centerpoint_rules, second_rules
from lumen.sharding import RULES, batch_sharding, tree_shardings
from lumen.sparse.centerpoint import CenterPoint, CenterPointConfig, centerpoint_loss, decode
from lumen.sparse.detection import VoxelGrid, batch_spec
from lumen.sparse.second import SECOND, SECONDConfig, decode_anchors, second_loss
from lumen.sparse.tensor import check_capacity, morton_key
from lumen.sparse.tuning import Tuning
from lumen.sparse.voxels import hard_voxelize
from lumen.training.config import ConfigError
from lumen.training.data import Batches, Record, make_batches
from lumen.training.lidar import capacity_ladder, street_scans
from lumen.training.loop import Pictures, Task
from lumen.training.nuscenes import Split, Version, class_balanced, nuscenes_objects, paste, training_objects
from lumen.training.segmentation import advise_on_missing_rows, groups_of, over_groups
from lumen.training.vq import sized

Config = CenterPointConfig | SECONDConfig


# --- Sources ----------------------------------------------------------------------------------------------------------


class _SceneFiles:
    """Records of `scene_folder`, read one by one."""

    def __init__(self, files: Sequence[pathlib.Path]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = self._files[index]
        try:
            with np.load(file, allow_pickle=False) as arrays:
                points, boxes, names = (arrays[name] for name in ("points", "boxes", "names"))
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise DataError(
                f"scene_folder: {file} cannot be read ({error}); wanted an .npz file of points, boxes and names."
            ) from error
        if points.ndim != 2 or boxes.ndim != 2 or boxes.shape[1] != 9 or names.shape != boxes.shape[:1]:
            raise DataError(
                f"scene_folder: {file} holds points {list(points.shape)}, boxes {list(boxes.shape)} and names "
                f"{list(names.shape)}; wanted [n, C], [m, 9] and [m]."
            )
        return {"points": points.astype(np.float32), "boxes": boxes.astype(np.float32), "names": names}


def scene_folder(root: str | pathlib.Path):
    """Scans in a folder, an .npz file each, in the order of their names: whatever a data set was converted into.

    A file holds points [n, C], boxes [m, 9] (x, y, z, length, width, height, heading, and velocity, which may be NaN)
    in the sensor's frame, and names, strings [m].

    Raises:
      FileNotFoundError: if there are none.
      DataError: when a record is read that is not as described.
    """
    files = sorted(pathlib.Path(root).glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"scene_folder: {root} holds no .npz files; wanted one per scan.")
    return _SceneFiles(files)


@dataclasses.dataclass(frozen=True)
class DetectionData:
    """Which scans.

    Attributes:
      name: "street_scenes" are `street_scans`, made up as they are read, without their intensities: what is what has to
        be seen in shapes; "scene_folder" is path/train and path/val of .npz files; "nuscenes" is `nuscenes_objects`.
      path: of the folder.
      version, sweeps: of nuScenes: which tables, and how many frames' points are joined. v1.0-test has no boxes: it is
        there for evaluation only, and what was found is written, not measured.
      balanced: of nuScenes: train on `class_balanced` scans.
      pasted: of nuScenes: {class: objects that a scan has at least}; missing ones come from other scans, see `paste`.
      objects: folder of those objects, which is written at the first use; empty for one in the workdir.
      scans: of made-up streets in training; held out are an eighth of it.
      beams, azimuths: of their sensor.
      workers: processes that prepare batches; 0 uses threads.
    """

    name: Literal["street_scenes", "scene_folder", "nuscenes"] = "street_scenes"
    path: str = ""
    version: Version = "v1.0-trainval"
    sweeps: int = 10
    balanced: bool = False
    pasted: dict[str, int] = dataclasses.field(default_factory=dict)
    objects: str = ""
    scans: int = 256
    beams: int = 64
    azimuths: int = 2048
    workers: int = 0

    def __post_init__(self):
        if (self.balanced or self.pasted) and self.name != "nuscenes":
            raise ValueError(
                f"balanced={self.balanced} and pasted={self.pasted} with name={self.name!r}; wanted name='nuscenes', "
                "or neither."
            )

    def check(self, config: Config) -> None:
        """Raises a ConfigError if the model's classes, their pasted ones or its detections do not go with the data."""
        classes = config.classes
        if self.name == "nuscenes" and (foreign := sorted(set(classes) - set(CLASSES))):
            raise ConfigError(
                f"detection.model has the classes {', '.join(foreign)}, which nuScenes does not; wanted some of "
                f"{', '.join(CLASSES)}."
            )
        if self.name == "nuscenes" and config.detections > MAX_DETECTIONS:
            raise ConfigError(
                f"detection.model finds up to {config.detections} objects in a scan; nuScenes counts "
                f"{MAX_DETECTIONS}. Lower suppression.detections, which is {config.suppression.detections}."
            )
        if unknown := sorted(set(self.pasted) - set(classes)):
            raise ConfigError(
                f"detection.data.pasted names {', '.join(unknown)}; wanted classes of the model: {', '.join(classes)}."
            )

    def metrics(
        self, source, found: Sequence[Scan], classes: Sequence[str], folder: pathlib.Path | None = None
    ) -> dict[str, Any]:
        """What is measured of the first scans of a source: what the data set's benchmark does, where it has one.

        In the folder, if one is given, nuScenes' benchmark leaves its table, nuscenes.md, and if the scans are all of
        the source the file to submit, nuscenes_results.json.
        """
        if self.name != "nuscenes":
            return detection_metrics(found, classes)
        samples = [source.sample(index, one, classes) for index, one in enumerate(found)]
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        if folder and len(samples) == len(source):
            write_results(folder / "nuscenes_results.json", source.tokens, samples)
        elif folder:
            logging.warning(
                "nuscenes: %d of %d scans were run; nuscenes_results.json, which is of all, is not written. Set "
                "config.detection.evaluation_scans=0.",
                len(samples),
                len(source),
            )
        if self.version == "v1.0-test":
            logging.warning("nuscenes: v1.0-test has no annotations, so that nothing is measured.")
            return {}
        metrics = nuscenes_metrics(samples)
        if folder:
            (folder / "nuscenes.md").write_text(nuscenes_table(metrics), encoding="utf-8")
        return metrics

    def source(self, split: Split, seed: int):
        """The scans of a split; of what is on disk, validation is also the test, but for nuScenes' v1.0-test."""
        if self.name == "nuscenes":
            part = split if split == "train" or self.version == "v1.0-test" else "validation"
            return nuscenes_objects(self.path, part, version=self.version, sweeps=self.sweeps)
        if self.name == "scene_folder":
            return scene_folder(pathlib.Path(self.path) / ("train" if split == "train" else "val"))
        scans = self.scans if split == "train" else max(1, self.scans // 8)
        return street_scans(split, scans=scans, beams=self.beams, azimuths=self.azimuths, seed=seed)


# --- From records to batches ------------------------------------------------------------------------------------------


def without_intensity(record: Record, rng: np.random.Generator) -> Record:
    """Transform: intensities that say nothing, U(0, 1), and the age 0 of points."""
    points = record["points"]
    noise = rng.uniform(0, 1, len(points))
    return {**record, "points": np.column_stack([points[:, :3], noise, 0 * noise]).astype(np.float32)}


def augment(record: Record, rng: np.random.Generator) -> Record:
    """Transform: the whole scene mirrored along x and along y by chance, turned by up to pi / 4, scaled by 0.9 to 1.1
    and moved by 0.5 m (a standard deviation along each axis), with all boxes and velocities.

    Source: OpenPCDet's nuScenes configuration.
    """
    points, boxes = record["points"].copy(), record["boxes"].copy()
    for axis in (0, 1):
        if rng.integers(2):
            points[:, axis], boxes[:, axis], boxes[:, 7 + axis] = -points[:, axis], -boxes[:, axis], -boxes[:, 7 + axis]
            boxes[:, 6] = (math.pi if axis == 0 else 0) - boxes[:, 6]
    angle, scale, moved = rng.uniform(-math.pi / 4, math.pi / 4), rng.uniform(0.9, 1.1), rng.normal(0, 0.5, 3)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    for rows in (points[:, :2], boxes[:, :2], boxes[:, 7:9]):
        rows[:] = rows @ turn.T * scale
    points[:, 2] *= scale
    boxes[:, 2:6] *= scale
    boxes[:, 6] += angle
    points[:, :3] += moved
    boxes[:, :3] += moved
    return {**record, "points": points, "boxes": boxes}


def to_voxels(record: Record, rng: np.random.Generator, *, config: Config, train: bool) -> Record:
    """Transform: points to voxels in Morton order, and the boxes of the config's classes that are centred in its grid.

    The points are shuffled first, as the limits of voxels and of points per voxel keep the first ones; in evaluation
    too, or there they would be those of the latest sweeps.
    """
    grid: VoxelGrid = config.grid
    points = rng.permutation(record["points"])
    channels = config.backbone.inputs
    if points.shape[1] < channels:
        raise ValueError(
            f"detection: points have {points.shape[1]} columns and the model reads {channels}; wanted at least as "
            f"many. Set model.backbone.inputs={points.shape[1]}."
        )
    voxels = hard_voxelize(
        points[:, :channels],
        grid.voxel,
        (*grid.lower, *grid.upper),
        max_points=config.points,
        max_voxels=config.voxels if train else config.evaluation_voxels,
    )
    coordinates = voxels.coordinates[:, ::-1].astype(np.int32)
    order = np.lexsort(morton_key(np.pad(coordinates, ((0, 0), (1, 0))), grid.spatial_shape)[::-1])
    boxes = record["boxes"]
    ids = {name: i for i, name in enumerate(config.classes)}
    classes = np.array([ids.get(str(name), -1) for name in record["names"]], np.int32)
    kept = (classes >= 0) & ((boxes[:, :3] >= grid.lower) & (boxes[:, :3] < grid.upper)).all(1)
    result = {
        "coordinates": coordinates[order],
        "features": voxels.features[order],
        "boxes": boxes[kept, : config.columns],
        "classes": classes[kept],
    }
    return result if train else result | {"points": record["points"]}


def collate(
    records: Sequence[Record], *, scans_per_group: int, capacities: tuple[int, ...], boxes: int
) -> dict[str, Any]:
    """Joins records into groups on the lowest capacity that holds them all; of boxes the first `boxes` are kept."""
    groups = [records[i : i + scans_per_group] for i in range(0, len(records), scans_per_group)]
    counts = [sum(len(record["coordinates"]) for record in group) for group in groups]
    capacity = next(size for size in capacities if size >= max(counts))
    columns, channels = records[0]["boxes"].shape[1], records[0]["features"].shape[1]
    batch = {
        "coordinates": np.zeros((len(groups), capacity, 4), np.int32),
        "features": np.zeros((len(groups), capacity, channels), np.float32),
        "count": np.array(counts, np.int32),
        "boxes": np.zeros((len(groups), scans_per_group, boxes, columns), np.float32),
        "classes": np.full((len(groups), scans_per_group, boxes), -1, np.int32),
    }
    for g, group in enumerate(groups):
        begin = 0
        for s, record in enumerate(group):
            end, number = begin + len(record["coordinates"]), min(len(record["boxes"]), boxes)
            batch["coordinates"][g, begin:end, 0], batch["coordinates"][g, begin:end, 1:] = s, record["coordinates"]
            batch["features"][g, begin:end] = record["features"]
            batch["boxes"][g, s, :number] = record["boxes"][:number]
            batch["classes"][g, s, :number] = record["classes"][:number]
            begin = end
    return batch


# --- The task ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DetectionOptions:
    """What a detection run has beside `TrainConfig`.

    Attributes:
      detector: the kind of model.
      model: {"size": "nuscenes", "waymo" or "debug"; of "second" "kitti" or "debug"} and whatever differs, such as
        {"backbone": {"residual": False}}.
      data: which scans.
      scans_per_group: scans in a sparse tensor; a device has one.
      boxes: per scan at most.
      augment: mirror, turn, scale and move scenes in training.
      tuning: a file of tuned dataflows; empty for the default ones.
      evaluation_scans: held-out scans of the final evaluation; 0 for all.
    """

    detector: Literal["centerpoint", "second"] = "centerpoint"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: DetectionData = dataclasses.field(default_factory=DetectionData)
    scans_per_group: int = 1
    boxes: int = 500
    augment: bool = True
    tuning: str = ""
    evaluation_scans: int = 0

    def __post_init__(self):
        if min(self.scans_per_group, self.boxes) < 1 or self.evaluation_scans < 0:
            raise ValueError(
                f"scans_per_group={self.scans_per_group}, boxes={self.boxes}, evaluation_scans="
                f"{self.evaluation_scans}; wanted at least 1, 1 and 0."
            )

    def config(self) -> Config:
        """The model's sizes."""
        kind, sizes = {
            "centerpoint": (CenterPointConfig, ("nuscenes", "waymo", "debug")),
            "second": (SECONDConfig, ("kitti", "debug")),
        }[self.detector]
        size = self.model.get("size", sizes[0])
        named = dataclasses.asdict(getattr(kind, size)()) if size in sizes else {}
        config = sized(kind, _merged(named, {"size": size, **self.model}) | {"size": size}, sizes, "detection.model")
        if not self.tuning:
            return config
        backbone = dataclasses.replace(config.backbone, dataflows=Tuning.load(self.tuning).dataflows)
        return dataclasses.replace(config, backbone=backbone)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, section by section."""
    result = dict(base)
    for name, value in changes.items():
        below = result.get(name)
        result[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def make_task(
    options: DetectionOptions, *, batch_size: int, seed: int, total_steps: int, workdir: pathlib.Path
) -> Task:
    """The parts of a run."""
    del total_steps
    config, scans = options.config(), options.scans_per_group
    options.data.check(config)
    source = functools.cache(lambda split: options.data.source(split, seed))
    if batch_size % scans:
        raise ConfigError(
            f"config.batch_size={batch_size} is no multiple of detection.scans_per_group={scans}; a group is one "
            "sparse tensor."
        )
    parts: dict[str, tuple[Any, ...]] = {
        "centerpoint": (CenterPoint, centerpoint_loss, decode, centerpoint_rules()),
        "second": (SECOND, second_loss, decode_anchors, second_rules()),
    }
    build, group_loss, read, rules = parts[options.detector]

    def spec(voxels: int):
        rows = capacity_ladder(scans * voxels, 1)[0]
        group = batch_spec(config.backbone.inputs, config.columns, scans=scans, voxels=rows, boxes=options.boxes)
        return {name: jax.ShapeDtypeStruct((batch_size // scans, *one.shape), one.dtype) for name, one in group.items()}

    def batches(split: Split, *, train: bool) -> Batches:
        many = train and jax.process_count() > 1
        voxels = config.voxels if train else config.evaluation_voxels
        data = options.data
        records: Any = source(split)
        transforms: list[Any] = []
        if train and data.pasted:
            objects = training_objects(data.objects or workdir / "objects", records, tuple(data.pasted))
            transforms.append(functools.partial(paste, objects=objects, wanted=data.pasted))
        if train and data.balanced:
            records = class_balanced(records, config.classes, seed=seed)
        transforms += [augment] if train and options.augment else []
        transforms += [without_intensity] if data.name == "street_scenes" else []
        transforms.append(functools.partial(to_voxels, config=config, train=train))
        join = functools.partial(
            collate,
            scans_per_group=scans if train else 1,
            capacities=capacity_ladder((scans if train else 1) * voxels, 1 if many else 3),
            boxes=options.boxes,
        )
        if not train:  # one scan at a time, which keeps its points
            return make_batches(
                records,
                batch_size=1,
                seed=0,
                transforms=transforms,
                repeat=False,
                process_index=0,
                process_count=1,
                collate=lambda records: join(records) | {"points": records[0]["points"]},
            )
        return make_batches(
            records,
            batch_size=batch_size,
            seed=seed,
            transforms=transforms,
            workers=data.workers,
            collate=join,
        )

    @jax.jit
    def find(model, group):
        predictions, levels = model(model.voxels(group))
        return read(predictions, config), levels

    def measure(model, split: Split, number: int, folder=None) -> tuple[dict[str, Any], Pictures]:
        results, picture = [], None
        for batch in batches(split, train=False):
            points = batch.pop("points")
            group = {name: rows[0] for name, rows in batch.items() if name != "mask"}
            found, levels = find(model, group)
            check_capacity(levels)
            boxes, scores, classes = (np.asarray(one[0]) for one in (found.boxes, found.scores, found.classes))
            there, true = classes >= 0, group["classes"][0] >= 0
            truth = group["boxes"][0][true], group["classes"][0][true]
            results.append(Scan(boxes[there], scores[there], classes[there], *truth))
            if picture is None:
                reach = max(*config.grid.upper[:2], *(-one for one in config.grid.lower[:2]))
                sure = there & (scores > 0.3)
                picture = boxes_from_above(points, Scan(boxes[sure], scores[sure], classes[sure], *truth), reach=reach)
            if number and len(results) >= number:
                break
        assert picture is not None, "a source has at least one scan"
        metrics = options.data.metrics(source(split), results, config.classes, folder)
        return metrics | {"scans": len(results)}, {"boxes": picture}

    def monitor(model, key):
        del key
        metrics, pictures = measure(model, "validation", 8)
        return {"mean_ap": metrics["mean_ap"]}, pictures

    def evaluate(model, key, workdir):
        del key
        return measure(model, "test", options.evaluation_scans, workdir / "eval" if jax.process_index() == 0 else None)

    def inference(mesh):
        layout = tree_shardings(abstract := nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))), mesh)
        model = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
        batch = {
            name: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=batch_sharding(mesh))
            for name, one in spec(config.evaluation_voxels).items()
        }

        def local(model, batch):
            return jax.tree.map(lambda *each: jnp.stack(each), *[find(model, group)[0] for group in groups_of(batch)])

        split = PartitionSpec(RULES["batch"])
        specs = {"in_specs": (PartitionSpec(), split), "out_specs": split}
        return jax.jit(jax.shard_map(local, mesh=mesh, check_vma=False, **specs)), (model, batch)

    def advise(metrics):
        rows, key = capacity_ladder(scans * config.voxels, 3)[0], "config.detection.model.backbone.level_fractions"
        return advise_on_missing_rows(metrics, key, config.backbone.level_fractions, rows)

    return Task(
        build=lambda rngs: build(config, rngs=rngs),
        loss=lambda model, batch, key, step: over_groups(group_loss, model, batch),
        batch_spec=spec(config.voxels),
        batches=lambda: batches("train", train=True),
        monitor=monitor,
        evaluate=evaluate,
        inference=inference,
        export=lambda model, workdir: pretrained.save(workdir / "model.safetensors", model, rules),
        advise=advise,
    )
