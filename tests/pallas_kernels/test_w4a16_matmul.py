"""W4A16: the format, the product in plain JAX, the kernel interpreted, and the kernel compiled for a Hopper GPU."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lumen import plan
from pallas_kernels.aot import compile_reports
from pallas_kernels.w4a16_matmul import PackedInt4, bench, dequantize, mosaic_gpu, pack, reference, unpack, w4a16_matmul

BF16, FP16, FP32 = jnp.bfloat16, jnp.float16, jnp.float32


@dataclasses.dataclass
class Case:
    """Activations, a packed weight, and the same weight [D, F] in float64."""

    x: jax.Array
    w: PackedInt4
    weight: np.ndarray

    @property
    def want(self):
        return np.asarray(self.x, np.float64) @ self.weight

    def bound(self, x=None, weight=None):
        """What rounding may do to x @ weight: |x| @ |weight| times half an eps for every weight, and for the result.

        float32 accumulation adds d * 2^-24 of |x| @ |weight|. Where the kernel multiplies `bias + q`, up to 1039, at
        most 256 products are summed before the bias is taken out; their roundings, 2^-24 of a sum each and of either
        sign, grow as the root of their number.
        """
        x, weight = (np.asarray(self.x, np.float64), self.weight) if x is None else (x, weight)
        eps = max(float(jnp.finfo(dtype).eps) for dtype in (self.x.dtype, self.w.scale.dtype))
        products = np.abs(x) @ np.abs(weight)
        largest = float(np.max(np.asarray(self.w.scale, np.float64)))
        return (eps + x.shape[-1] * 2**-24) * products + 1039 * 16 * 2**-24 * largest * np.abs(x).sum(-1, keepdims=True)


def make(m, d, f, group, dtype=BF16, scale_dtype=None, seed=0, top=15):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(m, d)), dtype)
    q, zero = rng.integers(0, top + 1, (d, f)), rng.integers(0, top + 1, (d // group, f))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, zero.shape) / 8, scale_dtype or dtype)
    weight = (q - zero.repeat(group, 0)) * np.asarray(scale, np.float64).repeat(group, 0)
    return Case(x, pack(q, scale, zero, group), weight)


def close(got, case, **of):
    assert got.dtype == case.x.dtype
    want = of["x"] @ of["weight"] if of else case.want
    np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - want), case.bound(**of) + 1e-30)


# --- The format.


def test_layout():
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (200, 3))
    w = pack(q, jnp.ones((1, 3), BF16), np.zeros((1, 3), int), 200)
    assert w.shape == (200, 3)
    assert w.words.shape == (3, 64)
    assert w.words.dtype == jnp.uint16
    words = np.asarray(w.words)
    for d, f in itertools.product(range(256), range(3)):
        tile, nibble, word = d // 128, d % 128 // 32, d % 32
        assert words[f, 32 * tile + word] >> 4 * nibble & 15 == (q[d, f] if d < 200 else 0)


@pytest.mark.parametrize("top", [15, 7])
@pytest.mark.parametrize(("d", "f", "group"), [(8, 1, 8), (136, 72, 136), (160, 3, 32), (192, 40, 64), (384, 8, 128)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_packing_is_exactly_undone(d, f, group, dtype, top):
    rng = np.random.default_rng(d)
    q, zero = rng.integers(0, top + 1, (2, d, f)), rng.integers(0, top + 1, (2, d // group, f))
    scale = rng.normal(size=zero.shape).astype(dtype)
    stacked = jax.vmap(functools.partial(pack, group=group))(q, scale, zero)
    one = pack(q[1], scale[1], zero[1], group)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[1], stacked), one)
    for got, want in zip(unpack(stacked), (q, scale, zero), strict=True):
        np.testing.assert_array_equal(got, want.astype(got.dtype))
    assert [part.dtype for part in unpack(one)] == [jnp.uint8, dtype, dtype]
    abstract = jax.eval_shape(functools.partial(pack, group=group), q[0], scale[0], zero[0])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(lambda a: (a.shape, a.dtype), one)
    assert abstract.shape == one.shape == (d, f)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dequantising_rounds_once_in_the_scales_dtype(dtype):
    rng = np.random.default_rng(0)
    q, zero = rng.integers(0, 16, (256, 40)), rng.integers(0, 16, (4, 40))
    scale = rng.uniform(0.5, 1.5, zero.shape).astype(dtype)
    scale[:, :8] *= dtype(1e-5)  # AWQ's smallest scale is a subnormal of float16
    # Exact in float64, then one rounding.
    want = ((q - zero.repeat(64, 0)) * scale.astype(np.float64).repeat(64, 0)).astype(dtype)
    w = pack(q, scale, zero, 64)
    np.testing.assert_array_equal(dequantize(w), want)
    np.testing.assert_array_equal(jax.jit(functools.partial(dequantize, dtype=FP32))(w), want.astype(FP32))


@pytest.mark.parametrize("group", [32, 64, 128, 512])
def test_parts_for_tensor_parallelism_are_slices(group):
    rng = np.random.default_rng(0)
    q, zero = rng.integers(0, 16, (512, 24)), rng.integers(0, 16, (512 // group, 24))
    scale = rng.normal(size=zero.shape).astype(np.float32)
    w = pack(q, scale, zero, group)
    columns = pack(q[:, 5:13], scale[:, 5:13], zero[:, 5:13], group)
    np.testing.assert_array_equal(w.words[5:13], columns.words)
    np.testing.assert_array_equal(w.scale[:, 5:13], columns.scale)
    rows = slice(128, 384) if group < 512 else slice(None)
    sides = slice(128 // group, 384 // group) if group < 512 else slice(None)
    part = pack(q[rows], scale[sides], zero[sides], group)
    words = w.words[:, 32:96] if group < 512 else w.words
    np.testing.assert_array_equal(words, part.words)
    np.testing.assert_array_equal(w.zero[sides], part.zero)


@pytest.mark.parametrize(
    ("q", "group", "says"),
    [
        (np.zeros((96, 4), int), 48, "group=48 for 96 input channels; it must be 32, 64 or 128"),
        (np.zeros((96, 4), int), 64, "group=64 for 96"),
        (np.zeros((64, 4), np.float32), 64, r"q is float32\[64, 4\]"),
        (np.full((64, 4), 16), 64, "q goes from 16 to 16"),
        (np.full((64, 4), -1), 64, "q goes from -1 to -1"),
        (np.zeros((128, 4), int), 64, r"wanted integers \[D, F\], and \[D / 64, F\] = \[2, 4\]"),
    ],
)
def test_what_cannot_be_packed_is_refused(q, group, says):
    with pytest.raises(ValueError, match=says):
        pack(q, np.ones((1, 4), np.float16), np.zeros((1, 4), int), group)


def test_a_scale_of_another_type_is_refused():
    with pytest.raises(ValueError, match="scale is float64; convert it to float16"):
        pack(np.zeros((64, 4), int), np.ones((1, 4)), np.zeros((1, 4), int), 64)


# --- The product in plain JAX.


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_original_products(golden, group):
    record = golden("awq/layouts")
    codes, zero, scale = (record[f"out/g{group}/{name}"] for name in ("codes", "zero", "scale"))
    w = pack(codes.T, scale.T, zero.T, group)
    x = jnp.asarray(record["in/x"], FP32)
    y = w4a16_matmul(x, w, implementation="xla") + record["weights/bias"].astype(np.float32)
    # The tolerance of the recording: float32 sums of 256 products in another order.
    np.testing.assert_allclose(y, record[f"out/g{group}/y"], rtol=1e-4, atol=1e-4)
    if group == 64:
        np.testing.assert_array_equal(dequantize(w), record["out/g64/dequantised_T"])


SHAPES = [(1, 256, 128, 128), (5, 136, 75, 136), (7, 160, 36, 32), (33, 192, 130, 64), (3, 8, 1, 8)]


@pytest.mark.parametrize("block", [2**20, 1000])  # the whole weight at once, and loops with a ragged last block
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [(FP32, FP32), (FP32, FP16), (BF16, BF16), (BF16, FP32), (FP16, BF16)]
)
@pytest.mark.parametrize(("m", "d", "f", "group"), SHAPES)
def test_xla_matches_float64(monkeypatch, m, d, f, group, dtype, scale_dtype, block):
    monkeypatch.setattr(reference, "BLOCK", block)
    case = make(m, d, f, group, dtype, scale_dtype)
    close(w4a16_matmul(case.x, case.w, implementation="xla"), case)
    upstream = np.random.default_rng(1).normal(size=(m, f)).astype(dtype)
    _, pull = jax.vjp(lambda x: w4a16_matmul(x, case.w, implementation="xla"), case.x)
    close(pull(jnp.asarray(upstream))[0], case, x=upstream.astype(np.float64), weight=case.weight.T)


def test_leading_axes_and_no_tokens():
    case = make(6, 64, 24, 64)
    for shape in [(6,), (2, 3), (1, 6, 1)]:
        y = w4a16_matmul(case.x.reshape(*shape, 64), case.w)
        assert y.shape == (*shape, 24)
        close(y.reshape(6, 24), case)
    assert w4a16_matmul(case.x[0], case.w).shape == (24,)
    y, pull = jax.vjp(lambda x: w4a16_matmul(x, case.w), case.x[:0])
    assert y.shape == (0, 24)
    assert pull(y)[0].shape == (0, 64)


def test_the_dequantised_weight_is_never_whole():
    w = jax.eval_shape(
        functools.partial(pack, group=128),
        jax.ShapeDtypeStruct((4096, 4096), jnp.uint8),
        *2 * [jax.ShapeDtypeStruct((32, 4096), FP32)],
    )
    x = jax.ShapeDtypeStruct((16, 4096), FP32)

    def loss(x, w):
        return jnp.sum(w4a16_matmul(x, w, implementation="xla"))

    for function in (functools.partial(w4a16_matmul, implementation="xla"), jax.grad(loss)):
        temporary = jax.jit(function).lower(x, w).compile().memory_analysis().temp_size_in_bytes
        # A block of 2^20 float32, and the activations several times; the whole weight would be 64 MiB.
        assert temporary < 12 * 2**20


def test_layers_are_scanned_and_mapped():
    cases = [make(4, 128, 128, 64, FP32, seed=seed) for seed in range(3)]
    w = jax.tree.map(lambda *layers: jnp.stack(layers), *(case.w for case in cases))
    x = jnp.stack([case.x for case in cases])
    for y, case in zip(jax.vmap(w4a16_matmul)(x, w), cases, strict=True):
        close(y, case)

    def layer(x, w):
        return w4a16_matmul(x, w), None

    # Outputs are compared relative to their size: errors of a layer pass through the next ones.
    want = np.linalg.multi_dot([np.asarray(cases[0].x, np.float64), *(case.weight for case in cases)])
    got = jax.lax.scan(layer, cases[0].x, w)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    gradient = jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, w)[0]))(cases[0].x)
    want = np.linalg.multi_dot([np.ones((4, 128)), *(case.weight.T for case in cases[::-1])])
    np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("x", "change", "says"),
    [
        (np.zeros((2, 60), np.float32), {}, r"x is \[2, 60\].* a \[D, F\] = \[64, 24\] weight"),
        (np.zeros((2, 64), np.float32), {"group": 32}, "cut D at whole groups"),
        (np.zeros((2, 64), np.int32), {}, "x is int32; wanted bfloat16, float16 or float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x, change, says):
    w = dataclasses.replace(make(1, 64, 24, 64).w, **change)
    with pytest.raises(ValueError, match=says):
        w4a16_matmul(jnp.asarray(x), w)


def test_stacked_weights_are_refused():
    w = jax.tree.map(lambda a: a[None], make(1, 64, 24, 64).w)
    with pytest.raises(ValueError, match="Take one layer of stacked weights"):
        w4a16_matmul(jnp.zeros((2, 64)), w)


@pytest.mark.parametrize("wish", ["interpret", "mosaic_gpu"])
def test_float32_has_no_kernel(wish):
    case = make(2, 64, 24, 64, FP32)
    with pytest.raises(
        ValueError, match=f"w4a16_matmul: {wish} cannot run this: x is float32 and the kernel takes bfloat16"
    ):
        w4a16_matmul(case.x, case.w, implementation=wish)


# --- Many devices.


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))


def split(axis, group):
    """PartitionSpecs of x, of a weight of which one axis is split, and of y before any sum."""
    columns, rows = PartitionSpec("tensor"), PartitionSpec(None, "tensor")
    if axis == "F":
        return PartitionSpec(), PackedInt4(columns, rows, rows, group), rows
    side = PartitionSpec() if group == 1024 else columns
    return rows, PackedInt4(rows, side, side, group), PartitionSpec()


@pytest.mark.parametrize("group", [128, 1024])
@pytest.mark.parametrize("axis", ["F", "D"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(mesh, axis, group, check_vma):
    case = make(5, 1024, 64, group, FP32)
    x_spec, w_spec, y_spec = split(axis, group)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec, check_vma=check_vma)
    def product(x, w):
        y = w4a16_matmul(x, w, implementation="xla")
        return y if axis == "F" else jax.lax.psum(y, "tensor")

    close(jax.jit(product)(case.x, case.w), case)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(product(x, case.w))))(case.x)
    close(gradient, case, x=np.ones((5, 64)), weight=case.weight.T)


@pytest.mark.parametrize("axis", ["F", "D"])
def test_jit_with_sharded_operands(mesh, axis, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 2**13)  # eight blocks
    case = make(5, 1024, 64, 128, FP32)
    x_spec, w_spec, _ = split(axis, 128)
    x = jax.device_put(case.x, NamedSharding(mesh, x_spec))
    w = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), case.w, w_spec)
    compiled = jax.jit(functools.partial(w4a16_matmul, implementation="xla")).lower(x, w).compile()
    close(compiled(x, w), case)
    # The weight stays where it is.
    assert "all-gather" not in compiled.as_text()
    assert ("all-reduce" in compiled.as_text()) == (axis == "D")


@pytest.mark.parametrize(("axis", "group"), [("F", 128), ("F", 1024), ("D", 128), ("D", 1024)])
def test_interpreted_kernel_in_shard_map(mesh, in_turn, axis, group):
    """All eight devices interpret the kernel on their own part of the weight."""
    case = make(5, 1024, 512, group)
    x_spec, w_spec, y_spec = split(axis, group)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec, check_vma=False)
    def product(x, w):
        y = in_turn(lambda x: w4a16_matmul(x, w, implementation="interpret"), "tensor", x)
        return y if axis == "F" else jax.lax.psum(y.astype(FP32), "tensor").astype(y.dtype)

    # Where D is split, eight parts, each some 8**-0.5 of the whole, are rounded to bfloat16, and then their sum.
    close(jax.jit(product)(case.x, case.w), case)


# --- The kernel, interpreted with race detection; a race raises.

# A cheap stand-in of each kind of configuration.
PREFILL = mosaic_gpu.Config(tokens=32, consumers=2, stages=2)
DECODE = mosaic_gpu.Config(tokens=8, consumers=2, spans=2, stages=3, scale_on="partials", split_k=2)


def interpret(case, config):
    params = plgpu.InterpretGPUParams(detect_races=True)
    y = mosaic_gpu.w4a16_matmul(case.x, case.w, config=config, stage_weights="smem", interpret=params)
    assert no_races()
    return y


def no_races():
    """jax 0.12 raises at a race; 0.11 only notes it."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("config", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("m", "d", "f", "group", "dtype"),
    [
        (32, 256, 128, 128, BF16),  # whole tiles
        (8, 512, 128, 64, FP16),
        (43, 384, 200, 64, BF16),  # ragged tokens and outputs, several tiles of each
        (1, 160, 72, 32, FP16),  # ragged D
        (9, 640, 75, 128, BF16),  # outputs that are no multiple of 8
        (3, 648, 130, 648, FP16),  # whole row
        (5, 100, 33, 100, BF16),  # no dimension a multiple of 8
        (2, 64, 64, 32, BF16),  # less than one tile of D: a part of the split has nothing to do
    ],
)
def test_kernel_matches_float64(m, d, f, group, dtype, config):
    case = make(m, d, f, group, dtype)
    close(interpret(case, config), case)


