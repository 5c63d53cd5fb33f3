"""LPIPS: the perceptual distance that tokenizers train with, on VGG-16 features.

Source: arXiv:1801.03924 (richzhang/PerceptualSimilarity v0.1, "vgg"), as in LlamaGen's tokenizer_image/lpips.py.
Images are NHWC in [-1, 1].
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.io.pretrained import Rule, load
from lumen.layers import Frozen

# Convolution widths of VGG-16, one row per resolution; LPIPS reads the last activation of each row.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Where torchvision's `vgg16().features` has them: activations and poolings are counted too.
_POSITIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)

VGG_RULES = [
    rule
    for ours, original in enumerate(_POSITIONS)
    for rule in (
        Rule(f"features.{original}.weight", f"kernels.{ours}", "o i h w -> h w i o"),
        Rule(f"features.{original}.bias", f"biases.{ours}"),
    )
]
VGG_IGNORED = [r"classifier\..*"]
HEAD_RULES = [Rule("lin{i}.model.1.weight", "weights.{i}", "1 c 1 1 -> c")]


class VGG16(nnx.Module):
    """The convolutions of VGG-16 (arXiv:1409.1556 D), 3 x 3 with ReLU, halved by max-pooling between resolutions.

    Zero until weights are loaded.
    """

    def __init__(self):
        widths = [3, *(width for stage in _STAGES for width in stage)]
        pairs = list(itertools.pairwise(widths))
        self.kernels = nnx.List(Frozen(jnp.zeros((3, 3, inputs, outputs))) for inputs, outputs in pairs)
        self.biases = nnx.List(Frozen(jnp.zeros((outputs,))) for _, outputs in pairs)

    def __call__(self, x) -> list[jax.Array]:
        """Normalised images [B, H, W, 3] -> activations relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

        Stage i has shape [B, H // 2**i, W // 2**i, channels].
        """
        layers = iter(zip(self.kernels, self.biases, strict=True))
        activations = []
        for stage in _STAGES:
            if activations:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for _ in stage:
                kernel, bias = next(layers)
                x = jax.lax.conv_general_dilated(
                    x, kernel[...].astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = jax.nn.relu(x + bias[...].astype(x.dtype))
            activations.append(x)
        return activations


class Heads(nnx.Module):
    """One non-negative weight per channel of each activation."""

    def __init__(self):
        self.weights = nnx.List(Frozen(jnp.zeros((stage[-1],))) for stage in _STAGES)


class LPIPS(nnx.Module):
    """d(x, y) = sum over stages of the mean over positions of w . (unit(f(x)) - unit(f(y)))**2.

    unit() divides a position's feature vector by its length. Get one with weights from `load_lpips`. Deviation: the
    original's training code leaves dropout (0.5) on in front of w; here the distance is always the plain one.
    """

    def __init__(self):
        self.vgg = VGG16()
        self.heads = Heads()

    def __call__(self, x, y):
        """Distances [B] float32 >= 0 of images x and y, both [B, H, W, 3] in [-1, 1], sides of at least 16."""
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        both = jnp.concatenate([x, y])
        activations = self.vgg((both - shift.astype(both.dtype)) / scale.astype(both.dtype))
        total = jnp.zeros(x.shape[0], jnp.float32)
        for features, weight in zip(activations, self.heads.weights, strict=True):
            features = features.astype(jnp.float32)
            # Where all features are 0 the root's gradient is NaN; the ReLU before it selects 0 there.
            length = jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True))
            a, b = jnp.split(features / (length + 1e-10), 2)
            total += jnp.mean((a - b) ** 2 @ weight[...].astype(jnp.float32), axis=(1, 2))
        return total


def load_lpips(vgg: str | os.PathLike, heads: str | os.PathLike) -> LPIPS:
    """LPIPS with weights from two files, each .safetensors, .npz or .pth.

    Args:
      vgg: torchvision's VGG-16 (vgg16-397923af.pth: features.0.weight, ...; the classifier is passed over).
      heads: LPIPS v0.1's five heads (vgg.pth: lin0.model.1.weight, ...).

    Raises:
      FileNotFoundError, ValueError, ImportError: as `lumen.io.pretrained.load`.
    """
    lpips = LPIPS()
    lpips.vgg = load(vgg, lpips.vgg, VGG_RULES, VGG_IGNORED)
    lpips.heads = load(heads, lpips.heads, HEAD_RULES)
    return lpips
