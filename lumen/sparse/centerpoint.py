"""CenterPoint (arXiv:2006.11275, as in OpenPCDet): LiDAR detection by the centres of objects.

model = CenterPoint(CenterPointConfig.nuscenes(), rngs=nnx.Rngs(0))
predictions, levels = model(x, train=False)         # x on sites (sample, z, y, x)
check_capacity(levels)
found = decode(predictions, model.config)           # boxes [B, K, 9]

Classes fall into groups, each with a head of its own. A head says for every pixel of the picture seen from above how
likely it is the centre of an object of each of its classes, and which box that object would have.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lumen.layers import BatchNorm
from lumen.sparse.boxes import Detections, Suppression, suppress
from lumen.sparse.detection import (
    BackboneConfig,
    BEVConfig,
    Detector,
    PictureBlock,
    PictureGrid,
    VoxelGrid,
    picture_conv,
)
from lumen.sparse.tensor import SparseTensor, fail_on_missing_rows

# What a head predicts for a box, in the order of its code, and how many numbers each is.
CODE = {"offset": 2, "z": 1, "size": 3, "heading": 2, "velocity": 2}
# The likelihood of a centre at the beginning of training: sigmoid(-2.19) = 0.1.
_INITIAL_LOGIT = -2.19
# Likelihoods in the loss stay so far away from 0 and 1.
_MARGIN = 1e-4


@dataclasses.dataclass(frozen=True)
class CenterPointConfig:
    """A CenterPoint.

    Attributes:
      grid: where voxels are.
      backbone, bev: of the picture.
      groups: names of the classes of each head; classes are numbered through all groups.
      velocity: whether boxes have one (vx, vy), metres per second.
      width: channels of the heads.
      overlap: boxes moved by less than the radius of their peak still overlap the true one by so much.
      smallest_radius: of a peak, pixels.
      box_weight: of the box loss beside the centres' loss.
      code_weights: of the numbers of a box: offset x and y, z, logarithms of length, width and height, cosine and sine
        of the heading, and the velocity.
      candidates: pixels per head that become boxes.
      score: detections below are dropped.
      centres: (x, y, z) and (x, y, z) that centres of detections have to lie between.
      suppression: of duplicates, in each group.
      voxels, evaluation_voxels, points: per scan in training and in evaluation, and points per voxel: what
        `hard_voxelize` keeps.
    """

    grid: VoxelGrid
    groups: tuple[tuple[str, ...], ...]
    backbone: BackboneConfig = dataclasses.field(
        default_factory=lambda: BackboneConfig(inputs=5, widths=(16, 32, 64, 128), residual=True)
    )
    bev: BEVConfig = dataclasses.field(default_factory=BEVConfig)
    velocity: bool = False
    width: int = 64
    overlap: float = 0.1
    smallest_radius: int = 2
    box_weight: float = 2.0
    code_weights: tuple[float, ...] = (1.0,) * 8
    candidates: int = 500
    score: float = 0.1
    centres: tuple[tuple[float, ...], ...] = ((-1e3,) * 3, (1e3,) * 3)
    suppression: Suppression = dataclasses.field(default_factory=lambda: Suppression(0.7, 4096, 500))
    voxels: int = 150_000
    evaluation_voxels: int = 150_000
    points: int = 5

    def __post_init__(self):
        wanted = sum(CODE[name] for name in self.code)
        if len(self.code_weights) != wanted:
            raise ValueError(
                f"CenterPointConfig: {len(self.code_weights)} code_weights; wanted {wanted}, as velocity="
                f"{self.velocity}."
            )
        if not self.groups or not all(self.groups) or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"CenterPointConfig: groups={self.groups}; wanted some, none empty, each class once.")

    @property
    def code(self) -> tuple[str, ...]:
        """The parts of a box that heads predict."""
        return tuple(name for name in CODE if name != "velocity" or self.velocity)

    @property
    def columns(self) -> int:
        """Numbers per box: 7, and 9 with a velocity."""
        return 9 if self.velocity else 7

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes; a class id is a place in it."""
        return tuple(name for group in self.groups for name in group)

    @property
    def detections(self) -> int:
        """Objects found in a sample at most."""
        return len(self.groups) * self.suppression.detections

    @classmethod
    def nuscenes(cls, **changes) -> "CenterPointConfig":
        """nuScenes with voxels of 0.075 m, ten sweeps; points are x, y, z, intensity and age.

        mAP 59.2, NDS 66.5 on the validation set. The 0.2 of code_weights are at the heading, as in OpenPCDet; the
        paper's code has them at the velocity.
        Source: OpenPCDet, tools/cfgs/nuscenes_models/cbgs_voxel0075_res3d_centerpoint.yaml.
        """
        sizes: dict[str, Any] = {
            "grid": VoxelGrid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.075, 0.075, 0.2)),
            "groups": (
                ("car",),
                ("truck", "construction_vehicle"),
                ("bus", "trailer"),
                ("barrier",),
                ("motorcycle", "bicycle"),
                ("pedestrian", "traffic_cone"),
            ),
            "velocity": True,
            "box_weight": 0.25,
            "code_weights": (1.0,) * 6 + (0.2, 0.2, 1.0, 1.0),
            "centres": ((-61.2, -61.2, -10.0), (61.2, 61.2, 10.0)),
            "suppression": Suppression(0.2, 1000, 83),
            "voxels": 120_000,
            "evaluation_voxels": 160_000,
            "points": 10,
        }
        return cls(**sizes | changes)

    @classmethod
    def waymo(cls, **changes) -> "CenterPointConfig":
        """Waymo; points are x, y, z, intensity and elongation.

        Trained on a fifth of the data, mAPH of level 2 is 64.4 (vehicles), 60.3 (pedestrians), 67.3 (cyclists); with
        plain blocks, `backbone=BackboneConfig(inputs=5)`, 62.7, 58.2, 64.9.
        Source: OpenPCDet, tools/cfgs/waymo_models/centerpoint.yaml.
        """
        sizes: dict[str, Any] = {
            "grid": VoxelGrid((-75.2, -75.2, -2.0), (75.2, 75.2, 4.0), (0.1, 0.1, 0.15)),
            "groups": (("Vehicle", "Pedestrian", "Cyclist"),),
            "centres": ((-75.2, -75.2, -2.0), (75.2, 75.2, 4.0)),
        }
        return cls(**sizes | changes)

    @classmethod
    def debug(cls, **changes) -> "CenterPointConfig":
        """A toy for tests: two groups, 16 x 16 pixels of 0.8 m."""
        sizes: dict[str, Any] = {
            "grid": VoxelGrid((-6.4, -6.4, -2.0), (6.4, 6.4, 2.0), (0.1, 0.1, 0.1)),
            "groups": (("car",), ("pole", "building")),
            "backbone": BackboneConfig(inputs=5, widths=(4, 4, 8, 8), outputs=8, residual=True),
            "bev": BEVConfig((1, 1), (1, 2), (8, 8), (1, 2), (8, 8)),
            "width": 8,
            "velocity": True,
            "code_weights": (1.0,) * 10,
            "candidates": 32,
            "suppression": Suppression(0.2, 32, 16),
            "voxels": 1024,
            "evaluation_voxels": 1024,
        }
        return cls(**sizes | changes)


