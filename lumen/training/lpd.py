"""Training of LPD: random orders, random groupings, codes of a frozen tokenizer."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.evaluation.lpd import EvaluationOptions, evaluate_lpd, sample_grid
from lumen.generation.lpd import LPD, LPDConfig, Sampling, generate_images, lpd_loss, resize_positions
from lumen.generation.lpd.schedule import group_of_rank, group_sizes, training_schedules
from lumen.generation.vq import VQModel
from lumen.io import pretrained
from lumen.io.names import lpd as names
from lumen.layers import freeze, unstack
from lumen.sharding import batch_sharding, tree_shardings
from lumen.training import data
from lumen.training.config import ConfigError
from lumen.training.loop import Task
from lumen.training.vq import ImageData, TokenizerRef, sized

SIZES = ("l", "xl", "xxl", "debug")


@dataclasses.dataclass(frozen=True)
class LPDOptions:
    """Options of task "lpd".

    Attributes:
      model: {"size": "l", "xl", "xxl" or "debug"} and changes to LPDConfig.
      image_size: pixels; with the tokenizer's stride it gives the token grid.
      tokenizer: the VQ model whose codes are predicted.
      data: images, tokenised by the training step; or pre-tokenised when `codes` is set.
      codes: a folder of code files: read if it is there, else written from `data` once, before training. The word
        "workdir" stands for `codes/` in the working directory.
      shifts: also tokenise every image moved by up to so many pixels each way (variants of its codes); a small data
        set grows by it.
      start: weights to start from, with the published names; a position table of another grid is resized.
      label_drop: share of samples trained on the null class.
      remat: recompute each block in the backward pass.
      evaluation: what the end of training is judged by.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int = 256
    tokenizer: TokenizerRef = dataclasses.field(default_factory=TokenizerRef)
    data: ImageData = dataclasses.field(default_factory=ImageData)
    codes: str = ""
    shifts: int = 0
    start: str = ""
    label_drop: float = 0.1
    remat: bool = False
    evaluation: EvaluationOptions = dataclasses.field(default_factory=EvaluationOptions)


class LPDTraining(nnx.Module):
    """What an LPD run holds: the transformer, which trains, and the tokenizer, which does not."""

    def __init__(self, config: LPDConfig, tokenizer: VQModel, *, rngs: nnx.Rngs):
        self.lpd = LPD(config, rngs=rngs)
        self.tokenizer: VQModel = freeze(tokenizer)


def make_task(options: LPDOptions, *, batch_size: int, seed: int, total_steps: int, workdir: pathlib.Path) -> Task:
    """The parts of an LPD run."""
    del total_steps
    tokenizer_config = options.tokenizer.config()
    if options.image_size % tokenizer_config.stride:
        raise ConfigError(
            f"lpd.image_size={options.image_size} is not a multiple of the tokenizer's stride "
            f"{tokenizer_config.stride}."
        )
    grid = options.image_size // tokenizer_config.stride
    fixed = {"grid": grid, "vocabulary": tokenizer_config.codebook_size}
    config = sized(LPDConfig, {**options.model, **fixed}, SIZES, "lpd.model")
    schedules = training_schedules(config.tokens)
    # [schedules, N]: one program serves them all, the step draws a row.
    groups_table = jnp.asarray(np.stack([group_of_rank(sizes) for sizes in schedules]))

    def loss(model: LPDTraining, batch, key, step):
        del step
        order_key, schedule_key, drop_key, dropout_key = jax.random.split(key, 4)
        codes = batch["codes"] if "codes" in batch else _encode(model.tokenizer, batch["image"])
        count = codes.shape[0]
        orders = jax.vmap(lambda key: jax.random.permutation(key, config.tokens))(jax.random.split(order_key, count))
        groups = groups_table[jax.random.randint(schedule_key, (), 0, len(schedules))]
        dropped = jax.random.bernoulli(drop_key, options.label_drop, (count,))
        logits = model.lpd(codes, batch["label"], orders, groups, dropped=dropped, key=dropout_key, remat=options.remat)
        return lpd_loss(logits, codes, orders), {}

    def batches():
        if not options.codes:
            return options.data.batches("train", batch_size=batch_size, seed=seed)
        folder = workdir / "codes" if options.codes == "workdir" else pathlib.Path(options.codes)
        if not folder.exists() and jax.process_index() == 0:
            _tokenize(folder, options, tokenizer_config, grid)
        expect = {"grid": [grid, grid], "vocabulary": config.vocabulary}
        if options.tokenizer.path:
            expect["tokenizer_sha256"] = options.tokenizer.sha256()
        source = data.codes(folder, expect=expect)
        return data.make_batches(source, batch_size=batch_size, seed=seed, transforms=[data.random_variant])

    label = {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    size = options.data.size
    inputs = (
        {"codes": jax.ShapeDtypeStruct((batch_size, config.tokens), jnp.int32)}
        if options.codes
        else {"image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)}
    )

    def load(model: LPDTraining) -> LPDTraining:
        tokenizer = options.tokenizer.load()
        lpd = _load_lpd(options.start, config) if options.start else model.lpd
        return _assemble(lpd, tokenizer)

    def inference(mesh):
        steps = options.evaluation.steps
        sampling = Sampling(guidance=options.evaluation.guidance or 1.0)

        def program(model: LPDTraining, labels, keys):
            return generate_images(
                model.lpd,
                model.tokenizer,
                labels,
                keys,
                group_sizes=group_sizes(config.tokens, steps),
                sampling=sampling,
            )

        abstract = nnx.eval_shape(
            lambda: LPDTraining(config, VQModel(tokenizer_config, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
        )
        layout = tree_shardings(abstract, mesh, gathered=["embed"])
        # Weights are served in bfloat16; batch over data and fsdp.
        model = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s), abstract, layout)
        rows = batch_sharding(mesh)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows)
        return jax.jit(program), (model, jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows), keys)

    def monitor(model: LPDTraining, key):
        picture = sample_grid(unstack(model.lpd), model.tokenizer, key, options.evaluation)
        return {}, {"samples": picture}

    return Task(
        build=lambda rngs: LPDTraining(config, VQModel(tokenizer_config, rngs=rngs), rngs=rngs),
        loss=loss,
        batch_spec=inputs | label,
        batches=batches,
        monitor=monitor,
        evaluate=lambda model, key, workdir: evaluate_lpd(
            unstack(model.lpd), model.tokenizer, key, options.evaluation, _real_digits(options), workdir
        ),
        inference=inference,
        pretrained=load,
        export=lambda model, workdir: pretrained.save(workdir / "model.safetensors", model.lpd, names.RULES),
    )


