"""Attention that computes the blocks its mask lists, and no others: forward and backward, every head with its own mask.

o, lse = block_sparse_attention(q, k, v, RangeMask(ranges, pattern))
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import mosaic_gpu, reference
from pallas_kernels.block_sparse_attention.mask import (
    BlockLists,
    Extent,
    RangeMask,
    block_lists,
    block_table,
    count_logits,
    dense_mask,
)
from pallas_kernels.dispatch import Implementation
from pallas_kernels.operations import state_flops

__all__ = [
    "BlockLists",
    "Extent",
    "RangeMask",
    "block_lists",
    "block_sparse_attention",
    "block_table",
    "count_logits",
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
      q: [B, T, N, H]. The kernel computes 64, 128 or 256 channels: for other H, up to 256, q, k and v are copied with
        zeros behind them, which changes no number.
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
    heads, keys, axis = q.shape[2], k.shape[1 if heads_first else 2], 2 if heads_first else 1
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
    size = q.shape[3]
    if choice != "xla":  # channels of zeros add nothing to a product
        channels = [(0, 0)] * 3 + [(0, mosaic_gpu.padded_size(size) - size)]
        q, k, v = (jnp.pad(x, channels) for x in (q, k, v))
    how = _How(choice, scale, soft_cap, heads_first, known, *mask.logits(heads, q.shape[0], k.shape[axis]))
    o, lse = _attention(how, q, k, v, mask.ranges, None if known else pattern)
    return o[..., :size], lse


def unsupported(q, k, v, soft_cap: float | None = None) -> str | None:
    """Why the kernel cannot take this case, on any chip, as the end of a sentence; None if it can."""
    if soft_cap is not None:
        return "the kernel has no soft cap"
    return mosaic_gpu.unsupported(q, k, v)


class _How(NamedTuple):
    """What is known while tracing: arguments of the op, and how many logits there are."""

    choice: str
    scale: float
    soft_cap: float | None
    heads_first: bool
    known: tuple[int, ...] | None  # the pattern
    logits: int
    exact: bool

    def state(self, x, products: int):
        """x, with the FLOPs of that many products of logits and H channels."""
        return state_flops(x, 2 * products * x.shape[-1] * self.logits, exact=self.exact)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _attention(how: _How, q, k, v, ranges, pattern):
    pattern = np.asarray(how.known, np.int32) if how.known else pattern
    if how.choice == "xla":
        options = {"scale": how.scale, "soft_cap": how.soft_cap, "heads_first": how.heads_first}
        o, lse = reference.forward(q, k, v, RangeMask(ranges, pattern), **options)
    else:
        options = {"scale": how.scale, "heads_first": how.heads_first, **_kernel_options(how.choice, q)}
        o, lse = mosaic_gpu.forward(q, k, v, ranges, pattern, **options)
    return how.state(o, 2), lse


def _forward(how, q, k, v, ranges, pattern):
    o, lse = _attention(how, q, k, v, ranges, pattern)
    return (o, lse), (q, k, v, o, lse, ranges, pattern)


def _backward(how, kept, cotangents):
    return *_gradients(how, *kept, *cotangents), None, None


@functools.partial(jax.jit, static_argnums=0)
def _gradients(how: _How, q, k, v, o, lse, ranges, pattern, do, dlse):
    if how.heads_first:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    pattern = np.asarray(how.known, np.int32) if how.known else pattern
    if how.choice == "xla":
        options = {"scale": how.scale, "soft_cap": how.soft_cap}
        dq, dk, dv = reference.backward(q, k, v, o, lse, do, dlse, RangeMask(ranges, pattern), **options)
        products = 3, 1, 1  # S and dP on the way to all of them
    else:
        options = {"scale": how.scale, **_kernel_options(how.choice, q)}
        dq, dk, dv = mosaic_gpu.backward(q, k, v, o, lse, do, dlse, ranges, pattern, **options)
        products = 3, 2, 2  # S and dP twice, in dq and in dk, dv
    dq, dk, dv = map(how.state, (dq, dk, dv), products)
    if how.heads_first:
        dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return dq, dk, dv


_attention.defvjp(_forward, _backward)


def _kernel_options(choice: str, q) -> dict:
    interpret = plgpu.InterpretGPUParams(detect_races=True) if choice == "interpret" else False
    return {"config": mosaic_gpu.config_for(q.shape[3], q.dtype), "interpret": interpret}