class Branch(nnx.Module):
    """3 x 3 convolution, BatchNorm, ReLU, 3 x 3 convolution: one thing that a head predicts of every pixel."""

    def __init__(self, inputs: int, outputs: int, *, heatmap: bool, rngs: nnx.Rngs):
        initial = None if heatmap else nnx.initializers.he_normal()
        conv = picture_conv(inputs, inputs, bias=True, initial=initial, rngs=rngs)
        self.block = PictureBlock(conv, BatchNorm(inputs))
        self.out = picture_conv(inputs, outputs, bias=True, initial=initial, rngs=rngs)
        if heatmap and self.out.bias is not None:
            self.out.bias[...] = jnp.full(outputs, _INITIAL_LOGIT, jnp.float32)

    def __call__(self, x, *, train: bool):
        return self.out(self.block(x, train=train)).astype(jnp.float32)


class CenterHead(nnx.Module):
    """Heads of all groups on a shared convolution.

    Source: OpenPCDet, pcdet/models/dense_heads/center_head.py.
    """

    def __init__(self, config: CenterPointConfig, inputs: int, *, rngs: nnx.Rngs):
        width = config.width
        self.shared = PictureBlock(picture_conv(inputs, width, bias=True, rngs=rngs), BatchNorm(width))
        self.groups = nnx.List()
        for names in config.groups:
            branches = {name: Branch(width, CODE[name], heatmap=False, rngs=rngs) for name in config.code}
            branches["heatmap"] = Branch(width, len(names), heatmap=True, rngs=rngs)
            self.groups.append(nnx.Dict(branches))

    def __call__(self, x, *, train: bool = False) -> list[dict[str, Any]]:
        """Of each group {"heatmap": logits [B, H, W, classes], and of a box's parts: [B, H, W, numbers]}, float32."""
        x = self.shared(x, train=train)
        return [{name: branch(x, train=train) for name, branch in group.items()} for group in self.groups]


