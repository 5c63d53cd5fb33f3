"""Pictures that explain LPD: samples, decoding orders, parallel decoding next to one token a step."""

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image


def _pixels(figure) -> np.ndarray:
    """The figure as uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="white", bbox_inches="tight")
    plt.close(figure)
    return np.asarray(Image.open(buffer).convert("RGB"))


def samples(grid: np.ndarray, classes: int) -> np.ndarray:
    """A grid of samples, a class per column, with the classes above."""
    figure, axis = plt.subplots(figsize=(7, 7))
    axis.imshow(grid)
    axis.set_xticks((np.arange(classes) + 0.5) * grid.shape[1] / classes, [str(c) for c in range(classes)])
    axis.xaxis.tick_top()
    axis.set_yticks([])
    axis.set_title("samples, one class per column")
    return _pixels(figure)


def decoding_order(snapshots: dict[int, dict[str, np.ndarray]], image: int = 3, columns: int = 6) -> np.ndarray:
    """For each schedule: the step in which each cell was decoded, then the picture as its cells become known.

    Args:
      snapshots: {steps: {"images" uint8 [B, H, W, 3], "step_of_cell" int [B, g, g], 1-based}}.
      image: which image of the batch to show.
      columns: how many stages to show.
    """
    figure, axes = plt.subplots(
        len(snapshots),
        columns + 1,
        figsize=(1.75 * (columns + 1), 2.4 * len(snapshots)),
        squeeze=False,
        layout="constrained",
    )
    for row, (steps, shot) in zip(axes, snapshots.items(), strict=True):
        picture, step_of_cell = shot["images"][image], shot["step_of_cell"][image]
        row[0].imshow(step_of_cell, cmap="viridis")
        row[0].set_title(f"{steps} steps: which\nstep decodes a cell", fontsize=8)
        if step_of_cell.max() < 20:
            for (y, x), step in np.ndenumerate(step_of_cell):
                shade = "white" if step < 0.6 * steps else "black"
                row[0].text(x, y, str(step), ha="center", va="center", fontsize=6, color=shade)
        scale = picture.shape[0] // step_of_cell.shape[0]
        when = np.kron(step_of_cell, np.ones((scale, scale), int))
        for axis, stage in zip(row[1:], np.unique(np.linspace(1, steps, columns).round().astype(int)), strict=False):
            shown = np.where((when <= stage)[..., None], picture, 150)
            fresh = (when == stage)[..., None]
            shown = np.where(fresh, (0.65 * shown + 0.35 * np.array([255, 140, 0])), shown).astype(np.uint8)
            axis.imshow(shown)
            axis.set_title(f"after step {stage}\n{(step_of_cell <= stage).sum()} of {step_of_cell.size}", fontsize=8)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_visible(axis.has_data())  # fewer steps than columns
    figure.suptitle("Cells known after each step (grey: not yet; orange: decoded together in this step)", fontsize=9)
    return _pixels(figure)


def comparison(metrics: dict[str, Any]) -> np.ndarray:
    """Bars: accuracy, Fréchet distance and milliseconds per image, one token a step against parallel decoding."""
    names = [f"{steps} steps" for steps in metrics["schedules"]]
    results = list(metrics["schedules"].values())
    panels = [
        ("classifier accuracy\n(higher is better)", [r["quality"]["accuracy"] for r in results], "{:.3f}"),
        ("Fréchet distance\n(lower is better)", [r["quality"]["frechet_distance"] for r in results], "{:.4f}"),
        ("token decoding, batch 1\n(ms)", [1e3 * r["times"]["batch_1"]["tokens_s"] for r in results], "{:.1f}"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 2.8))
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.bar(names, values, color=["tab:gray", "tab:orange"])
        axis.bar_label(bars, [form.format(v) for v in values])
        axis.set_title(title, fontsize=9)
        axis.margins(y=0.2)
    figure.tight_layout()
    return _pixels(figure)
