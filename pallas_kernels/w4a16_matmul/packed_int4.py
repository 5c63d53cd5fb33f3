"""The int4 weight that every implementation reads: layout, packing and its exact inverse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

SPAN = 128  # input channels of one packed tile: 4 nibbles x 32 words of 16 bits
PLANE = SPAN // 4  # input channels held by one nibble position
GROUPS = (32, 64, 128)  # and D, a whole row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedInt4:
    """A [D, F] weight in 4 bits, output channel first: value[d, f] = scale[d // G, f] * (q[d, f] - zero[d // G, f]).

    Bits 4j..4j+3 of word [f, 32 t + c] are q of input channel 128 t + 32 j + c: a nibble position of a tile is a
    [channels, 32] matrix that a GPU's tensor core takes as it is, with no exchange between threads. D is padded to a
    multiple of 128 with q = 0; activations beyond D count as zero, so the padding needs no value of its own.

    A pytree: layers are stacked along a leading axis of every array (jax.vmap of pack, lax.scan over the result), and
    jax.ShapeDtypeStruct leaves stand for weights that do not exist yet. Slices for tensor parallelism: F anywhere; D at
    multiples of max(128, G), words as 32 words per 128 channels; a whole-row weight at multiples of 128, with scale and
    zero whole in every part. If D has no padding, nothing static changes, and jax.shard_map may cut either axis.

    Attributes:
      words: [F, ceil(D / 128) * 32] uint16.
      scale: [D / G, F] float16, bfloat16 or float32.
      zero: [D / G, F], integers 0..15 in scale's dtype.
      group: G, static: 32, 64, 128, or D (at least D: one scale for a whole row).
      padding: static, input channels at the end of `words` that are not part of the weight, 0..127.
    """

    words: jax.Array
    scale: jax.Array
    zero: jax.Array
    group: int = dataclasses.field(metadata=dict(static=True))
    padding: int = dataclasses.field(default=0, metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        """[D, F] of one layer, whatever is stacked."""
        return 4 * self.words.shape[-1] - self.padding, self.words.shape[-2]


def pack(q, scale, zero, group: int) -> PackedInt4:
    """Packs integers; done once, when weights are loaded. INT3 is stored the same way, with q and zero in 0..7.

    Args:
      q: [D, F] integers 0..15, input channel first. Any D for a whole row, else a multiple of group.
      scale: [D / G, F] float16, bfloat16 or float32.
      zero: [D / G, F] integers 0..15 of any dtype.
      group: G, 32, 64, 128 or D.
    Raises:
      ValueError: for another group, for shapes or dtypes that do not fit, and for concrete q outside 0..15.
    Source: the layout is ours; the formula is AWQ's, arXiv:2306.00978, eq. 1 with a zero point.
    """
    (d, f), groups = q.shape, (q.shape[0] // group, q.shape[1])
    if (group not in GROUPS and group != d) or d % group:
        raise ValueError(
            f"pack: group={group} for {d} input channels; it must be 32, 64 or 128 and divide them, or be {d} for one "
            "scale per output channel."
        )
    if scale.shape != groups or zero.shape != groups or not jnp.issubdtype(q.dtype, jnp.integer):
        raise ValueError(
            f"pack: q is {q.dtype}{list(q.shape)}, scale {list(scale.shape)}, zero {list(zero.shape)}; wanted integers "
            f"[D, F], and [D / {group}, F] = {list(groups)} for scale and zero."
        )
    if scale.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise ValueError(f"pack: scale is {scale.dtype}; convert it to float16, bfloat16 or float32.")
    if not isinstance(q, Tracer) and not 0 <= np.min(q, initial=0) <= np.max(q, initial=0) <= 15:
        raise ValueError(f"pack: q goes from {np.min(q)} to {np.max(q)}; 4 bits hold 0..15. Add the zero point first.")
    padding = -d % SPAN
    q = jnp.pad(jnp.asarray(q, jnp.uint16), ((0, padding), (0, 0))).T.reshape(
        f, -1, 4, PLANE
    )  # [F, D / 128, nibble, 32]
    words = jnp.sum(q << (4 * jnp.arange(4, dtype=jnp.uint16))[:, None], axis=2, dtype=jnp.uint16)
    scale = jnp.asarray(scale)
    return PackedInt4(words.reshape(f, -1), scale, jnp.asarray(zero, scale.dtype), group, padding)


def unpack(w: PackedInt4):
    """The inverse of pack, exactly: q [..., D, F] uint8, scale and zero [..., D / G, F]; leading axes are layers."""
    return jnp.swapaxes(_integers(w), -1, -2), w.scale, w.zero


def dequantize(w: PackedInt4, dtype=None):
    """scale * (q - zero), [..., D, F]: rounded once, in scale's dtype, then cast to dtype (scale's own if None)."""
    # XLA may skip the rounding to scale's dtype if a cast follows in the same program.
    value = jax.lax.optimization_barrier(output_major(w))
    return jnp.swapaxes(value if dtype is None else value.astype(dtype), -1, -2)


def output_major(w: PackedInt4):
    """scale * (q - zero), [..., F, D] in scale's dtype."""
    (d, f), layers = w.shape, w.words.shape[:-2]
    # In float32 the product of 4 bits and a 16-bit scale is exact: the cast is the only rounding.
    q = _integers(w).astype(jnp.float32).reshape(*layers, f, w.scale.shape[-2], -1)  # [..., F, D / G, G]
    scale, zero = (jnp.swapaxes(side.astype(jnp.float32), -1, -2)[..., None] for side in (w.scale, w.zero))
    return ((q - zero) * scale).astype(w.scale.dtype).reshape(*layers, f, d)


def _integers(w):
    """[..., F, D] uint8."""
    (d, f), layers = w.shape, w.words.shape[:-2]
    tiles = w.words.reshape(*layers, f, -1, 1, PLANE)  # [..., F, D / 128, 1, 32]
    q = (tiles >> (4 * jnp.arange(4, dtype=jnp.uint16))[:, None]) & 15  # [..., F, D / 128, nibble, 32]
    return q.astype(jnp.uint8).reshape(*layers, f, -1)[..., :d]
