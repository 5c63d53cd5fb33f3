"""Attention of one query per row over a long cache for Hopper in Pallas Mosaic GPU, 16, 8 or 4 bits a channel.

A thread block of one warpgroup owns a share of the blocks of 64 slots that one key head of one row sees. It keeps a few
of them on their way to shared memory, and multiplies on the tensor cores; its part (o, lse) is merged by XLA in a fixed
order, so results repeat exactly. The list of blocks is arithmetic on the ranges: dense heads, sink and ring, and a
window over a dense cache share a launch, and each costs its own blocks.

Products are transposed, so that the slots fill the 64 rows of a wgmma and the query heads that share a key head are its
columns, 8 or 16 of them:

    S.T = K Q.T     [64, G]          O.T += V.T P.T     [H, G]

Codes of keys are widened in registers, exactly, and are the first operand of their product; those of values are written
to a tile of 16 bits. A token's scale and zero meet its logit and its weight, never its channels:

    q (code - zero) scale = scale (q code - zero sum(q))
    sum_s p_s (code_s - zero_s) scale_s = sum_s (p_s scale_s) code_s - sum_s p_s scale_s zero_s

A page of a head and a whole row of a head are the same to the kernel: [.., slots, H], seen through a first index and an
offset. S need not be a multiple of 64, only of 8, and nothing is copied: TMA reads zeros outside an array, and scales
and zeros, read as one long vector, run into the next head's, which no range shows. Below 64 slots a copy is padded.

Every product goes through `multiply`, which the interpreter replaces: it has no wgmma whose first operand is in
registers. No GPU has run this kernel yet. What neither the interpreter nor the compiler has proven:
  - that wgmma reads what it should: its operand order and transposes are the compiler's word alone;
  - `commit_smem` before the wgmma that reads what this kernel stored (weights, widened or cleaned values);
  - that all four warps have read a slot before the next block is fetched into it: products are synchronous in the
    interpreter; here `multiply` waits, and the compiler puts a barrier before a copy;
  - copies of scales, 64 numbers from an address that is no multiple of 16 bytes;
  - `approx_math`: exp2 and log2 are the chip's own approximations, the interpreter computes them exactly;
  - anything about speed.
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

from pallas_kernels.decode_attention.quantized_kv import QuantizedKV
from pallas_kernels.decode_attention.reference import block_list, nth_block
from pallas_kernels.tensor_cores import multiply

LOG2E = math.log2(math.e)
BLOCK = 64  # slots: the rows of one wgmma, and a page
HEAD_DIMS = (64, 128, 256)
MOST_HEADS = 16  # query heads of a key head
SHARED_BYTES = 232_448  # of an SM, for one block; a little more for several
PER_SLOT, PER_HEAD = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    splits: int  # thread blocks that share the slots of a key head
    stages: int  # blocks of 64 slots that one of them holds or has on their way


def choose(rows: int, blocks: int, bits: int, head_dim: int, sms: int = 132) -> Config:
    """The config for `rows` key heads of the batch with at most `blocks` blocks each, by counting: nothing is measured.

    A ring of about 64 KB leaves room for a few thread blocks on each SM, which hide one another's latency. The cost of
    a number of splits is counted in blocks of slots: the waves of thread blocks, each as long as its share and four
    more, to fill the ring, and to write and merge the part.
    """
    block_bytes = 2 * BLOCK * head_dim * bits // 8
    stages = min(max(2, 2**16 // block_bytes), 4)
    resident = SHARED_BYTES // (stages * block_bytes + (2 * BLOCK * head_dim if bits < 16 else 0) + 16_384)
    slots = sms * min(max(resident, 1), 4)

    def cost(splits):
        return pl.cdiv(rows * splits, slots) * (pl.cdiv(blocks, splits) + 4)

    return Config(min(range(1, min(blocks, 128) + 1), key=cost), stages)


@functools.cache
def tuned_rows() -> tuple[dict, ...]:
    """The measured choices of `bench --tune`."""
    return tuple(json.loads(pathlib.Path(__file__).with_name("tuned.json").read_text()))


def stored_bits(store) -> int:
    """Bits of a channel."""
    return store.bits if isinstance(store, QuantizedKV) else 8 * store.dtype.itemsize


def config_for(q, keys, table) -> Config:
    """The measured choice for this chip and shape (rows and blocks up to the next power of two), else `choose`."""
    rows, blocks = q.shape[0] * keys.shape[1], pl.cdiv(keys.shape[2], BLOCK)
    blocks = blocks if table is None else table.shape[2]
    bits, head_dim = stored_bits(keys), q.shape[2]
    device = jax.devices()[0]
    here = {"device": device.device_kind, "rows": pl.next_power_of_2(rows), "blocks": pl.next_power_of_2(blocks)}
    here |= {"bits": bits, "head_dim": head_dim}
    for row in tuned_rows():
        if all(row[key] == value for key, value in here.items()):
            return Config(**row["config"])
    # Elsewhere the program is compiled for an absent GPU, or interpreted.
    return choose(rows, blocks, bits, head_dim, device.core_count if device.platform == "gpu" else 132)


def unsupported(q, keys, values, table) -> str | None:
    """Why the kernel cannot take this case, on any chip, as the end of a sentence; None if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype} and the kernel takes bfloat16 or float16"
    if not isinstance(keys, QuantizedKV) and not keys.dtype == values.dtype == q.dtype:
        return f"keys and values are {keys.dtype} and {values.dtype} and the kernel takes q's {q.dtype}, or QuantizedKV"
    if q.shape[2] not in HEAD_DIMS:
        return f"heads have {q.shape[2]} channels and the kernel takes {', '.join(map(str, HEAD_DIMS))}"
    if q.shape[1] > MOST_HEADS * keys.shape[1]:
        return f"{q.shape[1] // keys.shape[1]} query heads share a key head and the kernel takes {MOST_HEADS}"
    if table is not None and keys.shape[2] != BLOCK:
        return f"a page has {keys.shape[2]} slots and the kernel takes {BLOCK}"
    if keys.shape[2] > BLOCK and keys.shape[2] % 8:  # the compiler tiles memory by 8 rows
        return f"rows have {keys.shape[2]} slots and the kernel takes multiples of 8: allocate a few more"
    if 0 in (*q.shape, *keys.shape) or (table is not None and 0 in table.shape):
        return "there is nothing to attend to"
    if math.prod(keys.shape[:3]) >= 2**31:
        return "the cache has 2^31 slots over all heads, which 32 bits do not count"
    return None


