"""The Hopper kernels of block_sparse_attention: interpreted against float64, compiled to machine code, run on a GPU."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from pallas_kernels.aot import compile_reports
from pallas_kernels.block_sparse_attention import RangeMask, bench, block_lists, block_sparse_attention, mosaic_gpu

BF16, FP16 = jnp.bfloat16, jnp.float16


# --- Masks: [T, 4] ranges of keys; queries are the last T of S positions.


def causal(queries, keys):
    stop = np.arange(keys - queries, keys) + 1
    return np.stack([0 * stop, stop, stop, stop], axis=-1)


def streaming(queries, keys, sink, recent):
    stop = np.arange(keys - queries, keys) + 1
    sink = np.minimum(sink, stop)
    return np.stack([0 * stop, sink, np.clip(stop - recent, sink, stop), stop], axis=-1)


def packed(queries, keys, cuts):
    """Samples one after the other; those of a query before the first cut see nothing: padding."""
    position = np.arange(keys - queries, keys)
    start = np.max([np.where(position >= cut, cut, 0) for cut in cuts], axis=0)
    stop = np.where(position >= cuts[0], position + 1, 0)
    return np.stack([start, stop, stop, stop], axis=-1)


# --- A case, and what it should give, from the definition of the softmax in float64.


@dataclasses.dataclass
class Case:
    """Operands, cotangents and mask; ranges [P, B or 1, T, 4], pattern [N] or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    dlse: jax.Array
    ranges: np.ndarray
    pattern: np.ndarray | None

    @property
    def mask(self):
        return RangeMask(jnp.asarray(self.ranges), self.pattern)

    def want(self):
        """{name: (value, bound on what rounding may do to it)}, with |x| for the sum of the magnitudes of x's terms.

        P is rounded to 16 bits before it meets v or do, and every result once: half an eps each, of |P v|. dS is
        rounded as well, and holds delta, which is made from the rounded o: eps |P v| |do| for every P. An exponent's
        float32 error, 2^-24 for each of the H terms of a logit, is relative to P.
        """
        q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (self.q, self.k, self.v, self.do, self.dlse))
        (heads, size), (slots, kv_heads) = q.shape[2:], k.shape[1:3]
        scale = size**-0.5
        pattern = np.zeros(heads, int) if self.pattern is None else self.pattern
        r0, r1, r2, r3 = np.moveaxis(self.ranges[pattern].swapaxes(0, 1)[..., None], -2, 0)  # [B, N, T, 1]
        key = np.arange(slots)
        seen = ((key >= r0) & (key < r1)) | ((key >= r2) & (key < r3))  # [B, N, T, S]
        k, v = (x.repeat(heads // kv_heads, axis=2) for x in (k, v))
        weights = np.where(seen, np.exp(np.einsum("BTNH,BSNH->BNTS", q, k) * scale), 0)
        total = weights.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = np.log(total)[..., 0]
        p = weights / np.where(total > 0, total, 1)

        def group(x):  # sums the heads that share a key
            return x.reshape(*x.shape[:2], kv_heads, -1, size).sum(3)

        dp = np.einsum("BTNH,BSNH->BNTS", do, v)
        ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[..., None])
        magnitude = np.einsum("BTNH,BSNH->BNTS", abs(q), abs(k)).max() * scale
        exponent = size * 2**-24 * magnitude
        eps = float(jnp.finfo(self.q.dtype).eps) + 4 * exponent
        pv = np.einsum("BNTS,BSNH->BTNH", p, abs(v))
        rounding = abs(ds) + scale * p * np.einsum("BTNH,BTNH->BNT", pv, abs(do))[..., None]
        return {
            "o": (np.einsum("BNTS,BSNH->BTNH", p, v), eps * pv),
            "lse": (lse, np.full(lse.shape, 4 * exponent + 2**-20)),
            "dq": (np.einsum("BNTS,BSNH->BTNH", ds, k), eps * np.einsum("BNTS,BSNH->BTNH", rounding, abs(k))),
            "dk": (
                group(np.einsum("BNTS,BTNH->BSNH", ds, q)),
                eps * group(np.einsum("BNTS,BTNH->BSNH", rounding, abs(q))),
            ),
            "dv": (group(np.einsum("BNTS,BTNH->BSNH", p, do)), eps * group(np.einsum("BNTS,BTNH->BSNH", p, abs(do)))),
        }

    def run(self, implementation):
        """(o, lse, dq, dk, dv) of the op."""

        def op(q, k, v):
            return block_sparse_attention(q, k, v, self.mask, implementation=implementation)

        outs, pull = jax.vjp(op, self.q, self.k, self.v)
        return *outs, *pull((self.do, self.dlse))


def make(queries, slots, heads, kv_heads, size, ranges, pattern=None, dtype=BF16, batch=1):
    rng = np.random.default_rng(0)

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, do = (draw(batch, queries, heads, size) for _ in range(2))
    k, v = (draw(batch, slots, kv_heads, size) for _ in range(2))
    dlse = draw(batch, heads, queries, dtype=jnp.float32)
    ranges = np.asarray(ranges, np.int32)
    return Case(q, k, v, do, dlse, ranges, None if pattern is None else np.asarray(pattern, np.int32))


def check(case, got):
    for (name, (want, bound)), value in zip(case.want().items(), got, strict=True):
        assert value.dtype == (jnp.float32 if name == "lse" else case.q.dtype)
        assert value.shape == want.shape
        value = np.asarray(value, np.float64)
        blind = want == -np.inf  # lse of a query that sees nothing
        np.testing.assert_array_equal(value == -np.inf, blind)
        wrong = np.abs(np.where(blind, 0, value) - np.where(blind, 0, want)) - bound
        assert wrong.max() <= 1e-7, (name, wrong.max(), bound.flat[wrong.argmax()])


def no_races():
    """jax 0.12 raises at a race; 0.11 only notes it."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return not interpret_pallas_call.get_races().races_found


def three_kinds(queries, slots):
    """Dense, token-exact sink and recent keys, and packed samples; no edge is that of a block."""
    kinds = causal(queries, slots), streaming(queries, slots, 43, 50), packed(queries, slots, (slots - queries + 5, 90))
    return np.stack(kinds)[:, None]


CASES = {
    # Every head has its own mask; a group of two shares keys. Blocks of queries and of keys are cut short.
    "mixed heads": lambda: make(135, 135, 4, 2, 64, three_kinds(135, 135), (0, 1, 2, 0)),
    "four heads share keys": lambda: make(45, 203, 4, 1, 128, three_kinds(45, 203), (1, 0, 2, 1), FP16),
    "packed samples differ": lambda: make(
        72, 72, 2, 2, 64, [[packed(72, 72, (0, 11, 40)), packed(72, 72, (3, 65))]], None, BF16, batch=2
    ),
    "wide heads": lambda: make(141, 203, 3, 1, 256, three_kinds(141, 203), (1, 0, 2)),
    "padded heads": lambda: make(
        72, 72, 2, 1, 80, [[packed(72, 72, (0, 11, 40)), packed(72, 72, (3, 65))]], None, FP16, batch=2
    ),
    "one query": lambda: make(1, 130, 1, 1, 128, causal(1, 130)[None, None]),
    "any ranges": lambda: make(
        20, 300, 2, 1, 64, np.sort(np.random.default_rng(1).integers(0, 301, (1, 1, 20, 4)), axis=-1), None, FP16
    ),
}


# --- The kernels, interpreted with race detection; a race raises.


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case):
    case = CASES[case]()
    check(case, case.run("interpret"))
    assert no_races()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_heads_first(implementation):
    """Keys as a cache has them, [B, K, S, H]: the same numbers."""
    case = make(45, 160, 4, 2, 64, three_kinds(45, 160), (0, 1, 2, 0))

    def op(q, k, v):
        turned = (x.swapaxes(1, 2) for x in (k, v))
        return block_sparse_attention(q, *turned, case.mask, heads_first=True, implementation=implementation)

    outs, pull = jax.vjp(op, case.q, case.k, case.v)
    check(case, (*outs, *pull((case.do, case.dlse))))


def test_interpreted_kernel_in_shard_map(in_turn):
    """Eight devices, four ways over samples and two over heads: each interprets its own part, its pattern included."""
    case = make(40, 72, 4, 2, 64, three_kinds(40, 72), (0, 1, 2, 1), batch=4)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, pattern = PartitionSpec("data", None, "tensor"), PartitionSpec("tensor")
    specs = (rows, rows, rows, PartitionSpec(), pattern)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    def attention(q, k, v, ranges, pattern):
        def kernel(q):
            return block_sparse_attention(q, k, v, RangeMask(ranges, pattern), implementation="interpret")[0]

        return in_turn(kernel, ("data", "tensor"), q)

    o = jax.jit(attention)(case.q, case.k, case.v, jnp.asarray(case.ranges), jnp.asarray(case.pattern))
    want, bound = case.want()["o"]
    assert (np.abs(np.asarray(o, np.float64) - want) <= bound + 1e-7).all()


@pytest.mark.parametrize(
    "config",
    [
        mosaic_gpu.Config(keys=64, stages=3, ping_pong=False, dq_stages=2, dkv_stages=1),
        mosaic_gpu.config_for(64, BF16),
    ],
)
def test_other_configurations(config):
    case = make(70, 261, 1, 1, 64, causal(70, 261)[None, None])
    options = {"scale": 0.125, "config": config, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    mask = case.ranges, case.pattern
    o, lse = mosaic_gpu.forward(case.q, case.k, case.v, *mask, **options)
    grads = mosaic_gpu.backward(case.q, case.k, case.v, o, lse, case.do, case.dlse, *mask, **options)
    check(case, (o, lse, *grads))
    assert no_races()


def test_blocks_that_nobody_sees_are_never_read_and_runs_repeat():
    """Keys 128 to 255 hold NaN: one in a product would spread. Queries 320 to 383 see the first 43 and the last 50."""
    case = make(64, 384, 2, 1, 64, streaming(64, 384, 43, 50)[None, None])
    poisoned = dataclasses.replace(case, k=case.k.at[:, 128:256].set(jnp.nan), v=case.v.at[:, 128:256].set(jnp.nan))
    got = poisoned.run("interpret")
    check(case, got)
    np.testing.assert_array_equal(got[3][:, 128:256], 0)
    np.testing.assert_array_equal(got[4][:, 128:256], 0)
    for first, second in zip(got, poisoned.run("interpret"), strict=True):
        np.testing.assert_array_equal(first, second)
    assert no_races()


def test_lists_are_no_longer_than_the_mask():
    """What the kernels loop over, counted in the dense mask: forward and dq, then dk and dv; with 256 channels, too."""
    ranges = three_kinds(300, 700)
    key = np.arange(700)
    r0, r1, r2, r3 = np.moveaxis(ranges[:, 0, :, :, None], 2, 0)
    dense = ((key >= r0) & (key < r1)) | ((key >= r2) & (key < r3))
    for rows, columns, transposed in ((128, 128, False), (64, 128, True), (128, 64, False), (64, 64, True)):
        lists = block_lists(jnp.asarray(ranges), 700, rows=rows, columns=columns, transposed=transposed)
        padded = np.pad(dense, ((0, 0), (0, -300 % rows), (0, -700 % columns)))
        seen = padded.reshape(3, -1, rows, -(-700 // columns), columns).any((2, 4))
        np.testing.assert_array_equal(lists.count[:, 0], seen.sum(1 if transposed else 2))


@pytest.mark.parametrize(
    ("size", "dtype", "says"),
    [
        (320, BF16, "heads have 320 channels and the kernel takes up to 256"),
        (64, jnp.float32, "the kernel takes bfloat16"),
    ],
)
def test_refuses(size, dtype, says):
    case = make(8, 8, 1, 1, size, causal(8, 8)[None, None], dtype=dtype)
    with pytest.raises(ValueError, match=says):
        case.run("interpret")


# --- The benchmark, as far as it goes without a GPU.


def test_bench_counts_listed_blocks(capsys):
    arguments = "--tokens 512 --dense 0.5 --heads 4 --kv_heads 2 --head_dim 64 --sink 64 --recent 64 --repeats 1"
    bench.main(arguments.split())
    forward, backward = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    # Of 4 x 4 blocks two dense heads list 1 + 2 + 3 + 4, two streaming ones 1 + 2 + 3 + 3.
    assert forward["flops"] == 2 * (2 * 128 * 128 * 64) * (2 * 10 + 2 * 9)
    assert backward["flops"] == forward["flops"] * 7 // 2
    assert forward["implementation"] == "xla"
    assert forward["us"] > 0
    assert "of_floor" not in forward  # a CPU has no data sheet here


def test_bench_alone_tells_of_memory(capsys):
    arguments = "--alone --tokens 1024 --dense 0 --heads 2 --kv_heads 2 --head_dim 64 --repeats 1"
    bench.main(arguments.split())
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    # All logits of one head alone would be 4 MiB.
    assert 0 < row["temporary_mib"] < 2
    assert row["peak_mib"] > 0
    assert "us_dense" not in row


def test_tuning_needs_the_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tune"])
    assert "--tune measures on the GPU that the rows are for: the kernel needs a Hopper GPU" in capsys.readouterr().err


# --- Compiled for an absent Hopper GPU.


def test_every_configuration_compiles_for_hopper():
    """No spills, no stack, no wgmma that waits for the one before; the products that the equations ask for."""
    cases, products = [], []

    def add(function, size, dtype, config, queries=8192, slots=8192, samples=1, batch=1):
        shape, options = jax.ShapeDtypeStruct, {"scale": size**-0.5}
        q, k = shape((batch, queries, 32, size), dtype), shape((batch, slots, 8, size), dtype)
        mask = shape((2, samples, queries, 4), jnp.int32), shape((32,), jnp.int32)
        rows = shape((batch, 32, 2, queries + -queries % 128), jnp.float32)
        wide = size // 16  # products of 16 channels
        if function == "forward":
            cases.append((functools.partial(mosaic_gpu.forward, config=config, **options), (q, k, k, *mask)))
            products.append(wide + config.keys // 16)
        elif function == "forward, heads first":
            k = shape((batch, 8, slots, size), dtype)
            one = functools.partial(mosaic_gpu.forward, config=config, heads_first=True, **options)
            cases.append((one, (q, k, k, *mask)))
            products.append(wide + config.keys // 16)
        elif function == "dq":
            one = functools.partial(mosaic_gpu.query_gradient, stages=config.dq_stages, **options)
            cases.append((one, (q, k, k, q, rows, *mask)))
            products.append(2 * wide + 4)
        else:
            one = functools.partial(mosaic_gpu.key_gradients, stages=config.dkv_stages, **options)
            cases.append((one, (q, k, k, q, rows, *mask)))
            products.append(2 * (wide + 4))

    add("forward, heads first", 256, BF16, mosaic_gpu.config_for(256, BF16))
    for size in mosaic_gpu.HEAD_DIMS:
        for function in ("forward", "dq", "dkv"):
            add(function, size, BF16, mosaic_gpu.config_for(size, BF16))
            add(function, size, FP16, mosaic_gpu.config_for(size, FP16), 1001, 3003, samples=2, batch=2)
        for row in mosaic_gpu.tuned_rows():
            if row["head_dim"] == size:
                for function in ("forward", "dq", "dkv"):
                    add(function, size, jnp.dtype(row["dtype"]), mosaic_gpu.Config(**row["config"]))
    for (function, _), wanted, (report,) in zip(cases, products, compile_reports(cases), strict=True):
        assert report.spill_bytes == report.stack_bytes == 0, (function, report)
        assert not report.serialised_wgmma, (function, report)
        assert report.hot_loop["HGMMA"] == wanted, (function, report)


# --- On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("size", mosaic_gpu.HEAD_DIMS)
@pytest.mark.parametrize(("queries", "slots"), [(1024, 1024), (1000, 1500), (77, 2049)])
def test_gpu_matches_float64(queries, slots, size, dtype):
    case = make(queries, slots, 4, 2, size, three_kinds(queries, slots), (0, 1, 2, 1), dtype)
    check(case, case.run("mosaic_gpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_small_cases(case):
    case = CASES[case]()
    check(case, case.run("mosaic_gpu"))


@pytest.mark.gpu
def test_gpu_repeats_itself():
    case = make(4096, 4096, 8, 2, 128, three_kinds(4096, 4096), (0, 1, 2, 1, 0, 0, 1, 1))
    first = case.run("mosaic_gpu")
    for _ in range(20):
        for one, other in zip(first, case.run("mosaic_gpu"), strict=True):
            np.testing.assert_array_equal(one, other)
