"""VQ image tokenizer: a convolutional encoder, a codebook of unit vectors and a decoder, with its training losses.

Source: LlamaGen (arXiv:2406.06525), FoundationVision/LlamaGen tokenizer/tokenizer_image/{vq_model,vq_loss}.py; the
layout goes back to VQGAN (arXiv:2012.09841). Images are NHWC in [-1, 1]; an image of h s by w s pixels (s the stride)
becomes h w codes in raster order. Letters: B batch, h w token grid, C channels, V codebook size, D code dimension.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from lumen.attention import attend
from lumen.layers import dropout


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ tokenizer; the defaults are LlamaGen's VQ-16.

    Attributes:
      channels: width of the finest level; level i is channels * channel_multipliers[i] wide.
      channel_multipliers: one per level, finest first; each level after the first halves the resolution.
      encoder_blocks: residual blocks per encoder level.
      decoder_blocks: residual blocks per decoder level.
      latent_channels: channels between the encoder or decoder and the code projections.
      codebook_size: V.
      code_dim: D.
      groups: of every GroupNorm; divides every width.
      dropout: rate inside residual blocks, in training only.
      image_channels: 3 for RGB.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    latent_channels: int = 256
    codebook_size: int = 16384
    code_dim: int = 8
    groups: int = 32
    dropout: float = 0.0
    image_channels: int = 3

    def __post_init__(self):
        if not self.channel_multipliers:
            raise ValueError("VQConfig: channel_multipliers is empty; give one multiplier per level, finest first.")
        odd = [width for width in self.widths if width % self.groups]
        if odd:
            raise ValueError(
                f"VQConfig: level widths {odd} are not multiples of groups={self.groups}; "
                f"use groups={math.gcd(*self.widths)} or a divisor of it."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def stride(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @classmethod
    def vq16(cls, **changes):
        """LlamaGen VQ-16 (vq_ds16_c2i.pt): 71.9M parameters, 16 x 16 tokens for 256 x 256 pixels."""
        return cls(**changes)

    @classmethod
    def debug(cls, **changes):
        """For tests: stride 4, 32 codes."""
        sizes = {
            "channels": 8,
            "channel_multipliers": (1, 1, 2),
            "encoder_blocks": 1,
            "decoder_blocks": 1,
            "latent_channels": 8,
            "codebook_size": 32,
            "code_dim": 4,
            "groups": 4,
        }
        return cls(**sizes | changes)


def _conv(inputs: int, outputs: int, size: int, *, strides: int = 1, padding: int | tuple = 1, rngs: nnx.Rngs):
    """A size x size convolution, weights and bias uniform in ±1 / sqrt(fan-in) as the original's framework does it."""
    bound = (inputs * size**2) ** -0.5
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=strides,
        padding=padding,
        kernel_init=_uniform(bound),
        bias_init=_uniform(bound),
        kernel_metadata={"axes": (None, None, None, "embed")},
        rngs=rngs,
    )


def _linear(inputs: int, outputs: int, *, rngs: nnx.Rngs):
    """A 1 x 1 convolution, initialised as `_conv`."""
    init = _uniform(inputs**-0.5)
    return nnx.Linear(
        inputs, outputs, kernel_init=init, bias_init=init, kernel_metadata={"axes": (None, "embed")}, rngs=rngs
    )


