"""Tensor names of the FID Inception-v3 weights (pytorch-fid, torch-fidelity: pt_inception-2015-12-05-6726825d.pth).

Every convolution `X` of the file has `X.conv.weight` and `X.bn.{weight,bias,running_mean,running_var}`; ours are
`x.{kernel,scale,bias,mean,var}`, with the same name in lower case.
"""

from lumen.io.pretrained import Rule, norm_rules

_A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
_B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
_C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 "
    "branch7x7dbl_5 branch_pool"
)
_D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
_E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b "
    "branch_pool"
)
_BLOCKS = {
    "Mixed_5b": _A,
    "Mixed_5c": _A,
    "Mixed_5d": _A,
    "Mixed_6a": _B,
    "Mixed_6b": _C,
    "Mixed_6c": _C,
    "Mixed_6d": _C,
    "Mixed_6e": _C,
    "Mixed_7a": _D,
    "Mixed_7b": _E,
    "Mixed_7c": _E,
}

CONVOLUTIONS = [
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    *(f"{block}.{branch}" for block, branches in _BLOCKS.items() for branch in branches.split()),
]

RULES = [
    *(Rule(f"{name}.conv.weight", f"{name.lower()}.kernel", "o i h w -> h w i o") for name in CONVOLUTIONS),
    *(rule for name in CONVOLUTIONS for rule in norm_rules(f"{name}.bn", name.lower())),
    Rule("fc.weight", "fc.kernel", "o i -> i o"),
    Rule("fc.bias", "fc.bias"),
]

# A counter of training steps, present in files saved by newer torch versions.
IGNORED = [r".*\.num_batches_tracked"]
