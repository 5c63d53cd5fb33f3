"""MinkUNet (arXiv:1904.08755, as in SPVNAS, arXiv:2007.16100): a U-Net of sparse convolutions for LiDAR segmentation.

maps = unet_maps(sites, config)
logits = model(x, maps)               # [N, classes], a row per voxel
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lumen.sparse.convolution import ConvBlock, ResidualBlock, SparseLinear, concatenate
from lumen.sparse.kernel_maps import SiteMap, strided_map, submanifold_map
from lumen.sparse.tensor import Sites, SparseTensor, whole_tiles
from pallas_kernels.sparse_convolution import Dataflows

LEVELS = 4
# The published widths at ratio 1: of the stem, the four stages down and the four up.
WIDTHS = (32, 32, 64, 128, 256, 256, 128, 96, 96)


@dataclasses.dataclass(frozen=True)
class MinkUNetConfig:
    """A MinkUNet.

    Attributes:
      widths: channels of the stem, the stages down and the stages up, nine in all.
      inputs: channels per voxel: x, y, z, intensity.
      classes: of the output.
      sites: rule of the coarser levels' sites, see `strided_map`: "floor" as checkpoints assume, or "window".
      level_fractions: capacities of the four coarser levels as fractions of the input's rows; () for 1, which always
        suffices. LiDAR scans at 0.05 m need about (0.65, 0.33, 0.15, 0.06).
      dataflows: by map, "submanifold0" to "submanifold4" and "down1" to "down4" (which the way up inverts); a map
        that is not named runs as `default_dataflows` says. `lumen.sparse.tuning` finds good ones.
    """

    widths: tuple[int, ...] = WIDTHS
    inputs: int = 4
    classes: int = 19
    sites: Literal["floor", "window"] = "floor"
    level_fractions: tuple[float, ...] = ()
    dataflows: tuple[tuple[str, Dataflows], ...] = ()

    def __post_init__(self):
        if len(self.widths) != 2 * LEVELS + 1 or min(self.widths) < 1:
            raise ValueError(f"MinkUNetConfig: widths={self.widths}; wanted {2 * LEVELS + 1} numbers above 0.")
        if len(self.level_fractions) not in (0, LEVELS) or not all(0 < one <= 1 for one in self.level_fractions):
            raise ValueError(
                f"MinkUNetConfig: level_fractions={self.level_fractions}; wanted {LEVELS} of them in (0, 1], or none."
            )
        unknown = {name for name, _ in self.dataflows} - set(MAP_NAMES)
        if unknown:
            raise ValueError(f"MinkUNetConfig: dataflows of {sorted(unknown)}; the maps are {', '.join(MAP_NAMES)}.")

    @classmethod
    def scaled(cls, ratio: float, **changes) -> "MinkUNetConfig":
        """The published sizes: ratio 0.5 (5.4M parameters), 0.64 (8.8M) and 1 (21.7M).

        Source: mit-han-lab/spvnas, core/models/semantic_kitti/minkunet.py.
        """
        return cls(widths=tuple(int(ratio * width) for width in WIDTHS), **changes)

    @classmethod
    def debug(cls, **changes) -> "MinkUNetConfig":
        """A toy of a ratio of 1/8, for tests."""
        return cls.scaled(0.125, **changes)


MAP_NAMES = tuple(f"submanifold{level}" for level in range(LEVELS + 1)) + tuple(
    f"down{level}" for level in range(1, LEVELS + 1)
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["submanifold", "down"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class UNetMaps:
    """The nine maps of a U-Net's forward pass.

    Attributes:
      submanifold: of each level, finest first; five.
      down: from each level to the next; four.
    """

    submanifold: tuple[SiteMap, ...]
    down: tuple[SiteMap, ...]

    @property
    def levels(self) -> dict[str, Sites]:
        """The sites of each level, for `check_capacity`."""
        return {f"level {level}": one.inputs for level, one in enumerate(self.submanifold)}


def unet_maps(sites: Sites, config: MinkUNetConfig) -> UNetMaps:
    """The maps of all levels: windows of 3 within a level, of 2 with stride 2 between them."""
    flows = dict(config.dataflows)
    capacities = [whole_tiles(fraction * sites.capacity) for fraction in config.level_fractions]
    submanifold, down = [], []
    for level in range(LEVELS + 1):
        submanifold.append(submanifold_map(sites, 3, dataflows=flows.get(f"submanifold{level}")))
        if level < LEVELS:
            capacity = capacities[level] if capacities else None
            below = flows.get(f"down{level + 1}")
            down.append(strided_map(sites, 2, 2, rule=config.sites, capacity=capacity, dataflows=below))
            sites = down[-1].outputs
    return UNetMaps(tuple(submanifold), tuple(down))


class Stage(nnx.Module):
    """A change of level and two residual blocks; on the way up the level's own features join before the blocks."""

    def __init__(self, inputs: int, step: int, joined: int, outputs: int, *, transposed: bool, rngs: nnx.Rngs):
        self.step = ConvBlock(inputs, step, 2, transposed=transposed, rngs=rngs)
        self.block1 = ResidualBlock(step + joined, outputs, rngs=rngs)
        self.block2 = ResidualBlock(outputs, outputs, rngs=rngs)

    def __call__(
        self, x: SparseTensor, step: SiteMap, within: SiteMap, joined: SparseTensor | None = None, *, train: bool
    ) -> SparseTensor:
        x = self.step(x, step, train=train)
        if joined is not None:
            x = concatenate(x, joined)
        return self.block2(self.block1(x, within, train=train), within, train=train)


