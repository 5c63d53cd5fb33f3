"""Perplexity against its definition."""

import math

import numpy as np
import pytest
from flax import nnx

from lumen.evaluation.perplexity import perplexity
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.layers import unstack


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig.debug(vocabulary=50), rngs=nnx.Rngs(0))


def test_equals_a_calculation_block_by_block(model):
    stream = np.random.default_rng(0).integers(0, 50, 5 * 16 + 7).astype(np.int32)
    losses = []
    for block in stream[:80].reshape(5, 16):
        logits = np.asarray(model.logits(model(block[None])[0])[0], np.float64)
        log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-np.mean([log_probability[t, block[t + 1]] for t in range(15)]))
    found = perplexity(model, stream, length=16, progress=False)
    # float32 losses of about 4 nats, averaged over 75 tokens.
    assert found["cross_entropy"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert (found["blocks"], found["tokens"]) == (5, 75)
    assert perplexity(unstack(model), stream, length=16, progress=False)["cross_entropy"] == pytest.approx(
        found["cross_entropy"], rel=1e-6
    )


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(model):
    blank = nnx.clone(model)
    blank.head.kernel[...] = 0 * blank.head.kernel[...]
    stream = np.arange(64, dtype=np.int32) % 50
    assert perplexity(blank, stream, length=32, progress=False)["perplexity"] == pytest.approx(50, rel=1e-5)


def test_a_short_text_and_foreign_tokens_are_refused(model):
    with pytest.raises(ValueError, match="15 tokens; wanted at least one block of 16"):
        perplexity(model, np.zeros(15, np.int32), length=16)
    with pytest.raises(ValueError, match="tokens from 0 to 50 came; the model's vocabulary has 50"):
        perplexity(model, np.array([0, 50] * 8, np.int32), length=16)
