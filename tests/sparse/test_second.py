"""SECOND's anchors, targets, loss and decoding against plain loops in NumPy, and the whole detector on a toy grid."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.io.names.openpcdet import IGNORED, second_rules
from lumen.io.pretrained import from_original, to_original
from lumen.sparse.detection import MAP_NAMES, BackboneConfig, batch_spec
from lumen.sparse.second import (
    SECOND,
    SECONDConfig,
    aligned_iou,
    anchor_loss,
    anchor_targets,
    decode_anchors,
    decode_boxes,
    encode_boxes,
    second_loss,
)
from pallas_kernels.sparse_convolution import Dataflow, Dataflows

CONFIG = SECONDConfig.debug()
BOXES = np.array(
    [
        [-3.2, 2.1, 0.1, 4.2, 1.8, 1.5, 0.2],  # a car that lies well
        [2.7, -3.0, 0, 4.0, 1.7, 1.6, 1.5 + math.pi],  # one turned around
        [4.1, 4.3, 0.5, 0.8, 0.7, 3, 0.1],  # a pole
        [0.4, 0.4, 0, 1.5, 1.0, 1, 0.7],  # a small car that no anchor fits well
        [0, 0, 0, 5, 5, 5, 0],  # padding
    ],
    np.float32,
)
CLASSES = np.array([0, 0, 1, 0, -1])


def test_anchors():
    anchors = SECONDConfig.kitti().anchor_boxes()
    assert anchors.shape == (200, 176, 6, 7)
    np.testing.assert_allclose(anchors[0, 0, 0], [0, -40, -1.78 + 0.78, 3.9, 1.6, 1.56, 0], rtol=1e-6)
    np.testing.assert_allclose(anchors[-1, -1, 5], [70.4, 40, -0.6 + 0.865, 1.76, 0.6, 1.73, 1.57], rtol=1e-6)
    np.testing.assert_allclose(anchors[1, 2, 3, :2], [2 * 70.4 / 175, -40 + 80 / 199], rtol=1e-6)


def overlap(a, b):
    """Of two boxes, each turned to the nearest axis."""

    def half(box):
        quarter_turns = round(box[6] / (math.pi / 2))
        return (box[3:5] if quarter_turns % 2 == 0 else box[4:2:-1]) / 2

    low = np.maximum(a[:2] - half(a), b[:2] - half(b))
    high = np.minimum(a[:2] + half(a), b[:2] + half(b))
    shared = np.maximum(high - low, 0).prod()
    return shared / (a[3] * a[4] + b[3] * b[4] - shared)


def test_aligned_overlaps():
    rng = np.random.default_rng(0)
    a, b = (
        np.concatenate([rng.uniform(-2, 2, (20, 3)), rng.uniform(0.5, 4, (20, 3)), rng.uniform(-9, 9, (20, 1))], 1)
        for _ in range(2)
    )
    want = [[overlap(p, q) for q in b] for p in a]
    np.testing.assert_allclose(aligned_iou(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), want, atol=1e-5)


def expected_targets():
    """Labels and matched boxes by the rules, one anchor after the other."""
    flat = CONFIG.anchor_boxes().reshape(-1, 7).astype(np.float64)
    kinds = np.arange(len(flat)) % 4 // 2  # four anchors per pixel, two per class
    overlaps = np.zeros((len(flat), 4))
    for i, anchor in enumerate(flat):
        for g in range(4):
            overlaps[i, g] = overlap(anchor, BOXES[g].astype(np.float64)) if CLASSES[g] == kinds[i] else -1
    labels, matches = np.full(len(flat), -2), overlaps.argmax(1)
    for i, kind in enumerate(kinds):
        most = overlaps[i, matches[i]]
        if most >= CONFIG.anchors[kind].matched:
            labels[i] = kind
        elif most < CONFIG.anchors[kind].unmatched:
            labels[i] = -1
        if any(overlaps[i, g] > max(overlaps[:, g].max() - 1e-6, 0) for g in range(4)):
            labels[i] = kind
    return labels, matches


@jax.jit
def find_targets(boxes, classes):
    return anchor_targets(boxes, classes, CONFIG)


@pytest.fixture(scope="module")
def targets():
    labels, code = find_targets(BOXES, CLASSES)
    return np.asarray(labels), np.asarray(code)


def test_targets(targets):
    labels, code = targets
    want, matches = expected_targets()
    np.testing.assert_array_equal(labels, want)
    assert {-2, -1, 0, 1} == set(labels.tolist())
    anchors = CONFIG.anchor_boxes().reshape(-1, 7)
    find = labels >= 0
    assert not code[~find].any()
    a, b = anchors[find], BOXES[matches[find]]
    diagonal = np.sqrt(a[:, 3] ** 2 + a[:, 4] ** 2)
    wanted = np.stack(
        [
            (b[:, 0] - a[:, 0]) / diagonal,
            (b[:, 1] - a[:, 1]) / diagonal,
            (b[:, 2] - a[:, 2]) / a[:, 5],
            *(np.log(b[:, i] / a[:, i]) for i in (3, 4, 5)),
            b[:, 6] - a[:, 6],
        ],
        1,
    )
    np.testing.assert_allclose(code[find], wanted, atol=1e-5)
    # The small car overlaps no anchor by 0.45 and still has one that has to find it.
    assert (matches[find] == 3).any()


def test_no_box_at_all():
    labels, code = find_targets(BOXES, np.full(5, -1))
    assert set(np.asarray(labels).tolist()) == {-1}
    assert not np.asarray(code).any()


def test_codes_come_back():
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(0.5, 4, (10, 7)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(decode_boxes(encode_boxes(a, b), b), a, rtol=1e-5, atol=1e-5)


def test_loss(targets):
    rng = np.random.default_rng(2)
    labels, code = targets
    count = len(labels)
    logits, boxes, directions = (rng.standard_normal((2, count, n)).astype(np.float32) for n in (2, 7, 2))
    predicted = {"classes": logits, "boxes": boxes, "directions": directions}
    classes = np.stack([CLASSES, np.full(5, -1)])  # the second sample has no box
    loss, parts = jax.jit(lambda p, b, c: anchor_loss(p, b, c, CONFIG))(predicted, np.stack([BOXES, BOXES]), classes)
    headings = CONFIG.anchor_boxes().reshape(-1, 7)[:, 6]
    want = {"class_loss": 0.0, "box_loss": 0.0, "direction_loss": 0.0}
    for sample in (0, 1):
        own = labels if sample == 0 else np.full(count, -1)
        positives = max((own >= 0).sum(), 1)
        for i in range(count):
            if own[i] == -2:
                continue
            for class_id in (0, 1):
                p = 1 / (1 + np.exp(-np.float64(logits[sample, i, class_id])))
                true = own[i] == class_id
                term = 0.25 * (1 - p) ** 2 * -np.log(p) if true else 0.75 * p**2 * -np.log(1 - p)
                want["class_loss"] += term / positives / 2
            if own[i] < 0:
                continue
            error = np.abs(boxes[sample, i] - code[i])
            error[6] = np.abs(np.sin(boxes[sample, i, 6] - code[i, 6]))
            smooth = np.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18)
            want["box_loss"] += 2.0 * smooth.sum() / positives / 2
            turned = (code[i, 6] + headings[i] - 0.78539) % (2 * math.pi)
            shifted = np.exp(directions[sample, i] - directions[sample, i].max())
            chosen = int(turned >= math.pi)
            want["direction_loss"] -= 0.2 * np.log(shifted[chosen] / shifted.sum()) / positives / 2
    for name, value in want.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, sum(want.values()), rtol=1e-4)


def test_decoding_finds_the_boxes_that_targets_were_made_of(targets):
    labels, code = targets
    headings = CONFIG.anchor_boxes().reshape(-1, 7)[:, 6]
    direction = ((code[:, 6] + headings - 0.78539) % (2 * math.pi) >= math.pi).astype(int)
    turned = code.copy()
    turned[:, 6] += math.pi * np.random.default_rng(0).integers(-2, 3, len(code))  # only the direction tells them apart
    predicted = {
        "classes": 8.0 * (labels[:, None] == np.arange(2)) - 4 + 0.001 * np.arange(len(labels))[:, None] / len(labels),
        "boxes": turned,
        "directions": np.eye(2)[direction],
    }
    found = jax.jit(lambda p: decode_anchors(p, CONFIG))(
        {n: jnp.asarray(a, jnp.float32)[None] for n, a in predicted.items()}
    )
    kept = np.asarray(found.classes[0]) >= 0
    boxes, classes = np.asarray(found.boxes[0])[kept], np.asarray(found.classes[0])[kept]
    # The pole's anchors and the cars do not overlap: one detection each.
    assert len(boxes) == 4
    for box, class_id in zip(BOXES[:4], CLASSES[:4], strict=True):
        nearest = np.abs(boxes[:, :2] - box[:2]).sum(1).argmin()
        assert classes[nearest] == class_id
        np.testing.assert_allclose(boxes[nearest, :6], box[:6], atol=1e-4)
        angle = (boxes[nearest, 6] - box[6] + math.pi) % (2 * math.pi) - math.pi
        np.testing.assert_allclose(angle, 0, atol=1e-4)


@pytest.fixture(scope="module")
def toy():
    flows = Dataflows(*(Dataflow("unsorted"),) * 3)
    backbone = BackboneConfig(
        widths=(4, 4, 8, 8),
        outputs=8,
        level_fractions=(7.5, 4.5, 1.5, 1.0),
        dataflows=tuple((name, flows) for name in MAP_NAMES),
    )
    config, rng = SECONDConfig.debug(backbone=backbone), np.random.default_rng(0)

    def draw(x):  # by NumPy, which spares compiling the initialisers
        scale, offset = (0.1, 0.5) if len(x.shape) == 1 else (np.prod(x.shape[:-1]) ** -0.5, 0.0)
        return jnp.asarray(offset + scale * rng.standard_normal(x.shape), x.dtype)

    model = jax.tree.map(draw, nnx.eval_shape(lambda: SECOND(config, rngs=nnx.Rngs(0))))
    spec = batch_spec(4, 7, scans=1, voxels=256, boxes=5)
    batch = {name: np.zeros(one.shape, one.dtype) for name, one in spec.items()}
    cells = np.stack(
        [np.zeros(250, int), *(rng.integers(low, high, 250) for low, high in [(0, 40), (50, 70), (50, 70)])]
    )
    cells = np.unique(cells.T, axis=0)
    batch["coordinates"][: len(cells)], batch["count"] = cells, np.int32(len(cells))
    batch["features"][: len(cells)] = rng.standard_normal((len(cells), 4))
    batch["boxes"][0], batch["classes"][0] = BOXES, CLASSES
    return types.SimpleNamespace(model=model, batch=batch)


def test_training_reaches_every_weight(toy):
    @jax.jit
    def run(model, batch):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda params: second_loss(nnx.merge(graph, params, rest, copy=True), batch)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, metrics), grads = run(toy.model, toy.batch)
    assert np.isfinite(value)
    assert metrics["most_missing_rows"] == 0
    for path, grad in jax.tree.leaves_with_path(grads):
        assert bool(jnp.abs(grad).max() > 1e-7), jax.tree_util.keystr(path, simple=True, separator=".")


def test_whole_checkpoints_come_back_as_they_went_in(toy):
    tensors = to_original(toy.model, second_rules())
    assert tensors["dense_head.conv_cls.weight"].shape == (8, 16, 1, 1)
    assert tensors["dense_head.conv_dir_cls.bias"].shape == (8,)
    assert tensors["backbone_3d.conv1.0.0.weight"].shape == (4, 3, 3, 3, 4)
    model = from_original(tensors, jax.eval_shape(lambda: toy.model), second_rules(), IGNORED)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, toy.model))


def test_published_sizes():
    config = SECONDConfig.kitti()
    assert config.grid.cells == (1408, 1600, 40)
    assert (config.voxels, config.evaluation_voxels) == (16_000, 40_000)
    model = nnx.eval_shape(lambda: SECOND(config, rngs=nnx.Rngs(0)))
    # The published file has 20 megabytes of float32.
    assert round(4 * sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model)) / 2**20) == 20
    fresh = SECOND(SECONDConfig.debug(), rngs=nnx.Rngs(0))
    assert fresh.head.classes.bias is not None
    np.testing.assert_allclose(jax.nn.sigmoid(fresh.head.classes.bias[...]), 0.01, rtol=1e-5)
