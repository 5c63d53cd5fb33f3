"""Inception-v3 as image-generation papers use it: the network behind FID, sFID, Inception Score, precision and recall.

It is the TensorFlow graph of 2015-12-05 (`classify_image_graph_def.pb`), not the Inception-v3 of later model zoos. Its
differences, all kept here:

  * 1008 outputs, no auxiliary head; the evaluation protocols leave the bias of the logits out (`InceptionV3.logits`);
  * average pools leave padding out of the mean; the last block (mixed_7c) pools by maximum;
  * the resize to 299 x 299 has neither half-pixel centres nor antialiasing (`resize_tf1`);
  * pixels become (x - 128) / 128.

The weights are those of pytorch-fid and torch-fidelity (`pt_inception-2015-12-05-6726825d.pth`, converted from the
graph). Nothing is downloaded: `load_inception` takes the path of a copy. Convolutions run in full float32 (no TF32, no
bfloat16 passes): a distance between statistics of 2048 features adds rounding errors up.

Names of the blocks, ours and the graph's: mixed_5b-5d = mixed, mixed_1, mixed_2; mixed_6a-6e = mixed_3 ... mixed_7;
mixed_7a-7c = mixed_8 ... mixed_10.

Sources: Szegedy et al., arXiv:1512.00567; the graph's list of nodes; toshas/torch-fidelity
util_convert_inception_weights.py (graph name -> torch name of every tensor); mseitzer/pytorch-fid inception.py (the
pooling differences); openai/guided-diffusion evaluations/evaluator.py (which tensors the metrics read).
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.io import pretrained
from lumen.io.names import inception as names

IMAGE_SIZE = 299
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # of mixed_6/conv's 192: 17 * 17 * 7 = 2023 features, about as many as the pool has
CLASSES = 1008


class InceptionFeatures(NamedTuple):
    """What the metrics read of a batch of images.

    Attributes:
      pool: [B, 2048] float32, `pool_3` of the graph: FID, precision, recall.
      spatial: [B, 2023] float32, the first 7 channels of `mixed_6/conv`, flattened as rows, columns, channels: sFID.
      logits: [B, 1008] float32, class logits without bias: Inception Score.
    """

    pool: jax.Array | np.ndarray
    spatial: jax.Array | np.ndarray
    logits: jax.Array | np.ndarray


def resize_tf1(images: jax.Array | np.ndarray, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> jax.Array:
    """Bilinear resize as TensorFlow 1 does it with align_corners=False.

    Output row i lies at s = i * H / height (float32) and mixes input rows floor(s) and min(floor(s) + 1, H - 1) with
    weights 1 - (s - floor(s)) and s - floor(s); columns alike. There are no half-pixel centres, so enlarging moves the
    image up and left, and shrinking does not average. Figures made with another resize do not compare (Parmar et al.,
    arXiv:2104.11222): never mix them in a table.

    Args:
      images: [B, H, W, C], any number type.
      height: rows wanted.
      width: columns wanted.
    Returns:
      [B, height, width, C] float32 in the units of the input.
    Source: tensorflow/core/kernels/image/resize_bilinear_op.cc, legacy scaling. Deviation: XLA may fuse the multiply
    and the add, so the last bit can differ.
    """

    def taps(size_in, size_out):
        position = np.arange(size_out, dtype=np.float32) * (np.float32(size_in) / np.float32(size_out))
        low = np.minimum(np.floor(position).astype(np.int32), size_in - 1)
        return low, np.minimum(low + 1, size_in - 1), position - low

    x = jnp.asarray(images, jnp.float32)
    top, bottom, down = taps(x.shape[1], height)
    left, right, across = taps(x.shape[2], width)
    # Columns before rows, in TensorFlow's order of operations.
    across = across[None, None, :, None]
    upper, lower = x[:, top], x[:, bottom]
    upper = upper[:, :, left] + (upper[:, :, right] - upper[:, :, left]) * across
    lower = lower[:, :, left] + (lower[:, :, right] - lower[:, :, left]) * across
    return upper + (lower - upper) * down[None, :, None, None]


def _average_pool(x):
    """3 x 3 mean at stride 1; at the border only the pixels that exist are counted."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def _max_pool(x):
    """3 x 3 maximum at stride 2, no padding."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


class ConvNorm(nnx.Module):
    """Convolution without bias, batch normalisation with stored statistics (eps 1e-3), ReLU."""

    def __init__(
        self, channels_in: int, channels: int, window=(1, 1), *, stride: int = 1, padding: str = "SAME", rngs: nnx.Rngs
    ):
        self.stride = stride
        self.padding = padding
        self.kernel = nnx.Param(
            nnx.initializers.he_normal()(rngs.params(), (*window, channels_in, channels), jnp.float32)
        )
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x):
        """[B, H, W, Cin] -> [B, H', W', Cout]."""
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-3)
        return jax.nn.relu(x * scale + (self.bias[...] - self.mean[...] * scale))


class BlockA(nnx.Module):
    """35 x 35 block of 1 x 1, 5 x 5 and double 3 x 3 branches."""

    def __init__(self, channels: int, pool_channels: int, *, rngs: nnx.Rngs):
        self.branch1x1 = ConvNorm(channels, 64, rngs=rngs)
        self.branch5x5_1 = ConvNorm(channels, 48, rngs=rngs)
        self.branch5x5_2 = ConvNorm(48, 64, (5, 5), rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, (3, 3), rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, (3, 3), rngs=rngs)
        self.branch_pool = ConvNorm(channels, pool_channels, rngs=rngs)

    def __call__(self, x):
        """[B, 35, 35, Cin] -> [B, 35, 35, 224 + pool_channels]."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch1x1(x), five, three, self.branch_pool(_average_pool(x))], axis=-1)


