"""Training of language models on text."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.evaluation.perplexity import perplexity
from lumen.io.awq import AWQFormat
from lumen.io.names.decoder import LINEARS
from lumen.io.text import SYSTEM, instructions
from lumen.language import pretrained
from lumen.language.decoder import Decoder, DecoderConfig, next_token_loss
from lumen.language.tokenizer import Tokenizer, load_tokenizer
from lumen.layers import unstack
from lumen.long_context.longlora import (
    ATTENTION,
    PLUS,
    add_lora,
    extended_rope,
    group_size,
    merge_lora,
    save_adapter,
    shifted_sparse,
)
from lumen.qtensor import QuantizedLinear
from lumen.sharding import batch_sharding, tree_shardings
from lumen.training.config import ConfigError
from lumen.training.data import Record, make_batches
from lumen.training.loop import Task
from lumen.training.step import cast_floats
from lumen.training.text import TextData
from lumen.training.vq import sized
from pallas_kernels.w4a16_matmul import pack

SIZES = ("llama2_7b", "llama3_8b", "qwen25_7b", "debug")


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
class AttentionOptions:
    """What the heads see in training; evaluation shows them everything.

    Attributes:
      kind: "full", or "shifted": LongLoRA's shifted sparse attention.
      group: tokens of a group; 0: a quarter of the training window.
      leak: the paper's variant with a leak, see `shifted_sparse`.
    """

    kind: Literal["full", "shifted"] = "full"
    group: int = 0
    leak: bool = False


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """What trains; see `add_lora`.

    Attributes:
      rank: of the factors; 0: no factors, every parameter trains.
      alpha, targets, trained: see `add_lora`. trained=() is plain LoRA.
      frozen_dtype: what frozen floating-point weights are kept in; packed ones keep their words.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ATTENTION
    trained: tuple[str, ...] = PLUS
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class InstructionData:
    """Instructions with answers, for supervised fine-tuning: only the answers' tokens are learnt.

    Attributes:
      path: a JSON file, see `lumen.io.text.instructions`.
      tokenizer: "bytes", or a folder with a tokenizer.json.
      system: the system prompt of records with an input.
      held_out: records at the end of the file that are evaluated and not trained on.
    """

    path: str
    tokenizer: str = "bytes"
    system: str = SYSTEM
    held_out: int = 16

    def records(self, length: int, *, train: bool) -> list[Record]:
        """Rows {"tokens" [T + 1], "weights" [T], "segments" [T]} that samples are packed into in the file's order.

        A sample is begin, prompt, answer, end; what of it is beyond T + 1 tokens is cut off, from the answer's end.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        samples = [_sample(tokenizer, one.prompt, one.answer) for one in instructions(self.path, system=self.system)]
        samples = samples[: -self.held_out or None] if train else samples[len(samples) - self.held_out :]
        return list(_pack_rows(samples, length))

    def batches(self, *, length: int, batch_size: int, seed: int):
        """Endless training batches of `records`."""
        rows: Any = self.records(length, train=True)
        if not rows:
            raise ConfigError(f"instructions.path={self.path}: no records are left beside {self.held_out} held out.")
        return make_batches(rows, batch_size=batch_size, seed=seed)


def _sample(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """A sample's tokens, and how many of them are given."""
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    given = [*begin, *tokenizer.encode(prompt)]
    return [*given, *tokenizer.encode(answer), *end], len(given)


def _pack_rows(samples, length: int):
    """Rows of samples one after the other. The last token of each predicts nothing; padding is a segment too."""

    def row(parts):
        tokens, weights, segments = (
            np.zeros(length + 1, np.int32),
            np.zeros(length, np.float32),
            np.zeros(length, np.int32),
        )
        at = 0
        for number, (sample, given) in enumerate(parts, 1):
            stop = at + len(sample)
            tokens[at:stop] = sample
            segments[at : min(stop, length)] = number
            weights[at + given - 1 : stop - 1] = 1.0
            at = stop
        return {"tokens": tokens, "weights": weights, "segments": segments}

    parts, used = [], 0
    for sample, given in samples:
        sample = sample[: length + 1]
        if given >= len(sample):
            continue  # nothing of the answer is left
        if used + len(sample) > length + 1:
            yield row(parts)
            parts, used = [], 0
        parts.append((sample, given))
        used += len(sample)
    if parts:
        yield row(parts)


