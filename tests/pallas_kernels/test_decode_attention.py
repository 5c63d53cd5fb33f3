"""Decode attention: the quantised format, the op in plain JAX, the kernel interpreted, and compiled for Hopper."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from lumen import plan
from pallas_kernels.aot import compile_reports
from pallas_kernels.decode_attention import (
    QuantizedKV,
    bench,
    codes_of,
    decode_attention,
    dequantize_kv,
    mosaic_gpu,
    quantize_kv,
    reference,
)
from pallas_kernels.decode_attention.mosaic_gpu import BLOCK

BF16, FP16, FP32 = jnp.bfloat16, jnp.float16, jnp.float32


def shown_slots(ranges):
    """The slots of one head, in order."""
    r0, r1, r2, r3 = (int(r) for r in ranges)
    return np.r_[r0:r1, r2:r3]


@dataclasses.dataclass
class Case:
    """Operands, and the values of unpaged keys and values in float64, of which only what ranges show is used."""

    q: jax.Array
    keys: jax.Array | QuantizedKV
    values: jax.Array | QuantizedKV
    ranges: np.ndarray
    table: jax.Array | None
    k: np.ndarray
    v: np.ndarray

    def run(self, implementation="xla", **options):
        return decode_attention(
            self.q,
            self.keys,
            self.values,
            jnp.asarray(self.ranges),
            table=self.table,
            implementation=implementation,
            **options,
        )


def float64(case, scale):
    """o, lse, sum_s p_s |v_s| and the largest scale |q| |k_s|, from the definition."""
    q = np.asarray(case.q, np.float64)
    heads, kv_heads = q.shape[1], case.k.shape[1]
    o, weight, lse, reach = np.zeros(q.shape), np.zeros(q.shape), np.full(q.shape[:2], -np.inf), np.zeros(q.shape[:2])
    for b, n in np.ndindex(*q.shape[:2]):
        head = n // (heads // kv_heads)
        slots = shown_slots(case.ranges[b, head])
        if slots.size:
            logits = case.k[b, head, slots] @ q[b, n] * scale
            lse[b, n] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            p = np.exp(logits - lse[b, n])
            reach[b, n] = (np.abs(case.k[b, head, slots]) @ np.abs(q[b, n])).max() * scale
            o[b, n], weight[b, n] = p @ case.v[b, head, slots], p @ np.abs(case.v[b, head, slots])
    return o, lse, weight, reach


def close(got, case, scale=None):
    o, lse = got
    want_o, want_lse, weight, reach = float64(case, case.q.shape[2] ** -0.5 if scale is None else scale)
    assert o.dtype == case.q.dtype
    assert lse.dtype == FP32
    # Weights are rounded to the products' dtype, half an eps, which moves o by that part of sum p |v|; o is rounded
    # too. Sums in float32, and codes up to 255 that cancel, leave 1e-5. A float16 q is rounded to bfloat16 for a
    # quantised cache, which moves logits by up to 2^-9 of scale |q| |k|, lse by as much and o by twice that.
    rounded = isinstance(case.keys, QuantizedKV) and case.q.dtype == FP16
    eps = float(jnp.finfo(BF16 if rounded else case.q.dtype).eps + jnp.finfo(case.q.dtype).eps) / 2
    logit = 1e-5 + (2.0**-9 * reach if rounded else 0 * reach)
    bound = (eps + 2 * logit[..., None]) * weight + 1e-30
    np.testing.assert_array_less(np.abs(np.asarray(o, np.float64) - want_o), bound)
    seen = want_lse > -np.inf
    np.testing.assert_array_equal(np.asarray(lse) > -np.inf, seen)
    np.testing.assert_array_less(np.abs(np.asarray(lse)[seen] - want_lse[seen]), (logit + 1e-5 * reach)[seen])


def make(ranges, *, bits=16, group=2, slots=300, width=64, dtype=BF16, store=None, paged=False, side=FP16, seed=0):
    """Operands in which everything outside the ranges is NaN, and page numbers of untouched blocks are nonsense.

    A quantised store has NaN scales and zeros there. Pages lie in a pool in random order.
    """
    rng = np.random.default_rng(seed)
    ranges = np.asarray(ranges, np.int32)
    batch, kv_heads = ranges.shape[:2]
    q = jnp.asarray(rng.normal(size=(batch, kv_heads * group, width)), dtype)
    shown = np.zeros((batch, kv_heads, slots), bool)
    for row in np.ndindex(batch, kv_heads):
        shown[(*row, shown_slots(ranges[row]))] = True

    def one():
        x = jnp.asarray(1 + rng.normal(size=(*shown.shape, width)), store or dtype)
        if bits == 16:
            return jnp.where(shown[..., None], x, jnp.nan), np.asarray(x, np.float64)
        kv = quantize_kv(x, bits, side)
        hidden = dataclasses.replace(
            kv, scale=jnp.where(shown, kv.scale, jnp.nan), zero=jnp.where(shown, kv.zero, jnp.nan)
        )
        return hidden, (np.asarray(codes_of(kv), np.float64) - np.asarray(kv.zero, np.float64)[..., None]) * np.asarray(
            kv.scale, np.float64
        )[..., None]

    (keys, k), (values, v) = one(), one()
    table = None
    if paged:
        assert slots % BLOCK == 0
        blocks = slots // BLOCK
        order = rng.permutation(batch * blocks)
        touched = shown.reshape(batch, kv_heads, blocks, BLOCK).any(-1)

        def pool(array):
            pages = array.reshape(batch, kv_heads, blocks, BLOCK, *array.shape[3:]).swapaxes(1, 2)
            pages = pages.reshape(batch * blocks, kv_heads, BLOCK, *array.shape[3:])
            return jnp.zeros_like(pages).at[order].set(pages)

        keys, values = jax.tree.map(pool, (keys, values))
        table = jnp.where(touched, jnp.asarray(order, jnp.int32).reshape(batch, 1, blocks), 2**30)
    return Case(q, keys, values, ranges, table, k, v)


# Two rows of two key heads: dense; sink and window; nothing; both ranges in one block. Up to slot 300.
MIXED = [[[0, 300, 300, 300], [3, 10, 140, 297]], [[0, 0, 0, 0], [5, 70, 70, 72]]]


# --- The quantised format.


@pytest.mark.parametrize("bits", [8, 4])
def test_original_codes_scales_and_zeros(golden, bits):
    record = golden("qserve/kv_cache")
    for name in "kv":
        got = jax.jit(functools.partial(quantize_kv, bits=bits))(jnp.asarray(record[f"in/{name}"]))
        codes = record[f"out/kv{bits}_asym/{name}_codes"].astype(int)
        # The record's own tolerance: 99.9 % of the codes, the others off by one; scales and zeros exactly.
        difference = np.abs(np.asarray(codes_of(got), int) - codes)
        assert difference.max() <= 1
        assert np.mean(difference == 0) >= 0.999
        np.testing.assert_array_equal(got.scale, record[f"out/kv{bits}_asym/{name}_scale"])
        np.testing.assert_array_equal(got.zero, record[f"out/kv{bits}_asym/{name}_zero"])
    record_values = record[f"out/kv{bits}_asym/k_dequantised"].astype(np.float64)
    keys = quantize_kv(jnp.asarray(record["in/k"]), bits)
    same = np.asarray(codes_of(keys)) == record[f"out/kv{bits}_asym/k_codes"]
    # The original rounds scale * zero to float16, half an eps of it, and then the value.
    offset = np.abs(np.asarray(keys.scale, np.float64) * np.asarray(keys.zero, np.float64))[..., None]
    bound = 2.0**-11 * (offset + np.abs(record_values)) + 2.0**-24
    assert np.all((np.abs(np.asarray(dequantize_kv(keys)) - record_values) <= bound)[same])


@pytest.mark.parametrize("bits", [8, 4])
def test_original_decode_step(golden, bits):
    """70 tokens in the cache, and the newest one, not quantised, merged by its lse, which is its logit."""
    record = golden("qserve/kv_cache")
    q, k, v, k_new, v_new = (jnp.asarray(record[f"in/{name}"], FP32) for name in ("q", "k", "v", "k_cur", "v_cur"))
    ranges = jnp.full((1, 1, 4), 70).at[..., 0].set(0)
    o, lse = decode_attention(q[None], quantize_kv(k[None], bits), quantize_kv(v[None], bits), ranges)
    logit = jnp.sum(q * jnp.repeat(k_new, 2, 0), -1) * 128**-0.5
    share = jax.nn.sigmoid(logit - lse[0])[:, None]
    o = o[0] * (1 - share) + jnp.repeat(v_new, 2, 0) * share
    np.testing.assert_allclose(o, record[f"out/kv{bits}_asym/attention"], rtol=0, atol=2e-3)  # the record's own


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_quantising_rounds_to_the_nearest_level(bits, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 50, 64)), dtype)
    kv = quantize_kv(x, bits)
    assert kv.shape == x.shape
    assert kv.codes.dtype == jnp.int8
    codes = np.asarray(codes_of(kv))
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    # Half a step; float16 bounds scale and zero to 2^-11 of themselves, and a code and a zero are up to n steps.
    step = np.asarray(kv.scale, np.float64)[..., None]
    bound = (0.5 + 2 * 2**bits * 2.0**-11) * step
    assert np.all(np.abs(np.asarray(dequantize_kv(kv)) - np.asarray(x, np.float64)) < bound)


@pytest.mark.parametrize("bits", [8, 4])
def test_constant_vectors_come_back(bits):
    x = jnp.asarray([0.0, 1.0, -3.0, 1e-3, 60000.0])[:, None] * jnp.ones(64)
    kv = quantize_kv(x, bits)
    assert np.isfinite(np.asarray(kv.zero)).all()
    # Scale and zero are rounded to float16, 2^-11 each, the smallest scale to 2^-25.
    np.testing.assert_allclose(dequantize_kv(kv), x, rtol=2 * 2.0**-11, atol=2**bits * 2.0**-24)
    # float32 sides keep a spread that is small beside the mean.
    x = 100 + jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), FP32)
    exact = quantize_kv(x, bits, FP32)
    assert np.all(np.abs(dequantize_kv(exact) - x) < 0.51 * exact.scale[:, None])


def test_layout():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), FP32)
    eight, four = quantize_kv(x, 8), quantize_kv(x, 4)
    np.testing.assert_array_equal(np.asarray(eight.codes, int) + 128, codes_of(eight))
    assert four.codes.shape == (3, 4)
    stored, codes = np.asarray(four.codes).view(np.uint8), np.asarray(codes_of(four))
    np.testing.assert_array_equal(stored & 15, codes[:, :4])
    np.testing.assert_array_equal(stored >> 4, (codes[:, 4:] - 8) % 16)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_writes_slices(bits):
    """What a cache does: new tokens of one layer into a stacked store, inside jit."""
    rng = np.random.default_rng(0)
    store = quantize_kv(jnp.zeros((3, 2, 4, 10, 16), BF16), bits)  # [L, B, K, S, H]
    new = jnp.asarray(rng.normal(size=(2, 4, 2, 16)), BF16)

    @jax.jit
    def write(store, layer, start, new):
        def put(old, new):
            return lax.dynamic_update_slice(old, new[None], (layer, 0, 0, start, *[0] * (old.ndim - 4)))

        return jax.tree.map(put, store, quantize_kv(new, bits))

    got = write(store, 1, 7, new)
    assert got.bits == bits
    values, want = dequantize_kv(got), dequantize_kv(quantize_kv(new, bits))
    np.testing.assert_array_equal(values[1, :, :, 7:9], want)
    assert np.count_nonzero(values) == np.count_nonzero(want)
    layer = jax.tree.map(lambda array: array[1], got)
    assert layer.shape == (2, 4, 10, 16)


def test_what_cannot_be_quantised_is_refused():
    for x, bits, dtype in [(jnp.zeros((2, 8)), 5, FP16), (jnp.zeros((2, 7)), 4, FP16), (jnp.zeros((2, 8)), 8, BF16)]:
        with pytest.raises(ValueError, match="quantize_kv: bits="):
            quantize_kv(x, bits, dtype)


# --- The list of blocks.


def test_block_lists_hold_each_touched_block_once():
    rng = np.random.default_rng(0)
    ranges = np.sort(rng.integers(0, 40, (2000, 4)), -1)
    ranges[::3, 1] = ranges[::3, 0]
    ranges[::5, 3] = ranges[::5, 2]
    blocks = [np.asarray(part) for part in reference.block_list(jnp.asarray(ranges), 8)]
    for row, *of in zip(ranges, *blocks, strict=True):
        got = [int(reference.nth_block(of, n)) for n in range(of[-1])]
        assert got == sorted({int(slot) // 8 for slot in shown_slots(row)})


# --- The op in plain JAX.


@pytest.mark.parametrize("block", [1024, 128])
@pytest.mark.parametrize(
    ("dtype", "store", "bits", "side"),
    [
        (FP32, None, 16, None),
        (BF16, None, 16, None),
        (FP16, None, 16, None),
        (FP32, BF16, 16, None),
        (FP32, None, 8, FP16),
        (BF16, None, 8, FP32),
        (FP16, None, 4, FP16),
        (BF16, None, 4, FP16),
    ],
)
def test_xla_matches_float64(monkeypatch, dtype, store, bits, side, block):
    monkeypatch.setattr(reference, "BLOCK", block)  # one block, and three of which the last is ragged
    case = make(MIXED, bits=bits, dtype=dtype, store=store, side=side)
    got = case.run()
    close(got, case)
    np.testing.assert_array_equal(got[0][1, :2], 0)  # the head that sees nothing
    np.testing.assert_array_equal(got[1][1, :2], -np.inf)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("group", [1, 7])
def test_xla_paged(monkeypatch, group, bits):
    monkeypatch.setattr(reference, "BLOCK", 128)
    case = make(MIXED, bits=bits, group=group, slots=320, paged=True)
    close(case.run(), case)
    # Pages of 16 slots, which the kernel does not take, and one table for all heads.
    whole = make([[[0, 300, 300, 300]] * 2], bits=bits, group=group, slots=320, paged=True)

    def quarters(array):
        pages = array.reshape(-1, 2, 4, 16, *array.shape[3:]).swapaxes(1, 2)
        return pages.reshape(-1, 2, 16, *array.shape[3:])

    keys, values = jax.tree.map(quarters, (whole.keys, whole.values))
    table = (whole.table[:, :1, :, None] * 4 + np.arange(4)).reshape(1, 1, 20)
    close(dataclasses.replace(whole, keys=keys, values=values, table=table).run(), whole)


def test_one_compilation_for_all_ranges_and_a_scale():
    case = make(MIXED, dtype=FP32)
    run = jax.jit(functools.partial(decode_attention, scale=0.3))
    for ranges in (MIXED, [[[0, 1, 299, 300]] * 2] * 2, [[[7, 7, 7, 8]] * 2] * 2):
        case = make(ranges, dtype=FP32)
        close(run(case.q, case.keys, case.values, case.ranges), case, scale=0.3)
    assert run._cache_size() == 1


def test_ranges_are_broadcast():
    case = make([[[0, 9, 100, 120]] * 2] * 2, dtype=FP32)
    o, lse = decode_attention(case.q, case.keys, case.values, case.ranges[:1, :1])
    close((o, lse), case)


def test_no_slots():
    q = jnp.ones((1, 2, 8))
    o, lse = decode_attention(q, jnp.ones((1, 2, 0, 8)), jnp.ones((1, 2, 0, 8)), jnp.zeros((1, 1, 4), jnp.int32))
    np.testing.assert_array_equal(o, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_no_long_cache_is_held_in_another_dtype(bits):
    array = jax.ShapeDtypeStruct((1, 8, 32768, 128), BF16)
    store = array if bits == 16 else jax.eval_shape(functools.partial(quantize_kv, bits=bits), array)
    q, ranges = jax.ShapeDtypeStruct((1, 32, 128), BF16), jax.ShapeDtypeStruct((1, 8, 4), jnp.int32)
    run = functools.partial(decode_attention, implementation="xla")
    temporary = jax.jit(run).lower(q, store, store, ranges).compile().memory_analysis().temp_size_in_bytes
    # Blocks of 1024 slots and 8 heads, 4 MiB in float32, a few times; keys in bfloat16 are 64 MiB.
    assert temporary < 24 * 2**20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(ranges=np.zeros((2, 2, 3), np.int32)), r"ranges \[2, 2, 3\].*wanted q \[B, N, H\]"),
        (dict(q=jnp.zeros((2, 3, 64))), "K dividing N"),
        (dict(q=jnp.zeros((1, 4, 64))), r"q \[1, 4, 64\]"),
        (dict(q=jnp.zeros((2, 4, 64), int)), "q is int32; wanted bfloat16"),
        (dict(table=jnp.zeros((3, 1, 2), int)), r"table \[3, 1, 2\]"),
        (dict(values=jnp.zeros((2, 2, 300, 64), FP16)), "keys are bfloat16 and values float16; wanted both in one"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(make(MIXED), **change).run()


# --- The kernel, interpreted with race detection; a race raises.


def interpret(case, config, scale=None):
    got = mosaic_gpu.decode_attention(
        case.q,
        case.keys,
        case.values,
        jnp.asarray(case.ranges),
        case.table,
        scale=case.q.shape[2] ** -0.5 if scale is None else scale,
        config=config,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert no_races()
    return got


def no_races():
    """jax 0.12 raises at a race; 0.11 only notes it."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize(
    ("bits", "width", "group", "dtype", "splits", "stages", "paged"),
    [
        (16, 64, 1, BF16, 1, 2, False),
        (16, 128, 8, FP16, 2, 3, False),
        (16, 256, 4, BF16, 3, 2, True),
        (8, 64, 4, BF16, 2, 2, True),
        (8, 128, 1, FP16, 1, 3, False),
        (4, 64, 8, BF16, 1, 2, False),
        (4, 128, 4, BF16, 4, 2, True),
        (4, 256, 16, BF16, 2, 2, False),
    ],
)
def test_kernel_matches_float64(bits, width, group, dtype, splits, stages, paged):
    case = make(MIXED, bits=bits, width=width, group=group, dtype=dtype, slots=320 if paged else 304, paged=paged)
    close(interpret(case, mosaic_gpu.Config(splits, stages)), case)


