"""Block-sparse FlashAttention for Hopper in Pallas Mosaic GPU: forward and backward, every head with its own mask.

A thread block owns 128 queries of a head and walks the list of key blocks that its mask shows them; lists are data, so
dense and streaming heads share a launch and each costs its own blocks. One warpgroup follows the list and streams keys
and values with TMA; two warpgroups of 64 queries multiply on the tensor cores.

    forward:  S = Q K.T,  o and lse by online softmax                 over the key blocks of 128 queries
    dq:       dS = P * (dO V.T - delta),  dq = dS K                   over the same lists
    dk, dv:   dv = P.T dO,  dk = dS.T Q                               over the query blocks of 128 keys

Nothing is added atomically and every sum has one order, so results repeat exactly. The heads that share a key are
summed inside the dk, dv kernel, in float32 registers, in order of their number: a part for each head would be N / K
times as many bytes as k and v, written in float32 and read again.

Blocks that every query sees whole come first in a list and skip the mask; in the others a key's index is compared with
the four bounds of each row. Queries and keys that no block divides need no copy: TMA reads zeros outside an array and
drops what is stored there, and keys past the end are in nobody's range. But the compiler describes an array to TMA in
tiles of 8 rows, as wgmma reads them, and refuses one that they do not divide; rows of other samples or heads cannot
make up for it, since results are stored by tiles as well. So T or S that is no multiple of 8 costs a padded copy.

In dk, dv the keys lie still and P and dS, whose rows are queries, are stored transposed to shared memory, from where
wgmma reads them: what belongs to a query (lse, delta, four bounds) is then one number a row, 2 registers, not 16. With
head dim 128 the two sums of 64 keys take 128 registers of 232, and no room is left for addresses kept from step to
step. With 256 channels they take the registers of both warpgroups. A thread block then owns 64 keys: each warpgroup
makes P and dS of 32 of them, and adds up half of the channels of all 64. Nothing is computed twice; the warpgroups meet
twice a step, once P and once dS is stored, and by then both have read what the one before held.

Head dims between 64, 128 and 256 are filled up with zeros by the op, a copy of every operand.

Every product goes through `multiply`, which the interpreter replaces: it has no wgmma whose first operand is in
registers. No GPU has run these kernels yet. What neither the interpreter nor the compiler has proven:
  - that wgmma reads what it should: its operand order and transposes are the compiler's word alone;
  - `commit_smem` before a wgmma that reads what this kernel stored there (P and dS in dk, dv; with 256 channels what
    the other warpgroup stored): its absence shows in neither;
  - that wgmma has read a slot before it is released (products are synchronous in the interpreter; here `multiply`
    waits for each);
  - `approx_math`: exp2 and log2 are the chip's own approximations, the interpreter computes them exactly;
  - anything about speed, the ping-pong of the two warpgroups included.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.mask import block_lists
from pallas_kernels.tensor_cores import multiply

LOG2E = math.log2(math.e)
ROWS = 64  # of one wgmma tile: what a warpgroup owns
CONSUMERS = 2  # warpgroups that multiply
BLOCK = ROWS * CONSUMERS  # queries of a thread block, and what its lists count in
HALVES = BLOCK // ROWS  # of a block of keys, as dq takes them
HEAD_DIMS = (64, 128, 256)
PER_ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    keys: int = 128  # of one slot of the ring, forward
    stages: int = 2  # slots, forward
    ping_pong: bool = True  # forward: one warpgroup multiplies while the other takes the softmax
    dq_stages: int = 8  # slots of 64 keys or 64 values, dq: 2 or more
    dkv_stages: int = 3  # slots of 64 queries, dk and dv


@functools.cache
def tuned_rows() -> tuple[dict, ...]:
    """The measured choices of `bench --tune`."""
    return tuple(json.loads(pathlib.Path(__file__).with_name("tuned.json").read_text()))


def config_for(size: int, dtype) -> Config:
    """The measured choice for this chip, head dim and dtype, else what fits the shared memory: no measurement."""
    here = {"device": jax.devices()[0].device_kind, "head_dim": size, "dtype": jnp.dtype(dtype).name}
    for row in tuned_rows():
        if all(row[key] == value for key, value in here.items()):
            return Config(**row["config"])
    return {
        64: Config(stages=4, dkv_stages=4),
        128: Config(),
        256: Config(keys=64, dq_stages=3, dkv_stages=2),
    }[size]


def padded_size(size: int) -> int:
    """The head dim that the kernels compute `size` channels in."""
    return next(one for one in HEAD_DIMS if one >= size)


def unsupported(q, k, v) -> str | None:
    """Why the kernels cannot take this case, on any chip, as the end of a sentence; None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype} and the kernel takes bfloat16 or float16, all alike"
    if q.shape[-1] > HEAD_DIMS[-1]:
        return f"heads have {q.shape[-1]} channels and the kernel takes up to {HEAD_DIMS[-1]}"
    if 0 in (*q.shape, *k.shape):
        return "there is nothing to attend to"
    return None


