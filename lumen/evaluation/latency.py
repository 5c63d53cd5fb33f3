"""How long a compiled program takes."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def seconds(program: Callable[..., Any], *arguments, runs: int = 5, warmup: int = 1) -> dict[str, float]:
    """Wall time of a program over several runs, compilation apart.

    Args:
      program: a jitted function.
      arguments: its arguments; they must not be donated.
      runs: timed runs.
      warmup: runs before them, after the one that compiles.

    Returns:
      median, minimum and maximum in seconds, and "compile": what the first call took beyond the median.
    """
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    first = time.perf_counter() - start
    for _ in range(warmup):
        jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    median = float(np.median(times))
    return {"median": median, "minimum": min(times), "maximum": max(times), "compile": max(first - median, 0.0)}
