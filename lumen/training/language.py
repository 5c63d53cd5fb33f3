"""Training of language models on text."""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lumen.evaluation.perplexity import perplexity
from lumen.io.names.decoder import LINEARS
from lumen.language import pretrained
from lumen.language.decoder import Decoder, DecoderConfig, next_token_loss
from lumen.layers import unstack
from lumen.qtensor import QuantizedLinear
from lumen.sharding import batch_sharding, tree_shardings
from lumen.training.loop import Task
from lumen.training.text import TextData
from lumen.training.vq import sized
from pallas_kernels.w4a16_matmul import pack

SIZES = ("llama3_8b", "qwen25_7b", "debug")


@dataclasses.dataclass(frozen=True)
class Serving:
    """The decode step that `--compile_only` of evaluate.py compiles: one token per row, the cache all but full.

    Attributes:
      weights: of the linears inside the blocks; the rest is bfloat16.
      group: input channels per scale of packed weights.
      slots: tokens that the cache holds, in bfloat16.
    """

    weights: Literal["bfloat16", "int4"] = "bfloat16"
    group: int = 128
    slots: int = 4096


@dataclasses.dataclass(frozen=True)
class LanguageOptions:
    """Options of task "language".

    Attributes:
      model: {"size": "llama3_8b", "qwen25_7b" or "debug"} and changes to DecoderConfig; not with `start`. With "debug"
        the vocabulary is the tokenizer's unless it is given.
      start: a folder with published weights and their config.json, to continue from.
      data: the text.
      length: tokens per training window.
      chunk: positions of a row whose logits are held at a time, see `next_token_loss`; 0: all.
      remat: recompute each block in the backward pass.
      evaluation_length: tokens per block of the perplexity.
      evaluation_blocks: blocks of it, the first of the test text; 0: all.
      serving: see Serving.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = ""
    data: TextData = dataclasses.field(default_factory=TextData)
    length: int = 512
    chunk: int = 0
    remat: bool = False
    evaluation_length: int = 512
    evaluation_blocks: int = 0
    serving: Serving = dataclasses.field(default_factory=Serving)

    def __post_init__(self):
        if self.length < 2 or self.evaluation_length < 2:
            raise ValueError(f"length={self.length}, evaluation_length={self.evaluation_length}; wanted at least 2.")
        if self.chunk and self.length % self.chunk:
            raise ValueError(f"chunk={self.chunk} does not divide length={self.length}.")
        if bool(self.model) == bool(self.start):
            raise ValueError("give either model (to train from nothing) or start (published weights), and not both.")


def make_task(options: LanguageOptions, *, batch_size: int, seed: int, total_steps: int, workdir: pathlib.Path) -> Task:
    """The parts of a language-model run."""
    del total_steps, workdir
    if options.start:
        config = pretrained.read_config(options.start)
    else:
        own = {"vocabulary": options.data.load_tokenizer().vocabulary} if options.model.get("size") == "debug" else {}
        config = sized(DecoderConfig, own | options.model, SIZES, "language.model")

    def loss(model: Decoder, batch, key, step):
        del key, step
        return next_token_loss(model, batch["tokens"], remat=options.remat, chunk=options.chunk), {}

    def measure(model, split, blocks):
        stream = options.data.tokens(split)
        if blocks:
            stream = stream[: blocks * options.evaluation_length]
        return perplexity(unstack(model), stream, length=options.evaluation_length), {}

    def export(model: Decoder, workdir: pathlib.Path):
        beside = pretrained.Folder(options.data.tokenizer_files())
        pretrained.save(workdir / "model", model, beside, overwrite=True)

    return Task(
        build=lambda rngs: Decoder(config, rngs=rngs),
        loss=loss,
        batch_spec={"tokens": jax.ShapeDtypeStruct((batch_size, options.length + 1), jnp.int32)},
        batches=lambda: options.data.batches(length=options.length, batch_size=batch_size, seed=seed),
        monitor=lambda model, key: measure(model, "validation", 32),
        evaluate=lambda model, key, workdir: measure(model, "test", options.evaluation_blocks),
        inference=functools.partial(_decode_step, config, options.serving, batch_size),
        pretrained=(lambda model: pretrained.load(options.start, dtype=jnp.float32)[0]) if options.start else None,
        export=export,
    )


def _decode_step(config: DecoderConfig, serving: Serving, batch_size: int, mesh):
    """The jitted step from one token per row to the next, and its abstract arguments on the mesh."""

    @functools.partial(jax.jit, donate_argnums=2)
    def decode_step(model: Decoder, tokens, cache):
        hidden, cache = model(tokens, cache=cache)
        return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32), cache

    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    if serving.weights == "int4":
        _pack_abstract(model, serving.group)
    layout = tree_shardings(model, mesh, gathered=["embed"])
    model = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model, layout)
    rows = batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=rows)
    cache = jax.eval_shape(lambda: model.empty_cache(batch_size, serving.slots, jnp.bfloat16))
    return decode_step, (model, tokens, cache)


def _pack_abstract(model: Decoder, group: int) -> None:
    """Puts packed linears without values in the place of an abstract model's linears."""
    for name in LINEARS.values():
        linear = getattr(model.blocks, name)
        depth, inputs, outputs = linear.kernel.shape
        q = jax.ShapeDtypeStruct((depth, inputs, outputs), jnp.uint8)
        side = jax.ShapeDtypeStruct((depth, inputs // group, outputs), jnp.bfloat16)
        packed = jax.eval_shape(jax.vmap(lambda q, scale, zero: pack(q, scale, zero, group)), q, side, side)
        bias = None if linear.bias is None else linear.bias.get_value()
        setattr(model.blocks, name, QuantizedLinear(packed, bias, axes=linear.kernel.get_metadata()["axes"]))