def _assemble(lpd: LPD, tokenizer: VQModel) -> LPDTraining:
    training = nnx.eval_shape(lambda: LPDTraining(lpd.config, tokenizer, rngs=nnx.Rngs(0)))
    training.lpd, training.tokenizer = lpd, freeze(tokenizer)
    return training


def _load_lpd(path: str, config: LPDConfig) -> LPD:
    """Published or exported weights; a position table of another square grid is resized to ours."""
    tensors = pretrained.read(path)
    rows = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 1 + config.tokens
    given = dataclasses.replace(config, grid=math.isqrt(rows - 1))
    model = pretrained.from_original(
        tensors, LPD(given, rngs=nnx.Rngs(0)), names.RULES, names.IGNORED, prefix="module."
    )
    if given.grid != config.grid:
        model.position_embedding = nnx.Param(
            resize_positions(model.position_embedding[...], config.grid), axes=(None, "embed")
        )
        model.config = config
    return model


def _encode(tokenizer: VQModel, images):
    return jax.lax.stop_gradient(tokenizer.encode(data.to_model(images))[0])


def _tokenize(folder: pathlib.Path, options: LPDOptions, tokenizer_config, grid: int) -> None:
    """Writes code files: every training image, its mirror image where images are flipped, and its shifts."""
    tokenizer = options.tokenizer.load()
    images = dataclasses.replace(options.data, flip=False)
    encode = jax.jit(_encode)
    moves = [(0, 0)] + [
        (y, x)
        for y in range(-options.shifts, options.shifts + 1)
        for x in range(-options.shifts, options.shifts + 1)
        if (y, x) != (0, 0)
    ]

    def variants(pictures):
        for y, x in moves:
            yield np.roll(pictures, (y, x), axis=(1, 2)) if (y, x) != (0, 0) else pictures
        if options.data.flip:
            yield pictures[:, :, ::-1]

    def coded():
        for batch in images.batches("train", batch_size=64, repeat=False):
            codes = np.stack([np.asarray(encode(tokenizer, v)) for v in variants(batch["image"])], axis=1)
            yield {"codes": codes, "label": batch["label"], "mask": batch["mask"]}

    meta = {
        "grid": [grid, grid],
        "vocabulary": tokenizer_config.codebook_size,
        "tokenizer_sha256": options.tokenizer.sha256(),
        "source": options.data.name,
    }
    data.write_codes(folder, coded(), meta, total=len(images.source("train")))


def _real_digits(options: LPDOptions):
    """Images and labels of the splits, where the embedded metric applies."""
    if options.data.name != "digits":
        return None
    return {split: options.data.arrays(split) for split in ("train", "validation", "test")}
