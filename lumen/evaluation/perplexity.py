"""Perplexity of a language model on a text."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lumen.language.decoder import Decoder


@jax.jit
def _block_losses(model: Decoder, tokens):
    """Mean cross-entropy [B] of each block of tokens [B, T], over its T - 1 predictions; one block in memory."""

    def block(tokens):
        hidden, _ = model(tokens[None, :-1])
        logits = model.logits(hidden)[0]
        chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    return jax.lax.map(block, tokens)


def perplexity(model: Decoder, stream: np.ndarray, *, length: int = 2048, progress: bool = True) -> dict[str, Any]:
    """Perplexity by the WikiText-2 protocol of GPTQ, AWQ and QServe.

    The stream is cut into blocks of `length` tokens, the rest dropped. With l_b the mean cross-entropy of a block's
    length - 1 predictions, perplexity = exp(mean of l_b). Blocks weigh alike, and no context crosses from one to the
    next.

    Args:
      model: the decoder, stacked or unstacked, quantised or not.
      stream: [n] int32 tokens of the whole text; for WikiText-2 all rows of wikitext-2-raw's test joined by two
        newlines.
      length: tokens per block.
      progress: show a bar on a terminal.

    Returns:
      "perplexity", "cross_entropy" in nats, "blocks", "tokens" predicted.
    Raises:
      ValueError: if the stream is shorter than a block or holds a token that the vocabulary lacks.
    """
    count = len(stream) // length
    if count < 1:
        raise ValueError(f"perplexity: the text has {len(stream)} tokens; wanted at least one block of {length}.")
    if stream.min() < 0 or stream.max() >= model.config.vocabulary:
        raise ValueError(
            f"perplexity: tokens from {stream.min()} to {stream.max()} came; the model's vocabulary has "
            f"{model.config.vocabulary}. Use the model's own tokenizer."
        )
    blocks = np.asarray(stream[: count * length], np.int32).reshape(count, length)
    size = max(1, 8192 // length)
    losses = []
    for start in tqdm(range(0, count, size), desc="perplexity", leave=False, disable=None if progress else True):
        rows = np.arange(start, start + size) % count  # the last batch is filled up, so nothing compiles twice
        losses.append(np.asarray(_block_losses(model, blocks[rows]), np.float64)[: count - start])
    mean = float(np.concatenate(losses).mean())
    return {"perplexity": math.exp(mean), "cross_entropy": mean, "blocks": count, "tokens": count * (length - 1)}
