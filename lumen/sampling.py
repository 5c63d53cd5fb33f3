"""From logits to tokens: filtering and random draws, shared by image and language models."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits: temperature, then top-k, then top-p, then one independent draw.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: keep the k largest logits (ties at the k-th are kept); 0 keeps all.
      top_p: keep the smallest set whose probability reaches p; 1 keeps all.

    Raises:
      ValueError: for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(
                f"Sampling: temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}; "
                "wanted temperature >= 0, top_k >= 0 and top_p in [0, 1]."
            )


def filter_logits(logits, top_k: int = 0, top_p: float = 1.0):
    """Sets logits outside the top k and the nucleus p to -inf; [..., V] -> [..., V].

    Top-p keeps the token that crosses p, so at least one remains. Which of several equal logits survives top-p is not
    defined, as in the original.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if top_p < 1.0:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.maximum(jnp.sum(before <= top_p, axis=-1, keepdims=True), 1)
        smallest_kept = jnp.take_along_axis(descending, kept - 1, axis=-1)
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    return logits


def penalise_repeats(logits, seen, penalty: float):
    """Makes tokens that were seen less likely: positive logits are divided by the penalty, others multiplied by it.

    Args:
      logits: [..., V].
      seen: [..., V] bool.
      penalty: > 0; above 1 discourages repeats, 1 changes nothing.

    Returns:
      [..., V].

    Source: CTRL (arXiv:1909.05858) section 4.1, as RepetitionPenaltyLogitsProcessor of huggingface/transformers has it.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(logits, keys, ranks, sampling: Sampling):
    """One token per row: [B, G, V] logits -> [B, G] int32.

    The noise depends on the sample's key [B] and the token's rank [G] alone, so neither the grouping nor the batch a
    sample is generated in changes its draws.
    """
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    noise = jax.vmap(
        lambda key: jax.vmap(lambda rank: jax.random.gumbel(jax.random.fold_in(key, rank), logits.shape[-1:]))(ranks)
    )
    return jnp.argmax(logits + noise(keys), axis=-1).astype(jnp.int32)
