"""Products on the tensor cores of a Hopper GPU, in a form that the interpreter can run too."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def multiply(total, a, b, simulate: bool) -> Any:
    """total + a @ b in float32 on the tensor cores, finished; a is an array or a ref, b a ref, total None for zero.

    simulate: for the interpreter, plain loads and a product. The fence after the loads stands for wgmma reading through
    the asynchronous proxy, like the TMA that will overwrite its operands.
    """
    if simulate:
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        plgpu.commit_smem()
        product = jnp.dot(a, b, preferred_element_type=jnp.float32)
        return product if total is None else total + product
    if total is not None:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.WGMMAAccumulatorRef.init(total))

    def fresh(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(fresh, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))
