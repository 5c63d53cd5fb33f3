"""Attention over blocks in plain JAX, on every chip, forward and backward: memory that does not grow with T x S.

A block of queries meets the listed blocks of keys one after the other, with the running maximum and sum of
FlashAttention. Loops run over slices of the arrays as they lie and write where the result belongs, so nothing is
transposed or padded: beside inputs and outputs there is one block of logits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from pallas_kernels.block_sparse_attention.mask import RangeMask, block_table

ROWS, COLUMNS = 256, 256  # queries and keys of a block


def forward(q, k, v, mask: RangeMask, *, scale: float, soft_cap: float | None, heads_first: bool = False):
    """(o [B, T, N, H] in q's dtype, log-sum-exp [B, N, T] float32); arguments as `block_sparse_attention`."""
    heads, keys, axis = q.shape[2], k.shape[1 if heads_first else 2], 1 if heads_first else 2
    outs = []
    for part in _parts(mask, heads, keys):
        own = _take(q, part.queries, 2), _take(k, part.keys, axis), _take(v, part.keys, axis)
        outs.append(_forward(*own, part.ranges, scale=scale, soft_cap=soft_cap, heads_first=heads_first))
    o, lse = zip(*outs, strict=True)
    return _put_heads(mask, heads, keys, o, 2), _put_heads(mask, heads, keys, lse, 1)


def backward(q, k, v, o, lse, do, dlse, mask: RangeMask, *, scale: float, soft_cap: float | None):
    """(dq, dk, dv) in the dtypes of q, k and v; do and dlse are the cotangents of o and lse."""
    # The softmax's own term of the gradient, one number a row: sum over keys of P dP, less what reaches lse.
    delta = jnp.einsum("BTNH,BTNH->BNT", o, do, preferred_element_type=jnp.float32) - dlse
    grads = []
    for part in _parts(mask, q.shape[2], k.shape[2]):
        rows = {"do": _take(do, part.queries, 2)}
        rows |= {"lse": _take(lse, part.queries, 1), "delta": _take(delta, part.queries, 1)}
        own = _take(q, part.queries, 2), _take(k, part.keys, 2), _take(v, part.keys, 2)
        grads.append(_backward(*own, part.ranges, **rows, scale=scale, soft_cap=soft_cap))
    dq, dk, dv = zip(*grads, strict=True)
    return (
        _put_heads(mask, q.shape[2], k.shape[2], dq, 2),
        _put_heads(mask, q.shape[2], k.shape[2], dk, 2, of_keys=True),
        _put_heads(mask, q.shape[2], k.shape[2], dv, 2, of_keys=True),
    )


class _Part(NamedTuple):
    """Heads that walk the same blocks: all of a pattern where the patterns are known while tracing, else all there are.

    Attributes:
      keys, queries: numbers of the K and N heads.
      ranges: [1, B or 1, T, 4], or one for each query head of the part.
    """

    keys: tuple[int, ...]
    queries: tuple[int, ...]
    ranges: jax.Array


def _parts(mask: RangeMask, heads: int, keys: int) -> list[_Part]:
    if mask.pattern is None:
        return [_Part(tuple(range(keys)), tuple(range(heads)), mask.ranges)]
    if isinstance(mask.pattern, Tracer):
        return [_Part(tuple(range(keys)), tuple(range(heads)), mask.ranges[mask.pattern])]
    groups: dict[tuple[int, ...], list[int]] = {}
    for key, patterns in enumerate(np.asarray(mask.pattern).reshape(keys, -1).tolist()):
        groups.setdefault(tuple(patterns), []).append(key)
    size = heads // keys
    parts = []
    for patterns, members in groups.items():
        queries = tuple(key * size + head for key in members for head in range(size))
        chosen = np.asarray(patterns[:1] if len(set(patterns)) == 1 else patterns * len(members))
        parts.append(_Part(tuple(members), queries, mask.ranges[chosen]))
    return parts


def _take(array, heads: tuple[int, ...], axis: int):
    if len(heads) == array.shape[axis]:
        return array
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return lax.slice_in_dim(array, heads[0], heads[-1] + 1, axis=axis)
    return jnp.take(array, np.asarray(heads), axis=axis)


def _put_heads(mask: RangeMask, heads: int, keys: int, arrays, axis: int, *, of_keys: bool = False):
    """Arrays of the parts as one with the heads in their own order."""
    if len(arrays) == 1:
        return arrays[0]
    parts = _parts(mask, heads, keys)
    order = np.concatenate([part.keys if of_keys else part.queries for part in parts])
    joined = jnp.concatenate(arrays, axis=axis)
    return joined if (order == np.arange(len(order))).all() else jnp.take(joined, np.argsort(order), axis=axis)


class _Walk(NamedTuple):
    """How a part is walked: `steps` of (sample, `at_once` K heads, block of `rows` queries)."""

    batch: int
    turns: int
    blocks: int
    at_once: int
    rows: int
    columns: int
    ranges: jax.Array
    indices: jax.Array
    whole: jax.Array
    count: jax.Array

    def of(self, step):
        """(sample, first K head, first query, lists' row) of a step. The last block of queries is moved to fit in."""
        sample, rest = step // (self.turns * self.blocks), step % (self.turns * self.blocks)
        turn, block = rest // self.blocks, rest % self.blocks
        first = jnp.minimum(block * self.rows, self.ranges.shape[2] - self.rows)
        return sample, turn * self.at_once, first, (jnp.minimum(sample, self.indices.shape[0] - 1), block)


def _walk(q, slots, keys, ranges) -> _Walk:
    batch, queries = q.shape[:2]
    rows, columns = min(ROWS, queries), min(COLUMNS, slots)
    seen, whole = block_table(ranges, slots, rows=rows, columns=columns)
    if queries % rows:  # the last block is moved up and repeats rows of the one before it: it needs what both see
        last = block_table(ranges[..., -rows:, :], slots, rows=rows, columns=columns)
        seen, whole = (jnp.concatenate([a[..., :-1, :], b], axis=-2) for a, b in zip((seen, whole), last, strict=True))
    seen, whole = seen.any(axis=0), whole.all(axis=0)  # [B or 1, I, J]
    order = jnp.argsort(jnp.where(whole, 0, jnp.where(seen, 1, 2)), axis=-1, stable=True).astype(jnp.int32)
    # A CPU has its blocks in cache when it takes one head at a time; other chips want many at once.
    at_once = 1 if jax.default_backend() == "cpu" else keys
    whole, count = (jnp.sum(a, axis=-1, dtype=jnp.int32) for a in (whole, seen))
    return _Walk(batch, keys // at_once, seen.shape[-2], at_once, rows, columns, ranges, order, whole, count)


def _rows(walk: _Walk, array, sample, key, first):
    """A block's rows of [B, T, N, H]: [k, G, r, H]."""
    group = array.shape[2] // (walk.turns * walk.at_once)
    block = lax.dynamic_slice(
        array, (sample, first, key * group, 0), (1, walk.rows, walk.at_once * group, array.shape[3])
    )
    return block[0].reshape(walk.rows, walk.at_once, group, -1).transpose(1, 2, 0, 3)


def _flat(rows):
    """[k, G, r, H] as [1, r, k G, H], a slice of [B, T, N, H]."""
    return rows.transpose(2, 0, 1, 3).reshape(1, rows.shape[2], -1, rows.shape[3])


def _row_numbers(walk: _Walk, array, sample, key, first):
    """A block's numbers of [B, N, T]: [k, G, r, 1]."""
    group = array.shape[1] // (walk.turns * walk.at_once)
    block = lax.dynamic_slice(array, (sample, key * group, first), (1, walk.at_once * group, walk.rows))
    return block.reshape(walk.at_once, group, walk.rows, 1)


def _columns(walk: _Walk, array, sample, key, block, heads_first=False):
    """A block of keys or values of [B, S, K, H] or [B, K, S, H]: [k, c, H]. The last one is moved to fit in."""
    start = jnp.minimum(block * walk.columns, array.shape[2 if heads_first else 1] - walk.columns)
    if heads_first:
        return lax.dynamic_slice(array, (sample, key, start, 0), (1, walk.at_once, walk.columns, array.shape[3]))[0]
    block = lax.dynamic_slice(array, (sample, start, key, 0), (1, walk.columns, walk.at_once, array.shape[3]))
    return block[0].swapaxes(0, 1)


def _seen(walk: _Walk, slots, sample, key, first, block, group):
    """Which keys of a block the rows see, each key in one block only: [k or 1, G or 1, r, c]."""
    heads = walk.ranges.shape[0]
    sample = jnp.minimum(sample, walk.ranges.shape[1] - 1)
    size = 1 if heads == 1 else walk.at_once * group
    ranges = lax.dynamic_slice(
        walk.ranges, (0 if heads == 1 else key * group, sample, first, 0), (size, 1, walk.rows, 4)
    )
    ranges = ranges.reshape(1 if heads == 1 else walk.at_once, -1, walk.rows, 4)
    r0, r1, r2, r3 = (ranges[..., i, None] for i in range(4))
    begin = block * walk.columns
    slot = jnp.minimum(begin, slots - walk.columns) + jnp.arange(walk.columns, dtype=jnp.int32)
    return (((slot >= r0) & (slot < r1)) | ((slot >= r2) & (slot < r3))) & (slot >= begin)


def _logits(q, k, scale, soft_cap):
    logits = jnp.einsum("KGRH,KCH->KGRC", q, k, preferred_element_type=jnp.float32) * scale
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _forward(q, k, v, ranges, *, scale, soft_cap, heads_first):
    slots, keys = (k.shape[2], k.shape[1]) if heads_first else k.shape[1:3]
    walk = _walk(q, slots, keys, ranges)
    group = q.shape[2] // keys

    def step(number, outs):
        sample, key, first, row = walk.of(number)
        queries = _rows(walk, q, sample, key, first)

        def meet(at, carry, *, masked):
            largest, total, weighted = carry
            block = walk.indices[*row, at]
            logits = _logits(queries, _columns(walk, k, sample, key, block, heads_first), scale, soft_cap)
            if masked:
                seen = _seen(walk, slots, sample, key, first, block, group)
                logits = jnp.where(seen, logits, -jnp.inf)
            larger = jnp.maximum(largest, logits.max(axis=-1, keepdims=True))
            weights, kept = jnp.exp(logits - larger), jnp.exp(largest - larger)
            values = _columns(walk, v, sample, key, block, heads_first)
            values = jnp.einsum("KGRC,KCH->KGRH", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
            return larger, total * kept + weights.sum(axis=-1, keepdims=True), weighted * kept + values

        # The lowest number instead of -inf: a row that has seen nothing must not subtract one infinity from another.
        largest = jnp.full((*queries.shape[:-1], 1), jnp.finfo(jnp.float32).min)
        carry = largest, jnp.zeros_like(largest), jnp.zeros(queries.shape, jnp.float32)
        whole, count = walk.whole[row], walk.count[row]
        carry = lax.fori_loop(0, whole, functools.partial(meet, masked=False), carry)
        largest, total, weighted = lax.fori_loop(whole, count, functools.partial(meet, masked=True), carry)
        o = weighted / jnp.where(total == 0, 1, total)
        lse = jnp.where(total == 0, -jnp.inf, largest + jnp.log(total))
        return (
            lax.dynamic_update_slice(outs[0], _flat(o).astype(q.dtype), (sample, first, key * group, 0)),
            lax.dynamic_update_slice(outs[1], lse.reshape(1, -1, walk.rows), (sample, key * group, first)),
        )

    outs = jnp.zeros(q.shape, q.dtype), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return lax.fori_loop(0, walk.batch * walk.turns * walk.blocks, step, outs)


def _backward(q, k, v, ranges, *, do, lse, delta, scale, soft_cap):
    walk = _walk(q, k.shape[1], k.shape[2], ranges)
    group = q.shape[2] // k.shape[2]
    own = q.shape[1] - (walk.blocks - 1) * walk.rows  # rows of the last block that none before it has

    def step(number, grads):
        sample, key, first, row = walk.of(number)
        queries, cotangent = (_rows(walk, array, sample, key, first) for array in (q, do))
        shift, less = (_row_numbers(walk, array, sample, key, first) for array in (lse, delta))
        # Rows that see nothing weigh nothing, and rows that the block before has counted are not counted again.
        repeated = (row[1] == walk.blocks - 1) & (jnp.arange(walk.rows)[:, None] < walk.rows - own)
        shift = jnp.where((shift == -jnp.inf) | repeated, jnp.inf, shift)

        def meet(at, grads, *, masked):
            dq, dk, dv = grads
            block = walk.indices[*row, at]
            keys, values = (_columns(walk, array, sample, key, block) for array in (k, v))
            logits = _logits(queries, keys, scale, soft_cap)
            weights = jnp.exp(logits - shift)
            if masked:
                weights = jnp.where(_seen(walk, k.shape[1], sample, key, first, block, group), weights, 0)
            dweights = jnp.einsum("KGRH,KCH->KGRC", cotangent, values, preferred_element_type=jnp.float32)
            dlogits = weights * (dweights - less) * scale
            if soft_cap is not None:
                dlogits *= 1 - jnp.square(logits / soft_cap)
            weights, dlogits = weights.astype(do.dtype), dlogits.astype(q.dtype)
            dq += jnp.einsum("KGRC,KCH->KGRH", dlogits, keys, preferred_element_type=jnp.float32)
            start = sample, jnp.minimum(block * walk.columns, k.shape[1] - walk.columns), key, 0

            def add(total, einsum, left, right):
                new = jnp.einsum(einsum, left, right, preferred_element_type=jnp.float32).swapaxes(0, 1)[None]
                old = lax.dynamic_slice(total, start, new.shape)
                return lax.dynamic_update_slice(total, old + new, start)

            dk = add(dk, "KGRC,KGRH->KCH", dlogits, queries)
            dv = add(dv, "KGRC,KGRH->KCH", weights, cotangent)
            return dq, dk, dv

        dq, dk, dv = grads
        whole, count = walk.whole[row], walk.count[row]
        carry = jnp.zeros(queries.shape, jnp.float32), dk, dv
        carry = lax.fori_loop(0, whole, functools.partial(meet, masked=False), carry)
        rows, dk, dv = lax.fori_loop(whole, count, functools.partial(meet, masked=True), carry)
        start = sample, first, key * group, 0
        rows = _flat(jnp.where(repeated, _rows(walk, dq, sample, key, first), rows.astype(dq.dtype)))
        return lax.dynamic_update_slice(dq, rows, start), dk, dv

    grads = jnp.zeros(q.shape, q.dtype), jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dq, dk, dv = lax.fori_loop(0, walk.batch * walk.turns * walk.blocks, step, grads)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)