class BlockB(nnx.Module):
    """Halves the 35 x 35 grid."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.branch3x3 = ConvNorm(channels, 384, (3, 3), stride=2, padding="VALID", rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, (3, 3), rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, (3, 3), stride=2, padding="VALID", rngs=rngs)

    def __call__(self, x):
        """[B, 35, 35, 288] -> [B, 17, 17, 768]."""
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), three, _max_pool(x)], axis=-1)


class BlockC(nnx.Module):
    """17 x 17 block of factorised 7 x 7 branches, `inner` channels wide inside."""

    def __init__(self, channels: int, inner: int, *, rngs: nnx.Rngs):
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvNorm(channels, 192, rngs=rngs)
        self.branch7x7_1 = ConvNorm(channels, inner, rngs=rngs)
        self.branch7x7_2 = ConvNorm(inner, inner, row, rngs=rngs)
        self.branch7x7_3 = ConvNorm(inner, 192, column, rngs=rngs)
        self.branch7x7dbl_1 = ConvNorm(channels, inner, rngs=rngs)
        self.branch7x7dbl_2 = ConvNorm(inner, inner, column, rngs=rngs)
        self.branch7x7dbl_3 = ConvNorm(inner, inner, row, rngs=rngs)
        self.branch7x7dbl_4 = ConvNorm(inner, inner, column, rngs=rngs)
        self.branch7x7dbl_5 = ConvNorm(inner, 192, row, rngs=rngs)
        self.branch_pool = ConvNorm(channels, 192, rngs=rngs)

    def __call__(self, x):
        """[B, 17, 17, 768] -> [B, 17, 17, 768]."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return jnp.concatenate([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], axis=-1)


class BlockD(nnx.Module):
    """Halves the 17 x 17 grid."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = ConvNorm(channels, 192, rngs=rngs)
        self.branch3x3_2 = ConvNorm(192, 320, (3, 3), stride=2, padding="VALID", rngs=rngs)
        self.branch7x7x3_1 = ConvNorm(channels, 192, rngs=rngs)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), rngs=rngs)
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), rngs=rngs)
        self.branch7x7x3_4 = ConvNorm(192, 192, (3, 3), stride=2, padding="VALID", rngs=rngs)

    def __call__(self, x):
        """[B, 17, 17, 768] -> [B, 8, 8, 1280]."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return jnp.concatenate([three, seven, _max_pool(x)], axis=-1)