class CenterPoint(Detector):
    """The detector."""

    def __init__(self, config: CenterPointConfig, *, rngs: nnx.Rngs):
        super().__init__(config.backbone, config.bev, config.grid, rngs=rngs)
        self.config = config
        self.head = CenterHead(config, sum(config.bev.upsample_widths), rngs=rngs)

    def __call__(self, x: SparseTensor, *, train: bool = False):
        """What the heads predict, see `CenterHead`, and {name: sites} of all levels, for `check_capacity`.

        Args:
          x: [N, inputs] on sites (sample, z, y, x) of `config.grid.spatial_shape`.
          train: norms use the batch's statistics and update the running ones.
        """
        picture, levels = self.picture(x, train=train)
        return self.head(picture, train=train), levels


def gaussian_radius(length, width, overlap: float):
    """How far a box may move, in pixels, and still overlap itself by `overlap`: the least of three roots.

    Of the three ways in which two boxes' corners can lie: both move, one shrinks, one grows. The second root misses a
    division by 4 and the third one by 4 overlap, as published.

    Args:
      length, width: float32 [...], pixels.
    Source: CornerNet, arXiv:1808.01244; OpenPCDet, pcdet/models/model_utils/centernet_utils.py.
    """
    total, area = length + width, length * width

    def root(a, b, c):
        return (b + jnp.sqrt(b**2 - 4 * a * c)) / 2

    moved = root(1, total, area * (1 - overlap) / (1 + overlap))
    shrunk = root(4, 2 * total, area * (1 - overlap))
    grown = root(4 * overlap, -2 * overlap * total, area * (overlap - 1))
    return jnp.minimum(jnp.minimum(moved, shrunk), grown)


