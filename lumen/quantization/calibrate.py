"""Calibration: the tokens a quantiser looks at, and what it keeps of a block's inputs.

Source: AWQ, arXiv:2306.00978; mit-han-lab/llm-awq awq/utils/calib_data.py.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def calibration_tokens(
    texts: Iterable[str], encode: Callable[[str], Sequence[int]], *, texts_used: int = 128, length: int = 512
) -> np.ndarray:
    """Cuts texts into blocks of tokens, as AWQ does.

    Texts are stripped and tokenised; those that are empty or of more than `length` tokens are passed over; the tokens
    of the first `texts_used` others are joined and cut into blocks of `length`, and the tail is dropped. Texts are read
    no further than needed.

    Args:
      texts: in the order to be tried; the original shuffles its corpus, with seed 42.
      encode: text -> tokens, without special tokens.
      texts_used: how many texts to join.
      length: T.

    Returns:
      [S, T] int32.

    Raises:
      ValueError: if what was accepted is less than one block.
    """
    joined, used, tried = [], 0, 0
    for text in texts:
        tried += 1
        tokens = encode(text.strip())
        if 0 < len(tokens) <= length:
            joined.extend(tokens)
            used += 1
        if used == texts_used:
            break
    if len(joined) < length:
        raise ValueError(
            f"calibration_tokens: {used} of {tried} texts have 1 to {length} tokens, {len(joined)} together, less than "
            f"one block of {length}; give more or shorter texts, or a smaller length."
        )
    blocks = len(joined) // length
    return np.asarray(joined[: blocks * length], np.int32).reshape(blocks, length)


def calibration_windows(
    texts: Iterable[str], encode: Callable[[str], Sequence[int]], *, windows: int, length: int
) -> np.ndarray:
    """Sequences [windows, length] int32 from all over a corpus: its tokens one after the other, cut at even spaces.

    For corpora of long documents, which `calibration_tokens` would pass over.

    Raises:
      ValueError: if all texts together are shorter than one window.
    """
    stream = np.concatenate([np.zeros(0, np.int32), *(np.asarray(encode(text), np.int32) for text in texts)])
    if len(stream) < length or windows < 1:
        raise ValueError(
            f"calibration_windows: the texts have {len(stream)} tokens; wanted at least one window of {length}, and "
            f"windows={windows} to be 1 or more."
        )
    starts = np.linspace(0, len(stream) - length, windows).astype(int)
    return np.stack([stream[start : start + length] for start in starts])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """What is kept of one input of a block over all calibration tokens; its size does not depend on their number.

    Attributes:
      mean_abs: [D] float32, mean of |x| per channel.
      rows: [R, D] float32, every max(1, tokens // 512)-th token: 512 to 1023 of them, or all if there are fewer.
      moment: [D, D] float32, mean of x xᵀ, for inputs that it was asked of; else None.
    """

    mean_abs: Any
    rows: Any
    moment: Any = None


def input_statistics(
    inputs: Callable[[Any], dict[str, Any]], x, *, sequences: int, rows: int = 512, moments: Collection[str] = ()
) -> dict[str, InputStatistics]:
    """Runs a block over micro-batches and gathers statistics of what enters its weights. To be called under jit.

    Args:
      inputs: one micro-batch [M, T, D] -> {name: what enters some weights [M, T, ...]}.
      x: [N, M, T, D], N micro-batches of M sequences.
      sequences: S <= N M; those after the first S are padding and do not count.
      rows: how many rows to keep at least; see `InputStatistics`.
      moments: names of the inputs whose second moments are wanted.
    """
    batches, per_batch, length = x.shape[:3]
    total = sequences * length
    step = max(1, total // rows)
    kept = -(-total // step)

    def empty(name, depth):
        moment = jnp.zeros((depth, depth)) if name in moments else None
        return InputStatistics(jnp.zeros(depth), jnp.zeros((kept, depth)), moment)

    def gather(found, batch):
        x, index = batch
        token = index * per_batch * length + jnp.arange(per_batch * length)
        slot = jnp.where((token < total) & (token % step == 0), token // step, kept)  # `kept` is dropped
        new = {}
        for name, value in inputs(x).items():
            value = value.reshape(-1, value.shape[-1]).astype(jnp.float32)
            value = jnp.where((token < total)[:, None], value, 0.0)
            old = found[name]
            moment = old.moment
            if moment is not None:
                moment += jnp.matmul(value.T, value, precision="highest") / total
            new[name] = InputStatistics(
                old.mean_abs + jnp.abs(value).sum(0) / total, old.rows.at[slot].set(value, mode="drop"), moment
            )
        return new, None

    start = {name: empty(name, like.shape[-1]) for name, like in jax.eval_shape(inputs, x[0]).items()}
    return jax.lax.scan(gather, start, (x, jnp.arange(batches)))[0]