@pytest.mark.parametrize("bits", [16, 8])
def test_more_splits_than_blocks_and_a_short_cache(bits):
    case = make([[[0, 30, 33, 37], [2, 2, 5, 6]]], bits=bits, slots=37, side=FP32)
    close(interpret(case, mosaic_gpu.Config(splits=3, stages=2), scale=0.5), case, scale=0.5)


@pytest.mark.parametrize("bits", [16, 8])
def test_the_kernel_reads_the_listed_blocks_only(monkeypatch, bits):
    """With one block struck off the list, the result is that of the other, whatever the ranges show."""
    case = make([[[0, 60, 130, 190]]], bits=bits, slots=192, paged=True)
    monkeypatch.setattr(mosaic_gpu, "block_list", lambda *_: [jnp.full((1, 1), n) for n in (0, 1, 2, 1)])
    got = interpret(case, mosaic_gpu.Config(1, 2))
    close(got, dataclasses.replace(case, ranges=np.asarray([[[0, 60, 60, 60]]])))


def test_op_chooses_and_interprets():
    case = make(MIXED, bits=4, slots=304)
    close(case.run("interpret"), case)
    case = make(MIXED, slots=320, paged=True)
    close(
        jax.jit(functools.partial(decode_attention, implementation="interpret"))(*operands(case), table=case.table),
        case,
    )


