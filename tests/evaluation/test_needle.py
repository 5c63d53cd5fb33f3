"""Needle and passkey tests against readers whose answers are known."""

import json
import re

import numpy as np
import pytest
from flax import nnx

from lumen.evaluation.needle import _TASK, Needle, greedy, heat_map, needle, passkey, rouge_1, spaced
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.generate import generate
from lumen.language.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
HIDDEN = Needle("The word is quartz.", "Which word?\nThe word is", "quartz.")
TEXTS = ["One line of text.\n" * 20, "And another, of other words.\n" * 20]


class Reader:
    """Finds what it is asked for among the last `window` tokens of a prompt, and keeps the prompts."""

    def __init__(self, pattern, window=10**9):
        self.pattern, self.window, self.prompts, self.asked = pattern, window, [], []

    def __call__(self, prompt, count):
        self.prompts.append(list(prompt))
        self.asked.append(count)
        question = BYTES.decode(prompt).rindex("\n")
        found = re.findall(self.pattern, BYTES.decode(prompt)[max(0, len(prompt) - 1 - self.window) : question])
        return BYTES.encode(f" {found[0]}" if found else " I do not know")[:count]


def find_word(**options):
    return Reader(r"The word is (\w+\.)", **options)


def test_rouge():
    """By hand: 2 x words in common / words of both."""
    assert rouge_1("Eat a tart, a warm tart!", "eat a warm tart") == pytest.approx(2 * 4 / (6 + 4))
    assert rouge_1("eat eat eat", "eat it") == pytest.approx(2 * 1 / (3 + 2))
    assert rouge_1("l'été 3.5", "été 5") == pytest.approx(2 * 2 / (4 + 2))
    assert rouge_1("nothing alike", "other words") == 0
    assert rouge_1("", "word") == rouge_1("...", "") == 0


def test_spaced():
    assert spaced(1000, 32_000, 13)[:3] == [1000, 3583, 6167]
    assert spaced(0, 100, 10) == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert spaced(5, 6, 10) == [5, 6]
    with pytest.raises(ValueError, match=r"3 numbers from 9 to 8; wanted 1 or more, and last >= first"):
        spaced(9, 8, 3)


def test_a_prompt_is_whole_and_has_its_length():
    reader = find_word()
    results = needle(reader, BYTES, TEXTS, hidden=HIDDEN, lengths=[400, 900], depths=[0, 35, 100], progress=False)
    assert [len(prompt) for prompt in reader.prompts] == [400] * 3 + [900] * 3
    hay = "\n".join([*TEXTS, ""]) * 2
    for prompt, depth in zip(reader.prompts, [0, 35, 100] * 2, strict=True):
        assert prompt[0] == BYTES.bos
        assert BYTES.bos not in prompt[1:]
        start, found, end = BYTES.decode(prompt).partition(" The word is quartz.\n")
        start = start.removeprefix(HIDDEN.opening)
        end, asked, nothing = end.partition(HIDDEN.closing + HIDDEN.question)
        assert found
        assert asked
        assert nothing == ""
        assert hay.startswith(start + end)
        room = len(start + end)
        if depth == 35:  # behind a sentence, at most a line of 30 characters before its depth
            assert start.endswith((".", ".\n"))
            assert 0.35 * room - 30 < len(start) <= 0.35 * room
        else:
            assert len(start) == {0: 0, 100: room}[depth]
    assert results["scores"] == [[10, 10]] * 3
    assert results["mean"] == 10
    assert reader.asked == [50] * 6


def test_what_a_window_sees_is_found():
    """A reader of the last 300 bytes finds what lies there: by length and depth, whole or not at all."""
    lengths, depths = [350, 500, 1000], spaced(0, 100, 10)
    reader = find_word(window=300)
    results = needle(reader, BYTES, TEXTS, hidden=HIDDEN, lengths=lengths, depths=depths, score="exact", progress=False)
    seen = [BYTES.decode(prompt).rindex(HIDDEN.sentence) >= len(prompt) - 1 - 300 for prompt in reader.prompts]
    assert results["scores"] == (10.0 * np.reshape(seen, (3, 10)).T).tolist()
    assert results["by_length"] == pytest.approx((10.0 * np.reshape(seen, (3, 10))).mean(axis=1))
    assert 0 < sum(seen) < 30
    assert set(reader.asked) == {len(" quartz.")}
    # The reply " I do no" of the others has no word of the answer, but exact match is a matter of tokens anyway.
    nearly = needle(
        lambda prompt, count: BYTES.encode(" quartZ."),
        BYTES,
        TEXTS,
        hidden=HIDDEN,
        lengths=[400],
        score="exact",
        progress=False,
    )
    assert nearly["mean"] == 0
    assert (
        needle(
            lambda prompt, count: BYTES.encode(" quartZ."), BYTES, TEXTS, hidden=HIDDEN, lengths=[400], progress=False
        )["mean"]
        == 10
    )