@dataclasses.dataclass(frozen=True)
class LanguageOptions:
    """Options of task "language".

    Attributes:
      model: {"size": "llama2_7b", "llama3_8b", "qwen25_7b" or "debug"} and changes to DecoderConfig; not with `start`.
        With "debug" the vocabulary is the tokenizer's unless it is given.
      start: weights to continue from: a folder with a config.json, 4-bit ones (then lora.rank is wanted) too; or the
        workdir of a run that is over.
      context: tokens that positions are interpolated to, see `extended_rope`; 0: positions as they are.
      scaling: how they are interpolated.
      attention: what heads see in training.
      lora: what trains.
      data: the text.
      instructions: instead of the text, in training and in evaluation.
      length: tokens per training window.
      chunk: positions of a row whose logits are held at a time, see `next_token_loss`; 0: all.
      remat: recompute each block in the backward pass.
      evaluation_length: tokens per block of the perplexity.
      evaluation_blocks: blocks of it, the first of the test text; 0: all.
      serving: see Serving.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = ""
    context: int = 0
    scaling: Literal["linear", "yarn"] = "linear"
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)
    data: TextData = dataclasses.field(default_factory=TextData)
    instructions: InstructionData | None = None
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
    start, packed = _start(options.start), None
    if start:
        config, packed = pretrained.read_config(start), _awq_format(start)
    else:
        own = {"vocabulary": options.data.load_tokenizer().vocabulary} if options.model.get("size") == "debug" else {}
        config = sized(DecoderConfig, own | options.model, SIZES, "language.model")
    if options.context:
        config = extended_rope(config, options.context, scaling=options.scaling)
    if packed and not options.lora.rank:
        raise ConfigError(
            f"language.start={start}: its weights are packed in 4 bits; give lora.rank, as they cannot train."
        )
    attention, mask = options.attention, None
    if attention.kind == "shifted":
        mask = shifted_sparse(attention.group or group_size(options.length), config.heads, leak=attention.leak)

    def adapt(model: Decoder, key) -> Decoder:
        lora = options.lora
        if not lora.rank:
            return model
        choice = {"targets": lora.targets, "trained": lora.trained}
        graph, trains, frozen = nnx.split(
            add_lora(model, rank=lora.rank, alpha=lora.alpha, key=key, **choice), nnx.Param, ...
        )
        return nnx.merge(graph, trains, cast_floats(frozen, jnp.dtype(lora.frozen_dtype)))

    def build(rngs):
        model = Decoder(config, rngs=rngs)
        if packed:
            _pack_blank(model, packed.group)
        return adapt(model, rngs.params())

    def load_start(model):
        loaded, _ = pretrained.load(start, dtype=jnp.float32)
        loaded = adapt(loaded, jax.random.key(seed))
        # The same tree as the fresh model's, but for a config.json that knows of no longer context.
        leaves = [new.astype(old.dtype) for new, old in zip(*map(jax.tree.leaves, (loaded, model)), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(model), leaves)

    def loss(model: Decoder, batch, key, step):
        del key, step
        rows = {name: batch[name] for name in ("weights", "segments") if name in batch}
        return next_token_loss(model, batch["tokens"], mask=mask, remat=options.remat, chunk=options.chunk, **rows), {}

    def measure(model, split, blocks):
        model = unstack(model)
        if options.instructions:
            return _answer_loss(model, options.instructions.records(options.length, train=False)), {}
        stream = options.data.tokens(split)
        if blocks:
            stream = stream[: blocks * options.evaluation_length]
        return perplexity(model, stream, length=options.evaluation_length), {}

    def batches():
        data = options.instructions or options.data
        return data.batches(length=options.length, batch_size=batch_size, seed=seed)

    def export(model: Decoder, workdir: pathlib.Path):
        beside = pretrained.Folder(options.data.tokenizer_files())
        if options.lora.rank:
            save_adapter(workdir / "adapter", model, base=options.start)
            if packed:  # merged, it would be packed no more
                return
            model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), merge_lora(model))
        pretrained.save(workdir / "model", model, beside, overwrite=True)

    spec = {"tokens": jax.ShapeDtypeStruct((batch_size, options.length + 1), jnp.int32)}
    if options.instructions:
        shape = (batch_size, options.length)
        spec |= {
            "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
            "segments": jax.ShapeDtypeStruct(shape, jnp.int32),
        }
    return Task(
        build=build,
        loss=loss,
        batch_spec=spec,
        batches=batches,
        monitor=lambda model, key: measure(model, "validation", 32),
        evaluate=lambda model, key, workdir: measure(model, "test", options.evaluation_blocks),
        inference=lambda mesh: decode_step(
            lambda: _served(config, options.serving),
            batch_size=batch_size,
            slots=options.serving.slots,
            cache="bfloat16",
            mesh=mesh,
        ),
        pretrained=load_start if start else None,
        export=export,
    )


def _start(folder: str) -> str:
    """The folder of weights that is meant: itself, or what a run leaves in its workdir."""
    left = pathlib.Path(folder, "model")
    return str(left) if folder and (left / "config.json").is_file() else folder


def _awq_format(folder: str) -> AWQFormat | None:
    """How the linears of a folder are packed, None if they are not."""
    described = json.loads(pathlib.Path(folder, "config.json").read_bytes()).get("quantization_config")
    return None if described is None else AWQFormat.from_config(described)


def _answer_loss(model: Decoder, rows: list[Record]) -> dict[str, float]:
    """Mean cross-entropy of the answers' tokens, with full attention, a row at a time."""
    loss = jax.jit(
        lambda model, row: next_token_loss(model, row["tokens"], weights=row["weights"], segments=row["segments"])
    )
    rows = [{name: value[None] for name, value in row.items()} for row in rows]
    counts = [float(row["weights"].sum()) for row in rows]
    if not counts:
        raise ConfigError("instructions.held_out: no record is left to evaluate; hold out one or more.")
    return {"answer_loss": float(np.average([float(loss(model, row)) for row in rows], weights=counts))}


