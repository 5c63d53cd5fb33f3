"""The training step: its arithmetic on a model of a few numbers, and LPD on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lumen.generation.lpd import LPD, LPDConfig, lpd_loss
from lumen.generation.lpd.schedule import group_of_rank
from lumen.io.checkpoint import flatten
from lumen.layers import Frozen, Statistic
from lumen.plan import count_collectives
from lumen.sharding import batch_sharding
from lumen.training import loop
from lumen.training.optim import OptimizerConfig
from lumen.training.step import cast_floats, initial_state, make_train_step


class Line(nnx.Module):
    """w * x + b, with b frozen, and a frozen whole number."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.full(2, 3.0))
        self.b = Frozen(jnp.full(2, 1.0 + 2**-20))
        self.count = Frozen(jnp.arange(3))

    def __call__(self, x):
        return self.w[...] * x + self.b[...]


def line_step(loss, optimizer, *, average=False, **options):
    """A step of Line and its first state."""
    graphdef, _, _ = nnx.split(Line(nnx.Rngs(0)), nnx.Param, ...)
    state = initial_state(Line, optimizer, jax.random.key(0), average=average)
    return jax.jit(make_train_step(graphdef, loss, optimizer, **options)), state


def squares(model, x, key, step):
    return jnp.mean(jnp.sum(model(x) ** 2, axis=1)) / 2, {"seen": step}


def values(tree):
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def test_one_step_by_hand():
    """loss = mean over two samples of |w x + b|^2 / 2; gradient descent at rate 0.1."""
    step, state = line_step(squares, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))
    x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    after, metrics = step(state, x, jax.random.key(0))
    # Rows w x + b: (4, 1) and (4, 7); gradient mean_i (w x_i + b) x_i = (4, 7), norm sqrt(65), clipped to norm 1.
    assert metrics["loss"] == pytest.approx((16 + 1 + 16 + 49) / 4, rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(65**0.5, rel=1e-5)
    w = 3 - 0.1 * np.array([4, 7]) / 65**0.5
    np.testing.assert_allclose(values(after.params)["w"], w, rtol=1e-6)
    assert metrics["parameter_norm"] == pytest.approx(np.linalg.norm(w), rel=1e-6)
    assert int(metrics["seen"]) == 0
    assert int(after.step) == 1
    assert int(step(after, x, jax.random.key(0))[1]["seen"]) == 1


def test_initial_arrays_have_firm_types():
    """`jnp.full(2, 1.0)` has a weak type, which an update makes firm: the second step would be another program."""

    class Weak(nnx.Module):
        def __init__(self):
            self.weight, self.rest = nnx.Param(jnp.full(2, 1.0)), Statistic(jnp.full(2, 1.0))

    assert nnx.state(Weak())["weight"].weak_type
    state = initial_state(lambda rngs: Weak(), optax.sgd(0.1), jax.random.key(0), average=True)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_frozen_variables_stay_as_they_are():
    step, state = line_step(squares, optax.adam(0.1), compute_dtype=jnp.bfloat16, average=True, average_decay=0.5)
    after, _ = step(state, jnp.ones((4, 2)), jax.random.key(0))
    for name, before in values(state.frozen).items():
        np.testing.assert_array_equal(values(after.frozen)[name], before)  # b has bits that bfloat16 would lose
    assert not np.array_equal(values(after.params)["w"], values(state.params)["w"])
    assert set(values(after.params)) == set(values(after.average)) == {"w"}


def test_moving_average():
    """average <- decay * average + (1 - decay) * parameters, from the initial parameters on."""
    step, state = line_step(squares, optax.sgd(0.1), average=True, average_decay=0.75)
    want = values(state.params)["w"]
    np.testing.assert_array_equal(values(state.average)["w"], want)
    for i in range(3):
        state, _ = step(state, jnp.full((4, 2), 1.0 + i), jax.random.key(0))
        want = 0.75 * want + 0.25 * values(state.params)["w"]
        np.testing.assert_allclose(values(state.average)["w"], want, rtol=1e-6)
    assert line_step(squares, optax.sgd(0.1))[1].average is None


def test_bfloat16_computes_and_float32_remembers():
    """Updates far below bfloat16's resolution (2**-8 of 3) still add up, as parameters stay float32."""
    seen = []

    def loss(model, x, key, step):
        seen.append((model.w[...].dtype, model.b[...].dtype, model.count[...].dtype))
        return jnp.sum(model.w[...].astype(jnp.float32)), {}

    step, state = line_step(loss, optax.adam(1e-4), compute_dtype=jnp.bfloat16)
    for _ in range(10):
        state, metrics = step(state, jnp.ones((4, 2)), jax.random.key(0))
    assert set(seen) == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32))}
    assert metrics["loss"] == 6.0  # what bfloat16 makes of 2 * (3 - 0.001)
    # The gradient is 1 throughout, so each of Adam's updates is 1e-4.
    np.testing.assert_allclose(values(state.params)["w"], 3 - 1e-3, rtol=1e-6)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}


