"""Attention of one query per row over a long cache: the op, its quantised keys and values, and what the kernel takes.

o, lse = decode_attention(q, keys, values, ranges)                  # [B, N, H], [B, N]
o, lse = decode_attention(q, quantize_kv(keys, 4), quantize_kv(values, 4), ranges)
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import mosaic_gpu, reference
from pallas_kernels.decode_attention.quantized_kv import QuantizedKV, codes_of, dequantize_kv, quantize_kv
from pallas_kernels.dispatch import Implementation
from pallas_kernels.operations import state_flops

__all__ = ["QuantizedKV", "codes_of", "decode_attention", "dequantize_kv", "quantize_kv", "unsupported"]


def decode_attention(
    q,
    keys: jax.Array | QuantizedKV,
    values: jax.Array | QuantizedKV,
    ranges,
    *,
    table=None,
    scale: float | None = None,
    implementation: Implementation = "auto",
):
    """Softmax attention of one query per row and head over the slots that its key head sees, and its log-sum-exp.

    o = sum_s exp(scale q k_s - lse) v_s, lse = log sum_s exp(scale q k_s), over s in [r0, r1) and [r2, r3). Logits,
    softmax and sums are float32; weights are rounded to the dtype of the products before they meet v. A head that sees
    nothing gets o = 0 and lse = -inf. What no range shows may be anything, NaN included; the kernel reads no block
    of 64 slots without a visible one. Two results over different slots, say a cache and the token itself, are merged by
    their lse. Not differentiable in reverse.

    Slots in a row, ranges of a key head:

        dense cache of `length` tokens                (0, length, length, length)
        sink and ring, not yet full                   (0, length, length, length)
        sink + recent window over a dense cache       (0, sink, length - recent, length)

    Args:
      q: [B, N, H] bfloat16, float16 or float32; head n reads key head n // (N / K).
      keys, values: [B, K, S, H], arrays or QuantizedKV; with a table they are pools of pages, [P, K, page, H].
      ranges: [B or 1, K or 1, 4] int32, 0 <= r0 <= r1 <= r2 <= r3 <= S; with a table up to M * page.
      table: None, or [B, K or 1, M] int32: slot s lies in page table[b, k, s // page], at s % page. What stands for
        blocks that no range touches may be anything.
      scale: None for 1 / sqrt(H).
      implementation: "auto": the kernel on a Hopper GPU that can take the case, else XLA, and the log says so once.
        "xla", "mosaic_gpu" or "interpret" run or raise.
    Returns:
      (o [B, N, H] in q's dtype, lse [B, N] float32).
    Raises:
      ValueError: for shapes or dtypes that do not fit, or an implementation that cannot run the case.
    Source: FlashDecoding (split over keys); quantised as QServe, arXiv:2405.04532, and LServe, arXiv:2502.14866, whose
      kernels also serve dense and streaming heads in one launch, by lists of pages.
    """
    _check(q, keys, values, ranges, table)
    ranges = jnp.broadcast_to(ranges, (q.shape[0], keys.shape[1], 4)).astype(jnp.int32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = dispatch.choose("decode_attention", implementation, unsupported(q, keys, values, table=table))
    return _attend(choice, scale, q, keys, values, ranges, table)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(choice, scale, q, keys, values, ranges, table):
    if choice == "xla":
        o, lse = reference.decode_attention(q, keys, values, ranges, table, scale=scale)
    else:
        interpret = plgpu.InterpretGPUParams(detect_races=True) if choice == "interpret" else False
        options = {"scale": scale, "config": mosaic_gpu.config_for(q, keys, table), "interpret": interpret}
        o, lse = mosaic_gpu.decode_attention(q, keys, values, ranges, table, **options)
    slots = keys.shape[2] * (1 if table is None else table.shape[2])
    return state_flops(o, 4 * q.size * slots, exact=False), lse


def _check(q, keys, values, ranges, table):
    dims = q.ndim == 3 and len(keys.shape) == len(values.shape) == 4 and ranges.ndim == 3
    rows = keys.shape[0] if table is None else table.shape[0]
    if (
        not dims
        or keys.shape != values.shape
        or rows != q.shape[0]
        or keys.shape[3] != q.shape[2]
        or q.shape[1] % keys.shape[1]
        or ranges.shape[0] not in (1, rows)
        or ranges.shape[1] not in (1, keys.shape[1])
        or ranges.shape[2] != 4
        or (table is not None and (table.ndim != 3 or table.shape[1] not in (1, keys.shape[1])))
    ):
        raise ValueError(
            f"decode_attention: q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}, ranges "
            f"{list(ranges.shape)}, table {table if table is None else list(table.shape)}; wanted q [B, N, H], keys "
            "and values [B, K, S, H] with K dividing N, or pages [P, K, page, H] and a table [B, K or 1, M], and "
            "ranges [B or 1, K or 1, 4]. Take one layer of stacked caches."
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"decode_attention: q is {q.dtype}; wanted bfloat16, float16 or float32.")
    kinds = [x.bits if isinstance(x, QuantizedKV) else x.dtype for x in (keys, values)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"decode_attention: keys are {kinds[0]} and values {kinds[1]}; wanted both in one dtype, or both quantised "
            "in as many bits."
        )


def unsupported(q, keys, values, *, table=None) -> str | None:
    """Why the kernel cannot take this case, on any chip, as the end of a sentence; None if it can."""
    return mosaic_gpu.unsupported(q, keys, values, table)
