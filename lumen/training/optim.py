"""Optimisers and learning-rate schedules."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser with a warm-up and a decay of its learning rate.

    Attributes:
      name: "adamw" (decoupled decay), "adam" with the decay added to the gradient, or "sgd", likewise, with Nesterov's
        momentum beta1.
      learning_rate: the peak.
      schedule: after the warm-up, "constant", or "cosine" from `decay_start` to the end; or "trapezoid", which goes
        down at the end as it went up, and never below `final_learning_rate`; or "one_cycle", a cosine up from
        `initial_learning_rate` and one down.
      warmup_steps: linear from 0; of one_cycle, steps to the peak.
      decay_start: step from which a cosine decays; the rate is constant between the warm-up and it.
      initial_learning_rate: where one_cycle begins.
      final_learning_rate: where the cosine ends, at the last step.
      beta1, beta2, epsilon, weight_decay: of AdamW. Biases and norm scales are not decayed.
      beta1_at_peak: of one_cycle, what beta1 goes to as the learning rate goes to its peak, and back; None if it stays.
      clip_norm: global gradient norm above which gradients are scaled down; 0 is off.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "trapezoid", "one_cycle"] = "cosine"
    warmup_steps: int = 0
    decay_start: int = 0
    initial_learning_rate: float = 0.0
    final_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    beta1_at_peak: float | None = None

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}; wanted a positive number.")
        rates = ("initial_learning_rate", "final_learning_rate")
        for name in ("warmup_steps", "decay_start", *rates, "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; wanted at least 0.")
        for name in ("beta1", "beta2", "beta1_at_peak"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value}; wanted at least 0 and less than 1.")
        one_cycle = self.schedule == "one_cycle"
        if self.initial_learning_rate and not one_cycle:
            raise ValueError(
                f"initial_learning_rate={self.initial_learning_rate} with schedule={self.schedule!r}, which begins at "
                "0; wanted schedule='one_cycle', or none."
            )
        if self.beta1_at_peak is not None and (not one_cycle or self.name == "sgd"):
            raise ValueError(
                f"beta1_at_peak={self.beta1_at_peak} with name={self.name!r} and schedule={self.schedule!r}; wanted "
                "'adamw' or 'adam' and 'one_cycle', or none."
            )


def _cycle(begin, peak, end, step, turn: int, total_steps: int):
    """From `begin` to `peak` at step `turn`, and on to `end` at the last step, each time half a period of a cosine."""

    def part(start, stop, share):
        return stop + (start - stop) * (1 + jnp.cos(math.pi * jnp.clip(share, 0, 1))) / 2

    up = part(begin, peak, step / max(turn, 1))
    return jnp.where(step < turn, up, part(peak, end, (step - turn) / max(total_steps - turn, 1)))


def learning_rate(config: OptimizerConfig, step, total_steps: int):
    """The learning rate at a step, which may be fractional or traced.

    Warm-up: peak * step / warmup_steps. Then the peak. From s = max(decay_start, warmup_steps), with the cosine:
    final + (peak - final) * (1 + cos(pi (step - s) / (total_steps - s))) / 2.

    Trapezoid, of N steps: peak * min(1, (step + 1) / warmup_steps, (N - step) / warmup_steps), at least `final`.

    One cycle, with w warm-up steps: peak + (initial - peak) * (1 + cos(pi step / w)) / 2, and from step w on
    final + (peak - final) * (1 + cos(pi (step - w) / (N - w))) / 2.

    Source: mit-han-lab/lpd util/lr_sched.py ("constant", "cosine", "constant+cosine"), there in epochs;
      mit-han-lab/duo-attention duo_attn/train.py (the trapezoid);
      open-mmlab/OpenPCDet tools/train_utils/optimization/learning_schedules_fastai.py (one cycle).
    """
    step = jnp.asarray(step)
    peak, final = config.learning_rate, config.final_learning_rate
    if config.schedule == "trapezoid":
        ramp = jnp.minimum(step + 1, total_steps - step) / max(config.warmup_steps, 1)
        return jnp.clip(peak * ramp, final, peak)
    if config.schedule == "one_cycle":
        return _cycle(config.initial_learning_rate, peak, final, step, config.warmup_steps, total_steps)
    start = max(config.decay_start, config.warmup_steps)
    rate = jnp.full_like(step, peak, dtype=jnp.result_type(float))
    if config.schedule == "cosine":
        progress = jnp.clip((step - start) / max(total_steps - start, 1), 0.0, 1.0)
        rate = jnp.where(step < start, peak, final + (peak - final) * 0.5 * (1.0 + jnp.cos(math.pi * progress)))
    return jnp.where(step < config.warmup_steps, peak * step / max(config.warmup_steps, 1), rate)


def decayed(path, _) -> bool:
    """Whether weight decay acts on the parameter at a tree path: on all but biases and norm scales."""
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return not name.endswith(("bias", "scale"))


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimiser of a config: clip, Adam or momentum, decay, minus the learning rate."""

    def rate(step):
        # optax counts updates from 0; the first update is made at the rate of step 0 of the original's schedule.
        return learning_rate(config, step, total_steps)

    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda p: jax.tree.map_with_path(decayed, p))

    def beta1(step):
        return _cycle(config.beta1, config.beta1_at_peak, config.beta1, step, config.warmup_steps, total_steps)

    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    if config.beta1_at_peak is not None:
        scheduled = optax.inject_hyperparams(optax.scale_by_adam, static_args=("b2", "eps", "eps_root"))
        adam = scheduled(b1=beta1, b2=config.beta2, eps=config.epsilon)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    momentum = optax.trace(config.beta1, nesterov=True)
    order = {"adamw": (adam, decay), "adam": (decay, adam), "sgd": (decay, momentum)}[config.name]
    return optax.chain(clip, *order, optax.scale_by_learning_rate(rate))
