"""From text to tokens and back: published tokenizers through the `tokenizers` library, and bytes."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers


class Tokenizer(Protocol):
    """What every tokenizer here does.

    Attributes:
      vocabulary: how many tokens there are.
      bos: token that begins a text, or None.
      eos: token that ends a text, or None.
    """

    vocabulary: int
    bos: int | None
    eos: int | None

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The tokens of a text; with `bos` also what the model was trained to see around a whole text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, a token to begin (256), to end (257) and to pad (258)."""

    vocabulary: int = 259
    bos: int | None = 256
    eos: int | None = 257

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [256] * bos + list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        """The same tokenizer as {file name: contents}, to lie beside a model's weights for transformers to read."""
        # The library spells bytes that are no printable character with characters from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
        special = {"<bos>": 256, "<eos>": 257, "<pad>": 258}
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | special, []))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens(list(special))
        library.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 256)])
        config = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad")}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {
            "tokenizer.json": library.to_str().encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n",
        }


class FolderTokenizer:
    """The tokenizer.json of a published model; beginning and end as tokenizer_config.json or config.json name them."""

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"tokenizer: {path} does not exist; wanted 'bytes' or a folder with tokenizer.json."
            )
        try:
            self._library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer: {path} cannot be read: {error}; get the file again.") from error
        self.vocabulary = self._library.get_vocab_size()
        self.bos, self.eos = (self._special(folder, name) for name in ("bos", "eos"))

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return self._library.encode(text, add_special_tokens=bos).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._library.decode([int(token) for token in tokens])

    def _special(self, folder: Path, name: str) -> int | None:
        held = _json(folder / "tokenizer_config.json").get(f"{name}_token")
        text = held.get("content") if isinstance(held, dict) else held
        if isinstance(text, str) and (token := self._library.token_to_id(text)) is not None:
            return token
        token = _json(folder / "config.json").get(f"{name}_token_id")
        return token[0] if isinstance(token, list) else token


def load_tokenizer(name: str | os.PathLike) -> Tokenizer:
    """The tokenizer "bytes", or the one of a published folder.

    Raises:
      FileNotFoundError: if the folder holds no tokenizer.json.
      ValueError: if one of its files cannot be read.
    """
    return ByteTokenizer() if str(name) == "bytes" else FolderTokenizer(name)


def stop_tokens(folder: str | os.PathLike) -> tuple[int, ...]:
    """The tokens after which a published model has said all: `eos_token_id` of generation_config.json or config.json.

    Raises:
      ValueError: if the file that has them is no JSON, or they are no whole numbers.
    """
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        named = _json(path).get("eos_token_id")
        if named is not None:
            found = tuple(named) if isinstance(named, list) else (named,)
            if not all(isinstance(token, int) for token in found):
                raise ValueError(
                    f"tokenizer: {path}: eos_token_id is {named!r}; wanted a whole number or a list of them."
                )
            return found
    return ()


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, in pieces that are whole characters.

    What a token adds is what it changes of the decoded text; an unfinished character is held back. The pieces together
    are the text of all tokens.
    """
    held: list[int] = []
    seen = 0  # tokens at the front of `held` that have been shown: what follows may be spelt differently without them
    for token in tokens:
        held.append(int(token))
        shown, text = tokenizer.decode(held[:seen]), tokenizer.decode(held)
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            held = held[seen:]
            seen = len(held)
    if rest := tokenizer.decode(held)[len(tokenizer.decode(held[:seen])) :]:
        yield rest


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} is not JSON: {error}; get the file again.") from error
    return held if isinstance(held, dict) else {}