@pytest.mark.parametrize("scale_dtype", [FP16, FP32])
def test_kernel_casts_scales_of_another_dtype(scale_dtype):
    case = make(4, 256, 64, 64, BF16, scale_dtype)
    close(interpret(case, DECODE), case)


def test_many_tiles_are_walked_once_each():
    # More tiles of tokens than are walked at a stretch, and two of outputs.
    case = make(8 * (mosaic_gpu.SNAKE + 1), 32, 72, 32)
    close(interpret(case, mosaic_gpu.Config(tokens=8, consumers=1, stages=2)), case)


@pytest.mark.parametrize("m", [1, 12, 30, 50, 70])
def test_interpreted_op_and_its_gradient(m):
    """Each kind of configuration that the op chooses by itself."""
    case = make(m, 640, 264, 128)
    y, pull = jax.vjp(lambda x: w4a16_matmul(x, case.w, implementation="interpret"), case.x)
    close(y, case)
    upstream = np.random.default_rng(1).normal(size=y.shape).astype(BF16)
    close(pull(jnp.asarray(upstream))[0], case, x=upstream.astype(np.float64), weight=case.weight.T)


def test_interpreted_op_under_vmap_and_scan():
    cases = [make(3, 64, 64, 64, seed=seed) for seed in range(2)]
    w = jax.tree.map(lambda *layers: jnp.stack(layers), *(case.w for case in cases))
    x = jnp.stack([case.x for case in cases])
    product = functools.partial(w4a16_matmul, implementation="interpret")
    for y, case in zip(jax.vmap(product)(x, w), cases, strict=True):
        close(y, case)
    for y, case in zip(jax.lax.scan(lambda _, layer: (None, product(*layer)), None, (x, w))[1], cases, strict=True):
        close(y, case)
    for y, x_one in zip(jax.vmap(product, (0, None))(x, cases[1].w), x, strict=True):
        close(y, dataclasses.replace(cases[1], x=x_one))
    # The gradient of the sum of outputs: each weight's row sums.
    gradients = jax.grad(lambda x: jnp.sum(jax.vmap(product)(x, w).astype(FP32)))(x)
    for gradient, case in zip(gradients, cases, strict=True):
        close(gradient, case, x=np.ones((3, 64)), weight=case.weight.T)


