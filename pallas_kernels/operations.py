"""What an op multiplies, said in its traced program for whoever counts operations there.

    o = state_flops(o, 2 * rows * columns * size)      # inside the function of a call: jax.jit, jax.custom_vmap
    flops, exact = stated_flops(equation.params["jaxpr"])

A program does not show how often its while loops run or what a kernel computes; the op that wrote them knows.
"""

import re

from jax.ad_checkpoint import checkpoint_name

_STATEMENT = re.compile(r"FLOPs: (at most )?(\d+) for (\d+) elements")


def state_flops(x, flops: int, *, exact: bool = True):
    """x as it is, in a program that says what the products behind x take.

    The statement stands for the whole call that it is made in (statements about several results are added up) and
    covers what a vmap adds to x. Where x is not used, it is dropped like the work.

    Args:
      x: a result of the call.
      flops: floating-point operations in matrix products, a multiply-add counting 2.
      exact: False where data decide and `flops` is an upper bound.
    """
    return checkpoint_name(x, f"FLOPs: {'' if exact else 'at most '}{flops} for {x.size} elements")


def stated_flops(jaxpr) -> tuple[int, bool] | None:
    """(FLOPs, whether that is exact) by the statements in a call's jaxpr; None where there is none."""
    flops, exact, found = 0, True, False
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "name" and (said := _STATEMENT.fullmatch(equation.params["name"])):
            found, exact = True, exact and not said[1]
            flops += int(said[2]) * equation.outvars[0].aval.size // max(int(said[3]), 1)
    return (flops, exact) if found else None
