"""How long a sparse convolution's kernels take, against plain JAX and against what the chip allows. Needs a Hopper GPU.

    python -m pallas_kernels.sparse_convolution.bench                                    # the layers of seven workloads
    python -m pallas_kernels.sparse_convolution.bench --workloads SK-M-1x --backward
    python -m pallas_kernels.sparse_convolution.bench --tune                             # writes tuned.json

The workloads are TorchSparse++'s (arXiv:2311.12862): MinkUNet on SemanticKITTI (SK-M, two widths) and on nuScenes
(NS-M, one and three frames), CenterPoint's backbone on nuScenes (NS-C, ten frames) and on Waymo (WM-C, one and three).
Their maps are those of a random surface, see `surface`, with a scan's density and number of neighbours; the numbers of
voxels are ours. CenterPoint's last layer, which only lowers the grid, is left out.

One row of JSON per shape of layer, with how many `times` the model has it. The programs of a row are timed in turn,
over and over; times are medians in microseconds. They do not count `prepare`, but they do the kernels' own lists, which
a program makes once for all layers of a map. With --backward a program computes the result and both gradients.

us: the kernels with the fastest of their `DATAFLOWS`; us_xla: plain JAX with the fastest of its own. `flops` are those
of the pairs that the map has, `bytes` the map, the rows and the weight, each once; gb_per_s and tflops are these,
divided by us. `floor_us` is the larger of what bytes and flops take, `of_floor` the share of it that was reached; both
are absent where the chip is not in the table.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.sparse_convolution import (
    Dataflow,
    Dataflows,
    mosaic_gpu,
    prepare,
    reference,
    sparse_convolution,
    transpose,
)
from pallas_kernels.sparse_convolution.mosaic_gpu import Kind

# Bytes/s of memory and dense bf16 FLOP/s: NVIDIA's data sheets, SXM modules.
SPEEDS = {"H100": (3.35e12, 989.4e12), "H200": (4.8e12, 989.4e12)}
# Model, its width, voxels.
WORKLOADS = {
    "SK-M-0.5x": ("minkunet", 0.5, 81_000),
    "SK-M-1x": ("minkunet", 1.0, 81_000),
    "NS-M-1f": ("minkunet", 1.0, 20_000),
    "NS-M-3f": ("minkunet", 1.0, 50_000),
    "NS-C-10f": ("centerpoint", 1.0, 100_000),
    "WM-C-1f": ("centerpoint", 1.0, 90_000),
    "WM-C-3f": ("centerpoint", 1.0, 200_000),
}
BY_PAIRS = Dataflow("fetch_on_demand", tile=512)
DATAFLOWS = (Dataflow("tile_skip"), Dataflow("sorted"), Dataflow("sorted", 3))
XLA_DATAFLOWS = (Dataflow("unsorted"), Dataflow("sorted"), BY_PAIRS, Dataflow("gather_scatter", tile=1024))


def surface(voxels: int) -> np.ndarray:
    """About so many sites [N, 3] of rough ground around a scanner whose rays spread, in Morton order.

    Within r voxels of it every column has a site; beyond, up to 6 r, a share (r / distance)^2 of them. On average four
    to five of a site's 27 neighbours are there, itself among them, and more on coarser grids, as in a LiDAR scan.
    """
    rng = np.random.default_rng(0)
    near = np.sqrt(voxels / np.pi / (1 + 2 * np.log(6)))
    axis = np.arange(-int(6 * near), int(6 * near) + 1)
    x, y = (a.ravel() for a in np.meshgrid(axis, axis))
    distance = np.maximum(np.hypot(x, y), 1)
    kept = (distance < 6 * near) & (rng.random(len(x)) < (near / distance) ** 2)
    height = 8 + 4 * np.sin(x / 50) * np.sin(y / 70) + 0.1 * rng.standard_normal(len(x))
    sites = np.stack([x - axis[0], y - axis[0], np.round(height)], 1)[kept].astype(np.int64)
    return sites[np.argsort(_morton(sites), kind="stable")]


def _morton(sites) -> np.ndarray:
    """The bits of the coordinates, interleaved."""
    bits, shift = np.arange(21), 2 - np.arange(3)
    return ((sites[..., None] >> bits & 1) << (3 * bits + shift[:, None])).sum((1, 2))


def coarse(sites) -> np.ndarray:
    """The sites of the grid of twice the pitch, in Morton order too."""
    parents = sites // 2
    return parents[np.unique(_morton(parents), return_index=True)[1]]


def window_table(inputs, outputs, kernel: int, stride: int, padding: int) -> np.ndarray:
    """int32 [kernel^3, M]: the input row at each site q stride - padding + offset, -1 for none."""
    size = 1 << 20
    place = np.asarray([size**2, size, 1])
    keys = (inputs + kernel) @ place
    order = np.argsort(keys)
    table = []
    for offset in itertools.product(range(kernel), repeat=3):
        wanted = (outputs * stride - padding + np.asarray(offset) + kernel) @ place
        at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
        table.append(np.where(keys[at] == wanted, at, -1))
    return np.stack(table).astype(np.int32)


def layers(model: str, width: float) -> collections.Counter:
    """{(kind of map, level, input channels, output channels): how many}."""
    count = collections.Counter()
    if model == "centerpoint":
        sizes = (16, 32, 64, 128)
        count["same", 0, 5, 16] += 1
        for level, size in enumerate(sizes):
            if level:
                count["window", level, sizes[level - 1], size] += 1
            count["same", level, size, size] += 4
        return count
    sizes = [int(width * size) for size in (32, 32, 64, 128, 256, 256, 128, 96, 96)]
    count["same", 0, 4, sizes[0]] += 1
    count["same", 0, sizes[0], sizes[0]] += 1
    for level in range(1, 5):
        before, here = sizes[level - 1 : level + 1]
        count["down", level, before, before] += 1
        count["same", level, before, here] += 1
        count["same", level, here, here] += 3
    for level in range(3, -1, -1):
        before, here = sizes[7 - level], sizes[8 - level]
        count["up", level, before, here] += 1
        count["same", level, here + sizes[level], here] += 1
        count["same", level, here, here] += 3
    return count


class Maps:
    """The tables of a surface, made when asked for."""

    def __init__(self, voxels: int):
        self.sites = [surface(voxels)]
        for _ in range(4):
            self.sites.append(coarse(self.sites[-1]))

    def table(self, kind: str, level: int) -> tuple[Any, int]:
        """([K, M], N), both with rows of padding to a multiple of 128."""
        sites = self.sites[level]
        if kind == "same":
            table, inputs = window_table(sites, sites, 3, 1, 1), len(sites)
        elif kind == "window":
            finer = self.sites[level - 1]
            table, inputs = window_table(finer, sites, 3, 2, 1), len(finer)
        else:
            finer, coarser = (self.sites[level - 1], sites) if kind == "down" else (sites, self.sites[level + 1])
            table, inputs = window_table(finer, coarser, 2, 2, 0), len(finer)
        table = jnp.asarray(np.pad(table, ((0, 0), (0, -table.shape[1] % 128)), constant_values=-1))
        inputs = -(-inputs // 128) * 128
        return (transpose(table, inputs), table.shape[1]) if kind == "up" else (table, inputs)


def draw(table, rows: int, inputs: int, outputs: int, dtype):
    """(x [N, C], w [K, C, D], dy [M, D])."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, inputs), (table.shape[0], inputs, outputs), (table.shape[1], outputs)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def needs(table, rows: int, inputs: int, outputs: int, dtype, backward: bool) -> dict:
    """{"flops", "bytes"} of a layer: both gradients read and write what the result does, and multiply as often."""
    (offsets, sites), times = table.shape, 3 if backward else 1
    moved = rows * inputs + sites * outputs + offsets * inputs * outputs
    pairs = int((table >= 0).sum())
    return {
        "flops": times * 2 * pairs * inputs * outputs,
        "bytes": times * (4 * offsets * sites + moved * jnp.dtype(dtype).itemsize),
    }


