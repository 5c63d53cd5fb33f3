"""Learning rates against the original's, AdamW against NumPy, and what weight decay leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lumen.generation.lpd import LPD, LPDConfig
from lumen.training.optim import OptimizerConfig, decayed, learning_rate, make_optimizer

SCHEDULES = {"constant": "constant", "cosine": "cosine", "constant+cosine": "cosine"}


@pytest.mark.parametrize("case", range(3))
def test_learning_rate_of_the_original(golden, case):
    """Steps stand for epochs here: both are whatever the schedule's lengths are given in."""
    misc = golden("lpd/misc")
    given = misc.meta["lr"][case]
    config = OptimizerConfig(
        learning_rate=given["lr"],
        schedule=SCHEDULES[given["schedule"]],
        warmup_steps=given["warmup_epochs"],
        decay_start=given["lr_decay_start_epoch"],
        final_learning_rate=given["min_lr"],
    )
    with jax.enable_x64(True):
        rates = learning_rate(config, misc[f"in/lr/{case}/epoch"], given["epochs"])
    # The same float64 formula; cos and its argument round a few times (2**-52 each).
    np.testing.assert_allclose(rates, misc[f"out/lr/{case}/lr"], rtol=1e-12)


def test_learning_rate_by_hand():
    config = OptimizerConfig(learning_rate=8.0, warmup_steps=4, decay_start=6, final_learning_rate=2.0)
    steps = jnp.arange(13)
    want = [0, 2, 4, 6, 8, 8, 8, 5 + 3 * 3**0.5 / 2, 6.5, 5, 3.5, 5 - 3 * 3**0.5 / 2, 2]
    np.testing.assert_allclose(learning_rate(config, steps, 12), want, rtol=1e-6)
    constant = OptimizerConfig(learning_rate=8.0, schedule="constant", warmup_steps=2)
    np.testing.assert_allclose(learning_rate(constant, steps, 12), [0, 4, *[8] * 11])
    # Behind the end the rate stays where the cosine ended.
    assert learning_rate(config, 100, 12) == 2.0


ONE_CYCLE = OptimizerConfig(
    learning_rate=0.1,
    schedule="one_cycle",
    warmup_steps=4,
    initial_learning_rate=0.01,
    final_learning_rate=1e-6,
    beta1=0.95,
    beta1_at_peak=0.85,
    epsilon=1e-3,
)


def test_one_cycle_is_that_of_optax():
    want = optax.cosine_onecycle_schedule(10, 0.1, pct_start=0.4, div_factor=10, final_div_factor=1e4)
    steps = jnp.arange(12)
    # float32 numbers up to 0.1, a few roundings (2**-24) each.
    np.testing.assert_allclose(learning_rate(ONE_CYCLE, steps, 10), jax.vmap(want)(steps), atol=1e-7)
    assert learning_rate(ONE_CYCLE, 2, 10) == pytest.approx(0.055)  # halfway up


def test_beta1_goes_down_and_up_with_one_cycle():
    total, rng = 10, np.random.default_rng(1)
    params = {"kernel": rng.normal(size=(4, 3))}
    gradients = [{"kernel": rng.normal(size=(4, 3))} for _ in range(total)]
    rates = [float(learning_rate(ONE_CYCLE, step, total)) for step in range(total)]
    shares = [step / 4 if step < 4 else 1 - (step - 4) / 6 for step in range(total)]
    betas = [0.95 - 0.1 * (1 - np.cos(np.pi * share)) / 2 for share in shares]
    assert betas[0] == 0.95
    assert betas[4] == pytest.approx(0.85)
    want = adam(params, gradients, ONE_CYCLE, rates=rates, betas=betas)
    optimizer = make_optimizer(ONE_CYCLE, total)
    got: Any = {"kernel": jnp.asarray(params["kernel"], jnp.float32)}
    state = optimizer.init(got)
    for step in gradients:
        updates, state = optimizer.update({"kernel": jnp.asarray(step["kernel"], jnp.float32)}, state, got)
        got = optax.apply_updates(got, updates)
    # Ten float32 updates of size 0.1; 1 - beta1 of 0.05 loses a digit.
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-5, atol=3e-6)
    constant = adam(params, gradients, ONE_CYCLE, rates=rates)
    assert abs(constant["kernel"] - want["kernel"]).max() > 1e-3


