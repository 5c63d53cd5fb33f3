"""The op in plain JAX, on every chip: a loop over blocks of slots that never holds a whole cache in another dtype.

Rows and heads step through the slots together, from the lowest to the highest that any of them sees in its first range
and then in its second, so a window over a long cache costs the window. Codes are widened a block at a time; a token's
scale and zero are applied to its logit and its weight rather than to its channels:

    q (code - zero) scale = scale (q code - zero sum(q))
    sum_s p_s (code_s - zero_s) scale_s = sum_s (p_s scale_s) code_s - sum_s p_s scale_s zero_s

Two CPU cores that much other work was using, jax 0.12.0.1, B = 1, N = 32, K = 8, H = 128, S = 32768, q in float32
(bfloat16 for a bfloat16 cache), programs timed in turn, milliseconds (median of 5). "Whole" is softmax attention over
all slots at once, of a quantised cache after dequantising it:

    cache      blocks of 256    1024    2048    8192    whole
    float32              129      86     122     195      108
    bfloat16              47      28      45     104       40
    int8                  64      53      58     156      348
    int4                 103      88     112     186      349

Clearing hidden values, so that a weight of zero meets no NaN, costs nothing that shows (float32 55 against 51, bfloat16
26 against 27).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.quantized_kv import QuantizedKV, codes_of

BLOCK = 1024  # slots of a step


def block_list(ranges, size: int):
    """Which blocks of `size` slots two ranges touch: (first, how many, second, how many in all), each [...] int32.

    They are first, first + 1, ... and then second, second + 1, ...; none comes twice.

    Args:
      ranges: [..., 4] int32, as `decode_attention` takes them.
      size: slots of a block.
    """
    r0, r1, r2, r3 = (ranges[..., i] for i in range(4))
    first, first_end = r0 // size, -(-r1 // size)
    first_count = jnp.where(r1 > r0, first_end - first, 0)
    second = jnp.maximum(r2 // size, jnp.where(first_count > 0, first_end, 0))
    second_count = jnp.where(r3 > r2, jnp.maximum(-(-r3 // size) - second, 0), 0)
    return first, first_count, second, first_count + second_count


def nth_block(blocks, n):
    """The n-th block of `block_list`."""
    first, first_count, second, _ = blocks
    return jnp.where(n < first_count, first + n, second + n - first_count)


def visible(slot, ranges):
    """Whether ranges [..., 4] hold the slots [C]: booleans [..., C]."""
    r0, r1, r2, r3 = (ranges[..., i, None] for i in range(4))
    return ((slot >= r0) & (slot < r1)) | ((slot >= r2) & (slot < r3))


def decode_attention(q, keys, values, ranges, table, *, scale: float):
    """`pallas_kernels.decode_attention.decode_attention` with ranges [B, K, 4]."""
    (batch, heads, width), kv_heads = q.shape, keys.shape[1]
    slots = keys.shape[2] * (1 if table is None else table.shape[2])
    if not slots:
        return jnp.zeros_like(q), jnp.full((batch, heads), -jnp.inf, jnp.float32)
    size = min(BLOCK, slots)
    if table is not None:
        size = max(1, size // keys.shape[2]) * keys.shape[2]  # whole pages
    q = q.reshape(batch, kv_heads, heads // kv_heads, width)  # [B, K, G, H]
    blocks = block_list(_union(ranges), size)

    def step(n, carry):
        weighted, largest, total = carry
        block = nth_block(blocks, n)
        start = jnp.minimum(block * size, slots - size)  # the last block of a ragged cache overlaps the one before
        slot = start + jnp.arange(size, dtype=jnp.int32)
        shown = visible(slot, ranges) & (slot >= block * size)  # [B, K, C]
        k, v = (_take(store, table, start, size) for store in (keys, values))
        logits = jnp.where(shown[:, :, None], _logits(q, k) * scale, -jnp.inf)  # [B, K, G, C]
        larger = jnp.maximum(largest, logits.max(-1))
        shift = jnp.where(larger == -jnp.inf, 0.0, larger)
        kept, weights = jnp.exp(largest - shift), jnp.exp(logits - shift[..., None])
        weighted = weighted * kept[..., None] + _weigh(weights, v, shown, q.dtype)
        return weighted, larger, total * kept + weights.sum(-1)

    zero = jnp.zeros(q.shape, jnp.float32)
    carry = zero, zero[..., 0] - jnp.inf, zero[..., 0]
    if axes := frozenset().union(*map(_varying, jax.tree.leaves((q, keys, values, ranges, table)))):
        carry = lax.pcast(carry, tuple(axes), to="varying")  # in a shard_map that splits an operand
    weighted, largest, total = lax.fori_loop(0, blocks[-1], step, carry)
    o = weighted / jnp.where(total > 0, total, 1.0)[..., None]
    lse = largest + jnp.log(total)
    return o.reshape(batch, heads, width).astype(q.dtype), lse.reshape(batch, heads)


def _varying(x) -> frozenset:
    """The mesh axes of the surrounding shard_map over which x differs."""
    kind = getattr(jax.typeof(x), "mat", None)  # jax 0.11 has `vma` in its place
    return jax.typeof(x).vma if kind is None else kind.varying


def _union(ranges):
    """The smallest [4] ranges around those of all rows and heads; the first may reach into the second."""
    r0, r1, r2, r3 = (ranges[..., i] for i in range(4))
    last = jnp.iinfo(jnp.int32).max
    end, tail_end = jnp.max(jnp.where(r1 > r0, r1, 0)), jnp.max(jnp.where(r3 > r2, r3, 0))
    start, tail = jnp.min(jnp.where(r1 > r0, r0, last)), jnp.min(jnp.where(r3 > r2, r2, last))
    return jnp.stack([jnp.minimum(start, end), end, jnp.minimum(tail, tail_end), tail_end])


def _take(store, table, start, size):
    """The slots [start, start + size) of every row and head, [B, K, C, ...]."""

    def take(array):
        if table is None:
            return lax.dynamic_slice_in_dim(array, start, size, 2)
        page = array.shape[2]
        pages = lax.dynamic_slice_in_dim(table, start // page, size // page, 2)
        # Pages of blocks that some rows see and others do not may be of no row: their numbers are clipped.
        got = array.at[pages, jnp.arange(array.shape[1])[:, None]].get(mode="clip")  # [B, K, pages, page, ...]
        return got.reshape(*got.shape[:2], size, *array.shape[3:])

    if not isinstance(store, QuantizedKV):
        return take(store)
    return QuantizedKV(take(store.codes), take(store.scale), take(store.zero), store.bits)


def _logits(q, k):
    """q k, [B, K, G, H] and [B, K, C, H] -> [B, K, G, C] float32."""
    if not isinstance(k, QuantizedKV):
        return jnp.einsum("BKGH,BKCH->BKGC", q, k, preferred_element_type=jnp.float32)
    products = jnp.einsum("BKGH,BKCH->BKGC", q, codes_of(k).astype(q.dtype), preferred_element_type=jnp.float32)
    scale, zero = (side.astype(jnp.float32)[:, :, None] for side in (k.scale, k.zero))
    return (products - zero * q.astype(jnp.float32).sum(-1, keepdims=True)) * scale


def _weigh(weights, v, shown, dtype):
    """weights v, [B, K, G, C] and [B, K, C, H] -> [B, K, G, H] float32; what is not shown may be NaN."""
    if not isinstance(v, QuantizedKV):
        v = jnp.where(shown[..., None], v, 0)
        weights = weights.astype(jnp.promote_types(dtype, v.dtype))
        return jnp.einsum("BKGC,BKCH->BKGH", weights, v, preferred_element_type=jnp.float32)
    scale, zero = (jnp.where(shown, side.astype(jnp.float32), 0.0)[:, :, None] for side in (v.scale, v.zero))
    # Rounded before both sums, so that rounding cancels where code - zero does.
    weights = (weights * scale).astype(jnp.bfloat16 if dtype == jnp.float16 else dtype)
    codes = codes_of(v).astype(weights.dtype)
    products = jnp.einsum("BKGC,BKCH->BKGH", weights, codes, preferred_element_type=jnp.float32)
    return products - (weights.astype(jnp.float32) * zero).sum(-1, keepdims=True)
