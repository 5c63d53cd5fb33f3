"""What tests of several kernels use."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret


@pytest.fixture
def in_turn(monkeypatch):
    """in_turn(kernel, axis, x): in a shard_map over `axis`, each device interprets kernel(x), one after the other.

    jax's GPU interpreter simulates all devices with one memory and one set of barriers, as if they were one kernel's;
    kernels that run side by side trip over each other. So each device is told that it is alone, and waits its turn.
    x and what the kernel returns are one floating array each.
    """
    monkeypatch.setattr(jaxpr_interpret.DeviceInfo, "device_id", property(lambda info: jnp.int32(0)))
    monkeypatch.setattr(jaxpr_interpret.DeviceInfo, "num_devices", property(lambda info: 1))

    def run(kernel, axis, x):
        shape = jax.eval_shape(kernel, x)
        out = jnp.full(shape.shape, jnp.nan, shape.dtype)
        for turn in range(jax.lax.axis_size(axis)):
            mine = jax.lax.axis_index(axis) == turn
            out = jax.lax.cond(mine, kernel, lambda x, out=out: out, x)
            # A sum over all devices, which is never negative and which the next turn must wait for.
            waiting = jax.lax.psum(jnp.isnan(out).sum(), axis)
            x = jnp.where(waiting < 0, jnp.nan, x)
        return out

    return run
