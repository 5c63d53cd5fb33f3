"""The lumen command: what it prints, and one line for what the user can mend."""

import io
import os
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

from lumen import cli
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
