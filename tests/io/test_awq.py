"""The four layouts of AWQ checkpoints, against files written by the original code."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lumen.io.awq import AWQFormat, read_linear, write_linear

AWQ_GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "awq"
LAYOUTS = ["gemm", "gemv", "gemv_fast", "llm-awq"]
ZEROS = {"gemm": "qzeros", "gemv": "qzeros", "gemv_fast": "qzeros", "llm-awq": "scaled_zeros"}


def original(layouts, group, layout):
    """The golden's tensors of one layout; the words of llm-awq are those of gemv_fast."""
    if layout == "llm-awq":
        return {
            "P.qweight": layouts[f"out/g{group}/gemv_fast/qweight"],
            "P.scaled_zeros": layouts[f"out/g{group}/llmawq_v2/scaled_zeros"],
            "P.scales": layouts[f"out/g{group}/llmawq_v2/scales"],
        }
    return {f"P.{name}": layouts[f"out/g{group}/{layout}/{name}"] for name in ("qweight", "qzeros", "scales")}


def codes(layouts, group):
    return tuple(layouts[f"out/g{group}/{name}"].T for name in ("codes", "scale", "zero"))


def assert_same_bits(came, wanted):
    assert came.keys() == wanted.keys()
    for name, tensor in came.items():
        assert tensor.flags.c_contiguous, name
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert tensor.tobytes() == np.ascontiguousarray(wanted[name]).tobytes(), name  # -0.0 is not 0.0


