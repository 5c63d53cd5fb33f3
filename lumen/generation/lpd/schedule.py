"""How many tokens LPD decodes in each step: the published group-size lists and a rule for other numbers of steps.

Locality-aware Parallel Decoding (arXiv:2507.01957) decodes N tokens in K groups of sizes o_1 = 1 <= o_2 <= ... <= o_K
that sum to N: few tokens while little is known, many once the picture stands. Everything here is static Python or
NumPy; nothing touches a device.
"""

import itertools
import math

import numpy as np

# Published lists, "size x count" in decoding order, by number of tokens and of steps: orders/group_sizes_lookup.json of
# mit-han-lab/lpd. The steps stand in the order of that project's training files, which hold the same lists.
_PUBLISHED: dict[int, dict[int, str]] = {
    256: {  # 256 px
        256: "1x256",
        128: "1x41 2x46 3x41",
        64: "1x10 2x7 3x7 4x9 5x11 6x20",
        32: "1x2 2x2 3x2 4 5x2 6x2 7x2 8x2 9x2 10x3 11x4 12x8",
        24: "1 2 3 4 5 6 7 8 9 10 11x2 12 13 14x3 15x2 16x3 17x2",
        20: "1 2 4 5 7 8 10 11 12 14 15 16 17 18x2 19x2 20x3",
        16: "1 4 6 8 11 13 15 17 19 20 22 23 24x3 25",
        12: "1 7 11 15 19 22 25 28 30 32 33x2",
        8: "1 15 24 32 40 45 49 50",
    },
    1024: {  # 512 px
        1024: "1x1024",
        512: "1x162 2x188 3x162",
        256: "1x39 2x28 3x31 4x34 5x44 6x80",
        224: "1x32 2x21 3x21 4x24 5x27 6x37 7x62",
        192: "1x22 2x15 3x16 4x16 5x19 6x21 7x27 8x55 10",
        160: "1x15 2x11 3x10 4x12 5x12 6x13 7x14 8x17 9x23 10x33",
        128: "1x10 2x6 3x7 4x7 5x7 6x7 7x8 8x9 9x9 10x11 11x14 12x26 13x7",
        96: "1x5 2x4 3x4 4x4 5x3 6x4 7x4 8x5 9x4 10x4 11x6 12x5 13x6 14x7 15x8 16x13 17x10",
        80: "1x4 2x2 3x3 4x2 5x3 6x3 7x2 8x3 9x3 10x3 11x3 12x3 13x3 14x4 15x4 16x4 17x6 18x6 19x7 20x12",
        64: "1x2 2x2 3x2 4 5x2 6x2 7 8x2 9x2 10x2 11 12x2 13x2 14x2 15x2 16x2 17x2 18x3 19x2 20x3 21x3 22x3 23x5 "
        "24x6 25x8",
        56: "1x2 2 3 4x2 5 6 7 8x2 9 10 11x2 12 13 14x2 15 16x2 17 18x2 19x2 20 21x2 22x2 23x2 24x2 25x3 26x3 "
        "27x5 28x6 29x3",
        48: "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23x2 24 25 26x2 27 28x2 29x2 30x2 31x2 32x3 "
        "33x7 34",
        40: "1 2 4 6 7 9 10 12 13 15 16 18 19 20 22 23 24 26 27 28 29 30 31 32 33 34 35x2 36 37x2 38x2 39x3 40x4",
        32: "1 4 6 9 11 13 16 18 20 23 25 27 29 31 33 35 36 38 40 41 42 44 45 46 47 48x2 49x2 50x3",
    },
}


