"""The Hopper kernels of sparse_convolution: interpreted against float64, compiled to machine code, run on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from pallas_kernels.aot import compile_reports
from pallas_kernels.sparse_convolution import (
    Dataflow,
    Dataflows,
    KernelMap,
    bench,
    mosaic_gpu,
    prepare,
    sparse_convolution,
    transpose,
    unsupported,
)
from pallas_kernels.sparse_convolution.mosaic_gpu import Config, GradientConfig

BF16, FP16 = jnp.bfloat16, jnp.float16
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


# --- A case, and what it should give, from the definition in float64.


def random_table(rng, offsets, inputs, outputs, used, density):
    """[K, M]: an offset reads a row at most once; rows from `used` on read nothing; the last rows are not read."""
    table = np.full((offsets, outputs), -1, np.int32)
    readable = inputs - inputs // 8
    for row in table:
        readers = np.flatnonzero(rng.random(used) < density)[:readable]
        row[readers] = np.sort(rng.permutation(readable)[: len(readers)])
    return table


@dataclasses.dataclass
class Case:
    """Operands, a cotangent and a map."""

    x: jax.Array
    w: jax.Array
    dy: jax.Array
    kernel_map: KernelMap

    def want(self):
        """{name: (value, bound on what rounding may do to it)}; rows that nothing names may be anything.

        The result is rounded once, half an eps of it; an addition in float32 costs at most 2^-24 of the sum of the
        magnitudes, and there are as many as terms.
        """
        table = np.asarray(self.kernel_map.table)
        operands = [np.asarray(a, np.float64) for a in (self.x, self.w, self.dy)]

        def products(x, w, dy):
            y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
            for k, row in enumerate(table):
                (to,), at = np.nonzero(row >= 0), row[row >= 0]
                y[to] += x[at] @ w[k]
                dx[at] += dy[to] @ w[k].T
                dw[k] = x[at].T @ dy[to]
            return y, dx, dw

        eps = float(jnp.finfo(self.x.dtype).eps)
        sizes, terms = products(*map(abs, operands)), max(len(table) * max(self.w.shape[1:]), table.shape[1])
        results = zip(("y", "dx", "dw"), products(*operands), sizes, strict=True)
        return {name: (value, eps / 2 * abs(value) + terms * 2**-24 * size) for name, value, size in results}

    def run(self, implementation):
        """(y, dx, dw) of the op."""

        def op(x, w):
            return sparse_convolution(x, w, self.kernel_map, implementation=implementation)

        y, pull = jax.vjp(op, self.x, self.w)
        return y, *pull(self.dy)


def make(table, rows, inputs, outputs, flows, dtype=BF16, identity=None):
    """Random operands; rows that the table does not name are NaN."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, w, dy = draw(rows, inputs), draw(len(table), inputs, outputs), draw(table.shape[1], outputs)
    reading = (table >= 0).any(0)
    x = jnp.where(np.isin(np.arange(rows), table)[:, None], x, jnp.nan)
    dy = jnp.where(reading[:, None], dy, jnp.nan)
    used, table = int(np.flatnonzero(reading)[-1]) + 1, jnp.asarray(table)
    return Case(x, w, dy, prepare(table, transpose(table, rows), used, flows, identity))


def check(case, got):
    for (name, (want, bound)), value in zip(case.want().items(), got, strict=True):
        assert value.dtype == case.x.dtype
        wrong = np.abs(np.asarray(value, np.float64) - want) - bound
        assert wrong.max() <= 0, (name, wrong.max(), bound.flat[wrong.argmax()])


