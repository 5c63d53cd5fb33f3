"""Text generation: prompts of several lengths in one batch, decoded by one compiled loop.

    generate(model, [[1, 5, 7], [1, 9]], max_new_tokens=20)     # everything at once
    stream(model, [[1, 5, 7]], max_new_tokens=20)               # a few tokens at a time

Rows are padded on the right and keep their own length in the cache, so a row's tokens depend on its own prompt and key
alone, but for the rounding of products of another shape.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumen.kv_cache import Cache
from lumen.language.decoder import Decoder
from lumen.sampling import Sampling, draw, penalise_repeats

GREEDY = Sampling(temperature=0.0)
SLOTS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where a batch stands.

    Attributes:
      cache: everything but the newest token of each row.
      tokens: [B, M] int32, what has been drawn; zeros beyond.
      drawn: how many tokens each row has been offered, scalar int32.
      lengths: [B] int32, how many of them a row took before it stopped, its stop token included.
      stopped: [B] bool.
      seen: [B, V] bool, tokens of the prompt and since; None where repeats are not penalised.
    """

    cache: Cache
    tokens: Any
    drawn: Any
    lengths: Any
    stopped: Any
    seen: Any


@functools.partial(jax.jit, donate_argnames=("cache", "last"))
def _prefill(model: Decoder, tokens, lengths, cache: Cache, last):
    """Puts a chunk [B, C] of the prompts into the cache, and the hidden rows of their last tokens into last [B, D]."""
    start, count = cache.positions(1)[..., 0], tokens.shape[1]
    hidden, filled = model(tokens, cache=cache)
    at = lengths - 1 - start
    rows = jnp.take_along_axis(hidden, jnp.clip(at, 0, count - 1)[:, None, None], axis=1)[:, 0]
    return filled, jnp.where(((at >= 0) & (at < count))[:, None], rows, last)


@functools.partial(jax.jit, static_argnames=("sampling", "penalty"), donate_argnames=("state",))
def _first(model: Decoder, last, state: _State, keys, stop, *, sampling: Sampling, penalty: float) -> _State:
    """The first new token, from the hidden row of each prompt's last one."""
    return _take(model.logits(last), state, keys, stop, sampling, penalty)


@functools.partial(jax.jit, static_argnames=("sampling", "penalty"), donate_argnames=("state",))
def _continue(model: Decoder, state: _State, keys, stop, until, *, sampling: Sampling, penalty: float) -> _State:
    """Draws tokens until there are `until` or all rows have stopped."""

    def step(state: _State) -> _State:
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.drawn - 1, 1, axis=1)
        hidden, cache = model(newest, cache=state.cache)
        state = dataclasses.replace(state, cache=cache)
        return _take(model.logits(hidden[:, 0]), state, keys, stop, sampling, penalty)

    return jax.lax.while_loop(lambda state: (state.drawn < until) & ~jnp.all(state.stopped), step, state)


