"""How well a language model uses its context: perplexity by context length, and the loss at every position.

found = {name: context_curves(load(folder)[0], stream, lengths=(256, 512, 1024, 2048)) for name, folder in ...}
Path("curves.png").write_bytes(draw(found))
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from lumen.attention import Mask
from lumen.language.decoder import Decoder, DecoderConfig, next_token_loss
from lumen.plan import count_flops
from pallas_kernels.block_sparse_attention import block_table


@jax.jit
def _losses(model: Decoder, tokens):
    """Cross-entropy [T - 1] of each token of a window [T] given those before it."""
    hidden, _ = model(tokens[None, :-1])
    logits = model.logits(hidden)[0]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]


def window_losses(
    model: Decoder, stream: np.ndarray, *, length: int, stride: int = 256, windows: int = 0
) -> np.ndarray:
    """The loss of every token of sliding windows.

    Windows of `length` tokens begin every `stride` tokens; as in the original the last place where one fits is left
    out. exp of the mean is the perplexity of LongLoRA's protocol: all tokens of a window count, not its last alone.

    Args:
      model: the decoder.
      stream: [n] int32 tokens.
      length: tokens of a window.
      stride: from one window's start to the next.
      windows: use so many, evenly spread; 0: all.

    Returns:
      [windows, length - 1] float32, in nats.
    Raises:
      ValueError: if the stream is too short for a window.
    Source: dvlab-research/LongLoRA eval.py.
    """
    starts = np.arange(0, len(stream) - length, stride)
    if not len(starts):
        raise ValueError(f"window_losses: the text has {len(stream)} tokens; wanted more than length={length}.")
    if windows:
        starts = starts[np.unique(np.linspace(0, len(starts) - 1, windows).round().astype(int))]
    rows = (stream[start : start + length].astype(np.int32) for start in starts)
    shown = tqdm(rows, total=len(starts), desc=f"windows of {length}", leave=False, disable=None)
    return np.stack([np.asarray(_losses(model, row)) for row in shown])


def context_curves(
    model: Decoder, stream: np.ndarray, *, lengths: Sequence[int], stride: int = 256, windows: int = 0
) -> dict[str, Any]:
    """Perplexity at each context length, and the loss by position in windows of the longest.

    Returns:
      {"perplexity": {length: exp of the mean loss}, "windows": {length: how many},
       "loss_by_position": [[position, mean loss of the positions up to it and beyond the entry before], ...]}, with
      positions at powers of two and halfway between them.
    """
    perplexities, counts, losses = {}, {}, np.zeros((0, 0))
    for length in sorted(lengths):
        losses = window_losses(model, stream, length=length, stride=stride, windows=windows)
        perplexities[length], counts[length] = math.exp(losses.mean(dtype=np.float64)), len(losses)
    mean = losses.mean(axis=0, dtype=np.float64)
    edges = sorted({2**power * part // 2 for power in range(4, 20) for part in (2, 3)} | {len(mean)})
    edges = [0, *(edge for edge in edges if edge <= len(mean))]
    by_position = [[stop, float(mean[start:stop].mean())] for start, stop in itertools.pairwise(edges)]
    return {"perplexity": perplexities, "windows": counts, "loss_by_position": by_position}


def draw(found: Mapping[str, Mapping[str, Any]], *, highest: float | None = None) -> bytes:
    """A PNG of what `context_curves` found for several models: loss by position, perplexity by context length.

    Curves above the perplexity `highest` leave the picture; None: nothing does.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, curves in found.items():
        left.plot(*zip(*curves["loss_by_position"], strict=True), label=name, linewidth=1.2)
        lengths = list(map(int, curves["perplexity"]))
        right.plot(lengths, list(curves["perplexity"].values()), marker="o", markersize=3, label=name, linewidth=1.2)
    left.set(xlabel="position", ylabel="loss (nats)")
    right.set(xlabel="context length", ylabel="perplexity", yscale="log")
    if highest:
        left.set_ylim(top=math.log(highest))
        right.set_ylim(top=highest)
    right.yaxis.set_minor_formatter("{x:g}")
    right.yaxis.set_major_formatter("{x:g}")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    right.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    plt.close(figure)
    return buffer.getvalue()


def attention_pairs(mask: Mask, length: int, *, heads: int, block: int = 1) -> int:
    """Pairs of a query and a key that attention computes for one row of `length` tokens, summed over its N heads.

    Blocks of `block` x `block` that hold a pair are computed whole; block=1 counts the pairs that the mask shows.
    """
    ranges = mask.ranges(length, length)
    seen, _ = block_table(ranges.ranges, length, rows=block, columns=block)  # [P, 1, I, J]
    pairs = np.asarray(jnp.sum(seen, axis=(1, 2, 3))).astype(np.int64) * block**2
    pattern = np.zeros(heads, int) if ranges.pattern is None else np.asarray(ranges.pattern)
    return int(pairs[pattern].sum())


def step_flops(config: DecoderConfig, mask: Mask, length: int, *, block: int = 256) -> dict[str, int]:
    """FLOPs of the matrix products in a training step of all parameters, on one row of `length` tokens.

    How often attention's loops run depends on the mask, which a jaxpr does not show. So all but attention is counted on
    the jaxpr of a step on as many tokens in rows of 128, whose attention is known and taken off, and attention by the
    blocks that the mask keeps: 2 products forward and 5 backward, 2 H FLOPs a pair each. Nothing is computed.

    Returns:
      {"attention", "rest", "total"}.
    Raises:
      ValueError: for a length that is no multiple of 128.
    """
    if length % 128:
        raise ValueError(f"step_flops: length={length}; wanted a multiple of 128.")
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((length // 128, 129), jnp.int32)
    counted = count_flops(jax.make_jaxpr(jax.value_and_grad(next_token_loss))(model, tokens)).matmul
    # At once, all pairs are computed, by 2 products forward and 4 backward.
    rest = counted - 6 * 2 * config.depth * config.heads * config.head_dim * length * 128
    pairs = attention_pairs(mask, length, heads=config.heads, block=min(block, length))
    attention = 7 * 2 * config.depth * config.head_dim * pairs
    return {"attention": attention, "rest": rest, "total": attention + rest}