def center_targets(boxes, classes, first: int, number: int, grid: PictureGrid, config: CenterPointConfig):
    """What the head of one group should predict.

    Args:
      boxes: float32 [B, M, 7 or 9].
      classes: int32 [B, M]; those of other groups, and -1 for padding, are left out.
      first, number: the group's classes are first to first + number - 1.
    Returns:
      heatmap: float32 [B, H, W, number], at every pixel the highest of the class's peaks exp(-d² / (2 s²)) that reach
        it; around the pixel of a box's centre, d pixels away, with s = (2 r + 1) / 6, cut off beyond r pixels along
        either axis, r = max(floor(`gaussian_radius`), smallest_radius).
      code: float32 [B, M, 8 or 10], in the order of `CODE`.
      pixels: int32 [B, M], y W + x of the centre's pixel.
      used: bool [B, M], boxes of the group that have an extent.
    Source: OpenPCDet, pcdet/models/dense_heads/center_head.py.
    """
    height, width = grid.shape
    x, y = ((boxes[..., i] - grid.lower[i]) / grid.voxel[i] / grid.stride for i in (0, 1))
    x, y = jnp.clip(x, 0, width - 0.5), jnp.clip(y, 0, height - 0.5)  # a box beyond the picture counts at its rim
    column, row = x.astype(jnp.int32), y.astype(jnp.int32)
    length, breadth = (boxes[..., 3 + i] / grid.voxel[i] / grid.stride for i in (0, 1))
    used = (classes >= first) & (classes < first + number) & (length > 0) & (breadth > 0)
    radius = gaussian_radius(length, breadth, config.overlap).astype(jnp.int32)
    radius = jnp.maximum(radius, config.smallest_radius)[..., None]

    def profile(centre, size):
        """One axis of the peaks: [B, M, size]; a Gaussian is the product of its profiles."""
        away = jnp.arange(size) - centre[..., None]
        deviation = (2 * radius + 1) / 6
        return jnp.where(jnp.abs(away) <= radius, jnp.exp(-jnp.square(away / deviation) / 2), 0)

    rows, columns = profile(row, height), profile(column, width)

    def highest(class_id):
        own = jnp.where((used & (classes == class_id))[..., None], rows, 0)
        return (own[..., :, None] * columns[..., None, :]).max(1)  # [B, H, W]

    heatmap = jax.lax.map(highest, first + jnp.arange(number))
    sizes = jnp.where(used[..., None], boxes[..., 3:6], 1)
    parts = [x - column, y - row, boxes[..., 2], *jnp.moveaxis(jnp.log(sizes), -1, 0)]
    parts += [jnp.cos(boxes[..., 6]), jnp.sin(boxes[..., 6])]
    if config.velocity:
        parts += [boxes[..., 7], boxes[..., 8]]
    code = jnp.where(used[..., None], jnp.stack(parts, -1), 0)
    return jnp.moveaxis(heatmap, 0, -1), code, jnp.where(used, row * width + column, 0), used


def heatmap_loss(logits, heatmap):
    """Penalty-reduced focal loss of likelihoods p = sigmoid(logits), kept in [1e-4, 1 - 1e-4], float32 scalar.

    -(sum over peaks of (1 - p)² log p + sum over the rest of (1 - h)⁴ p² log(1 - p)) / max(number of peaks, 1), where
    peaks are the pixels at which the heat map h is 1.
    """
    p = jnp.clip(jax.nn.sigmoid(logits), _MARGIN, 1 - _MARGIN)
    peak = heatmap == 1
    gain = jnp.where(peak, jnp.square(1 - p) * jnp.log(p), (1 - heatmap) ** 4 * jnp.square(p) * jnp.log(1 - p))
    return -gain.sum() / jnp.maximum(peak.sum(), 1)


def box_loss(predicted, code, pixels, used):
    """Mean over the used boxes of |predicted at the box's pixel - code|, of each number of the code: float32 [numbers].

    Numbers that are NaN in the code (nuScenes does not know every velocity) add nothing.

    Args:
      predicted: [B, H, W, numbers].
      code, pixels, used: see `center_targets`.
    """
    rows = predicted.reshape(predicted.shape[0], -1, predicted.shape[-1])
    rows = jnp.take_along_axis(rows, pixels[..., None], 1)  # [B, M, numbers]
    known = used[..., None] & ~jnp.isnan(code)
    errors = jnp.where(known, jnp.abs(rows - jnp.where(known, code, 0)), 0)
    return errors.sum((0, 1)) / jnp.maximum(used.sum(), 1)


