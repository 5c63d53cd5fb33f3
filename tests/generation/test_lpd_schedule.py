"""Group-size schedules: the published tables, and the rule for every other number of steps."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from lumen.generation.lpd.schedule import _ramp, group_of_rank, group_sizes, training_schedules

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "lpd" / "group_sizes.npz"
TOKENS = {"256": 256, "512": 1024}  # by pixels


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        assert json.loads(str(arrays["meta"]))["tolerance"] == {"all": "exact"}
        return {name: arrays[name] for name in arrays.files if name != "meta"}


def assert_is_schedule(sizes, tokens, steps):
    assert len(sizes) == steps
    assert sum(sizes) == tokens
    assert sizes[0] == 1
    assert all(before <= after for before, after in itertools.pairwise(sizes))


def test_published_lists(golden):
    lists = [name.split("/") for name in golden if name.startswith("out/lookup/")]
    assert len(lists) == 9 + 14
    for *_, pixels, steps in lists:
        want = tuple(golden[f"out/lookup/{pixels}/{steps}"])
        assert group_sizes(TOKENS[pixels], int(steps)) == want


@pytest.mark.parametrize("pixels", ["256", "512"])
def test_published_training_lists_in_file_order(golden, pixels):
    tokens = TOKENS[pixels]
    schedules = training_schedules(tokens)
    steps = golden[f"out/training/{pixels}/steps"]
    assert [len(sizes) for sizes in schedules] == list(steps)
    assert schedules == tuple(group_sizes(tokens, int(k)) for k in steps)


@pytest.mark.parametrize(("tokens", "steps"), [(256, 20), (1024, 48)])
def test_base_formula_without_correction(tokens, steps):
    k = np.arange(1, steps + 1)
    ramp = tokens * (np.cos(np.pi * (k - 1) / (2 * steps)) - np.cos(np.pi * k / (2 * steps)))
    assert group_sizes(tokens, steps) == tuple(np.maximum(1, np.round(ramp)).astype(int))


def test_rule_is_within_two_of_every_published_size(golden):
    for name in golden:
        if name.startswith("out/lookup/"):
            want = golden[name]
            got = _ramp(int(want.sum()), want.size)
            assert np.abs(np.subtract(got, want)).max() <= 2, name


def test_rule_on_paper():
    # 16 (cos - cos) for K = 5 is 0.78, 2.35, 3.68, 4.66, 4.53 (k = 4 and 5 to be read as 4.26 and 4.94 below): the
    # increments of 1 - cos(k pi / 10) = 0.0489, 0.1910, 0.4122, 0.6910, 1 times 16 are 0.78, 2.27, 3.54, 4.46, 4.94.
    # Rounded 1, 2, 4, 4, 5: they sum to 16 as they are.
    assert group_sizes(16, 5) == (1, 2, 4, 4, 5)
    # 1 - cos(k pi / 6) = 0.1340, 0.5, 1 times 8: increments 1.07, 2.93, 4 -> 1, 3, 4.
    assert group_sizes(8, 3) == (1, 3, 4)
    # K = 2: increments 8 (0.2929, 0.7071) = 2.34, 5.66. The first becomes 1, the second 6, one more is missing.
    assert group_sizes(8, 2) == (1, 7)
    # 3 tokens in 3 steps: 0.40, 1.10, 1.50 -> 1, 1, 2 (to even): one too many.
    assert group_sizes(3, 3) == (1, 1, 1)


@pytest.mark.parametrize("tokens", [*range(2, 41), 64, 100, 256])
def test_every_number_of_steps(tokens):
    for steps in range(2, tokens + 1):
        sizes = group_sizes(tokens, steps)
        assert_is_schedule(sizes, tokens, steps)
        assert sizes == group_sizes(tokens, steps)


@pytest.mark.parametrize(("tokens", "steps"), [(4096, 64), (1024, 37), (1000, 999), (256, 2)])
def test_large_and_extreme_counts(tokens, steps):
    assert_is_schedule(group_sizes(tokens, steps), tokens, steps)


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [(1, [1]), (2, [2]), (5, [5]), (16, [16, 12, 8, 6, 4]), (64, [64, 48, 32, 24, 16, 12, 8, 6, 4])],
)
def test_training_family_of_other_grids(tokens, counts):
    schedules = training_schedules(tokens)
    assert [len(sizes) for sizes in schedules] == counts
    for sizes in schedules:
        assert_is_schedule(sizes, tokens, len(sizes))


def test_one_token_takes_one_step():
    assert group_sizes(1, 1) == (1,)


@pytest.mark.parametrize(
    ("tokens", "steps", "message"),
    [
        (16, 1, "steps from 2 to 16"),
        (16, 17, "steps from 2 to 16"),
        (16, 0, "steps from 2 to 16"),
        (1, 2, "steps from 1 to 1"),
        (0, 0, "at least one token"),
        (-4, 2, "at least one token"),
    ],
)
def test_impossible_counts(tokens, steps, message):
    with pytest.raises(ValueError, match=message):
        group_sizes(tokens, steps)


@pytest.mark.parametrize("tokens", [0, -3])
def test_training_of_no_tokens(tokens):
    with pytest.raises(ValueError, match="at least one token"):
        training_schedules(tokens)


def test_group_of_rank():
    groups = group_of_rank((1, 2, 3))
    np.testing.assert_array_equal(groups, [1, 2, 2, 3, 3, 3])
    assert groups.dtype == np.int32
