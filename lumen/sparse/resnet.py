"""SparseResNet21D (TorchSparse++, arXiv:2311.12862): a residual backbone of five levels for detectors.

maps = resnet_maps(sites, config)
levels = model(x, maps)               # five sparse tensors, finest first
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from lumen.sparse.convolution import ConvBlock, ResidualBlock
from lumen.sparse.kernel_maps import SiteMap, strided_map, submanifold_map
from lumen.sparse.tensor import Sites, SparseTensor, whole_tiles


@dataclasses.dataclass(frozen=True)
class Level:
    """One level: a convolution that opens it, and residual blocks.

    Attributes:
      layers: the convolution and the blocks, together.
      channels: of all of them.
      kernel_size, stride: of the convolution, per axis; a stride of 1 everywhere stays on the level.
    """

    layers: int
    channels: int
    kernel_size: tuple[int, ...] = (3, 3, 3)
    stride: tuple[int, ...] = (2, 2, 2)


# The vertical axis is the second one.
LEVELS_21D = (
    Level(3, 16, stride=(1, 1, 1)),
    Level(3, 32),
    Level(3, 64),
    Level(3, 128),
    Level(1, 128, (1, 3, 1), (1, 2, 1)),
)


@dataclasses.dataclass(frozen=True)
class SparseResNetConfig:
    """A sparse ResNet.

    Attributes:
      levels: see `Level`; their strided windows start at q s, without padding.
      inputs: channels per voxel.
      level_fractions: capacities of the levels as fractions of the input's rows, which may be above 1; () for what
        always suffices, see `strided_map`.
    """

    levels: tuple[Level, ...] = LEVELS_21D
    inputs: int = 4
    level_fractions: tuple[float, ...] = ()

    def __post_init__(self):
        if len(self.level_fractions) not in (0, len(self.levels)):
            raise ValueError(
                f"SparseResNetConfig: {len(self.level_fractions)} level_fractions for {len(self.levels)} levels; "
                "wanted as many, or none."
            )

    @classmethod
    def resnet21d(cls, ratio: float = 1.0, **changes) -> "SparseResNetConfig":
        """The published network, its channels times `ratio`. Source: torchsparse/backbones/resnet.py."""
        levels = tuple(dataclasses.replace(one, channels=int(one.channels * ratio)) for one in LEVELS_21D)
        return cls(levels=levels, **changes)

    @classmethod
    def debug(cls, **changes) -> "SparseResNetConfig":
        """A toy of a ratio of 1/4, for tests."""
        return cls.resnet21d(0.25, **changes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["enter", "within"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ResNetMaps:
    """The maps of a forward pass.

    Attributes:
      enter: of each level's first convolution.
      within: of each level's blocks, None where it has none.
    """

    enter: tuple[SiteMap, ...]
    within: tuple[SiteMap | None, ...]

    @property
    def levels(self) -> dict[str, Sites]:
        """The sites of each level, for `check_capacity`."""
        return {f"level {level}": one.outputs for level, one in enumerate(self.enter)}


def resnet_maps(sites: Sites, config: SparseResNetConfig) -> ResNetMaps:
    """The maps of all levels; layers of a level that can share one do."""
    fractions = config.level_fractions or (None,) * len(config.levels)
    rows = sites.capacity
    enter, within = [], []
    for level, fraction in zip(config.levels, fractions, strict=True):
        if set(level.stride) == {1}:
            enter.append(submanifold_map(sites, level.kernel_size))
        else:
            capacity = None if fraction is None else whole_tiles(fraction * rows)
            enter.append(strided_map(sites, level.kernel_size, level.stride, capacity=capacity))
        sites = enter[-1].outputs
        shared = set(level.stride) == {1} and level.kernel_size == (3, 3, 3)
        blocks = enter[-1] if shared else submanifold_map(sites, 3)
        within.append(blocks if level.layers > 1 else None)
    return ResNetMaps(tuple(enter), tuple(within))


class SparseResNet(nnx.Module):
    """Features of every level."""

    def __init__(self, config: SparseResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        inputs, enter, blocks = config.inputs, [], []
        for level in config.levels:
            enter.append(ConvBlock(inputs, level.channels, level.kernel_size, rngs=rngs))
            residual = [ResidualBlock(level.channels, level.channels, rngs=rngs) for _ in range(level.layers - 1)]
            blocks.append(nnx.List(residual))
            inputs = level.channels
        self.enter, self.blocks = nnx.List(enter), nnx.List(blocks)

    def __call__(self, x: SparseTensor, maps: ResNetMaps | None = None, *, train: bool = False) -> list[Any]:
        """The sparse tensors of all levels, finest first; see `MinkUNet.__call__`."""
        maps = resnet_maps(x.sites, self.config) if maps is None else maps
        outputs = []
        for enter, blocks, first, within in zip(self.enter, self.blocks, maps.enter, maps.within, strict=True):
            x = enter(x, first, train=train)
            for block in blocks:
                assert within is not None, "levels with blocks have a map for them"
                x = block(x, within, train=train)
            outputs.append(x)
        return outputs
