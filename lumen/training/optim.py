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
        down at the end as it went up, and never below `final_learning_rate`.
      warmup_steps: linear from 0.
      decay_start: step from which a cosine decays; the rate is constant between the warm-up and it.
      final_learning_rate: where the cosine ends, at the last step.
      beta1, beta2, epsilon, weight_decay: of AdamW. Biases and norm scales are not decayed.
      clip_norm: global gradient norm above which gradients are scaled down; 0 is off.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "trapezoid"] = "cosine"
    warmup_steps: int = 0
    decay_start: int = 0
    final_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}; wanted a positive number.")
        for name in ("warmup_steps", "decay_start", "final_learning_rate", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; wanted at least 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; wanted at least 0 and less than 1.")


def learning_rate(config: OptimizerConfig, step, total_steps: int):
    """The learning rate at a step, which may be fractional or traced.

    Warm-up: peak * step / warmup_steps. Then the peak. From s = max(decay_start, warmup_steps), with the cosine:
    final + (peak - final) * (1 + cos(pi (step - s) / (total_steps - s))) / 2.

    Trapezoid, of N steps: peak * min(1, (step + 1) / warmup_steps, (N - step) / warmup_steps), at least `final`.

    Source: mit-han-lab/lpd util/lr_sched.py ("constant", "cosine", "constant+cosine"), there in epochs;
      mit-han-lab/duo-attention duo_attn/train.py (the trapezoid).
    """
    step = jnp.asarray(step)
    peak, final = config.learning_rate, config.final_learning_rate
    if config.schedule == "trapezoid":
        ramp = jnp.minimum(step + 1, total_steps - step) / max(config.warmup_steps, 1)
        return jnp.clip(peak * ramp, final, peak)
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
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    momentum = optax.trace(config.beta1, nesterov=True)
    order = {"adamw": (adam, decay), "adam": (decay, adam), "sgd": (decay, momentum)}[config.name]
    return optax.chain(clip, *order, optax.scale_by_learning_rate(rate))
