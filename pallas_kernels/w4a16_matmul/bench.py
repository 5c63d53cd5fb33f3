"""How long w4a16_matmul takes, against what the chip's memory and matrix units allow and against 16-bit weights.

    python -m pallas_kernels.w4a16_matmul.bench                                # the Llama-3-8B layers
    python -m pallas_kernels.w4a16_matmul.bench --shapes 16x4096x14336         # tokens x input x output channels
    python -m pallas_kernels.w4a16_matmul.bench --tune                         # on a Hopper GPU: writes tuned.json

One row of JSON per shape. The programs of a row are timed in turn, over and over, so that all meet the same machine;
times are medians in microseconds. On a GPU one program multiplies by several copies of the weight, together larger than
the L2 cache, as decoding reads every layer's weights from memory, and Python's time to start a program is shared.
`floor_us` is the larger of bytes / bandwidth and 2 M D F / peak, `of_floor` the share of it that was reached; both are
absent where the chip is not in the table. us: the op; us_xla: its plain JAX form; us_dequantise: XLA's product after
dequantising everything; us_dense: XLA's product with a 16-bit weight.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.w4a16_matmul import PackedInt4, dequantize, mosaic_gpu, w4a16_matmul

# Bytes/s of memory and dense bf16 FLOP/s: NVIDIA's data sheets, SXM modules.
SPEEDS = {"H100": (3.35e12, 989.4e12), "H200": (4.8e12, 989.4e12)}
L2_BYTES = 50 * 2**20
# Input and output channels: o_proj; k_proj or v_proj; q, k and v together; gate_proj; gate and up together; down_proj.
LLAMA_3_8B = ((4096, 4096), (4096, 1024), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096))
SHAPES = tuple((m, d, f) for d, f in LLAMA_3_8B for m in (1, 16, 64, 512, 4096))
CPU_SHAPES = ((1, 4096, 4096), (16, 4096, 4096), (512, 1024, 1024))


def make(m: int, d: int, f: int, group: int, dtype):
    """Random operands; every bit pattern of the words is a weight."""
    keys = jax.random.split(jax.random.key(0), 4)
    words = jax.random.bits(keys[1], (f, -(-d // 128) * 32), jnp.uint16)
    zero = jax.random.randint(keys[2], (d // group, f), 0, 16).astype(dtype)
    scale = jax.random.uniform(keys[3], zero.shape, dtype, 0.5, 1.5) / 8
    return jax.random.normal(keys[0], (m, d), dtype), PackedInt4(words, scale, zero, group, -d % 128)


def moved_bytes(x, w: PackedInt4) -> int:
    """What must be read and written once: activations, words, scales and zeros, and the result."""
    d, f = w.shape
    return x.nbytes + d * f // 2 + w.scale.nbytes + w.zero.nbytes + x.shape[0] * f * x.dtype.itemsize


def time_in_turn(programs, repeats: int) -> dict:
    """Median microseconds per weight of each {name: (product, x, weights)}; the first call of each is not counted."""

    def every(product):
        product = jax.jit(product)  # traced and lowered once
        return jax.jit(lambda x, weights: [product(x, w) for w in weights])

    ready = {name: (every(product), x, weights) for name, (product, x, weights) in programs.items()}
    times = {name: [] for name in programs}
    for number in range(repeats + 1):
        for name, (program, x, weights) in ready.items():
            started = time.perf_counter()
            jax.block_until_ready(program(x, weights))
            if number:
                times[name].append((time.perf_counter() - started) / len(weights))
    return {name: 1e6 * statistics.median(of) for name, of in times.items()}


def copies(w, size: int, limit: int = 32) -> list:
    """Distinct copies of a weight, together larger than the L2 cache (if `limit` allows); one where there is no GPU."""
    if jax.default_backend() != "gpu":
        return [w]
    return [jax.tree.map(jnp.copy, w) for _ in range(min(limit, -(-2 * L2_BYTES // size)))]


def dequantise_all(x, w):
    """What a user without the op would write."""
    return x @ dequantize(w, x.dtype)


def measure(m: int, d: int, f: int, group: int, dtype, repeats: int) -> dict:
    """One row for one shape."""
    x, w = make(m, d, f, group, dtype)
    dense = jax.jit(dequantize)(w)
    packed, plain = copies(w, w.words.nbytes), copies(dense, dense.nbytes)
    xla = functools.partial(w4a16_matmul, implementation="xla")
    programs = {"us_xla": (xla, x, packed), "us_dequantise": (dequantise_all, x, packed)}
    programs |= {"us_dense": (jnp.matmul, x, plain)}
    kernel = dispatch.no_hopper() is None
    if kernel:
        programs |= {"us": (w4a16_matmul, x, packed)}
    us = time_in_turn(programs, repeats)
    us = {"us": us["us_xla"]} | us
    row = {"device": jax.devices()[0].device_kind, "m": m, "d": d, "f": f, "group": group, "dtype": x.dtype.name}
    row |= {"implementation": "mosaic_gpu" if kernel else "xla", "bytes": moved_bytes(x, w), "flops": 2 * m * d * f}
    row |= {name: round(value, 1) for name, value in us.items()}
    row |= {"times_faster_than_dense": round(us["us_dense"] / us["us"], 2)}
    row |= {"times_faster_than_dequantise": round(us["us_dequantise"] / us["us"], 2)}
    if speeds := next((speeds for name, speeds in SPEEDS.items() if name in row["device"]), None):
        floor = 1e6 * max(row["bytes"] / speeds[0], row["flops"] / speeds[1])
        row |= {"floor_us": round(floor, 1), "of_floor": round(floor / us["us"], 3)}
    return row


def candidates(m: int, d: int, f: int) -> set[mosaic_gpu.Config]:
    """The counted choice and its neighbours; those that do not compile are left out by `tune`."""
    chosen = mosaic_gpu.choose(m, d, f, jax.devices()[0].core_count)
    splits = sorted({max(1, chosen.split_k // 2), chosen.split_k, chosen.split_k + 1, 2 * chosen.split_k})
    tokens = [chosen.tokens] if m <= 64 else [64, 128, 256]
    scales = ("weights", "partials") if m <= 64 else ("weights",)
    grid = itertools.product(tokens, [2, 3, 4], [1, 2], [2, 3, 4], scales, splits)
    return {chosen, *(mosaic_gpu.Config(*one) for one in grid)}


def tune(m: int, d: int, f: int, group: int, dtype, repeats: int) -> dict:
    """The fastest candidate on this GPU, as a row of tuned.json, for up to m tokens rounded up to a power of two."""
    m = max(8, 2 ** (m - 1).bit_length())
    x, w = make(m, d, f, group, dtype)
    packed = copies(w, w.words.nbytes)
    xla = functools.partial(w4a16_matmul, implementation="xla")
    want = xla(x, w).astype(jnp.float32)
    programs: dict = {None: (xla, x, packed)}
    for config in candidates(m, d, f):
        product = functools.partial(mosaic_gpu.w4a16_matmul, config=config)
        try:
            wrong = jnp.max(jnp.abs(jax.jit(product)(x, w).astype(jnp.float32) - want)) / jnp.max(jnp.abs(want))
        except Exception as error:  # the compiler's refusals are of many types
            print(f"{config}: {str(error).splitlines()[0]}")
            continue
        if wrong > 4 * jnp.finfo(dtype).eps:
            raise RuntimeError(f"{config}: the result is off by {float(wrong):.1e} of the largest: do not use it.")
        programs[config] = product, x, packed
    us = time_in_turn(programs, repeats)
    best = min((config for config in us if config), key=us.__getitem__)
    row = {"device": jax.devices()[0].device_kind, "m": m, "d": d, "f": f, "group": group, "dtype": x.dtype.name}
    row |= {"config": dataclasses.asdict(best), "us": round(us[best], 1), "us_xla": round(us[None], 1)}
    return row | {"jax": jax.__version__, "date": datetime.date.today().isoformat()}


def main(argv=None) -> None:
    """Prints a row per shape; with --tune, writes the rows to tuned.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="MxDxF", help="default: Llama-3-8B; on a CPU three small ones")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="try configurations on a Hopper GPU")
    options = parser.parse_args(argv)
    if options.tune and (reason := dispatch.no_hopper()):
        parser.error(f"--tune measures on the GPU that the rows are for: {reason}")
    shapes = CPU_SHAPES if jax.default_backend() == "cpu" else SHAPES
    if options.shapes:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in options.shapes]
    run = tune if options.tune else measure
    rows = []
    for m, d, f in dict.fromkeys(shapes):
        rows.append(run(m, d, f, options.group, jnp.dtype(options.dtype), options.repeats))
        print(json.dumps(rows[-1]), flush=True)
    if options.tune:
        key = ("device", "m", "d", "f", "group")
        new = {tuple(row[name] for name in key) for row in rows}
        kept = [row for row in mosaic_gpu.tuned_rows() if tuple(row[name] for name in key) not in new]
        text = ",\n ".join(json.dumps(row) for row in [*kept, *rows])
        pathlib.Path(mosaic_gpu.__file__).with_name("tuned.json").write_text(f"[{text}]\n")


if __name__ == "__main__":
    main()
