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


class BatchNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias, with statistics over all axes but the last.

    In training they are the batch's (the biased variance), and the running ones move by `momentum` to them (to
    the unbiased variance), as in torch. They change in place: a training step merges a model, runs it, and keeps its
    `Statistic` variables. Statistics are float32 whatever x is. Where x is sharded by XLA they are global.

    Attributes:
      scale, bias: [C].
      mean, var: [C], running.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-5, momentum: float = 0.1):
        self.epsilon, self.momentum = epsilon, momentum
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = Statistic(jnp.zeros(features)), Statistic(jnp.ones(features))

    def __call__(self, x, *, train: bool):
        """[..., C] -> [..., C] in x's dtype.

        Raises:
          ValueError: for another number of channels.
        """
        return self.normalise(x, None, train=train)

    def normalise(self, x, used, *, train: bool):
        """`__call__` for x of which only the places `used`, bool [...], count; the others may hold anything, and are
        zero in the result. None: all count.
        """
        channels = self.scale.shape[0]
        if x.shape[-1] != channels:
            raise ValueError(
                f"BatchNorm: x is {list(x.shape)}; wanted {channels} channels on the last axis. Make the norm for "
                f"{x.shape[-1]} channels, or hand it the output of the layer before it."
            )
        keep = (lambda x: x) if used is None else (lambda x: jnp.where(used[..., None], x, 0))
        wide = keep(x).astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if train:
            axes = tuple(range(x.ndim - 1))
            count = jnp.float32(x[..., 0].size) if used is None else used.sum().astype(jnp.float32)
            mean = wide.sum(axes) / jnp.maximum(count, 1)
            var = keep(jnp.square(wide - mean)).sum(axes) / jnp.maximum(count, 1)
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            self.mean[...] += self.momentum * (jax.lax.stop_gradient(mean) - self.mean[...])
            self.var[...] += self.momentum * (jax.lax.stop_gradient(unbiased) - self.var[...])
        factor = jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
        shift = self.bias[...] - mean * factor
        return keep((wide * factor + shift).astype(x.dtype))


def freeze[Module: nnx.Module](module: Module) -> Module:
    """A copy of a module in which every parameter is `Frozen`."""
    module = nnx.clone(module)
    for _, node in nnx.iter_modules(module):
        for name, value in vars(node).items():
            if isinstance(value, nnx.Param):
                metadata = {"axes": value.get_metadata()["axes"]} if "axes" in value.get_metadata() else {}
                setattr(node, name, Frozen(value.get_value(), **metadata))
    return module
