"""Rotary position embedding and its published scalings.

Source: RoFormer (arXiv:2104.09864) in the half-split form of Llama; huggingface/transformers modeling_rope_utils.py.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Frequencies of a rotary embedding.

    Attributes:
      theta: base; the frequency of pair i is theta^(-2i / H).
      scaling: "none"; "linear": every frequency divided by `factor` (position interpolation, arXiv:2306.15595);
        "llama3": wavelengths over original_positions / low_frequency_factor divided by `factor`, those under
        original_positions / high_frequency_factor kept, interpolated between; "yarn" (arXiv:2309.00071, with the ramp
        of transformers): pairs that turn more than `beta_fast` times in original_positions kept, those that turn less
        than `beta_slow` times divided by `factor`, interpolated over whole i between; cosines and sines times
        `attention_factor`, so attention's logits times its square.
      factor: context length divided by the one of pre-training.
      low_frequency_factor, high_frequency_factor: of "llama3".
      original_positions: the context length of pre-training, of "llama3" and "yarn".
      beta_fast, beta_slow: of "yarn", turns.
      attention_factor: of "yarn"; None: 0.1 ln(factor) + 1, the paper's.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of channels, [H / 2] float32."""
    frequencies = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if config.scaling == "linear":
        return (frequencies / config.factor).astype(np.float32)
    if config.scaling == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = config.low_frequency_factor, config.high_frequency_factor
        kept = np.clip((config.original_positions / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - kept) * frequencies / config.factor + kept * frequencies
    if config.scaling == "yarn":

        def pair(turns):
            """The i, not whole, of the pair that turns so often in original_positions."""
            wavelength = config.original_positions / turns
            return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.theta))

        first = max(math.floor(pair(config.beta_fast)), 0)
        last = min(math.ceil(pair(config.beta_slow)), head_dim - 1)
        kept = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0.0, 1.0)
        frequencies = (1 - kept) * frequencies / config.factor + kept * frequencies
    return frequencies.astype(np.float32)


def rotary_tables(config: RopeConfig, head_dim: int, positions):
    """Cosines and sines of positions [..., T] int32: two arrays [..., T, H / 2] float32; "yarn" scales them."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config, head_dim)
    if config.scaling != "yarn":
        return jnp.cos(angles), jnp.sin(angles)
    scale = config.attention_factor
    if scale is None:
        scale = 0.1 * math.log(max(config.factor, 1.0)) + 1.0
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def rotate(x, tables):
    """Rotates channel pairs (i, i + H / 2) of x [..., T, N, H] by the angles of `rotary_tables`; float32 inside."""
    cosine, sine = (table[..., None, :] for table in tables)  # [..., T, 1, H / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