@pytest.mark.parametrize("measure", ["characters", "tokens"])
def test_passkeys(measure, tmp_path):
    reader = Reader(r"The pass key is (\d+)\.")
    results = passkey(reader, BYTES, lengths=[600, 1200], trials=6, measure=measure, out=tmp_path, progress=False)
    assert results["by_length"] == [10, 10]
    keys = [re.findall(r"\d+", BYTES.decode(prompt)) for prompt in reader.prompts]
    assert all(len(found) == 2 and found[0] == found[1] and 1 <= int(found[0]) <= 50_000 for found in keys)
    assert len({found[0] for found in keys}) == 12
    assert reader.asked == [len(found[0]) + 1 for found in keys]
    for prompt, cell in zip(reader.prompts, results["cells"], strict=True):
        task, before, fact, after, question = BYTES.decode(prompt).split("\n")
        assert task + "\n" == _TASK
        assert fact.startswith("The pass key is ")
        assert question.endswith("The pass key is")
        idle = len(before) + len(after)
        assert cell["depth"] == 100 * len(before) / idle
        if measure == "tokens":
            assert len(prompt) == cell["tokens"] == cell["length"]
        else:
            assert idle == {600: 2048, 1200: 4096}[cell["length"]]  # floor(3.75 length / 1024) 1024
    # A wrong last digit is wrong, and the draws are the same each time.
    wrong = passkey(
        lambda prompt, count: [*reader(prompt, count)[:-1], 32],
        BYTES,
        lengths=[600, 1200],
        trials=6,
        measure=measure,
        progress=False,
    )
    assert wrong["mean"] == 0
    assert reader.prompts[:12] == reader.prompts[12:]
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_it_goes_on_where_it_stopped(tmp_path):
    def run(reader, **changes):
        options = {"hidden": HIDDEN, "lengths": [400, 500], "depths": [0, 50], "out": tmp_path, "progress": False}
        return needle(reader, BYTES, TEXTS, **(options | changes))

    class Interrupted(find_word().__class__):
        def __call__(self, prompt, count):
            if len(self.prompts) == 2:
                raise KeyboardInterrupt
            return super().__call__(prompt, count)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(r"The word is (\w+\.)"))
    file = tmp_path / "cells.jsonl"
    assert file.read_text().count("\n") == 2
    file.write_text(file.read_text() + '{"length": 500, "de')  # cut off while it was written
    second = find_word()
    results = run(second)
    assert len(second.prompts) == 2
    assert results == run(find_word()) == json.loads((tmp_path / "results.json").read_text())
    assert [(cell["length"], cell["depth"]) for cell in results["cells"]] == [(400, 0), (400, 50), (500, 0), (500, 50)]
    # Whatever changes an answer is asked anew.
    for changes in (
        {"settings": {"model": "other"}},
        {"score": "exact"},
        {"hidden": Needle("The word is tin.", "Which?\nIt is", "tin.")},
        {"max_new_tokens": 9},
    ):
        again = find_word()
        run(again, **changes)
        assert len(again.prompts) == 4


def test_depths_that_meet_keep_their_own_place(tmp_path):
    """In a text without a sentence's end before the middle both depths give one prompt, and still two cells."""
    results = needle(
        find_word(),
        BYTES,
        ["A first line.\n" + "x" * 900],
        hidden=HIDDEN,
        lengths=[500],
        depths=[30, 60],
        out=tmp_path,
        progress=False,
    )
    assert results["scores"] == [[10], [10]]
    assert (tmp_path / "cells.jsonl").read_text().count("\n") == 1


def test_the_model_answers():
    """`greedy` gives what `generate` gives, up to the stop token, whether or not the prompt is read in chunks."""
    model = Decoder(DecoderConfig.debug(vocabulary=259, depth=1), rngs=nnx.Rngs(0))
    prompt = BYTES.encode("a prompt of some length")
    want = generate(model, [prompt], max_new_tokens=6)[0][0].tolist()
    assert greedy(model)(prompt, 6) == want
    assert greedy(model, prefill_chunk=8, stop=want[3:4])(prompt, 6) == want[: want.index(want[3]) + 1]
    results = needle(
        greedy(model), BYTES, TEXTS, hidden=HIDDEN, lengths=[200], depths=[50], max_new_tokens=6, progress=False
    )
    assert results["cells"][0]["tokens"] == 200
    assert results["mean"] == 0  # random weights


def test_mistakes():
    def ask(**changes):
        options = {"hidden": HIDDEN, "lengths": [400], "progress": False}
        needle(find_word(), BYTES, changes.pop("texts", TEXTS), **(options | changes))

    with pytest.raises(ValueError, match=r"a length of 100 tokens has no room .* have 1\d\d; take longer ones"):
        ask(lengths=[100, 400])
    with pytest.raises(ValueError, match="the text is empty"):
        ask(texts=[])
    with pytest.raises(ValueError, match="score='bleu'; wanted 'rouge' or 'exact'"):
        ask(score="bleu")
    with pytest.raises(ValueError, match="length of 273 has no room for idle text; take longer ones, or measure"):
        passkey(find_word(), BYTES, lengths=[273], progress=False)  # floor(3.75 x 273 / 1024) = 0


def test_heat_map():
    """Green where found, red where not, white where nothing stood; the worst length on the right."""
    scores = [[10.0, 10.0, 0.0], [10.0, None, 0.0]]
    picture = heat_map({"lengths": [500, 1000, 2000], "depths": [0, 100], "scores": scores, "mean": 6.0})
    assert picture.dtype == np.uint8
    found, missed = (np.all(picture == colour, axis=-1) for colour in ([0x2C, 0xA2, 0x5F], [0xD7, 0x47, 0x3F]))
    assert found.any()
    assert missed.any()
    left, right = (np.median(np.nonzero(where)[1]) for where in (found, missed))
    assert left < right
    # Three cells of one size against two; the ends of the bar of colours add a line or two.
    assert found.sum() / missed.sum() == pytest.approx(3 / 2, rel=0.05)
