"""Training of MinkUNet on LiDAR scans, voxel by voxel, and its evaluation point by point."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from lumen.evaluation.segmentation import (
    NUSCENES,
    SEMANTIC_KITTI,
    STREET,
    confusion_matrix,
    from_above,
    from_sensor,
    segmentation_metrics,
)
from lumen.layers import Statistic
from lumen.sharding import RULES, batch_sharding, tree_shardings
from lumen.sparse.minkunet import MinkUNet, MinkUNetConfig, segmentation_loss, unet_maps
from lumen.sparse.tensor import ROW_TILE, SparseTensor, check_capacity, fail_on_missing_rows
from lumen.sparse.tuning import Tuning
from lumen.training.config import ConfigError
from lumen.training.lidar import (
    IGNORE,
    ScanOptions,
    ScanSource,
    batch_spec,
    capacity_ladder,
    evaluation_batches,
    nuscenes,
    semantic_kitti,
    street_scans,
    training_batches,
)
from lumen.training.loop import Pictures, Task
from lumen.training.step import join_metrics

Split = Literal["train", "validation", "test"]


@dataclasses.dataclass(frozen=True)
class ScanData:
    """Which scans.

    Attributes:
      name: "street_scans" are made up as they are read; "semantic_kitti" and "nuscenes" are folders in those formats.
      path: of the folder.
      label_map: of SemanticKITTI, "spvnas" or "benchmark".
      scans: of made-up streets in training; held out are an eighth of it.
      beams, azimuths: of their sensor.
    """

    name: Literal["street_scans", "semantic_kitti", "nuscenes"] = "street_scans"
    path: str = ""
    label_map: Literal["spvnas", "benchmark"] = "spvnas"
    scans: int = 256
    beams: int = 64
    azimuths: int = 2048

    def source(self, split: Split, seed: int) -> ScanSource:
        """The scans of a split; what real data calls validation is also its test, whose labels are not published."""
        if self.name == "street_scans":
            scans = self.scans if split == "train" else max(1, self.scans // 8)
            return street_scans(split, scans=scans, beams=self.beams, azimuths=self.azimuths, seed=seed)
        if self.name == "semantic_kitti":
            return semantic_kitti(self.path, "train" if split == "train" else "validation", label_map=self.label_map)
        return nuscenes(self.path, "train" if split == "train" else "validation")


@dataclasses.dataclass(frozen=True)
class SegmentationOptions:
    """What a segmentation run has beside `TrainConfig`.

    Attributes:
      ratio: width of MinkUNet; 0.5, 0.64 and 1 are published.
      level_fractions: see `MinkUNetConfig`.
      data: which scans.
      scans: how they become sparse tensors.
      augment: turn and scale scans in training.
      tuning: a file of `lumen tune`; empty for the default dataflows.
      evaluation_scans: held-out scans of the final evaluation; 0 for all.
    """

    ratio: float = 1.0
    level_fractions: tuple[float, ...] = ()
    data: ScanData = dataclasses.field(default_factory=ScanData)
    scans: ScanOptions = dataclasses.field(default_factory=ScanOptions)
    augment: bool = True
    tuning: str = ""
    evaluation_scans: int = 0


def group_tensor(batch, options: ScanOptions, dtype) -> SparseTensor:
    """The sparse tensor of one group of a batch, whose arrays have no group axis any more.

    `dtype` is that of the model's weights: a sparse convolution computes in its features' type.
    """
    features = batch["features"].astype(dtype)
    return SparseTensor.create(
        features, batch["coordinates"], batch["count"], options.spatial_shape, options.scans_per_group
    )


def make_task(
    options: SegmentationOptions, *, batch_size: int, seed: int, total_steps: int, workdir: pathlib.Path
) -> Task:
    """The parts of a run."""
    del total_steps, workdir
    source = functools.cache(lambda split: options.data.source(split, seed))
    config = MinkUNetConfig.scaled(
        options.ratio,
        classes=len(class_colours(options.data.name)),
        level_fractions=options.level_fractions,
        dataflows=Tuning.load(options.tuning).dataflows if options.tuning else (),
    )
    if batch_size % options.scans.scans_per_group:
        raise ConfigError(
            f"config.batch_size={batch_size} is no multiple of lidar_segmentation.scans.scans_per_group="
            f"{options.scans.scans_per_group}; a group is one sparse tensor."
        )

    def loss(model: MinkUNet, batch, key, step):
        del key, step
        return over_groups(functools.partial(group_loss, options=options.scans), model, batch)

    @jax.jit
    def predict(model: MinkUNet, group):
        x = group_tensor(group, options.scans, model.classifier.kernel.dtype)
        maps = unet_maps(x.sites, model.config)
        return model(x, maps).argmax(-1).astype(jnp.int32), maps.levels

    def measure(model: MinkUNet, split: Split, scans: int) -> tuple[dict[str, Any], Pictures]:
        classes = class_colours(options.data.name)
        confusion, shown, shapes = np.zeros((len(classes), len(classes)), np.int64), None, set()
        scans_of_split = source(split)
        done = 0
        for batch in evaluation_batches(scans_of_split, options.scans):
            group = {name: rows[0] for name, rows in batch.items()}
            inputs = {name: group[name] for name in ("coordinates", "features", "count")}
            voxels, levels = predict(model, inputs)
            check_capacity(levels)
            shapes.add(inputs["features"].shape)
            known = group["inverse"] >= 0
            predicted = np.asarray(voxels)[group["inverse"][known]]
            truth = group["point_labels"][known]
            confusion += np.asarray(confusion_matrix(predicted, truth, len(classes)))
            if shown is None:
                first = slice(0, len(scans_of_split[0]["points"]))
                shown = (group["points"][known][first], truth[first], predicted[first])
            done += options.scans.scans_per_group
            if scans and done >= scans:
                break
        assert shown is not None, "a source has at least one scan"
        metrics = segmentation_metrics(confusion, classes) | {"scans": min(done, len(scans_of_split))}
        return metrics | {"compiled_shapes": len(shapes)}, {
            "from_above": from_above(*shown, classes),
            "from_sensor": from_sensor(*shown, classes, rows=options.data.beams),
        }

    def monitor(model, key):
        del key
        metrics, pictures = measure(model, "validation", 4)
        return {name: metrics[name] for name in ("mean_iou", "accuracy")}, pictures

    def inference(mesh):
        layout = tree_shardings(abstract := nnx.eval_shape(lambda: MinkUNet(config, rngs=nnx.Rngs(0))), mesh)
        model = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
        batch = {
            name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=batch_sharding(mesh))
            for name, spec in batch_spec(options.scans, batch_size).items()
            if name != "labels"
        }

        def one(model, group):
            return model(group_tensor(group, options.scans, model.classifier.kernel.dtype))

        def run(model, batch):
            return jax.tree.map(lambda *rows: jnp.stack(rows), *[one(model, group) for group in groups_of(batch)])

        return jax.jit(run), (model, batch)

    def advise(metrics):
        rows = capacity_ladder(options.scans.scans_per_group * options.scans.max_voxels, 3)[0]
        key = "config.lidar_segmentation.level_fractions"
        return advise_on_missing_rows(metrics, key, config.level_fractions, rows, highest=1.0)

    return Task(
        build=lambda rngs: MinkUNet(config, rngs=rngs),
        loss=loss,
        batch_spec=batch_spec(options.scans, batch_size),
        batches=lambda: training_batches(
            source("train"), options.scans, batch_size=batch_size, seed=seed, augment=options.augment
        ),
        monitor=monitor,
        evaluate=lambda model, key, workdir: measure(model, "test", options.evaluation_scans),
        inference=inference,
        advise=advise,
    )


def class_colours(name: str):
    """The classes of a data set, with their colours."""
    return {"street_scans": STREET, "semantic_kitti": SEMANTIC_KITTI, "nuscenes": NUSCENES}[name]


def group_loss(model: MinkUNet, group, *, options: ScanOptions):
    """Mean cross-entropy of one group, and {"accuracy", "most_missing_rows"}, see `fail_on_missing_rows`."""
    x = group_tensor(group, options, model.classifier.kernel.dtype)
    maps = unet_maps(x.sites, model.config)
    logits = model(x, maps, train=True)
    value, missing = fail_on_missing_rows(segmentation_loss(logits, group["labels"], ignore=IGNORE), maps.levels)
    known = group["labels"] != IGNORE
    right = (known & (logits.argmax(-1) == group["labels"])).sum() / jnp.maximum(known.sum(), 1)
    return value, {"accuracy": right} | missing


def advise_on_missing_rows(
    metrics: Mapping[str, float], key: str, fractions: Sequence[float], rows: int, *, highest: float = math.inf
) -> str:
    """What to set where a level of the network had more sites than rows, as a sentence; "" where none had.

    Args:
      metrics: of a step; its "most_missing_rows" are the most that any level lacked.
      key: of the configuration, that of `fractions`.
      fractions: rows of each level as shares of the input's.
      rows: of the smallest input.
      highest: a fraction that always suffices.
    """
    missing = metrics["most_missing_rows"]
    if not missing > 0:
        return ""
    # One tile for the rounding of capacities, and two decimals.
    more = (missing + ROW_TILE) / rows
    enough = tuple(min(highest, math.ceil(100 * (fraction + more)) / 100) for fraction in fractions)
    return (
        f"A level of the network has {missing:.0f} sites more than rows: set {key}={enough} or larger; it is "
        f"{tuple(fractions)}."
    )


def over_groups(loss, model: nnx.Module, batch):
    """The mean of loss(model, group) -> (scalar, metrics) over the groups of a batch, each on the device that holds it.

    Norms see one group at a time, as with one process per GPU; running statistics are the mean of what the groups made
    of them. Metrics are joined as by `lumen.training.step.join_metrics`.

    Args:
      loss: of one group.
      model: in training; its `Statistic` variables are set.
      batch: arrays with a leading axis of groups, laid out over data and fsdp.
    """
    graphdef, params, statistics, others = nnx.split(model, nnx.Param, Statistic, ...)
    mesh = jax.sharding.get_abstract_mesh()

    def local(params, statistics, others, batch):
        results = []
        for group in groups_of(batch):
            run = nnx.merge(graphdef, params, statistics, others, copy=True)
            results.append((*loss(run, group), nnx.state(run, Statistic)))
        return jax.tree.map(lambda *each: jnp.stack(each), *results)

    groups, devices = batch["count"].shape[0], math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])
    if groups % devices:
        raise ValueError(
            f"a batch of {groups} groups does not split over {devices} devices; wanted batch_size = scans_per_group "
            f"x a multiple of {devices}."
        )
    if devices > 1:
        whole, split = PartitionSpec(), PartitionSpec(RULES["batch"])
        specs = {"in_specs": (whole, whole, whole, split), "out_specs": split}
        local = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
    values, metrics, moved = local(params, statistics, others, batch)
    nnx.update(model, jax.tree.map(lambda each: each.mean(0), moved))
    return values.mean(), join_metrics(metrics)


def groups_of(batch) -> list[dict[str, Any]]:
    """The groups of a batch as one dict each."""
    return [{name: rows[i] for name, rows in batch.items()} for i in range(batch["count"].shape[0])]
