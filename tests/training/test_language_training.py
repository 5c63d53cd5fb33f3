"""The language-model run as a whole, and its loss."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.io.checkpoint import flatten
from lumen.language import pretrained
from lumen.language.decoder import Decoder, DecoderConfig, next_token_loss
from lumen.language.tokenizer import load_tokenizer
from lumen.sharding import make_mesh
from lumen.training.language import LanguageOptions, Serving, make_task

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = [
    "--config=experiments/awq/python_sources.py",
    "--config.total_steps=4",
    "--config.batch_size=4",
    "--config.log_every=1",
    "--config.monitor_every=4",
    "--config.language.model={'size': 'debug'}",
    "--config.language.length=32",
    "--config.language.evaluation_length=32",
    "--config.language.evaluation_blocks=20",
]


def test_training_evaluation_and_the_folder_it_leaves(tmp_path, run_program):
    def run(script, *flags):
        """The last line of what it prints."""
        return json.loads(run_program(script, *flags).splitlines()[-1])

    trained = run("train.py", *FLAGS, f"--workdir={tmp_path}")
    assert trained["step"] == 4
    assert trained["blocks"] == 32  # the monitor's
    found = run("evaluate.py", *FLAGS, f"--workdir={tmp_path}")
    assert found["blocks"] == 20
    assert 1 < found["perplexity"] < 400
    model, _ = pretrained.load(tmp_path / "model")
    assert model.config == DecoderConfig.debug(vocabulary=259)
    assert load_tokenizer(tmp_path / "model").encode("añb") == list("añb".encode())
    # Continuing from the folder: the first loss is that of the trained model, not of a new one.
    start = [flag for flag in FLAGS if "model=" not in flag and "monitor" not in flag]
    start += [f"--config.language.start={tmp_path / 'model'}", "--config.language.model={}", "--config.total_steps=1"]
    again = run("train.py", *start, f"--workdir={tmp_path / 'again'}")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert abs(again["loss"] - losses[-1]) < abs(again["loss"] - losses[0])


class TestLoss:
    @pytest.fixture
    def case(self):
        model = Decoder(DecoderConfig.debug(), rngs=nnx.Rngs(0))
        return model, jax.random.randint(jax.random.key(1), (3, 25), 0, 128)

    def test_chunks_change_neither_loss_nor_gradient(self, case):
        model, tokens = case
        want, gradient = jax.value_and_grad(lambda m: next_token_loss(m, tokens))(model)
        for chunk in (1, 8, 24):
            got, found = jax.value_and_grad(lambda m, chunk=chunk: next_token_loss(m, tokens, chunk=chunk))(model)
            # float32 sums over 72 targets in another order.
            np.testing.assert_allclose(got, want, rtol=1e-6)
            for name, value in flatten(gradient).items():
                np.testing.assert_allclose(flatten(found)[name], value, rtol=1e-4, atol=1e-7, err_msg=name)

    def test_chunks_never_hold_all_logits(self, case):
        model, tokens = case
        whole = (3, 24, 128)
        text = str(jax.make_jaxpr(jax.grad(lambda m: next_token_loss(m, tokens, chunk=8)))(model))
        assert f"f32[{whole[0]},{whole[1]},{whole[2]}]" not in text
        assert "f32[3,8,128]" in text

    def test_weights_leave_targets_out(self, case):
        model, tokens = case
        weights = jnp.zeros((3, 24)).at[:, :10].set(1.0)
        np.testing.assert_allclose(
            next_token_loss(model, tokens, weights=weights), next_token_loss(model, tokens[:, :11]), rtol=1e-5
        )

    def test_a_chunk_that_does_not_divide_is_refused(self, case):
        model, tokens = case
        with pytest.raises(ValueError, match="chunk=7 does not divide the 24 positions"):
            next_token_loss(model, tokens, chunk=7)


class TestOptions:
    def test_model_or_start_and_not_both(self):
        with pytest.raises(ValueError, match=r"give either model .* or start"):
            LanguageOptions()

    def test_chunk_must_divide(self):
        with pytest.raises(ValueError, match="chunk=100 does not divide length=512"):
            LanguageOptions(model={"size": "debug"}, chunk=100)


@pytest.mark.parametrize("weights", ["bfloat16", "int4"])
def test_decode_step_takes_the_bytes_that_it_should(weights):
    sizes = {"size": "debug", "width": 256, "hidden": 512, "head_dim": 64}
    options = LanguageOptions(model=sizes, length=8, serving=Serving(weights=weights, group=64, slots=32))
    task = make_task(options, batch_size=1, seed=0, total_steps=1, workdir=pathlib.Path())
    program, (model, tokens, cache) = task.inference(make_mesh({}, jax.devices()[:1]))
    blocks = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.blocks))
    # Two layers of 256 x (256 + 2 x 128) + 256 x 256 + 3 x 256 x 512 weights and two norms of 256.
    linear, norms = 2 * (256 * 512 + 256 * 256 + 3 * 256 * 512), 2 * 2 * 256 * 2
    bits = {"bfloat16": 16, "int4": 4 + 32 / 64}[weights]  # codes, and two bfloat16 per 64 weights
    assert blocks == linear * bits / 8 + norms
    logits, after = jax.eval_shape(program, model, tokens, cache)
    assert logits.shape == (1, 1)
    assert after.keys.size == 2 * 32 * 2 * 64