def test_both_ways_of_unpacking():
    words = np.random.default_rng(0).integers(0, 2**16, (8, 32), np.uint16)
    registers = words.view(np.uint32)  # little-endian: the first word of a pair is the lower one
    for dtype, (_, bias) in mosaic_gpu.MAGIC.items():
        for nibble in range(4):
            want = bias + (words.astype(int) >> 4 * nibble & 15)
            np.testing.assert_array_equal(np.asarray(mosaic_gpu.unpack(words, nibble, dtype), np.float64), want)
            # What `unpack_inline` compiles to; that it does is for a GPU to show.
            shift, mask, magic = mosaic_gpu.pair_steps(nibble, dtype)
            pairs = (registers >> np.uint32(shift) & np.uint32(mask) | np.uint32(magic)).view(dtype)
            np.testing.assert_array_equal(pairs.astype(np.float64), want)


# --- The choice of a configuration.

LLAMA = [(4096, 4096), (4096, 1024), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096)]
TOKENS = [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 512, 4096, 16384]


@pytest.mark.parametrize(("d", "f"), LLAMA)
def test_decoding_fills_the_gpu_with_one_wave(d, f):
    for m in (1, 16, 32, 64):
        config = mosaic_gpu.choose(m, d, f, sms=132)
        blocks = -(-f // (64 * config.consumers)) * config.split_k
        assert blocks <= 132
        # 1024 outputs are four tiles, and no part has less than one slot.
        assert blocks >= (64 if f == 1024 else 96)
    assert mosaic_gpu.choose(4096, d, f, sms=132).split_k == 1
    # Fewer SMs, fewer parts.
    assert mosaic_gpu.choose(1, d, f, sms=66).split_k <= mosaic_gpu.choose(1, d, f, sms=132).split_k


def test_measured_rows_go_before_counting(monkeypatch):
    config = dataclasses.replace(DECODE, stages=2)
    row = {"device": jax.devices()[0].device_kind, "m": 16, "d": 256, "f": 128, "group": 64}
    monkeypatch.setattr(mosaic_gpu, "tuned_rows", lambda: [row | {"config": dataclasses.asdict(config)}])
    assert mosaic_gpu.config_for(16, 256, 128, 64) == mosaic_gpu.config_for(9, 256, 128, 64) == config
    for other in [(17, 256, 128, 64), (8, 256, 128, 64), (16, 512, 128, 64), (16, 256, 128, 128)]:
        assert mosaic_gpu.config_for(*other) == mosaic_gpu.choose(*other[:3])


# --- The benchmark, as far as it goes without a GPU.


def test_bench_counts_bytes_and_flops(capsys):
    bench.main(["--shapes", "2x256x64", "--group", "128", "--dtype", "float16", "--repeats", "1"])
    row = json.loads(capsys.readouterr().out)
    # x, 4-bit weights, scales and zeros, y.
    assert row["bytes"] == 2 * 256 * 2 + 256 * 64 // 2 + 2 * 2 * 64 * 2 + 2 * 64 * 2
    assert row["flops"] == 2 * 2 * 256 * 64
    assert row["implementation"] == "xla"
    assert row["us"] == row["us_xla"] > 0
    assert "of_floor" not in row  # a CPU has no data sheet here


def test_tuning_needs_the_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tune"])
    assert "--tune measures on the GPU that the rows are for: the kernel needs a Hopper GPU" in capsys.readouterr().err


# --- Compiled for absent hardware.


def shapes(m, d, f, group, dtype):
    side = jax.ShapeDtypeStruct((d // group, f), dtype)
    w = PackedInt4(jax.ShapeDtypeStruct((f, -(-d // 128) * 32), jnp.uint16), side, side, group, -d % 128)
    return jax.ShapeDtypeStruct((m, d), dtype), w


def test_every_choice_compiles_for_hopper():
    """No spills, no serialised wgmma. One part, and more than one, are compiled: their number is in the grid."""
    chosen = {mosaic_gpu.choose(m, d, f) for m in TOKENS for d, f in [*LLAMA, (256, 64), (11008, 4096)]}
    configs = {dataclasses.replace(config, split_k=min(config.split_k, 2)) for config in chosen}
    assert len(configs) == 10
    cases = [(config, group, BF16) for config in configs for group in (32, 128, 4096)]
    # float16 differs in two constants and in the type of the product.
    cases += [case for config in configs if config.split_k == 2 for case in [(config, 64, BF16), (config, 128, FP16)]]
    rows = [(mosaic_gpu.Config(**row["config"]), row["group"], BF16) for row in mosaic_gpu.tuned_rows()]
    for stage_weights, some in [("registers", cases + rows), ("smem", [(PREFILL, 128, BF16), (DECODE, 64, FP16)])]:
        product = functools.partial(mosaic_gpu.w4a16_matmul, stage_weights=stage_weights)
        reports = compile_reports(
            [
                (functools.partial(product, config=config), shapes(config.tokens, 4096, 4096, group, dtype))
                for config, group, dtype in some
            ]
        )
        for case, (report,) in zip(some, reports, strict=True):
            assert report.spill_bytes == report.stack_bytes == 0, (case, report)
            assert not report.serialised_wgmma, (case, report)
            # A product of 64 outputs, all tokens and 16 input channels each.
            assert report.hot_loop["HGMMA"] == case[0].spans * 128 // 16, (case, report)
            assert report.count("I2F") == 0, (case, report)


def test_ragged_operands_compile_for_hopper():
    """Whole swizzle tiles and rows of 16 bytes are demanded by the compiler, not by the interpreter."""
    cases = [(5, 100, 33, 100, BF16), (13, 160, 75, 32, FP16), (1, 648, 130, 648, BF16), (70, 4096, 40, 128, BF16)]
    reports = compile_reports(
        [
            (functools.partial(mosaic_gpu.w4a16_matmul, config=mosaic_gpu.choose(*case[:3])), shapes(*case))
            for case in [*cases, (1, 8, 1, 8, FP16)]
        ]
    )
    assert [report.spill_bytes for (report,) in reports] == [0] * 5


OP = """
import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lumen import plan, sharding
from pallas_kernels.w4a16_matmul import PackedInt4, w4a16_matmul

place = plan.topology(sys.argv[1])
mesh = sharding.make_mesh({"tensor": -1}, place.devices)


def array(dtype, shape, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, P(*spec)))


side = array(jnp.bfloat16, (32, 8192), None, "tensor")
w = PackedInt4(array(jnp.uint16, (8192, 1024), "tensor"), side, side, 128)
x = array(jnp.bfloat16, (16, 4096))
specs = (P(), PackedInt4(P("tensor"), P(None, "tensor"), P(None, "tensor"), 128))
local = jax.shard_map(w4a16_matmul, mesh=mesh, in_specs=specs, out_specs=P(None, "tensor"))
gradient = jax.grad(lambda x, w: jnp.sum(local(x, w).astype(jnp.float32)))
with jax.set_mesh(mesh):
    for function in (w4a16_matmul if place.devices[0].platform == "tpu" else local, gradient):
        compiled = jax.jit(function).lower(x, w).compile()
        print("RESULT", compiled.as_text().count("mosaic_gpu"), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize("place", ["v5p:2x2x2", "h200:8"])
def test_the_op_compiles_for_a_tensor_parallel_machine(tmp_path, place):
    (tmp_path / "op.py").write_text(OP)
    code, output = plan.run_isolated([str(tmp_path / "op.py"), place], topology=place, timeout=300.0)
    assert code == 0, output
    forward, backward = ([int(n) for n in line.split()[1:]] for line in output.splitlines() if "RESULT" in line)
    # The kernel on a Hopper GPU, and its gradient in plain JAX; elsewhere plain JAX.
    assert (forward[0] > 0) == (place == "h200:8")
    # Per device 4096 x 1024 weights: never whole in bfloat16.
    assert max(forward[1], backward[1]) < 4096 * 1024 * 2


# --- On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group", [32, 64, 128, 4096])
@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 65, 512, 2048])
def test_gpu_matches_float64(m, group, dtype):
    case = make(m, 4096, 4096, group, dtype)
    close(w4a16_matmul(case.x, case.w, implementation="mosaic_gpu"), case)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "d", "f", "group"), [*SHAPES, (70, 14336, 1000, 128), (3, 14336, 4096, 14336)])
@pytest.mark.parametrize("stage_weights", ["registers", "smem"])
def test_gpu_ragged(m, d, f, group, stage_weights):
    case = make(m, d, f, group)
    config = mosaic_gpu.choose(m, d, f)
    if stage_weights == "smem":  # room for the staging buffers
        config = dataclasses.replace(config, stages=2)
    close(mosaic_gpu.w4a16_matmul(case.x, case.w, config=config, stage_weights=stage_weights), case)


@pytest.mark.gpu
def test_gpu_repeats_itself_and_differentiates():
    case = make(16, 4096, 4096, 128)
    y, pull = jax.vjp(lambda x: w4a16_matmul(x, case.w, implementation="mosaic_gpu"), case.x)
    for _ in range(20):  # parts are summed in one order
        np.testing.assert_array_equal(y, w4a16_matmul(case.x, case.w, implementation="mosaic_gpu"))
    upstream = np.random.default_rng(1).normal(size=y.shape).astype(BF16)
    close(pull(jnp.asarray(upstream))[0], case, x=upstream.astype(np.float64), weight=case.weight.T)