def head_loss(predictions, boxes, classes, grid: PictureGrid, config: CenterPointConfig):
    """Sum over the groups of the heat map's loss and the weighted loss of the boxes, and both sums by name."""
    centres, codes, first = jnp.float32(0), jnp.float32(0), 0
    for names, predicted in zip(config.groups, predictions, strict=True):
        heatmap, code, pixels, used = center_targets(boxes, classes, first, len(names), grid, config)
        centres += heatmap_loss(predicted["heatmap"], heatmap)
        errors = box_loss(jnp.concatenate([predicted[name] for name in config.code], -1), code, pixels, used)
        codes += config.box_weight * (errors * jnp.asarray(config.code_weights)).sum()
        first += len(names)
    return centres + codes, {"centre_loss": centres, "box_loss": codes}


def centerpoint_loss(model: CenterPoint, batch):
    """The training loss of one sparse tensor of scans, float32 scalar, and metrics.

    Args:
      model: runs in training: its running statistics change in place.
      batch: see `lumen.sparse.detection.batch_spec`.
    Returns:
      The loss, and {"centre_loss", "box_loss", "most_missing_rows"}, see `lumen.sparse.tensor.fail_on_missing_rows`.
    """
    predictions, levels = model(model.voxels(batch), train=True)
    config = model.config
    loss, parts = head_loss(predictions, batch["boxes"], batch["classes"], config.grid.picture, config)
    loss, missing = fail_on_missing_rows(loss, levels)
    return loss, parts | missing


def candidates(predicted, first: int, grid: PictureGrid, config: CenterPointConfig) -> Detections:
    """The boxes of one group's most likely centres, all in [B, config.candidates], before suppression.

    Those whose likelihood is not above config.score, or whose centre is not within config.centres, have class -1.

    Args:
      predicted: of the group, see `CenterHead`.
      first: the group's first class.
    """
    height, width = grid.shape
    likely = jax.nn.sigmoid(jnp.moveaxis(predicted["heatmap"], -1, 1))  # [B, classes, H, W]
    scores, places = jax.lax.top_k(likely.reshape(likely.shape[0], -1), min(config.candidates, likely[0].size))
    pixels = places % (height * width)

    def at_pixels(name):
        rows = predicted[name].reshape(likely.shape[0], height * width, -1)
        return jnp.take_along_axis(rows, pixels[..., None], 1)  # [B, K, numbers]

    along, heading = at_pixels("offset"), at_pixels("heading")
    x = (pixels % width + along[..., 0]) * grid.stride * grid.voxel[0] + grid.lower[0]
    y = (pixels // width + along[..., 1]) * grid.stride * grid.voxel[1] + grid.lower[1]
    parts = [x[..., None], y[..., None], at_pixels("z"), jnp.exp(at_pixels("size"))]
    parts.append(jnp.arctan2(heading[..., 1:], heading[..., :1]))
    if config.velocity:
        parts.append(at_pixels("velocity"))
    boxes = jnp.concatenate(parts, -1)
    lowest, highest = jnp.asarray(config.centres, jnp.float32)
    inside = ((boxes[..., :3] >= lowest) & (boxes[..., :3] <= highest)).all(-1)
    good = inside & (scores > config.score)
    return Detections(boxes, scores, jnp.where(good, first + places // (height * width), -1))


def decode(predictions, config: CenterPointConfig, grid: PictureGrid | None = None) -> Detections:
    """The objects found: of each group up to `config.suppression.detections`, [B, config.detections].

    Args:
      predictions: see `CenterHead`.
      grid: of the picture; None for the config's.
    """
    found, first = [], 0
    for names, predicted in zip(config.groups, predictions, strict=True):
        group = candidates(predicted, first, grid or config.grid.picture, config)
        found.append(jax.vmap(lambda one: suppress(one, config.suppression))(group))
        first += len(names)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *found)