class MinkUNet(nnx.Module):
    """Logits of every voxel."""

    def __init__(self, config: MinkUNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.widths
        down, up = widths[: LEVELS + 1], widths[LEVELS:]
        self.stem1 = ConvBlock(config.inputs, down[0], 3, rngs=rngs)
        self.stem2 = ConvBlock(down[0], down[0], 3, rngs=rngs)
        self.down = nnx.List([Stage(a, a, 0, b, transposed=False, rngs=rngs) for a, b in itertools.pairwise(down)])
        self.up = nnx.List(
            [
                Stage(a, b, joined, b, transposed=True, rngs=rngs)
                for a, b, joined in zip(up[:-1], up[1:], reversed(down[:-1]), strict=True)
            ]
        )
        self.classifier = SparseLinear(widths[-1], config.classes, bias=True, rngs=rngs)

    def __call__(self, x: SparseTensor, maps: UNetMaps | None = None, *, train: bool = False) -> Any:
        """Logits [N, classes], zero in rows of padding.

        Args:
          x: [N, inputs].
          maps: of x's sites; None to build them here.
          train: norms use the batch's statistics and update the running ones.
        """
        maps = unet_maps(x.sites, self.config) if maps is None else maps
        within = maps.submanifold
        x = self.stem2(self.stem1(x, within[0], train=train), within[0], train=train)
        levels = [x]
        for level, stage in enumerate(self.down):
            x = stage(x, maps.down[level], within[level + 1], train=train)
            levels.append(x)
        for stage, level in zip(self.up, reversed(range(LEVELS)), strict=True):
            x = stage(x, maps.down[level].inverse(), within[level], levels[level], train=train)
        return self.classifier(x).features


def parameter_count(config: MinkUNetConfig) -> int:
    """Trainable numbers."""
    model = nnx.eval_shape(lambda: MinkUNet(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def segmentation_loss(logits, labels, *, ignore: int = 255):
    """Mean cross-entropy over the rows whose label is not `ignore`, float32 scalar; zero if there are none.

    Args:
      logits: [N, classes].
      labels: integers [N]; padding carries `ignore`.
    """
    known = labels != ignore
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probabilities, jnp.where(known, labels, 0).astype(jnp.int32)[:, None], 1)[:, 0]
    return -jnp.where(known, chosen, 0).sum() / jnp.maximum(known.sum(), 1)
