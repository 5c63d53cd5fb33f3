"""How long decode_attention takes, against what the chip's memory allows and against attention libraries.

    python -m pallas_kernels.decode_attention.bench                                    # Llama-3-8B, 32k to 1M slots
    python -m pallas_kernels.decode_attention.bench --contexts 131072 --window 64 256  # a window over a dense cache
    python -m pallas_kernels.decode_attention.bench --tune                             # on a Hopper GPU: tuned.json

One row of JSON per context and store. The programs of a row are timed in turn, over and over, so that all meet the same
machine; times are medians in microseconds. On a GPU one program reads several caches, together larger than the L2
cache, as decoding reads every layer's, and Python's time to start a program is shared.

`bytes` are those that the ranges keep, read once, and q, o and lse. `floor_us` is bytes / bandwidth and `of_bandwidth`
the share of it that was reached; both are absent where the chip is not in the table. us: the op; us_xla: its plain JAX
form; us_whole: XLA's attention over all slots, of a quantised cache after dequantising it; us_cudnn, on a GPU and a
16-bit cache without a window: jax.nn.dot_product_attention's.
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
from pallas_kernels.decode_attention import QuantizedKV, decode_attention, dequantize_kv, mosaic_gpu, quantize_kv

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s: NVIDIA's data sheets, SXM modules
L2_BYTES = 50 * 2**20
CONTEXTS = (32_768, 131_072, 262_144, 1_048_576)
CPU_CONTEXTS = (4_096, 32_768)
STORES = {"bfloat16": 16, "int8": 8, "int4": 4}


def make(batch, heads, kv_heads, width, slots, bits):
    """Random operands: q, and (keys, values)."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, heads, width), jnp.bfloat16)
    store = jax.jit(
        lambda key: jax.lax.map(  # a head at a time: the random numbers are larger than what is kept
            lambda key: _stored(jax.random.normal(key, (batch, slots, width), jnp.bfloat16), bits),
            jax.random.split(key, kv_heads),
        )
    )
    return q, tuple(jax.tree.map(lambda a: a.swapaxes(0, 1), store(key)) for key in keys[1:])


def _stored(x, bits):
    return x if bits == 16 else quantize_kv(x, bits)


def ranges_of(batch: int, kv_heads: int, slots: int, window: tuple[int, int] | None):
    """All slots, or the first and the last of a window."""
    sink, recent = window or (0, slots)
    sink = min(sink, slots)
    return jnp.broadcast_to(jnp.asarray([0, sink, max(sink, slots - recent), slots], jnp.int32), (batch, kv_heads, 4))


def moved_bytes(q, store, ranges) -> int:
    """What must be read and written once."""
    slots = int(jnp.sum(ranges[..., 1] - ranges[..., 0] + ranges[..., 3] - ranges[..., 2]))
    slot = sum(array.nbytes for array in jax.tree.leaves(store)) // (store.shape[0] * store.shape[1] * store.shape[2])
    return 2 * slots * slot + 2 * q.nbytes + 4 * q.shape[0] * q.shape[1]


def time_in_turn(programs, repeats: int) -> dict:
    """Median microseconds per cache of each {name: (attention, caches)}; the first call of each is not counted."""

    def every(attention):
        attention = jax.jit(attention)  # traced and lowered once
        return jax.jit(lambda q, ranges, caches: [attention(q, *cache, ranges) for cache in caches])

    ready = {name: (every(attention), *of) for name, (attention, *of) in programs.items()}
    times = {name: [] for name in programs}
    for number in range(repeats + 1):
        for name, (program, *of) in ready.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*of))
            if number:
                times[name].append((time.perf_counter() - started) / len(of[-1]))
    return {name: 1e6 * statistics.median(of) for name, of in times.items()}