def operands(case):
    return case.q, case.keys, case.values, jnp.asarray(case.ranges)


# --- Many devices.


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis", ["B", "K"])
@pytest.mark.parametrize("bits", [16, 4])
def test_shard_map(bits, axis, check_vma):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    ranges = [[[0, 20 + b, 30, 31 + k] for k in range(8)] for b in range(8)]
    case = make(ranges, bits=bits, slots=40, width=16, dtype=FP32)
    spec = PartitionSpec("x") if axis == "B" else PartitionSpec(None, "x")
    run = jax.shard_map(decode_attention, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    close(jax.jit(run)(*operands(case)), case)


def test_slots_split_over_devices_are_merged_by_lse():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    case = make([[[0, 77, 77, 77], [0, 13, 13, 13]]], slots=80, width=16, dtype=FP32)
    case = dataclasses.replace(case, keys=jnp.nan_to_num(case.keys), values=jnp.nan_to_num(case.values))

    def local(q, keys, values, ranges):
        mine = jnp.clip(ranges - 10 * lax.axis_index("x"), 0, 10)
        o, lse = decode_attention(q, keys, values, mine)
        total = jax.nn.logsumexp(lax.all_gather(lse, "x"), axis=0)
        return lax.psum(o * jnp.exp(lse - total)[..., None], "x"), lax.pmax(total, "x")

    cut, whole = PartitionSpec(None, None, "x"), PartitionSpec()
    run = jax.shard_map(local, mesh=mesh, in_specs=(whole, cut, cut, whole), out_specs=whole)
    close(jax.jit(run)(*operands(case)), case)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_kernel_on_every_devices_part(axis):
    """jax 0.12's GPU interpreter mixes up the barriers of several devices, so each part runs by itself."""
    case = make(MIXED, bits=8, slots=304)
    parts = []
    for i in range(2):
        cut = functools.partial(lax.slice_in_dim, start_index=i, limit_index=i + 1, axis=axis)
        q = lax.slice_in_dim(case.q, i, i + 1) if axis == 0 else case.q[:, 2 * i : 2 * i + 2]
        keys, values, ranges = (jax.tree.map(cut, x) for x in (case.keys, case.values, jnp.asarray(case.ranges)))
        parts.append(decode_attention(q, keys, values, ranges, implementation="interpret"))
    close([jnp.concatenate(pieces, axis) for pieces in zip(*parts, strict=True)], case)


# --- The choice of a configuration, and what has no kernel.


def test_the_grid_fills_the_gpu():
    for rows in (1, 8, 32, 64, 256):
        for bits in (16, 8, 4):
            config = mosaic_gpu.choose(rows, 16384, bits, 128)
            assert rows * config.splits >= 120
            assert mosaic_gpu.choose(rows, 1, bits, 128).splits == 1
    assert mosaic_gpu.choose(1024, 64, 16, 128).splits == 1


def test_measured_rows_go_before_counting(monkeypatch):
    case = make(MIXED)
    row = dict(device=jax.devices()[0].device_kind, rows=4, blocks=8, bits=16, head_dim=64)
    monkeypatch.setattr(mosaic_gpu, "tuned_rows", lambda: [row | {"config": dict(splits=5, stages=3)}])
    assert mosaic_gpu.config_for(case.q, case.keys, None) == mosaic_gpu.Config(5, 3)
    monkeypatch.setattr(mosaic_gpu, "tuned_rows", lambda: [row | {"bits": 8, "config": dict(splits=5, stages=3)}])
    assert mosaic_gpu.config_for(case.q, case.keys, None) == mosaic_gpu.choose(4, 5, 16, 64)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(dtype=FP32), "q is float32 and the kernel takes bfloat16 or float16"),
        (dict(store=FP16), "keys and values are float16 and float16 and the kernel takes q's bfloat16"),
        (dict(width=32), "heads have 32 channels and the kernel takes 64, 128, 256"),
        (dict(group=17), "17 query heads share a key head and the kernel takes 16"),
        (dict(slots=300), "rows have 300 slots and the kernel takes multiples of 8: allocate a few more"),
    ],
)
def test_what_the_kernel_cannot_take(options, reason):
    case = make(MIXED, **{"slots": 304, **options})
    with pytest.raises(ValueError, match=f"decode_attention: interpret cannot run this: {reason}"):
        case.run("interpret")
    close(case.run("auto"), case)