def time_in_turn(programs, repeats: int) -> dict:
    """Median microseconds of each {name: (program, arguments)}; the first call of each is not counted."""
    ready = {name: (jax.jit(program), arguments) for name, (program, arguments) in programs.items()}
    times = {name: [] for name in programs}
    for number in range(repeats + 1):
        for name, (program, arguments) in ready.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: 1e6 * statistics.median(of) for name, of in times.items()}


def measure(table, rows: int, inputs: int, outputs: int, dtype, backward: bool, repeats: int) -> dict:
    """One row for one layer."""
    x, w, dy = draw(table, rows, inputs, outputs, dtype)
    transposed, programs = transpose(table, rows), {}

    def program(implementation: Implementation):
        def op(x, w, kernel_map):
            return sparse_convolution(x, w, kernel_map, implementation=implementation)

        def gradients(x, w, kernel_map):
            y, pull = jax.vjp(lambda x, w: op(x, w, kernel_map), x, w)
            return y, pull(dy)

        return gradients if backward else op

    peers: dict[Implementation, tuple[Dataflow, ...]] = {"mosaic_gpu": DATAFLOWS, "xla": XLA_DATAFLOWS}
    for implementation, flows in peers.items():
        for flow in flows:
            kernel_map = prepare(table, transposed, table.shape[1], Dataflows(flow, flow, BY_PAIRS))
            programs[implementation, flow] = program(implementation), (x, w, kernel_map)
    times = time_in_turn(programs, repeats)
    row: dict = {"offsets": table.shape[0], "rows": table.shape[1], "inputs": inputs, "outputs": outputs}
    for name, implementation in (("us", "mosaic_gpu"), ("us_xla", "xla")):
        best = min((key for key in times if key[0] == implementation), key=times.__getitem__)
        row |= {name: round(times[best], 1), name.replace("us", "dataflow"): f"{best[1].kind} {best[1].splits}"}
    row |= needs(table, rows, inputs, outputs, dtype, backward)
    row |= {"times_faster": round(row["us_xla"] / row["us"], 2), "gb_per_s": round(row["bytes"] / row["us"] / 1e3, 1)}
    row |= {"tflops": round(row["flops"] / row["us"] / 1e6, 2)}
    device = jax.devices()[0].device_kind
    if speeds := next((speeds for name, speeds in SPEEDS.items() if name in device), None):
        floor = 1e6 * max(row["bytes"] / speeds[0], row["flops"] / speeds[1])
        row |= {"floor_us": round(floor, 1), "of_floor": round(floor / row["us"], 3)}
    return {"device": device, "dtype": jnp.dtype(dtype).name, "backward": backward} | row


