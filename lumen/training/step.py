"""The training step: split once, differentiate what trains, update, donate what is replaced."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lumen.layers import Statistic
from lumen.sharding import batch_sharding, tree_shardings


class TrainState(NamedTuple):
    """All that a checkpoint holds of a run's arrays.

    Attributes:
      step: int32, updates made so far.
      params: float32 state of what trains.
      frozen: state of what does not.
      opt_state: of the optimiser.
      average: exponential moving average of params, or None.
    """

    step: Any
    params: Any
    frozen: Any
    opt_state: Any
    average: Any


# loss(model, batch, key, step) -> (scalar to minimise, {name: scalar}); step counts the updates made so far.
Loss = Callable[[Any, Any, Any, Any], tuple[Any, dict[str, Any]]]
# adjust(model, batch, key, step) -> model
Adjust = Callable[[Any, Any, Any, Any], Any]


def cast_floats(tree, dtype):
    """Casts the float32 leaves of a tree; what was loaded in 16 bits, scales of packed weights above all, stays."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, tree)


def initial_state(build: Callable[[nnx.Rngs], nnx.Module], optimizer, key, *, average: bool) -> TrainState:
    """A fresh state; pure, so that it can be traced for its shapes and jitted with shardings."""
    _, params, frozen = nnx.split(build(nnx.Rngs(key)), nnx.Param, ...)
    # Types that are firm: a weak one changes with the first update, and the step would compile a second time.
    params, frozen = jax.tree.map(lambda x: x.astype(x.dtype), (params, frozen))
    copy = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params), copy)


def join_metrics(metrics):
    """Metrics of parts of a batch, stacked along a leading axis, as those of the batch: the largest of what is named
    "most_...", the mean of the rest."""
    return {name: each.max(0) if name.startswith("most_") else each.mean(0) for name, each in metrics.items()}


def make_train_step(
    graphdef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype=jnp.float32,
    accumulate: int = 1,
    average_decay: float = 0.0,
    adjust: Adjust | None = None,
):
    """Builds step(state, batch, key) -> (state, metrics), to be jitted with the state donated.

    Args:
      graphdef: the model's static part, from `nnx.split`.
      loss: mean over the batch it is given. Where it runs the model in training, what that sets of the model's
        `Statistic` variables (running statistics of norms) is kept; with `accumulate`, part after part.
      optimizer: an optax transformation.
      compute_dtype: parameters are cast to it before the forward pass; the update stays in float32.
      accumulate: the batch is run in so many equal parts, one after the other; gradients are averaged, metrics joined
        (`join_metrics`).
      average_decay: decay of the parameters' moving average, when the state has one.
      adjust: a change to the model after the update that is no gradient step, such as reviving dead codes.

    The metrics are the loss's own, "loss" and "gradient_norm" (before clipping) of the parameters that came, and
    "parameter_norm" of those that go.
    """

    def gradients(params, frozen, batch, key, number):
        statistics, constants = nnx.split_state(frozen, Statistic, ...)

        def loss_fn(params):
            others = (statistics, cast_floats(constants, compute_dtype))
            # A copy: variables made in this trace, which the model may set.
            model = nnx.merge(graphdef, cast_floats(params, compute_dtype), *others, copy=True)
            value, metrics = loss(model, batch, key, number)
            return value, ({"loss": value, **metrics}, nnx.state(model, Statistic))

        (_, (metrics, moved)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, metrics, nnx.merge_state(moved, constants)

    def step(state: TrainState, batch, key):
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            grads, metrics, frozen = gradients(state.params, state.frozen, batch, key, state.step)
        else:
            # Every accumulate-th row: each part then lies over all devices, as the batch does.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            first = jax.tree.map(lambda x: x[0], parts)
            shapes, _, _ = jax.eval_shape(gradients, state.params, state.frozen, first, key, state.step)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def add(carry, part_and_key):
                total, frozen = carry
                part, part_key = part_and_key
                new, metrics, frozen = gradients(state.params, frozen, part, part_key, state.step)
                return (jax.tree.map(lambda a, b: a + b / accumulate, total, new), frozen), metrics

            start, keys = (zeros, state.frozen), jax.random.split(key, accumulate)
            (grads, frozen), metrics = jax.lax.scan(add, start, (parts, keys))
            metrics = join_metrics(metrics)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if adjust is not None:
            model = adjust(nnx.merge(graphdef, params, frozen), batch, jax.random.fold_in(key, 1), state.step)
            _, params, frozen = nnx.split(model, nnx.Param, ...)
        metrics["parameter_norm"] = optax.tree.norm(params)
        average = state.average
        if average is not None:
            average = jax.tree.map(lambda a, p: average_decay * a + (1 - average_decay) * p, average, params)
        return TrainState(state.step + 1, params, frozen, opt_state, average), metrics

    return step


def jit_step(step, abstract_state, mesh):
    """The step jitted for a mesh: state laid out by the parameters' axis names, batch over data and fsdp."""
    layout = tree_shardings(abstract_state, mesh)
    return jax.jit(
        step,
        in_shardings=(layout, batch_sharding(mesh), None),
        out_shardings=(layout, None),
        donate_argnums=0,
    )