# --- The benchmark, as far as it goes without a GPU.


def test_bench_counts_what_the_ranges_keep(capsys):
    bench.main(["--contexts", "256", "--batch", "2", "--stores", "int4", "--heads", "4", "2", "64", "--repeats", "1"])
    row = json.loads(capsys.readouterr().out)
    # Keys and values of 2 rows and 2 heads: 32 bytes of codes and 4 of sides a token; q and o in bfloat16, lse.
    assert row["bytes"] == 2 * 2 * 2 * 256 * (32 + 4) + 2 * (2 * 4 * 64 * 2) + 2 * 4 * 4
    assert row["implementation"] == "xla"
    assert row["us"] == row["us_xla"] > 0
    assert "of_bandwidth" not in row  # a CPU has no data sheet here
    bench.main(
        [
            "--contexts",
            "256",
            "--stores",
            "bfloat16",
            "--window",
            "64",
            "32",
            "--heads",
            "4",
            "2",
            "64",
            "--repeats",
            "1",
        ]
    )
    assert json.loads(capsys.readouterr().out)["bytes"] == 2 * 2 * 96 * 128 + 2 * (4 * 64 * 2) + 4 * 4


def test_tuning_needs_the_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tune"])
    assert "--tune measures on the GPU that the rows are for: the kernel needs a Hopper GPU" in capsys.readouterr().err