def _served(config: DecoderConfig, serving: Serving) -> Decoder:
    model = cast_floats(Decoder(config, rngs=nnx.Rngs(0)), jnp.bfloat16)
    if serving.weights == "int4":
        _pack_blank(model, serving.group)
    return model


def decode_step(build: Callable[[], Decoder], *, batch_size: int, slots: int, cache: str, mesh):
    """The jitted step from one token per row to the next, and its abstract arguments on the mesh.

    Args:
      build: makes the model; only its shapes are used.
      batch_size: rows.
      slots, cache: of `Decoder.empty_cache`, its slots and dtype.
      mesh: where weights are split as in training, but for those that fsdp would gather again at every step.
    """

    @functools.partial(jax.jit, donate_argnums=2)
    def step(model: Decoder, tokens, cache):
        hidden, cache = model(tokens, cache=cache)
        return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32), cache

    model = nnx.eval_shape(build)
    layout = tree_shardings(model, mesh, gathered=["embed"])
    model = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model, layout)
    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=batch_sharding(mesh))
    return step, (model, tokens, jax.eval_shape(lambda: model.empty_cache(batch_size, slots, cache)))


def _pack_blank(model: Decoder, group: int) -> None:
    """Puts packed linears in the place of a model's linears: of no weights, but the right shapes and dtypes."""
    for name in LINEARS.values():
        linear = getattr(model.blocks, name)
        depth, inputs, outputs = linear.kernel.shape
        size = inputs if group == -1 else group
        q = jnp.zeros((depth, inputs, outputs), jnp.uint8)
        side = jnp.ones((depth, inputs // size, outputs), linear.kernel.dtype)
        packed = jax.vmap(functools.partial(pack, group=size))(q, side, side)
        bias = None if linear.bias is None else linear.bias.get_value()
        setattr(model.blocks, name, QuantizedLinear(packed, bias, axes=linear.kernel.get_metadata()["axes"]))
