"""Sparse convolution for Hopper in Pallas Mosaic GPU: rows go from global memory straight to tensor-core registers.

    product:          y[i] = sum_k x[entries[k, i]] @ w[k]       forward, and dx with the transposed map and wᵀ
    weight gradient:  dw[k] = sum_i x[entries[k, i]]ᵀ dy[i]

Hopper's TMA cannot gather rows, but wgmma takes its first operand from registers. There a thread holds parts of two
rows, so it loads those itself: 16 bytes, eight channels, at a time, and four neighbours read 64 bytes of a row. The
eight are not the channels that wgmma takes from this thread; but a sum over channels has no order, so the weight's
channels are put in the order in which x's arrive (`fragment_order`), in the pass that casts and transposes it anyway.
A missing row is not read, its registers are zero. x passes through no shared memory and no barrier, and a row that
several offsets name comes from the L1 cache, which shared memory leaves room for.

product: a warpgroup owns 64 rows of y and sums in registers; a thread block is up to four of them, which share the
weights that TMA brings and the list of offsets that one of their rows has. A warpgroup multiplies at those of them that
its own 64 rows have. The rows of the next offset are loaded while this one's are multiplied, and their numbers one
offset before that. Every row of y is written once. All dataflows run so, and differ in lists and order of rows:
    "unsorted"      every offset for every row.
    "tile_skip"     the lists say which offsets a thread block and a warpgroup visit.
    "sorted"        the same in the map's sorted order; rows are written to where they belong, each with a copy of its
                    own. With S splits there are S float32 results, summed in order.
    "gather_scatter", "fetch_on_demand"   as "tile_skip": to walk pairs and add to y takes atomics, whose order, and so
                    whose rounding, differs from run to run, or S = K results.

weight gradient: a warpgroup owns a block of channels of dw[k] and a share of the offset's lists, 64 rows at a time,
gathers x's and dy's rows alike, and passes them through shared memory, from where wgmma transposes. "fetch_on_demand"
and "gather_scatter" walk pairs: no multiplication by zero but in the last 64. The others walk the tiles of 64 rows that
have the offset. The shares are summed in order.

There are no atomics, so results repeat exactly. No GPU has run these kernels yet. What neither the interpreter nor the
compiler has proven:
  - `gather` and `fragments` as they are compiled: the interpreter runs `jnp.take` and `fragment_order` in their place.
    The compiler places the rows (its own index arithmetic), and a test holds `fragment_order` against its layouts; the
    predicated load is ours;
  - that TMA, taking one row of a swizzled tile ("sorted"), undoes the swizzle by the row's address, as it is said to;
  - wgmma itself, and that it reads what it should: the interpreter multiplies plain tiles;
  - `commit_smem` before a wgmma that reads what the kernel stored (rows, in the weight gradient);
  - anything about speed.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.sparse_convolution.kernel_map import Dataflow, Pairs, compact
from pallas_kernels.tensor_cores import multiply

ROWS = 64  # of a wgmma: what a warpgroup multiplies at once
LOADED = 8  # channels that a thread loads at once: 16 bytes
LANES = 4  # neighbouring threads that share a row
GROUP = LOADED * LANES  # channels that they load at once
AHEAD = 2  # steps for which numbers of rows are read past the end of a list
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
GATHERED = plgpu.Layout.WGMMA_UPCAST_4X  # every thread holds eight neighbouring channels
Kind = Literal["product", "weight_gradient"]
WHO = 16  # bits of a list's entry below those that say which warpgroups have the offset


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is cut."""

    warpgroups: int = 4  # of a thread block, 64 rows each
    inputs: int = 64  # input channels of a step, a multiple of 32
    outputs: int = 128  # output channels of a thread block, a multiple of 8
    stages: int = 4  # slots of the ring of weights, above 2


@dataclasses.dataclass(frozen=True)
class GradientConfig:
    """How a weight gradient is cut."""

    inputs: int = 64  # channels of x of a thread block, a multiple of 64
    outputs: int = 128  # channels of dy of a thread block, a multiple of 32
    parts: int = 8  # thread blocks that share the rows of an offset


