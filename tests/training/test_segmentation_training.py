"""The LiDAR segmentation task: groups on devices, statistics, overflow, evaluation; scans of a few hundred points."""

import ast
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.layers import Statistic
from lumen.sharding import make_mesh
from lumen.sparse.convolution import BatchNorm, SparseConv
from lumen.sparse.kernel_maps import submanifold_map
from lumen.sparse.minkunet import MAP_NAMES, MinkUNet, MinkUNetConfig, segmentation_loss, unet_maps
from lumen.sparse.tensor import fail_on_missing_rows
from lumen.training.lidar import ScanOptions, batch_spec, street_scans, training_batches
from lumen.training.segmentation import (
    ScanData,
    SegmentationOptions,
    advise_on_missing_rows,
    group_loss,
    group_tensor,
    make_task,
    over_groups,
)
from pallas_kernels.sparse_convolution import Dataflow, Dataflows

SCANS = ScanOptions(voxel_size=0.5, spatial_shape=(512, 512, 64), max_voxels=256)
DATA = ScanData(scans=16, beams=8, azimuths=64)
OPTIONS = SegmentationOptions(ratio=0.0625, data=DATA, scans=SCANS)


def drawn(build):
    """A model of random numbers from NumPy, which spares compiling the initialisers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0, 1, leaf.shape), leaf.dtype), nnx.eval_shape(build))


class Tiny(nnx.Module):
    """A convolution and a norm: all that groups and statistics need."""

    def __init__(self, rngs):
        self.conv = SparseConv(4, 4, 3, rngs=rngs)
        self.norm = BatchNorm(4)

    def __call__(self, x):
        return self.norm(self.conv(x, submanifold_map(x.sites, 3)), train=True)


def tiny_loss(model, group):
    x = group_tensor(group, SCANS, model.conv.kernel.dtype)
    logits = model(x).features
    return segmentation_loss(logits, group["labels"]), {"rows": x.sites.count.astype(jnp.float32)}


@pytest.fixture(scope="module")
def batch():
    source = street_scans("train", scans=16, beams=8, azimuths=64)
    return next(iter(training_batches(source, SCANS, batch_size=2, seed=0, augment=False)))


def one_group(batch, index):
    return {name: rows[index : index + 1] for name, rows in batch.items()}


@jax.jit
def run(model, batch):
    """Loss, metrics, gradients and new statistics."""
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    def loss(params):
        trained = nnx.merge(graphdef, params, others, copy=True)
        value, metrics = over_groups(tiny_loss, trained, batch)
        return value, (metrics, nnx.state(trained, Statistic))

    (value, (metrics, statistics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, metrics, statistics, grads


def test_groups_on_two_devices_are_the_mean_of_two_runs(batch):
    model = Tiny(nnx.Rngs(0))
    alone = [run(model, one_group(batch, i)) for i in range(2)]
    with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        together = run(model, batch)
    before = jax.tree.leaves(nnx.state(model, Statistic))
    for old, new in zip(before, jax.tree.leaves(together[2]), strict=True):
        assert (np.asarray(old) != np.asarray(new)).any()
    for got, *parts in zip(jax.tree.leaves(together), *map(jax.tree.leaves, alone), strict=True):
        # The same float32 arithmetic per group; only the mean over groups is new.
        np.testing.assert_allclose(got, np.mean(parts, axis=0), rtol=1e-5, atol=1e-6)


def products(jaxpr):
    """The operand types of every matrix product in a program, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(operand.aval.dtype for operand in equation.invars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_the_model_computes_in_the_type_of_its_weights(batch):
    model = nnx.eval_shape(lambda: MinkUNet(MinkUNetConfig.debug(classes=4), rngs=nnx.Rngs(0)))
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    group = {name: rows[0] for name, rows in batch.items()}

    def loss(params, others):
        cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return group_loss(nnx.merge(graphdef, cast, others, copy=True), group, options=SCANS)[0]

    assert set(products(jax.make_jaxpr(loss)(params, others).jaxpr)) == {(jnp.dtype(jnp.bfloat16),) * 2}


def test_a_batch_that_does_not_split_is_refused(batch):
    with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])), pytest.raises(ValueError, match="1 groups does not"):
        run(Tiny(nnx.Rngs(0)), one_group(batch, 0))


