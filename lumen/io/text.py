"""Text files, and the text that is embedded: the source of Python's own standard library, there wherever lumen runs."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]

# Tests of the library repeat each other and are long; third-party packages differ from machine to machine.
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")


def python_sources(split: Split) -> Iterator[str]:
    """The .py files of Python's standard library, in the order of their paths: about 10 MB.

    A file's split depends on its path alone: of 20 files about 18 go to training, one to validation, one to test.
    """
    root = Path(sysconfig.get_path("stdlib"))
    part = {0: "validation", 1: "test"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not set(relative.parts).isdisjoint(_LEFT_OUT):
            continue
        bucket = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 20
        if part.get(bucket, "train") == split:
            yield path.read_text(encoding="utf-8", errors="replace")


EMBEDDED = "python_sources"


def documents(source: str | os.PathLike) -> Iterator[str]:
    """The texts of a file: the "text" of every line of a .jsonl, else the whole file as one.

    "python_sources/train", "/validation" and "/test" are the embedded corpus.

    Raises:
      FileNotFoundError: if the file is not there.
      ValueError: naming the line that is not a JSON object with a "text".
    """
    path = Path(source)
    if not path.is_file():
        for split in get_args(Split):
            if path == Path(EMBEDDED, split):
                yield from python_sources(split)
                return
        raise FileNotFoundError(
            f"{path}: no such text; wanted a .jsonl with a 'text' per line, any other text file, or {EMBEDDED}/train, "
            f"{EMBEDDED}/validation or {EMBEDDED}/test."
        )
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: wanted a JSON object with a "text": {error!r}.') from error
            yield text


def passages(source: str | os.PathLike) -> Iterator[str]:
    """Short texts: those of a .jsonl as they are; of other sources the paragraphs, parted by empty lines.

    A text without an empty line is taken line by line.
    """
    for text in documents(source):
        if Path(source).suffix == ".jsonl":
            yield text
            continue
        paragraphs = text.strip().split("\n\n")
        yield from paragraphs if len(paragraphs) > 1 else text.strip().split("\n")
