"""16-bit activations times 4-bit weights: the op, its weight, and what the kernel cannot take.

w = pack(q, scale, zero, group=128)              # once, when weights are loaded
y = w4a16_matmul(x, w)                           # [..., D] -> [..., F]
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.operations import state_flops
from pallas_kernels.w4a16_matmul import mosaic_gpu, reference
from pallas_kernels.w4a16_matmul.packed_int4 import PackedInt4, dequantize, pack, unpack

__all__ = ["PackedInt4", "dequantize", "pack", "unpack", "unsupported", "w4a16_matmul"]


def w4a16_matmul(x, w: PackedInt4, *, implementation: Implementation = "auto"):
    """x @ dequantize(w), accumulated in float32.

    y[..., f] = sum_d x[..., d] * scale[d // G, f] * (q[d, f] - zero[d // G, f])

    Differentiable with respect to x (reverse mode, plain JAX on every chip); scale and zero are constants, their
    gradient is zero. Works under jit with operands sharded by XLA, under vmap and scan over stacked weights, and inside
    jax.shard_map: with F split the result is split; with D split it is a part that the caller sums (jax.lax.psum).

    The implementations round differently. The kernel casts scale to x's dtype, and rounds scale * (q - zero) to it
    (more than 32 tokens) or keeps everything in float32; "xla" rounds to scale's dtype and then to x's, unless XLA
    chooses to keep more.

    Args:
      x: [..., D] bfloat16, float16 or float32; the kernel takes the first two.
      w: one layer's [D, F] weight.
      implementation: "auto": the kernel on a Hopper GPU that can take the case, else XLA, and the log says so once.
        "xla", "mosaic_gpu" or "interpret" run or raise.
    Returns:
      [..., F] in x's dtype.
    Raises:
      ValueError: for shapes or dtypes that do not fit, or an implementation that cannot run the case.
    Source: AWQ, arXiv:2306.00978; the product is that of its released kernels, the layout and the kernel are ours.
    """
    groups = -(-w.shape[0] // w.group)
    if w.words.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0] or w.scale.shape != (groups, w.shape[1]):
        raise ValueError(
            f"w4a16_matmul: x is {list(x.shape)}, words {list(w.words.shape)}, scale {list(w.scale.shape)}, group "
            f"{w.group}, which is a [D, F] = {list(w.shape)} weight; wanted x [..., D], words [F, D / 4] and scale "
            "[D / group, F]. Take one layer of stacked weights (scan, vmap); cut D at whole groups."
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"w4a16_matmul: x is {x.dtype}; wanted bfloat16, float16 or float32.")
    choice = dispatch.choose("w4a16_matmul", implementation, unsupported(x, w))
    if apart := _varying(w.words) - _varying(x):  # in a shard_map that splits w and not x: x's gradient is summed there
        x = jax.lax.pcast(x, tuple(apart), to="varying")
    return _matmul(choice, x, w)


def unsupported(x, w: PackedInt4) -> str | None:
    """Why the kernel cannot take this case, on any chip, as the end of a sentence; None if it can."""
    if x.dtype not in mosaic_gpu.MAGIC:
        return f"x is {x.dtype} and the kernel takes bfloat16 or float16"
    if x.size == 0 or w.words.size == 0:
        return "there is nothing to multiply"
    return None


def _varying(x) -> frozenset:
    """The mesh axes of the surrounding shard_map over which x differs."""
    kind = getattr(jax.typeof(x), "mat", None)  # jax 0.11 has `vma` in its place
    return jax.typeof(x).vma if kind is None else kind.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(choice, x, w):
    if choice == "xla":
        return reference.w4a16_matmul(x, w)
    return _kernel(w.group, w.padding, choice == "interpret")(x, w.words, w.scale, w.zero)


def _forward(choice, x, w):
    return _matmul(choice, x, w), w


def _backward(choice, w, dy):
    del choice
    return reference.transposed(dy, w), None


_matmul.defvjp(_forward, _backward)


def _kernel(group, padding, interpret):
    """The kernel with its rule for vmap: a batch of x is more tokens, a batch of weights is a loop."""

    @custom_vmap
    def run(x, words, scale, zero):
        w = PackedInt4(words, scale, zero, group, padding)
        tokens = x.reshape(-1, x.shape[-1])  # [M, D]
        y = mosaic_gpu.w4a16_matmul(
            tokens,
            w,
            config=mosaic_gpu.config_for(tokens.shape[0], *w.shape, group),
            stage_weights="smem" if interpret else "registers",
            interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
        )
        return state_flops(y.reshape(*x.shape[:-1], y.shape[-1]), 2 * y.size * x.shape[-1])

    @run.def_vmap
    def _(size, batched, x, *weight):
        if not any(batched[1:]):
            return run(x, *weight), True

        def one(i):
            operands = zip((x, *weight), batched, strict=True)
            return run(*(jax.lax.dynamic_index_in_dim(a, i, 0, False) if b else a for a, b in operands))

        return jax.lax.map(one, jnp.arange(size)), True

    return run