def random_linear(depth, features, group, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    groups = depth // group
    return (
        rng.integers(0, 16, (depth, features), np.uint8),
        rng.uniform(1e-3, 0.1, (groups, features)).astype(dtype),
        rng.integers(0, 16, (groups, features), np.uint8),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [32, 64, 128, 256])  # 256: a whole row
def test_writes_the_originals_bits(golden, layout, group):
    layouts = golden("awq/layouts")
    config = AWQFormat(-1 if group == 256 else group, layout)
    assert_same_bits(write_linear("P", *codes(layouts, group), config), original(layouts, group, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_reads_the_originals_bits(golden, layout, group):
    layouts = golden("awq/layouts")
    came = read_linear(original(layouts, group, layout), "P", AWQFormat(group, layout))
    for got, want in zip(came, codes(layouts, group), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_converts_the_first_version_of_llm_awq(golden, group):
    layouts = golden("awq/layouts")
    first, second = AWQFormat(group, "gemv"), AWQFormat(group, "llm-awq")
    tensors = original(layouts, group, "gemv")
    converted = write_linear("P", *read_linear(tensors, "P", first), second)
    np.testing.assert_array_equal(converted["P.qweight"], layouts[f"out/g{group}/gemv_fast/qweight"])
    for name in ("scales", "scaled_zeros"):  # the repacker has -0.0 in the padding, where the quantiser has 0.0
        np.testing.assert_array_equal(converted[f"P.{name}"], layouts[f"out/g{group}/llmawq_v1_to_v2/{name}"])
    for got, want in zip(read_linear(tensors, "P", second), codes(layouts, group), strict=True):
        np.testing.assert_array_equal(got, want)  # read as the first version, which it is


def test_dequantised_matrix_and_product(golden):
    layouts = golden("awq/layouts")
    x, bias = layouts["in/x"].astype(np.float64), layouts["weights/bias"].astype(np.float64)
    for group in (32, 64, 128, 256):
        q, scale, zero = read_linear(original(layouts, group, "gemm"), "P", AWQFormat(group))
        difference = (q.astype(np.int32) - np.repeat(zero, group, 0)).astype(np.float16)
        weight = difference * np.repeat(scale, group, 0)  # one float16 product, as the original
        if group == 64:
            np.testing.assert_array_equal(weight, layouts["out/g64/dequantised_T"])
        # The original's float32 sums of 256 terms: 1e-4, the golden's own tolerance.
        np.testing.assert_allclose(x @ weight.astype(np.float64) + bias, layouts[f"out/g{group}/y"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("depth", "features", "group"), [(1024, 24, 32), (192, 8, 64), (1280, 40, 128), (64, 16, -1)])
def test_round_trip(depth, features, group, layout, dtype):
    linear = random_linear(depth, features, depth if group == -1 else group, dtype=dtype)
    config = AWQFormat(group, layout)
    for got, want in zip(read_linear(write_linear("a.b", *linear, config), "a.b", config), linear, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
def test_random_words_come_back(layout):
    """Unpacking then packing keeps every bit of a word, the sign bit included."""
    rng = np.random.default_rng(1)
    words = rng.integers(-(2**31), 2**31, (128, 16), np.int64).astype(np.int32)
    zeros = rng.integers(-(2**31), 2**31, (1, 16) if layout == "gemm" else (128, 1), np.int64).astype(np.int32)
    if layout == "gemv":
        zeros &= 0xF  # one group: the other seven nibbles are padding
    scales = np.zeros((1, 128) if layout == "gemm" else (128, 8), np.float16)
    scales[:, : 128 if layout == "gemm" else 1] = 0.5
    tensors = {"P.qweight": words, "P.qzeros": zeros, "P.scales": scales}
    config = AWQFormat(128, layout)
    assert_same_bits(write_linear("P", *read_linear(tensors, "P", config), config), tensors)


def test_gemm_word_by_hand():
    """Columns 0..7 hold 1..8: nibbles 0 2 4 6 1 3 5 7, lowest first, are 1 3 5 7 2 4 6 8: 0x86427531."""
    q = np.arange(1, 9, dtype=np.uint8)[None]
    packed = write_linear("P", q, np.ones((1, 8)), np.zeros((1, 8), int), AWQFormat(1))
    assert packed["P.qweight"].view(np.uint32) == [[0x86427531]]


def test_subnormal_scales_keep_their_zeros():
    """The smallest scale, 1e-5 / 15, is eleven float16 steps: -scale * zero still tells the 16 zeros apart."""
    scale = np.full((1, 16), np.float16(1e-5) / np.float16(15), np.float16)
    zero = np.arange(16, dtype=np.uint8)[None]
    config = AWQFormat(128, "gemv_fast")
    linear = (np.zeros((128, 16), np.uint8), scale, zero)
    np.testing.assert_array_equal(read_linear(write_linear("P", *linear, config), "P", config)[2], zero)


@pytest.mark.parametrize("name", ["checkpoint_llama_gqa_gemm_g64", "checkpoint_qwen2_gemm_g32"])
def test_checkpoints_of_the_original(name):
    config = json.loads((AWQ_GOLDENS / name / "config.json").read_text())["quantization_config"]
    read = AWQFormat.from_config(config)
    assert read.to_config() == config
    tensors = load_file(AWQ_GOLDENS / name / "model.safetensors")
    linears = sorted(tensor.removesuffix(".qweight") for tensor in tensors if tensor.endswith(".qweight"))
    assert len(linears) == 14
    for linear in linears:
        wanted = {f"{linear}.{part}": tensors[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales")}
        assert_same_bits(write_linear(linear, *read_linear(tensors, linear, read), read), wanted)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, AWQFormat(128, "gemm")),
        ({"w_bit": 4, "q_group_size": 64, "version": "GEMV_FAST"}, AWQFormat(64, "gemv_fast")),
        ({"QUANT_METHOD": "AWQ", "BITS": 4, "GROUP_SIZE": -1, "VERSION": "GEMV"}, AWQFormat(-1, "gemv")),
        ({"bits": 4, "group_size": 128, "version": "gemv", "backend": "LLM-AWQ"}, AWQFormat(128, "llm-awq")),
        ({"bits": 4, "modules_to_not_convert": ["Lm_Head", "gate"]}, AWQFormat(unconverted=("Lm_Head", "gate"))),
        ({"bits": 4, "modules_to_not_convert": None}, AWQFormat()),
    ],
)
def test_reads_configurations(config, wanted):
    assert AWQFormat.from_config(config) == wanted
    assert AWQFormat.from_config(wanted.to_config()) == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"version": "Marlin"}, "version is 'marlin'"),
        ({"version": "exllama"}, "version is 'exllama'"),
        ({"zero_point": False}, "zero_point is False"),
        ({"backend": "ipex"}, "backend is 'ipex'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "128"}, "group_size is '128'"),
    ],
)
def test_refuses_configurations(change, named):
    with pytest.raises(ValueError, match=f"quantization_config: {named}; wanted"):
        AWQFormat.from_config({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"} | change)


def test_unconverted_linears():
    config = AWQFormat(unconverted=("lm_head", "mlp.gate."))
    assert not config.converts("lm_head")
    assert not config.converts("model.layers.0.mlp.gate.0")
    assert config.converts("model.layers.0.mlp.gate_proj")


def test_refuses_tensors():
    config = AWQFormat(64)
    good = write_linear("P", *random_linear(128, 16, 64), config)

    def changed(**tensors):
        return good | {f"P.{name}": tensor for name, tensor in tensors.items()}

    with pytest.raises(ValueError, match=r"P\.scales is missing"):
        read_linear({name: tensor for name, tensor in good.items() if name != "P.scales"}, "P", config)
    with pytest.raises(ValueError, match=r"P\.qweight is int16\[128, 2\]"):
        read_linear(changed(qweight=good["P.qweight"].astype(np.int16)), "P", config)
    with pytest.raises(ValueError, match=r"P\.scales came \[2, 16\], wanted \[4, 16\]"):
        read_linear(good, "P", AWQFormat(32))
    with pytest.raises(ValueError, match="P has 128 input channels, not a multiple of the group 48"):
        read_linear(good, "P", AWQFormat(48))
    fast = AWQFormat(64, "gemv_fast")
    packed = write_linear("P", *random_linear(128, 16, 64), fast)
    packed["P.qzeros"][0, 0] = -packed["P.scales"][0, 0] * np.float16(7.5)
    with pytest.raises(ValueError, match=r"P\.qzeros holds values"):
        read_linear(packed, "P", fast)


@pytest.mark.parametrize(
    ("depth", "features", "group", "layout", "named"),
    [
        (64, 12, 32, "gemm", "output channels in multiples of 8"),
        (100, 8, 100, "gemv", "input channels in multiples of 8"),
        (96, 8, 32, "gemv_fast", "input channels in multiples of 64"),
        (64, 8, 16, "gemv", "groups of 32, 64, or 128 and more, not 16"),
    ],
)
def test_refuses_sizes(depth, features, group, layout, named):
    with pytest.raises(ValueError, match=named):
        write_linear("P", *random_linear(depth, features, group), AWQFormat(group, layout))


def test_refuses_values():
    q, scale, zero = random_linear(64, 8, 64)
    config = AWQFormat(64)
    with pytest.raises(ValueError, match=r"q has values outside 0\.\.15"):
        write_linear("P", q.astype(int) + 1, scale, zero, config)
    with pytest.raises(ValueError, match="wants scale and zero"):
        write_linear("P", q, scale[:, :4], zero, config)
    for bad in (np.nan, 0.0, 1e6):  # 1e6 is infinite as float16
        with pytest.raises(ValueError, match="not finite and positive as float16"):
            write_linear("P", q, np.full((1, 8), bad, np.float32), zero, config)
