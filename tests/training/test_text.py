"""Text sources: which documents, which tokens, which windows."""

import contextlib
import json

import numpy as np
import pytest

from lumen.io.text import documents, passages, python_sources
from lumen.language.tokenizer import ByteTokenizer
from lumen.training.config import ConfigError
from lumen.training.text import TextData, token_stream


class TestPythonSources:
    def test_splits_share_no_file_and_are_about_18_to_1_to_1(self):
        texts = {split: list(python_sources(split)) for split in ("train", "validation", "test")}
        sizes = {split: sum(map(len, found)) for split, found in texts.items()}
        assert sizes["train"] > 4e6
        assert all(0.01 < sizes[split] / sizes["train"] < 0.2 for split in ("validation", "test"))
        # Empty and near-empty package files are alike in every split.
        long = {split: {text for text in found if len(text) > 1000} for split, found in texts.items()}
        assert not long["train"] & (long["validation"] | long["test"])
        assert not long["validation"] & long["test"]

    def test_tests_and_third_party_packages_are_left_out(self):
        assert not any("import numpy" in text for text in python_sources("train"))

    def test_commands_name_it(self):
        assert list(documents("python_sources/test")) == list(python_sources("test"))
        with pytest.raises(FileNotFoundError, match="no such text"):
            list(documents("python_sources/dev"))

    def test_order_is_fixed(self):
        assert list(python_sources("test")) == list(python_sources("test"))


class TestDocuments:
    def test_jsonl_gives_a_text_per_line_and_other_files_are_one(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two\\n", "id": 3}\n')
        (tmp_path / "a.txt").write_text("one\ntwo\n")
        assert list(documents(tmp_path / "a.jsonl")) == ["one", "two\n"]
        assert list(documents(tmp_path / "a.txt")) == ["one\ntwo\n"]

    def test_passages_are_paragraphs_or_lines_or_the_texts_of_a_jsonl(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\nmore\n\ntwo\n")
        (tmp_path / "b.txt").write_text("one\ntwo\n")
        (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one\n\ntwo"}) + "\n")
        assert list(passages(tmp_path / "a.txt")) == ["one\nmore", "two"]
        assert list(passages(tmp_path / "b.txt")) == ["one", "two"]
        assert list(passages(tmp_path / "c.jsonl")) == ["one\n\ntwo"]

    @pytest.mark.parametrize("line", ["not json", '{"txt": "no text"}', "[1]"])
    def test_a_bad_line_is_named(self, tmp_path, line):
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*wanted a JSON object with a \"text\""):
            list(documents(tmp_path / "a.jsonl"))

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.txt: no such text"):
            list(documents(tmp_path / "none.txt"))


def test_stream_ends_every_text():
    np.testing.assert_array_equal(token_stream(["ab", "", "c"], ByteTokenizer()), [97, 98, 257, 257, 99, 257])
    assert token_stream([], ByteTokenizer()).shape == (0,)


class TestBatches:
    @pytest.fixture
    def folder(self, tmp_path):
        # Byte i of the text is 33 + i mod 81: a window is consecutive if its steps say so.
        text = bytes(33 + i % 81 for i in range(4000)).decode()
        (tmp_path / "train.txt").write_text(text)
        (tmp_path / "test.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
        return tmp_path

    def test_windows_are_consecutive_tokens_from_anywhere(self, folder):
        data = TextData("files", str(folder))
        with contextlib.closing(data.batches(length=10, batch_size=8, seed=0)) as batches:
            rows = np.concatenate([next(batches)["tokens"] for _ in range(60)])
        assert rows.shape == (480, 11)
        steps = np.diff(rows, axis=1)
        assert set(np.unique(steps)) <= {1, -80}
        starts = (rows[:, 0] - 33) % 9
        assert len(np.unique(starts)) == 9  # not only at multiples of the length

    def test_same_seed_same_batches(self, folder):
        data = TextData("files", str(folder))
        with (
            contextlib.closing(data.batches(length=10, batch_size=4, seed=3)) as one,
            contextlib.closing(data.batches(length=10, batch_size=4, seed=3)) as two,
        ):
            for _ in range(3):
                np.testing.assert_array_equal(next(one)["tokens"], next(two)["tokens"])

    def test_missing_split_path_and_too_little_text_are_named(self, folder):
        with pytest.raises(ConfigError, match=r"data\.path: missing"):
            TextData("files").tokens("train")
        with pytest.raises(ConfigError, match=r"holds neither validation\.jsonl nor validation\.txt"):
            TextData("files", str(folder)).tokens("validation")
        with pytest.raises(ConfigError, match="fewer than batch_size=500"):
            TextData("files", str(folder)).batches(length=10, batch_size=500, seed=0)
