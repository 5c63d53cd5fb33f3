"""In which order LPD decodes the cells of the token grid: chosen on the device, one order per image.

Locality-aware Parallel Decoding (arXiv:2507.01957) wants the tokens of one group far apart, because they are drawn
independently of each other, and each of them near tokens that are already known, because those predict it.
`locality_order` does both; `proximity_order` and `dispersion_order` are the two halves alone, `random_order` and
`raster_order` neither.

An order is an int32 vector: entry j is the raster index (row * columns + column) of the cell decoded at rank j. The
functions are made of plain array operations: call them under `jax.jit`, and under `jax.vmap` over the key for a batch.
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Kind = Literal["locality", "raster", "random", "proximity", "dispersion"]

# The proximity score of a cell with a orthogonal and b diagonal known neighbours is a + b / sqrt(2), a and b in 0..4.
# We count 10 a + 7 b instead: integers that order, and tell apart, those 25 sums exactly as the real numbers do, so
# equal scores are equal and the shuffle alone breaks ties.
_ORTHOGONAL, _DIAGONAL = 10, 7
_HIGHEST_SCORE = 4 * (_ORTHOGONAL + _DIAGONAL)

# A cell's preference packs (tier, ticket) in 31 bits; the upper 8 hold the 2 * (_HIGHEST_SCORE + 1) = 138 tiers.
_TICKET_BITS = 23

# In place of a squared distance to the cells picked for the group, and the merit of cells the greedy scan may take.
_TAKEN, _UNSEEN, _CANDIDATE = -1, 2**30, 2**31 - 1


def make_order(
    kind: Kind,
    key: jax.Array,
    group_sizes: tuple[int, ...],
    grid: tuple[int, int] | int,
    *,
    proximity_threshold: float = 1.0,
    repulsion_threshold: float = 2,
    known: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """A decoding order by name, so that a config can choose; the function of that name says what it computes.

    Args:
      kind: "locality", "raster", "random", "proximity" or "dispersion".
      key: PRNG key; "raster" makes no use of it.
      group_sizes: sizes of the decoding groups, static; they sum to the number of cells to be ordered.
      grid: (rows, columns), or the side of a square grid.
      proximity_threshold: for "locality" and "proximity"; the others have no such notion.
      repulsion_threshold: for "locality"; the others have no such notion.
      known: [rows * columns] bool, cells that are already decoded and stay out of the order.
    Returns:
      [sum(group_sizes)] int32 raster indices.
    Raises:
      ValueError: if kind is unknown, or an argument does not fit the function it is for.
    """
    if kind == "locality":
        return locality_order(
            key,
            group_sizes,
            grid,
            proximity_threshold=proximity_threshold,
            repulsion_threshold=repulsion_threshold,
            known=known,
        )
    if kind == "proximity":
        return proximity_order(key, group_sizes, grid, proximity_threshold=proximity_threshold, known=known)
    if kind == "dispersion":
        return dispersion_order(key, group_sizes, grid, known=known)
    if kind == "random":
        return random_order(key, group_sizes, grid, known=known)
    if kind == "raster":
        return raster_order(group_sizes, grid, known=known)
    raise ValueError(f"make_order: kind={kind!r}; wanted one of {', '.join(map(repr, get_args(Kind)))}.")


def locality_order(
    key: jax.Array,
    group_sizes: tuple[int, ...],
    grid: tuple[int, int] | int,
    *,
    proximity_threshold: float = 1.0,
    repulsion_threshold: float = 2,
    known: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """The locality-aware order of LPD: every group spread out, every cell of it near what is known.

    For each group, with S the cells known or chosen for earlier groups:

    1. Every free cell gets the score sum of 1 / distance over its neighbours in S, the 3 x 3 window around it: 1 for
       each orthogonal and 1 / sqrt(2) for each diagonal one. The free cells are shuffled, then sorted by falling score.
    2. Those with score >= proximity_threshold are scanned in that sequence. A cell is picked unless a cell picked for
       this group lies within repulsion_threshold rows and columns of it, until the group is full.
    3. If it is not full, farthest-point sampling fills it from the cells below the threshold followed by those
       rejected in 2: again and again the cell with the largest Euclidean distance to the group's picks, the first of
       equals; a uniformly random cell if there are no picks. A group that needs all of them takes them in sequence.

    Nothing is known at first, so the order starts at a uniformly random cell.

    Args:
      key: PRNG key. The draws depend on nothing else, so an image can have a key and thereby an order of its own.
      group_sizes: o_1..o_K >= 1, static, in decoding order, summing to the number of free cells. The published
        schedules start with one cell; a larger first group would be filled by step 3.
      grid: (rows, columns), or the side of a square grid.
      proximity_threshold: static, in units of the score, which goes from 0 to 4 + 4 / sqrt(2) = 6.83.
      repulsion_threshold: static, >= 0, in cells (Chebyshev distance, inclusive); 0 switches repulsion off.
        Published: 2 for 256 px (3 for the XXL model in 20 steps) and 4 for 512 px.
      known: [rows * columns] bool, raster order: cells known from the start, as in editing. They seed S and stay out
        of the order. How many they are is static (all cells less the sum of group_sizes); which ones may be traced.
    Returns:
      [sum(group_sizes)] int32 raster indices, each free cell once.
    Raises:
      ValueError: if group_sizes do not sum to the number of free cells, or grid, repulsion_threshold or known make no
        sense. The number of known cells is not checked where `known` is traced.
    Source: arXiv:2507.01957; orders/lpd_order.py of mit-han-lab/lpd, which this equals cell by cell for equal shuffles.
    Deviation: equal scores are exactly equal here. The original adds floating-point numbers in the order the cells
    were chosen, and a difference in the last bit then overrides the shuffle (1 of 40 orders of 256 tokens in 20 steps).
    """
    rows, columns = _check("locality_order", group_sizes, grid, known)
    if not repulsion_threshold >= 0:
        raise ValueError(
            f"locality_order: repulsion_threshold={repulsion_threshold}; wanted a distance in cells >= 0; "
            "0 switches repulsion off."
        )
    tickets = _draw_tickets(key, (len(group_sizes), rows * columns))
    repulsion = math.floor(min(repulsion_threshold, rows + columns))  # beyond the grid is as good as infinite
    return _order_from_tickets(
        tickets, group_sizes, (rows, columns), _score_cutoff(proximity_threshold), repulsion, known
    )


def proximity_order(
    key: jax.Array,
    group_sizes: tuple[int, ...],
    grid: tuple[int, int] | int,
    *,
    proximity_threshold: float = 1.0,
    known: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """The proximity principle alone: each group takes the cells with the highest score, adjacent to each other or not.

    This is `locality_order` with repulsion_threshold = 0, which explains the arguments and errors; where too few cells
    reach the threshold, farthest-point sampling still fills the group.

    Source: ablation of arXiv:2507.01957 (FID 2.00, against 1.92 with both principles; XL, 256 px, 32 steps).
    """
    return locality_order(
        key, group_sizes, grid, proximity_threshold=proximity_threshold, repulsion_threshold=0, known=known
    )


def dispersion_order(
    key: jax.Array,
    group_sizes: tuple[int, ...],
    grid: tuple[int, int] | int,
    *,
    known: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """The low-dependency principle alone: each group starts at a random free cell and grows by farthest-point sampling.

    The next cell is the free one with the largest Euclidean distance to the group's picks, a random one of equals.
    Cells of earlier groups play no part, except that they are not free. The last group takes what is left in random
    sequence. Arguments and errors as in `locality_order`.

    Source: ablation of arXiv:2507.01957 (FID 2.06; XL, 256 px, 32 steps), whose code is not published. Deviation: to
    spread the group by farthest-point sampling alone, without a repulsion window, is our reading.
    """
    rows, columns = _check("dispersion_order", group_sizes, grid, known)
    tickets = _draw_tickets(key, (len(group_sizes), rows * columns))
    nothing_is_near = _score_cutoff(math.inf)
    return _order_from_tickets(tickets, group_sizes, (rows, columns), nothing_is_near, 0, known, scored=False)


def random_order(
    key: jax.Array,
    group_sizes: tuple[int, ...],
    grid: tuple[int, int] | int,
    *,
    known: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """A uniformly random order of the free cells; arguments and errors as in `locality_order`."""
    rows, columns = _check("random_order", group_sizes, grid, known)
    return _free_cells(jax.random.permutation(key, rows * columns), group_sizes, known)


def raster_order(
    group_sizes: tuple[int, ...],
    grid: tuple[int, int] | int,
    *,
    known: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """The free cells row by row, each row from left to right; arguments and errors as in `locality_order`."""
    rows, columns = _check("raster_order", group_sizes, grid, known)
    return _free_cells(jnp.arange(rows * columns), group_sizes, known)


def _check(name, group_sizes, grid, known) -> tuple[int, int]:
    """The grid as (rows, columns), after checking that the groups cover its free cells."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    cells = rows * columns
    if rows < 1 or columns < 1:
        raise ValueError(f"{name}: grid={grid}; wanted (rows, columns) or the side of a square, all >= 1.")
    if not group_sizes or min(group_sizes) < 1:
        raise ValueError(f"{name}: group_sizes={group_sizes}; wanted one group or more, each of one cell or more.")
    free = cells
    if known is not None:
        if known.shape != (cells,) or known.dtype != bool:
            raise ValueError(
                f"{name}: known is {known.dtype}{list(known.shape)}; wanted bool[{cells}], one flag for each cell of "
                f"the {rows} x {columns} grid in raster order."
            )
        # Which cells are known may be traced; how many they are is then the caller's promise.
        free = min(sum(group_sizes), cells) if isinstance(known, Tracer) else cells - int(np.sum(known))
    if sum(group_sizes) != free:
        raise ValueError(
            f"{name}: group_sizes sum to {sum(group_sizes)}, but {free} cells of the {rows} x {columns} grid are free; "
            f"use sizes that sum to {free}."
        )
    return rows, columns


