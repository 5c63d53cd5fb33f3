"""Parallel decoding with fused encode + decode steps, as one program from labels to codes.

Source: LPD (arXiv:2507.01957), `LPD.sample_tokens` of mit-han-lab/lpd. Step i runs the tokens of block i (decoded one
step before, now entering the cache) together with the queries of block i + 1, so K groups take exactly K passes. The
keys and values that queries write occupy the slots of block i + 1 and are overwritten when its tokens come back.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lumen.sampling
from lumen.attention import attend
from lumen.generation.lpd.model import LPD
from lumen.generation.lpd.order import Kind, locality_order, make_order
from lumen.generation.lpd.schedule import group_sizes as group_sizes_of
from lumen.generation.vq import VQModel, to_uint8
from lumen.layers import run_layers
from lumen.sampling import draw
from lumen.sharding import constrain

Mode = Literal["unrolled", "scan", "bucketed"]


@dataclasses.dataclass(frozen=True)
class Sampling(lumen.sampling.Sampling):
    """How a code is drawn from the logits: guidance in logit space, then as in `lumen.sampling.Sampling`.

    Attributes:
      guidance: classifier-free guidance scale s; logits are u + s_j (c - u). The number 1 is off and halves the work; a
        traced scalar never is, and serves many scales with one program.
      schedule: "linear": s_j = 1 + (s - 1) j / N grows with the rank j of the token; "constant": s_j = s.
    """

    guidance: float | jax.Array = 1.0
    schedule: Literal["linear", "constant"] = "linear"

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"Sampling: schedule={self.schedule!r}; wanted 'linear' or 'constant'.")

    @property
    def guided(self) -> bool:
        """Whether the unconditional rows are needed."""
        return not (isinstance(self.guidance, int | float) and self.guidance == 1)


def guide(logits, ranks, tokens: int, sampling: Sampling):
    """Guided logits [B, G, V] from [2B, G, V] (conditional, unconditional, ...) at ranks [G] of `tokens` in all."""
    if not sampling.guided:
        return logits
    conditional, unconditional = logits[0::2], logits[1::2]
    progress = ranks / tokens if sampling.schedule == "linear" else jnp.ones_like(ranks, jnp.float32)
    scale = (1.0 + (sampling.guidance - 1.0) * progress)[:, None]
    return unconditional + scale * (conditional - unconditional)


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Consecutive steps run by one compiled body."""

    first: int
    last: int  # inclusive
    rows: int  # W: rows per pass
    queries: int  # G: query rows that reach the head
    slots: int  # S: leading cache slots that attention reads


def plan_segments(group_sizes: Sequence[int], mode: Mode, buckets: int = 4) -> list[_Segment]:
    """Splits K steps into segments of one padded shape each.

    "unrolled": one segment a step, no padding, K bodies to compile. "scan": one segment padded to the largest step,
    one body. "bucketed": `buckets` segments, chosen so that the rows processed in all are fewest.
    """
    blocks = (1, *group_sizes)
    steps = len(group_sizes)
    starts = np.concatenate([[0], np.cumsum(blocks)])

    def segment(first, last):
        queries = max(group_sizes[first : last + 1])
        rows = max(blocks[first : last + 1]) + queries
        return _Segment(first, last, rows, queries, max(int(starts[i]) + rows for i in range(first, last + 1)))

    if mode == "unrolled":
        return [segment(i, i) for i in range(steps)]
    if mode == "scan":
        return [segment(0, steps - 1)]
    if mode != "bucketed":
        raise ValueError(f"plan_segments: mode={mode!r}; wanted 'unrolled', 'scan' or 'bucketed'.")
    # Fewest rows in all for the first i steps in b segments: a dynamic programme over segment ends.
    best: list[tuple[int, list[_Segment]]] = [(0, [])] + [(1 << 60, [])] * steps
    for _ in range(min(buckets, steps)):
        longer = list(best)
        for last in range(steps):
            for first in range(last + 1):
                new = segment(first, last)
                cost = best[first][0] + new.rows * (last - first + 1)
                if cost < longer[last + 1][0]:
                    longer[last + 1] = (cost, [*best[first][1], new])
        best = longer
    return best[steps][1]