def candidates(chosen) -> list:
    """The counted choice and its neighbours; those that do not compile are left out by `tune`."""
    if isinstance(chosen, mosaic_gpu.GradientConfig):
        inputs = {chosen.inputs, 128} if chosen.outputs <= 128 else {chosen.inputs}
        parts = {max(1, chosen.parts // 2), chosen.parts, 2 * chosen.parts}
        grid = itertools.product(inputs, {chosen.outputs, max(32, chosen.outputs // 64 * 32)}, parts)
        return [mosaic_gpu.GradientConfig(*one) for one in grid]
    outputs = {chosen.outputs, mosaic_gpu.round_up(chosen.outputs // 2, 8), min(256, 2 * chosen.outputs)}
    grid = itertools.product([1, 2, 4], {chosen.inputs, 32, 64}, outputs)
    more = [dataclasses.replace(chosen, stages=stages) for stages in (3, 6)]
    return [*(mosaic_gpu.Config(*one) for one in grid), *more]


def tune(kind: Kind, table, rows: int, inputs: int, outputs: int, dtype, repeats: int) -> dict:
    """The fastest candidate on this GPU for one of a layer's products, as a row of tuned.json."""
    x, w, dy = draw(table, rows, inputs, outputs, dtype)
    flow, operands = (Dataflow("tile_skip"), (x, w)) if kind == "product" else (BY_PAIRS, (x, dy))
    kernel_map = prepare(table, transpose(table, rows), table.shape[1], Dataflows(flow, flow, flow))
    arguments = (*operands, table, kernel_map.forward)
    plain = functools.partial(getattr(reference, kind), dataflow=flow)
    want, programs = jax.jit(plain)(*arguments), {}
    for config in candidates(mosaic_gpu.config_for(kind, table.shape[1], table.shape[0], inputs, outputs)):
        program = functools.partial(getattr(mosaic_gpu, kind), dataflow=flow, config=config)
        try:
            got = jax.jit(program)(*arguments).astype(jnp.float32)
        except Exception as error:  # the compiler's refusals are of many types
            print(f"{config}: {str(error).splitlines()[0]}")
            continue
        wrong = float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))
        if not wrong <= 4 * jnp.finfo(dtype).eps:
            raise RuntimeError(f"{config}: the result is off by {wrong:.1e} of the largest: do not use it.")
        programs[config] = program, arguments
    times = time_in_turn(programs, repeats)
    best = min(times, key=times.__getitem__)
    row = mosaic_gpu.tuned_key(kind, table.shape[1], table.shape[0], inputs, outputs)
    row |= {"dtype": jnp.dtype(dtype).name, "config": dataclasses.asdict(best), "us": round(times[best], 1)}
    return row | {"jax": jax.__version__, "date": datetime.date.today().isoformat()}


def main(argv=None) -> None:
    """Prints a row per layer; with --tune, writes the rows to tuned.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--backward", action="store_true", help="time the result and both gradients")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="try configurations, of every layer")
    options = parser.parse_args(argv)
    if reason := dispatch.no_hopper():
        parser.error(f"there is nothing to measure: {reason}")
    rows, dtype = [], jnp.dtype(options.dtype)
    for name in options.workloads:
        model, width, voxels = WORKLOADS[name]
        maps = Maps(voxels)
        for (kind, level, inputs, outputs), times in layers(model, width).items():
            table, readable = maps.table(kind, level)
            sites = table.shape[1]
            if options.tune:
                there, back = (table, readable, inputs, outputs), (transpose(table, readable), sites, outputs, inputs)
                last = dtype, options.repeats
                rows += [tune("product", *there, *last), tune("product", *back, *last)]
                rows += [tune("weight_gradient", *there, *last)]
                print(*map(json.dumps, rows[-3:]), sep="\n", flush=True)
            else:
                row = measure(table, readable, inputs, outputs, dtype, options.backward, options.repeats)
                print(json.dumps({"workload": name, "map": kind, "level": level, "times": times} | row), flush=True)
    if options.tune:
        key = ("device", "kind", "rows", "offsets", "inputs", "outputs")
        kept = {tuple(row[part] for part in key): row for row in [*mosaic_gpu.tuned_rows(), *rows]}
        text = ",\n ".join(json.dumps(row) for row in kept.values())
        pathlib.Path(mosaic_gpu.__file__).with_name("tuned.json").write_text(f"[{text}]\n")


if __name__ == "__main__":
    main()
