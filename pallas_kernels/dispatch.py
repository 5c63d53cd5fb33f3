"""Which implementation of an op runs: the caller's wish, what the op can do, and the chip.

    implementation = choose("w4a16_matmul", wish, unsupported(x, w))

An explicit wish runs, or one ValueError says why not. "auto" always runs: the kernel on a chip that has one, else XLA,
and the log says so once.
"""

import functools
import logging
import re
from typing import Literal, get_args

import jax

# "xla": plain JAX, on every chip. "mosaic_gpu": the kernel, on a Hopper GPU. "interpret": the same kernel on a CPU,
# with race detection, for tests: thousands of times slower, and on one device at a time.
Implementation = Literal["auto", "xla", "mosaic_gpu", "interpret"]


def choose(op: str, wish: Implementation, unsupported: str | None) -> Literal["xla", "mosaic_gpu", "interpret"]:
    """Resolves a wish.

    Args:
      op: name of the op, for messages.
      wish: what the caller asked for.
      unsupported: why the op's kernel cannot take this case, as the end of a sentence; None if it can.
    Raises:
      ValueError: for an unknown name, or an explicit wish for the kernel that cannot be met.
    """
    if wish not in get_args(Implementation):
        raise ValueError(f"{op}: implementation={wish!r} is unknown; use one of {', '.join(get_args(Implementation))}.")
    if wish == "xla":
        return wish
    elsewhere = None if wish == "interpret" else no_hopper()
    reason = unsupported or elsewhere
    if reason is None:
        return "mosaic_gpu" if wish == "auto" else wish
    if wish == "auto":
        # That another chip has no kernel is no news; that a Hopper GPU cannot use the one it has is.
        _say_once(op, elsewhere or reason, logging.INFO if elsewhere else logging.WARNING)
        return "xla"
    raise ValueError(f"{op}: {wish} cannot run this: {reason}; use implementation='auto' or 'xla'.")


def no_hopper() -> str | None:
    """Why Mosaic GPU kernels cannot run here, as the end of a sentence; None on a Hopper GPU."""
    if re.search(r"\bG?H(20|100|200|800)\b", device_kind()):
        return None
    return f"the kernel needs a Hopper GPU (H100, H200) and this is {device_kind()}"


def device_kind() -> str:
    """The chip that programs traced here are for: "cpu", "NVIDIA H200", "TPU v5p", ...

    It is that of the mesh in JAX's context (jax.set_mesh), else the default device: a program that is compiled for an
    absent GPU under its mesh gets that GPU's kernels.
    """
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


@functools.cache
def _say_once(op: str, reason: str, level: int) -> None:
    logging.getLogger(__name__).log(level, "%s: using XLA, because %s.", op, reason)