def choose(rows: int, inputs: int, outputs: int, sms: int = 132) -> Config:
    """The config for a product of [*, inputs] to [rows, outputs], by counting: no measurement stands behind it.

    Steps of 64 or 96 input channels, whichever wastes less, and as few blocks of up to 128 output channels as there
    can be, since each gathers the rows anew. Four warpgroups share weights if that leaves a thread block for every SM.
    """
    step = round_up(inputs, GROUP) if inputs <= 96 else min((64, 96), key=lambda step: round_up(inputs, step))
    blocks = pl.cdiv(outputs, 128)
    warpgroups = next((n for n in (4, 2) if pl.cdiv(rows, n * ROWS) * blocks >= sms), 1)
    return Config(warpgroups, step, round_up(pl.cdiv(outputs, blocks), 8))


def choose_gradient(rows: int, offsets: int, inputs: int, outputs: int, sms: int = 132) -> GradientConfig:
    """The same for a weight gradient: parts enough for six thread blocks for every SM, none below 512 rows."""
    blocks = pl.cdiv(outputs, 128)
    width = round_up(pl.cdiv(outputs, blocks), GROUP)
    parts = pl.cdiv(6 * sms, offsets * blocks * pl.cdiv(inputs, 64))
    return GradientConfig(64, width, max(1, min(parts, 32, rows // 512)))


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


@functools.cache
def tuned_rows() -> tuple[dict, ...]:
    """The measured choices of `bench --tune`."""
    return tuple(json.loads(pathlib.Path(__file__).with_name("tuned.json").read_text()))


def tuned_key(kind: Kind, rows: int, offsets: int, inputs: int, outputs: int) -> dict:
    """What a row of tuned.json is for; rows of the map are those up to the next power of two."""
    here = {"device": jax.devices()[0].device_kind, "kind": kind, "rows": pl.next_power_of_2(rows)}
    return here | {"offsets": offsets, "inputs": inputs, "outputs": outputs}


def config_for(kind: Kind, rows: int, offsets: int, inputs: int, outputs: int) -> Any:
    """The measured choice for this chip, map and layer, else what `choose` or `choose_gradient` counts."""
    here = tuned_key(kind, rows, offsets, inputs, outputs)
    product = kind == "product"
    for row in tuned_rows():
        if all(row[name] == value for name, value in here.items()):
            return (Config if product else GradientConfig)(**row["config"])
    device = jax.devices()[0]
    # Elsewhere the program is compiled for an absent GPU, or interpreted.
    sms = device.core_count if device.platform == "gpu" else 132
    return choose(rows, inputs, outputs, sms) if product else choose_gradient(rows, offsets, inputs, outputs, sms)


def fragment_order(x, axis: int):
    """Channels along an axis, a multiple of 32, in the order in which wgmma meets what `gather` has loaded.

    Of 32 channels lane l of four loads 8 l to 8 l + 7; wgmma takes from it pairs j = 0..3, as its channels 8 j + 2 l
    and 8 j + 2 l + 1. The order is its own inverse.
    """
    shape = x.shape
    x = x.reshape(*shape[:axis], -1, LANES, LOADED // 2, 2, *shape[axis + 1 :])
    return x.swapaxes(axis + 1, axis + 2).reshape(shape)


def gather(x_gmem, rows, block, width: int, simulate: bool) -> Any:
    """x[rows, block * width : (block + 1) * width], [64, width]; zero where a row is -1, and beyond x's channels.

    Args:
      x_gmem: [N, C], C a multiple of 8.
      rows: int32 [64], in PER_ROW.
      block: int32 [].
      width: a multiple of 32.
      simulate: for the interpreter. A row that is not in x gives NaN there.
    """
    channels, dtype = x_gmem.shape[1], x_gmem.dtype
    if simulate:
        x = jnp.pad(x_gmem[...], ((0, 0), (0, -channels % width)))
        taken = jnp.take(lax.dynamic_slice_in_dim(x, block * width, width, 1), rows, 0, mode="fill", fill_value=jnp.nan)
        return jnp.where((rows >= 0)[:, None], taken, jnp.zeros_like(taken))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), PER_ROW, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), dtype, layout=GATHERED),
    )
    def load(_, x, rows, block):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        scalar = mgpu.utils.dtype_to_ir_type(dtype)
        layout = GATHERED.to_mgpu()
        here = rows.broadcast_in_dim((ROWS, width), (0,), layout)  # the row of each register
        begin = arith.muli(block.registers.item(), mgpu.utils.c(width, i32))
        start = mgpu.utils.memref_ptr(x)
        out = np.empty_like(here.registers)
        for (at, row), (_, column) in zip(
            np.ndenumerate(here.registers), layout.thread_idxs((ROWS, width)), strict=True
        ):
            row = vector.extract(row, [], [0])  # the same for its eight channels
            column = arith.addi(begin, arith.index_cast(i32, column))
            wanted = arith.cmpi(arith.CmpIPredicate.sge, row, mgpu.utils.c(0, i32))
            if channels % width:
                inside = arith.cmpi(arith.CmpIPredicate.slt, column, mgpu.utils.c(channels, i32))
                wanted = arith.andi(wanted, inside)
            # In 64 bits: x may have more than 2^31 elements.
            place = arith.muli(arith.extsi(i64, row), mgpu.utils.c(channels, i64))
            place = arith.addi(place, arith.extsi(i64, column))
            words = mgpu.utils.inline_ptx(
                "{ .reg .u64 place; cvta.to.global.u64 place, $4;\n"
                "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;\n"
                "@$5 ld.global.nc.v4.b32 {$0, $1, $2, $3}, [place]; }",
                mgpu.utils.getelementptr(start, [place], scalar),
                wanted,
                result_types=(i32,) * 4,
                has_side_effects=True,  # so that it stays before the multiplication that it overlaps
            )
            loaded = vector.from_elements(ir.VectorType.get((4,), i32), words)
            out[at] = vector.bitcast(ir.VectorType.get((LOADED,), scalar), loaded)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    return load(x_gmem, rows, block)  # pyright: ignore[reportCallIssue]  the context is passed by inline_mgpu


