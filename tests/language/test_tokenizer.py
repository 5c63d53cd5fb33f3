"""Tokenizers: bytes against Python's codec, published files against the library, and text that comes in pieces."""

import json

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from lumen.language.tokenizer import ByteTokenizer, load_tokenizer, stop_tokens, stream_text

TEXT = "Grüße, 世界 👩‍🚀!\n\tdone  "


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders: our bytes as files, and a sentencepiece-like tokenizer that falls back to bytes, as Llama 2's."""
    written = tmp_path_factory.mktemp("bytes")
    for name, contents in ByteTokenizer().files().items():
        (written / name).write_bytes(contents)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s"]
    model = tokenizers.models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "</s>"])
    metaspace = tmp_path_factory.mktemp("metaspace")
    library.save(str(metaspace / "tokenizer.json"))
    (metaspace / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    (metaspace / "config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    return written, metaspace


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("é", bos=True) == [256, 0xC3, 0xA9]
    assert tokenizer.decode([256, *TEXT.encode(), 257, 258]) == TEXT
    assert tokenizer.decode([0xC3, 0x28]) == "\ufffd("


def test_bytes_as_files_are_the_same_tokenizer(folders):
    ours, read = load_tokenizer("bytes"), load_tokenizer(folders[0])
    assert (read.vocabulary, read.bos, read.eos) == (259, 256, 257)
    everything = bytes(range(256)).decode("latin-1") + TEXT
    for bos in (False, True):
        assert read.encode(everything, bos=bos) == ours.encode(everything, bos=bos)
    assert read.decode([256, *range(256), 257]) == ours.decode([256, *range(256), 257])


def test_special_tokens_of_a_folder(folders):
    tokenizer = load_tokenizer(folders[1])
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocabulary) == (1, 2, 263)
    assert stop_tokens(folders[1]) == (2, 5)
    (folders[1] / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert stop_tokens(folders[1]) == (7,)
    assert stop_tokens(folders[0]) == ()


@pytest.mark.parametrize("which", [0, 1])
def test_streamed_pieces_are_whole_characters(folders, which):
    tokenizer = load_tokenizer(folders[which])
    tokens = tokenizer.encode("the cats 世 the")
    pieces = list(stream_text(tokenizer, tokens))
    assert "".join(pieces) == tokenizer.decode(tokens) == "the cats 世 the"
    assert len(pieces) == len(tokens) - 2  # three bytes in one piece
    assert not any("\ufffd" in piece for piece in pieces)


@hypothesis.given(st.lists(st.integers(0, 258)))
@hypothesis.example([0xC3])
@hypothesis.example([0x61, 0xF0, 0x9F, 257, 0x61, 0xC3, 0xA9, 0xFF, 0xFF])
def test_any_stream_of_bytes_is_its_text(tokens):
    tokenizer = ByteTokenizer()
    assert "".join(stream_text(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_streaming_shows_at_once_what_is_whole():
    seen = []

    def source():
        for token in b"a\xc3\xa9b":
            yield token
            seen.append("|")

    for piece in stream_text(ByteTokenizer(), source()):
        seen.append(piece)
    assert "".join(seen) == "a||é|b|"


def test_broken_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist; wanted 'bytes' or a folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read: .*; get the file again"):
        load_tokenizer(tmp_path)
    for name, contents in ByteTokenizer().files().items():
        (tmp_path / name).write_bytes(contents)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id is '</s>'; wanted a whole number"):
        stop_tokens(tmp_path)