def group_sizes(tokens: int, steps: int) -> tuple[int, ...]:
    """Sizes o_1..o_K of the groups that decode N tokens in K steps.

    The published list where there is one: 256 tokens in 256, 128, 64, 32, 24, 20, 16, 12 or 8 steps, and 1024 tokens in
    14 numbers of steps from 1024 to 32. Otherwise a cosine ramp,

        o_k = max(1, round(N * (cos(pi (k - 1) / 2K) - cos(pi k / 2K)))),

    whose first size is set to 1 and whose others are moved by one at a time until they sum to N: each time the size
    farthest on the wrong side of the ramp (the latest of equals), among those that can move without making the list
    decrease.

    Args:
      tokens: N >= 1, the number of tokens of the image, or of its free cells.
      steps: K, 2 <= K <= N; K = 1 only for N = 1, because the first group holds one token.
    Returns:
      K positive ints, non-decreasing, the first 1, summing to N. Equal arguments give equal lists.
    Raises:
      ValueError: if there is no such list.
    Source: orders/group_sizes_lookup.json of mit-han-lab/lpd. The ramp is fitted to those lists, not taken from the
    paper: it equals the ones for 256 tokens in 20 steps and 1024 in 48, and no size of the others is over two off.
    """
    smallest = min(2, tokens)
    if tokens < 1 or not smallest <= steps <= tokens:
        wanted = f"a number of steps from {smallest} to {tokens}" if tokens >= 1 else "at least one token"
        raise ValueError(
            f"group_sizes: nothing decodes tokens={tokens} in steps={steps}, because the first group holds one token "
            f"and every other at least one; use {wanted}."
        )
    published = _PUBLISHED.get(tokens, {})
    return _expand(published[steps]) if steps in published else _ramp(tokens, steps)


def training_schedules(tokens: int) -> tuple[tuple[int, ...], ...]:
    """The group-size lists among which training draws one, uniformly, at every step of the optimiser.

    For 256 and 1024 tokens exactly the 9 and 14 published lists, most steps first. For any other N those of
    `group_sizes` for N, 3N/4, N/2, 3N/8, N/4, ... steps (rounded down), as far as the larger of 4 and N/32, where the
    published families end: 16 tokens get 16, 12, 8, 6 and 4 steps, 64 tokens 64, 48, 32, 24, 16, 12, 8, 6 and 4.

    Args:
      tokens: N >= 1, the number of tokens of the image.
    Returns:
      Distinct lists, each as `group_sizes` returns them.
    Raises:
      ValueError: if tokens < 1.
    Source: orders/group_sizes_training of mit-han-lab/lpd. Deviation: the family for other N is ours.
    """
    if tokens in _PUBLISHED:
        return tuple(_expand(runs) for runs in _PUBLISHED[tokens].values())
    counts = {tokens}
    for halvings in range(tokens.bit_length()):
        counts |= {tokens >> halvings, 3 * (tokens >> halvings) // 4}
    fewest = min(tokens, max(4, tokens // 32))
    return tuple(group_sizes(tokens, steps) for steps in sorted(counts, reverse=True) if steps >= fewest)


def group_of_rank(group_sizes: tuple[int, ...]) -> np.ndarray:
    """The 1-based group that decodes the token of each rank: the `groups` argument of `LPD.__call__`.

    Args:
      group_sizes: o_1..o_K, positive, sum N.
    Returns:
      [N] int32 NumPy array, non-decreasing from 1 to K; (1, 2, 3) gives 1 2 2 3 3 3.
    """
    return np.repeat(np.arange(1, len(group_sizes) + 1, dtype=np.int32), group_sizes)


def _expand(runs: str) -> tuple[int, ...]:
    """The sizes of a run-length list: "1x2 3" is 1, 1, 3."""
    pairs = (run.partition("x") for run in runs.split())
    return tuple(itertools.chain.from_iterable([int(size)] * int(count or 1) for size, _, count in pairs))


def _ramp(tokens: int, steps: int) -> tuple[int, ...]:
    """The cosine rule of `group_sizes`, corrected to sum to `tokens`."""
    cosines = [math.cos(math.pi * k / (2 * steps)) for k in range(steps + 1)]
    ideal = [tokens * (before - after) for before, after in itertools.pairwise(cosines)]
    sizes = [1] + [max(1, round(x)) for x in ideal[1:]]
    while (surplus := sum(sizes) - tokens) != 0:
        move = -1 if surplus > 0 else 1
        # A size may shrink to the one before it or grow to the one after it; the first stays 1, the last grows freely.
        # Some move always exists: with a surplus the first size above 1 can shrink, with a deficit the last can grow.
        neighbour = [0, *sizes[:-1]] if move < 0 else [*sizes[1:], math.inf]
        movable = [k for k in range(1, steps) if move * (neighbour[k] - sizes[k]) > 0]
        sizes[max(movable, key=lambda k: (move * (ideal[k] - sizes[k]), k))] += move
    return tuple(sizes)
