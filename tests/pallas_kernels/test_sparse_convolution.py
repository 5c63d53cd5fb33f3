"""Sparse convolution as an op: every dataflow on maps without any geometry, the maps' preparations, and their counts.

Cases of 27 offsets, 256 rows and 5 to 7 channels share one program per dataflow, TorchSparse's recorded layers
included. Their values are whole numbers where not recorded: all float32 sums are exact, so that comparisons are too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_convolution import (
    Dataflow,
    Dataflows,
    executed,
    group_offsets,
    pairs,
    prepare,
    sparse_convolution,
    split_offsets,
    transpose,
)

OFFSETS, ROWS, INPUTS, OUTPUTS = 27, 256, 5, 7
CENTRE = 13
# Three groups, the centre among them, none in order.
GROUPS = (tuple(range(26, 15, -1)), (0, 5, 13, 2), (1, 3, 4, *range(6, 13), 14, 15))
FLOWS = {
    "unsorted": Dataflow("unsorted"),
    **{f"sorted-{splits}": Dataflow("sorted", splits, tile=64) for splits in (1, 2, 3, 4)},
    "sorted-ragged": Dataflow("sorted", tile=100),
    "tile_skip": Dataflow("tile_skip", tile=64),
    "gather_scatter": Dataflow("gather_scatter", tile=32),
    "gather_scatter-groups": Dataflow("gather_scatter", tile=24, groups=GROUPS),
    "fetch_on_demand": Dataflow("fetch_on_demand", tile=32),
}
UNSORTED = Dataflows(Dataflow("unsorted"), Dataflow("unsorted"), Dataflow("unsorted"))
each_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS.keys())


def random_table(rng, offsets, inputs, outputs, used, density, identity=None):
    """[offsets, outputs] with what a convolution guarantees: an offset reads a row once, and padding reads nothing.

    Rows of output from `used` on are padding. Rows of input from `used` on are read like any other, except that the
    rows of a map with a centre are the same on both sides.
    """
    table = np.full((offsets, outputs), -1, np.int32)
    readable = inputs if identity is None else used
    for row in table:
        present = rng.choice(used, rng.binomial(used, density * rng.random()), replace=False)
        row[present] = rng.permutation(readable)[: len(present)]
    if identity is not None:
        table[identity, :used] = np.arange(used)
    return table


def whole(rng, *shape):
    return rng.integers(-3, 4, shape).astype(np.float32)


def gather(rows, indices):
    """rows[indices], zero for -1."""
    return np.where((indices >= 0)[:, None], np.nan_to_num(rows)[indices], 0)


def by_offsets(x, w, dy, table):
    """(y, dx, dw) from their definitions, offset by offset, in the arguments' precision."""
    y, dx, dw = np.zeros((table.shape[1], w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
    for k, row in enumerate(table):
        y += gather(x, row) @ w[k]
        dw[k] = gather(x, row).T @ np.nan_to_num(dy)
        np.add.at(dx, row[row >= 0], np.nan_to_num(dy)[row >= 0] @ w[k].T)
    return y, dx, dw


@functools.partial(jax.jit, static_argnames=("flow", "identity"))
def convolve(x, w, table, count, dy, flow, identity=None):
    """(y, dx, dw), with one dataflow for all three."""
    kernel_map = prepare(table, transpose(table, len(x)), count, Dataflows(flow, flow, flow), identity)
    y, pull = jax.vjp(lambda x, w: sparse_convolution(x, w, kernel_map, implementation="xla"), x, w)
    return y, *pull(dy)


@pytest.fixture(scope="module", params=[CENTRE, None], ids=["centre", "no centre"])
def case(request):
    """(x, w, table, count, dy, identity): sparse and dense offsets, empty ones, and NaN wherever nobody may look."""
    rng = np.random.default_rng(0)
    count = 177
    table = random_table(rng, OFFSETS, ROWS, ROWS, count, 0.5, request.param)
    table[[3, 20]] = -1
    table[:, 150:160] = -1  # rows that read nothing
    if request.param is not None:
        table[request.param, 150:160] = np.arange(150, 160)
    x, w, dy = whole(rng, ROWS, INPUTS), whole(rng, OFFSETS, INPUTS, OUTPUTS), whole(rng, ROWS, OUTPUTS)
    x[~np.isin(np.arange(ROWS), table)] = np.nan
    dy[count:] = np.nan
    return x, w, table, np.int32(count), dy, request.param


@each_flow
def test_exact_on_whole_numbers(case, flow):
    x, w, table, count, dy, identity = case
    got = convolve(x, w, table, count, dy, flow, identity)
    for name, ours, wanted in zip(("y", "dx", "dw"), got, by_offsets(x, w, dy, table), strict=True):
        np.testing.assert_array_equal(ours, wanted, err_msg=name)


@each_flow
def test_repeats_to_the_bit(case, flow):
    _, _, table, count, _, identity = case
    rng = np.random.default_rng(1)
    x, w, dy = (
        rng.standard_normal(s, np.float32) for s in ((ROWS, INPUTS), (OFFSETS, INPUTS, OUTPUTS), (ROWS, OUTPUTS))
    )
    first, second = (convolve(x, w, table, count, dy, flow, identity) for _ in range(2))
    wanted = by_offsets(
        x.astype(np.float64), w.astype(np.float64), np.where(np.arange(ROWS)[:, None] < count, dy, 0), table
    )
    for ours, again, exact in zip(first, second, wanted, strict=True):
        np.testing.assert_array_equal(ours, again)
        # float32 sums of at most 256 products of normal numbers.
        np.testing.assert_allclose(ours, exact, rtol=0, atol=256 * 2**-24 * 8)


@each_flow
@pytest.mark.parametrize(
    ("name", "identity"),
    [("subm_k3", CENTRE), ("strided_k3s2_p1_range", None), ("strided_k3s2_p0_window", None)],
)
def test_matches_torchsparse(golden, name, identity, flow):
    file = golden(f"torchsparse/{name}")
    table = file["out/out_in_map"].T
    rows, inputs = table.shape[1], len(file["in/feats"])

    def padded(rows):
        return np.pad(rows, ((0, ROWS - len(rows)), (0, 0)), constant_values=np.nan)

    y, dx, dw = convolve(
        padded(file["in/feats"]),
        file["weights/kernel"],
        np.pad(table, ((0, 0), (0, ROWS - rows)), constant_values=-1),
        np.int32(rows),
        padded(file["in/grad_out"]),
        flow,
        identity,
    )
    # From the goldens' README: float32 sums of up to 27 x 7 products.
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(y[:rows] + file["weights/bias"], file["out/feats"], **tolerance)
    np.testing.assert_allclose(dx[:inputs], file["out/grad_feats"], **tolerance)
    np.testing.assert_allclose(dw, file["out/grad_kernel"], **tolerance)
    assert not np.asarray(y[rows:]).any()
    assert not np.asarray(dx[inputs:]).any()


@pytest.mark.parametrize("flow", [Dataflow("sorted", tile=64), Dataflow("sorted", 5, tile=64)], ids=["1", "5"])
def test_more_offsets_than_a_mask_has_bits(flow):
    """125 offsets, from more rows to fewer, in ranges of 31 at most and of 25."""
    rng = np.random.default_rng(2)
    table = random_table(rng, 125, 192, 130, 130, 0.2)
    x, w, dy = whole(rng, 192, 3), whole(rng, 125, 3, 2), whole(rng, 130, 2)
    for ours, wanted in zip(convolve(x, w, table, 130, dy, flow), by_offsets(x, w, dy, table), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["unsorted", "sorted", "gather_scatter"])
def test_half_precision_accumulates_in_float32(kind, dtype):
    """2048 + 26 ones: a running sum in half precision would stay at 2048, in bfloat16 at 256."""
    big = 2048.0
    table = np.tile(np.arange(8, dtype=np.int32), (OFFSETS, 1))
    x = np.ones((8, 1), dtype)
    w = np.ones((OFFSETS, 1, 1), np.float32)
    w[0] = big
    y, dx, dw = convolve(x, w, table, 8, np.ones((8, 1), dtype), Dataflow(kind, tile=8))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    wanted = np.asarray(big + OFFSETS - 1).astype(dtype)
    np.testing.assert_array_equal(y, np.full((8, 1), wanted))
    np.testing.assert_array_equal(dx, np.full((8, 1), wanted))
    np.testing.assert_array_equal(dw, np.full((OFFSETS, 1, 1), 8.0))


def test_transpose_and_pairs_list_the_same_entries():
    rng = np.random.default_rng(3)
    table = random_table(rng, 6, 40, 30, 25, 0.7)
    back = np.asarray(transpose(jnp.asarray(table), 40))
    listed = pairs(jnp.asarray(table))
    wanted = [[(row[i], i) for i in range(30) if row[i] >= 0] for row in table]
    assert [sorted((j, i) for j, i in enumerate(row) if i >= 0) for row in back.tolist()] == list(map(sorted, wanted))
    np.testing.assert_array_equal(transpose(jnp.asarray(back), 30), table)
    for k, entries in enumerate(wanted):
        count = int(listed.counts[k])
        got = np.stack([listed.inputs[k], listed.outputs[k]], 1)
        assert got[:count].tolist() == [list(entry) for entry in entries]
        assert (got[count:] == -1).all()


def counted(table, flow, *, identity=None, gradient=False):
    """Rows that a dataflow multiplies, from its description."""
    offsets, outputs = table.shape

    def up(rows):
        return -(-rows // flow.tile) * flow.tile

    if flow.kind == "unsorted":
        return offsets * outputs
    present = table >= 0
    if flow.kind in ("gather_scatter", "fetch_on_demand"):
        counts = present.sum(1).tolist()
        direct = 0
        if identity is not None:
            counts[identity], direct = 0, outputs
        # A weight gradient has nothing to batch: it takes every offset by itself.
        groups = flow.groups if flow.groups and not gradient else [(k,) for k in range(offsets)]
        return direct + sum(len(group) * up(max(counts[k] for k in group)) for group in groups)
    total = 0
    length = -(-offsets // flow.splits)
    for begin in range(0, offsets, length):
        part = present[begin : begin + length]
        if flow.kind == "sorted":
            # The rarest offset decides first.
            bits = np.argsort(np.argsort(-part.sum(1), kind="stable"))
            masks = [sum(2 ** int(bit) for bit in bits[column]) for column in part.T]
            part = part[:, sorted(range(outputs), key=lambda row, masks=masks: -masks[row])]
        tiles = [part[:, row : row + flow.tile].any(1).sum() for row in range(0, outputs, flow.tile)]
        total += sum(tiles) * flow.tile
    return total


@pytest.mark.parametrize("identity", [None, 4])
def test_executed_counts_the_rows_that_are_multiplied(identity):
    rng = np.random.default_rng(4)
    used = 60 if identity is None else 70
    table = random_table(rng, 9, 70, 70, used, 0.6, identity)
    flows = [
        Dataflow("unsorted"),
        *(Dataflow("sorted", splits, tile=8) for splits in (1, 2, 4)),
        Dataflow("tile_skip", tile=8),
        Dataflow("gather_scatter", tile=8),
        Dataflow("gather_scatter", tile=8, groups=((8, 0, 1), (4,), (2, 3, 5, 6, 7))),
        Dataflow("fetch_on_demand", tile=16),
    ]

    @jax.jit
    def count_all(table):
        back = transpose(table, 70)
        return [executed(prepare(table, back, used, Dataflows(flow, flow, flow), identity)) for flow in flows]

    back = np.asarray(transpose(jnp.asarray(table), 70))
    for flow, got in zip(flows, count_all(table), strict=True):
        assert {name: int(rows) for name, rows in got.items()} == {
            "needed": (table >= 0).sum(),
            "forward": counted(table, flow, identity=identity),
            "dgrad": counted(back, flow, identity=identity),
            "wgrad": counted(table, flow, identity=identity, gradient=True),
        }, flow


def test_sorted_rows_skip_what_neighbours_do_not():
    """Rows that alternate between two offsets: tiles of neighbours need both for every row, sorted ones one."""
    table = np.full((2, 64), -1, np.int32)
    table[0, ::2], table[1, 1::2] = np.arange(32), np.arange(32)
    back = np.full((2, 32), -1, np.int32)
    back[0], back[1] = np.arange(0, 64, 2), np.arange(1, 64, 2)

    @functools.partial(jax.jit, static_argnames="kind")
    def count(kind):
        flows = Dataflows(Dataflow(kind, tile=16), Dataflow("unsorted"), Dataflow("unsorted"))
        return executed(prepare(jnp.asarray(table), jnp.asarray(back), 64, flows))["forward"]

    wanted = {"unsorted": 128, "tile_skip": 128, "sorted": 64}
    assert {kind: int(count(kind)) for kind in wanted} == wanted


def test_split_offsets():
    assert split_offsets(27, 1) == ((0, 27),)
    assert split_offsets(27, 4) == ((0, 7), (7, 14), (14, 21), (21, 27))
    assert split_offsets(2, 4) == ((0, 1), (1, 2))
    # No range is longer than a mask.
    assert split_offsets(125, 1) == ((0, 31), (31, 62), (62, 93), (93, 124), (124, 125))
    assert split_offsets(31, 1) == ((0, 31),)


def test_group_offsets():
    """Walked from the longest; a group ends where padding its shortest to its longest would waste more than epsilon."""
    counts = [10, 9, 100, 95, 50]
    assert group_offsets(counts, 0) == ((2,), (3,), (4,), (0,), (1,))
    assert group_offsets(counts, 0.125) == ((2, 3), (4,), (0, 1))
    assert group_offsets(counts, 0.5) == ((2, 3, 4), (0, 1))
    assert group_offsets(counts, 0.9375) == ((2, 3, 4, 0, 1),)
    assert group_offsets([7, 7, 7], 0) == ((0, 1, 2),)
    assert sorted(offset for group in group_offsets([0, 3, 0], 0.5) for offset in group) == [0, 1, 2]
    for epsilon in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"group_offsets: epsilon={epsilon}; wanted 0 <= epsilon < 1"):
            group_offsets(counts, epsilon)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "Dataflow: tile=0, splits=1; wanted numbers above 0"),
        ({"splits": 0}, "Dataflow: tile=128, splits=0; wanted numbers above 0"),
        ({"kind": "unsorted", "splits": 2}, "Dataflow: splits=2 with 'unsorted'; only 'sorted' has splits"),
        ({"groups": ((0,),)}, "Dataflow: groups with 'sorted'; only 'gather_scatter' has groups"),
        ({"kind": "implicit"}, "Dataflow: kind='implicit' is unknown; use one of unsorted, sorted"),
    ],
)
def test_dataflows_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Dataflow(**options)