def generate_codes(
    model: LPD,
    labels,
    orders,
    keys,
    *,
    group_sizes: Sequence[int],
    sampling: Sampling = Sampling(),
    mode: Mode = "bucketed",
    forced=None,
    return_logits: bool = False,
):
    """Generates the codes of B images; to be jitted, and holds no host callback.

    Args:
      model: the transformer.
      labels: [B] int32 classes, or None for unconditional sampling (the null class is the condition).
      orders: [B, N] int32, the raster index of the token of rank j.
      keys: [B] typed PRNG keys, one per image.
      group_sizes: o_1 .. o_K, static; they sum to N.
      sampling: guidance, temperature, filtering.
      mode: how steps are padded and compiled, see `plan_segments`; the codes are the same.
      forced: None, or (codes [B, N] int32, mask [B, N] bool) in raster order: where the mask is True the given code is
        taken instead of a drawn one. Teacher forcing for tests, and what keeps known tokens in editing.
      return_logits: also return the raw logits [B or 2B, N, V] in rank order (conditional, unconditional of image 0,
        then of image 1, ...: both stay on the device that has the image).

    Returns:
      [B, N] int32 codes in raster order.
    """
    count = model.config.tokens
    if sum(group_sizes) != count or min(group_sizes) < 1:
        raise ValueError(f"generate_codes: group_sizes sum to {sum(group_sizes)}; wanted {count} in groups of >= 1.")
    batch = orders.shape[0]
    guided = sampling.guided
    segments = plan_segments(group_sizes, mode)
    blocks = np.asarray((1, *group_sizes))
    starts = np.concatenate([[0], np.cumsum(blocks)])  # first cache slot of each block
    slots = max(segment.slots for segment in segments)  # over-allocated: dynamic slices clamp silently

    # Slot 0 is the class, slot j + 1 the token of rank j.
    positions = jnp.pad(orders + 1, ((0, 0), (1, slots - count - 1)))  # [B, slots]
    codes = jnp.zeros((batch, slots), jnp.int32)
    class_vectors = _class_vectors(model, labels, batch, guided)  # [B or 2B, D]
    known = None
    if forced is not None:
        by_rank = [jnp.take_along_axis(array, orders, axis=1) for array in forced]
        known = [jnp.pad(array, ((0, 0), (1, slots - count - 1))) for array in by_rank]
    config = model.config
    cache_shape = (config.depth, class_vectors.shape[0], slots, config.heads, config.width // config.heads)
    cache = (jnp.zeros(cache_shape, class_vectors.dtype),) * 2
    logits_kept = jnp.zeros((class_vectors.shape[0], slots, config.vocabulary)) if return_logits else None

    def step(carry, start, previous, wanted, segment: _Segment):
        """One fused pass: `previous` tokens from slot `start` on enter the cache, `wanted` queries are answered."""
        codes, cache, logits_kept = carry
        row = jnp.arange(segment.rows)
        is_token = (row < previous)[:, None]
        slot_codes = jax.lax.dynamic_slice_in_dim(codes, start, segment.rows, axis=1)
        slot_positions = jax.lax.dynamic_slice_in_dim(positions, start, segment.rows, axis=1)
        x = jnp.where(is_token, model.token_embedding[...][slot_codes], model.mask_token[...])  # [B, W, D]
        x = x + model.position_embedding[...][slot_positions]
        x = jnp.repeat(x, 2, axis=0) if guided else x
        class_row = class_vectors[:, None] + model.position_embedding[0]
        x = model.input_norm(jnp.where((start + row == 0)[:, None], class_row, x))
        # Tokens see the blocks up to their own, queries also each other; padding rows are seen by nobody.
        visible = start + previous + jnp.where(row < previous, 0, wanted)
        mask = jnp.arange(segment.slots) < visible[:, None]  # [W, S]

        def queries(array, axis):
            return jax.lax.dynamic_slice_in_dim(array, previous, segment.queries, axis)

        rows, cache = _cached_blocks(model, x, mask, cache, start, segment.slots, queries)
        logits = model.logits(rows)  # [B or 2B, G, V]
        first_slot = start + previous
        ranks = first_slot - 1 + jnp.arange(segment.queries)
        chosen = draw(guide(logits, ranks, count, sampling), keys, ranks, sampling)
        if known is not None:
            code, mask = (jax.lax.dynamic_slice_in_dim(a, first_slot, segment.queries, axis=1) for a in known)
            chosen = jnp.where(mask, code, chosen)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, first_slot, axis=1)
        if logits_kept is not None:
            logits_kept = jax.lax.dynamic_update_slice_in_dim(logits_kept, logits, first_slot, axis=1)
        return codes, cache, logits_kept

    carry = (codes, cache, logits_kept)
    for segment in segments:
        if segment.first == segment.last:
            first = segment.first
            carry = step(carry, int(starts[first]), int(blocks[first]), int(blocks[first + 1]), segment)
            continue

        def body(carry, step_at, segment=segment):
            start, previous, wanted = step_at
            return step(carry, start, previous, wanted, segment), None

        steps = slice(segment.first, segment.last + 1)
        steps_at = [jnp.asarray(array[steps]) for array in (starts[:-1], blocks, blocks[1:])]
        carry, _ = jax.lax.scan(body, carry, steps_at)
    codes, _, logits_kept = carry
    rank_of_cell = jnp.argsort(orders, axis=1)  # a gather stays on its device where a scatter would not
    raster = jnp.take_along_axis(codes[:, 1 : count + 1], rank_of_cell, axis=1)
    return raster if logits_kept is None else (raster, logits_kept[:, 1 : count + 1])