# --- Compiled for absent hardware.


def shapes(bits, width, group=4, slots=4096, table=False, dtype=BF16, side=FP16):
    q, ranges = jax.ShapeDtypeStruct((4, 8 * group, width), dtype), jax.ShapeDtypeStruct((4, 8, 4), jnp.int32)
    store = jax.ShapeDtypeStruct((500, 8, BLOCK, width) if table else (4, 8, slots, width), dtype)
    if bits < 16:
        store = jax.eval_shape(functools.partial(quantize_kv, bits=bits, dtype=side), store)
    return q, store, store, ranges, jax.ShapeDtypeStruct((4, 1, 512), jnp.int32) if table else None


def test_every_choice_compiles_for_hopper():
    """No spills, no serialised wgmma. The number of splits is in the grid and one constant; stages follow the shape."""
    kinds = [(bits, width, {}) for width in mosaic_gpu.HEAD_DIMS for bits in (16, 8, 4)]
    kinds += [(bits, width, dict(table=True, group=16)) for bits, width in [(16, 256), (8, 256), (4, 256), (4, 128)]]
    kinds += [(16, 64, dict(slots=4008, dtype=FP16)), (8, 64, dict(slots=4008, side=FP32)), (8, 128, dict(slots=40))]
    rows = [(row["bits"], row["head_dim"], mosaic_gpu.Config(**row["config"])) for row in mosaic_gpu.tuned_rows()]
    cases = [
        (functools.partial(mosaic_gpu.decode_attention, scale=0.1, config=config), shapes(bits, width, **options))
        for bits, width, options, config in [
            *((bits, width, options, mosaic_gpu.choose(32, 64, bits, width)) for bits, width, options in kinds),
            *((bits, width, {}, config) for bits, width, config in rows),
        ]
    ]
    for case, (report,) in zip(kinds + rows, compile_reports(cases), strict=True):
        assert report.spill_bytes == report.stack_bytes == 0, (case, report)
        assert not report.serialised_wgmma, (case, report)
        # K Q.T takes H / 16 products of 64 rows, V.T P.T takes H / 64 times four.
        assert report.hot_loop["HGMMA"] == case[1] // 8, (case, report)
        assert report.count("I2F") == 0, (case, report)


