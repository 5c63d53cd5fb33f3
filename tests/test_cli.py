"""The lumen command: what it prints, and one line for what the user can mend."""

import io
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from lumen import cli
from lumen.evaluation.memory import Deployment, cache_bytes
from lumen.io.head_patterns import write_pattern
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.generate import generate
from lumen.language.pretrained import Folder, save
from lumen.language.tokenizer import ByteTokenizer
from lumen.sampling import Sampling

PROMPT = "Grüße"


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig.debug(vocabulary=259)
    model = Decoder(config, rngs=nnx.Rngs(0))
    # Logits far enough apart that drawing and taking the most likely differ, and that rounding decides nothing.
    return jax.tree.map(lambda x: 8 * x, model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    save(path, model, Folder(ByteTokenizer().files()))
    return path


def text_of(model, count, **options):
    prompt = ByteTokenizer().encode(PROMPT, bos=True)
    tokens, lengths = generate(model, [prompt], max_new_tokens=count, stop=(257,), **options)
    return ByteTokenizer().decode(tokens[0, : lengths[0]].tolist())


def test_greedy_text(model, folder, capsys):
    assert cli.main(["generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "14"]) == 0
    out, err = capsys.readouterr()
    assert out == text_of(model, 14) + "\n"
    assert re.fullmatch(r"8 tokens read, 14 generated in \d+\.\d s, \d+\.\d tokens/s once compiled\n", err)


def test_drawn_text_and_stdin(model, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    flags = {
        "--model": folder,
        "--prompt": "-",
        "--dtype": "float32",
        "--temperature": 1.5,
        "--top-k": 9,
        "--top-p": 0.9,
    }
    flags |= {"--repetition-penalty": 1.2, "--seed": 3, "--max-new-tokens": 5}
    assert cli.main(["generate", *(str(part) for pair in flags.items() for part in pair)]) == 0
    keys = jax.random.split(jax.random.key(3), 1)
    want = text_of(model, 5, sampling=Sampling(1.5, 9, 0.9), repetition_penalty=1.2, keys=keys)
    assert capsys.readouterr().out == want + "\n"
    assert want != text_of(model, 5)


def test_it_stops_at_the_end_token(model, folder, capsys, tmp_path):
    prompt = ByteTokenizer().encode(PROMPT, bos=True)
    first = int(generate(model, [prompt], max_new_tokens=1)[0][0, 0])
    files = ByteTokenizer().files() | {"generation_config.json": f'{{"eos_token_id": [257, {first}]}}'.encode()}
    save(tmp_path / "model", model, Folder(files))
    assert cli.main(["generate", "--model", str(tmp_path / "model"), "--prompt", PROMPT]) == 0
    assert re.match(r"8 tokens read, 1 generated in \d+\.\d s\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "lumen: tokenizer: nowhere/tokenizer.json does not exist; wanted 'bytes' or a folder"),
        ({"--model": "nowhere", "--tokenizer": "bytes"}, "lumen: load: nowhere holds no config.json"),
        ({"--temperature": "-1"}, "lumen: Sampling: temperature=-1.0"),
        ({"--max-new-tokens": "0"}, "lumen: generate: max_new_tokens=0"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, change, message):
    flags = {"--model": str(folder), "--prompt": PROMPT} | change
    assert cli.main(["generate", *(part for pair in flags.items() for part in pair)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_long_errors_are_cut(folder, capsys, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 4')
    (tmp_path / "config.json").write_text(config)
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", PROMPT]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"lumen: 18 mismatches .* missing .* and 16 lines more\n", err)


def arguments(flags):
    return [
        str(part) for name, value in flags.items() for part in (name, *(value if isinstance(value, list) else [value]))
    ]


def test_needle(model, folder, capsys, tmp_path):
    """Replies are the model's; heads that stream with room for everything change nothing, and without it a lot."""
    write_pattern(tmp_path / "pattern", np.array([[1.0, 0.0], [0.0, 0.2]]))
    flags = {"--model": folder, "--from": 300, "--to": 300, "--lengths": 1, "--depths": 4, "--max-new-tokens": 6}
    streaming = flags | {"--pattern": tmp_path / "pattern", "--sink": 4}
    replies = []
    for number, more in enumerate([flags, streaming | {"--recent": 400}, streaming | {"--recent": 8}]):
        out = tmp_path / str(number)
        assert cli.main(["evaluate", "needle", *arguments(more | {"--out": out})]) == 0
        shown = json.loads(capsys.readouterr().out)
        results = json.loads((out / "results.json").read_text())
        assert shown == {key: results[key] for key in ("mean", "lengths", "by_length")}
        assert shown["lengths"] == [300]
        assert (out / "needle.png").stat().st_size > 5000
        replies.append([cell["reply"] for cell in results["cells"]])
    assert len(replies[0]) == 4
    assert replies[0] == replies[1]
    assert all(ours != theirs for ours, theirs in zip(replies[0], replies[2], strict=True))


def test_passkey(folder, capsys, tmp_path):
    flags = {"--model": folder, "--from": 300, "--to": 300, "--lengths": 1, "--trials": 2, "--measure": "tokens"}
    assert cli.main(["evaluate", "passkey", *arguments(flags | {"--out": tmp_path})]) == 0
    assert json.loads(capsys.readouterr().out) == {"mean": 0.0, "lengths": [300], "by_length": [0.0]}
    assert (tmp_path / "passkey.png").stat().st_size > 5000
    assert [cell["tokens"] for cell in json.loads((tmp_path / "results.json").read_text())["cells"]] == [300, 300]


def test_memory(folder, capsys):
    flags = {"--model": folder, "--context": 1000, "--cache": ["bf16", "int4"], "--sparsity": 0.5, "--batch": 3}
    assert cli.main(["evaluate", "memory", *arguments(flags)]) == 0
    *table, line = capsys.readouterr().out.strip().split("\n")
    assert table[0].startswith("| 1,000 tokens, NVIDIA H200 | all heads full, bf16 | all heads full, int4 | streaming")
    found = [report["cache_bytes"] for report in json.loads(line)]
    config = DecoderConfig.debug(vocabulary=259)
    assert found[:2] == [cache_bytes(Deployment(config, cache_bits=bits, batch=3), 1000) for bits in (16, 4)]
    # Of 4 heads 2 keep 321 tokens: 4 x 16 bytes a token in bfloat16.
    assert found[2] == 3 * 64 * (2 * 1000 + 2 * 328)
    assert cli.main(["evaluate", "memory", "--model", "qwen25_7b", "--context", "131072", "--chip", "h100"]) == 0
    assert "| fits: 27.6 of 84.9 GB |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("needle", {"--answer": "x"}, "lumen: --needle, --question and --answer belong together"),
        ("needle", {"--sparsity": "0.5"}, "lumen: --sparsity says how many heads stream; give --pattern"),
        ("needle", {"--to": "200"}, "lumen: needle: 13 numbers from 1000 to 200; wanted 1 or more, and last >= first"),
        ("needle", {"--text": "none.txt"}, "lumen: none.txt: no such text"),
        ("passkey", {"--from": "100"}, "lumen: passkey: a length of 100 has no room for idle text"),
        (
            "memory",
            {"--model": "llama9"},
            "lumen: memory: model 'llama9' is neither llama3_8b nor qwen25_7b nor a folder",
        ),
        ("memory", {"--chip": "b200"}, "lumen: --chip: 'b200' is unknown; use h200, h100"),
    ],
)
def test_mistakes_of_long_context(folder, capsys, tmp_path, kind, change, message):
    flags = {"--model": folder} | ({"--context": 9} if kind == "memory" else {"--out": tmp_path}) | change
    assert cli.main(["evaluate", kind, *arguments(flags)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)


def test_help_and_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "--help"])
    assert caught.value.code == 0
    assert "lumen generate --model" in capsys.readouterr().out
    for argv in ([], ["generate"], ["paint"], ["generate", "--mod", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2


def test_as_a_program_whose_reader_leaves(folder):
    """In a process of its own: nothing but the text on stdout, and no traceback when stdout closes."""
    command = [sys.executable, "-m", "lumen.cli", "generate", "--model", str(folder), "--prompt", "a"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0
    assert errors == ""
