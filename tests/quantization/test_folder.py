"""Quantising a published folder, at the command line: what is written, what is measured, what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from lumen import cli
from lumen.evaluation.quantization import comparison_table
from lumen.io.awq import AWQFormat
from lumen.io.text import passages
from lumen.language import pretrained
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.tokenizer import ByteTokenizer
from lumen.qtensor import QuantizedLinear
from lumen.quantization import folder as folder_module
from lumen.quantization.awq import AWQConfig, quantize_decoder
from lumen.quantization.calibrate import calibration_tokens
from pallas_kernels.w4a16_matmul import unpack

TEXT = "\n\n".join(f"def f{i}(x):\n    return x * {i}" for i in range(80))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model folder and a text."""
    root = tmp_path_factory.mktemp("quantize")
    config = DecoderConfig.debug(vocabulary=259, hidden=128)
    model = jax.tree.map(lambda x: 2 * x, Decoder(config, rngs=nnx.Rngs(0)))
    pretrained.save(root / "model", model, pretrained.Folder(ByteTokenizer().files()))
    (root / "text.txt").write_text(TEXT)
    return root


def quantize(root, out, *flags):
    calibration = ["--calibration", str(root / "text.txt"), "--length", "32", "--group-size", "32"]
    return cli.main(["quantize", "awq", "--model", str(root / "model"), "--out", str(root / out), *calibration, *flags])


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm-awq"])
def test_packed_folder_holds_the_model_and_its_report(root, layout, capsys):
    assert quantize(root, layout, "--format", layout) == 0
    out, err = capsys.readouterr()
    assert re.match(r"calibration: \d+ sequences of 32 tokens", err)
    assert (root / layout / "report.md").read_text() == out.removesuffix("\n")
    assert (root / layout / "report.png").read_bytes().startswith(b"\x89PNG")
    model, folder = pretrained.load(root / layout)
    assert folder.quantization == AWQFormat(32, layout)
    assert all(isinstance(getattr(model.blocks, name), QuantizedLinear) for name in ("query", "output", "up", "down"))
    assert not list(root.glob(".*"))  # nothing unfinished is left
    full, _ = pretrained.load(root / "model")
    tokens = calibration_tokens(passages(root / "text.txt"), ByteTokenizer().encode, length=32)
    want, _ = quantize_decoder(full, tokens, AWQConfig(group=32), progress=False)
    for name in ("query", "value", "output", "gate", "down"):
        for got, wanted in zip(*(unpack(getattr(m.blocks, name).packed) for m in (model, want)), strict=True):
            np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(model.blocks.mlp_norm.scale, want.blocks.mlp_norm.scale[...].astype(np.float16))


def test_three_bits_are_written_unpacked(root, capsys):
    assert quantize(root, "three", "--bits", "3") == 2
    assert "layout 'gemm' holds 4-bit codes and bits=3" in capsys.readouterr().err
    assert not (root / "three").exists()
    assert quantize(root, "three", "--bits", "3", "--format", "dense") == 0
    model, folder = pretrained.load(root / "three")
    assert folder.quantization is None
    # Every group of 32 weights has at most eight values.
    column = np.asarray(model.blocks.up.kernel[0, :32, 0])
    assert len(np.unique(column)) <= 8


def test_a_run_that_was_cut_off_goes_on_and_gives_the_same(root, monkeypatch, capsys):
    quantize(root, "whole")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folder_module.pretrained, "save", stop)
        assert quantize(root, "again") == 130
    assert not (root / "again").exists()
    blocks = sorted(path.name for path in (root / ".again.unfinished").glob("block_*"))
    assert blocks == ["block_00000.safetensors", "block_00001.safetensors"]
    assert quantize(root, "again") == 0
    for name in ("model.safetensors", "config.json", "report.md"):
        assert (root / "again" / name).read_bytes() == (root / "whole" / name).read_bytes()
    assert not (root / ".again.unfinished").exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "128"], r"blocks.query has 64 input channels, not a multiple of group=128"),
        (["--group-size", "48"], r"group=48; wanted one of 32, 64, 128, -1"),
        (["--length", "100000"], r"less than one block of 100000"),
        (["--length", "100000", "--windows", "4"], r"wanted at least one window of 100000"),
        (["--calibration", "nowhere.txt"], r"nowhere.txt: no such text"),
        (["--model", "nowhere"], r"nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(root, capsys, flags, message):
    assert quantize(root, "refused", *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err.splitlines()[-1]), err
    assert not (root / "refused").exists()


def test_a_target_that_exists_and_a_source_that_is_quantised_are_refused(root, capsys):
    quantize(root, "first")
    assert quantize(root, "first") == 2
    assert "first exists; choose another folder" in capsys.readouterr().err
    assert quantize(root, "twice", "--model", str(root / "first")) == 2
    assert "is quantised already" in capsys.readouterr().err


def test_perplexity_command(root, capsys):
    flags = ["--text", str(root / "text.txt"), "--block", "32", "--blocks", "8"]
    assert cli.main(["evaluate", "perplexity", "--model", str(root / "model"), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"] == 8
    assert found["tokens"] == 8 * 31
    assert found["perplexity"] > 100  # an untrained model of 259 tokens


def test_comparison_command(root, capsys):
    model, text = str(root / "model"), str(root / "text.txt")
    measured = ["--calibration", text, "--text", text, "--length", "32", "--group-size", "32", "--block", "32"]
    measured += ["--windows", "6"]
    assert cli.main(["evaluate", "quantization", "--model", model, *measured, "--blocks", "4", "--bits", "4"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| model | full | int4 rtn | int4 awq |"
    assert table[2].startswith(f"| {model} | ")
    assert table[3].startswith("| mean excess ± deviation |  | ")


def test_comparison_table_is_mean_and_sample_deviation():
    table = comparison_table({"a": {"full": 10.0, "int4 rtn": 11.0}, "b": {"full": 12.0, "int4 rtn": 15.0}})
    assert table.splitlines()[-1] == "| mean excess ± deviation |  | +2.0000 ± 1.4142 |"
