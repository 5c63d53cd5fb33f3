"""What quantisation costs a language model: perplexity of searched against rounded weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lumen.evaluation.perplexity import perplexity
from lumen.language.decoder import Decoder
from lumen.layers import unstack
from lumen.quantization.awq import AWQConfig, quantize_decoder

METHODS = ("rtn", "awq")


def compare(
    model: Decoder,
    calibration: np.ndarray,
    stream: np.ndarray,
    *,
    bits: Sequence[int] = (4, 3),
    config: AWQConfig,
    length: int = 2048,
) -> dict[str, Any]:
    """Perplexities of a model, and of what plain rounding and AWQ make of it.

    Args:
      model: the decoder in full precision, stacked.
      calibration: [S, T] int32 tokens for AWQ's search.
      stream: tokens that perplexity is measured on.
      bits: widths to try.
      config: group, parity and so on of both methods.
      length: tokens per block of the perplexity.

    Returns:
      {"full": perplexity, "int4 rtn": ..., "int4 awq": ..., "int3 rtn": ..., "int3 awq": ...}.
    """
    measured = {"full": perplexity(unstack(model), stream, length=length)["perplexity"]}
    for width in bits:
        for method in METHODS:
            changed = dataclasses.replace(config, bits=width, method=method)
            quantized, _ = quantize_decoder(model, calibration, changed)
            measured[f"int{width} {method}"] = perplexity(unstack(quantized), stream, length=length)["perplexity"]
    return measured


def comparison_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of `compare` for several models: a row each, then the mean excess over full precision and its spread.

    Args:
      results: {model: what `compare` returned}, all with the same columns.
    """
    columns = list(next(iter(results.values())))
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[column]:.4f}" for column in columns) + " |")
    excess = [np.array([row[column] - row["full"] for row in results.values()]) for column in columns]
    spread = [values.std(ddof=1) if len(values) > 1 else 0.0 for values in excess]
    cells = [
        "" if c == "full" else f"{e.mean():+.4f} ± {s:.4f}" for c, e, s in zip(columns, excess, spread, strict=True)
    ]
    lines.append("| mean excess ± deviation | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
