"""Text files, and the text that is embedded: the source of Python's own standard library, there wherever lumen runs."""

import dataclasses
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from lumen.io import DataError

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
      DataError: naming the line that is not a JSON object with a "text".
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
                raise DataError(f'{path}, line {number}: wanted a JSON object with a "text": {error!r}.') from error
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


SYSTEM = "Answer as helpfully and truthfully as you can; say so where you do not know."


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A prompt as the model is shown it, and the answer it should learn."""

    prompt: str
    answer: str


def instructions(path: str | os.PathLike, *, system: str = SYSTEM) -> Iterator[Instruction]:
    """The records of a JSON file in the format of Alpaca and LongAlpaca, in Llama 2's template.

    The file holds a list of {"instruction", "output"} with an "input" or none. Without input the prompt is
    "[INST]{instruction}[/INST]", else a system prompt comes before it:
    "[INST] <<SYS>>{newline}{system}{newline}<</SYS>> {newline}{newline} {instruction} {newline}{input} [/INST]". The
    token that begins a text belongs before it, the one that ends it after the answer.

    Args:
      path: the file.
      system: the system prompt. Deviation: the original's is Llama 2's own, which can be given here.

    Raises:
      FileNotFoundError: if the file is not there.
      DataError: if it is no JSON list, or naming the record without an instruction and an output.
    Source: dvlab-research/LongLoRA supervised-fine-tune.py.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; wanted a JSON list of instructions, such as LongAlpaca-12k.json."
        )
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; wanted a list of objects.") from error
    if not isinstance(records, list):
        raise DataError(f"{path} holds a {type(records).__name__}; wanted a JSON list of objects.")
    for number, record in enumerate(records):
        held = record if isinstance(record, dict) else {}
        instruction, answer, given = (held.get(key) for key in ("instruction", "output", "input"))
        if not isinstance(instruction, str) or not isinstance(answer, str) or not isinstance(given, str | None):
            raise DataError(f'{path}, record {number}: wanted texts "instruction" and "output", perhaps "input".')
        if given:
            prompt = f"[INST] <<SYS>>\n{system}\n<</SYS>> \n\n {instruction} \n{given} [/INST]"
        else:
            prompt = f"[INST]{instruction}[/INST]"
        yield Instruction(prompt, answer)
