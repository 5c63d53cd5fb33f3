"""Needle in a haystack and passkey retrieval: does a model find one sentence in a long text, wherever it stands?

    answer = greedy(model, stop=stop_tokens(path), prefill_chunk=32_000)
    results = needle(answer, tokenizer, documents("python_sources/test"), lengths=spaced(1000, 32_000, 13), out="found")
    Image.fromarray(heat_map(results)).save("found/needle.png")

Both take the model as a function from prompt to answer, so it may be any: dense, quantised, with streaming heads.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from lumen.language.decoder import Decoder
from lumen.language.generate import generate
from lumen.language.tokenizer import Tokenizer

Answer = Callable[[Sequence[int], int], Sequence[int]]  # (prompt, new tokens at most) -> new tokens


@dataclasses.dataclass(frozen=True)
class Needle:
    """What is hidden and asked for.

    Attributes:
      sentence: what is put into the text.
      question: what stands behind the text; the model goes on from its end.
      answer: what a right reply says.
      opening, closing: what stands before and behind the text; the place for a chat model's own markers.
    """

    sentence: str = (
        "The best thing to do in Lisbon is to ride the yellow tram uphill and eat a warm custard tart there."
    )
    question: str = "What is the best thing to do in Lisbon?\nThe best thing to do in Lisbon is"
    answer: str = "to ride the yellow tram uphill and eat a warm custard tart there."
    opening: str = "Here is a long text. Read it with care; a question about it follows.\n\n"
    closing: str = "\n\nThis is the end of the text. "


def spaced(first: float, last: float, count: int) -> list[int]:
    """`count` whole numbers at even distances from `first` to `last`; fewer where they would repeat."""
    if count < 1 or last < first:
        raise ValueError(f"needle: {count} numbers from {first} to {last}; wanted 1 or more, and last >= first.")
    return list(dict.fromkeys(round(value) for value in np.linspace(first, last, count)))


def greedy(model: Decoder, *, stop: Sequence[int] = (), prefill_chunk: int = 0, cache_dtype=None) -> Answer:
    """The model's most likely answers. Arguments as those of `lumen.language.generate.generate`.

    A prompt that is shorter than a chunk is read at once, unpadded.
    """

    def answer(prompt: Sequence[int], count: int) -> list[int]:
        chunk = prefill_chunk if len(prompt) > prefill_chunk else 0
        tokens, lengths = generate(
            model, [prompt], max_new_tokens=count, stop=stop, prefill_chunk=chunk, cache_dtype=cache_dtype
        )
        return tokens[0, : lengths[0]].tolist()

    return answer


@dataclasses.dataclass(frozen=True)
class _Case:
    """One prompt and what has to come of it.

    Attributes:
      place: where the answer stands: "length", "depth" in percent and what else results.json is to say.
      prompt: tokens.
      answer: text of the right reply.
      exact: its tokens, all of which the reply has to begin with; None where ROUGE-1 tells how right a reply is.
      asked: the most tokens that a reply has.
    """

    place: dict[str, Any]
    prompt: list[int]
    answer: str
    exact: list[int] | None
    asked: int


def needle(
    answer: Answer,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    hidden: Needle = Needle(),
    lengths: Sequence[int],
    depths: Sequence[float] = tuple(spaced(0, 100, 10)),
    score: Literal["rouge", "exact"] = "rouge",
    max_new_tokens: int = 50,
    out: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Hides a sentence in texts of several lengths, at several depths, and asks for it.

    A prompt has exactly `length` tokens: beginning of text, an opening, the haystack with the needle in it, a closing
    and the question. The haystack are the texts from their start, over again where they are too short. The needle
    stands at depth/100 of the haystack, or before that: behind the last token that ends with a full stop or a line
    break, if there is one. At depth 100 it stands at the very end.

    Args:
      answer: the model, such as `greedy` makes it.
      tokenizer: the model's own.
      texts: the haystack.
      hidden: needle, question and answer.
      lengths: tokens of the prompts.
      depths: in percent.
      score: "rouge": 10 `rouge_1` of the reply and the answer. "exact": 10 if the reply begins with all tokens of the
        answer, else 0; no more tokens are then asked for.
      max_new_tokens: the most that a reply has.
      out: a folder for what has been found so far, cells.jsonl, so that the same call goes on after an interruption. A
        cell is taken from there if prompt, answer, score and settings are the same. At the end results.json lies there.
      settings: whatever tells this model from others that use the same folder; stored with the results.
      progress: show a bar on a terminal.

    Returns:
      "lengths" and "depths"; "scores", a row for each depth, a column for each length, from 0 to 10; "by_length", the
      mean of each column; "mean"; "settings"; "cells": for each length, depth, score, tokens of the prompt and reply.
    Raises:
      ValueError: if a length has no room for the needle and the question, or the text is empty.
    Source: gkamradt/LLMTest_NeedleInAHaystack and eval/needle of mit-han-lab/duo-attention. Deviations: sentences of
    our own; the prompt's length is exact, theirs keeps 200 tokens in reserve; ROUGE-1 without stemming.
    """
    if score not in ("rouge", "exact"):
        raise ValueError(f"needle: score={score!r}; wanted 'rouge' or 'exact'.")
    before, after = tokenizer.encode(hidden.opening, bos=True), tokenizer.encode(hidden.closing + hidden.question)
    inside = tokenizer.encode(" " + hidden.sentence + "\n")
    fixed = len(before) + len(inside) + len(after)
    if min(lengths) <= fixed:
        raise ValueError(
            f"needle: a length of {min(lengths)} tokens has no room for a text: needle, question and the words around "
            f"them have {fixed}; take longer ones."
        )
    hay = _haystack(texts, tokenizer, max(lengths) - fixed)
    ends = {token for token in set(hay) if tokenizer.decode([token]).rstrip(" ").endswith((".", "\n"))}
    stops = np.flatnonzero([token in ends for token in hay]) + 1
    wanted = _continuation(tokenizer, hidden.question, " " + hidden.answer) if score == "exact" else None

    def case(length: int, depth: float) -> _Case:
        text = hay[: length - fixed]
        at = int(len(text) * depth / 100)
        earlier = stops[stops <= at]
        if at < len(text) and earlier.size:
            at = int(earlier[-1])
        prompt = [*before, *text[:at], *inside, *text[at:], *after]
        asked = max_new_tokens if wanted is None else len(wanted)
        return _Case({"length": length, "depth": depth}, prompt, hidden.answer, wanted, asked)

    cases = [functools.partial(case, *place) for place in itertools.product(lengths, depths)]
    cells = _ask(answer, tokenizer, cases, out=out, settings=settings, progress=progress)
    return _table(cells, lengths, depths, out, settings)


