"""Whether the heads that DuoAttention chose are those that retrieval needs: against random choices, with pictures."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumen.attention import Streaming
from lumen.language.decoder import Decoder
from lumen.long_context.duo_attention import head_kinds, retrieval_heads, sparse_hidden

DEPLOYED = Streaming(64, 256, includes_self=False)


def passkey_recall(
    model: Decoder,
    samples: Mapping[str, np.ndarray],
    retrieval: np.ndarray | None = None,
    *,
    streaming: Streaming = DEPLOYED,
) -> float:
    """Share of the tokens of all passkeys that are the most likely ones after the true tokens before them.

    Args:
      model: the decoder, its heads in their own order.
      samples: {"tokens" [B, T] int32, "passkeys" [B, T] bool, the tokens of the answers}.
      retrieval: [L, K] bool, the heads that see everything; None: all.
      streaming: what the others see.
    """
    config = model.config
    tokens, asked = samples["tokens"], samples["passkeys"]
    positions = np.zeros((len(tokens), asked.sum(axis=1).max()), np.int32)
    counted = np.zeros(positions.shape, bool)
    for answer, places, real in zip(asked, positions, counted, strict=True):
        (found,) = np.nonzero(answer)
        places[: len(found)], real[: len(found)] = found, True
    shape = config.depth, config.kv_heads
    kinds = head_kinds(np.ones(shape, bool) if retrieval is None else retrieval, config.heads // config.kv_heads)
    correct = _correct(model, kinds, tokens, positions, streaming=streaming)
    return float(np.asarray(correct)[counted].mean())


@functools.partial(jax.jit, static_argnames="streaming")
def _correct(model: Decoder, kinds, tokens, positions, *, streaming: Streaming):
    """[B, P] bool, whether the token at each position is the most likely one; rows are run a few at a time."""

    def row(tokens, positions):
        hidden = sparse_hidden(model, kinds, tokens[None], streaming=streaming)[0]
        return jnp.argmax(model.logits(hidden[positions - 1]), axis=-1) == tokens[positions]

    rows = max(1, 4096 // tokens.shape[1])
    return jax.lax.map(lambda sample: row(*sample), (tokens, positions), batch_size=rows)


def compare_choices(
    model: Decoder,
    gates: np.ndarray,
    samples: Mapping[str, np.ndarray],
    *,
    streaming: Streaming,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
    random_choices: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall with the heads that the gates choose, with as many drawn at random, and with those the gates like least.

    Args:
      model, samples, streaming: as in `passkey_recall`.
      gates: [L, K].
      sparsities: shares of streaming heads.
      random_choices: drawn for each share, every set of heads alike.
      seed: of the draws.

    Returns:
      {"full": recall, "streaming": recall with streaming heads only, "choices": [{"sparsity", "retrieval_heads",
      "learned", "inverted", "random": [...], "random_median"}, ...]}.
    """
    rng = np.random.default_rng(seed)
    gates = np.asarray(gates)

    def recall(retrieval):
        return passkey_recall(model, samples, retrieval, streaming=streaming)

    choices = []
    for sparsity in sparsities:
        learned = retrieval_heads(gates, sparsity)
        drawn = [recall(rng.permuted(learned.ravel()).reshape(learned.shape)) for _ in range(random_choices)]
        inverted = retrieval_heads(1 - np.clip(gates, 0, 1), sparsity)
        choices.append(
            {
                "sparsity": float(sparsity),
                "retrieval_heads": int(learned.sum()),
                "learned": recall(learned),
                "inverted": recall(inverted),
                "random": drawn,
                "random_median": float(np.median(drawn)) if drawn else None,
            }
        )
    nothing = np.zeros(gates.shape, bool)
    return {"full": recall(~nothing), "streaming": recall(nothing), "choices": choices}


def gates_picture(gates: np.ndarray) -> np.ndarray:
    """Gates by layer and head as a heat map, and how they are distributed: uint8 [H, W, 3]."""
    gates = np.clip(np.asarray(gates, np.float64), 0, 1)
    figure = _figure(9, 1.2 + 0.3 * min(max(gates.shape[0], 8), 32))
    left, right = figure.subplots(1, 2)
    image = left.imshow(gates, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=left, label="gate: 1 needs the whole context")
    left.set(xlabel="key/value head", ylabel="layer", title="gates")
    for axis, count in ((left.xaxis, gates.shape[1]), (left.yaxis, gates.shape[0])):
        axis.set_ticks(range(0, count, -(-count // 16)))
    right.hist(gates.ravel(), bins=np.linspace(0, 1, 21), color="tab:blue", edgecolor="white")
    right.set(xlabel="gate", ylabel="heads", title=f"{gates.size} heads, {(gates > 0.5).mean():.0%} above 0.5")
    return _pixels(figure)


def choices_picture(results: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Recall against the share of streaming heads, learned and random choices, a panel for each of several models.

    Args:
      results: what `compare_choices` returned, for each model.

    Returns:
      uint8 [H, W, 3].
    """
    figure = _figure(1 + 3.6 * len(results), 3.4)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for number, (axis, result) in enumerate(zip(panels, results, strict=True)):
        shares = [choice["sparsity"] for choice in result["choices"]]
        for choice in result["choices"]:
            x = np.full(len(choice["random"]), choice["sparsity"])
            axis.plot(x, choice["random"], "o", color="tab:gray", alpha=0.35, markersize=4)
        drawn = [choice for choice in result["choices"] if choice["random"]]
        if drawn:
            medians = [choice["random_median"] for choice in drawn]
            places = [choice["sparsity"] for choice in drawn]
            axis.plot(places, medians, "_", color="black", markersize=16, label="random heads, median")
        learned = [result["full"], *(choice["learned"] for choice in result["choices"]), result["streaming"]]
        axis.plot([0, *shares, 1], learned, "o-", color="tab:orange", label="heads with the largest gates")
        axis.axhline(0.95 * result["full"], linestyle=":", color="tab:green", label="95 % of full attention")
        axis.set(xlabel="share of streaming heads", ylim=(0, 1.03))
        axis.set_title(f"model {number}" if len(results) > 1 else "passkey recall", fontsize=9)
    panels[0].set_ylabel("passkey recall")
    panels[0].legend(fontsize=7, loc="lower left")
    return _pixels(figure)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # part of the `examples` extra

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _pixels(figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