def no_races():
    """jax 0.12 raises at a race; 0.11 only notes it."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return not interpret_pallas_call.get_races().races_found


def alike(*arguments, **options):
    flow = Dataflow(*arguments, **options)
    return Dataflows(flow, flow, flow)


def strided(offsets=8, rows=150, outputs=70):
    """Four rows of padding; a tile of 64 rows without offset 2, the rest without offset 1."""
    table = random_table(np.random.default_rng(0), offsets, rows, outputs, outputs - 4, 0.3)
    table[2, :64] = table[1, 64:] = -1
    return table


def submanifold(offsets=27, rows=140):
    """The middle offset reads the row itself, half of the others none of the first 64 rows; ten rows of padding."""
    rng = np.random.default_rng(0)
    table = random_table(rng, offsets, rows, rows, rows - 10, 0.2)
    table[rng.random(offsets) < 0.5, :64] = -1
    table[offsets // 2] = np.where(np.arange(rows) < rows - 10, np.arange(rows), -1)
    return table


CASES = {
    "unsorted, few channels": lambda: make(strided(), 150, 4, 24, alike("unsorted")),
    "skipped offsets": lambda: make(submanifold(27, 100), 100, 48, 40, alike("tile_skip")),
    "sorted": lambda: make(submanifold(9, 72), 72, 20, 8, alike("sorted"), FP16),
    "splits, blocks of channels": lambda: make(strided(3, 40, 40), 40, 100, 136, alike("sorted", splits=2)),
    "pairs": lambda: make(submanifold(9, 100), 100, 32, 64, alike("fetch_on_demand"), identity=4),
    "groups, no identity": lambda: make(strided(), 150, 33, 16, alike("gather_scatter"), FP16),
}


# --- The kernels, interpreted with race detection; a race raises.


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case):
    """Every flow, ragged ends, rows of padding, and NaN in all rows that no entry names."""
    case = CASES[case]()
    check(case, case.run("interpret"))
    assert no_races()


@pytest.mark.parametrize("kind", ["tile_skip", "sorted"])
def test_more_warpgroups_and_steps_than_slots(kind):
    """Five tiles for thread blocks of four; two steps an offset in a ring of three slots. Twice: the same bits."""
    case = make(strided(6, 300, 300), 300, 64, 24, alike(kind))
    of = case.kernel_map.table, case.kernel_map.forward, case.kernel_map.dataflows.forward
    run = functools.partial(mosaic_gpu.product, config=Config(4, 32, 24, 3), interpret=INTERPRET)
    y = run(case.x, case.w, *of)
    want, bound = case.want()["y"]
    assert (np.abs(np.asarray(y, np.float64) - want) <= bound).all()
    np.testing.assert_array_equal(y, run(case.x, case.w, *of))
    assert no_races()


def test_shares_of_a_weight_gradient():
    """Four thread blocks share an offset, some of them nothing; 128 channels at once. Twice: the same bits."""
    case = make(strided(3, 300, 300), 300, 100, 40, alike("fetch_on_demand"))
    of = case.kernel_map.table, case.kernel_map.wgrad, case.kernel_map.dataflows.wgrad
    run = functools.partial(mosaic_gpu.weight_gradient, config=GradientConfig(128, 32, 4), interpret=INTERPRET)
    dw = run(case.x, case.dy, *of)
    want, bound = case.want()["dw"]
    assert (np.abs(np.asarray(dw, np.float64) - want) <= bound).all()
    np.testing.assert_array_equal(dw, run(case.x, case.dy, *of))


def test_skipped_work_is_not_done():
    """A weight of NaN spoils the tiles of 64 rows that have its offset, and no others."""
    case = make(strided(), 150, 32, 8, alike("tile_skip"))
    w = case.w.at[1].set(jnp.nan)
    of = case.kernel_map.table, case.kernel_map.forward, case.kernel_map.dataflows.forward
    run = functools.partial(mosaic_gpu.product, config=Config(2, 32, 8, 3), interpret=INTERPRET)
    y, clean = run(case.x, w, *of), run(case.x, case.w, *of)
    assert np.isnan(np.asarray(y[:64], np.float32)).all()
    np.testing.assert_array_equal(y[64:], clean[64:])


def test_interpreted_kernel_in_shard_map(in_turn):
    """Two devices, each with its own rows and its own map."""
    cases = [
        make(random_table(np.random.default_rng(i), 3, 64, 64, 60, 0.4), 64, 32, 8, alike("sorted")) for i in (0, 1)
    ]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows, columns = PartitionSpec("data"), PartitionSpec(None, "data")
    w = cases[0].w

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, columns, rows), out_specs=rows, check_vma=False)
    def convolve(x, table, counts):
        kernel_map = prepare(table, transpose(table, 64), counts[0], alike("sorted"))
        return in_turn(lambda x: sparse_convolution(x, w, kernel_map, implementation="interpret"), ("data",), x)

    x = jnp.concatenate([jnp.nan_to_num(case.x) for case in cases])
    table = jnp.concatenate([case.kernel_map.table for case in cases], 1)
    y = jax.jit(convolve)(x, table, jnp.asarray([60, 60]))
    for case, got in zip(cases, np.split(np.asarray(y, np.float64), 2), strict=True):
        want, bound = dataclasses.replace(case, w=w).want()["y"]
        assert (np.abs(got - want) <= bound).all()


# --- What the kernels walk.


def test_offset_lists():
    table = np.full((3, 200), -1, np.int32)
    table[0, 70], table[1, [3, 199]], table[2, 130] = 5, (0, 1), 7
    entries, order, lists = mosaic_gpu.offset_lists(jnp.asarray(table), None, Dataflow("tile_skip"), 2)
    assert order is None
    assert entries.shape == (3, 256)
    # Rows 0-63 have offset 1, 64-127 offset 0; 128-191 offset 2, 192-255 offset 1.
    np.testing.assert_array_equal(
        lists, [[2, 0, 0 + (2 << 16), 1 + (1 << 16), 0, 0, 0], [2, 0, 1 + (2 << 16), 2 + (1 << 16), 0, 0, 0]]
    )
    _, _, lists = mosaic_gpu.offset_lists(jnp.asarray(table[:, :192]), None, Dataflow("unsorted"), 2)
    everyone, first = [[k + (bits << 16) for k in range(3)] for bits in (3, 1)]  # the last thread block has one tile
    np.testing.assert_array_equal(lists, [[3, 0, *everyone, 0, 0], [3, 0, *first, 0, 0]])


def test_splits_name_their_rows_and_offsets():
    table = jnp.asarray(strided(5, 60, 66))
    flow = Dataflow("sorted", 2)
    parts = prepare(table, transpose(table, 60), 62, Dataflows(flow, flow, flow)).forward
    entries, order, lists = mosaic_gpu.offset_lists(table, parts, flow, 1)
    assert entries.shape == (3, 256)
    for split, part in enumerate(parts):
        places = order[128 * split : 128 * split + 66]
        np.testing.assert_array_equal(np.sort(places), 66 * split + np.arange(66))
        begin, end = part.offsets
        for k in range(begin, end):
            np.testing.assert_array_equal(
                entries[k - begin, 128 * split : 128 * split + 66], table[k, places - 66 * split]
            )
    np.testing.assert_array_equal(lists[:, 1], [0, 0, 3, 3])
    assert (order[66:128] == -1).all()


@pytest.mark.parametrize("identity", [None, 4])
@pytest.mark.parametrize("flow", [Dataflow(kind) for kind in ("unsorted", "tile_skip", "sorted", "fetch_on_demand")])
def test_chunks_hold_every_pair_once(flow, identity):
    table = submanifold(9)
    kernel_map = prepare(
        jnp.asarray(table), transpose(jnp.asarray(table), 140), 130, Dataflows(flow, flow, flow), identity
    )
    entries, targets, lists = map(
        np.asarray, mosaic_gpu.chunk_lists(kernel_map.table, kernel_map.wgrad, flow, identity)
    )
    for k in range(9):
        chunks = lists[k, 1 : 1 + lists[k, 0]]
        assert len(set(chunks)) == len(chunks)
        places = (64 * chunks[:, None] + np.arange(64)).ravel()
        source, target = entries[k, places], targets[k // -(-9 // len(targets)), places]
        got = {(int(a), int(b)) for a, b in zip(source, target, strict=True) if a >= 0}
        assert got == {(int(a), i) for i, a in enumerate(table[k]) if a >= 0}
        if flow.kind == "fetch_on_demand" and k != identity:
            assert len(chunks) == -(-len(got) // 64)


def test_layers_of_one_map_share_its_lists():
    """XLA makes the lists once for all layers of a program."""

    def lists(layers):
        def program(table):
            return [mosaic_gpu.offset_lists(table, None, Dataflow("tile_skip"), 4)[2] for _ in range(layers)]

        return jax.jit(program).lower(jax.ShapeDtypeStruct((27, 4096), jnp.int32)).compile().as_text()

    one, three = lists(1).count("fusion("), lists(3).count("fusion(")
    assert one == three > 0


def held(layout, shape):
    """The elements, numbered, that each thread of a warpgroup holds: [warps, lanes, *registers, elements of one]."""
    array = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        outer, split = array.shape[: -len(tile)], array.shape[-len(tile) :]
        array = array.reshape(*outer, *(n for size, t in zip(split, tile, strict=True) for n in (size // t, t)))
        first = range(len(outer), array.ndim, 2)
        array = array.transpose(*range(len(outer)), *first, *(axis + 1 for axis in first))
    moved = [axis % array.ndim for axis in (*layout.warp_dims, *layout.lane_dims, layout.vector_dim)]
    array = np.moveaxis(array, moved, [*range(len(moved) - 1), -1])
    lanes = array.reshape(4, 32, *array.shape[len(moved) - 1 :])
    return lanes.reshape(4, 32, *layout.registers_shape(shape), layout.vector_length)


@pytest.mark.parametrize("width", [32, 96])
def test_registers_of_the_gather_are_those_of_the_product(width):
    """What a thread loads, renamed, is what wgmma takes from it, with the channels in `fragment_order`."""
    gathered = held(mosaic_gpu.GATHERED.to_mgpu(), (64, width))
    wanted = held(plgpu.Layout.WGMMA.to_mgpu(), (64, width))
    order = np.asarray(mosaic_gpu.fragment_order(jnp.arange(64 * width).reshape(64, width), 1)).ravel()
    for warp, lane in np.ndindex(4, 32):
        registers = np.empty(gathered.shape[2:-1], dtype=object)
        for at in np.ndindex(registers.shape):
            registers[at] = gathered[(warp, lane, *at)]
            assert (np.diff(registers[at]) == 1).all()  # eight neighbouring channels
        renamed = mosaic_gpu.renamed(registers, lambda eight, part: eight[part])
        for at, two in np.ndenumerate(renamed):
            np.testing.assert_array_equal(two, order[wanted[(warp, lane, *at)]])


# --- What the kernel takes, and how work is cut.


def test_what_the_kernel_does_not_take():
    case = make(strided(), 150, 4, 24, alike("unsorted"))
    assert unsupported(case.x, case.w, case.kernel_map) is None
    with pytest.raises(ValueError, match="interpret cannot run this: x is float32 and the kernel takes bfloat16"):
        sparse_convolution(case.x.astype(jnp.float32), case.w, case.kernel_map, implementation="interpret")
    assert unsupported(case.x[:, :0], case.w[:, :0], case.kernel_map) == "there is nothing to multiply"
    many = jax.ShapeDtypeStruct((1 << 16, 4, 24), BF16)
    assert "65536 offsets" in str(unsupported(case.x, many, case.kernel_map))


def test_choices():
    assert mosaic_gpu.choose(81920, 64, 64) == Config(4, 64, 64)
    assert mosaic_gpu.choose(20480, 256, 256) == Config(4, 64, 128)  # 80 thread blocks of 256 rows, twice
    assert mosaic_gpu.choose(20480, 96, 96) == Config(2, 96, 96)
    assert mosaic_gpu.choose(2560, 4, 20) == Config(1, 32, 24)
    assert mosaic_gpu.choose(81920, 160, 320) == Config(4, 64, 112)
    assert mosaic_gpu.choose_gradient(81920, 27, 64, 64) == GradientConfig(64, 64, 30)
    assert mosaic_gpu.choose_gradient(2560, 27, 256, 256) == GradientConfig(64, 128, 4)


def test_bench_needs_the_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main([])
    assert "there is nothing to measure: the kernel needs a Hopper GPU" in capsys.readouterr().err


def test_bench_has_maps_like_a_scan():
    maps = bench.Maps(5000)
    assert 4500 < len(maps.sites[0]) < 5500
    table, rows = maps.table("same", 0)
    table = np.asarray(table)
    count = len(maps.sites[0])
    np.testing.assert_array_equal(table[13, :count], np.arange(count))
    assert table.shape[1] == rows == -(-count // 128) * 128
    assert 3.5 < (table >= 0).sum() / count < 5.5  # a LiDAR scan has about four
    # Every fine site has one parent, through one of eight offsets; upwards is downwards turned around.
    down, fine = maps.table("down", 1)
    np.testing.assert_array_equal(np.sort(down[down >= 0]), np.arange(count))
    up, coarse = maps.table("up", 0)
    np.testing.assert_array_equal(transpose(down, fine), up)
    assert coarse == down.shape[1]
    need = bench.needs(down, fine, 16, 32, BF16, backward=False)
    assert need["flops"] == 2 * count * 16 * 32
    assert need["bytes"] == 4 * down.size + 2 * (fine * 16 + coarse * 32 + 8 * 16 * 32)
    # MinkUNet: 2 + 4 x 5 + 4 x 5 convolutions with maps; CenterPoint: 17 + 3.
    assert sum(bench.layers("minkunet", 1.0).values()) == 42
    assert sum(bench.layers("centerpoint", 1.0).values()) == 20


# --- Compiled for an absent Hopper GPU.


def product(x, w, table, *, flow, config):
    preparation = prepare(table, table, table.shape[1], Dataflows(flow, flow, flow)).forward
    return mosaic_gpu.product(x, w, table, preparation, flow, config=config)


def weight_gradient(x, dy, table, *, flow, config):
    preparation = prepare(table, table, table.shape[1], Dataflows(flow, flow, flow)).wgrad
    return mosaic_gpu.weight_gradient(x, dy, table, preparation, flow, config=config)


def test_every_configuration_compiles_for_hopper():
    """No spills, no stack, no wgmma that waits for the one before; the products and loads that are asked for."""
    cases, wanted = [], []

    def add(function, inputs, outputs, flow, config, rows=81920, offsets=27, dtype=BF16):
        shape = jax.ShapeDtypeStruct
        other = (offsets, inputs, outputs) if function is product else (rows, outputs)
        operands = shape((rows, inputs), dtype), shape(other, dtype), shape((offsets, rows), jnp.int32)
        cases.append((functools.partial(function, flow=flow, config=config), operands))
        if function is product:
            wanted.append((config.inputs // 16, config.inputs // 16))
        else:
            loads = 2 * sum(-(-min(pair) // 32) for pair in ((inputs, config.inputs), (outputs, config.outputs)))
            wanted.append((4 * (config.inputs // 64), loads))

    skip, by_pairs = Dataflow("tile_skip"), Dataflow("fetch_on_demand")
    for inputs, outputs in ((4, 32), (64, 64), (96, 96), (256, 256), (160, 20)):
        add(product, inputs, outputs, skip, mosaic_gpu.choose(81920, inputs, outputs))
    add(product, 32, 24, skip, mosaic_gpu.choose(2560, 32, 24), rows=2560, offsets=8, dtype=FP16)
    add(product, 64, 64, Dataflow("sorted"), mosaic_gpu.choose(20480, 64, 64), rows=20480)
    add(product, 96, 128, Dataflow("sorted", 3), mosaic_gpu.choose(81920, 96, 128))
    add(product, 4, 20, Dataflow("sorted", 2), mosaic_gpu.choose(81920, 4, 20), dtype=FP16)
    for inputs, outputs in ((4, 32), (64, 64), (256, 256)):
        add(weight_gradient, inputs, outputs, by_pairs, mosaic_gpu.choose_gradient(81920, 27, inputs, outputs))
    add(weight_gradient, 96, 96, Dataflow("sorted", 2), mosaic_gpu.choose_gradient(81920, 27, 96, 96), dtype=FP16)
    for row in mosaic_gpu.tuned_rows():
        function, config = (product, Config) if row["kind"] == "product" else (weight_gradient, GradientConfig)
        flow, sizes = skip if function is product else by_pairs, (row["inputs"], row["outputs"])
        add(function, *sizes, flow, config(**row["config"]), rows=row["rows"], offsets=row["offsets"])
    reports = compile_reports(cases)
    for (function, _), (products, loads), (report,) in zip(cases, wanted, reports, strict=True):
        assert report.spill_bytes == report.stack_bytes == 0, (function, report)
        assert not report.serialised_wgmma, (function, report)
        assert report.hot_loop["HGMMA"] == products, (function, report)
        assert loads <= report.hot_loop["LDG"] <= loads + 4, (function, report)  # and a few numbers of the lists


# --- On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_small_cases(case):
    case = CASES[case]()
    check(case, case.run("mosaic_gpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 32), (64, 96), (128, 128), (256, 256), (160, 20)])
@pytest.mark.parametrize("flow", [Dataflow("tile_skip"), Dataflow("sorted"), Dataflow("sorted", 3), bench.BY_PAIRS])
def test_gpu_matches_float64(flow, inputs, outputs, dtype):
    table, rows = bench.Maps(5000).table("same", 0)
    case = make(np.asarray(table), rows, inputs, outputs, Dataflows(flow, flow, flow), dtype, identity=13)
    check(case, case.run("mosaic_gpu"))


@pytest.mark.gpu
def test_gpu_repeats_itself():
    table, rows = bench.Maps(20000).table("window", 1)
    case = make(np.asarray(table), rows, 64, 128, alike("sorted", 3))
    first = case.run("mosaic_gpu")
    for _ in range(20):
        for one, other in zip(first, case.run("mosaic_gpu"), strict=True):
            np.testing.assert_array_equal(one, other)