def renamed(registers, part) -> np.ndarray:
    """Registers of eight channels, as `gather` fills them, as those of wgmma's first operand, of two; part cuts one."""
    pairs = LOADED // 2
    out = np.empty((registers.shape[0], registers.shape[1] * pairs, *registers.shape[2:]), dtype=object)
    for (tile, group, *rest), eight in np.ndenumerate(registers):
        for pair in range(pairs):
            out[(tile, group * pairs + pair, *rest)] = part(eight, slice(2 * pair, 2 * pair + 2))
    return out


def fragments(rows, simulate: bool) -> Any:
    """What `gather` gave, as wgmma's first operand: `fragment_order` of it, with no register moved."""
    if simulate:
        return fragment_order(rows, 1)
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(GATHERED,), return_type=plgpu.ShapeDtypeStruct(rows.shape, rows.dtype, layout=layout))
    def rename(_, rows):
        registers = renamed(rows.registers, mgpu.utils.vector_slice)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return rename(rows)  # pyright: ignore[reportCallIssue]


def _numbers(gmem, *at):
    """Numbers of 64 rows, one a row of a wgmma."""
    return plgpu.load(gmem.at[at], layout=PER_ROW, optimized=False)


def _if(condition, rows):
    """rows, or -1 for all of them."""
    condition = condition if condition.shape else lax.broadcast_in_dim(condition, rows.shape, ())
    return jnp.where(condition, rows, jnp.full_like(rows, -1))


