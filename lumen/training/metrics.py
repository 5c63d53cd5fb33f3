"""Numbers and pictures of a run, on disk and on the terminal."""

import json
import math
import os
import pathlib
import time

import numpy as np
from PIL import Image


class MetricsError(RuntimeError):
    """The record of a run could not be written."""


class Recorder:
    """Appends to `metrics.jsonl` in a workdir and writes pictures to `media/`; TensorBoard too where wanted.

    Only one process of a job records; on the others every call does nothing.

    Args:
      workdir: the run's directory.
      first_step: lines of a resumed run at later steps are dropped, so that the file is that of one run.
      tensorboard: also write event files, with the `tensorboard` extra.
      active: False on all processes but one.
    """

    def __init__(self, workdir: pathlib.Path, *, first_step: int = 0, tensorboard: bool = False, active: bool = True):
        self._active = active
        if not active:
            return
        self._media = workdir / "media"
        self._media.mkdir(exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= first_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self._path)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Appends one line: {"step": ..., "time": seconds since 1970, name: value, ...}; NaN and infinity as null."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite})
        try:
            with self._path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise MetricsError(
                f"metrics: cannot write {self._path}: {error.strerror}; free space or give another --workdir, "
                "then run the same command to resume from the last checkpoint."
            ) from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pictures(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Writes uint8 [H, W, 3] images as `media/<name>_<step>.png`."""
        if not self._active:
            return
        for name, image in images.items():
            Image.fromarray(image).save(self._media / f"{name}_{step:08d}.png")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line cut off by a crash


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Lays uint8 images [B, H, W, 3] out in rows of `columns` on white, `gap` pixels apart."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas
