"""Layers shared by several models."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def dropout(x, rate: float, key):
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); no-op if `key` is None.

    The key is explicit because `nnx.Dropout` under split and merge repeats the same mask at every call.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def run_layers(layer, carry, layers):
    """Applies `layer(carry, module, index) -> carry` over L layers, in order.

    Args:
      layer: the function of one layer; `index` counts from 0.
      carry: what flows from layer to layer, any pytree.
      layers: one module whose arrays are stacked along a leading layer axis: a `lax.scan`, so one layer is compiled
        whatever the depth. Or a sequence of modules (see `unstack`): a Python loop.
    """
    if isinstance(layers, Sequence | nnx.List):
        for index, module in enumerate(layers):
            carry = layer(carry, module, index)
        return carry
    depth = jax.tree.leaves(layers)[0].shape[0]
    step = lambda carry, xs: (layer(carry, *xs), None)  # noqa: E731
    return jax.lax.scan(step, carry, (layers, jnp.arange(depth)))[0]


def unstack[Module: nnx.Module](model: Module, name: str = "blocks") -> Module:
    """A copy of the model with the stacked layers `model.<name>` as a list of single layers.

    For programs that read each weight about once per pass: a scan copies every layer's weights out of the stack first,
    which doubles or triples the memory traffic.
    """
    copy = nnx.clone(model)
    layers = getattr(model, name)
    depth = jax.tree.leaves(layers)[0].shape[0]
    setattr(copy, name, nnx.List([jax.tree.map(lambda array, i=i: array[i], layers) for i in range(depth)]))
    return copy


class Frozen(nnx.Variable):
    """A weight that does not train: not an nnx.Param, so `nnx.split(model, nnx.Param, ...)` leaves it aside."""


class Statistic(nnx.Variable):
    """A running statistic, kept in float32: a layer in training sets it, and a training step keeps what was set."""


def freeze[Module: nnx.Module](module: Module) -> Module:
    """A copy of a module in which every parameter is `Frozen`."""
    module = nnx.clone(module)
    for _, node in nnx.iter_modules(module):
        for name, value in vars(node).items():
            if isinstance(value, nnx.Param):
                metadata = {"axes": value.get_metadata()["axes"]} if "axes" in value.get_metadata() else {}
                setattr(node, name, Frozen(value.get_value(), **metadata))
    return module
