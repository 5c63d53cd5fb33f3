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
        original_positions / high_frequency_factor kept, interpolated between.
      factor: context length divided by the one of pre-training.
      low_frequency_factor, high_frequency_factor, original_positions: of "llama3".
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


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
    return frequencies.astype(np.float32)


def rotary_tables(config: RopeConfig, head_dim: int, positions):
    """Cosines and sines of positions [..., T] int32: two arrays [..., T, H / 2] float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, tables):
    """Rotates channel pairs (i, i + H / 2) of x [..., T, N, H] by the angles of `rotary_tables`; float32 inside."""
    cosine, sine = (table[..., None, :] for table in tables)  # [..., T, 1, H / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
