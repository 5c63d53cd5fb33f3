"""int4 weights x bf16/fp16 activations for Hopper in Pallas Mosaic GPU, dequantised in registers.

wgmma takes its first operand from registers, its second from shared memory. So the kernel computes the transposed
product, y.T = w.T @ x.T: the weight tile is unpacked in registers and is operand A; the activations go by TMA to
shared memory and are operand B. Tokens are then wgmma's N dimension, any multiple of 8, so one body serves prefill
(128 tokens a tile) and decode (8 to 64 tokens, D split over thread blocks). Where the scales go is what differs:

    scale_on="weights":   y.T += [scale * (q - zero)] @ x.T                    2 more operations per pair of weights
    scale_on="partials":  y.T += scale * ([bias + q] @ x.T - (bias + zero) * sum(x))          per group of weights

With few tokens the second is far cheaper: unpacking is then a shift, a mask and an or; `bias + q` is exact.

`stage_weights` is static: "registers" is what a GPU runs; "smem" writes the unpacked tile to shared memory first, which
the interpreter can run. Ring, index maps, group boundaries, ragged edges, split and store are the same code in both.

No GPU has run this kernel yet. What neither the interpreter nor the compiler has proven:
  - the order of every `wgmma_wait` against the release of a slot (products are synchronous in the interpreter);
  - `unpack_inline`, which "registers" uses: it computes what `unpack` does, which is interpreted, on pairs of words;
  - that the register tile's layout, checked by the compiler, holds the channels that the shared tile holds;
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
from jaxlib.mlir.dialects import arith

from pallas_kernels.w4a16_matmul.packed_int4 import PLANE, SPAN, PackedInt4

# Integers 0..15 below this bit pattern are `bias + q` in the float format: no int -> float conversion is needed.
MAGIC = {jnp.dtype(jnp.bfloat16): (0x4300, 128), jnp.dtype(jnp.float16): (0x6400, 1024)}
SNAKE = 16  # tiles of tokens walked before the next tile of output channels, so that both stay in the L2 cache


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut. The defaults are for prefill."""

    tokens: int = 128  # per thread block: a multiple of 8, at most 256
    consumers: int = 2  # warpgroups that unpack and multiply, 64 output channels each
    spans: int = 1  # packed tiles of 128 input channels per slot of the ring
    stages: int = 4  # slots of the ring
    scale_on: Literal["weights", "partials"] = "weights"
    split_k: int = 1  # thread blocks that share one output tile, each a part of D; their float32 parts are summed


def choose(m: int, d: int, f: int, sms: int = 132) -> Config:
    """The config for [m, d] x [d, f] on a GPU with that many SMs, by counting: no measurement stands behind it.

    Up to 64 tokens the weights' bytes decide: 64 to 96 KB of them in flight on every SM, and D is cut until the grid
    fills the GPU. Above, the tensor cores do. The cost of a cut is counted in slots of the ring: the waves of blocks,
    each as long as its slots and two more to fill the ring, and the float32 parts that are written and read again.
    """
    if m <= 32:
        tokens = next(tokens for tokens in (8, 16, 32) if m <= tokens)
        config = Config(tokens, consumers=4, spans=2, stages=3, scale_on="partials")
    elif m <= 64:  # float32 partials of 64 tokens would not fit four consumers' registers
        config = Config(tokens=64, consumers=4)
    else:
        config = Config()
    channels, depth = 64 * config.consumers, SPAN * config.spans
    tiles, steps = pl.cdiv(m, config.tokens) * pl.cdiv(f, channels), pl.cdiv(d, depth)
    slot_bytes = depth * (channels // 2 + 2 * config.tokens)
    part = 2 * 4 * config.tokens * channels / slot_bytes

    def cost(split):
        return pl.cdiv(tiles * split, sms) * (pl.cdiv(steps, split) + 2 + part * (split > 1))

    split = min(range(1, min(steps, 16) + 1), key=cost)
    # A float32 part of 128 tokens leaves no room for a fourth slot.
    stages = 3 if split > 1 and config.tokens == 128 else config.stages
    return dataclasses.replace(config, split_k=split, stages=stages)


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


@functools.cache
def tuned_rows() -> tuple[dict, ...]:
    """The measured choices of `bench --tune`."""
    return tuple(json.loads(pathlib.Path(__file__).with_name("tuned.json").read_text()))


def config_for(m: int, d: int, f: int, group: int) -> Config:
    """The measured choice for this chip, shape and number of tokens (up to the next power of two), else `choose`."""
    device = jax.devices()[0]
    here = {"device": device.device_kind, "m": max(8, pl.next_power_of_2(m)), "d": d, "f": f, "group": group}
    for row in tuned_rows():
        if all(row[key] == value for key, value in here.items()):
            return Config(**row["config"])
    # Elsewhere the program is compiled for an absent GPU, or interpreted.
    return choose(m, d, f, device.core_count if device.platform == "gpu" else 132)


def per_row(vector, like):
    """[F] -> [F, C]."""
    return lax.broadcast_in_dim(vector, like.shape, (0,))


def unpack(words, nibble: int, dtype):
    """[F, C] uint16 -> bias + q of one nibble position (0..3), exact in dtype."""
    q = lax.shift_right_logical(words, jnp.uint16(4 * nibble)) & jnp.uint16(15)
    return lax.bitcast_convert_type(q | jnp.uint16(MAGIC[dtype][0]), dtype)


def pair_steps(nibble: int, dtype) -> tuple[int, int, int]:
    """(right shift, mask, bits to set) that unpack two words of one 32-bit register at once, as `unpack` does each.

    The mask drops what the shift brings from the upper word into the lower one.
    """
    return 4 * nibble, 0x000F000F, 0x10001 * MAGIC[dtype][0]


def unpack_inline(words, nibble: int, dtype):
    """`unpack` on pairs of words in 32-bit registers, in fewer instructions; compiles, but cannot be interpreted."""
    layout, (shift, mask, magic) = plgpu.Layout.WGMMA, pair_steps(nibble, dtype)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(words.shape, dtype, layout=layout))
    def plane(_, w):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        out = np.empty_like(w.registers)
        for i, register in np.ndenumerate(w.registers):
            value = mgpu.utils.bitcast(register, i32)
            value = arith.shrui(value, constant(shift)) if shift else value
            value = arith.ori(arith.andi(value, constant(mask)), constant(magic))
            out[i] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(_registers=out, _layout=w.layout, _is_signed=None)

    return plane(words)  # pyright: ignore[reportCallIssue]  the context is passed by inline_mgpu


