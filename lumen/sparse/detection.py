"""What SECOND and CenterPoint share: from the voxels of LiDAR scans to a picture seen from above.

Voxels go through a sparse backbone that halves the grid three times, its output is laid out as a picture seen from
above, and a 2-D backbone mixes it at two scales. A head then finds the boxes: by anchors in lumen/sparse/second.py, by
centres in lumen/sparse/centerpoint.py.

Sites are (sample, z, y, x), pictures [B, H, W, C] with H along y and W along x.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lumen.layers import BatchNorm
from lumen.sparse.convolution import ConvBlock, ResidualBlock, to_dense
from lumen.sparse.kernel_maps import SiteMap, strided_map, submanifold_map
from lumen.sparse.tensor import Sites, SparseTensor, whole_tiles
from pallas_kernels.sparse_convolution import Dataflows

LEVELS = 4
STRIDE = 8
# Of all norms of both backbones.
_NORM: dict[str, Any] = {"epsilon": 1e-3, "momentum": 0.01}


@dataclasses.dataclass(frozen=True)
class VoxelGrid:
    """The part of space that is looked at, cut into voxels.

    Attributes:
      lower, upper: (x, y, z) of its corners, metres.
      voxel: extents of a voxel, metres.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    voxel: tuple[float, ...]

    def __post_init__(self):
        if not len(self.lower) == len(self.upper) == len(self.voxel) == 3 or min(self.voxel) <= 0:
            raise ValueError(
                f"VoxelGrid: lower={self.lower}, upper={self.upper}, voxel={self.voxel}; wanted three numbers each, "
                "the voxel's above 0."
            )
        if min(self.cells) < STRIDE:
            raise ValueError(
                f"VoxelGrid: {self.cells} voxels along x, y and z; wanted at least {STRIDE} each; enlarge the grid."
            )

    @property
    def cells(self) -> tuple[int, ...]:
        """Voxels along x, y and z."""
        return tuple(
            round((upper - lower) / voxel)
            for lower, upper, voxel in zip(self.lower, self.upper, self.voxel, strict=True)
        )

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """Of sites, (z, y, x). There is one layer of voxels above the uppermost, as in OpenPCDet."""
        x, y, z = self.cells
        return z + 1, y, x

    @property
    def picture(self) -> "PictureGrid":
        """Of the picture that the backbone makes."""
        x, y, _ = self.cells
        return PictureGrid(self.lower[:2], self.voxel[:2], STRIDE, (-(-y // STRIDE), -(-x // STRIDE)))


@dataclasses.dataclass(frozen=True)
class PictureGrid:
    """The pixels of a picture seen from above: pixel i along an axis begins at lower + i voxel stride.

    Attributes:
      lower: (x, y), metres.
      voxel: extents of a voxel, (x, y), metres.
      stride: voxels per pixel.
      shape: height, along y, and width, along x.
    """

    lower: tuple[float, ...]
    voxel: tuple[float, ...]
    stride: int
    shape: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A sparse backbone.

    Attributes:
      inputs: channels per voxel.
      widths: of the four levels.
      outputs: channels of the last layer.
      residual: whether levels are made of residual blocks, as in CenterPoint, or of plain ones.
      level_fractions: capacities of levels 2, 3, 4 and of the output as fractions of the input's rows. Scans of street
        scenes (`lumen.training.lidar.street_scans`) in the published grids need up to (1.23, 0.68, 0.48, 0.41), and
        (1.51, 1.03, 0.49, 0.43) where only a part of their voxels is kept; scattered voxels more, up to 8.
      dataflows: by map, see `MAP_NAMES`; one that is not named runs as `Dataflows()` says.
    """

    inputs: int = 4
    widths: tuple[int, ...] = (16, 32, 64, 64)
    outputs: int = 128
    residual: bool = False
    level_fractions: tuple[float, ...] = (2.0, 1.25, 0.625, 0.5)
    dataflows: tuple[tuple[str, Dataflows], ...] = ()

    def __post_init__(self):
        if len(self.widths) != LEVELS or min(self.widths) < 1:
            raise ValueError(f"BackboneConfig: widths={self.widths}; wanted {LEVELS} numbers above 0.")
        if len(self.level_fractions) != LEVELS or min(self.level_fractions) <= 0:
            raise ValueError(
                f"BackboneConfig: level_fractions={self.level_fractions}; wanted {LEVELS} numbers above 0."
            )
        unknown = {name for name, _ in self.dataflows} - set(MAP_NAMES)
        if unknown:
            raise ValueError(f"BackboneConfig: dataflows of {sorted(unknown)}; the maps are {', '.join(MAP_NAMES)}.")


MAP_NAMES = (*(f"submanifold{level}" for level in range(1, 5)), "down2", "down3", "down4", "out")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["submanifold", "down", "out"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BackboneMaps:
    """The eight maps of a backbone.

    Attributes:
      submanifold: of each level; four.
      down: from each level to the next; three.
      out: to the output.
    """

    submanifold: tuple[SiteMap, ...]
    down: tuple[SiteMap, ...]
    out: SiteMap

    @property
    def levels(self) -> dict[str, Sites]:
        """The sites of each level, for `check_capacity`."""
        levels = {f"level {number}": one.inputs for number, one in enumerate(self.submanifold, 1)}
        return levels | {"output": self.out.outputs}


def backbone_maps(sites: Sites, config: BackboneConfig) -> BackboneMaps:
    """Windows of 3 within a level; of 3 with stride 2 between them; of 3 with stride 2 along z alone for the output.

    Sites of a level are those whose window holds a site of the level before, within the grid. Between levels 3 and 4
    and before the output there is no padding along z: 41 layers become 21, 11, 5 and 2.
    """
    flows = dict(config.dataflows)
    capacities = [whole_tiles(fraction * sites.capacity) for fraction in config.level_fractions]
    submanifold, down = [submanifold_map(sites, 3, dataflows=flows.get("submanifold1"))], []
    for level, capacity in zip((2, 3, 4), capacities, strict=False):
        padding = (0, 1, 1) if level == LEVELS else 1
        below = flows.get(f"down{level}")
        down.append(strided_map(sites, 3, 2, padding=padding, capacity=capacity, dataflows=below))
        sites = down[-1].outputs
        submanifold.append(submanifold_map(sites, 3, dataflows=flows.get(f"submanifold{level}")))
    out = strided_map(sites, (3, 1, 1), (2, 1, 1), capacity=capacities[-1], dataflows=flows.get("out"))
    return BackboneMaps(tuple(submanifold), tuple(down), out)


class Level(nnx.Module):
    """A strided block, on all levels but the first, and blocks on the level's sites.

    As published, the convolutions of residual blocks have a bias although norms follow.
    """

    def __init__(self, inputs: int, width: int, blocks: int, *, first: bool, residual: bool, rngs: nnx.Rngs):
        self.down = None if first else ConvBlock(inputs, width, **_NORM, rngs=rngs)
        block = functools.partial(ResidualBlock, bias=True) if residual else ConvBlock
        self.blocks = nnx.List([block(width, width, **_NORM, rngs=rngs) for _ in range(blocks)])

    def __call__(self, x: SparseTensor, down: SiteMap | None, within: SiteMap, *, train: bool) -> SparseTensor:
        if self.down is not None and down is not None:
            x = self.down(x, down, train=train)
        for block in self.blocks:
            x = block(x, within, train=train)
        return x


class SparseBackbone(nnx.Module):
    """VoxelBackBone8x, or with `residual` VoxelResBackBone8x.

    Source: OpenPCDet, pcdet/models/backbones_3d/spconv_backbone.py.
    """

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.widths
        self.stem = ConvBlock(config.inputs, widths[0], **_NORM, rngs=rngs)
        blocks = [2, 2, 2, 2] if config.residual else [1, 2, 2, 2]
        self.levels = nnx.List(
            [
                Level(inputs, width, number, first=i == 0, residual=config.residual, rngs=rngs)
                for i, (inputs, width, number) in enumerate(zip((widths[0], *widths[:-1]), widths, blocks, strict=True))
            ]
        )
        self.out = ConvBlock(widths[-1], config.outputs, (3, 1, 1), **_NORM, rngs=rngs)

    def __call__(self, x: SparseTensor, maps: BackboneMaps | None = None, *, train: bool = False) -> list[SparseTensor]:
        """The features of the four levels and of the output.

        Args:
          x: [N, inputs] on sites (sample, z, y, x).
          maps: of x's sites; None to build them here.
          train: norms use the batch's statistics and update the running ones.
        """
        maps = backbone_maps(x.sites, self.config) if maps is None else maps
        x = self.stem(x, maps.submanifold[0], train=train)
        features = []
        for level, down, within in zip(self.levels, (None, *maps.down), maps.submanifold, strict=True):
            x = level(x, down, within, train=train)
            features.append(x)
        return [*features, self.out(x, maps.out, train=train)]


def height_compression(x: SparseTensor):
    """[N, C] on sites of D layers -> the picture from above, [B, H, W, C D], channel c D + d."""
    dense = jnp.moveaxis(to_dense(x), 1, -1)  # [B, H, W, C, D]
    return dense.reshape(*dense.shape[:3], -1)


def picture_conv(
    inputs: int, outputs: int, size: int = 3, *, stride: int = 1, bias: bool = False, initial=None, rngs: nnx.Rngs
) -> nnx.Conv:
    """A size x size convolution of a picture, padded by size // 2; weights and bias U(-a, a), a = 1 / sqrt(fan-in).

    Args:
      initial: another initialiser of the weights; the bias then begins at zero.
    """
    bound = (inputs * size**2) ** -0.5

    def uniform(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=bias,
        kernel_init=initial or uniform,
        bias_init=nnx.initializers.zeros if initial else uniform,
        rngs=rngs,
    )


class PictureBlock(nnx.Module):
    """Convolution of a picture, BatchNorm, ReLU."""

    def __init__(self, conv: nnx.Conv, norm: BatchNorm):
        self.conv, self.norm = conv, norm

    def __call__(self, x, *, train: bool):
        return jax.nn.relu(self.norm(self.conv(x), train=train))


class UpsampleBlock(nnx.Module):
    """Transposed convolution whose windows lie side by side, BatchNorm, ReLU: each pixel becomes stride x stride.

    Attributes:
      kernel: [stride, stride, Cin, Cout].
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        bound = (outputs * stride**2) ** -0.5
        shape = (stride, stride, inputs, outputs)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.norm = BatchNorm(outputs, **_NORM)

    def __call__(self, x, *, train: bool):
        kernel = self.kernel[...].astype(x.dtype)
        parts = jnp.einsum("bhwi,klio->bhkwlo", x, kernel)
        batch, height, rows, width, columns, channels = parts.shape
        y = parts.reshape(batch, height * rows, width * columns, channels)
        return jax.nn.relu(self.norm(y, train=train))


@dataclasses.dataclass(frozen=True)
class BEVConfig:
    """The 2-D backbone.

    Attributes:
      layers: convolutions of each stage after its first, strided one.
      strides, widths: of each stage.
      upsample_strides, upsample_widths: of what brings each stage's result to the size of the output.
    """

    layers: tuple[int, ...] = (5, 5)
    strides: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (128, 256)
    upsample_strides: tuple[int, ...] = (1, 2)
    upsample_widths: tuple[int, ...] = (256, 256)

    def __post_init__(self):
        stages = {len(value) for value in dataclasses.astuple(self)}
        if len(stages) != 1:
            raise ValueError(f"BEVConfig: {self}; wanted as many entries everywhere, one per stage.")
        scales = [math.prod(self.strides[: i + 1]) / up for i, up in enumerate(self.upsample_strides)]
        if len(set(scales)) != 1 or scales[0] != 1:
            raise ValueError(
                f"BEVConfig: strides={self.strides}, upsample_strides={self.upsample_strides}; wanted every stage back "
                "at the size of the input: an upsample stride that is the product of the strides up to its stage."
            )


class BEVBackbone(nnx.Module):
    """BaseBEVBackbone: stages of 3 x 3 convolutions, each upsampled to the input's size, side by side.

    Source: OpenPCDet, pcdet/models/backbones_2d/base_bev_backbone.py.
    """

    def __init__(self, config: BEVConfig, inputs: int, *, rngs: nnx.Rngs):
        self.config = config

        def block(inputs, outputs, stride):
            conv = picture_conv(inputs, outputs, stride=stride, rngs=rngs)
            return PictureBlock(conv, BatchNorm(outputs, **_NORM))

        self.stages, self.upsamples = nnx.List(), nnx.List()
        for layers, stride, width, up_stride, up_width in zip(*dataclasses.astuple(config), strict=True):
            blocks = [block(inputs, width, stride), *(block(width, width, 1) for _ in range(layers))]
            self.stages.append(nnx.List(blocks))
            self.upsamples.append(UpsampleBlock(width, up_width, up_stride, rngs=rngs))
            inputs = width

    def __call__(self, x, *, train: bool = False):
        """[B, H, W, inputs] -> [B, H, W, sum of upsample_widths]."""
        deepest = math.prod(self.config.strides)
        if x.shape[1] % deepest or x.shape[2] % deepest:
            raise ValueError(
                f"BEVBackbone: a picture of {x.shape[1]} x {x.shape[2]} pixels; wanted multiples of {deepest}. Choose "
                f"a grid of a multiple of {deepest * STRIDE} voxels along x and y."
            )
        results = []
        for stage, upsample in zip(self.stages, self.upsamples, strict=True):
            for block in stage:
                x = block(x, train=train)
            results.append(upsample(x, train=train))
        return jnp.concatenate(results, -1)


class Detector(nnx.Module):
    """Both backbones: from voxels to the picture that a head reads."""

    def __init__(self, backbone: BackboneConfig, bev: BEVConfig, grid: VoxelGrid, *, rngs: nnx.Rngs):
        self.grid = grid
        self.backbone = SparseBackbone(backbone, rngs=rngs)
        depth = grid.spatial_shape[0]
        for padding in (1, 1, 0, 0):  # the strided layers of `backbone_maps`: 41 -> 2
            depth = (depth + 2 * padding - 3) // 2 + 1
        self.bev = BEVBackbone(bev, backbone.outputs * depth, rngs=rngs)

    def voxels(self, batch) -> SparseTensor:
        """The input of a batch, see `batch_spec`, in the dtype of the weights."""
        features = batch["features"].astype(self.backbone.stem.conv.kernel.dtype)
        scans = batch["boxes"].shape[0]
        return SparseTensor.create(features, batch["coordinates"], batch["count"], self.grid.spatial_shape, scans)

    def picture(self, x: SparseTensor, *, train: bool):
        """The picture [B, H, W, C], and the sites of all levels."""
        maps = backbone_maps(x.sites, self.backbone.config)
        features = self.backbone(x, maps, train=train)
        return self.bev(height_compression(features[-1]), train=train), maps.levels


def batch_spec(inputs: int, columns: int, *, scans: int, voxels: int, boxes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch: scans in one sparse tensor of `voxels` rows, and boxes per scan.

    coordinates are (scan, z, y, x), the first `count` rows are in use; classes are -1 for padding.
    """
    return {
        "coordinates": jax.ShapeDtypeStruct((voxels, 4), jnp.int32),
        "features": jax.ShapeDtypeStruct((voxels, inputs), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
        "boxes": jax.ShapeDtypeStruct((scans, boxes, columns), jnp.float32),
        "classes": jax.ShapeDtypeStruct((scans, boxes), jnp.int32),
    }