@pytest.mark.parametrize("groups", [((0, 1),), ((0, 1), (1, 2)), ((0, 1, 2, 3),)])
def test_groups_hold_each_offset_once(groups):
    """An offset left out would silently be left out of every sum."""
    table = jnp.zeros((3, 1), jnp.int32)
    flow = Dataflow("gather_scatter", groups=groups)
    for flows in (Dataflows(forward=flow), Dataflows(dgrad=flow)):
        with pytest.raises(ValueError, match=r"groups .* hold offsets .* and the map has 3; wanted each of them once"):
            prepare(table, table, 1, flows)


def test_shapes_that_do_not_fit():
    kernel_map = prepare(np.zeros((3, 4), np.int32), np.zeros((3, 5), np.int32), 4, UNSORTED)

    def run(x, w):
        return jax.eval_shape(lambda x, w: sparse_convolution(x, w, kernel_map), jnp.ones(x), jnp.ones(w))

    assert run((5, 2), (3, 2, 6)).shape == (4, 6)
    message = (
        r"sparse_convolution: x \[.*\], w \[.*\], map from 5 to 4 rows at 3 offsets; wanted x \[N, C\], w \[K, C, D\]"
    )
    for x, w in [
        ((4, 2), (3, 2, 6)),
        ((5, 3), (3, 2, 6)),
        ((5, 2), (2, 2, 6)),
        ((5, 2), (3, 12)),
        ((5, 2, 1), (3, 2, 6)),
    ]:
        with pytest.raises(ValueError, match=message):
            run(x, w)


def test_whole_number_features_are_refused():
    """Weights would be rounded to the features' dtype: to nothing."""
    table = np.zeros((1, 4), np.int32)
    kernel_map = prepare(table, table, 4, UNSORTED)
    with pytest.raises(ValueError, match="sparse_convolution: x is int32; wanted a floating dtype"):
        sparse_convolution(jnp.ones((4, 2), jnp.int32), jnp.ones((1, 2, 3)), kernel_map)
