"""Samples with passkeys as training data, and a task that teaches a decoder to find them."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.evaluation.duo_attention import passkey_recall
from lumen.io.names.decoder import LINEARS
from lumen.io.text import Split
from lumen.language import pretrained
from lumen.language.decoder import Decoder, DecoderConfig, next_token_loss
from lumen.long_context.passkeys import PasskeyConfig, PasskeySample, passkey_sample
from lumen.sharding import batch_sharding, tree_shardings
from lumen.training.data import Record, make_batches
from lumen.training.language import SIZES
from lumen.training.loop import Task
from lumen.training.text import TextData
from lumen.training.vq import sized


@dataclasses.dataclass(frozen=True)
class PasskeyData:
    """Where samples come from.

    Attributes:
      text: the text around the passkeys, and the tokenizer.
      samples: the distribution of samples.
    """

    text: TextData = dataclasses.field(default_factory=TextData)
    samples: PasskeyConfig = dataclasses.field(default_factory=PasskeyConfig)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch: tokens, their labels, and how many of a row's tokens are no padding."""
        shape = (batch_size, self.samples.longest)
        return {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "labels": jax.ShapeDtypeStruct(shape, jnp.bool_),
            "length": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def batches(self, *, batch_size: int, seed: int):
        """Endless training batches, each sample new; padded at the right to `samples.longest`."""
        source: Any = [{"length": np.int32(length)} for length in self.samples.text_lengths()]
        hide = functools.partial(_hide, draw=self._draw("train"), config=self.samples)
        return make_batches(source, batch_size=batch_size, seed=seed, transforms=[hide])

    def fixed(self, split: Split, count: int, seed: int) -> dict[str, np.ndarray]:
        """Samples of the longest kind: {"tokens" [count, T], "passkeys" [count, T] bool, the words of the answers}."""
        draw, rng = self._draw(split), np.random.default_rng(seed)
        samples = [draw(rng, length=self.samples.longest) for _ in range(count)]
        width = self.samples.longest
        return {
            "tokens": np.stack([_padded(sample.tokens, width) for sample in samples]),
            "passkeys": np.stack([_padded(sample.passkeys, width) for sample in samples]),
        }

    def _draw(self, split: Split):
        tokenizer = self.text.load_tokenizer()
        start = () if tokenizer.bos is None else (tokenizer.bos,)
        text = self.text.tokens(split)
        return functools.partial(passkey_sample, self.samples, text, tokenizer.encode, start=start)


def _hide(record: Record, rng: np.random.Generator, *, draw, config: PasskeyConfig) -> Record:
    sample: PasskeySample = draw(rng, length=int(record["length"]))
    labels = sample.questions if config.labels == "questions" else sample.passkeys
    return {
        "tokens": _padded(sample.tokens, config.longest),
        "labels": _padded(labels, config.longest),
        "length": np.int32(len(sample.tokens)),
    }


def _padded(row: np.ndarray, width: int) -> np.ndarray:
    return np.pad(row, (0, width - len(row)))


@dataclasses.dataclass(frozen=True)
class PasskeyOptions:
    """Options of task "passkey".

    Attributes:
      model: {"size": ...} and changes to DecoderConfig; with "debug" the vocabulary is the tokenizer's.
      data: the samples; what they label weighs 1 in the loss.
      text_weight: of all other tokens.
      remat: recompute each block in the backward pass.
      evaluation_samples: of the test text, of the longest kind.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: PasskeyData = dataclasses.field(default_factory=PasskeyData)
    text_weight: float = 0.1
    remat: bool = False
    evaluation_samples: int = 64


def make_passkey_task(
    options: PasskeyOptions, *, batch_size: int, seed: int, total_steps: int, workdir: pathlib.Path
) -> Task:
    """The parts of a run that trains a decoder, from nothing, on passkeys and the text around them."""
    del total_steps, workdir
    vocabulary = options.data.text.load_tokenizer().vocabulary
    own = {"vocabulary": vocabulary} if options.model.get("size") == "debug" else {}
    config = sized(DecoderConfig, own | options.model, SIZES, "passkey.model")

    def loss(model: Decoder, batch, key, step):
        del key, step
        real = jnp.arange(batch["tokens"].shape[1]) < batch["length"][:, None]
        weights = jnp.where(batch["labels"], 1.0, options.text_weight) * real
        return next_token_loss(model, batch["tokens"], weights=weights[:, 1:], remat=options.remat), {}

    def measure(model, split, count):
        samples = options.data.fixed(split, count, seed)
        return {"recall": passkey_recall(model, samples)}, {}

    def inference(mesh):
        layout = tree_shardings(abstract := nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), mesh)
        model = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
        tokens = jax.ShapeDtypeStruct(
            (batch_size, options.data.samples.longest), jnp.int32, sharding=batch_sharding(mesh)
        )
        return jax.jit(lambda model, tokens: model(tokens)[0]), (model, tokens)

    def export(model: Decoder, workdir: pathlib.Path):
        beside = pretrained.Folder(options.data.text.tokenizer_files())
        pretrained.save(workdir / "model", model, beside, overwrite=True)

    return Task(
        build=lambda rngs: _unit_variance(Decoder(config, rngs=rngs)),
        loss=loss,
        batch_spec=options.data.batch_spec(batch_size),
        batches=lambda: options.data.batches(batch_size=batch_size, seed=seed),
        monitor=lambda model, key: measure(model, "validation", 16),
        evaluate=lambda model, key, workdir: measure(model, "test", options.evaluation_samples),
        inference=inference,
        export=export,
    )


def _unit_variance(model: Decoder) -> Decoder:
    """Initial weights of deviation 1 / sqrt(inputs), and of 1 in the embedding.

    The decoder's own 0.02 is for widths of thousands; with it a small one begins to copy several times later.
    """
    linears = [getattr(model.blocks, name) for name in LINEARS.values()] + ([] if model.config.tied else [model.head])
    for linear in linears:
        linear.kernel[...] = linear.kernel[...] / (0.02 * linear.kernel.shape[-2] ** 0.5)
    if not model.config.tied:
        model.embedding[...] = model.embedding[...] / 0.02
    return model
