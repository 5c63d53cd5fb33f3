"""Calibration data and statistics, against counting by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumen.quantization.calibrate import calibration_tokens, calibration_windows, input_statistics


def encode(text):
    return [int(word) for word in text.split()]


def test_cuts_blocks():
    """Blocks of 3: the empty and the long text are passed over, two are used, the tail (6) is dropped."""
    texts = [" ", "1 2", "9 9 9 9", " 3 4 5 ", "7 7 7"]
    np.testing.assert_array_equal(calibration_tokens(texts, encode, texts_used=2, length=3), [[1, 2, 3]])
    np.testing.assert_array_equal(calibration_tokens(texts, encode, length=3), [[1, 2, 3], [4, 5, 7]])


def test_reads_no_further_than_needed():
    def texts():
        yield "1 2 3"
        raise AssertionError("read on")

    assert calibration_tokens(texts(), encode, texts_used=1, length=3).shape == (1, 3)


@pytest.mark.parametrize("texts", [[], ["", " "], ["1 2 3 4"], ["1 2"]])
def test_refuses_too_little(texts):
    with pytest.raises(ValueError, match="less than one block of 3; give more or shorter texts"):
        calibration_tokens(texts, encode, length=3)


def test_windows_are_spread_evenly_over_all_texts():
    texts = ["0 1 2 3", "", "4 5 6 7 8 9"]
    np.testing.assert_array_equal(calibration_windows(texts, encode, windows=3, length=2), [[0, 1], [4, 5], [8, 9]])
    np.testing.assert_array_equal(calibration_windows(texts, encode, windows=1, length=10), [range(10)])


@pytest.mark.parametrize(("windows", "length"), [(1, 11), (0, 2)])
def test_windows_that_cannot_be_cut_are_refused(windows, length):
    with pytest.raises(ValueError, match=f"wanted at least one window of {length}, and windows={windows}"):
        calibration_windows(["0 1 2 3 4", "5 6 7 8 9"], encode, windows=windows, length=length)


@pytest.mark.parametrize("sequences", [8, 7])  # the last may be padding
@pytest.mark.parametrize("rows", [512, 5])
def test_statistics(sequences, rows):
    x = np.random.default_rng(0).normal(size=(4, 2, 6, 3)).astype(np.float32)
    gather = functools.partial(input_statistics, lambda x: {"x": x, "twice": 2 * x}, sequences=sequences, rows=rows)
    found = jax.jit(functools.partial(gather, moments=["twice"]))(jnp.asarray(x))
    flat = x.reshape(-1, 3)[: sequences * 6]
    step = max(1, len(flat) // rows)
    np.testing.assert_array_equal(found["x"].rows, flat[::step])
    # 48 float32 numbers, summed in parts.
    np.testing.assert_allclose(found["twice"].mean_abs, 2 * np.abs(flat.astype(np.float64)).mean(0), rtol=48 * 2**-24)
    assert found["x"].moment is None
    moment = 4 * flat.astype(np.float64).T @ flat / len(flat)
    np.testing.assert_allclose(found["twice"].moment, moment, atol=48 * 2**-24 * np.abs(moment).max())