def copies(cache, size: int) -> list:
    """Distinct copies of (keys, values), together larger than the L2 cache; one where there is no GPU."""
    if jax.default_backend() != "gpu":
        return [cache]
    return [cache, *(jax.tree.map(jnp.copy, cache) for _ in range(min(31, 2 * L2_BYTES // size)))]


def whole(q, keys, values, ranges, implementation=None):
    """What a user without the op would write: all slots; `ranges` are not looked at."""
    del ranges
    keys, values = (dequantize_kv(x, q.dtype) if isinstance(x, QuantizedKV) else x for x in (keys, values))
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q[:, None], keys, values, implementation=implementation)


def measure(options, slots: int, store: str) -> dict:
    """One row."""
    heads, kv_heads, width = options.heads
    q, cache = make(options.batch, heads, kv_heads, width, slots, STORES[store])
    ranges = ranges_of(options.batch, kv_heads, slots, options.window)
    size = moved_bytes(q, cache[0], ranges)
    common = q, ranges, copies(cache, size)
    programs = {"us_xla": (functools.partial(decode_attention, implementation="xla"), *common)}
    programs |= {"us_whole": (whole, *common)}
    kernel = dispatch.no_hopper() is None
    if kernel:
        programs |= {"us": (decode_attention, *common)}
        if store == "bfloat16" and not options.window:
            programs |= {"us_cudnn": (functools.partial(whole, implementation="cudnn"), *common)}
    us = time_in_turn(programs, options.repeats)
    us = {"us": us["us_xla"]} | us
    row = {"device": jax.devices()[0].device_kind, "batch": options.batch, "heads": [heads, kv_heads, width]}
    row |= {"slots": slots, "window": options.window, "store": store}
    row |= {"implementation": "mosaic_gpu" if kernel else "xla", "bytes": size}
    row |= {name: round(value, 1) for name, value in us.items()}
    row |= {"gigabytes_per_second": round(size / us["us"] / 1e3, 1)}
    row |= {f"times_faster_than_{name[3:]}": round(us[name] / us["us"], 2) for name in us if us[name] != us["us"]}
    if speed := next((speed for name, speed in BANDWIDTH.items() if name in row["device"]), None):
        floor = 1e6 * size / speed
        row |= {"floor_us": round(floor, 1), "of_bandwidth": round(floor / us["us"], 3)}
    return row


def tune(options, slots: int, store: str) -> dict:
    """The fastest config on this GPU, as a row of tuned.json, for rows and blocks rounded up to powers of two."""
    heads, kv_heads, width = options.heads
    q, cache = make(options.batch, heads, kv_heads, width, slots, STORES[store])
    keys, values = cache
    ranges = ranges_of(options.batch, kv_heads, slots, options.window)
    common = q, ranges, copies(cache, moved_bytes(q, keys, ranges))
    xla = functools.partial(decode_attention, implementation="xla")
    want = xla(q, keys, values, ranges)[0].astype(jnp.float32)
    rows, blocks = options.batch * kv_heads, -(-slots // mosaic_gpu.BLOCK)
    chosen = mosaic_gpu.choose(rows, blocks, STORES[store], width, jax.devices()[0].core_count)
    splits = {max(1, chosen.splits * times // 4) for times in (1, 2, 3, 4, 6, 8, 16)}
    programs: dict = {None: (xla, *common)}
    for config in itertools.starmap(mosaic_gpu.Config, itertools.product(sorted(splits), [2, 3, 4, 6])):

        def attention(q, keys, values, ranges, config=config):
            return mosaic_gpu.decode_attention(q, keys, values, ranges, None, scale=q.shape[2] ** -0.5, config=config)

        try:
            got = jax.jit(attention)(q, keys, values, ranges)[0].astype(jnp.float32)
        except Exception as error:  # the compiler's refusals are of many types
            print(f"{config}: {str(error).splitlines()[0]}")
            continue
        wrong = jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want))
        if not wrong < 0.05:  # a few roundings of weights and result to bfloat16, relative to a mean of many values
            raise RuntimeError(f"{config}: the result is off by {float(wrong):.1e} of the largest: do not use it.")
        programs[config] = attention, *common
    us = time_in_turn(programs, options.repeats)
    best = min((config for config in us if config), key=us.__getitem__)
    row = {"device": jax.devices()[0].device_kind, "rows": 2 ** (rows - 1).bit_length()}
    row |= {"blocks": 2 ** (blocks - 1).bit_length(), "bits": STORES[store], "head_dim": width}
    row |= {"config": dataclasses.asdict(best), "us": round(us[best], 1), "us_xla": round(us[None], 1)}
    return row | {"jax": jax.__version__, "date": datetime.date.today().isoformat()}


def main(argv=None) -> None:
    """Prints a row per context and store; with --tune, writes the rows to tuned.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", nargs="+", type=int, metavar="SLOTS", help="default: 32k to 1M; on a CPU small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", nargs=3, type=int, default=(32, 8, 128), metavar=("N", "K", "H"))
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--window", nargs=2, type=int, metavar=("SINK", "RECENT"), help="slots kept; default: all")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="try configurations on a Hopper GPU")
    options = parser.parse_args(argv)
    if options.tune and (reason := dispatch.no_hopper()):
        parser.error(f"--tune measures on the GPU that the rows are for: {reason}")
    contexts = options.contexts or (CPU_CONTEXTS if jax.default_backend() == "cpu" else CONTEXTS)
    rows = []
    for slots in contexts:
        for store in options.stores:
            rows.append((tune if options.tune else measure)(options, slots, store))
            print(json.dumps(rows[-1]), flush=True)
    if options.tune:
        key = ("device", "rows", "blocks", "bits", "head_dim")
        new = {tuple(row[name] for name in key) for row in rows}
        kept = [row for row in mosaic_gpu.tuned_rows() if tuple(row[name] for name in key) not in new]
        text = ",\n ".join(json.dumps(row) for row in [*kept, *rows])
        pathlib.Path(mosaic_gpu.__file__).with_name("tuned.json").write_text(f"[{text}]\n")


if __name__ == "__main__":
    main()
