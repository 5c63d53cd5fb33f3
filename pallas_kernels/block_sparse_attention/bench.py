"""How long block_sparse_attention takes, against the chip's matrix units and against dense attention.

    python -m pallas_kernels.block_sparse_attention.bench                      # prefill, 8k to 128k tokens
    python -m pallas_kernels.block_sparse_attention.bench --tokens 4096 --dense 1.0 0.5
    python -m pallas_kernels.block_sparse_attention.bench --alone --tokens 131072 --dense 0   # memory, forward only
    python -m pallas_kernels.block_sparse_attention.bench --tune               # on a Hopper GPU: writes tuned.json

One row of JSON per number of tokens, share of dense (causal) heads and direction; the other heads see --sink first and
--recent last keys. The programs of a row are timed in turn, over and over, so that all meet the same machine; times are
medians in microseconds. With backward, a program computes the forward and the gradients.

us: the op. us_dense: on a GPU cuDNN's causal attention of all heads, elsewhere XLA's, which holds all logits at once.
times_faster: us_dense / us. `flops` are those of the kernel's lists of blocks, so a streaming head counts what it
computes: two products forward, five more for the gradients, whatever an implementation computes twice. tflops:
flops / us. `floor_us` is flops / peak, `of_floor` the share of it that was reached; both are absent where the chip is
not in the table. With --alone no peer runs whose logits would bound the length; instead there are temporary_mib, what
the compiled program holds beside inputs and outputs, and peak_mib, the most this process ever held.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import RangeMask, block_sparse_attention, count_logits, mosaic_gpu, reference

# Dense bf16 FLOP/s: NVIDIA's data sheets, SXM modules.
PEAK = {"H100": 989.4e12, "H200": 989.4e12}
TOKENS, CPU_TOKENS = (8192, 16384, 32768, 65536, 131072), (512, 1024)
DENSE = (1.0, 0.5, 0.25)


def make(tokens: int, dense: float, size: int, dtype, *, sink: int, recent: int, heads: int, kv_heads: int):
    """(q, k, v, mask): the first key heads are dense, the others streaming."""
    rng = np.random.default_rng(0)  # NumPy draws in place: no more memory than the operands'
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, tokens, count, size), np.float32), dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    stop = np.arange(tokens, dtype=np.int32) + 1
    first = np.minimum(sink, stop)
    causal = np.stack([0 * stop, stop, stop, stop], axis=-1)
    streaming = np.stack([0 * stop, first, np.clip(stop - recent, first, stop), stop], axis=-1)
    pattern = np.repeat(np.arange(kv_heads) >= round(dense * kv_heads), heads // kv_heads).astype(np.int32)
    return q, k, v, RangeMask(jnp.asarray(np.stack([causal, streaming])[:, None]), pattern)


def listed_flops(q, k, mask: RangeMask) -> int:
    """Floating-point operations of one product over the blocks that the kernel's lists hold, of 128 x 128."""
    counts = count_logits(np.asarray(mask.ranges)[:, 0], k.shape[1])
    return 2 * q.shape[3] * int(counts[np.asarray(mask.pattern)].sum())


def gradients(attention):
    """A program that also computes the gradients of the sum of the outputs."""
    return jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v).astype(jnp.float32)), (0, 1, 2))


def time_in_turn(programs, arguments, repeats: int) -> dict:
    """Median microseconds of each {name: program}; the first call of each is not counted."""
    ready = {name: jax.jit(program) for name, program in programs.items()}
    times = {name: [] for name in programs}
    for number in range(repeats + 1):
        for name, program in ready.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: 1e6 * statistics.median(of) for name, of in times.items()}