def _take(logits, state: _State, keys, stop, sampling: Sampling, penalty: float) -> _State:
    """Draws the next token of each row from logits [B, V]."""
    if state.seen is not None:
        logits = penalise_repeats(logits, state.seen, penalty)
    chosen = draw(logits[:, None], keys, state.drawn[None], sampling)[:, 0]
    chosen = jnp.where(state.stopped, 0, chosen)
    seen = state.seen
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.drawn, axis=1),
        drawn=state.drawn + 1,
        lengths=state.lengths + ~state.stopped,
        stopped=state.stopped | jnp.any(chosen[:, None] == stop, axis=-1),
        seen=None if seen is None else seen.at[jnp.arange(len(chosen)), chosen].set(True),
    )


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    keys=None,
    prefill_chunk: int = 0,
    cache_dtype=None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continues prompts.

    One program is compiled for a batch size, padded prompt length, number of new tokens and set of options.

    Args:
      model: layers stacked, or in a list (see `lumen.layers.unstack`), which is faster on a CPU; dense or quantised.
      prompts: B lists of tokens, each of 1 or more.
      max_new_tokens: M, 1 or more.
      sampling: by default the most likely token.
      repetition_penalty: of `lumen.sampling.penalise_repeats`, over the prompt and what was generated.
      stop: a row ends with the first of these tokens.
      keys: [B] typed PRNG keys, one per row; where tokens are drawn at random. A row's draws depend on its own key.
      prefill_chunk: prompts go in by so many tokens at a time, C, which bounds the memory of their attention,
        [B, N, C, S]. They are padded to a multiple of it, so there are fewer lengths to compile. 0: in one pass.
      cache_dtype: of keys and values, or "int8" or "int4"; None: that of the embedding.

    Returns:
      (tokens [B, M] int32, lengths [B] int32): row b generated tokens[b, :lengths[b]], the stop token included; zeros
      follow.
    Raises:
      ValueError: for an empty prompt, tokens that the vocabulary lacks, or options out of range.
    """
    state, proceed = _begin(
        model, prompts, max_new_tokens, sampling, repetition_penalty, stop, keys, prefill_chunk, cache_dtype
    )
    state = proceed(state, max_new_tokens)
    return np.asarray(state.tokens), np.asarray(state.lengths)


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    every: int = 1,
    sampling: Sampling = GREEDY,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    keys=None,
    prefill_chunk: int = 0,
    cache_dtype=None,
) -> Iterator[list[list[int]]]:
    """As `generate`, but yields tokens as they come: for each row, those drawn since the last time.

    Args:
      every: tokens per call of the compiled loop. The first one comes as soon as the prompts are read.
      model, prompts, max_new_tokens, sampling, repetition_penalty, stop, keys, prefill_chunk, cache_dtype: as
        `generate`; put together, the tokens are the same.
    """
    if every < 1:
        raise ValueError(f"stream: every={every}; wanted 1 or more.")
    state, proceed = _begin(
        model, prompts, max_new_tokens, sampling, repetition_penalty, stop, keys, prefill_chunk, cache_dtype
    )
    shown = 0
    while True:
        tokens, lengths, stopped, drawn = jax.device_get((state.tokens, state.lengths, state.stopped, state.drawn))
        yield [row[shown:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        shown = int(drawn)
        if shown >= max_new_tokens or stopped.all():
            return
        state = proceed(state, min(shown + every, max_new_tokens))


def _begin(model, prompts, max_new_tokens, sampling, penalty, stop, keys, chunk, cache_dtype):
    """The state after the first new token, and the function (state, until) -> state that goes on from it."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    vocabulary = model.config.vocabulary
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(f"generate: prompts of {lengths.tolist()} tokens; wanted one or more, none of them empty.")
    if max_new_tokens < 1 or penalty <= 0 or chunk < 0:
        raise ValueError(
            f"generate: max_new_tokens={max_new_tokens}, repetition_penalty={penalty}, prefill_chunk={chunk}; "
            "wanted 1 or more, above 0, and 0 or more."
        )
    if sampling.temperature > 0 and (keys is None or keys.shape != lengths.shape):
        raise ValueError(
            f"generate: keys={None if keys is None else list(keys.shape)}; wanted {len(lengths)} keys, one per prompt: "
            "jax.random.split(jax.random.key(seed), B); or temperature 0."
        )
    padded = -(-int(lengths.max()) // chunk) * chunk if chunk else int(lengths.max())
    tokens = np.zeros((len(lengths), padded), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"generate: tokens from {tokens.min()} to {tokens.max()} came; the model's vocabulary has {vocabulary}. "
            "Use the model's own tokenizer."
        )
    seen = None
    if penalty != 1.0:
        seen = np.zeros((len(lengths), vocabulary), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True

    batch = len(lengths)
    # Whole blocks of slots, which a kernel reads without a copy.
    slots = -(-(padded + max_new_tokens) // SLOTS) * SLOTS
    cache = model.empty_cache(batch, slots, cache_dtype).within(lengths)
    last = jnp.zeros((batch, model.config.width), model.embedding[...].dtype)
    for start in range(0, padded, chunk or padded):
        cache, last = _prefill(model, tokens[:, start : start + (chunk or padded)], lengths, cache, last)
    # Rows of one length share it: their keys are then written with a slice instead of a scatter.
    same = (lengths == lengths[0]).all()
    cache = cache.with_length(jnp.asarray(lengths[0] if same else lengths, jnp.int32))
    state = _State(
        cache=cache,
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        drawn=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        seen=None if seen is None else jnp.asarray(seen),
    )
    options = {"sampling": sampling, "penalty": penalty}
    stop = np.asarray(stop, np.int32)
    state = _first(model, last, state, keys, stop, **options)
    return state, lambda state, until: _continue(model, state, keys, stop, until, **options)
