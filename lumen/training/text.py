"""Text as input data: the stream of its tokens, and random windows of it for training."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lumen.io.text import Split, documents, python_sources
from lumen.language.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from lumen.training.config import ConfigError
from lumen.training.data import Record, make_batches

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def token_stream(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one stream of tokens, int32, an end token after each where the tokenizer has one."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    parts = [np.asarray([*tokenizer.encode(text), *end], np.int32) for text in texts]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


class _Windows:
    """Record i: 2T consecutive tokens from i T on, of which `_random_window` keeps T + 1."""

    def __init__(self, stream: np.ndarray, length: int):
        self._stream, self._length = stream, length

    def __len__(self) -> int:
        return len(self._stream) // self._length - 1

    def __getitem__(self, index: int) -> Record:
        start = int(index) * self._length
        return {"tokens": self._stream[start : start + 2 * self._length]}


def _random_window(record: Record, rng: np.random.Generator) -> Record:
    length = len(record["tokens"]) // 2
    start = rng.integers(length)
    return {"tokens": record["tokens"][start : start + length + 1]}


@dataclasses.dataclass(frozen=True)
class TextData:
    """Which text, and how it becomes tokens.

    Attributes:
      name: "python_sources", the embedded corpus; or "files": path/train.jsonl, path/validation.jsonl and
        path/test.jsonl (or .txt), see `documents`.
      path: of the folder.
      tokenizer: "bytes", or a folder with a tokenizer.json.
    """

    name: Literal["python_sources", "files"] = "python_sources"
    path: str = ""
    tokenizer: str = "bytes"

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return load_tokenizer(self.tokenizer)

    def tokenizer_files(self) -> dict[str, bytes]:
        """What of the tokenizer lies beside a model's weights: {file name: contents}."""
        if self.tokenizer == "bytes":
            return ByteTokenizer().files()
        files = [path for path in sorted(Path(self.tokenizer).iterdir()) if path.name in _TOKENIZER_FILES]
        return {path.name: path.read_bytes() for path in files}

    def texts(self, split: Split) -> Iterator[str]:
        """The documents of a split."""
        if self.name == "python_sources":
            return python_sources(split)
        if not self.path:
            raise ConfigError("data.path: missing; name='files' wants the folder of train, validation and test files.")
        found = [path for suffix in ("jsonl", "txt") if (path := Path(self.path) / f"{split}.{suffix}").is_file()]
        if not found:
            raise ConfigError(f"data.path={self.path}: holds neither {split}.jsonl nor {split}.txt.")
        return documents(found[0])

    def tokens(self, split: Split) -> np.ndarray:
        """The stream of a split."""
        return token_stream(self.texts(split), self.load_tokenizer())

    def batches(self, *, length: int, batch_size: int, seed: int):
        """Endless training batches {"tokens": int32 [B, length + 1]}: windows that begin anywhere in the stream."""
        windows = _Windows(self.tokens("train"), length)
        if len(windows) < batch_size:
            raise ConfigError(
                f"data: {len(windows)} windows of {length} tokens are fewer than batch_size={batch_size}; use shorter "
                "windows, a smaller batch or more text."
            )
        return make_batches(windows, batch_size=batch_size, seed=seed, transforms=[_random_window])
