"""Convolution over sparse rows: the op, its kernel maps and its dataflows.

kernel_map = prepare(table, transpose(table, inputs), count, Dataflows())   # once per map; layers share it
y = sparse_convolution(x, w, kernel_map)                                    # [N, C] -> [M, D]
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.operations import state_flops
from pallas_kernels.sparse_convolution import mosaic_gpu, reference
from pallas_kernels.sparse_convolution.kernel_map import (
    Dataflow,
    Dataflows,
    KernelMap,
    Pairs,
    Tiles,
    default_dataflows,
    executed,
    group_offsets,
    pairs,
    prepare,
    split_offsets,
    transpose,
)

__all__ = [
    "Dataflow",
    "Dataflows",
    "KernelMap",
    "Pairs",
    "Tiles",
    "default_dataflows",
    "executed",
    "group_offsets",
    "pairs",
    "prepare",
    "sparse_convolution",
    "split_offsets",
    "transpose",
    "unsupported",
]


def sparse_convolution(x, w, kernel_map: KernelMap, *, implementation: Implementation = "auto"):
    """y[i] = sum_k x[table[k, i]] @ w[k], over the offsets k at which output row i has an input row.

    Products accumulate in float32. Gradients follow the map too: dx[j] = sum_k dy[transposed[k, j]] @ w[k]ᵀ and
    dw[k] = sum_i x[table[k, i]]ᵀ dy[i]; every sum has a fixed order, so results repeat to the bit. Rows of padding
    (output rows from `kernel_map.count` on, and input rows that no entry names) are never read: they may hold anything.
    Output rows of padding are zero.

    Args:
      x: [N, C] float32, bfloat16 or float16.
      w: [K, C, D], cast to x's dtype.
      kernel_map: from K offsets, N input rows and M output rows.
      implementation: "auto": the kernel on a Hopper GPU that can take the case, else XLA, and the log says so once.
        "xla", "mosaic_gpu" or "interpret" run or raise.
    Returns:
      [M, D] in x's dtype.
    Raises:
      ValueError: for shapes that do not fit, an x that is not floating, or an implementation that cannot run the case.
    Source: TorchSparse++, arXiv:2311.12862; torchsparse/nn/functional/conv. Deviation: no atomics anywhere.
    """
    offsets, outputs = kernel_map.table.shape
    if (
        x.ndim != 2
        or w.ndim != 3
        or w.shape[:2] != (offsets, x.shape[1])
        or kernel_map.transposed.shape != (offsets, x.shape[0])
    ):
        raise ValueError(
            f"sparse_convolution: x {list(x.shape)}, w {list(w.shape)}, map from {kernel_map.transposed.shape[1]} to "
            f"{outputs} rows at {offsets} offsets; wanted x [N, C], w [K, C, D] and a map of K offsets from N rows."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"sparse_convolution: x is {x.dtype}; wanted a floating dtype, to which the weights are cast: convert x."
        )
    choice = dispatch.choose("sparse_convolution", implementation, unsupported(x, w, kernel_map))
    return _convolve(choice, x, w.astype(x.dtype), kernel_map)


def unsupported(x, w, kernel_map: KernelMap) -> str | None:
    """Why the kernel cannot take this case, on any chip, as the end of a sentence; None if it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype} and the kernel takes bfloat16 or float16"
    if 0 in (*x.shape, *w.shape, *kernel_map.table.shape):
        return "there is nothing to multiply"
    if w.shape[0] >= 1 << mosaic_gpu.WHO:
        return f"the map has {w.shape[0]} offsets and the kernel takes fewer than {1 << mosaic_gpu.WHO}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(choice, x, w, kernel_map):
    flow = kernel_map.dataflows.forward
    return _product(choice, flow, kernel_map.identity, x, w, kernel_map.table, kernel_map.forward)


def _forward(choice, x, w, kernel_map):
    return _convolve(choice, x, w, kernel_map), (x, w, kernel_map)


def _backward(choice, kept, dy):
    x, w, kernel_map = kept
    flows, identity = kernel_map.dataflows, kernel_map.identity
    if choice == "xla":
        # Whatever a loss says of padding rows, they were not computed from anything. The kernel does not read them.
        used = jnp.arange(dy.shape[0]) < kernel_map.count
        dy = jnp.where(used[:, None], dy, 0)
    dx = _product(choice, flows.dgrad, identity, dy, w.swapaxes(1, 2), kernel_map.transposed, kernel_map.dgrad)
    dw = _weight_gradient(choice, flows.wgrad, identity, x, dy, kernel_map.table, kernel_map.wgrad)
    return dx, dw.astype(w.dtype), None


_convolve.defvjp(_forward, _backward)


# Calls of their own, so that they can state their FLOPs: the data decide, and these are of full windows.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _product(choice, flow: Dataflow, identity, x, w, table, preparation):
    module, options = _implementation(choice)
    y = module.product(x, w, table, preparation, flow, identity=identity, **options)
    return state_flops(y.astype(x.dtype), 2 * table.size * w.shape[1] * w.shape[2], exact=False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _weight_gradient(choice, flow: Dataflow, identity, x, dy, table, preparation):
    module, options = _implementation(choice)
    dw = module.weight_gradient(x, dy, table, preparation, flow, identity=identity, **options)
    return state_flops(dw, 2 * table.size * x.shape[1] * dy.shape[1], exact=False)


def _implementation(choice):
    if choice == "xla":
        return reference, {}
    return mosaic_gpu, {"interpret": plgpu.InterpretGPUParams(detect_races=True) if choice == "interpret" else False}