def _uniform(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _norm(config: VQConfig, channels: int, *, rngs: nnx.Rngs):
    return nnx.GroupNorm(channels, config.groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class ResidualBlock(nnx.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))))))), with a 1 x 1 shortcut where the width changes."""

    def __init__(self, config: VQConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.norm1 = _norm(config, inputs, rngs=rngs)
        self.conv1 = _conv(inputs, outputs, 3, rngs=rngs)
        self.norm2 = _norm(config, outputs, rngs=rngs)
        self.conv2 = _conv(outputs, outputs, 3, rngs=rngs)
        self.shortcut = _linear(inputs, outputs, rngs=rngs) if inputs != outputs else None

    def __call__(self, x, *, key=None):
        """[B, H, W, inputs] -> [B, H, W, outputs]; `key` turns dropout on."""
        h = self.conv1(jax.nn.swish(self.norm1(x)))
        h = self.conv2(dropout(jax.nn.swish(self.norm2(h)), self.dropout, key))
        return (x if self.shortcut is None else self.shortcut(x)) + h


class AttentionBlock(nnx.Module):
    """x + proj(attention(norm(x))): one head as wide as the features, over all positions."""

    def __init__(self, config: VQConfig, channels: int, *, rngs: nnx.Rngs):
        self.norm = _norm(config, channels, rngs=rngs)
        self.query = _linear(channels, channels, rngs=rngs)
        self.key = _linear(channels, channels, rngs=rngs)
        self.value = _linear(channels, channels, rngs=rngs)
        self.projection = _linear(channels, channels, rngs=rngs)

    def __call__(self, x):
        """[B, H, W, C] -> [B, H, W, C]."""
        rows = self.norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])  # [B, HW, 1, C]
        mixed = attend(self.query(rows), self.key(rows), self.value(rows))
        return x + self.projection(mixed).reshape(x.shape)


class Upsample(nnx.Module):
    """Nearest-neighbour enlargement by two followed by a 3 x 3 convolution.

    Each output pixel of one parity sees only 2 x 2 distinct inputs, so the pair equals four 2 x 2 convolutions whose
    kernels are sums of the 3 x 3 kernel's taps, interleaved: 16 products per input pixel and channel pair, not 36, and
    no enlarged input. Equal up to rounding, which in bfloat16 includes that of the summed taps.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x):
        """[B, H, W, C] -> [B, 2H, 2W, C]."""
        bias = self.conv.bias[...]  # pyright: ignore[reportOptionalSubscript]
        x, kernel, bias = promote_dtype((x, self.conv.kernel[...], bias))

        def convolve(row, column):
            return jax.lax.conv_general_dilated(
                x,
                _parity_taps(_parity_taps(kernel, row, axis=0), column, axis=1),
                window_strides=(1, 1),
                padding=((1 - row, row), (1 - column, column)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        rows = [jnp.stack([convolve(row, 0), convolve(row, 1)], axis=3) for row in (0, 1)]  # [B, H, W, 2, C] each
        batch, height, width, channels = x.shape
        return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels) + bias


def _parity_taps(kernel, parity: int, axis: int):
    """The taps that outputs of one parity apply to their two distinct inputs along `axis` of a 3-tap kernel."""
    a, b, c = jnp.split(kernel, 3, axis)
    return jnp.concatenate([a + b, c] if parity else [a, b + c], axis)


class Level(nnx.Module):
    """The residual blocks of one resolution, each followed by attention where `attention` is set."""

    def __init__(self, config: VQConfig, inputs: int, outputs: int, blocks: int, attention: bool, *, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * (blocks - 1)
        self.blocks = nnx.List([ResidualBlock(config, width, outputs, rngs=rngs) for width in widths])
        self.attentions = nnx.List([AttentionBlock(config, outputs, rngs=rngs) for _ in widths if attention])

    def __call__(self, x, *, key=None):
        """[B, H, W, inputs] -> [B, H, W, outputs]."""
        for i, block in enumerate(self.blocks):
            x = block(x, key=_fold_in(key, i))
            if self.attentions:
                x = self.attentions[i](x)
        return x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: VQConfig, channels: int, *, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(config, channels, channels, rngs=rngs)
        self.attention = AttentionBlock(config, channels, rngs=rngs)
        self.block2 = ResidualBlock(config, channels, channels, rngs=rngs)

    def __call__(self, x, *, key=None):
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.attention(self.block1(x, key=_fold_in(key, 0)))
        return self.block2(x, key=_fold_in(key, 1))


def _fold_in(key, index: int):
    return None if key is None else jax.random.fold_in(key, index)


class Encoder(nnx.Module):
    """Images [B, h s, w s, image_channels] -> features [B, h, w, latent_channels]."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = _conv(config.image_channels, widths[0], 3, rngs=rngs)
        self.levels = nnx.List(
            Level(config, widths[max(i - 1, 0)], width, config.encoder_blocks, attention=i == last, rngs=rngs)
            for i, width in enumerate(widths)
        )
        # The original pads below and to the right only.
        self.downsamples = nnx.List(
            _conv(width, width, 3, strides=2, padding=((0, 1), (0, 1)), rngs=rngs) for width in widths[:-1]
        )
        self.middle = Middle(config, widths[-1], rngs=rngs)
        self.norm_out = _norm(config, widths[-1], rngs=rngs)
        self.conv_out = _conv(widths[-1], config.latent_channels, 3, rngs=rngs)

    def __call__(self, images, *, key=None):
        """Features; `key` turns dropout on."""
        h = self.conv_in(images)
        for i, level in enumerate(self.levels):
            h = level(h, key=_fold_in(key, i))
            if i < len(self.downsamples):
                h = self.downsamples[i](h)
        h = self.middle(h, key=_fold_in(key, len(self.levels)))
        return self.conv_out(jax.nn.swish(self.norm_out(h)))


class Decoder(nnx.Module):
    """Features [B, h, w, latent_channels] -> images [B, h s, w s, image_channels], unclipped. Coarsest level first."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        widths = config.widths[::-1]
        self.conv_in = _conv(config.latent_channels, widths[0], 3, rngs=rngs)
        self.middle = Middle(config, widths[0], rngs=rngs)
        self.levels = nnx.List(
            Level(config, widths[max(i - 1, 0)], width, config.decoder_blocks, attention=i == 0, rngs=rngs)
            for i, width in enumerate(widths)
        )
        self.upsamples = nnx.List(Upsample(width, rngs=rngs) for width in widths[:-1])
        self.norm_out = _norm(config, widths[-1], rngs=rngs)
        self.conv_out = _conv(widths[-1], config.image_channels, 3, rngs=rngs)

    def hidden(self, features, *, key=None):
        """What the last convolution sees, [B, h s, w s, channels]; `key` turns dropout on."""
        h = self.middle(self.conv_in(features), key=_fold_in(key, len(self.levels)))
        for i, level in enumerate(self.levels):
            h = level(h, key=_fold_in(key, i))
            if i < len(self.upsamples):
                h = self.upsamples[i](h)
        return jax.nn.swish(self.norm_out(h))

    def __call__(self, features, *, key=None):
        """Images; `key` turns dropout on."""
        return self.conv_out(self.hidden(features, key=key))


class Quantized(NamedTuple):
    """Result of the quantiser; z is the unit-length latent, e the codebook row of its code. The losses are means."""

    codes: jax.Array  # [B, h w] int32, raster order
    latents: jax.Array  # [B, h, w, D]: e in value, the gradient of z
    codebook: jax.Array  # mean (e - sg(z))^2, trains the codebook
    commitment: jax.Array  # mean (sg(e) - z)^2, trains the encoder
    entropy: jax.Array  # `entropy_loss` of -|z - e|^2 over all codes


class VQModel(nnx.Module):
    """Encoder, L2-normalised codebook and decoder.

    A latent z and a code e compare by the angle between them, argmin |z/|z| - e/|e|| = argmax cos(z, e), and the
    decoder receives e/|e|. Codes are chosen in float32 whatever the parameters' type; keep the codebook itself in
    float32 where codes must not change. Choosing them takes a [B, h, w, V] float32 array, 16 MiB per 256 x 256 image
    at VQ-16's size. Published weights: `lumen.io.names.vq`.
    """

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.to_code = _linear(config.latent_channels, config.code_dim, rngs=rngs)
        self.from_code = _linear(config.code_dim, config.latent_channels, rngs=rngs)
        shape, bound = (config.codebook_size, config.code_dim), 1 / config.codebook_size
        self.codebook = nnx.Param(_unit(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)))

    def latents(self, images, *, key=None):
        """What is quantised: [B, h s, w s, image_channels] in [-1, 1] -> [B, h, w, D], not yet of unit length.

        Raises:
          ValueError: if the image sides are not multiples of the stride.
        """
        stride, sides = self.config.stride, images.shape[1:3]
        if any(side % stride for side in sides):
            raise ValueError(
                f"VQModel: images of {sides[0]} x {sides[1]} pixels; wanted multiples of the stride {stride}."
            )
        return self.to_code(self.encoder(images, key=key))

    def encode(self, images):
        """Images [B, h s, w s, image_channels] in [-1, 1] -> codes [B, h w] int32 and latents [B, h, w, D]."""
        latents = self.latents(images)
        codes = _nearest(_cosines(_unit(latents), self._table()))  # [B, h, w]
        return codes.reshape(codes.shape[0], -1), latents

    def lookup(self, codes):
        """Unit-length codebook rows: [...] integers -> [..., D]."""
        return self._table()[codes].astype(self.codebook.dtype)

    def decode(self, latents, *, key=None):
        """Unit-length latents [B, h, w, D] -> images [B, h s, w s, image_channels], about [-1, 1], unclipped."""
        return self.decoder(self.from_code(latents), key=key)

    def decode_codes(self, codes, *, grid: tuple[int, int]):
        """Codes [B, h w] in raster order -> images [B, h s, w s, image_channels], about [-1, 1], unclipped.

        Args:
          codes: integers in [0, V).
          grid: (h, w).

        Raises:
          ValueError: if h w is not the number of codes.
        """
        if grid[0] * grid[1] != codes.shape[1]:
            raise ValueError(f"VQModel: {codes.shape[1]} codes do not fill a grid of {grid[0]} x {grid[1]}.")
        return self.decode(self.lookup(codes.reshape(codes.shape[0], *grid)))

    def quantize(self, latents) -> Quantized:
        """Replaces each latent by its nearest code, with the straight-through gradient: latents [B, h, w, D]."""
        z, table = _unit(latents), self._table()
        cosines = _cosines(z, table)  # [B, h, w, V]
        codes = _nearest(cosines)  # [B, h, w]
        e = table[codes]
        return Quantized(
            codes=codes.reshape(codes.shape[0], -1),
            latents=(z + jax.lax.stop_gradient(e - z)).astype(latents.dtype),
            codebook=jnp.mean((e - jax.lax.stop_gradient(z)) ** 2),
            commitment=jnp.mean((jax.lax.stop_gradient(e) - z) ** 2),
            entropy=entropy_loss(2 * cosines - 2),  # -|z - e|^2 of unit vectors
        )

    def __call__(self, images, *, key=None) -> tuple[jax.Array, Quantized]:
        """Reconstruction and quantiser result of images [B, h s, w s, image_channels]; `key` turns dropout on."""
        quantized = self.quantize(self.latents(images, key=_fold_in(key, 0)))
        return self.decode(quantized.latents, key=_fold_in(key, 1)), quantized

    def _table(self):
        return _unit(self.codebook[...])


def _unit(x):
    """x / max(|x|, 1e-12) over the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _cosines(z, table):
    """[..., D] and [V, D], both of unit length -> [..., V]. Full float32: near ties decide codes."""
    return jnp.einsum("...d,vd->...v", z, table, precision=jax.lax.Precision.HIGHEST)


def _nearest(cosines):
    return jnp.argmax(cosines, axis=-1).astype(jnp.int32)


def entropy_loss(affinity, *, temperature: float = 0.01):
    """Mean entropy of p(code | latent) minus the entropy of the mean p(code): low for sure choices, all codes in use.

    p = softmax(affinity / temperature) over the last axis; the second entropy is -sum p log(p + 1e-5).

    Args:
      affinity: [..., V] float32, larger for nearer codes; the original takes minus the squared distance.
      temperature: > 0.

    Returns:
      Scalar. Source: compute_entropy_loss of LlamaGen's vq_model.py, after MaskGIT.
    """
    log_p = jax.nn.log_softmax(affinity.reshape(-1, affinity.shape[-1]) / temperature)
    p = jnp.exp(log_p)
    mean = p.mean(axis=0)
    return -jnp.mean(jnp.sum(p * log_p, axis=-1)) + jnp.sum(mean * jnp.log(mean + 1e-5))


def to_uint8(images):
    """Images in [-1, 1] -> uint8 pixels, round(clip(255 (x + 1) / 2, 0, 255)). Any shape."""
    return jnp.round(jnp.clip(255.0 * (images.astype(jnp.float32) + 1.0) / 2.0, 0.0, 255.0)).astype(jnp.uint8)


def code_frequencies(codes, codebook_size: int):
    """Share of each code in `codes` (integers, any shape): [V] float32, sums to 1."""
    return jnp.bincount(codes.ravel(), length=codebook_size) / codes.size


def revive(model: VQModel, latents, frequencies, key, *, threshold: float = 0.1) -> tuple[VQModel, jax.Array]:
    """Moves codes that are hardly ever chosen onto random latents, so that a small codebook is used whole.

    Code v is dead where frequencies[v] < threshold / V. To be called every few dozen steps in the earlier part of the
    training. Not in LlamaGen; the idea is Jukebox's (arXiv:2005.00341, section 3.1).

    Args:
      model: the tokenizer.
      latents: [..., D], of a recent batch, from `VQModel.encode`.
      frequencies: [V], a running mean of `code_frequencies`.
      key: PRNG key.
      threshold: in units of the frequency of an evenly used codebook.

    Returns:
      A model with the new codebook, and the frequencies with revived codes at 1 / V, so that they get time to be used.
    """
    size = model.config.codebook_size
    dead = frequencies < threshold / size
    rows = latents.reshape(-1, latents.shape[-1])
    fresh = _unit(rows[jax.random.randint(key, (size,), 0, len(rows))])
    revived = nnx.clone(model)
    codebook = model.codebook[...]
    revived.codebook[...] = jnp.where(dead[:, None], fresh.astype(codebook.dtype), codebook)
    return revived, jnp.where(dead, 1 / size, frequencies)


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(var + 1e-5) * scale + bias with the statistics of this batch over all but the last axis.

    No running averages: a discriminator is only ever used in training. Over a sharded batch the statistics are global.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(1.0 + 0.02 * jax.random.normal(rngs.params(), (channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x):
        """[B, H, W, C] -> [B, H, W, C]."""
        mean, variance = jnp.mean(x, axis=(0, 1, 2), dtype=jnp.float32), jnp.var(x.astype(jnp.float32), axis=(0, 1, 2))
        y = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class PatchDiscriminator(nnx.Module):
    """PatchGAN of pix2pix: one real-or-generated logit per overlapping patch (70 pixels wide for 3 layers).

    `layers` 4 x 4 convolutions of stride 2, two of stride 1, leaky ReLU 0.2, batch normalisation on all but the first
    and last. Source: discriminator_patchgan.py of LlamaGen. Deviation: on several devices the original normalises with
    each device's own statistics.

    Args:
      channels: width after the first layer; doubles per layer up to 8 times.
      layers: convolutions of stride 2.
      image_channels: 3 for RGB.
    """

    def __init__(self, channels: int = 64, layers: int = 3, image_channels: int = 3, *, rngs: nnx.Rngs):
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        self.layers = layers
        self.conv_in = _discriminator_conv(image_channels, widths[0], strides=2, rngs=rngs)
        self.convs = nnx.List(
            _discriminator_conv(inputs, outputs, strides=2 if i < layers else 1, use_bias=False, rngs=rngs)
            for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1)
        )
        self.norms = nnx.List(BatchNorm(width, rngs=rngs) for width in widths[1:])
        self.conv_out = _discriminator_conv(widths[-1], 1, rngs=rngs)

    def __call__(self, images):
        """Images [B, H, W, image_channels] -> logits [B, H', W', 1], H' = H / 2**layers - 2.

        Raises:
          ValueError: for images too small to leave a logit.
        """
        smallest = 3 * 2**self.layers
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchDiscriminator: images of {images.shape[1]} x {images.shape[2]} pixels, but {self.layers} layers "
                f"need sides of {smallest}; use fewer layers."
            )
        h = jax.nn.leaky_relu(self.conv_in(images), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = jax.nn.leaky_relu(norm(conv(h)), 0.2)
        return self.conv_out(h)


def _discriminator_conv(inputs: int, outputs: int, *, strides: int = 1, use_bias: bool = True, rngs: nnx.Rngs):
    return nnx.Conv(
        inputs,
        outputs,
        (4, 4),
        strides=strides,
        padding=1,
        use_bias=use_bias,
        kernel_init=nnx.initializers.normal(0.02),
        bias_init=_uniform((16 * inputs) ** -0.5),
        kernel_metadata={"axes": (None, None, None, "embed")},
        rngs=rngs,
    )


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the tokenizer's training loss; the defaults are LlamaGen's.

    Attributes:
      pixel: of the mean squared pixel error.
      perceptual: of the perceptual distance (LPIPS).
      codebook: of mean (e - sg(z))^2.
      commitment: of mean (sg(e) - z)^2.
      entropy: of `entropy_loss`; 0 spares its computation.
      adversarial: of the generator's and the discriminator's hinge losses.
      adversarial_start: first step at which `adversarial` counts; it is 0 before.
      adaptive: scale the generator's hinge loss so that at the last layer its gradient is as long as that of the pixel
        and perceptual losses (VQGAN, arXiv:2012.09841 eq. 7). Off in the published training.
    """

    pixel: float = 1.0
    perceptual: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    adversarial: float = 0.5
    adversarial_start: int = 20_000
    adaptive: bool = False

    def adversarial_at(self, step):
        """The adversarial weight at a step (number of updates done so far)."""
        return jnp.where(step < self.adversarial_start, 0.0, self.adversarial)


class Reconstruction(NamedTuple):
    """What `vq_loss` computed on the way."""

    images: jax.Array  # [B, h s, w s, image_channels], for `discriminator_loss`
    codes: jax.Array  # [B, h w] int32
    metrics: dict[str, jax.Array]  # unweighted loss terms, and the share of the codebook that the batch uses; scalars


def vq_loss(
    model: VQModel,
    images,
    weights: LossWeights = LossWeights(),
    *,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    discriminator: PatchDiscriminator | None = None,
    step=None,
    key=None,
) -> tuple[jax.Array, Reconstruction]:
    """Training loss of the tokenizer: pixel + perceptual + codebook + commitment + entropy + adversarial terms.

    Differentiate with respect to `model` only. Source: VQLoss of LlamaGen's vq_loss.py.

    Args:
      model: the tokenizer.
      images: [B, h s, w s, image_channels] in [-1, 1].
      weights: of the terms.
      perceptual: (images, reconstruction) -> [B] distances, e.g. an `LPIPS`; None leaves the term out.
      discriminator: None leaves the term out. Until `adversarial_start` its term is multiplied by 0, not skipped:
        leave it out until then to save its time.
      step: number of updates done so far; needed with a discriminator.
      key: turns dropout on.

    Returns:
      The scalar loss, and the reconstruction with the metrics.

    Raises:
      ValueError: for a discriminator without `step`.
    """
    if discriminator is not None and step is None:
        raise ValueError("vq_loss: a discriminator was given but no step; pass the number of updates done so far.")
    quantized = model.quantize(model.latents(images, key=_fold_in(key, 0)))
    hidden = model.decoder.hidden(model.from_code(quantized.latents), key=_fold_in(key, 1))
    reconstruction = model.decoder.conv_out(hidden)
    metrics = {
        "codebook": quantized.codebook,
        "commitment": quantized.commitment,
        "codebook_usage": jnp.mean(code_frequencies(quantized.codes, model.config.codebook_size) > 0),
    }

    def similarity(generated):
        terms = {"pixel": jnp.mean((generated - images).astype(jnp.float32) ** 2)}
        if perceptual is not None:
            terms["perceptual"] = jnp.mean(perceptual(images, generated))
        return sum(getattr(weights, name) * term for name, term in terms.items()), terms

    loss, terms = similarity(reconstruction)
    metrics |= terms
    loss += weights.codebook * quantized.codebook + weights.commitment * quantized.commitment
    if weights.entropy:
        metrics["entropy"] = quantized.entropy
        loss += weights.entropy * quantized.entropy
    if discriminator is not None:

        def adversarial(generated):
            return -jnp.mean(discriminator(generated).astype(jnp.float32))

        metrics["adversarial"] = adversarial(reconstruction)
        scale = weights.adversarial_at(step)
        if weights.adaptive:
            scale *= _gradient_ratio(model.decoder.conv_out, hidden, lambda x: similarity(x)[0], adversarial)
            metrics["adversarial_weight"] = scale
        loss += scale * metrics["adversarial"]
    return loss, Reconstruction(reconstruction, quantized.codes, metrics)


def _gradient_ratio(conv, hidden, numerator, denominator):
    """|d numerator / d kernel| / (|d denominator / d kernel| + 1e-4), at most 1e4, for losses of conv(hidden).

    A constant to differentiation.
    """
    conv, hidden = jax.lax.stop_gradient((conv, hidden))
    norms = [
        jnp.linalg.norm(jax.grad(lambda conv, loss=loss: loss(conv(hidden)))(conv).kernel[...].ravel())
        for loss in (numerator, denominator)
    ]
    return jnp.minimum(norms[0] / (norms[1] + 1e-4), 1e4)


def discriminator_loss(discriminator: PatchDiscriminator, images, reconstruction, weights: LossWeights, *, step):
    """Hinge loss of the discriminator, w/2 (mean relu(1 - D(x)) + mean relu(1 + D(x'))), w the adversarial weight.

    Args:
      discriminator: what is trained.
      images: [B, H, W, C] in [-1, 1].
      reconstruction: of the same shape; no gradient reaches it.
      weights: for the weight and first step of the adversarial term.
      step: number of updates done so far.

    Returns:
      The scalar loss and {"real", "generated"}: mean logits.
    """
    real = discriminator(images).astype(jnp.float32)
    generated = discriminator(jax.lax.stop_gradient(reconstruction)).astype(jnp.float32)
    hinge = jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + generated))
    loss = 0.5 * weights.adversarial_at(step) * hinge
    return loss, {"real": real.mean(), "generated": generated.mean()}