def test_cast_floats_leaves_the_rest():
    tree = {"x": jnp.ones(2), "n": jnp.arange(2), "flag": jnp.array(True), "key": jax.random.key(0)}
    cast = cast_floats(tree, jnp.bfloat16)
    assert cast["x"].dtype == jnp.bfloat16
    assert all(cast[name].dtype == tree[name].dtype for name in ("n", "flag", "key"))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_random_draws_differ_by_step_and_part(accumulate):
    """One key for the run: every step, and every part of a batch, draws its own numbers from it, the same each time."""

    def loss(model, x, key, step):
        draw = jax.random.uniform(key)
        return jnp.sum(model.w[...]) * 0, {"draw": draw, "square": draw**2}

    step, state = line_step(loss, optax.sgd(0.1), accumulate=accumulate)
    draws = []
    for _ in range(3):
        draws.append(step(state, jnp.ones((4, 2)), jax.random.key(7))[1])
        again = step(state, jnp.ones((4, 2)), jax.random.key(7))
        assert float(again[1]["draw"]) == float(draws[-1]["draw"])
        state = again[0]
    assert len({float(draw["draw"]) for draw in draws}) == 3
    variance = float(draws[0]["square"] - draws[0]["draw"] ** 2)
    assert variance > 1e-3 if accumulate > 1 else abs(variance) < 1e-6


def test_metrics_of_parts_are_averaged_but_for_the_most():
    def loss(model, x, key, step):
        return jnp.sum(model.w[...]) * 0, {"largest": x.max(), "most_rows": x.max()}

    step, state = line_step(loss, optax.sgd(0.1), accumulate=2)
    _, metrics = step(state, jnp.arange(8.0).reshape(4, 2), jax.random.key(0))  # parts: rows 0 and 2, rows 1 and 3
    assert (metrics["largest"], metrics["most_rows"]) == (6, 7)


# LPD, with orders and groups from the batch, so that nothing is drawn.


def lpd_run(mesh, **changes):
    """LPD of debug size on some of the eight devices."""
    model_config = LPDConfig.debug()
    groups = jnp.asarray(group_of_rank((1, 2, 5, 8)))

    def loss(model, batch, key, step):
        logits = model(batch["codes"], batch["labels"], batch["orders"], groups)
        return lpd_loss(logits, batch["codes"], batch["orders"]), {}

    def absent(*_):
        pytest.fail("not asked for")

    size = 32
    shape = jax.ShapeDtypeStruct((size, model_config.tokens), jnp.int32)
    task = loop.Task(
        build=lambda rngs: LPD(model_config, rngs=rngs),
        loss=loss,
        batch_spec={"codes": shape, "orders": shape, "labels": jax.ShapeDtypeStruct((size,), jnp.int32)},
        batches=absent,
        monitor=absent,
        evaluate=absent,
        inference=absent,
    )
    # Adam divides by the gradient's size: a large epsilon keeps rounding errors of tiny gradients tiny.
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", epsilon=1e-3, weight_decay=0.1)
    config = loop.TrainConfig(
        task="lpd", total_steps=9, batch_size=size, mesh=mesh, optimizer=optimizer, average_decay=0.9, **changes
    )
    count = int(np.prod(list(mesh.values()))) if mesh else 1
    return loop.set_up(config, task, jax.devices()[:count])


def lpd_batch():
    rng = np.random.default_rng(0)
    tokens, codes, classes = LPDConfig.debug().tokens, LPDConfig.debug().vocabulary, LPDConfig.debug().classes
    return {
        "codes": rng.integers(0, codes, (32, tokens), np.int32),
        "orders": np.stack([rng.permutation(tokens) for _ in range(32)]).astype(np.int32),
        "labels": rng.integers(0, classes, 32, np.int32),
    }


def take_steps(run, count=2):
    """The state after some steps, and the metrics of each."""
    with jax.set_mesh(run.mesh):
        state, key, records = run.initial_state(), jax.random.key(0), []
        batch = jax.device_put(lpd_batch(), batch_sharding(run.mesh))
        for _ in range(count):
            state, metrics = run.step(state, batch, key)
            records.append({name: float(value) for name, value in metrics.items()})
    return state, records


@pytest.fixture(scope="module")
def alone():
    return take_steps(lpd_run({}))


