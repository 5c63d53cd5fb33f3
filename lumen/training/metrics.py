"""Numbers and pictures of a run, on disk and on the terminal."""

import contextlib
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
        self._workdir, self._media, self._path = workdir, workdir / "media", workdir / "metrics.jsonl"
        self._board = None
        with self._writing():
            self._media.mkdir(exist_ok=True)
            if self._path.exists():
                kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= first_step]
                temporary = self._path.with_suffix(".tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                os.replace(temporary, self._path)
            if tensorboard:
                # What an interrupted run wrote at later steps is hidden.
                self._board = _summary_writer()(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._active and self._board is not None:
            with self._writing():
                self._board.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Appends one line: {"step": ..., "time": seconds since 1970, name: value, ...}; NaN and infinity as null."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite})
        with self._writing():
            with self._path.open("a") as file:
                file.write(line + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def pictures(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Writes uint8 [H, W, 3] images as `media/<name>_<step>.png`."""
        if not self._active:
            return
        with self._writing():
            for name, image in images.items():
                Image.fromarray(image).save(self._media / f"{name}_{step:08d}.png")

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise MetricsError(
                f"metrics: cannot write {error.filename or self._workdir}: {error.strerror}; free some space or give "
                "another --workdir, then run the same command to resume from the last checkpoint."
            ) from error


def _summary_writer():
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MetricsError(
            "tensorboard=True: tensorboardX is not installed; run `pip install lumen[tensorboard]`."
        ) from error
    return SummaryWriter


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line cut off by a crash