class BlockE(nnx.Module):
    """8 x 8 block whose 3 x 3 branches fork into a row and a column.

    `pool` is how the last branch pools: "average" in mixed_7b, "max" in mixed_7c (a quirk of this graph; the paper
    averages).
    """

    def __init__(self, channels: int, pool: str, *, rngs: nnx.Rngs):
        self.pool = pool
        self.branch1x1 = ConvNorm(channels, 320, rngs=rngs)
        self.branch3x3_1 = ConvNorm(channels, 384, rngs=rngs)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), rngs=rngs)
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(channels, 448, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(448, 384, (3, 3), rngs=rngs)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), rngs=rngs)
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), rngs=rngs)
        self.branch_pool = ConvNorm(channels, 192, rngs=rngs)

    def __call__(self, x):
        """[B, 8, 8, Cin] -> [B, 8, 8, 2048]."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _average_pool(x) if self.pool == "average" else nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        return jnp.concatenate(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            axis=-1,
        )


class InceptionV3(nnx.Module):
    """The FID network. Random weights until `load_inception`; random features measure nothing that a paper reports.

    23,885,392 numbers in 472 tensors: 94 convolutions with four normalisation vectors each, and the classifier.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), stride=2, padding="VALID", rngs=rngs)
        self.conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), padding="VALID", rngs=rngs)
        self.conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), rngs=rngs)
        self.conv2d_3b_1x1 = ConvNorm(64, 80, rngs=rngs)
        self.conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), padding="VALID", rngs=rngs)
        self.mixed_5b = BlockA(192, 32, rngs=rngs)
        self.mixed_5c = BlockA(256, 64, rngs=rngs)
        self.mixed_5d = BlockA(288, 64, rngs=rngs)
        self.mixed_6a = BlockB(288, rngs=rngs)
        self.mixed_6b = BlockC(768, 128, rngs=rngs)
        self.mixed_6c = BlockC(768, 160, rngs=rngs)
        self.mixed_6d = BlockC(768, 160, rngs=rngs)
        self.mixed_6e = BlockC(768, 192, rngs=rngs)
        self.mixed_7a = BlockD(768, rngs=rngs)
        self.mixed_7b = BlockE(1280, "average", rngs=rngs)
        self.mixed_7c = BlockE(2048, "max", rngs=rngs)
        self.fc = nnx.Linear(POOL_FEATURES, CLASSES, precision=jax.lax.Precision.HIGHEST, rngs=rngs)

    def __call__(self, images: jax.Array) -> InceptionFeatures:
        """Features of images [B, H, W, 3] of any size with values 0 ... 255 (uint8, or floats that hold such values).

        The spatial features are the graph's tensor `mixed_6/conv:0`: what leaves the ReLU of the 1 x 1 branch of
        mixed_6d. (A scope's name without suffix is its last node, after conv2d_params, Conv2D, batchnorm and
        CheckNumerics.)
        """
        x = (resize_tf1(images) - 128) / 128  # [B, 299, 299, 3]
        x = self.conv2d_2b_3x3(self.conv2d_2a_3x3(self.conv2d_1a_3x3(x)))  # [B, 147, 147, 64]
        x = self.conv2d_4a_3x3(self.conv2d_3b_1x1(_max_pool(x)))  # [B, 71, 71, 192]
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(_max_pool(x))))  # [B, 35, 35, 288]
        x = self.mixed_6c(self.mixed_6b(self.mixed_6a(x)))  # [B, 17, 17, 768]
        x = self.mixed_6d(x)  # [B, 17, 17, 768], the 1 x 1 branch first
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)  # [B, 2023]
        x = self.mixed_7a(self.mixed_6e(x))  # [B, 8, 8, 1280]
        x = self.mixed_7c(self.mixed_7b(x))  # [B, 8, 8, 2048]
        pool = x.mean(axis=(1, 2))  # [B, 2048]
        return InceptionFeatures(pool, spatial, self.logits(pool))

    def logits(self, pool: jax.Array, *, bias: bool = False) -> jax.Array:
        """Class logits [B, 1008] of pool features [B, 2048].

        Without the bias they are what the Inception Score is made of, in the ADM evaluator as in torch-fidelity
        ("logits_unbiased"); with it they are the classifier that the network was trained as.
        """
        if bias:
            return self.fc(pool)
        return jnp.matmul(pool, self.fc.kernel[...], precision=jax.lax.Precision.HIGHEST)


def load_inception(path: str | os.PathLike) -> InceptionV3:
    """The network with published weights from a file.

    Args:
      path: a copy of pytorch-fid's or torch-fidelity's weights (names such as `Mixed_5b.branch1x1.bn.running_mean`) as
        .safetensors, .npz, or .pth (which needs torch: the `convert` extra).
    Raises:
      FileNotFoundError: with the address to get the file from.
      ValueError: from `lumen.io.pretrained`, listing every tensor that is missing, extra or misshapen.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"load_inception: there is no file {path}; nothing is downloaded here. The weights are the file "
            "pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid, release fid_weights."
        )
    return pretrained.load(path, jax.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))), names.RULES, names.IGNORED)


def feature_extractor(model: InceptionV3, batch_size: int = 64) -> Callable[[np.ndarray], InceptionFeatures]:
    """A function from images uint8 [n, H, W, 3], any n, to `InceptionFeatures` of n rows in NumPy.

    The network is compiled once per image size, for `batch_size` images; the last batch is filled up.

    Raises:
      ValueError: from the returned function, for images that are not uint8 [n, H, W, 3].
    """
    run = jax.jit(lambda model, images: model(images))

    def extract(images: np.ndarray) -> InceptionFeatures:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            raise ValueError(
                f"inception: images are {images.dtype} {images.shape}; wanted uint8 [n, H, W, 3]. "
                "Images in [-1, 1] become uint8 by round(clip((x + 1) * 127.5, 0, 255))."
            )
        parts = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            padded = np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
            parts.append([np.asarray(x)[: len(batch)] for x in run(model, padded)])
        return InceptionFeatures(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    return extract