def dense_attention(q, k, v):
    """Causal attention of all heads: cuDNN's on a GPU."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def measure(tokens: int, dense: float, backward: bool, repeats: int, *, alone: bool = False, **shape) -> dict:
    """One row."""
    q, k, v, mask = make(tokens, dense, **shape)

    def op(q, k, v):
        return block_sparse_attention(q, k, v, mask)[0]

    programs = {"us": op} if alone else {"us": op, "us_dense": dense_attention}
    if backward:
        programs = {name: gradients(program) for name, program in programs.items()}
    us = time_in_turn(programs, (q, k, v), repeats)
    flops = listed_flops(q, k, mask) * (7 if backward else 2)
    kernel = dispatch.no_hopper() is None and mosaic_gpu.unsupported(q, k, v) is None
    row = {"device": jax.devices()[0].device_kind, "tokens": tokens, "dense": dense, "backward": backward}
    row |= {"heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3], "dtype": q.dtype.name}
    row |= {"implementation": "mosaic_gpu" if kernel else "xla", "flops": flops}
    row |= {name: round(value, 1) for name, value in us.items()}
    row |= {"tflops": round(flops / us["us"] / 1e6, 3)}
    if alone:
        memory = jax.jit(programs["us"]).lower(q, k, v).compile().memory_analysis()
        row |= {"temporary_mib": round(memory.temp_size_in_bytes / 2**20, 1)} if memory else {}
        row |= {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10}
    else:
        row |= {"times_faster": round(us["us_dense"] / us["us"], 3)}
    if peak := next((peak for name, peak in PEAK.items() if name in row["device"]), None):
        row |= {"floor_us": round(1e6 * flops / peak, 1), "of_floor": round(1e6 * flops / peak / us["us"], 3)}
    return row


def candidates(chosen: mosaic_gpu.Config) -> list[mosaic_gpu.Config]:
    """What may fit the shared memory; those that do not compile are left out by `tune`."""
    forward = itertools.product([64, 128], [2, 3, 4], [True, False])
    configs = [dataclasses.replace(chosen, keys=k, stages=s, ping_pong=p) for k, s, p in forward]
    configs += [dataclasses.replace(chosen, dq_stages=s) for s in (2, 3, 4, 6, 8, 12)]
    return [*configs, *(dataclasses.replace(chosen, dkv_stages=s) for s in (1, 2, 3, 4))]


def tune(tokens: int, repeats: int, **shape) -> dict:
    """The fastest of each field on this GPU, as a row of tuned.json; half of the heads are dense."""
    q, k, v, mask = make(tokens, 0.5, **shape)
    options = {"scale": q.shape[3] ** -0.5}

    def plain(function, *arguments):
        xla = getattr(reference, function.__name__)
        program = jax.jit(functools.partial(xla, soft_cap=None, **options))
        return [out.astype(jnp.float32) for out in program(*arguments)]

    o, lse = block_sparse_attention(q, k, v, mask, implementation="xla")
    backward = q, k, v, o, lse, q, jnp.zeros_like(lse), mask.ranges, mask.pattern
    forward = q, k, v, mask.ranges, mask.pattern
    best, us = mosaic_gpu.config_for(q.shape[3], q.dtype), {}
    for function, arguments, fields in (
        (mosaic_gpu.forward, forward, ("keys", "stages", "ping_pong")),
        (mosaic_gpu.backward, backward, ("dq_stages",)),
        (mosaic_gpu.backward, backward, ("dkv_stages",)),
    ):
        programs, want = {}, plain(function, *arguments[:-2], mask)
        for choice in {tuple((field, getattr(config, field)) for field in fields) for config in candidates(best)}:
            program = functools.partial(function, config=dataclasses.replace(best, **dict(choice)), **options)
            try:
                got = jax.block_until_ready(jax.jit(program)(*arguments))
            except Exception as error:  # the compiler's refusals are of many types
                print(f"{choice}: {str(error).splitlines()[0]}")
                continue
            for one, other in zip(got, want, strict=True):
                wrong = jnp.max(jnp.abs(one.astype(jnp.float32) - other)) / jnp.max(jnp.abs(other))
                if not wrong <= 4 * jnp.finfo(q.dtype).eps:
                    raise RuntimeError(f"{choice}: off by {float(wrong):.1e} of the largest: do not use it.")
            programs[choice] = program
        times = time_in_turn(programs, arguments, repeats)
        fastest = min(times, key=times.__getitem__)
        best = dataclasses.replace(best, **dict(fastest))
        us[function.__name__] = round(times[fastest], 1)
    row = {"device": jax.devices()[0].device_kind, "head_dim": q.shape[3], "dtype": q.dtype.name, "tokens": tokens}
    row |= {"config": dataclasses.asdict(best), "us": us}
    return row | {"jax": jax.__version__, "date": datetime.date.today().isoformat()}


def main(argv=None) -> None:
    """Prints a row per case; with --tune, writes the rows to tuned.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 8k to 128k; on a CPU 512 and 1024")
    parser.add_argument("--dense", nargs="+", type=float, default=DENSE, help="shares of dense heads")
    parser.add_argument("--heads", type=int, help="query heads; default 32, on a CPU 4")
    parser.add_argument("--kv_heads", type=int, help="default 8, on a CPU 4")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--alone", action="store_true", help="forward only, without a peer: time and memory")
    parser.add_argument("--tune", action="store_true", help="try configurations on a Hopper GPU")
    options = parser.parse_args(argv)
    if options.tune and (reason := dispatch.no_hopper()):
        parser.error(f"--tune measures on the GPU that the rows are for: {reason}")
    small = jax.default_backend() == "cpu"
    shape = {"size": options.head_dim, "dtype": jnp.dtype(options.dtype), "sink": options.sink}
    shape |= {"recent": options.recent, "heads": options.heads or (4 if small else 32)}
    shape |= {"kv_heads": options.kv_heads or (4 if small else 8)}
    tokens = options.tokens or (CPU_TOKENS if small else TOKENS)
    if options.tune:
        row = tune(max(options.tokens or [16384]), options.repeats, **shape)
        print(json.dumps(row))
        key = ("device", "head_dim", "dtype")
        kept = [old for old in mosaic_gpu.tuned_rows() if any(old[name] != row[name] for name in key)]
        text = ",\n ".join(json.dumps(one) for one in [*kept, row])
        pathlib.Path(mosaic_gpu.__file__).with_name("tuned.json").write_text(f"[{text}]\n")
        return
    for one, dense, backward in itertools.product(tokens, options.dense, (False,) if options.alone else (False, True)):
        print(
            json.dumps(measure(one, dense, bool(backward), options.repeats, alone=options.alone, **shape)), flush=True
        )


if __name__ == "__main__":
    main()
