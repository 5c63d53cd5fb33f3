"""How long a compiled program takes."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def seconds(
    programs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], *, runs: int = 5, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Wall time of several programs, run in turn (A B C, A B C, ...) so that their ratios outlive a drifting machine.

    Args:
      programs: {name: (jitted function, its arguments)}; arguments must not be donated.
      runs: timed runs of each.
      warmup: runs of each before them, after the one that compiles.

    Returns:
      By name: median, minimum and maximum in seconds, and "compile": what the first call took beyond the median.
    """

    def once(name):
        program, arguments = programs[name]
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - start

    first = {name: once(name) for name in programs}
    for _ in range(warmup):
        for name in programs:
            once(name)
    times = {name: [] for name in programs}
    for _ in range(runs):
        for name in programs:
            times[name].append(once(name))
    results = {}
    for name, values in times.items():
        median = float(np.median(values))
        compile_time = max(first[name] - median, 0.0)
        results[name] = {"median": median, "minimum": min(values), "maximum": max(values), "compile": compile_time}
    return results