def apply_scale(value, scale, zero):
    """bias + q [F, C] and [F] scale and zero -> scale * (q - zero), exact up to the rounding of the product."""
    bias = scale.dtype.type(MAGIC[scale.dtype][1])
    return (value - per_row(zero + bias, value)) * per_row(scale, value)


def rescale(partial, token_sum, scale, zero):
    """Finishes a group in float32: scale * (partial - (bias + zero) * token_sum), [F, M] from [F, M], [M], [F], [F]."""
    bias = MAGIC[scale.dtype][1]
    scale, zero = scale.astype(jnp.float32), zero.astype(jnp.float32)
    token_sum = lax.broadcast_in_dim(token_sum, partial.shape, (1,))
    return per_row(scale, partial) * (partial - per_row(zero + bias, partial) * token_sum)


def token_sums(x, period: int, rows: int):
    """[M, D] -> [rows, M rounded up to 4] float32: each token's sum over every `period` input channels."""
    m, d = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, -m % 4), (0, rows * period - d)))
    return x.reshape(-1, rows, period).sum(-1).T


def w4a16_matmul(
    x,
    w: PackedInt4,
    *,
    config: Config,
    stage_weights: Literal["registers", "smem"] = "registers",
    interpret: Any = False,
):
    """x @ dequantize(w), [M, D] x [D, F] -> [M, F] in x's dtype, bfloat16 or float16; accumulates in float32.

    scale and zero are cast to x's dtype. The kernel itself takes any M, D and F: TMA reads zeros outside an array and
    drops what is stored there. But the compiler wants arrays of whole swizzle tiles, so x is padded here (copied) if M
    is above 8 and no multiple of 8, or D of 32; y is cut if F is no multiple of 64; and if F is no multiple of 8, the
    words themselves are copied at every call: give such a layer more output channels when it is packed.

    Args:
      x: [M, D], M >= 1.
      w: the weight, not stacked.
      config: a choice of `choose`, or of the tuning table.
      stage_weights: "smem" for the interpreter.
      interpret: False, or plgpu.InterpretGPUParams.
    """
    (m, d), f = x.shape, w.shape[1]
    rows = m if m < 8 else round_up(m, 8)
    x = jnp.pad(x, ((0, rows - m), (0, -d % PLANE)))
    words = jnp.pad(w.words, ((0, -f % 8), (0, 0)))
    scale, zero = (jnp.pad(side.astype(x.dtype), ((0, 0), (0, -f % 8))) for side in (w.scale, w.zero))

    tokens, depth, block_f = config.tokens, config.spans * SPAN, 64 * config.consumers
    tiles_m, tiles_f = pl.cdiv(m, tokens), pl.cdiv(f, block_f)
    steps = pl.cdiv(d, depth * config.split_k)  # per thread block; steps past D read zeros
    whole_row = scale.shape[0] == 1
    period = depth if whole_row else w.group  # input channels after which the scale is looked up again
    out_dtype = jnp.dtype(jnp.float32 if config.split_k > 1 else x.dtype)
    unpack_words = unpack_inline if stage_weights == "registers" else unpack

    def kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, sums_gmem, y_gmem, y_smem, *staging):
        consumer, part = lax.axis_index("warpgroup"), lax.axis_index("part")
        tile_m, tile_f = plgpu.planar_snake(lax.axis_index("tile"), (tiles_m, tiles_f), 0, SNAKE)
        channels = pl.ds(64 * consumer, 64)

        def side(scale_smem, zero_smem, channel):
            at = (channel // period, channels)
            layout = plgpu.Layout.WGMMA.reduce(1)
            return plgpu.load(scale_smem.at[at], layout=layout), plgpu.load(zero_smem.at[at], layout=layout)

        def feed(acc, weight, x_smem, channel):
            """acc += weight @ x.T over one plane of 32 input channels."""
            if stage_weights == "smem":
                plgpu.wgmma_wait(1)  # the multiplication before last has read this buffer
                buffer = staging[0].at[consumer, channel // PLANE % 2]
                buffer[...] = weight
                plgpu.commit_smem()
                weight = buffer
            plgpu.wgmma(acc, weight, x_smem.at[:, channel : channel + PLANE].T)

        def planes(words_smem):
            """Yields (words, nibble, first input channel) of every plane in the slot."""
            for span in range(config.spans):
                words = plgpu.load(
                    words_smem.at[channels, span * PLANE : (span + 1) * PLANE], layout=plgpu.Layout.WGMMA
                )
                for nibble in range(4):
                    yield words, nibble, span * SPAN + nibble * PLANE

        def multiply(_, words_smem, x_smem, scale_smem, zero_smem, acc):
            for words, nibble, channel in planes(words_smem):
                if channel % period == 0:
                    scale, zero = side(scale_smem, zero_smem, channel)
                feed(acc, apply_scale(unpack_words(words, nibble, x.dtype), scale, zero), x_smem, channel)
            plgpu.wgmma_wait(0)
            return acc

        def multiply_groups(_, words_smem, x_smem, scale_smem, zero_smem, sums_smem, total):
            slot = list(planes(words_smem))
            for start in range(0, len(slot), period // PLANE):

                def one_group(partial, start=start):
                    for words, nibble, channel in slot[start : start + period // PLANE]:
                        feed(partial, unpack_words(words, nibble, x.dtype), x_smem, channel)
                    return partial[...]  # waits for the products

                partial = pl.run_scoped(one_group, plgpu.WGMMAAccumulatorRef((64, tokens), jnp.float32))
                channel = slot[start][2]
                token_sum = plgpu.load(sums_smem.at[channel // period], layout=plgpu.Layout.WGMMA.reduce(0))
                total += rescale(partial, token_sum, *side(scale_smem, zero_smem, channel))
            return total

        def write(total):
            total = total.astype(out_dtype)
            if out_dtype.itemsize == 4:  # a 16-bit tile is transposed by the store itself (stmatrix)
                total = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
            y_smem.at[consumer].T[...] = total
            plgpu.commit_smem()
            here = (part, pl.ds(tile_m * tokens, tokens), pl.ds(tile_f * block_f + 64 * consumer, 64))
            plgpu.copy_smem_to_gmem(y_smem.at[consumer], y_gmem.at[here])
            plgpu.wait_smem_to_gmem(0)

        def compute(run_pipeline):
            def scoped(acc):
                run_pipeline(acc)
                write(acc[...])

            if config.scale_on == "weights":
                pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef((64, tokens), jnp.float32))
            else:
                write(run_pipeline(plgpu.layout_cast(jnp.zeros((64, tokens), jnp.float32), plgpu.Layout.WGMMA)))

        def at(step):
            return part * steps + step

        # The pipeline wants index maps that depend on the step, so a whole row's scale is read again for every slot.
        side_spec = plgpu.BlockSpec((depth // period, block_f), lambda s: (0 * s if whole_row else at(s), tile_f))
        specs = [
            plgpu.BlockSpec((block_f, config.spans * PLANE), lambda s: (tile_f, at(s))),
            plgpu.BlockSpec((tokens, depth), lambda s: (tile_m, at(s))),
            side_spec,
            side_spec,
        ]
        operands = [words_gmem, x_gmem, scale_gmem, zero_gmem]
        if config.scale_on == "partials":
            specs.append(plgpu.BlockSpec((depth // period, tokens), lambda s: (at(s), tile_m)))
            operands.append(sums_gmem)
        plgpu.emit_pipeline_warp_specialized(
            multiply if config.scale_on == "weights" else multiply_groups,
            grid=(steps,),
            in_specs=specs,
            wg_axis="warpgroup",
            num_compute_wgs=config.consumers,
            memory_registers=40,
            max_concurrent_steps=config.stages,
            compute_context=compute,
        )(*operands)

    # No transforms anywhere: the compiler infers 64-byte swizzles from wgmma's planes of 32 channels.
    scratch = [plgpu.SMEM((config.consumers, tokens, 64), out_dtype)]
    if stage_weights == "smem":
        scratch.append(plgpu.SMEM((config.consumers, 2, 64, PLANE), x.dtype))
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((config.split_k, rows, round_up(f, 64)), out_dtype),
        grid=(tiles_m * tiles_f, config.split_k),
        grid_names=("tile", "part"),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        kernel_name="w4a16_matmul",
        interpret=interpret,
        scratch_types=scratch,
        # No thread both reads and writes a region, and nobody reads what an asynchronous copy is about to overwrite.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x, words, scale, zero, token_sums(x, period, pl.cdiv(x.shape[1], period)))
    y = y[:, :m, :f]
    return y[0] if config.split_k == 1 else y.sum(0).astype(x.dtype)