def generate_images(
    model: LPD,
    tokenizer: VQModel,
    labels,
    keys,
    *,
    group_sizes: Sequence[int],
    sampling: Sampling = Sampling(),
    order: Kind = "locality",
    repulsion_threshold: int = 2,
    mode: Mode = "bucketed",
):
    """From labels to pixels in one program: orders, codes and decoded images.

    Args:
      model: the transformer.
      tokenizer: the VQ model whose codes it was trained on.
      labels: [B] int32, or None for unconditional sampling.
      keys: [B] typed PRNG keys; an image depends on its own key and label only.
      group_sizes: see `schedule.group_sizes`.
      sampling: guidance, temperature, filtering.
      order: a kind of `order.make_order`; each image gets an order of its own.
      repulsion_threshold: of locality orders.
      mode: see `plan_segments`.

    Returns:
      (images [B, H, W, 3] uint8, codes [B, N] int32 in raster order, orders [B, N] int32).
    """
    grid = model.config.grid
    order_keys, draw_keys = (jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(2))
    orders = jax.vmap(
        lambda key: make_order(order, key, tuple(group_sizes), grid, repulsion_threshold=repulsion_threshold)
    )(order_keys)
    codes = generate_codes(model, labels, orders, draw_keys, group_sizes=group_sizes, sampling=sampling, mode=mode)
    return to_uint8(tokenizer.decode_codes(codes, grid=(grid, grid))), codes, orders


def edit_codes(
    model: LPD,
    codes,
    labels,
    keys,
    *,
    region: np.ndarray,
    steps: int,
    sampling: Sampling = Sampling(),
    prefill_groups: int = 1,
    repulsion_threshold: int = 2,
    mode: Mode = "bucketed",
):
    """Regenerates part of an image: inpainting, outpainting, and with another label class-conditional editing.

    The kept cells are encoded first, as `prefill_groups` blocks, and never change; the cells of the region are then
    decoded in a locality order that is seeded with the kept ones.

    Args:
      model: the transformer.
      codes: [B, N] int32 codes of the images, raster order.
      labels: [B] int32 classes to generate the region as.
      keys: [B] typed PRNG keys.
      region: [grid, grid] bool, static; True where the image is generated anew.
      steps: groups that the region is decoded in.
      sampling: guidance, temperature, filtering.
      prefill_groups: blocks that the kept cells are split into. Training has seen blocks of up to 50 tokens.
      repulsion_threshold: of the locality order.
      mode: see `plan_segments`.

    Returns:
      [B, N] int32 codes, equal to the given ones outside the region.

    Source: LPD section 4.3 describes editing without code; it draws the missing cells in random order.
    """
    grid = model.config.grid
    region = np.asarray(region, bool)
    if region.shape != (grid, grid):
        raise ValueError(f"edit_codes: region has shape {region.shape}; wanted one bool per code, {(grid, grid)}.")
    kept, free = np.flatnonzero(~region), int(region.sum())
    if free == 0:
        return codes
    prefill = [len(part) for part in np.array_split(kept, min(prefill_groups, len(kept)))] if len(kept) else []
    sizes = group_sizes_of(free, min(steps, free))
    known = jnp.asarray(~region.ravel())

    def order_of(key):
        free_order = locality_order(key, sizes, grid, repulsion_threshold=repulsion_threshold, known=known)
        return jnp.concatenate([jnp.asarray(kept, jnp.int32), free_order])

    order_keys, draw_keys = (jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(2))
    return generate_codes(
        model,
        labels,
        jax.vmap(order_of)(order_keys),
        draw_keys,
        group_sizes=(*prefill, *sizes),
        sampling=sampling,
        mode=mode,
        forced=(codes, jnp.broadcast_to(known, codes.shape)),
    )


def _class_vectors(model, labels, batch, guided):
    """The vectors of slot 0: the class, and with guidance the null class after each."""
    null = jnp.broadcast_to(model.null_class[...], (batch, model.config.width))
    condition = null if labels is None else model.embed_class(labels)
    return jnp.stack([condition, null], axis=1).reshape(2 * batch, -1) if guided else condition


def _cached_blocks(model, x, mask, cache, start, slots: int, wanted):
    """All blocks over rows x [B, W, D] at cache slots start .. start + W - 1; attention reads the first `slots`.

    Returns the rows [B, G, D] that `wanted` cuts out of W (it takes an array and the axis of W), and the cache.
    """

    def layer(carry, block, index, cut=lambda array, axis: array):
        x, *caches = carry
        x = constrain(x, "batch", None, None)
        q, *rows = block.heads(x)
        at = (index, 0, start, 0, 0)
        caches = [jax.lax.dynamic_update_slice(old, new[None], at) for old, new in zip(caches, rows, strict=True)]
        seen = [jax.lax.dynamic_index_in_dim(array, index, keepdims=False)[:, :slots] for array in caches]
        return block.finish(cut(x, 1), attend(cut(q, 1), *seen, mask=cut(mask, 0))), *caches

    if not isinstance(model.blocks, nnx.List):
        x, *cache = run_layers(layer, (x, *cache), model.blocks)
        return wanted(x, 1), tuple(cache)
    # Of the last layer, tokens need their keys and values only: half of its rows are left out.
    *first, last = model.blocks
    carry = run_layers(layer, (x, *cache), first)
    x, *cache = layer(carry, last, len(first), wanted)
    return x, tuple(cache)
