"""SECOND (Sensors 18(10):3337, as in OpenPCDet): LiDAR detection with sparse convolutions and anchors.

model = SECOND(SECONDConfig.kitti(), rngs=nnx.Rngs(0))
predicted, levels = model(x, train=False)            # x on sites (sample, z, y, x)
check_capacity(levels)
found = decode_anchors(predicted, model.config)      # boxes [B, K, 7]

At every pixel of the picture seen from above there are anchors, boxes of each class's usual size in two headings. The
head says which of them find an object, and how its box differs from the anchor.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.sparse.boxes import Detections, Suppression, suppress
from lumen.sparse.detection import BackboneConfig, BEVConfig, Detector, VoxelGrid, picture_conv
from lumen.sparse.tensor import SparseTensor, fail_on_missing_rows


@dataclasses.dataclass(frozen=True)
class AnchorClass:
    """The anchors of one class, at every pixel one of each heading.

    Attributes:
      name: of the class.
      size: length, width and height, metres.
      bottom: z of its lower side, metres.
      matched: an anchor whose overlap with a box of the class is at least this is to find it.
      unmatched: one with less overlap than this is background; between the two it does not count.
      headings: radians.
    """

    name: str
    size: tuple[float, ...]
    bottom: float
    matched: float
    unmatched: float
    headings: tuple[float, ...] = (0.0, 1.57)


@dataclasses.dataclass(frozen=True)
class SECONDConfig:
    """A SECOND.

    Attributes:
      grid: where voxels are.
      anchors: of each class; a class id is a place in it.
      backbone, bev: of the picture.
      box_weight, direction_weight: of these losses beside the classes'.
      direction_offset: headings from here, half a turn far, are of direction 0.
      score: detections below are dropped.
      suppression: of duplicates, over all classes.
      voxels, evaluation_voxels, points: per scan in training and in evaluation, and points per voxel: what
        `hard_voxelize` keeps.
    """

    grid: VoxelGrid
    anchors: tuple[AnchorClass, ...]
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    bev: BEVConfig = dataclasses.field(default_factory=BEVConfig)
    box_weight: float = 2.0
    direction_weight: float = 0.2
    direction_offset: float = 0.78539
    score: float = 0.1
    suppression: Suppression = dataclasses.field(default_factory=lambda: Suppression(0.01, 4096, 500))
    voxels: int = 16_000
    evaluation_voxels: int = 40_000
    points: int = 5

    @property
    def columns(self) -> int:
        """Numbers per box."""
        return 7

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(anchor.name for anchor in self.anchors)

    @property
    def detections(self) -> int:
        """Objects found in a sample at most."""
        return self.suppression.detections

    @classmethod
    def kitti(cls, **changes) -> "SECONDConfig":
        """KITTI; points are x, y, z and intensity.

        Source: OpenPCDet, tools/cfgs/kitti_models/second.yaml.
        """
        sizes: dict[str, Any] = {
            "grid": VoxelGrid((0.0, -40.0, -3.0), (70.4, 40.0, 1.0), (0.05, 0.05, 0.1)),
            "anchors": (
                AnchorClass("Car", (3.9, 1.6, 1.56), -1.78, 0.6, 0.45),
                AnchorClass("Pedestrian", (0.8, 0.6, 1.73), -0.6, 0.5, 0.35),
                AnchorClass("Cyclist", (1.76, 0.6, 1.73), -0.6, 0.5, 0.35),
            ),
        }
        return cls(**sizes | changes)

    @classmethod
    def debug(cls, **changes) -> "SECONDConfig":
        """A toy for tests: 16 x 16 pixels of 0.8 m."""
        sizes: dict[str, Any] = {
            "grid": VoxelGrid((-6.4, -6.4, -2.0), (6.4, 6.4, 2.0), (0.1, 0.1, 0.1)),
            "backbone": BackboneConfig(inputs=5, widths=(4, 4, 8, 8), outputs=8),
            "bev": BEVConfig((1, 1), (1, 2), (8, 8), (1, 2), (8, 8)),
            "anchors": (
                AnchorClass("car", (4.0, 1.8, 1.6), -1.0, 0.6, 0.45),
                AnchorClass("pole", (0.8, 0.8, 3.0), -1.0, 0.5, 0.35),
            ),
            "suppression": Suppression(0.01, 64, 16),
            "voxels": 1024,
            "evaluation_voxels": 1024,
        }
        return cls(**sizes | changes)

    def anchor_boxes(self) -> np.ndarray:
        """float32 [H, W, A, 7], by class, then heading; the anchors of corner pixels are at the grid's corners.

        Source: OpenPCDet, pcdet/models/dense_heads/target_assigner/anchor_generator.py.
        """
        height, width = self.grid.picture.shape
        y = np.linspace(self.grid.lower[1], self.grid.upper[1], height)[:, None, None]
        x = np.linspace(self.grid.lower[0], self.grid.upper[0], width)[None, :, None]
        rest = np.asarray(
            [(one.bottom + one.size[2] / 2, *one.size, heading) for one in self.anchors for heading in one.headings]
        )
        shape = (height, width, len(rest))
        columns = [x, y, *(rest[:, i] for i in range(5))]
        return np.stack([np.broadcast_to(column, shape) for column in columns], -1).astype(np.float32)


class AnchorHead(nnx.Module):
    """1 x 1 convolutions: of each anchor a logit per class, the code of its box, and a logit per direction.

    Source: OpenPCDet, pcdet/models/dense_heads/anchor_head_single.py.
    """

    def __init__(self, config: SECONDConfig, inputs: int, *, rngs: nnx.Rngs):
        count = sum(len(one.headings) for one in config.anchors)
        self.classes = picture_conv(inputs, count * len(config.anchors), 1, bias=True, rngs=rngs)
        if self.classes.bias is not None:  # a likelihood of 0.01 at the beginning
            self.classes.bias[...] = jnp.full_like(self.classes.bias[...], -math.log(99))
        small = nnx.initializers.normal(1e-3)
        self.boxes = picture_conv(inputs, count * 7, 1, bias=True, initial=small, rngs=rngs)
        self.directions = picture_conv(inputs, count * 2, 1, bias=True, rngs=rngs)

    def __call__(self, x) -> dict[str, Any]:
        """{"classes" [B, H W A, classes], "boxes" [B, H W A, 7], "directions" [B, H W A, 2]}, float32."""
        anchors = self.directions.out_features // 2
        return {
            name: conv(x).astype(jnp.float32).reshape(len(x), -1, conv.out_features // anchors)
            for name, conv in (("classes", self.classes), ("boxes", self.boxes), ("directions", self.directions))
        }


class SECOND(Detector):
    """The detector."""

    def __init__(self, config: SECONDConfig, *, rngs: nnx.Rngs):
        super().__init__(config.backbone, config.bev, config.grid, rngs=rngs)
        self.config = config
        self.head = AnchorHead(config, sum(config.bev.upsample_widths), rngs=rngs)

    def __call__(self, x: SparseTensor, *, train: bool = False):
        """What the head predicts, see `AnchorHead`, and {name: sites} of all levels, for `check_capacity`.

        Args:
          x: [N, inputs] on sites (sample, z, y, x) of `config.grid.spatial_shape`.
          train: norms use the batch's statistics and update the running ones.
        """
        picture, levels = self.picture(x, train=train)
        return self.head(picture), levels


def _wrap(angle, offset: float, period: float):
    """The angle moved by whole periods into [-offset period, (1 - offset) period)."""
    return angle - jnp.floor(angle / period + offset) * period


def encode_boxes(boxes, anchors):
    """(dx / d, dy / d, dz / anchor height, log ratios of length, width and height, heading difference), [..., 7].

    d is the diagonal of the anchor's ground. Source: OpenPCDet, pcdet/utils/box_coder_utils.py, ResidualCoder.
    """
    diagonal = jnp.hypot(anchors[..., 3:4], anchors[..., 4:5])
    moved = (boxes[..., :2] - anchors[..., :2]) / diagonal
    up = (boxes[..., 2:3] - anchors[..., 2:3]) / anchors[..., 5:6]
    sizes = jnp.log(boxes[..., 3:6] / anchors[..., 3:6])
    return jnp.concatenate([moved, up, sizes, boxes[..., 6:7] - anchors[..., 6:7]], -1)


def decode_boxes(code, anchors):
    """The inverse of `encode_boxes`."""
    diagonal = jnp.hypot(anchors[..., 3:4], anchors[..., 4:5])
    ground = code[..., :2] * diagonal + anchors[..., :2]
    z = code[..., 2:3] * anchors[..., 5:6] + anchors[..., 2:3]
    sizes = jnp.exp(code[..., 3:6]) * anchors[..., 3:6]
    return jnp.concatenate([ground, z, sizes, code[..., 6:7] + anchors[..., 6:7]], -1)


def aligned_iou(a, b):
    """Intersection over union seen from above of boxes turned to the nearest axis, [N, 7] and [M, 7] -> [N, M].

    Source: OpenPCDet, pcdet/utils/box_utils.py, boxes3d_nearest_bev_iou.
    """

    def bounds(boxes):
        lying = jnp.abs(_wrap(boxes[:, 6:7], 0.5, math.pi)) < math.pi / 4
        half = jnp.where(lying, boxes[:, 3:5], boxes[:, 4:2:-1]) / 2
        return boxes[:, :2] - half, boxes[:, :2] + half

    (low_a, high_a), (low_b, high_b) = bounds(a), bounds(b)
    sides = jnp.minimum(high_a[:, None], high_b[None]) - jnp.maximum(low_a[:, None], low_b[None])
    shared = jnp.maximum(sides, 0).prod(-1)
    areas = (high_a - low_a).prod(-1)[:, None] + (high_b - low_b).prod(-1)[None]
    return shared / jnp.maximum(areas - shared, 1e-6)


def anchor_targets(boxes, classes, config: SECONDConfig):
    """What each anchor should find in one sample.

    An anchor looks at the boxes of its own class alone, and takes the one that overlaps it most (`aligned_iou`). It is
    to find it if they overlap by `matched`, or if no anchor overlaps some box more than this one does.

    Args:
      boxes: float32 [M, 7 or more].
      classes: int32 [M]; -1 for padding.
    Returns:
      labels: int32 [H W A], the class to find, -1: background, -2: neither counts.
      code: float32 [H W A, 7], see `encode_boxes`; zero but where there is something to find.
    Source: OpenPCDet, pcdet/models/dense_heads/target_assigner/axis_aligned_target_assigner.py.
    """
    everything = jnp.asarray(config.anchor_boxes())  # [H, W, A, 7]
    boxes = boxes[:, :7]
    labels, codes, begin = [], [], 0
    for class_id, one in enumerate(config.anchors):
        anchors = everything[:, :, begin : begin + len(one.headings)].reshape(-1, 7)
        begin += len(one.headings)
        own = classes == class_id
        overlap = jnp.where(own, aligned_iou(anchors, boxes), -1)  # [anchors, M]
        most = overlap.max(1)
        best_anchors = (overlap == jnp.maximum(overlap.max(0), 1e-9)).any(1)
        find = best_anchors | (most >= one.matched)
        label = jnp.where(find, class_id, jnp.where(most < one.unmatched, -1, -2))
        nearest = jnp.where(own[:, None], boxes, jnp.ones(7))[overlap.argmax(1)]
        code = jnp.where(find[:, None], encode_boxes(nearest, anchors), 0)
        place = (*everything.shape[:2], len(one.headings))
        labels.append(label.reshape(place))
        codes.append(code.reshape(*place, 7))
    return jnp.concatenate(labels, 2).reshape(-1), jnp.concatenate(codes, 2).reshape(-1, 7)


def anchor_loss(predicted, boxes, classes, config: SECONDConfig):
    """The loss of an anchor head, mean over samples, and its parts by name.

    With P anchors that are to find a box, but at least 1, in a sample:
      classes: sum of a (1 - q)² cross-entropy over anchors and classes, q the likelihood of the truth, a = 0.25 for the
        class to find and 0.75 for the others, over P (focal loss).
      boxes: sum of smooth L1 (quadratic below 1/9) of the code over P, the heading's as sin(predicted - true).
      directions: sum of the cross-entropy over P; direction 0 or 1 is the half turn from `direction_offset` that the
        box's heading is in.

    Args:
      predicted: see `AnchorHead`.
      boxes: float32 [B, M, 7 or more].
      classes: int32 [B, M]; -1 for padding.
    Source: OpenPCDet, pcdet/models/dense_heads/anchor_head_template.py, pcdet/utils/loss_utils.py.
    """
    labels, code = jax.vmap(lambda b, c: anchor_targets(b, c, config))(boxes, classes)
    find = labels >= 0
    share = 1 / jnp.maximum(find.sum(1, keepdims=True), 1)  # [B, 1]
    true = jax.nn.one_hot(labels, len(config.anchors))
    logits = predicted["classes"]
    wrong = jnp.where(true > 0, jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
    entropy = jax.nn.softplus(jnp.where(true > 0, -logits, logits))
    focal = jnp.where(true > 0, 0.25, 0.75) * jnp.square(wrong) * entropy
    class_loss = (focal.sum(-1) * (labels > -2) * share).sum()
    errors = predicted["boxes"] - code
    errors = jnp.abs(jnp.concatenate([errors[..., :6], jnp.sin(errors[..., 6:])], -1))
    beta = 1 / 9
    smooth = jnp.where(errors < beta, jnp.square(errors) / (2 * beta), errors - beta / 2)
    box_loss = (smooth.sum(-1) * find * share).sum()
    heading = code[..., 6] + jnp.asarray(config.anchor_boxes()).reshape(-1, 7)[:, 6]
    direction = (_wrap(heading - config.direction_offset, 0, 2 * math.pi) >= math.pi).astype(jnp.int32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(predicted["directions"]), direction[..., None], -1)[..., 0]
    direction_loss = (-chosen * find * share).sum()
    parts = {
        "class_loss": class_loss / len(boxes),
        "box_loss": config.box_weight * box_loss / len(boxes),
        "direction_loss": config.direction_weight * direction_loss / len(boxes),
    }
    return sum(parts.values()), parts


def second_loss(model: SECOND, batch):
    """The training loss of one sparse tensor of scans, float32 scalar, and metrics.

    Args:
      model: runs in training: its running statistics change in place.
      batch: see `lumen.sparse.detection.batch_spec`.
    Returns:
      The loss, and its parts and "most_missing_rows", see `lumen.sparse.tensor.fail_on_missing_rows`.
    """
    predicted, levels = model(model.voxels(batch), train=True)
    loss, parts = anchor_loss(predicted, batch["boxes"], batch["classes"], model.config)
    loss, missing = fail_on_missing_rows(loss, levels)
    return loss, parts | missing


def decode_anchors(predicted, config: SECONDConfig) -> Detections:
    """The objects found, [B, config.detections].

    Args:
      predicted: see `AnchorHead`.
    """
    anchors = jnp.asarray(config.anchor_boxes()).reshape(-1, 7)
    boxes = decode_boxes(predicted["boxes"], anchors)
    turn = _wrap(boxes[..., 6] - config.direction_offset, 0, math.pi) + config.direction_offset
    boxes = boxes.at[..., 6].set(turn + math.pi * predicted["directions"].argmax(-1))
    scores = jax.nn.sigmoid(predicted["classes"].max(-1))
    classes = jnp.where(scores >= config.score, predicted["classes"].argmax(-1), -1)
    return jax.vmap(lambda one: suppress(one, config.suppression))(Detections(boxes, scores, classes))
