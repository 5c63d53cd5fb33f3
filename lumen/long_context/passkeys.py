"""Texts with several passkeys hidden in them, and the questions that ask for them: what DuoAttention's gates train on.

The construction is that of the paper; the wording is ours, and does not matter much.

Source: DuoAttention, arXiv:2410.10819, section 2.2; mit-han-lab/duo-attention, duo_attn/data.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

# fmt: off
WORDS = [
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray",
    "yankee", "zulu",
]
ORDINALS = [
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
]
# fmt: on
OPENING = "This is a very long story book. <book>\n"
NEEDLE = "\n\nRemember the {ordinal} passkey to the vault:"
CLOSING = "\n</book>\n\n"
QUESTION = "In the book, what is the {ordinal} passkey to the vault?\nPasskey:"
SEPARATOR = "\n\n"


@dataclasses.dataclass(frozen=True)
class PasskeyConfig:
    """A distribution of samples.

    Attributes:
      passkeys: hidden in each sample, at most 20.
      words: of each passkey, drawn from the 26 of the NATO alphabet.
      shortest, longest: tokens of text around the passkeys; lengths are evenly spaced between them, both included. The
        longest sample has `longest` tokens in all: its text is cut so that everything fits.
      lengths: how many lengths.
      depths: how many evenly spaced places passkeys may have, from `first_depth` to `last_depth` of the text.
      first_depth, last_depth: shares of the text.
      text: which part of the text surrounds the passkeys: "beginning", always the same as published, or "anywhere".
      labels: which tokens are labelled: "questions" and their answers, as the released code has it, or "passkeys", the
        words of the answers only, as the paper says.
    """

    passkeys: int = 10
    words: int = 32
    shortest: int = 1000
    longest: int = 32_000
    lengths: int = 50
    depths: int = 1000
    first_depth: float = 0.05
    last_depth: float = 0.95
    text: Literal["beginning", "anywhere"] = "beginning"
    labels: Literal["questions", "passkeys"] = "questions"

    def __post_init__(self):
        if not 1 <= self.passkeys <= min(len(ORDINALS), self.depths):
            raise ValueError(f"passkeys={self.passkeys}; wanted 1 to {min(len(ORDINALS), self.depths)}.")
        if self.words < 1 or self.lengths < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError(f"{self}: wanted words, lengths >= 1 and 1 <= shortest <= longest.")
        if not 0 <= self.first_depth <= self.last_depth <= 1:
            raise ValueError(f"{self}: wanted 0 <= first_depth <= last_depth <= 1.")

    def text_lengths(self) -> np.ndarray:
        """Tokens of text of each of the `lengths` kinds of sample."""
        return np.linspace(self.shortest, self.longest, self.lengths).astype(int)


@dataclasses.dataclass(frozen=True)
class PasskeySample:
    """One sample.

    Attributes:
      tokens: [n] int32.
      questions: [n] bool, the questions and answers.
      passkeys: [n] bool, the words of the answers.
    """

    tokens: np.ndarray
    questions: np.ndarray
    passkeys: np.ndarray


def passkey_sample(
    config: PasskeyConfig,
    text: np.ndarray,
    encode: Callable[[str], list[int]],
    rng: np.random.Generator,
    *,
    length: int,
    start: tuple[int, ...] = (),
) -> PasskeySample:
    """Hides passkeys in a text and asks for all of them, in order.

    beginning, opening, text with passkeys in the order of their numbers, closing, then for each passkey question,
    words, empty line.

    Args:
      config: the distribution.
      text: [n] int32 tokens that the story is cut from; repeated if it is too short.
      encode: of a tokenizer, without beginning and end tokens.
      rng: draws words, depths and perhaps the part of the text.
      length: tokens of text, less where the sample would be longer than `config.longest`.
      start: tokens that begin a text.

    Returns:
      A sample of at most `config.longest` tokens. Deviation: the original pads the text to a multiple of 16, which its
      sequence parallelism needs.
    Raises:
      ValueError: if passkeys and questions alone are longer than that.
    """

    def encoded(part: str) -> np.ndarray:
        return np.asarray(encode(part), np.int32)

    answers = [encoded(" " + " ".join(rng.choice(WORDS, config.words))) for _ in range(config.passkeys)]
    ordinals = ORDINALS[: config.passkeys]
    needles = [
        np.concatenate([encoded(NEEDLE.format(ordinal=ordinal)), answer, encoded(SEPARATOR)])
        for ordinal, answer in zip(ordinals, answers, strict=True)
    ]
    opening, closing, separator = np.asarray([*start, *encode(OPENING)], np.int32), encoded(CLOSING), encoded(SEPARATOR)
    questions = [encoded(QUESTION.format(ordinal=ordinal)) for ordinal in ordinals]
    fixed = len(opening) + len(closing) + config.passkeys * len(separator)
    fixed += sum(len(part) for part in (*needles, *questions, *answers))
    length = min(length, config.longest - fixed)
    if length < 1:
        raise ValueError(
            f"passkey_sample: {config.passkeys} passkeys of {config.words} words and their questions are {fixed} "
            f"tokens and leave no room for text in {config.longest}; use fewer or shorter passkeys, or longer samples."
        )
    text = np.resize(text, max(len(text), length))
    first = rng.integers(len(text) - length + 1) if config.text == "anywhere" else 0
    text = text[first : first + length]
    depths = np.linspace(config.first_depth, config.last_depth, config.depths)
    places = (np.sort(rng.choice(depths, config.passkeys, replace=False)) * length).astype(int)
    parts = [opening]
    for begin, end, needle in zip([0, *places[:-1]], places, needles, strict=True):
        parts += [text[begin:end], needle]
    parts += [text[places[-1] :], closing]
    context = sum(map(len, parts))
    asked, said = [np.zeros(context, bool)], [np.zeros(context, bool)]
    for question, answer in zip(questions, answers, strict=True):
        block = [question, answer, separator]
        parts += block
        asked += [np.ones(sum(map(len, block)), bool)]
        said += [np.full(len(part), part is answer) for part in block]
    return PasskeySample(np.concatenate(parts).astype(np.int32), np.concatenate(asked), np.concatenate(said))
