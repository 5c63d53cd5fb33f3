"""CenterPoint's head against the original code; targets by hand; the whole detector on a toy grid."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.io.names.openpcdet import IGNORED, center_head_rules, centerpoint_rules
from lumen.io.pretrained import from_original, to_original
from lumen.layers import Statistic
from lumen.sparse.boxes import Suppression
from lumen.sparse.centerpoint import (
    CenterHead,
    CenterPoint,
    CenterPointConfig,
    box_loss,
    candidates,
    center_targets,
    centerpoint_loss,
    decode,
    gaussian_radius,
    head_loss,
    heatmap_loss,
)
from lumen.sparse.detection import MAP_NAMES, BackboneConfig, PictureGrid, VoxelGrid, batch_spec
from pallas_kernels.sparse_convolution import Dataflow, Dataflows

# Of the goldens: float32 sums of some hundred terms through five layers.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
BRANCHES = {"hm": "heatmap", "center": "offset", "center_z": "z", "dim": "size", "rot": "heading", "vel": "velocity"}
GROUPS = ((0, 2), (2, 1))  # first class and number of classes
# Compiled as one program, which is quicker than op by op.
compiled_targets = jax.jit(center_targets, static_argnums=(2, 3, 4, 5))


@pytest.fixture(scope="module")
def original(golden):
    """The golden file, a head with its weights, and outputs, loss and gradients of one training pass."""
    record = golden("torchsparse/center_head")
    config = CenterPointConfig(
        VoxelGrid((-8.0, -8.0, -3.0), (8.0, 8.0, 3.0), (0.2, 0.25, 0.2)),
        (("car", "truck"), ("ped",)),
        velocity=True,
        width=8,
        box_weight=0.25,
        code_weights=(1.0,) * 6 + (0.2, 0.2, 1.0, 1.0),
        candidates=15,
        centres=((-20.0, -20.0, -5.0), (20.0, 20.0, 5.0)),
    )
    grid = PictureGrid((-8.0, -8.0), (0.2, 0.25), 4, (16, 20))
    tensors, rules = record.weights(), center_head_rules(theirs="", ours="")
    for name in [name for name in tensors if name.endswith((".0.1.bias", "shared_conv.1.bias"))]:  # of norms
        for statistic in ("running_mean", "running_var"):  # not recorded, and not used in training
            tensors[name.replace("bias", statistic)] = np.zeros_like(tensors[name])
    head = from_original(tensors, nnx.eval_shape(lambda: CenterHead(config, 6, rngs=nnx.Rngs(0))), rules, IGNORED)
    boxes = jnp.asarray(record["in/gt_boxes"][..., :9])
    classes = jnp.asarray(record["in/gt_boxes"][..., 9].astype(np.int32) - 1)

    @jax.jit
    def run(head, x):
        graph, params, rest = nnx.split(head, nnx.Param, ...)

        def loss(params, x):
            predictions = nnx.merge(graph, params, rest, copy=True)(x, train=True)
            value, parts = head_loss(predictions, boxes, classes, grid, config)
            return value, (predictions, parts)

        (value, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return value, *aux, nnx.merge(graph, grads[0], rest), grads[1]

    x = jnp.moveaxis(jnp.asarray(record["in/feats"]), 1, -1)
    loss, predictions, parts, gradients, input_gradient = run(head, x)
    return types.SimpleNamespace(**locals())


def test_head(original):
    for i, predicted in enumerate(original.predictions):
        for theirs, ours in BRANCHES.items():
            want = original.record[f"out/pred{i}/{theirs}"]
            np.testing.assert_allclose(np.moveaxis(predicted[ours], -1, 1), want, **CLOSE, err_msg=f"{i} {theirs}")


@pytest.mark.parametrize("group", [0, 1])
def test_targets_and_losses(original, group):
    record, first_and_number = original.record, GROUPS[group]
    heatmap, code, pixels, used = compiled_targets(
        original.boxes, original.classes, *first_and_number, original.grid, original.config
    )
    # Products of two float32 exponentials.
    np.testing.assert_allclose(np.moveaxis(heatmap, -1, 1), record[f"out/target{group}/heatmap"], atol=1e-6)
    for sample in (0, 1):  # the original moves a group's boxes to the front
        own, count = np.asarray(used[sample]), int(used[sample].sum())
        assert record[f"out/target{group}/masks"][sample].tolist() == [1] * count + [0] * (12 - count)
        np.testing.assert_array_equal(pixels[sample][own], record[f"out/target{group}/inds"][sample][:count])
        np.testing.assert_allclose(code[sample][own], record[f"out/target{group}/boxes"][sample][:count], atol=1e-5)
    predicted = original.predictions[group]
    np.testing.assert_allclose(heatmap_loss(predicted["heatmap"], heatmap), record[f"out/loss{group}/hm"], rtol=1e-5)
    errors = box_loss(jnp.concatenate([predicted[name] for name in original.config.code], -1), code, pixels, used)
    weighted = original.config.box_weight * (errors * np.asarray(original.config.code_weights)).sum()
    np.testing.assert_allclose(weighted, record[f"out/loss{group}/loc"], rtol=1e-5)


def test_loss_and_gradients(original):
    record = original.record
    np.testing.assert_allclose(original.loss, record["out/loss"], rtol=1e-5)
    np.testing.assert_allclose(sum(original.parts.values()), original.loss, rtol=1e-6)
    np.testing.assert_allclose(np.moveaxis(original.input_gradient, -1, 1), record["out/grad_feats"], **CLOSE)
    got, want = to_original(original.gradients, original.rules), record.weights("out/grad/")
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, **CLOSE, err_msg=name)


def test_candidates(original):
    for group, (first, _) in enumerate(GROUPS):
        read = jax.jit(candidates, static_argnums=(1, 2, 3))
        found = read(original.predictions[group], first, original.grid, original.config)
        for sample in (0, 1):
            prefix = f"out/decode{group}/{sample}"
            np.testing.assert_allclose(found.boxes[sample], original.record[f"{prefix}/boxes"], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.scores[sample], original.record[f"{prefix}/scores"], rtol=1e-5)
            np.testing.assert_array_equal(found.classes[sample] - first, original.record[f"{prefix}/labels"])


def test_weights_come_back_as_they_went_in(original):
    written = to_original(original.head, original.rules)
    assert written.keys() == original.tensors.keys()
    for name, value in original.tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_radius_keeps_the_overlap():
    """Boxes moved along both axes by the first root overlap just so much; the others are as published."""
    length, width, overlap = np.float32([4, 7, 12, 1]), np.float32([2, 7, 3, 1]), 0.1
    total, area = length + width, length * width
    moved = (total + np.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))) / 2
    shrunk = (2 * total + np.sqrt(4 * total**2 - 16 * (1 - overlap) * area)) / 2
    grown = (-2 * overlap * total + np.sqrt((2 * overlap * total) ** 2 + 16 * overlap * (1 - overlap) * area)) / 2
    want = np.minimum(np.minimum(moved, shrunk), grown)
    np.testing.assert_allclose(gaussian_radius(length, width, overlap), want, rtol=1e-5)


def test_targets_by_hand():
    """Padding, boxes without extent, of another group, beyond the picture, and one of unknown velocity."""
    config = CenterPointConfig.debug()
    grid = PictureGrid((0.0, 0.0), (0.5, 0.5), 2, (8, 10))  # pixels of 1 m
    boxes = np.zeros((1, 6, 9), np.float32)
    boxes[0, :, :7] = [
        [4.25, 3.5, 1, 2, 1, 3, 0.5],
        [20, -3, 0, 1, 1, 1, 0],  # counts at the upper right corner
        [2, 2, 0, 0, 1, 1, 0],  # no length
        [2, 2, 0, 1, 1, 1, 0],  # padding
        [2, 2, 0, 1, 1, 1, 0],  # of the other group
        [5.9, 3.5, 0, 2, 2, 2, 0],
    ]
    boxes[0, 0, 7:] = np.nan, 2
    classes = np.array([[1, 2, 1, -1, 0, 1]])
    heatmap, code, pixels, used = compiled_targets(boxes, classes, 1, 2, grid, config)
    assert used[0].tolist() == [True, True, False, False, False, True]
    assert pixels[0].tolist() == [3 * 10 + 4, 9, 0, 0, 0, 3 * 10 + 5]
    want = [0.25, 0.5, 1, np.log(2), 0, np.log(3), np.cos(0.5), np.sin(0.5), np.nan, 2]
    np.testing.assert_allclose(code[0, 0], want, atol=1e-6)
    assert not np.asarray(code[0, 2:5]).any()
    # Small boxes have peaks of radius 2, deviation 5/6; between two of them the higher one counts.
    expected = np.zeros((8, 10))
    for x in (4, 5):
        for column in range(x - 2, x + 3):
            for row in range(1, 6):
                peak = np.exp(-((column - x) ** 2 + (row - 3) ** 2) / (2 * (5 / 6) ** 2))
                expected[row, column] = max(expected[row, column], peak)
    np.testing.assert_allclose(heatmap[0, :, :, 0], expected, atol=1e-6)
    assert heatmap[0, 0, 9, 1] == 1
    assert float(heatmap[0, ..., 1].sum()) > 1
    errors = box_loss(jnp.zeros((1, 8, 10, 10)), code, pixels, used)
    assert np.isfinite(errors).all()
    np.testing.assert_allclose(errors[8:], [0, 2 / 3], rtol=1e-6)  # NaN adds nothing; three boxes


def test_no_object_at_all():
    config = CenterPointConfig.debug()
    grid = PictureGrid((0.0, 0.0), (0.5, 0.5), 2, (8, 10))
    targets = compiled_targets(np.zeros((1, 2, 9), np.float32), np.full((1, 2), -1), 0, 1, grid, config)
    logits = jnp.zeros((1, 8, 10, 1))
    # All pixels are background: (1/2)² log 2 each, not divided.
    np.testing.assert_allclose(heatmap_loss(logits, targets[0]), 80 * 0.25 * np.log(2), rtol=1e-5)
    assert not np.asarray(box_loss(jnp.ones((1, 8, 10, 10)), *targets[1:])).any()


def perfect(boxes, classes, config):
    """Predictions that say just what the targets are."""
    predictions, first = [], 0
    for names in config.groups:
        heatmap, code, pixels, used = compiled_targets(boxes, classes, first, len(names), config.grid.picture, config)
        height, width = config.grid.picture.shape
        dense = jnp.zeros((len(boxes), height * width, code.shape[-1]))
        for sample in range(len(boxes)):
            place = jnp.where(used[sample], pixels[sample], height * width)
            dense = dense.at[sample, place].set(code[sample], mode="drop")
        dense = dense.reshape(len(boxes), height, width, -1)
        peaks = jnp.clip(heatmap, 1e-4, 1 - 1e-4)
        predicted, begin = {"heatmap": jnp.log(peaks / (1 - peaks))}, 0
        for name, number in {"offset": 2, "z": 1, "size": 3, "heading": 2, "velocity": 2}.items():
            predicted[name] = dense[..., begin : begin + number]
            begin += number
        predictions.append(predicted)
        first += len(names)
    return predictions


@pytest.mark.parametrize("kind", ["rotated", "circle"])
def test_decoding_finds_the_boxes_that_targets_were_made_of(kind):
    threshold = 0.2 if kind == "rotated" else 1.0
    config = CenterPointConfig.debug(suppression=Suppression(threshold, 32, 16, kind))
    boxes = np.zeros((2, 3, 9), np.float32)
    boxes[0, :, :7] = [[-4, 2, 0.5, 4, 2, 1.5, 2.5], [3.1, 3.3, 0, 0.5, 0.5, 3, 0], [-3.9, -5, 1, 3, 3, 1, -3]]
    boxes[1, 0, :7] = [0.1, 0.1, 0, 4, 1.8, 1.6, -1]
    boxes[..., 7:] = 1.5, -0.5
    classes = np.array([[0, 1, 2], [0, -1, -1]])
    predictions = perfect(jnp.asarray(boxes), jnp.asarray(classes), config)
    loss, _ = jax.jit(head_loss, static_argnums=(3, 4))(predictions, boxes, classes, config.grid.picture, config)
    found = jax.jit(lambda predictions: decode(predictions, config))(predictions)
    for sample, count in ((0, 3), (1, 1)):
        best = np.argsort(-np.asarray(found.scores[sample]), kind="stable")[:count]
        order = best[np.argsort(np.asarray(found.classes[sample])[best])]
        assert np.asarray(found.classes[sample])[order].tolist() == classes[sample, :count].tolist()
        np.testing.assert_allclose(np.asarray(found.boxes[sample])[order], boxes[sample, :count], atol=1e-5)
    # What is left of the heat map's loss is that of the pixels around peaks.
    assert 0 < float(loss) < 3


# The whole detector.

FRACTIONS = (3.75, 2.25, 0.75, 0.5)  # for voxels that have few neighbours
# Compiles in a quarter of the time of the others.
UNSORTED = Dataflows(*(Dataflow("unsorted"),) * 3)


@pytest.fixture(scope="module")
def toy():
    """A model, a batch of two scans, and one whose voxels are all over the place."""
    backbone = BackboneConfig(
        inputs=5,
        widths=(4, 4, 8, 8),
        outputs=8,
        level_fractions=FRACTIONS,
        dataflows=tuple((name, UNSORTED) for name in MAP_NAMES),
    )
    config = CenterPointConfig.debug(backbone=backbone)
    rng = np.random.default_rng(0)

    def draw(x):  # by NumPy, which spares compiling the initialisers
        scale, offset = (0.1, 0.5) if len(x.shape) == 1 else (np.prod(x.shape[:-1]) ** -0.5, 0.0)
        return jnp.asarray(offset + scale * rng.standard_normal(x.shape), x.dtype)

    model = jax.tree.map(draw, nnx.eval_shape(lambda: CenterPoint(config, rngs=nnx.Rngs(0))))
    spec = batch_spec(backbone.inputs, config.columns, scans=2, voxels=512, boxes=4)

    def batch_of(low, high):
        batch = {name: np.zeros(one.shape, one.dtype) for name, one in spec.items()}
        batch["boxes"][:, :3, :7] = [[-3, 2, 0, 4, 2, 1.5, 0.3], [3, -2, 0, 0.5, 0.5, 3, 0], [2, 4, 0, 3, 3, 2, 1]]
        batch["classes"][:] = [0, 1, 2, -1]
        cells = [rng.integers(0, 2, 505), rng.integers(0, 40, 505), *(rng.integers(low, high, 505) for _ in "yx")]
        cells = np.unique(np.stack(cells, 1), axis=0)
        batch["coordinates"][: len(cells)], batch["count"] = cells, np.int32(len(cells))
        batch["features"][: len(cells)] = rng.standard_normal((len(cells), 5))
        return batch

    return types.SimpleNamespace(config=config, model=model, batch=batch_of(50, 70), scattered=batch_of(0, 128))


@pytest.fixture(scope="module")
def train(toy):
    """batch -> loss, metrics, statistics afterwards, and gradients; one program for all tests."""

    @jax.jit
    def run(model, batch):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            value, metrics = centerpoint_loss(model, batch)
            return value, (metrics, nnx.state(model, Statistic))

        (value, (metrics, statistics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, metrics, statistics, grads

    return lambda batch: run(toy.model, batch)


def test_training_reaches_every_weight(toy, train):
    value, metrics, statistics, grads = train(toy.batch)
    np.testing.assert_allclose(value, metrics["centre_loss"] + metrics["box_loss"], rtol=1e-6)
    assert metrics["most_missing_rows"] == 0
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        before_norm = name.removesuffix(".value").endswith("conv.bias")  # which takes its mean away again
        assert bool(jnp.abs(grad).max() > 1e-7) or before_norm, name
    before = jax.tree.leaves(nnx.state(toy.model, Statistic))
    assert all(bool((a != b).any()) for a, b in zip(before, jax.tree.leaves(statistics), strict=True))


def test_padding_changes_nothing(toy, train):
    batch = {name: value.copy() for name, value in toy.batch.items()}
    count = int(batch["count"])
    batch["features"][count:], batch["coordinates"][count:] = 1e6, 3
    batch["boxes"][:, 3] = 5.0  # of class -1
    assert train(batch)[0] == train(toy.batch)[0]


def test_an_overflow_is_never_silent(toy, train):
    loss, metrics, *_ = train(toy.scattered)
    assert np.isnan(loss)
    assert metrics["most_missing_rows"] > 0


def test_whole_checkpoints_come_back_as_they_went_in(toy):
    rules = centerpoint_rules()
    tensors = to_original(toy.model, rules)
    assert {name.split(".")[0] for name in tensors} == {"backbone_3d", "backbone_2d", "dense_head"}
    assert tensors["backbone_3d.conv2.0.0.weight"].shape == (4, 3, 3, 3, 4)
    assert tensors["dense_head.heads_list.1.hm.1.weight"].shape == (2, 8, 3, 3)
    read = tensors | {"global_step": np.zeros(1), "backbone_2d.blocks.0.2.num_batches_tracked": np.zeros((), int)}
    model = from_original(read, jax.eval_shape(lambda: toy.model), rules, IGNORED)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, toy.model))


def test_published_sizes():
    nuscenes, waymo = CenterPointConfig.nuscenes(), CenterPointConfig.waymo()
    assert (nuscenes.grid.cells, waymo.grid.cells) == ((1440, 1440, 40), (1504, 1504, 40))
    assert (nuscenes.grid.picture.shape, waymo.grid.picture.shape) == ((180, 180), (188, 188))
    assert len(nuscenes.classes) == 10
    assert len(nuscenes.groups) == 6
    assert (nuscenes.voxels, nuscenes.evaluation_voxels) == (120_000, 160_000)
    model = nnx.eval_shape(lambda: CenterPoint(nuscenes, rngs=nnx.Rngs(0)))
    shapes = to_shapes(model)
    assert shapes["bev.stages.0.0.conv.kernel"] == (3, 3, 256, 128)
    assert shapes["head.shared.conv.kernel"] == (3, 3, 512, 64)
    # The published file has 34 megabytes of float32.
    size = 4 * sum(np.prod(shape) for shape in shapes.values())
    assert round(size / 2**20) == 34
    with pytest.raises(ValueError, match="8 code_weights; wanted 10, as velocity=True"):
        CenterPointConfig.waymo(velocity=True)
    with pytest.raises(ValueError, match="each class once"):
        CenterPointConfig.waymo(groups=(("a",), ("a",)))
    assert BackboneConfig(inputs=5).widths == (16, 32, 64, 64)


def to_shapes(model):
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(model)
    }