def _free_cells(sequence, group_sizes, known):
    """The cells of `sequence` [cells] that are not known, in its order."""
    if known is not None:
        sequence = sequence[jnp.argsort(jnp.asarray(known)[sequence], stable=True)]
    return sequence[: sum(group_sizes)].astype(jnp.int32)


def _score_cutoff(threshold: float) -> int:
    """The smallest integer score 10 a + 7 b with a + b / sqrt(2) >= threshold; above every score if there is none."""
    reached = [_ORTHOGONAL * a + _DIAGONAL * b for a in range(5) for b in range(5) if a + b / math.sqrt(2) >= threshold]
    return min(reached, default=_HIGHEST_SCORE + 1)


def _draw_tickets(key, shape):
    """Uniform integers in [0, 2**23); of two equal ones (1 pair in 8 million) the lower raster index comes first."""
    return (jax.random.bits(key, shape, jnp.uint32) >> (32 - _TICKET_BITS)).astype(jnp.int32)


class _Rules(NamedTuple):
    """What decides an order, besides the sizes of the groups."""

    tickets: jax.Array  # [K, cells] int32 in [0, 2**23): the shuffle of each group, highest first
    row: np.ndarray | jax.Array  # [cells] int32
    column: np.ndarray | jax.Array  # [cells] int32
    cutoff: int | jax.Array  # smallest integer score of a near cell
    repulsion: int | jax.Array  # largest Chebyshev distance at which a pick rejects others