_TASK = (
    "One fact of importance hides somewhere in a lot of idle text. Find it and keep it in mind. I will ask you about "
    "it afterwards.\n"
)
_IDLE = "The grass is wet. The sky is wide. The sun is warm. On we go. Round and round once more. "
_FACT = "\nThe pass key is {key}. Keep it in mind. {key} is the pass key.\n"
_ASK = "\nWhat is the pass key? The pass key is"


def passkey(
    answer: Answer,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    trials: int = 10,
    measure: Literal["characters", "tokens"] = "characters",
    out: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Hides a number in idle text and asks for it, in the format of landmark attention.

    A prompt is five parts on lines of their own: the task, idle sentences, the number said twice, more idle sentences,
    and a question that ends in "The pass key is". The number, from 1 to 50000, and its place are drawn anew for each
    length and seed 0, 1, ... A reply is right if it begins with all tokens of the number.

    Args:
      answer: the model, such as `greedy` makes it; it is asked for as many tokens as the number has.
      tokenizer: the model's own.
      lengths: nominal tokens of the prompts.
      trials: seeds for each length.
      measure: "characters": the idle text has floor(3.75 length / 1024) 1024 characters, as in the original; what that
        is in tokens is said in each cell. "tokens": the prompt has exactly `length` tokens.
      out, settings, progress: as for `needle`.

    Returns:
      As `needle`, scores being 10 or 0. "depths" are the middles of ten bands, "scores" the means of what stood in
      them, None where nothing did; cells have their "seed".
    Raises:
      ValueError: if a length has no room for idle text.
    Source: Landmark Attention, arXiv:2305.16300, as in passkey_retrivial.py of JIA-Lab-research/LongLoRA. Deviations:
    sentences and random numbers of our own.
    """
    if measure not in ("characters", "tokens"):
        raise ValueError(f"passkey: measure={measure!r}; wanted 'characters' or 'tokens'.")
    task, idle, ask = tokenizer.encode(_TASK, bos=True), tokenizer.encode(_IDLE), tokenizer.encode(_ASK)
    idle = idle * (max(lengths) // len(idle) + 1)

    def case(length: int, seed: int) -> _Case:
        random = np.random.default_rng([seed, length])
        key = str(random.integers(1, 50_000, endpoint=True))
        fact = tokenizer.encode(_FACT.format(key=key))
        by_tokens = measure == "tokens"
        room = length - len(task) - len(fact) - len(ask) if by_tokens else int(3.75 * length) // 1024 * 1024
        if room < 1:
            fix = "" if by_tokens else ", or measure them in tokens"
            raise ValueError(f"passkey: a length of {length} has no room for idle text; take longer ones{fix}.")
        start = int(random.integers(0, room, endpoint=True))
        if by_tokens:
            prompt = [*task, *idle[:start], *fact, *idle[: room - start], *ask]
        else:
            text = _IDLE * (room // len(_IDLE) + 1)
            text = _TASK + text[:start] + _FACT.format(key=key) + text[: room - start] + _ASK
            prompt = tokenizer.encode(text, bos=True)
        wanted = _continuation(tokenizer, _ASK, " " + key)
        place = {"length": length, "depth": 100 * start / room, "seed": seed}
        return _Case(place, prompt, key, wanted, len(wanted))

    cases = [functools.partial(case, *place) for place in itertools.product(lengths, range(trials))]
    cells = _ask(answer, tokenizer, cases, out=out, settings=settings, progress=progress)
    return _table(cells, lengths, range(5, 100, 10), out, settings)


def _haystack(texts: Iterable[str], tokenizer: Tokenizer, count: int) -> list[int]:
    """The first `count` tokens of texts, over again where they are too short."""
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer.encode(text + "\n")
        if len(tokens) >= count:
            break
    if not tokens:
        raise ValueError("needle: the text is empty; wanted some to hide the needle in.")
    return (tokens * -(-count // len(tokens)))[:count]


def _continuation(tokenizer: Tokenizer, text: str, more: str) -> list[int]:
    """The tokens by which `text` goes on."""
    start, whole = tokenizer.encode(text), tokenizer.encode(text + more)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False))
    return whole[sum(1 for _ in shared) :]


def rouge_1(reply: str, answer: str) -> float:
    """F measure of ROUGE-1: with n words in common, each as often as both have it, 2 n / (words + words).

    Words are runs of letters and digits in lower case, not stemmed. 0 if neither text has any.
    """
    mine, theirs = (Counter(re.findall(r"[^\W_]+", text.lower())) for text in (reply, answer))
    total = mine.total() + theirs.total()
    return 2 * (mine & theirs).total() / total if total else 0.0


def _ask(
    answer: Answer, tokenizer: Tokenizer, cases: Sequence[Callable[[], _Case]], *, out, settings, progress: bool
) -> list[dict[str, Any]]:
    """Asks for all cases but those that are found in out/cells.jsonl, and adds each there as soon as it is done."""
    path = None if out is None else Path(out) / "cells.jsonl"
    finished = {}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        finished = _finished(path)
    cells = []
    for make in tqdm(cases, "needle", leave=False, disable=None if progress else True):
        case = make()
        described = json.dumps([case.answer, case.exact, case.asked, settings], sort_keys=True).encode()
        key = hashlib.sha256(np.asarray(case.prompt, np.int32).tobytes() + described).hexdigest()[:16]
        if key not in finished:
            tokens = [int(token) for token in answer(case.prompt, case.asked)]
            reply = tokenizer.decode(tokens).strip()
            share = rouge_1(reply, case.answer) if case.exact is None else float(tokens == case.exact)
            finished[key] = {**case.place, "score": 10 * share, "tokens": len(case.prompt), "reply": reply}
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finished[key] | {"key": key}) + "\n")
        cells.append(finished[key] | case.place)
    return cells


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """The cells of a file by their keys; what is left of a line that was cut off is removed."""
    if not path.is_file():
        return {}
    whole = path.read_text(encoding="utf-8")
    whole = whole[: whole.rfind("\n") + 1]
    path.write_text(whole, encoding="utf-8")
    cells = [json.loads(line) for line in whole.splitlines()]
    return {cell.pop("key"): cell for cell in cells}


def _table(cells, lengths: Sequence[int], depths: Sequence[float], out, settings) -> dict[str, Any]:
    """What `needle` returns; each cell counts for its length and the nearest depth."""
    found = {place: [] for place in itertools.product(depths, lengths)}
    for cell in cells:
        nearest = min(depths, key=lambda depth: abs(depth - cell["depth"]))
        found[nearest, cell["length"]].append(cell["score"])

    def mean(scores):
        return float(np.mean(scores)) if scores else None

    results = {
        "lengths": list(lengths),
        "depths": list(depths),
        "scores": [[mean(found[depth, length]) for length in lengths] for depth in depths],
        "by_length": [mean([cell["score"] for cell in cells if cell["length"] == length]) for length in lengths],
        "mean": mean([cell["score"] for cell in cells]),
        "settings": dict(settings or {}),
        "cells": cells,
    }
    if out is not None:
        (Path(out) / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def heat_map(results: Mapping[str, Any], title: str = "") -> np.ndarray:
    """The picture of these tests: context length across, depth down, green where found. Needs the `examples` extra.

    Returns:
      [height, width, 3] uint8.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
    from PIL import Image

    lengths, depths = results["lengths"], results["depths"]
    scores = np.array([[np.nan if score is None else score for score in row] for row in results["scores"]], float)
    colours = LinearSegmentedColormap.from_list("found", ["#d7473f", "#f2c14e", "#2ca25f"])
    size = 2.4 + 0.5 * len(lengths), 1.6 + 0.32 * len(depths)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    grid = axis.pcolormesh(scores, cmap=colours, vmin=0, vmax=10, edgecolors="white", linewidth=1)
    axis.invert_yaxis()
    axis.set_xticks(np.arange(len(lengths)) + 0.5, [_short(length) for length in lengths], rotation=45, fontsize=8)
    axis.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:g} %" for depth in depths], fontsize=8)
    axis.set_xlabel("context (tokens)", fontsize=9)
    axis.set_ylabel("depth of the needle", fontsize=9)
    axis.set_title(title or f"mean score {results['mean']:.2f} of 10", fontsize=9)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(grid, ax=axis)
    bar.set_label("score", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="white")
    plt.close(figure)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _short(count: int) -> str:
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.3g}K" if count >= 1e3 else str(count)