@pytest.mark.parametrize("fractions", [(), (0.5, 0.5, 0.5, 0.5)])
def test_a_level_that_overflows_shows(batch, fractions):
    # The quickest dataflows to compile.
    flows = tuple((name, Dataflows(*(Dataflow("unsorted"),) * 3)) for name in MAP_NAMES)
    config = MinkUNetConfig(widths=(2,) * 9, classes=4, level_fractions=fractions, dataflows=flows)
    model = drawn(lambda: MinkUNet(config, rngs=nnx.Rngs(0)))
    assert int(batch["count"][0]) > 128, "the second level needs more than half of 256 rows"

    @jax.jit
    def forward(model, group):
        value, metrics = group_loss(model, group, options=SCANS)
        return value, metrics, nnx.state(model, Statistic)

    value, metrics, _ = forward(model, {name: rows[0] for name, rows in batch.items()})
    assert jnp.isnan(value) == bool(fractions)
    assert (metrics["most_missing_rows"] > 0) == bool(fractions)


def test_what_is_missing_is_advised(batch):
    """The fractions of the sentence are enough, and no more than a tile and rounding above what is needed."""
    group, fractions = {name: rows[0] for name, rows in batch.items()}, (0.1, 0.2, 0.3, 0.4)
    rows = len(group["features"])

    def missing(fractions):
        config = MinkUNetConfig.debug(level_fractions=fractions)
        levels = jax.jit(lambda group: unet_maps(group_tensor(group, SCANS, jnp.float32).sites, config).levels)(group)
        return fail_on_missing_rows(1.0, levels)

    loss, metrics = missing(fractions)
    lacking = int(metrics["most_missing_rows"])
    assert np.isnan(loss)
    text = advise_on_missing_rows(metrics, "config.fractions", fractions, rows, highest=1.0)
    found = re.fullmatch(
        rf"A level of the network has {lacking} sites more than rows: set config\.fractions=(\(.*\)) or larger; it is "
        r"\(0\.1, 0\.2, 0\.3, 0\.4\)\.",
        text,
    )
    assert found
    enough = ast.literal_eval(found[1])
    np.testing.assert_allclose(enough, np.minimum(np.array(fractions) + (lacking + 128) / rows, 1), atol=0.01)
    loss, metrics = missing(enough)
    assert loss == 1
    assert advise_on_missing_rows(metrics, "config.fractions", enough, rows) == ""


def test_the_key_of_missing_rows_is_named(tmp_path):
    options = SegmentationOptions(level_fractions=(0.7, 0.5, 0.3, 1.0))  # inputs have from 51 200 rows
    task = make_task(options, batch_size=1, seed=0, total_steps=1, workdir=tmp_path)
    assert task.advise is not None
    assert task.advise({"loss": np.nan, "most_missing_rows": 900.0}) == (
        "A level of the network has 900 sites more than rows: set config.lidar_segmentation.level_fractions=(0.73, "
        "0.53, 0.33, 1.0) or larger; it is (0.7, 0.5, 0.3, 1.0)."
    )


def test_missing_rows_of_groups_are_the_most(batch):
    def loss(model, group):
        del model
        return jnp.float32(1), {"most_missing_rows": group["count"].astype(jnp.float32), "mean": group["count"] / 2}

    with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        _, metrics = jax.jit(lambda batch: over_groups(loss, Tiny(nnx.Rngs(0)), batch))(batch)
    assert metrics["most_missing_rows"] == batch["count"].max()
    np.testing.assert_allclose(metrics["mean"], batch["count"].mean() / 2, rtol=1e-6)


def test_task_evaluates_points_and_draws(tmp_path):
    task = make_task(OPTIONS, batch_size=2, seed=0, total_steps=1, workdir=tmp_path)
    metrics, pictures = task.evaluate(drawn(lambda: task.build(nnx.Rngs(0))), jax.random.key(0), tmp_path)
    assert metrics["scans"] == 2
    assert 0 <= metrics["mean_iou"] <= metrics["accuracy"] <= 1
    assert set(pictures) == {"from_above", "from_sensor"}
    assert all(picture.dtype == np.uint8 for picture in pictures.values())
    json.dumps(metrics)
    assert {name: (spec.shape, spec.dtype) for name, spec in task.batch_spec.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in batch_spec(SCANS, 2).items()
    }


def test_bad_options_are_named(tmp_path):
    make = functools.partial(make_task, seed=0, total_steps=1, workdir=tmp_path)
    with pytest.raises(ValueError, match=r"batch_size=3 is no multiple of .*scans_per_group=2"):
        make(dataclasses.replace(OPTIONS, scans=dataclasses.replace(SCANS, scans_per_group=2)), batch_size=3)
    with pytest.raises(ValueError, match=r"nowhere\.json: not a tuning file"):
        make(dataclasses.replace(OPTIONS, tuning=str(tmp_path / "nowhere.json")), batch_size=2)
