"""Training of DuoAttention's gates, and what comes out of it: a pattern folder, and how good its choice of heads is."""

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.attention import Streaming
from lumen.evaluation.duo_attention import choices_picture, compare_choices, gates_picture
from lumen.io.head_patterns import read_pattern, write_pattern
from lumen.kv_cache import StreamingHeads
from lumen.language import pretrained
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.layers import unstack
from lumen.long_context.duo_attention import GatedDecoder, clip_gates, gate_loss, retrieval_heads
from lumen.training.language import SIZES, decode_step
from lumen.training.loop import Task
from lumen.training.passkey import PasskeyData
from lumen.training.step import cast_floats
from lumen.training.vq import sized


@dataclasses.dataclass(frozen=True)
class Deployment:
    """How the model will run once its heads are chosen.

    Attributes:
      sparsity: share of streaming heads.
      sink, recent: tokens that streaming heads keep, beside the newest.
      slots: tokens that retrieval heads hold in the decode step that `--compile_only` of evaluate.py compiles.
      cache: how that step keeps keys and values.
      pattern: a folder of gates, of `read_pattern`, that says which heads it has; "": the same number in every layer.
    """

    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256
    slots: int = 131_072
    cache: Literal["bfloat16", "int8", "int4"] = "bfloat16"
    pattern: str = ""


@dataclasses.dataclass(frozen=True)
class DuoOptions:
    """Options of task "duo_attention".

    Attributes:
      start: a folder with published weights, 4-bit ones too; or "", with the sizes in `model`, to compile only.
      model: {"size": "llama3_8b", "qwen25_7b" or "debug"} and changes to DecoderConfig.
      data: passkey samples.
      sink, recent, block: what streaming heads see while gates train, see `Streaming`; block=128 is the original's
        default kernel.
      branch: see `gated_hidden`.
      regularisation: λ, the price of full attention.
      remat: recompute each layer in the backward pass.
      deployment: what the choice of heads is judged with.
      evaluation_samples: of the test text, of the longest kind.
      random_choices: sets of heads drawn for comparison, for each share of streaming heads; 0: none.
      sparsities: shares of streaming heads that are compared.
    """

    start: str = ""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: PasskeyData = dataclasses.field(default_factory=PasskeyData)
    sink: int = 128
    recent: int = 256
    block: int = 1
    branch: Literal["teacher", "student"] = "teacher"
    regularisation: float = 0.05
    remat: bool = True
    deployment: Deployment = dataclasses.field(default_factory=Deployment)
    evaluation_samples: int = 64
    random_choices: int = 20
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self):
        if bool(self.model) == bool(self.start):
            raise ValueError("give either start (published weights) or model (sizes, to compile), and not both.")


def make_task(options: DuoOptions, *, batch_size: int, seed: int, total_steps: int, workdir: pathlib.Path) -> Task:
    """The parts of a run that trains gates."""
    del workdir
    if options.start:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pretrained.load(options.start)[0])
        config = shapes.config
    else:
        shapes, config = None, sized(DecoderConfig, options.model, SIZES, "duo_attention.model")
    seen = Streaming(options.sink, options.recent, block=options.block)
    deployed = options.deployment

    def build(rngs: nnx.Rngs) -> GatedDecoder:
        if shapes is None:
            return GatedDecoder(Decoder(config, rngs=rngs))
        # The weights come from `load`; packed ones are other arrays than a fresh model's.
        return GatedDecoder(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def loss(model: GatedDecoder, batch, key, step):
        del key, step
        return gate_loss(
            model.decoder,
            model.gates[...],
            batch["tokens"],
            batch["labels"],
            regularisation=options.regularisation,
            streaming=seen,
            branch=options.branch,
            remat=options.remat,
        )

    def clamp(model: GatedDecoder, batch, key, step):
        """After each update, which is the original's "at the start of each step"."""
        del batch, key, step
        model.gates[...] = clip_gates(model.gates[...])
        return model

    def load(model: GatedDecoder) -> GatedDecoder:
        del model
        return GatedDecoder(pretrained.load(options.start)[0])

    def monitor(model: GatedDecoder, key):
        del key
        gates = np.asarray(model.gates[...])
        return {"gates_above_half": float((gates > 0.5).mean())}, {"gates": gates_picture(gates)}

    def evaluate(model: GatedDecoder, key, workdir):
        del key, workdir
        gates = np.asarray(model.gates[...], np.float64)
        streaming = Streaming(deployed.sink, deployed.recent, includes_self=False)
        results = compare_choices(
            model.decoder,
            gates,
            options.data.fixed("test", options.evaluation_samples, seed),
            streaming=streaming,
            sparsities=options.sparsities,
            random_choices=options.random_choices,
        )
        pictures = {"gates": gates_picture(gates), "choices": choices_picture([results])}
        return {"gates": gates.tolist(), **results}, pictures

    def export(model: GatedDecoder, workdir: pathlib.Path):
        samples = options.data.samples
        write_pattern(
            workdir / "pattern",
            model.gates[...],
            model_name=options.start,
            dataset_name=options.data.text.name,
            num_steps=total_steps,
            batch_size=batch_size,
            max_length=samples.longest,
            context_length_min=samples.shortest,
            context_length_max=samples.longest,
            context_lengths_num_intervals=samples.lengths,
            depth_ratio_num_intervals=samples.depths,
            min_needle_depth_ratio=samples.first_depth,
            max_needle_depth_ratio=samples.last_depth,
            num_passkeys=samples.passkeys,
            passkey_length=samples.words,
            sink_size=options.sink,
            recent_size=options.recent,
            reg_weight=options.regularisation,
            streaming_attn_implementation="blocksparse" if options.block > 1 else "sdpa",
            seed=seed,
        )

    return Task(
        build=build,
        loss=loss,
        batch_spec=options.data.batch_spec(batch_size),
        batches=lambda: options.data.batches(batch_size=batch_size, seed=seed),
        monitor=monitor,
        evaluate=evaluate,
        inference=lambda mesh: decode_step(
            lambda: _deployed(config, deployed),
            batch_size=batch_size,
            slots=deployed.slots,
            cache=deployed.cache,
            mesh=mesh,
        ),
        adjust=clamp,
        pretrained=load if options.start else None,
        export=export,
    )


def _deployed(config: DecoderConfig, deployment: Deployment) -> Decoder:
    """A model of no weights with two kinds of cache; without a pattern every layer has the same share of each."""
    gates = np.ones((config.depth, config.kv_heads))
    if deployment.pattern:
        gates, _ = read_pattern(deployment.pattern, gates.shape)
    chosen = retrieval_heads(gates, deployment.sparsity, per_layer=not deployment.pattern)
    heads = StreamingHeads(tuple(chosen.sum(axis=1).tolist()), deployment.sink, deployment.recent)
    model = Decoder(dataclasses.replace(config, streaming=heads), rngs=nnx.Rngs(0))
    return unstack(cast_floats(model, jnp.bfloat16))
