"""Keys or values in 8 or 4 bits, one scale and one zero for each token of each head."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_ZERO = 15_000  # in steps; float16 would hold 65504, and overflows for 8 bits without this bound


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKV:
    """[..., S, H] numbers as value = (code - zero) * scale, with integers 0 <= code < 2^bits.

    A pytree whose arrays all have the token axis S behind the leading ones, so a cache writes a few tokens into a long
    store with jax.tree.map over (store, quantize_kv(tokens, bits)) and a slice update at the same leading indices.

    8 bits are stored as code - 128. 4 bits go in halves, so that unpacking does not interleave: byte h holds the code
    of channel h in its low four bits, and that of channel h + H / 2, less 8, in the high ones.

    Attributes:
      codes: int8 [..., S, H], or for 4 bits [..., S, H / 2].
      scale: [..., S] float16 or float32.
      zero: [..., S] in scale's dtype; a real number, not rounded to an integer.
      bits: static, 8 or 4.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    bits: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., S, H] of the values."""
        return *self.scale.shape, self.codes.shape[-1] * 8 // self.bits


def quantize_kv(x, bits: int, dtype=jnp.float16) -> QuantizedKV:
    """Rounds each token of each head to 2^bits levels between its smallest and its largest channel.

    With n = 2^bits - 1, in float32: scale = (max - min) / n and zero = -n min / (max - min), both rounded to dtype, and
    code = round(x (1 / scale) + zero), half to even, clipped to 0..n. Keys are quantised after rotation.

    Args:
      x: [..., S, H] of any floating dtype; H even for 4 bits.
      bits: 8 or 4.
      dtype: of scale and zero, float16 as in the source, or float32, for tokens whose mean is far larger than their
        spread: float16 keeps 11 bits of a zero.
    Raises:
      ValueError: for other bits or dtypes, or an odd H in 4 bits.
    Source: QServe, arXiv:2405.04532, section 4.2; its kernels' KV4 and asymmetric KV8. Deviations: max - min is raised
      to n / 15000 of the largest |x| (4 bits: 1/1000), where the source divides by zero for a constant vector or
      overflows; the zero belongs to the rounded scale where that is subnormal; and codes are clipped, where the source
      keeps the low four bits.
    """
    if bits not in (8, 4) or dtype not in (jnp.float16, jnp.float32) or (bits == 4 and x.shape[-1] % 2):
        raise ValueError(
            f"quantize_kv: bits={bits}, dtype={jnp.dtype(dtype).name} for {x.shape[-1]} channels; wanted 8 or 4 bits, "
            "float16 or float32, and for 4 bits an even number of channels."
        )
    x, levels = x.astype(jnp.float32), 2**bits - 1
    low, high = x.min(-1), x.max(-1)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    # The last floor is a scale that float16 still holds, for vectors of zeros.
    span = jnp.maximum(jnp.maximum(high - low, largest * (levels / LARGEST_ZERO)), levels * 2.0**-24)
    scale = (span / levels).astype(dtype)
    # Where rounding changes the scale much, the zero has to follow.
    coarse = scale < jnp.finfo(dtype).smallest_normal
    zero = jnp.where(coarse, -low / scale.astype(jnp.float32), -levels * low / span).astype(dtype)
    code = x * (1 / scale.astype(jnp.float32))[..., None] + zero.astype(jnp.float32)[..., None]
    code = jnp.clip(jnp.round(code), 0, levels).astype(jnp.uint8)
    if bits == 8:
        return QuantizedKV(lax.bitcast_convert_type(code ^ 128, jnp.int8), scale, zero, bits)
    first, second = jnp.split(code, 2, axis=-1)
    return QuantizedKV(lax.bitcast_convert_type(first | ((second ^ 8) << 4), jnp.int8), scale, zero, bits)


def codes_of(kv: QuantizedKV):
    """The integers, uint8 [..., S, H]."""
    stored = lax.bitcast_convert_type(kv.codes, jnp.uint8)
    if kv.bits == 8:
        return stored ^ 128
    return jnp.concatenate([stored & 15, (stored >> 4) ^ 8], axis=-1)


def dequantize_kv(kv: QuantizedKV, dtype=jnp.float32):
    """(code - zero) * scale, [..., S, H], computed in float32 and rounded once."""
    zero, scale = (side.astype(jnp.float32)[..., None] for side in (kv.zero, kv.scale))
    return ((codes_of(kv).astype(jnp.float32) - zero) * scale).astype(dtype)