def assert_close(state, records, alone):
    """Equal to float32 rounding to the step that one device makes of the whole batch."""
    want_state, want_records = alone
    for got, want in zip(records, want_records, strict=True):
        # Sums of some thousand terms in another order: a few dozen roundings of 2**-24.
        assert got == pytest.approx(want, rel=1e-5)
    got, want = values(state.params), values(want_state.params)
    assert got.keys() == want.keys()
    for name in want:
        # Gradients are below 1 and rounded to some 1e-7; two updates of rate * g / (|g| + epsilon) change by no more
        # than 2 * 1e-2 * 1e-7 / 1e-3 from that. A wrong gradient would change them by 1e-2.
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=5e-6, err_msg=name)
    for name, average in values(want_state.average).items():
        np.testing.assert_allclose(values(state.average)[name], average, rtol=1e-6, atol=5e-6, err_msg=name)


def test_one_device_learns(alone):
    _, records = take_steps(lpd_run({}), count=8)
    assert records[:2] == alone[1]
    assert records[-1]["loss"] < records[0]["loss"] - 0.1


def test_accumulated_parts_equal_the_whole_batch(alone):
    """The mean over four parts of their mean gradients is the mean gradient."""
    assert_close(*take_steps(lpd_run({}, accumulate=4)), alone)


MESHES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.parametrize(("mesh", "accumulate"), [*((mesh, 1) for mesh in MESHES), (MESHES[2], 4)], ids=str)
def test_eight_devices_equal_one(alone, mesh, accumulate):
    assert_close(*take_steps(lpd_run(mesh, accumulate=accumulate)), alone)


# What one device holds of [2, 64, 3, 2, 32], [2, 256, 64], [32, 64] and [64], on each of the meshes.
LAYOUTS = {
    "blocks.qkv": [(), (None, "fsdp"), (None, "fsdp", None, "tensor")],
    "blocks.down.kernel": [(), (None, None, "fsdp"), (None, "tensor", "fsdp")],
    "token_embedding": [(), (None, "fsdp"), ("tensor", "fsdp")],
    "norm.scale": [(), (), ()],
}
PARTS = {
    "blocks.qkv": [(2, 64, 3, 2, 32), (2, 8, 3, 2, 32), (2, 16, 3, 1, 32)],
    "blocks.down.kernel": [(2, 256, 64), (2, 256, 8), (2, 128, 16)],
    "token_embedding": [(32, 64), (32, 8), (16, 16)],
    "norm.scale": [(64,), (64,), (64,)],
}


@pytest.mark.parametrize("case", range(3), ids=map(str, MESHES))
def test_state_is_laid_out_by_axis_names(case):
    """Parameters, their average and both of Adam's moments, from the start; the step keeps the layout."""
    run = lpd_run(MESHES[case])
    state = run.initial_state()
    for name, layouts in LAYOUTS.items():
        for where in ("params", "average", "opt_state.1.mu", "opt_state.1.nu"):
            array = flatten(state._asdict())[f"{where}.{name}"]
            want = jax.NamedSharding(run.mesh, PartitionSpec(*layouts[case]))
            assert array.sharding.is_equivalent_to(want, array.ndim), (where, name)
            assert [shard.data.shape for shard in array.addressable_shards] == [PARTS[name][case]] * 8
    layouts = [jax.tree.map(lambda x: x.sharding, tree) for tree in (state, run.abstract_state)]
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, *layouts))


def test_initial_state_does_not_depend_on_the_mesh():
    """Bit for bit: JAX's random numbers are those of the whole array, wherever its parts are made."""
    one, eight = (values(lpd_run(mesh).initial_state().params) for mesh in ({}, {"fsdp": 4, "tensor": 2}))
    for name in one:
        np.testing.assert_array_equal(one[name], eight[name], err_msg=name)


def test_the_state_that_is_replaced_is_donated():
    """No second copy of parameters and moments is held while the step runs."""
    run = lpd_run({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(run.mesh):
        state = run.initial_state()
        batch = jax.device_put(lpd_batch(), batch_sharding(run.mesh))
        after, _ = run.step(state, batch, jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.average)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_parts_of_a_batch_stay_where_they_are():
    """Cut naively, the first of four parts lies on two of eight devices, and every part is moved to be computed.

    With replicas only, all that has to move is the gradient, once per part: no gathering, no exchange of samples.
    """
    run = lpd_run({"data": 8}, accumulate=4)
    with jax.set_mesh(run.mesh):
        arguments = run.abstract_state, run.abstract_batch(), jax.eval_shape(lambda: jax.random.key(0))
        moved = count_collectives(run.step.lower(*arguments).compile().as_text())
    assert set(moved) == {"all-reduce"}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params))
    assert moved["all-reduce"] == pytest.approx(4 * 4 * parameters, rel=0.01)  # float32, four times
