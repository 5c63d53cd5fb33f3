"""Passkey samples, and the run that trains DuoAttention's gates on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.attention import Streaming
from lumen.evaluation.duo_attention import choices_picture, compare_choices, passkey_recall
from lumen.io.head_patterns import read_pattern
from lumen.language import pretrained
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.tokenizer import ByteTokenizer
from lumen.long_context.passkeys import PasskeyConfig, passkey_sample
from lumen.sharding import make_mesh
from lumen.training.config import build
from lumen.training.duo_attention import Deployment, DuoOptions, make_task
from lumen.training.loop import TrainConfig, prepare_workdir, set_up, train
from lumen.training.optim import OptimizerConfig, learning_rate
from lumen.training.passkey import PasskeyOptions, make_passkey_task

TEXT = np.tile(np.frombuffer(b"0123456789", np.uint8), 500).astype(np.int32)
SAMPLES = {"passkeys": 1, "words": 2, "shortest": 8, "longest": 224, "lengths": 4}


def draw(config, seed=0, length=None):
    rng = np.random.default_rng(seed)
    length = config.longest if length is None else length
    return passkey_sample(config, TEXT, ByteTokenizer().encode, rng, length=length, start=(256,))


class TestSamples:
    def test_reads_as_it_should(self):
        sample = draw(PasskeyConfig(passkeys=2, words=2, longest=1000, shortest=1), length=20)
        text = ByteTokenizer().decode(sample.tokens.tolist())
        said = ByteTokenizer().decode(sample.tokens[sample.passkeys].tolist()).split()
        first, second = " ".join(said[:2]), " ".join(said[2:])
        assert sample.tokens[0] == 256
        story, questions = text.split("</book>")
        # The words are in the text that is asked about, in the order of their numbers, and nothing of it is lost.
        needles = [
            f"\n\nRemember the {n} passkey to the vault: {w}\n\n" for n, w in (("first", first), ("second", second))
        ]
        before, rest = story.split(needles[0])
        between, after = rest.split(needles[1])
        assert before.endswith("<book>\n" + before.rpartition("\n")[2])
        assert (before.rpartition("\n")[2] + between + after).strip() == "01234567890123456789"
        assert questions.count("Passkey:") == 2
        asked = ByteTokenizer().decode(sample.tokens[sample.questions].tolist())
        assert questions == "\n\n" + asked
        assert asked.endswith(f"is the second passkey to the vault?\nPasskey: {second}\n\n")

    @pytest.mark.parametrize("seed", range(3))
    def test_the_longest_fit_exactly(self, seed):
        config = PasskeyConfig(passkeys=3, words=4, shortest=10, longest=900)
        assert len(draw(config, seed).tokens) == 900
        assert len(draw(config, seed, length=100).tokens) < 900
        assert not np.array_equal(draw(config, 0).tokens, draw(config, 1 + seed).tokens)

    def test_depths_stay_inside(self):
        config = PasskeyConfig(passkeys=1, words=1, longest=3000, first_depth=0.5, last_depth=0.6, depths=5)
        for seed in range(5):
            sample = draw(config, seed, length=1000)
            place = ByteTokenizer().decode(sample.tokens.tolist()).index("\n\nRemember")
            assert place - len("This is a very long story book. <book>\n") in (500, 525, 550, 575, 600)

    def test_no_room_is_an_error(self):
        with pytest.raises(ValueError, match="leave no room for text in 100; use fewer or shorter passkeys"):
            draw(PasskeyConfig(passkeys=2, words=8, shortest=1, longest=100))


def test_the_published_schedule():
    config = OptimizerConfig(
        learning_rate=0.02, schedule="trapezoid", warmup_steps=400, final_learning_rate=0.002, beta2=0.999
    )
    for step, want in ((0, 0.002), (39, 0.002), (199, 0.01), (399, 0.02), (1600, 0.02), (1800, 0.01), (1999, 0.002)):
        assert float(learning_rate(config, step, 2000)) == pytest.approx(want, rel=1e-6)


@pytest.fixture
def folder(tmp_path):
    """A published folder of a model that knows nothing."""
    model = Decoder(DecoderConfig.debug(vocabulary=259), rngs=nnx.Rngs(0))
    # Attention that is far from uniform, so that windows matter.
    model.blocks.query.kernel[...] = 20 * model.blocks.query.kernel[...]
    pretrained.save(tmp_path / "model", model, pretrained.Folder(ByteTokenizer().files()))
    return tmp_path / "model"


class TestRun:
    def test_gates_train_and_leave_a_pattern(self, folder, tmp_path):
        options = {
            "start": str(folder),
            "data": {"samples": SAMPLES},
            "sink": 2,
            "recent": 4,
            "regularisation": 0.3,
            "deployment": {"sink": 2, "recent": 4},
            "evaluation_samples": 2,
            "random_choices": 2,
            "sparsities": (0.5,),
        }
        section = {"learning_rate": 0.1, "schedule": "constant", "beta2": 0.999}
        config = TrainConfig("duo_attention", total_steps=3, batch_size=2, optimizer=OptimizerConfig(**section))
        sizes = {"batch_size": 2, "seed": 0, "total_steps": 3}
        task = make_task(build(DuoOptions, options), workdir=tmp_path / "run", **sizes)
        run = set_up(config, task, jax.devices()[:1])
        with jax.set_mesh(run.mesh):
            prepare_workdir(tmp_path / "run", {})
            train(run, tmp_path / "run")
        gates, config = read_pattern(tmp_path / "run" / "pattern", (2, 2))
        assert (gates >= 0).all()
        assert (gates < 1).all()
        assert (config["sink_size"], config["recent_size"], config["num_passkeys"]) == (2, 4, 1)
        model, _ = pretrained.load(folder)
        metrics, pictures = task.evaluate(run.model(run.initial_state()), None, tmp_path)
        assert metrics["gates"] == [[1.0, 1.0], [1.0, 1.0]]
        assert metrics["full"] == passkey_recall(model, build(DuoOptions, options).data.fixed("test", 2, 0))
        assert all(picture.shape[2] == 3 for picture in pictures.values())

    def test_what_decoding_needs_can_be_compiled(self, tmp_path):
        options = DuoOptions(model={"size": "debug"}, deployment=Deployment(sparsity=0.5, sink=2, recent=6, slots=64))
        task = make_task(options, batch_size=2, seed=0, total_steps=1, workdir=tmp_path)
        program, (model, tokens, cache) = task.inference(make_mesh({}, jax.devices()[:1]))
        # One head of each layer holds 64 slots, the other 2 + 6 and the newest, in eights; of 16 channels, in 2 rows.
        held = sum(leaf.size for leaf in jax.tree.leaves(cache) if leaf.ndim > 1)
        assert held == 2 * 2 * 2 * 16 * (64 + 16)
        chosen, _ = jax.eval_shape(program, model, tokens, cache)
        assert chosen.shape == (2, 1)

    def test_start_or_model_and_not_both(self):
        with pytest.raises(ValueError, match="give either start"):
            DuoOptions()


def test_the_passkey_task_weighs_answers():
    options = build(
        PasskeyOptions,
        {"model": {"size": "debug"}, "text_weight": 0.0, "data": {"samples": SAMPLES | {"labels": "passkeys"}}},
    )
    task = make_passkey_task(options, batch_size=2, seed=0, total_steps=1, workdir=None)
    model = task.build(nnx.Rngs(0))
    batches = task.batches()
    batch = next(batches)
    batches.close()
    loss, _ = jax.jit(task.loss)(model, batch, None, 0)
    logits = np.asarray(
        jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))(model, batch["tokens"]), np.float64
    )
    chosen = (
        np.log(np.exp(logits[:, :-1]).sum(-1))
        - np.take_along_axis(logits[:, :-1], batch["tokens"][:, 1:, None], axis=2)[..., 0]
    )
    # A mean of float32 logarithms.
    assert float(loss) == pytest.approx(chosen[batch["labels"][:, 1:]].mean(), rel=1e-5)


def test_comparison_tells_heads_apart():
    """Head 0 alone decides, because the value of the other is zero: recall depends on that head only."""
    config = DecoderConfig.debug(depth=1, heads=2, kv_heads=2, hidden=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    model.blocks.query.kernel[...] = 30 * model.blocks.query.kernel[...]
    value = 30 * model.blocks.value.kernel[...]
    model.blocks.value.kernel[...] = value.at[..., 16:].set(0)
    model.blocks.output.kernel[...] = 30 * model.blocks.output.kernel[...]
    tokens = jax.random.randint(jax.random.key(0), (16, 60), 0, 128)
    answers = np.asarray(jax.jit(lambda model: jnp.argmax(model.logits(model(tokens)[0]), axis=-1))(model))
    samples = {"tokens": np.array(tokens), "passkeys": np.zeros((16, 60), bool)}
    samples["tokens"][:, -1] = answers[:, -2]
    samples["passkeys"][:, -1] = True
    gates = np.array([[1.0, 0.0]])
    found = compare_choices(model, gates, samples, streaming=Streaming(1, 2), sparsities=(0.5,), random_choices=4)
    (choice,) = found["choices"]
    assert found["full"] == choice["learned"] == 1.0
    assert choice["inverted"] == found["streaming"] < 1.0
    assert set(choice["random"]) <= {choice["inverted"], 1.0}
    assert choices_picture([found, found]).shape[2] == 3