class _State(NamedTuple):
    """Where the scan over picks stands; all [cells]."""

    score: jax.Array  # int32, integer score with respect to all known and picked cells, this group's included
    preference: jax.Array  # int32, (tier, ticket) by the scores at the beginning of the group; higher comes first
    candidate: jax.Array  # bool, near cells that no pick of this group has taken or rejected
    distance: jax.Array  # int32, squared distance to the group's picks; _UNSEEN while there are none, _TAKEN for good


def _order_from_tickets(tickets, group_sizes, grid, cutoff, repulsion, known, *, scored=True):
    """`locality_order` for given tickets [K, cells] and integer cutoff; without `scored` all scores are 0.

    Where the fill starts with nothing picked, it starts at the free cell with the highest ticket: a uniform draw that
    leaves the others in random sequence.
    """
    cell = np.arange(grid[0] * grid[1], dtype=np.int32)
    rules = _Rules(tickets, cell // grid[1], cell % grid[1], cutoff, repulsion)
    known = jnp.zeros(cell.size, bool) if known is None else jnp.asarray(known)
    return _run(rules, _picks(group_sizes), known, grid=grid, scored=scored)


def _picks(group_sizes):
    """For each pick: the index of its group, whether it is the group's first, whether the group is the last."""
    group = np.repeat(np.arange(len(group_sizes), dtype=np.int32), group_sizes)
    return group, np.diff(group, prepend=-1) > 0, group == len(group_sizes) - 1


@functools.partial(jax.jit, static_argnames=("grid", "scored"))
def _run(rules, picks, known, *, grid, scored):
    """All picks. Group sizes and thresholds are operands: one program for each number of cells, groups and picks."""
    state = _begin(known, grid, scored)
    return jax.lax.scan(lambda state, pick: _pick(rules, state, pick, scored), state, picks)[1]


def _begin(known, grid, scored) -> _State:
    """The state before the first pick; `known` [cells] bool."""
    padded = jnp.pad(known.reshape(grid).astype(jnp.int32), 1)  # [rows + 2, columns + 2]
    score = jnp.zeros(grid, jnp.int32)
    for down in (-1, 0, 1) if scored else ():
        for right in (-1, 0, 1):
            weight = (0, _ORTHOGONAL, _DIAGONAL)[abs(down) + abs(right)]
            score += weight * padded[1 + down : 1 + down + grid[0], 1 + right : 1 + right + grid[1]]
    return _State(
        score=score.reshape(-1),
        preference=jnp.zeros(known.shape, jnp.int32),
        candidate=jnp.zeros(known.shape, bool),
        distance=jnp.where(known, _TAKEN, _UNSEEN).astype(jnp.int32),
    )


def _pick(rules: _Rules, state: _State, pick, scored) -> tuple[_State, jax.Array]:
    """One pick, in time proportional to the cells: the new state and the raster index of the cell.

    The lists of the algorithm need not be built. What the greedy scan takes next is the most preferred near cell that
    no pick has rejected; once there is none, the scan is over for this group and the pool is everything that is free.
    Both are one lexicographic argmax: over merit (distance, with candidates on top), then over preference.
    """
    group, is_first, in_last_group = pick
    score, preference, candidate, distance = state

    # At a new group the scores come into force, the shuffle is a new one and no cell is picked yet.
    free = distance != _TAKEN
    near = score >= rules.cutoff
    tier = jnp.where(near, score, score + _HIGHEST_SCORE + 1)  # the pool has the far cells first
    preference = jnp.where(is_first, (tier << _TICKET_BITS) | rules.tickets[group], preference)
    candidate = jnp.where(is_first, near & free, candidate)
    distance = jnp.where(is_first & free, _UNSEEN, distance)

    merit = jnp.where(candidate, _CANDIDATE, distance)
    best = jnp.max(merit)
    # With neither candidates nor picks the start is random: the highest ticket of any tier. The last group, however,
    # needs the whole pool and takes it in sequence; below, its distances stay equal for that.
    ticket = preference & (2**_TICKET_BITS - 1)
    tie_break = jnp.where((best == _UNSEEN) & ~in_last_group, ticket, preference)
    cell = jnp.argmax(jnp.where(merit == best, tie_break, -1)).astype(jnp.int32)

    down, right = rules.row - rules.row[cell], rules.column - rules.column[cell]
    squared = down**2 + right**2
    candidate &= jnp.maximum(abs(down), abs(right)) > rules.repulsion
    distance = jnp.where(in_last_group, distance, jnp.minimum(distance, squared))
    distance = jnp.where(squared == 0, _TAKEN, distance)
    if scored:
        score += jnp.where(squared == 1, _ORTHOGONAL, 0) + jnp.where(squared == 2, _DIAGONAL, 0)
    return _State(score, preference, candidate, distance), cell