OP = """
import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lumen import plan, sharding
from pallas_kernels.decode_attention import decode_attention, quantize_kv

place = plan.topology(sys.argv[1])
mesh = sharding.make_mesh({"tensor": -1}, place.devices)


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, P(None, "tensor")))


q, keys, ranges = array(jnp.bfloat16, 4, 32, 128), array(jnp.bfloat16, 4, 8, 32768, 128), array(jnp.int32, 4, 8, 4)
run = jax.shard_map(decode_attention, mesh=mesh, in_specs=P(None, "tensor"), out_specs=P(None, "tensor"))
with jax.set_mesh(mesh):
    for bits in (16, 4):
        store = keys
        if bits < 16:
            store = jax.eval_shape(lambda x: quantize_kv(x, bits), keys)
            store = jax.tree.map(lambda a: array(a.dtype, *a.shape), store)
        compiled = jax.jit(run).lower(q, store, store, ranges).compile()
        print("RESULT", compiled.as_text().count("mosaic_gpu"), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize("place", ["v5p:2x2x2", "h200:8"])
def test_the_op_compiles_for_a_tensor_parallel_machine(tmp_path, place):
    (tmp_path / "op.py").write_text(OP)
    code, output = plan.run_isolated([str(tmp_path / "op.py"), place], topology=place, timeout=300.0)
    assert code == 0, output
    results = [[int(n) for n in line.split()[1:]] for line in output.splitlines() if "RESULT" in line]
    assert len(results) == 2
    for kernels, temporary in results:
        assert (kernels > 0) == (place == "h200:8")
        # A device holds one head of 4 rows: 32 MiB of keys in bfloat16, never a second time.
        assert temporary < 16 * 2**20


# --- On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("width", mosaic_gpu.HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_gpu_matches_float64(group, width, bits, paged):
    ranges = [[[0, 4000, 4000, 4000], [0, 64, 3500, 4001]], [[0, 0, 0, 0], [5, 70, 70, 130]]]
    case = make(ranges, bits=bits, width=width, group=group, slots=4096 if paged else 4008, paged=paged)
    got = case.run("mosaic_gpu")
    close(got, case)
    for _ in range(5):  # parts are merged in one order
        np.testing.assert_array_equal(got[0], case.run("mosaic_gpu")[0])
