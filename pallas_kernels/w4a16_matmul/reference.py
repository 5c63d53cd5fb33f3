"""The product in plain JAX, on every chip, without ever holding the whole dequantised weight.

A loop dequantises about a million weights at a time, [F / n, D], and multiplies. Block i holds the output channels
i, i + n, i + 2 n, ...: the loop then runs over an axis that XLA need not shard, so a weight whose F is split over
devices stays where it is.

`python -m pallas_kernels.w4a16_matmul.bench` on two CPU cores that other work was using too, jax 0.12.0.1, 4096 x 4096,
group 128, programs timed in turn, milliseconds (median of 15). "Dequantise all" is `x @ dequantize(w)` in one program;
"dense" a weight that was never quantised:

    x and scale     M     this    dequantise all    dense
    float32         1       20               107      2.4
    float32        16       18                60       12
    float32       512      128               196      145
    bfloat16        1       20               106       55
    bfloat16       16       17                79      6.0
    bfloat16      512       83               270       77
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels.w4a16_matmul.packed_int4 import PackedInt4, output_major

BLOCK = 2**20  # weights


def w4a16_matmul(x, w: PackedInt4):
    """x @ dequantize(w), [..., D] x [D, F] -> [..., F] in x's dtype; accumulates in float32."""
    d, f = w.shape
    if x.size == d and w.scale.dtype == jnp.bfloat16:
        # One token is no matrix product to the CPU's compiler, which then rounds to bfloat16 in slow scalar code.
        return w4a16_matmul(jnp.pad(x.reshape(1, d), ((0, 1), (0, 0))), w)[0].reshape(*x.shape[:-1], f)
    n, block = _blocks(w)

    def one(i):
        weight = output_major(block(i)).astype(x.dtype)  # [F / n, D]
        return jnp.einsum("...d,fd->...f", x, weight, preferred_element_type=jnp.float32).astype(x.dtype)

    y = jnp.moveaxis(lax.map(one, jnp.arange(n)), 0, -1)  # [..., F / n, n]
    return y.reshape(*x.shape[:-1], y.shape[-2] * n)[..., :f]


def transposed(dy, w: PackedInt4):
    """dy @ dequantize(w).T, [..., F] x [F, D] -> [..., D] in dy's dtype: the gradient with respect to x."""
    f = w.shape[1]
    n, block = _blocks(w)
    dy = jnp.pad(dy, [(0, 0)] * (dy.ndim - 1) + [(0, -f % n)])
    dy = dy.reshape(*dy.shape[:-1], dy.shape[-1] // n, n)  # [..., F / n, n]

    def part(i):
        weight = output_major(block(i)).astype(dy.dtype)  # [F / n, D]
        rows = lax.dynamic_index_in_dim(dy, i, dy.ndim - 1, keepdims=False)
        return jnp.einsum("...f,fd->...d", rows, weight, preferred_element_type=jnp.float32)

    return lax.fori_loop(1, n, lambda i, dx: dx + part(i), part(0)).astype(dy.dtype)


def _blocks(w: PackedInt4):
    """n, and the function that cuts out block i; F is padded with zeros to a multiple of n."""
    d, f = w.shape
    wanted = max(1, d * f // BLOCK)
    n = next((n for n in range(wanted, 2 * wanted) if f % n == 0), min(wanted, f))
    pad = (0, -f % n)
    words = jnp.pad(w.words, (pad, (0, 0))).reshape(-1, n, w.words.shape[1])  # [F / n, n, D / 4]
    scale, zero = (
        jnp.pad(side, ((0, 0), pad)).reshape(side.shape[0], -1, n) for side in (w.scale, w.zero)
    )  # [D / G, F / n, n]

    def block(i):
        return dataclasses.replace(
            w,
            words=lax.dynamic_index_in_dim(words, i, 1, keepdims=False),
            scale=lax.dynamic_index_in_dim(scale, i, 2, keepdims=False),
            zero=lax.dynamic_index_in_dim(zero, i, 2, keepdims=False),
        )

    return n, block
