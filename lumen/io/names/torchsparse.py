"""Names of networks in TorchSparse's layout: mit-han-lab/spvnas's MinkUNet, torchsparse's SparseResNet21D.

A TorchSparse kernel is [offsets, in, out]; of an odd number of offsets the first axis is fastest, of an even number the
last one.
"""

from collections.abc import Sequence

from lumen.io.pretrained import Rule, norm_rules

_ODD = "(z y x) i o -> x y z i o"
_EVEN = "(x y z) i o -> x y z i o"


def _conv(theirs: tuple[str, str], ours: tuple[str, str], kernel: str) -> list[Rule]:
    return [Rule(f"{theirs[0]}.kernel", f"{ours[0]}.kernel", kernel), *norm_rules(theirs[1], ours[1])]


def _residual(theirs: str, ours: str) -> list[Rule]:
    return [
        *_conv((f"{theirs}.net.0", f"{theirs}.net.1"), (f"{ours}.conv1", f"{ours}.norm1"), _ODD),
        *_conv((f"{theirs}.net.3", f"{theirs}.net.4"), (f"{ours}.conv2", f"{ours}.norm2"), _ODD),
        *_conv(
            (f"{theirs}.downsample.0", f"{theirs}.downsample.1"), (f"{ours}.shortcut", f"{ours}.shortcut_norm"), "same"
        ),
    ]


def _stages() -> list[Rule]:
    rules = []
    for stage in range(4):
        down, up = f"down.{stage}", f"up.{stage}"
        theirs_down, theirs_up = f"stage{stage + 1}", f"up{stage + 1}"
        rules += _conv(
            (f"{theirs_down}.0.net.0", f"{theirs_down}.0.net.1"), (f"{down}.step.conv", f"{down}.step.norm"), _EVEN
        )
        rules += _conv((f"{theirs_up}.0.net.0", f"{theirs_up}.0.net.1"), (f"{up}.step.conv", f"{up}.step.norm"), _EVEN)
        for block in (1, 2):
            rules += _residual(f"{theirs_down}.{block}", f"{down}.block{block}")
            rules += _residual(f"{theirs_up}.1.{block - 1}", f"{up}.block{block}")
    return rules


RULES = [
    *_conv(("stem.0", "stem.1"), ("stem1.conv", "stem1.norm"), _ODD),
    *_conv(("stem.3", "stem.4"), ("stem2.conv", "stem2.norm"), _ODD),
    *_stages(),
    Rule("classifier.0.weight", "classifier.kernel", "o i -> i o"),
    Rule("classifier.0.bias", "classifier.bias"),
]


def resnet_rules(layers: Sequence[int]) -> list[Rule]:
    """The rules of a SparseResNet with so many layers per level."""
    rules = []
    for level, count in enumerate(layers):
        rules += _conv((f"{level}.0.0", f"{level}.0.1"), (f"enter.{level}.conv", f"enter.{level}.norm"), _ODD)
        for block in range(1, count):
            theirs, ours = f"{level}.{block}.main", f"blocks.{level}.{block - 1}"
            rules += _conv((f"{theirs}.0", f"{theirs}.1"), (f"{ours}.conv1", f"{ours}.norm1"), _ODD)
            rules += _conv((f"{theirs}.3", f"{theirs}.4"), (f"{ours}.conv2", f"{ours}.norm2"), _ODD)
    return rules


# Layers that the class makes and never runs, and counters of batches.
IGNORED = (r"point_transforms\..*", r".*\.num_batches_tracked")