def widen(stored, bits: int):
    """Stored int8 [C, H] or [C, H / 2] -> 16-bit tiles, exact, whose columns make up H channels.

    8 bits stay 128 too small. int8 to bfloat16 is a permutation of bytes; 8-bit numbers can be masked but not shifted.
    """
    if bits == 8:
        return [stored.astype(jnp.bfloat16)]
    return [(stored & 15).astype(jnp.bfloat16), (stored & -16).astype(jnp.bfloat16) * 0.0625 + 8.0]


def _per_slot(vector, like):
    """[C] -> [C, G]."""
    return lax.broadcast_in_dim(vector, like.shape, (0,))


def _per_head(vector, like):
    """[G] -> [C, G]."""
    return lax.broadcast_in_dim(vector, like.shape, (1,))


def _constant(value: float, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _flat(store, slots: int):
    """Channels or codes [B K, S, H], scales and zeros [B K S]; caches shorter than a block are padded to one."""

    def flat(array):
        if array.shape[2] < slots:
            array = jnp.pad(array, ((0, 0), (0, 0), (0, slots - array.shape[2]), *[(0, 0)] * (array.ndim - 3)))
        return array.reshape(-1, *array.shape[2:]) if array.ndim == 4 else array.reshape(-1)

    return [flat(array) for array in jax.tree.leaves(store)]


def decode_attention(q, keys, values, ranges, table, *, scale: float, config: Config, interpret: Any = False):
    """`pallas_kernels.decode_attention.decode_attention` for what `unsupported` lets through, with ranges [B, K, 4].

    q is rounded to bfloat16 for a quantised cache.

    Args:
      q, keys, values, ranges, table, scale: of the op; scale above 0.
      config: a choice of `config_for`.
      interpret: False, or plgpu.InterpretGPUParams.
    """
    (batch, heads, head_dim), kv_heads, bits = q.shape, keys.shape[1], stored_bits(keys)
    dtype, group, quantized = jnp.dtype(jnp.bfloat16 if bits < 16 else q.dtype), heads // kv_heads, bits < 16
    columns = pl.cdiv(group, 8) * 8
    slots = max(keys.shape[2], BLOCK)  # of a row, or of a page
    halves, stages, simulate = (2 if bits == 4 else 1), config.stages, bool(interpret)
    grouped = jnp.pad(
        q.astype(dtype).reshape(batch, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, columns - group), (0, 0))
    )
    plan = jnp.concatenate([ranges, jnp.stack(block_list(ranges, BLOCK), axis=-1)], axis=-1)  # [B, K, 8]
    stores = _flat(keys, slots), _flat(values, slots)
    operands = [grouped, plan, *stores[0], *stores[1]]
    if table is not None:
        operands.append(table.reshape(-1))
    if quantized:
        operands.append(grouped.astype(jnp.float32).sum(-1))

    def kernel(q_gmem, plan_gmem, *refs):
        cache, refs = [refs[: len(stores[0])], refs[len(stores[0]) : 2 * len(stores[0])]], refs[2 * len(stores[0]) :]
        if table is not None:
            table_gmem, *refs = refs
        if quantized:
            sums_gmem, *refs = refs
        o_gmem, lse_gmem, q_smem, weights_smem, o_smem, lse_smem, setup, arrived, *refs = refs
        rings, refs = [refs[: len(stores[0])], refs[len(stores[0]) : 2 * len(stores[0])]], refs[2 * len(stores[0]) :]
        head, part, sample = (lax.axis_index(name) for name in ("head", "part", "sample"))
        r0, r1, r2, r3, *blocks = (plan_gmem[sample, head, i] for i in range(8))
        share = pl.cdiv(blocks[-1], jnp.int32(config.splits))
        begin = part * share
        count = jnp.clip(blocks[-1] - begin, 0, share)

        def place(step):
            """Of a block of this share: its first slot; the page, or row of the cache, and the offset in it."""
            start = nth_block(blocks, begin + step) * BLOCK
            if table is None:
                return start, sample * kv_heads + head, start
            entry = (sample * table.shape[1] + (head if table.shape[1] > 1 else 0)) * table.shape[2]
            return start, table_gmem[entry + lax.div(start, jnp.int32(BLOCK))] * kv_heads + head, 0

        def fetch(step, row, offset):
            slot = lax.rem(step, jnp.int32(stages))
            for arrays, ring in zip(cache, rings, strict=True):
                for array, buffer in zip(arrays, ring, strict=True):
                    here = (row, pl.ds(offset, BLOCK)) if len(array.shape) == 3 else pl.ds(row * slots + offset, BLOCK)
                    plgpu.copy_gmem_to_smem(array.at[here], buffer.at[slot], arrived.at[slot])

        plgpu.copy_gmem_to_smem(q_gmem.at[sample, head], q_smem, setup)
        if quantized:
            sums_smem, wide_smem = refs
            plgpu.copy_gmem_to_smem(sums_gmem.at[sample, head], sums_smem, setup)
        pl.loop(0, jnp.minimum(count, stages))(lambda step: fetch(step, *place(step)[1:]))
        plgpu.barrier_wait(setup)

        def side(ring, number, slot, shown):
            """A scale (1) or zero (2) of each slot, [C, G]; what nobody sees may be NaN."""
            vector = plgpu.load(ring[number].at[slot], layout=PER_SLOT).astype(jnp.float32)
            vector = vector - 128.0 if (number, bits) == (2, 8) else vector
            return jnp.where(shown, _per_slot(vector, shown), 0.0)

        def attend(step, carry):
            weighted, largest, total, zeros = carry
            slot = lax.rem(step, jnp.int32(stages))
            _, *upcoming = place(jnp.minimum(step + stages, count - 1))  # the table is read long before it is needed
            start = nth_block(blocks, begin + step) * BLOCK
            plgpu.barrier_wait(arrived.at[slot])

            def is_shown(index):
                return ((index >= r0) & (index < r1)) | ((index >= r2) & (index < r3))

            def indices(shape):
                return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + start

            shown = is_shown(indices((BLOCK, columns)))
            if quantized:
                width = head_dim // halves
                stored = plgpu.load(rings[0][0].at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                logits: Any = None
                for half, tile in enumerate(widen(stored, bits)):
                    channels = q_smem.at[:, pl.ds(half * width, width)].transpose((1, 0))
                    logits = multiply(logits, plgpu.layout_cast(tile, plgpu.Layout.WGMMA), channels, simulate)
                sums = _per_head(plgpu.load(sums_smem, layout=PER_HEAD), logits)
                logits = (logits - side(rings[0], 2, slot, shown) * sums) * side(rings[0], 1, slot, shown)
                stored = plgpu.load(rings[1][0].at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                for half, tile in enumerate(widen(stored, bits)):
                    wide_smem[:, pl.ds(half * width, width)] = tile
                values_smem = wide_smem
            else:
                logits = multiply(None, rings[0][0].at[slot], q_smem.transpose((1, 0)), simulate)
                values_smem = rings[1][0].at[slot]

                whole = ((start >= r0) & (start + BLOCK <= r1)) | ((start >= r2) & (start + BLOCK <= r3))

                @pl.when(jnp.logical_not(whole))
                def _clean():  # a weight of zero does not save from NaN
                    dirty = plgpu.load(values_smem, layout=plgpu.Layout.WGMMA)
                    values_smem[...] = jnp.where(is_shown(indices(dirty.shape)), dirty, jnp.zeros_like(dirty))

            # In units of log2, exp(scale s - m) is one multiplication and addition, and one exp2.
            logits = jnp.where(shown, logits * (scale * LOG2E), -jnp.inf)
            larger = jnp.maximum(largest, logits.max(axis=0))  # the only exchange between warps; finite from here on
            kept = jnp.exp2(largest - larger)
            weights = jnp.exp2(logits - _per_head(larger, logits))
            total = total * _per_head(kept, total) + weights  # summed over slots at the end
            if quantized:
                # Rounded before both sums, so that rounding cancels where code - zero does.
                weights = (weights * side(rings[1], 1, slot, shown)).astype(dtype)
                zeros = zeros * _per_head(kept, zeros) + weights.astype(jnp.float32) * side(rings[1], 2, slot, shown)
            weights_smem.transpose((1, 0))[...] = weights.astype(dtype)
            plgpu.commit_smem()
            weighted = weighted * _per_head(kept, weighted)
            weighted = multiply(weighted, values_smem.transpose((1, 0)), weights_smem.transpose((1, 0)), simulate)
            pl.when(step + stages < count)(lambda: fetch(step + stages, *upcoming))
            return weighted, larger, total, zeros

        zero = _constant(0.0, (BLOCK, columns), plgpu.Layout.WGMMA)
        weighted, largest, total, zeros = lax.fori_loop(
            0,
            count,
            attend,
            (
                _constant(0.0, (head_dim, columns), plgpu.Layout.WGMMA),
                _constant(-jnp.inf, (columns,), PER_HEAD),
                zero,
                zero,
            ),
        )
        total = total.sum(axis=0)
        if quantized:
            weighted = weighted - _per_head(zeros.sum(axis=0), weighted)
        o_smem[...] = weighted * _per_head(jnp.where(total > 0.0, 1.0 / total, 0.0), weighted)
        lse_smem[...] = (largest + jnp.log2(total)) * (1.0 / LOG2E)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[sample, head, part])
        plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[sample, head, part])
        plgpu.wait_smem_to_gmem(0)

    rings = [plgpu.SMEM((stages, BLOCK, *array.shape[2:]), array.dtype) for array in (*stores[0], *stores[1])]
    o, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, config.splits, head_dim, columns), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, config.splits, columns), jnp.float32),
        ),
        grid=(kv_heads, config.splits, batch),
        grid_names=("head", "part", "sample"),
        kernel_name="decode_attention",
        interpret=interpret,
        scratch_types=(
            plgpu.SMEM((columns, head_dim), dtype),
            plgpu.SMEM((columns, BLOCK), dtype),
            plgpu.SMEM((head_dim, columns), jnp.float32),
            plgpu.SMEM((columns,), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + quantized),
            plgpu.Barrier(num_arrivals=len(rings), num_barriers=stages),
            *rings,
            *([plgpu.SMEM((columns,), jnp.float32), plgpu.SMEM((BLOCK, head_dim), dtype)] if quantized else []),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    o, lse = merge(o, lse)
    return o[:, :, :group].reshape(q.shape).astype(q.dtype), lse[:, :, :group].reshape(batch, heads)


def merge(o, lse):
    """Parts o [B, K, parts, H, G] and lse [B, K, parts, G] -> [B, K, G, H] and [B, K, G], float32, in order."""
    largest = lse.max(2)
    weights = jnp.exp(lse - jnp.where(largest == -jnp.inf, 0.0, largest)[:, :, None])
    total = weights.sum(2)
    o = jnp.einsum("BKPG,BKPHG->BKGH", weights, o) / jnp.where(total > 0.0, total, 1.0)[..., None]
    return o, largest + jnp.log(total)