def _per_row(vector, like):
    """[R] -> [R, C]."""
    return lax.broadcast_in_dim(vector, like.shape, (0,))


def _constant(value: float, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _visible(bounds, shape, first_key):
    """Which keys, numbered from first_key, lie in the two ranges of each row: booleans [R, C]."""
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + first_key
    r0, r1, r2, r3 = (_per_row(bound, key) for bound in bounds)
    return ((key >= r0) & (key < r1)) | ((key >= r2) & (key < r3))


def _lists(ranges, keys: int, *, rows: int, columns: int, transposed: bool = False):
    """Block lists as one array, one pointer: [P, B or 1, I, 2 + J], how many are whole, how many there are, which."""
    lists = block_lists(ranges, keys, rows=rows, columns=columns, transposed=transposed)
    return jnp.concatenate([lists.whole[..., None], lists.count[..., None], lists.indices], axis=-1)


def _bounds(ranges):
    """[P, B or 1, 4, T rounded up to whole blocks]: rows past the end see nothing."""
    return jnp.pad(ranges.swapaxes(-1, -2), ((0, 0), (0, 0), (0, 0), (0, -ranges.shape[-2] % BLOCK)))


def _drain(steps, stages, *free):
    """Observes the last releases of a ring."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(step, jnp.int32(stages))])


def _whole_tiles(x, axis: int = 1):
    """[B, T, N, H] with zeros to a multiple of 8 rows, the height of a swizzle tile; rows are the given axis."""
    return jnp.pad(x, [(0, -x.shape[axis] % 8 if i == axis else 0) for i in range(4)])


def _which(pattern, heads: int):
    return jnp.zeros((heads,), jnp.int32) if pattern is None else jnp.asarray(pattern, jnp.int32)


def forward(
    q, k, v, ranges, pattern, *, scale: float, config: Config, heads_first: bool = False, interpret: Any = False
):
    """softmax(scale q kᵀ) v over the keys that each query sees, and its log-sum-exp.

    Args:
      q: [B, T, N, H] bfloat16 or float16, H in HEAD_DIMS.
      k, v: [B, S, K, H], with heads_first [B, K, S, H]; query head n reads key head n // (N / K).
      ranges, pattern: of a `RangeMask`.
      scale: above 0.
      config: a choice of `config_for`.
      interpret: False, or plgpu.InterpretGPUParams.
    Returns:
      (o [B, T, N, H] in q's dtype, lse [B, N, T] float32): 0 and -inf for a query that sees nothing.
    """
    slots, kv_heads = (k.shape[2], k.shape[1]) if heads_first else k.shape[1:3]
    lists = _lists(ranges, slots, rows=BLOCK, columns=config.keys)
    queries, q, (k, v) = q.shape[1], _whole_tiles(q), (_whole_tiles(x, 2 if heads_first else 1) for x in (k, v))
    (batch, _, heads, size), dtype = q.shape, q.dtype
    blocks, stages, simulate = pl.cdiv(queries, BLOCK), config.stages, bool(interpret)

    def kernel(
        q_gmem, k_gmem, v_gmem, lists_gmem, bounds_gmem, pattern_gmem, o_gmem, lse_gmem,
        q_smem, k_smem, v_smem, lse_smem, q_full, k_full, v_full, k_free, v_free, turn,
    ):  # fmt: skip
        warpgroup, head, sample = (lax.axis_index(name) for name in ("warpgroup", "head", "sample"))
        block = blocks - 1 - lax.axis_index("block")  # under a causal mask the longest lists first
        mask = pattern_gmem[head], sample if ranges.shape[1] > 1 else 0
        whole, count = lists_gmem[*mask, block, 0], lists_gmem[*mask, block, 1]

        def first_key(step):
            return lists_gmem[*mask, block, 2 + step] * config.keys

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, jnp.int32(heads // kv_heads))

            @pl.loop(0, count)
            def _load(step):
                slot = lax.rem(step, jnp.int32(stages))
                rows = pl.ds(first_key(step), config.keys)
                here = (sample, kv_head, rows) if heads_first else (sample, rows, kv_head)
                for gmem, smem, full, free in ((k_gmem, k_smem, k_full, k_free), (v_gmem, v_smem, v_full, v_free)):
                    pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(gmem.at[here], smem.at[slot], full.at[slot])

            _drain(count, stages, k_free, v_free)

        @pl.when(warpgroup < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds(block * BLOCK + warpgroup * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_gmem.at[sample, rows, head], q_smem.at[warpgroup], q_full.at[warpgroup])
            bounds = [plgpu.load(bounds_gmem.at[*mask, i, rows], layout=PER_ROW, optimized=False) for i in range(4)]
            plgpu.barrier_wait(q_full.at[warpgroup])

            def take_turn():
                if config.ping_pong:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def meet(step, carry, *, masked):
                weighted, largest, total = carry
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])
                logits = multiply(None, q_smem.at[warpgroup], k_smem.at[slot].transpose((1, 0)), simulate)
                take_turn()
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    logits = jnp.where(_visible(bounds, logits.shape, first_key(step)), logits, -jnp.inf)
                # In units of log2, exp(scale s - m) is one multiplication and addition, and one exp2.
                larger = jnp.maximum(largest, logits.max(axis=1) * (scale * LOG2E))
                shift = jnp.where(larger == -jnp.inf, 0.0, larger) if masked else larger
                kept = jnp.exp2(largest - shift)
                weights = jnp.exp2(logits * (scale * LOG2E) - _per_row(shift, logits))
                weighted *= _per_row(kept, weighted)
                total = total * kept + weights.sum(axis=1)
                # Keeps the softmax on this side of the other warpgroup's turn.
                weighted, total, larger, weights = lax.optimization_barrier(
                    (weighted, total, larger, weights.astype(dtype))
                )
                if config.ping_pong:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                if config.ping_pong:
                    plgpu.barrier_wait(turn)
                weighted = multiply(weighted, weights, v_smem.at[slot], simulate)
                plgpu.barrier_arrive(v_free.at[slot])
                return weighted, larger, total

            pl.when(warpgroup == 1)(take_turn)
            carry = (
                _constant(0.0, (ROWS, size), plgpu.Layout.WGMMA),
                _constant(-jnp.inf, (ROWS,), PER_ROW),
                _constant(0.0, (ROWS,), PER_ROW),
            )
            carry = lax.fori_loop(0, whole, functools.partial(meet, masked=False), carry)
            weighted, largest, total = lax.fori_loop(whole, count, functools.partial(meet, masked=True), carry)
            pl.when(warpgroup == 0)(take_turn)
            inverse = jnp.where(total > 0.0, 1.0 / total, 0.0)
            q_smem[warpgroup] = (weighted * _per_row(inverse, weighted)).astype(dtype)
            lse_smem[warpgroup] = (largest + jnp.log2(total)) * (1.0 / LOG2E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], o_gmem.at[sample, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_gmem.at[sample, head, rows])
            plgpu.wait_smem_to_gmem(0)

    ring = plgpu.SMEM((stages, config.keys, size), dtype)
    full, free = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (1, CONSUMERS))
    o, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK), jnp.float32),
        ),
        grid=(blocks, batch, heads),  # heads side by side, so that those that share keys read them together
        grid_names=("block", "sample", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention",
        interpret=interpret,
        scratch_types=(
            plgpu.SMEM((CONSUMERS, ROWS, size), dtype),
            ring,
            ring,
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=CONSUMERS),
            full,
            full,
            free,
            free,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, lists, _bounds(ranges), _which(pattern, heads))
    return o[:, :queries], lse[..., :queries]


def backward(q, k, v, o, lse, do, dlse, ranges, pattern, *, scale: float, config: Config, interpret: Any = False):
    """The gradients of `forward`, for the cotangents do [B, T, N, H] of o and dlse [B, N, T] of lse.

    P = exp(scale q kᵀ - lse), dS = P (do vᵀ - (sum over H of o do - dlse)).

    Returns:
      (dq, dk, dv) in q's dtype: scale dS k, scale dSᵀ q and Pᵀ do.
    """
    delta = jnp.einsum("BTNH,BTNH->BNT", o, do, preferred_element_type=jnp.float32) - dlse
    # With lse = inf a query that sees nothing weighs nothing, and so do the rows past the end.
    blind = lse == -jnp.inf
    lse, delta = jnp.where(blind, jnp.inf, lse * LOG2E), jnp.where(blind, 0.0, delta)
    padding = ((0, 0), (0, 0), (0, -q.shape[1] % BLOCK))
    lse, delta = jnp.pad(lse, padding, constant_values=jnp.inf), jnp.pad(delta, padding)
    rows = jnp.stack([lse, delta], axis=2)  # [B, N, 2, T in whole blocks]
    operands = q, k, v, do.astype(q.dtype), rows, ranges, _which(pattern, q.shape[2])
    dq = query_gradient(*operands, scale=scale, stages=config.dq_stages, interpret=interpret)
    return dq, *key_gradients(*operands, scale=scale, stages=config.dkv_stages, interpret=interpret)


def query_gradient(q, k, v, do, rows, ranges, pattern, *, scale: float, stages: int, interpret: Any = False):
    """dq; rows is [B, N, 2, T in whole blocks] float32, lse in units of log2 and delta."""
    lists = _lists(ranges, k.shape[1], rows=BLOCK, columns=BLOCK)
    queries, (q, k, v, do) = q.shape[1], (_whole_tiles(x) for x in (q, k, v, do))
    (batch, _, heads, size), kv_heads, dtype = q.shape, k.shape[2], q.dtype
    blocks, simulate = pl.cdiv(queries, BLOCK), bool(interpret)

    def kernel(
        q_gmem, k_gmem, v_gmem, do_gmem, rows_gmem, lists_gmem, bounds_gmem, pattern_gmem, dq_gmem,
        q_smem, do_smem, ring_smem, q_full, full, free,
    ):  # fmt: skip
        warpgroup, head, sample = (lax.axis_index(name) for name in ("warpgroup", "head", "sample"))
        block = blocks - 1 - lax.axis_index("block")
        mask = pattern_gmem[head], sample if ranges.shape[1] > 1 else 0
        whole, count = lists_gmem[*mask, block, 0], lists_gmem[*mask, block, 1]

        def first_key(step):
            return lists_gmem[*mask, block, 2 + step] * BLOCK

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, jnp.int32(heads // kv_heads))

            @pl.loop(0, HALVES * count)
            def _load(part):
                rows = pl.ds(first_key(lax.div(part, HALVES)) + lax.rem(part, HALVES) * ROWS, ROWS)
                for tile, gmem in enumerate((k_gmem, v_gmem)):
                    number = 2 * part + tile
                    slot = lax.rem(number, jnp.int32(stages))
                    pl.when(number >= stages)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(gmem.at[sample, rows, kv_head], ring_smem.at[slot], full.at[slot])

            _drain(2 * HALVES * count, stages, free)

        @pl.when(warpgroup < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(block * BLOCK + warpgroup * ROWS, ROWS)
            queries, cotangents = q_smem.at[warpgroup], do_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_gmem.at[sample, mine, head], queries, q_full.at[warpgroup])
            plgpu.copy_gmem_to_smem(do_gmem.at[sample, mine, head], cotangents, q_full.at[warpgroup])

            def per_row(ref):
                return plgpu.load(ref, layout=PER_ROW, optimized=False)

            lse, delta = (per_row(rows_gmem.at[sample, head, i, mine]) for i in range(2))
            bounds = [per_row(bounds_gmem.at[*mask, i, mine]) for i in range(4)]
            plgpu.barrier_wait(q_full.at[warpgroup])

            def meet(step, dq, *, masked):
                def half(i, dq):  # 64 keys at a time, for the sake of registers
                    number = 2 * (HALVES * step + i)
                    of_keys, of_values = (lax.rem(number + tile, jnp.int32(stages)) for tile in range(2))
                    keys, values = ring_smem.at[of_keys], ring_smem.at[of_values]
                    # Addresses that the compiler cannot take out of the loop, to keep them all in registers.
                    own = lax.optimization_barrier(warpgroup)
                    queries, cotangents = q_smem.at[own], do_smem.at[own]
                    plgpu.barrier_wait(full.at[of_keys])
                    logits = multiply(None, queries, keys.transpose((1, 0)), simulate)
                    weights = jnp.exp2(logits * (scale * LOG2E) - _per_row(lse, logits))
                    if masked:
                        visible = _visible(bounds, weights.shape, first_key(step) + i * ROWS)
                        weights = jnp.where(visible, weights, 0.0)
                    plgpu.barrier_wait(full.at[of_values])
                    dweights = multiply(None, cotangents, values.transpose((1, 0)), simulate)
                    plgpu.barrier_arrive(free.at[of_values])
                    dlogits = weights * (dweights - _per_row(delta, dweights))
                    dq = multiply(dq, dlogits.astype(dtype), keys, simulate)
                    plgpu.barrier_arrive(free.at[of_keys])
                    return dq

                return lax.fori_loop(0, HALVES, half, dq)

            dq = _constant(0.0, (ROWS, size), plgpu.Layout.WGMMA)
            dq = lax.fori_loop(0, whole, functools.partial(meet, masked=False), dq)
            dq = lax.fori_loop(whole, count, functools.partial(meet, masked=True), dq)
            q_smem[warpgroup] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, dq_gmem.at[sample, mine, head])
            plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM((CONSUMERS, ROWS, size), dtype)
    dq = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(blocks, batch, heads),
        grid_names=("block", "sample", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention_dq",
        interpret=interpret,
        scratch_types=(
            tile,
            tile,
            plgpu.SMEM((stages, ROWS, size), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, do, rows, lists, _bounds(ranges), pattern)
    return dq[:, :queries]


def key_gradients(q, k, v, do, rows, ranges, pattern, *, scale: float, stages: int, interpret: Any = False):
    """(dk, dv); arguments as `query_gradient`."""
    # Sums of 64 keys and 256 channels take the registers of both warpgroups, each of which keeps half of the channels.
    shared = k.shape[3] > 128
    block_keys = ROWS if shared else BLOCK  # of a thread block
    lists = _lists(ranges, k.shape[1], rows=ROWS, columns=block_keys, transposed=True)
    slots, (q, k, v, do) = k.shape[1], (_whole_tiles(x) for x in (q, k, v, do))
    (batch, _, heads, size), kv_heads, dtype = q.shape, k.shape[2], q.dtype
    group, simulate = heads // kv_heads, bool(interpret)
    own_keys, channels = block_keys // CONSUMERS, size // CONSUMERS if shared else size  # of a warpgroup

    def kernel(
        q_gmem, k_gmem, v_gmem, do_gmem, rows_gmem, lists_gmem, counts_gmem, bounds_gmem, pattern_gmem,
        dk_gmem, dv_gmem, k_smem, v_smem, q_smem, do_smem, rows_smem, bounds_smem, tile_smem,
        kv_full, full, free, stored,
    ):  # fmt: skip
        axes = "warpgroup", "head", "sample", "block"  # under a causal mask the first block has the longest list
        warpgroup, kv_head, sample, block = (lax.axis_index(name) for name in axes)

        one_sample = sample if ranges.shape[1] > 1 else 0

        def entries(member):
            """How many blocks a head of the group sees whole, and sees."""
            here = kv_head * group + member, one_sample, block
            return counts_gmem[*here, 0], counts_gmem[*here, 1]

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            plgpu.set_max_registers(24, action="decrease")

            def one_head(member, before):
                head, (_, count) = kv_head * group + member, entries(member)
                mask = pattern_gmem[head], one_sample

                @pl.loop(0, count)
                def _load(i):
                    slot = lax.rem(before + i, jnp.int32(stages))
                    pl.when(before + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    here = pl.ds(lists_gmem[*mask, block, 2 + i] * ROWS, ROWS)
                    for gmem, smem in (
                        (q_gmem.at[sample, here, head], q_smem),
                        (do_gmem.at[sample, here, head], do_smem),
                        (rows_gmem.at[sample, head, :, here], rows_smem),
                        (bounds_gmem.at[*mask, :, here], bounds_smem),
                    ):
                        plgpu.copy_gmem_to_smem(gmem, smem.at[slot], full.at[slot])

                return before + count

            _drain(lax.fori_loop(0, group, one_head, jnp.int32(0)), stages, free)

        @pl.when(warpgroup < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(240, action="increase")
            first_key = block * block_keys + warpgroup * own_keys
            mine = sample, pl.ds(first_key, own_keys), kv_head
            plgpu.copy_gmem_to_smem(k_gmem.at[mine], k_smem.at[warpgroup], kv_full.at[warpgroup])
            plgpu.copy_gmem_to_smem(v_gmem.at[mine], v_smem.at[warpgroup], kv_full.at[warpgroup])
            plgpu.barrier_wait(kv_full.at[warpgroup])
            my_channels = pl.ds(warpgroup * channels, channels) if shared else pl.ds(0, size)

            def meet_other(barrier):
                if shared:
                    plgpu.barrier_arrive(stored.at[barrier])
                    plgpu.barrier_wait(stored.at[barrier])

            def add_transposed(total, left, right, own, number):
                """total + left.T @ right; left goes through shared memory, where wgmma can read it transposed.

                Its two tiles belong to a warpgroup each, or to P and dS of both; then the other warpgroup has read what
                it overwrites before it stored its part of the tile between.
                """
                first, part = (number * ROWS, own * own_keys) if shared else (own * ROWS, 0)
                tile, part = tile_smem.at[pl.ds(first, ROWS)], tile_smem.at[pl.ds(first + part, own_keys)]
                part.transpose((1, 0))[...] = left.astype(dtype)
                plgpu.commit_smem()
                meet_other(number)
                return multiply(total, tile, right, simulate)

            def meet(i, carry, *, before, masked):
                dk, dv = carry
                slot = lax.rem(before + i, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                queries, cotangents = q_smem.at[slot], do_smem.at[slot]
                # As in dq: addresses that stay in the loop.
                own = lax.optimization_barrier(warpgroup)
                keys, values = k_smem.at[own], v_smem.at[own]
                logits = multiply(None, queries, keys.transpose((1, 0)), simulate)
                lse = plgpu.load(rows_smem.at[slot, 0], layout=PER_ROW)
                weights = jnp.exp2(logits * (scale * LOG2E) - _per_row(lse, logits))
                if masked:
                    bounds = [plgpu.load(bounds_smem.at[slot, i], layout=PER_ROW) for i in range(4)]
                    weights = jnp.where(_visible(bounds, weights.shape, first_key), weights, 0.0)
                dv = add_transposed(dv, weights, cotangents.at[:, my_channels], own, 0)
                dweights = multiply(None, cotangents, values.transpose((1, 0)), simulate)
                delta = plgpu.load(rows_smem.at[slot, 1], layout=PER_ROW)
                dlogits = weights * (dweights - _per_row(delta, dweights))
                dk = add_transposed(dk, dlogits, queries.at[:, my_channels], own, 1)
                plgpu.barrier_arrive(free.at[slot])
                return dk, dv

            def one_head(member, carry):
                before, dk, dv = carry
                whole, count = entries(member)
                part = functools.partial(meet, before=before)
                carry = lax.fori_loop(0, whole, functools.partial(part, masked=False), (dk, dv))
                return before + count, *lax.fori_loop(whole, count, functools.partial(part, masked=True), carry)

            zero = _constant(0.0, (ROWS, channels), plgpu.Layout.WGMMA)
            _, dk, dv = lax.fori_loop(0, group, one_head, (jnp.int32(0), zero, zero))
            # Since they last met, the warpgroups have read their own channels only of what shared sums overwrite.
            dk_smem, dv_smem = (q_smem.at[0], do_smem.at[0]) if shared else (k_smem.at[warpgroup], v_smem.at[warpgroup])
            dk_smem[:, my_channels] = (dk * scale).astype(dtype)
            dv_smem[:, my_channels] = dv.astype(dtype)
            plgpu.commit_smem()
            meet_other(0)
            mine = sample, pl.ds(block * block_keys + (0 if shared else warpgroup * ROWS), ROWS), kv_head
            for number, (smem, gmem) in enumerate(((dk_smem, dk_gmem), (dv_smem, dv_gmem))):

                @pl.when(jnp.logical_or(not shared, warpgroup == number))
                def _store(smem=smem, gmem=gmem):
                    plgpu.copy_smem_to_gmem(smem, gmem.at[mine])

            plgpu.wait_smem_to_gmem(0)

    tile, ring = plgpu.SMEM((CONSUMERS, own_keys, size), dtype), plgpu.SMEM((stages, ROWS, size), dtype)
    dk, dv = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        grid=(pl.cdiv(slots, block_keys), batch, kv_heads),
        grid_names=("block", "sample", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention_dkv",
        interpret=interpret,
        scratch_types=(
            tile,
            tile,
            ring,
            ring,
            plgpu.SMEM((stages, 2, ROWS), jnp.float32),
            plgpu.SMEM((stages, 4, ROWS), jnp.int32),
            plgpu.SMEM((CONSUMERS * ROWS, ROWS), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, do, rows, lists, lists[pattern, ..., :2], _bounds(ranges), pattern)
    return dk[:, :slots], dv[:, :slots]
