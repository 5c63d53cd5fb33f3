"""What quantisation did to each linear, as a table and as a picture."""

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearReport:
    """One linear of one block.

    Attributes:
      layer, linear: which.
      input: name of its input, which it may share; scale and loss belong to that.
      ratio: exponent of the chosen scale; None where nothing was scaled.
      loss_plain, loss: mean squared error of the inspected output, over all calibration tokens: plain rounding, and
        with the chosen scale, before clipping.
      signal: mean square of the linear's output, over sampled tokens, in full precision.
      error_plain, error: mean squared error of that output: plain rounding, and as quantised.
      bits: stored in memory per weight: words, scales and zeros.
    """

    layer: int
    linear: str
    input: str
    ratio: float | None
    loss_plain: float
    loss: float
    signal: float
    error_plain: float
    error: float
    bits: float

    @property
    def sqnr_plain(self) -> float:
        """Signal to noise of plain rounding, dB."""
        return _decibels(self.signal, self.error_plain)

    @property
    def sqnr(self) -> float:
        """Signal to noise as quantised, dB."""
        return _decibels(self.signal, self.error)


def _decibels(signal: float, error: float) -> float:
    if not error:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf


def report_table(report: Sequence[LinearReport]) -> str:
    """The report in Markdown, a row per linear."""
    lines = [
        "| block | linear | ratio | loss, rounded | loss, scaled | error, rounded | error | SQNR, rounded | SQNR "
        "| bits |",
        "|---" * 10 + "|",
    ]
    for row in report:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"| {row.layer} | {row.linear} | {ratio} | {row.loss_plain:.3g} | {row.loss:.3g} | {row.error_plain:.3g} | "
            f"{row.error:.3g} | {row.sqnr_plain:.1f} dB | {row.sqnr:.1f} dB | {row.bits:.2f} |"
        )
    return "\n".join(lines) + "\n"


def report_plot(report: Sequence[LinearReport]) -> np.ndarray:
    """The report as a picture: signal to noise of every linear, rounded and as quantised. Needs the `examples` extra.

    Returns:
      [height, width, 3] uint8.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    linears = list(dict.fromkeys(row.linear for row in report))
    figure, axes = plt.subplots(
        1, len(linears), figsize=(1 + 1.7 * len(linears), 2.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, linear in zip(axes[0], linears, strict=True):
        rows = [row for row in report if row.linear == linear]
        layers = [row.layer for row in rows]
        axis.plot(layers, [row.sqnr_plain for row in rows], "o-", color="tab:gray", markersize=3, label="rounded")
        axis.plot(layers, [row.sqnr for row in rows], "o-", color="tab:orange", markersize=3, label="quantised")
        axis.set_title(linear, fontsize=9)
        axis.set_xlabel("block", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("SQNR of the output (dB)", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="white")
    plt.close(figure)
    return np.asarray(Image.open(buffer).convert("RGB"))