def adam(params, gradients, config, *, rates, betas=None):
    """Adam by its paper's algorithm 1 in float64; decoupled decay as in "Decoupled Weight Decay Regularization".

    `betas`: beta1 of each step; None for the config's.
    """
    betas = [config.beta1] * len(rates) if betas is None else betas
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t, (step_gradients, rate, beta1) in enumerate(zip(gradients, rates, betas, strict=True), start=1):
        step_gradients = {name: np.asarray(value, np.float64) for name, value in step_gradients.items()}
        norm = np.sqrt(sum((value**2).sum() for value in step_gradients.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, value in params.items():
            decay = config.weight_decay if name == "kernel" else 0.0
            g = scale * step_gradients[name] + (decay * value if config.name == "adam" else 0.0)
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
            m, v = first[name] / (1 - beta1**t), second[name] / (1 - config.beta2**t)
            update = m / (np.sqrt(v) + config.epsilon)
            if config.name == "adamw":
                update = update + decay * value
            params[name] = value - rate * update
    return params


@pytest.mark.parametrize("name", ["adamw", "adam"])
@pytest.mark.parametrize("clip_norm", [0.0, 3.0])
def test_updates_against_numpy(name, clip_norm):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, warmup_steps=3, weight_decay=0.3, clip_norm=clip_norm, epsilon=1e-3
    )
    total, rng = 12, np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3), "scale": rng.normal(size=3)}
    gradients = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(total)]
    norms = [np.sqrt(sum((g**2).sum() for g in step.values())) for step in gradients]
    assert min(norms) < 3.0 < max(norms)  # some are clipped, some are not
    # The first update is made at the rate of step 0, as the original's first iteration is.
    rates = [float(learning_rate(config, step, total)) for step in range(total)]
    assert rates[0] == 0.0
    want = adam(params, gradients, config, rates=rates)

    optimizer = make_optimizer(config, total)
    got = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(got)
    for step in gradients:
        updates, state = optimizer.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), step), state, got)
        got = optax.apply_updates(got, updates)
    for key, value in want.items():
        # Twelve float32 updates of size 0.1, a few roundings (2**-24) in each.
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_decay_leaves_biases_and_norms_alone():
    """On stacked layers a bias has two axes and more, so the number of axes says nothing: names do."""
    params = nnx.state(nnx.eval_shape(lambda: LPD(LPDConfig.debug(), rngs=nnx.Rngs(0))), nnx.Param)
    spared, decays = set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        (decays if decayed(path, leaf) else spared).add(name)
    assert spared == {
        "blocks.down.bias",
        "blocks.norm1.bias",
        "blocks.norm1.scale",
        "blocks.norm2.bias",
        "blocks.norm2.scale",
        "blocks.projection_bias",
        "blocks.qkv_bias",
        "blocks.up.bias",
        "input_norm.bias",
        "input_norm.scale",
        "norm.bias",
        "norm.scale",
    }
    # The original decays whatever has two axes there: tables and the two learned vectors of [1, 1, D] too.
    assert decays == {
        "blocks.down.kernel",
        "blocks.projection",
        "blocks.qkv",
        "blocks.up.kernel",
        "class_embedding",
        "head.kernel",
        "mask_token",
        "null_class",
        "position_embedding",
        "token_embedding",
    }


def test_decay_acts_on_what_it_should():
    """With zero gradients AdamW multiplies what decays by 1 - rate * decay, and leaves the rest."""
    params = nnx.state(LPD(LPDConfig.debug(), rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.5), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        value = dict(jax.tree_util.tree_leaves_with_path(params))[path]
        np.testing.assert_allclose(update, -0.25 * value if decayed(path, value) else 0 * value, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate=0\.0; wanted a positive number"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan; wanted a positive number"),
        ({"learning_rate": float("inf")}, r"learning_rate=inf; wanted a positive number"),
        ({"warmup_steps": -1}, "warmup_steps=-1; wanted at least 0"),
        ({"clip_norm": -1.0}, r"clip_norm=-1\.0; wanted at least 0"),
        ({"beta1_at_peak": -0.5}, r"beta1_at_peak=-0\.5; wanted at least 0 and less than 1"),
        (
            {"beta1_at_peak": 0.5},
            r"beta1_at_peak=0\.5 with name='adamw' and schedule='cosine'; wanted 'adamw' or 'adam'",
        ),
        ({"initial_learning_rate": 1e-5}, r"initial_learning_rate=1e-05 with schedule='cosine', which begins at 0"),
        ({"beta2": 1.0}, r"beta2=1\.0; wanted at least 0 and less than 1"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)
