"""Names of OpenPCDet's SECOND and CenterPoint checkpoints, and the layouts of spconv's weights.

A spconv kernel is [out, z, y, x, in] since version 2.2 ("krsc") and [z, y, x, in, out] in version 1 ("spconv1").
Kernels of one site are an exception in the newer layout, see `from_spconv`; neither detector has one.
"""

import math
from typing import Literal

import numpy as np

from lumen.io.pretrained import Rule, norm_rules

Layout = Literal["krsc", "spconv1"]

_SPARSE = {"krsc": "o z y x i -> z y x i o", "spconv1": "same"}
_CONV = "o i h w -> h w i o"
_TRANSPOSED = "i o h w -> h w i o"
# Convolutions of a stage of the 2-D backbone; published are 6.
_STAGE = 16
_BRANCHES = {
    "hm": "heatmap",
    "center": "offset",
    "center_z": "z",
    "dim": "size",
    "rot": "heading",
    "vel": "velocity",
}

# Counters of batches and of steps.
IGNORED = (r".*\.num_batches_tracked", r"global_step")


def _conv(theirs: str, ours: str, axes: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}.kernel", axes), Rule(f"{theirs}.bias", f"{ours}.bias")]


def _block(theirs: tuple[str, str], ours: str, axes: str, number: str = "") -> list[Rule]:
    return [*_conv(theirs[0], f"{ours}.conv{number}", axes), *norm_rules(theirs[1], f"{ours}.norm{number}")]


def backbone_rules(layout: Layout = "krsc", *, theirs: str = "backbone_3d.", ours: str = "backbone.") -> list[Rule]:
    """Of VoxelBackBone8x and VoxelResBackBone8x."""
    axes = _SPARSE[layout]
    rules = _block((f"{theirs}conv_input.0", f"{theirs}conv_input.1"), f"{ours}stem", axes)
    for level in range(4):
        level_theirs, level_ours = f"{theirs}conv{level + 1}", f"{ours}levels.{level}"
        if level:
            rules += _block((f"{level_theirs}.0.0", f"{level_theirs}.0.1"), f"{level_ours}.down", axes)
        for block in (0, 1):
            name, here = f"{level_theirs}.{block + (level > 0)}", f"{level_ours}.blocks.{block}"
            rules += _block((f"{name}.0", f"{name}.1"), here, axes)
            rules += _block((f"{name}.conv1", f"{name}.bn1"), here, axes, "1")
            rules += _block((f"{name}.conv2", f"{name}.bn2"), here, axes, "2")
    return rules + _block((f"{theirs}conv_out.0", f"{theirs}conv_out.1"), f"{ours}out", axes)


def bev_rules(*, theirs: str = "backbone_2d.", ours: str = "bev.") -> list[Rule]:
    """Of BaseBEVBackbone, whose stages count padding, convolutions, norms and activations in one row."""
    rules = [
        Rule(f"{theirs}deblocks.{{s}}.0.weight", f"{ours}upsamples.{{s}}.kernel", _TRANSPOSED),
        *norm_rules(f"{theirs}deblocks.{{s}}.1", f"{ours}upsamples.{{s}}.norm"),
    ]
    for k in range(_STAGE):
        names = f"{theirs}blocks.{{s}}.{1 + 3 * k}", f"{theirs}blocks.{{s}}.{2 + 3 * k}"
        rules += _block(names, f"{ours}stages.{{s}}.{k}", _CONV)
    return rules


def center_head_rules(*, theirs: str = "dense_head.", ours: str = "head.") -> list[Rule]:
    """Of CenterHead."""
    rules = _block((f"{theirs}shared_conv.0", f"{theirs}shared_conv.1"), f"{ours}shared", _CONV)
    for name, branch in _BRANCHES.items():
        one, here = f"{theirs}heads_list.{{g}}.{name}", f"{ours}groups.{{g}}.{branch}"
        rules += _block((f"{one}.0.0", f"{one}.0.1"), f"{here}.block", _CONV)
        rules += _conv(f"{one}.1", f"{here}.out", _CONV)
    return rules


def anchor_head_rules(*, theirs: str = "dense_head.", ours: str = "head.") -> list[Rule]:
    """Of AnchorHeadSingle."""
    parts = {"conv_cls": "classes", "conv_box": "boxes", "conv_dir_cls": "directions"}
    return [rule for name, part in parts.items() for rule in _conv(f"{theirs}{name}", f"{ours}{part}", _CONV)]


def centerpoint_rules(layout: Layout = "krsc") -> list[Rule]:
    """Of a CenterPoint checkpoint."""
    return [*backbone_rules(layout), *bev_rules(), *center_head_rules()]


def second_rules(layout: Layout = "krsc") -> list[Rule]:
    """Of a SECOND checkpoint."""
    return [*backbone_rules(layout), *bev_rules(), *anchor_head_rules()]


def from_spconv(weight: np.ndarray, layout: Layout = "krsc") -> np.ndarray:
    """Any spconv kernel of d axes -> [*kernel_size, in, out].

    For a kernel of one site spconv 2 reads the memory of the [out, 1, 1, 1, in] array as an [in, out] matrix: it is not
    the transpose that the shape suggests.

    Args:
      weight: [out, *kernel_size, in] with "krsc", [*kernel_size, in, out] with "spconv1".
      layout: see the module's text.
    Source: spconv/pytorch/conv.py.

    Raises:
      ValueError: fewer than three axes, or another layout.
    """
    if layout not in _SPARSE or weight.ndim < 3:
        raise ValueError(
            f"from_spconv: weight {list(weight.shape)}, layout={layout!r}; wanted [out, *kernel_size, in] with "
            "'krsc', or [*kernel_size, in, out] with 'spconv1'."
        )
    if layout == "spconv1":
        return weight
    outputs, *size, inputs = weight.shape
    if math.prod(size) == 1:
        return np.ascontiguousarray(weight).reshape(*size, inputs, outputs)
    return np.moveaxis(weight, 0, -1)


def to_spconv(kernel: np.ndarray, layout: Layout = "krsc") -> np.ndarray:
    """The inverse of `from_spconv`."""
    if layout not in _SPARSE or kernel.ndim < 3:
        raise ValueError(
            f"to_spconv: kernel {list(kernel.shape)}, layout={layout!r}; wanted [*kernel_size, in, out], and 'krsc' or "
            "'spconv1'."
        )
    if layout == "spconv1":
        return kernel
    *size, inputs, outputs = kernel.shape
    if math.prod(size) == 1:
        return np.ascontiguousarray(kernel).reshape(outputs, *size, inputs)
    return np.ascontiguousarray(np.moveaxis(kernel, -1, 0))
