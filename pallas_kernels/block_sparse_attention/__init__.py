"""Attention that computes the blocks its mask lists, and no others: forward and backward, every head with its own mask.

o, lse = block_sparse_attention(q, k, v, RangeMask(ranges, pattern))
"""

import functools

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import mosaic_gpu, reference
from pallas_kernels.block_sparse_attention.mask import BlockLists, RangeMask, block_lists, block_table, dense_mask
from pallas_kernels.dispatch import Implementation

__all__ = [
    "BlockLists",
    "RangeMask",
    "block_lists",
    "block_sparse_attention",
    "block_table",
    "dense_mask",
    "unsupported",
]


def block_sparse_attention(
    q,
    k,
    v,
    mask: RangeMask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    heads_first: bool = False,
    implementation: Implementation = "auto",
):
    """Softmax attention over the keys that each query sees, and its log-sum-exp.

    logits = scale q kᵀ, or cap tanh(scale q kᵀ / cap); o = softmax(logits) v; lse = log sum exp(logits), both over the
    keys that the mask shows. Logits, softmax and sums are float32; the weights are rounded to v's dtype before they
    meet v. A query that sees nothing gets o = 0 and lse = -inf. Gradients of both outputs are exact.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H]; K divides N, query head n reads key head n // (N / K). Blocks of keys that no query sees are
        never read.
      mask: ranges [P, B or 1, T, 4], and the pattern of each head, [N]. As a NumPy array rather than a traced one the
        pattern lets XLA walk the blocks of each pattern separately; the kernel does so anyway.
      scale: above 0; None for 1 / sqrt(H).
      soft_cap: Gemma's bound on logits; None for none.
      heads_first: k and v are [B, K, S, H], as caches have them.
      implementation: "auto": the kernel on a Hopper GPU that can take the case, else XLA, and the log says so once.
        "xla", "mosaic_gpu" or "interpret" run or raise.

    Returns:
      (o [B, T, N, H] in q's dtype, lse [B, N, T] float32).
    Raises:
      ValueError: for shapes that do not fit, or an implementation that cannot run the case.
    Source: FlashAttention-2, arXiv:2307.08691, with lists of blocks.
    """
    heads, keys = q.shape[2], k.shape[1 if heads_first else 2]
    patterns, samples, queries = mask.ranges.shape[:3]
    if (
        k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or heads % keys
        or queries != q.shape[1]
        or samples not in (1, q.shape[0])
        or (mask.pattern is None and patterns != 1)
        or (mask.pattern is not None and mask.pattern.shape != (heads,))
    ):
        pattern = None if mask.pattern is None else list(mask.pattern.shape)
        raise ValueError(
            f"block_sparse_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, ranges "
            f"{list(mask.ranges.shape)}, pattern {pattern}; wanted [B, T, N, H], "
            f"{'[B, K, S, H]' if heads_first else '[B, S, K, H]'} twice with K dividing N, [P, B or 1, T, 4] and [N] "
            "(None if P = 1)."
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"block_sparse_attention: scale={scale}; wanted a number above 0.")
    choice = dispatch.choose("block_sparse_attention", implementation, unsupported(q, k, v, soft_cap))
    pattern = mask.pattern
    known = None
    if pattern is not None and not isinstance(pattern, Tracer):
        known = tuple(np.asarray(pattern).tolist())
    return _attention((choice, scale, soft_cap, heads_first, known), q, k, v, mask.ranges, None if known else pattern)


def unsupported(q, k, v, soft_cap: float | None = None) -> str | None:
    """Why the kernel cannot take this case, on any chip, as the end of a sentence; None if it can."""
    if soft_cap is not None:
        return "the kernel has no soft cap"
    return mosaic_gpu.unsupported(q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, ranges, pattern):
    choice, scale, soft_cap, heads_first, known = how
    pattern = np.asarray(known, np.int32) if known else pattern
    if choice == "xla":
        mask = RangeMask(ranges, pattern)
        return reference.forward(q, k, v, mask, scale=scale, soft_cap=soft_cap, heads_first=heads_first)
    options = _kernel_options(choice, q)
    return mosaic_gpu.forward(q, k, v, ranges, pattern, scale=scale, heads_first=heads_first, **options)


def _forward(how, q, k, v, ranges, pattern):
    o, lse = _attention(how, q, k, v, ranges, pattern)
    return (o, lse), (q, k, v, o, lse, ranges, pattern)


def _backward(how, kept, cotangents):
    choice, scale, soft_cap, heads_first, known = how
    q, k, v, o, lse, ranges, pattern = kept
    do, dlse = cotangents
    if heads_first:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    pattern = np.asarray(known, np.int32) if known else pattern
    if choice == "xla":
        mask = RangeMask(ranges, pattern)
        grads = reference.backward(q, k, v, o, lse, do, dlse, mask, scale=scale, soft_cap=soft_cap)
    else:
        grads = mosaic_gpu.backward(
            q, k, v, o, lse, do, dlse, ranges, pattern, scale=scale, **_kernel_options(choice, q)
        )
    dq, dk, dv = grads
    if heads_first:
        dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)


def _kernel_options(choice: str, q) -> dict:
    interpret = plgpu.InterpretGPUParams(detect_races=True) if choice == "interpret" else False
    return {"config": mosaic_gpu.config_for(q.shape[3], q.dtype), "interpret": interpret}