def _whole_loads(x):
    """[N, C] with zeros to a multiple of 8 channels."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LOADED)))


def offset_lists(table, preparation, dataflow: Dataflow, warpgroups: int):
    """The map as `product` walks it. Layers that share a map share this, too: XLA computes it once in a program.

    Returns:
      (entries, order, lists): int32 [k, P], the map, padded to whole tiles of 64 rows, or split after split, each
      padded to whole thread blocks; int32 [P], the row of [S M] that each place is written to, -1 for none, or None if
      rows keep their places; and int32 [thread blocks, 2 + k + 2], how many offsets each visits, the first offset of
      its split, then the offsets, counted from there, plus 2^16 times the set of warpgroups that have it; 0 past the
      end.
    """
    outputs = table.shape[1]
    parts = [(table, None, 0)]
    if dataflow.kind == "sorted":
        parts = [(part.table, part.order, part.offsets[0]) for part in preparation]
    longest = max(part.shape[0] for part, _, _ in parts)
    whole = ROWS * warpgroups if len(parts) > 1 else ROWS
    entries, orders, lists = [], [], []
    for number, (part, order, first) in enumerate(parts):
        padding = ((0, longest - part.shape[0]), (0, -part.shape[1] % whole))
        part = jnp.pad(part, padding, constant_values=-1)
        present = (part.reshape(longest, -1, ROWS) >= 0).any(2)
        if dataflow.kind == "unsorted":
            present = jnp.ones_like(present)
        present = jnp.pad(present, ((0, 0), (0, -present.shape[1] % warpgroups))).reshape(longest, -1, warpgroups)
        who = (present << jnp.arange(warpgroups)).sum(2, dtype=jnp.int32).T  # [thread blocks, k]
        offsets, count = compact(who > 0)
        visits = offsets + (jnp.take_along_axis(who, offsets, 1) << WHO)
        visits = jnp.where(jnp.arange(longest) < count[:, None], visits, 0)
        head = jnp.stack([count, jnp.full_like(count, first)], 1)
        lists.append(jnp.concatenate([head, jnp.pad(visits, ((0, 0), (0, AHEAD)))], 1))
        entries.append(part)
        if order is not None:
            unused = (0, part.shape[1] - outputs)
            orders.append(jnp.pad(order + number * outputs, unused, constant_values=-1))
    order = jnp.concatenate(orders) if orders else None
    return jnp.concatenate(entries, 1), order, jnp.concatenate(lists)


def product(
    x, w, table, preparation, dataflow: Dataflow, identity: int | None = None, *,
    config: Config | None = None, interpret: Any = False,
):  # fmt: skip
    """y[i] = sum_k x[table[k, i]] @ w[k], [M, D] in x's dtype; with splits float32.

    Args:
      x: [N, C] bfloat16 or float16.
      w: [K, C, D] in x's dtype.
      table: int32 [K, M].
      preparation, dataflow: of the table.
      identity: see `KernelMap`; here an offset like the others.
      config: None for that of `config_for`.
      interpret: False, or plgpu.InterpretGPUParams.
    """
    del identity
    (offsets, inputs, outputs), rows = w.shape, table.shape[1]
    cut: Config = config or config_for("product", rows, offsets, inputs, outputs)
    entries, order, lists = offset_lists(table, preparation, dataflow, cut.warpgroups)
    splits = 1 if order is None else len(preparation)
    dtype = x.dtype if splits == 1 else jnp.float32
    # [K, D, C]: wgmma reads it transposed.
    padding = ((0, 0), (0, -inputs % cut.inputs), (0, -outputs % cut.outputs))
    w = fragment_order(jnp.pad(w, padding).swapaxes(1, 2), 2)
    x, stages, simulate = _whole_loads(x), cut.stages, bool(interpret)
    blocks, tiles = w.shape[2] // cut.inputs, entries.shape[1] // ROWS  # steps of an offset, tiles of 64 rows
    ahead = stages - 2  # a slot rests for a step, so that the warpgroup that fills it need not wait for the others

    def kernel(x_gmem, w_gmem, entries_gmem, lists_gmem, *refs):
        order_gmem, y_gmem, w_smem, y_smem, full, free, *order_smem = refs if order is not None else (None, *refs)
        group, column, warpgroup = (lax.axis_index(name) for name in ("group", "column", "warpgroup"))
        tile = group * cut.warpgroups + warpgroup
        # In the last thread block a warpgroup may have nothing to do: its bits say so.
        here = pl.ds(jnp.minimum(tile, tiles - 1) * ROWS, ROWS)
        columns = pl.ds(column * cut.outputs, cut.outputs)
        first = lists_gmem[group, 1]
        steps = lists_gmem[group, 0] * blocks

        def visit(step):
            return lists_gmem[group, 2 + lax.div(step, jnp.int32(blocks))]

        def offset(step):
            return visit(step) & ((1 << WHO) - 1)

        def block(step):
            return lax.rem(step, jnp.int32(blocks))

        def slot(step):
            return lax.rem(step, jnp.int32(stages))

        def fetch(step):
            weights = w_gmem.at[first + offset(step), columns, pl.ds(block(step) * cut.inputs, cut.inputs)]
            plgpu.copy_gmem_to_smem(weights, w_smem.at[slot(step)], full.at[slot(step)])

        def take(step, numbers):
            return gather(x_gmem, _if(step < steps, numbers), block(step), cut.inputs, simulate)

        @pl.when(warpgroup == 0)
        def _fill():
            pl.loop(0, jnp.minimum(steps, ahead))(fetch)

        if order_gmem is not None:
            places, arrived = order_smem

            @pl.when(tile < tiles)
            def _fetch_order():
                plgpu.copy_gmem_to_smem(order_gmem.at[here], places.at[warpgroup], arrived.at[warpgroup])

        def meet(step, carry):
            total, now, numbers = carry

            @pl.when((warpgroup == 0) & (step + ahead < steps))
            def _refill():
                pl.when(step + ahead >= stages)(lambda: plgpu.barrier_wait(free.at[slot(step + ahead)]))
                fetch(step + ahead)

            later = take(step + 1, numbers)
            numbers = _numbers(entries_gmem, offset(step + 2), here)
            plgpu.barrier_wait(full.at[slot(step)])
            present = lax.shift_right_logical(visit(step), WHO + warpgroup) & 1
            weights = w_smem.at[slot(step)].transpose((1, 0))
            total = lax.cond(
                present == 1,
                lambda total: multiply(total, fragments(now, simulate), weights, simulate),
                lambda total: total,
                total,
            )
            plgpu.barrier_arrive(free.at[slot(step)])
            return total, later, numbers

        zero, one = jnp.int32(0), jnp.int32(1)
        nothing = plgpu.layout_cast(jnp.zeros((ROWS, cut.outputs), jnp.float32), plgpu.Layout.WGMMA)
        now = take(zero, _numbers(entries_gmem, offset(zero), here))
        total, _, _ = lax.fori_loop(0, steps, meet, (nothing, now, _numbers(entries_gmem, offset(one), here)))

        @pl.when(warpgroup == 0)
        def _drain():
            pl.loop(jnp.maximum(steps - stages, 0), steps)(lambda step: plgpu.barrier_wait(free.at[slot(step)]))

        mine = y_smem.at[warpgroup]
        mine[...] = total.astype(dtype)
        plgpu.commit_smem()

        @pl.when(tile < tiles)
        def _write():
            if order_gmem is None:
                plgpu.copy_smem_to_gmem(mine, y_gmem.at[here, columns])
                return
            places, arrived = order_smem
            plgpu.barrier_wait(arrived.at[warpgroup])

            @pl.loop(0, ROWS // 4)
            def _write_four(four):
                to = [places[warpgroup, 4 * four + i] for i in range(4)]

                @plgpu.warp_map
                def _write_row(warp):
                    row = jnp.where(warp < 2, jnp.where(warp == 0, to[0], to[1]), jnp.where(warp == 2, to[2], to[3]))
                    one = mine.at[pl.ds(4 * four + warp, 1)]
                    pl.when(row >= 0)(lambda: plgpu.copy_smem_to_gmem(one, y_gmem.at[pl.ds(row, 1), columns]))

        plgpu.wait_smem_to_gmem(0)

    by_order, places = [], []
    if order is not None:
        by_order = [order]
        places = [plgpu.SMEM((cut.warpgroups, ROWS), jnp.int32), plgpu.Barrier(num_barriers=cut.warpgroups)]
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits * rows if by_order else entries.shape[1], w.shape[1]), dtype),
        # Blocks of the same rows side by side: they gather the same.
        grid=(lists.shape[0], w.shape[1] // cut.outputs),
        grid_names=("group", "column"),
        num_threads=cut.warpgroups,
        thread_name="warpgroup",
        kernel_name="sparse_convolution",
        interpret=interpret,
        scratch_types=(
            plgpu.SMEM((stages, cut.outputs, cut.inputs), x.dtype),
            plgpu.SMEM((cut.warpgroups, ROWS, cut.outputs), dtype),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=cut.warpgroups, num_barriers=stages),
            *places,
        ),
        # No thread both reads and writes a region of shared memory.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x, w, entries, lists, *by_order)
    y = y[: splits * rows, :outputs]
    return functools.reduce(jnp.add, [y[s * rows : (s + 1) * rows] for s in range(splits)])


def chunk_lists(table, preparation, dataflow: Dataflow, identity: int | None):
    """The map as `weight_gradient` walks it.

    Returns:
      (entries, targets, lists): int32 [K, P], rows of x, P a multiple of 64; int32 [S, P], the rows of dy that meet
      them, S being 1, the number of splits, or K; and int32 [K, 1 + P / 64 + 2], how many chunks of 64 places an offset
      visits, which, and zeros.
    """
    (offsets, rows), present = table.shape, None
    padding = ((0, 0), (0, -rows % ROWS))
    entries, targets = table, jnp.arange(rows, dtype=jnp.int32)[None]
    if isinstance(preparation, Pairs):
        entries, same, targets = preparation.inputs, targets[0], preparation.outputs
        present = jnp.arange(pl.cdiv(rows, ROWS)) * ROWS < preparation.counts[:, None]
        if identity is not None:  # not among the pairs
            entries, targets = entries.at[identity].set(table[identity]), targets.at[identity].set(same)
            present = present.at[identity].set(True)
    elif dataflow.kind == "sorted":
        entries = jnp.concatenate([part.table for part in preparation])
        targets = jnp.stack([part.order for part in preparation])
        padding = ((0, 0), (0, -entries.shape[1] % ROWS))
        targets = jnp.pad(targets, ((0, 0), (0, entries.shape[1] - rows)), constant_values=-1)
    entries, targets = (jnp.pad(a, padding, constant_values=-1) for a in (entries, targets))
    if present is None:
        present = (entries.reshape(offsets, -1, ROWS) >= 0).any(2)
    if dataflow.kind == "unsorted":
        present = jnp.ones_like(present)
    chunks, count = compact(present)
    return entries, targets, jnp.concatenate([count[:, None], jnp.pad(chunks, ((0, 0), (0, AHEAD)))], 1)


def weight_gradient(
    x, dy, table, preparation, dataflow: Dataflow, identity: int | None = None, *,
    config: GradientConfig | None = None, interpret: Any = False,
):  # fmt: skip
    """dw[k] = sum_i x[table[k, i]]ᵀ dy[i], float32 [K, C, D]. Rows of dy that read nothing are not read.

    Args:
      x: [N, C] bfloat16 or float16.
      dy: [M, D] in x's dtype.
      table: int32 [K, M].
      preparation, dataflow, identity: of the table.
      config: None for that of `config_for`.
      interpret: False, or plgpu.InterpretGPUParams.
    """
    (offsets, rows), inputs, outputs = table.shape, x.shape[1], dy.shape[1]
    cut: GradientConfig = config or config_for("weight_gradient", rows, offsets, inputs, outputs)
    entries, targets, lists = chunk_lists(table, preparation, dataflow, identity)
    shared = pl.cdiv(offsets, targets.shape[0])  # offsets that share a row of targets
    x, dy, simulate = _whole_loads(x), _whole_loads(dy), bool(interpret)
    tall, wide = pl.cdiv(inputs, cut.inputs), pl.cdiv(outputs, cut.outputs)

    def kernel(x_gmem, dy_gmem, entries_gmem, targets_gmem, lists_gmem, dw_gmem, x_smem, dy_smem):
        offset, part, block = (lax.axis_index(name) for name in ("offset", "part", "block"))
        row, column = lax.div(block, jnp.int32(wide)), lax.rem(block, jnp.int32(wide))
        count = lists_gmem[offset, 0]
        share = lax.div(count + (cut.parts - 1), jnp.int32(cut.parts))
        begin = jnp.minimum(part * share, count)
        end = jnp.minimum(begin + share, count)

        def numbers(step):
            here = pl.ds(lists_gmem[offset, 1 + step] * ROWS, ROWS)
            target = lax.div(offset, jnp.int32(shared))
            return _numbers(entries_gmem, offset, here), _numbers(targets_gmem, target, here)

        def take(step, numbers):
            source, target = numbers
            source = _if(step < end, source)
            taken = gather(x_gmem, source, row, cut.inputs, simulate)
            return taken, gather(dy_gmem, _if(source >= 0, target), column, cut.outputs, simulate)

        def meet(step, carry):
            total, (x, dy), next_numbers = carry
            later, next_numbers = take(step + 1, next_numbers), numbers(step + 2)
            x_smem[...] = x
            dy_smem[...] = dy
            plgpu.commit_smem()
            total = multiply(total, x_smem.transpose((1, 0)), dy_smem, simulate)
            return total, later, next_numbers

        nothing = plgpu.layout_cast(jnp.zeros((cut.inputs, cut.outputs), jnp.float32), plgpu.Layout.WGMMA)
        carry = nothing, take(begin, numbers(begin)), numbers(begin + 1)
        total, _, _ = lax.fori_loop(begin, end, meet, carry)
        here = pl.ds(row * cut.inputs, cut.inputs), pl.ds(column * cut.outputs, cut.outputs)
        dw_gmem[part, offset, *here] = total

    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((cut.parts, offsets, tall * cut.inputs, wide * cut.outputs), jnp.float32),
        grid=(offsets, cut.parts, tall * wide),
        grid_names=("offset", "part", "block"),
        kernel_name="sparse_convolution_weight_gradient",
        interpret=interpret,
        scratch_types=(plgpu.SMEM((ROWS, cut.inputs), x.dtype), plgpu.SMEM((ROWS, cut.outputs), x.dtype)),
    )(x, dy, entries, targets, lists)
    return functools.reduce(jnp.add, list(parts))[:, :inputs, :outputs]
