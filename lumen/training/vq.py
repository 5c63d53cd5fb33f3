"""Training of the VQ tokenizer, and the way other runs get at a trained one."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.evaluation.classifier import fit_digit_classifier
from lumen.evaluation.pictures import image_grid
from lumen.generation.perceptual import LPIPS, load_lpips
from lumen.generation.vq import (
    LossWeights,
    PatchDiscriminator,
    VQConfig,
    VQModel,
    code_frequencies,
    discriminator_loss,
    revive,
    to_uint8,
    vq_loss,
)
from lumen.io import pretrained
from lumen.io.names import vq as names
from lumen.training import data
from lumen.training.config import ConfigError, build
from lumen.training.loop import Pictures, Task


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Which images.

    Attributes:
      name: "digits" and "photographs" come with scikit-learn; "image_folder" is path/train and path/val with a folder
        per class; "parquet" is path/train*.parquet and path/val*.parquet with columns image and label.
      path: of the data set, for those that have one.
      size: pixels per side; larger images are resized and centre-cropped as ADM does.
      flip: mirror half of the images; not for digits.
      workers: processes that decode images; 0 uses threads.
    """

    name: Literal["digits", "photographs", "image_folder", "parquet"] = "digits"
    path: str = ""
    size: int = 32
    flip: bool = False
    workers: int = 0

    def source(self, split: Literal["train", "validation", "test"]):
        """The records of a split: {"image": uint8 [H, W, 3], "label": int32}. ImageNet's test split is its val."""
        if self.name == "digits":
            return data.digits(split, size=self.size)
        if self.name == "photographs":
            seeds = {"train": 0, "validation": 1, "test": 2}
            return data.photographs(size=self.size, crops=1000 if split == "train" else 64, seed=seeds[split])
        if not self.path:
            raise ConfigError(f"data.path: missing; name={self.name!r} wants the path of the data set.")
        part = "train" if split == "train" else "val"
        if self.name == "image_folder":
            return data.image_folder(pathlib.Path(self.path) / part)
        return data.image_parquet(str(pathlib.Path(self.path) / f"{part}*.parquet"))

    def arrays(self, split: Literal["train", "validation", "test"]) -> tuple[np.ndarray, np.ndarray]:
        """All images uint8 [n, H, W, 3] and labels [n] of a split small enough to hold."""
        source = self.source(split)
        records = [source[i] for i in range(len(source))]
        return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])

    def batches(self, split, *, batch_size: int, seed: int = 0, repeat: bool = True):
        """Batches of uint8 [B, size, size, 3] images and labels."""
        transforms = (
            [] if self.name in ("digits", "photographs") else [data.on_image(data.adm_centre_crop, size=self.size)]
        )
        if self.flip and repeat:
            transforms.append(data.random_flip)
        # One pass is made by one process for itself; an endless stream is shared by all.
        index, count = (None, None) if repeat else (0, 1)
        return data.make_batches(
            self.source(split),
            batch_size=batch_size,
            seed=seed,
            transforms=transforms,
            repeat=repeat,
            workers=self.workers,
            process_index=index,
            process_count=count,
        )


@dataclasses.dataclass(frozen=True)
class TokenizerRef:
    """A trained tokenizer.

    Attributes:
      path: a workdir of a tokenizer run, or a file with LlamaGen's names (.safetensors, or vq_ds16_c2i.pt).
      model: for a file: sizes that differ from the published VQ-16.
    """

    path: str = ""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self) -> VQConfig:
        """The tokenizer's sizes."""
        if self.path:
            self.weights()  # says so if they are missing
        sizes = pathlib.Path(self.path) / "model.json"
        if self.path and sizes.is_file():
            return build(VQConfig, json.loads(sizes.read_text()), str(sizes))
        return vq_config(self.model)

    def weights(self) -> pathlib.Path:
        """The file that holds the weights."""
        if not self.path:
            raise ConfigError(
                "tokenizer.path: missing; give the workdir of a tokenizer run (experiments/lpd/digits_tokenizer.py "
                "makes one), or a file of published weights such as vq_ds16_c2i.pt."
            )
        path = pathlib.Path(self.path)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"tokenizer.path={self.path}: no weights there; train the tokenizer first.")
        return path

    def sha256(self) -> str:
        """The SHA-256 of the weights' file, which code files carry."""
        with self.weights().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load(self) -> VQModel:
        """The tokenizer with its weights."""
        weights = self.weights()
        model = VQModel(self.config(), rngs=nnx.Rngs(0))
        return pretrained.load(weights, model, names.RULES, names.IGNORED)


def vq_config(options: dict[str, Any]) -> VQConfig:
    """Sizes from a configuration section: {"size": "vq16" or "debug"} and whatever differs."""
    return sized(VQConfig, {"size": "vq16", **options}, ("vq16", "debug"), "the tokenizer's model")


def sized(kind, options: dict[str, Any], sizes: tuple[str, ...], where: str, *arguments):
    """A config dataclass from the named constructor options["size"], changed by the other options."""
    size = options.get("size")
    if size not in sizes:
        raise ConfigError(f"{where}.size: came {size!r}; wanted one of {', '.join(map(repr, sizes))}.")
    changes = {name: value for name, value in options.items() if name != "size"}
    return build(kind, dataclasses.asdict(getattr(kind, size)(*arguments)) | changes, where)


@dataclasses.dataclass(frozen=True)
class VQOptions:
    """Options of task "vq".

    Attributes:
      model: {"size": ...} and changes, see `vq_config`.
      data: training images.
      loss: weights of the loss terms; the adversarial ones need `discriminator`.
      revive_every: every so many steps of the first 70 %, codes that the batch does not use move onto its latents; 0 is
        never, as published. Keeps a small codebook alive in a short training.
      discriminator: train a PatchGAN beside the tokenizer.
      discriminator_layers: its stride-2 convolutions; 3 see patches of 70 pixels.
      perceptual: paths of the two files of LPIPS weights, VGG-16 and its linear heads; empty leaves the term out.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: ImageData = dataclasses.field(default_factory=ImageData)
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)
    revive_every: int = 0
    discriminator: bool = False
    discriminator_layers: int = 3
    perceptual: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.perceptual) not in (0, 2):
            raise ValueError(
                f"perceptual={self.perceptual}; wanted two paths, of VGG-16 and of the LPIPS heads, or none."
            )


class TokenizerTraining(nnx.Module):
    """What a tokenizer run holds: the tokenizer, perhaps its discriminator, and perhaps LPIPS, which does not train."""

    def __init__(self, config: VQConfig, options: VQOptions, *, rngs: nnx.Rngs):
        self.tokenizer = VQModel(config, rngs=rngs)
        self.discriminator = None
        if options.discriminator:
            self.discriminator = PatchDiscriminator(layers=options.discriminator_layers, rngs=rngs)
        self.perceptual = LPIPS() if options.perceptual else None


def make_task(options: VQOptions, *, batch_size: int, seed: int, total_steps: int, workdir: pathlib.Path) -> Task:
    """The parts of a tokenizer run."""
    del workdir
    config, images = vq_config(options.model), options.data
    if images.size % config.stride:
        raise ConfigError(f"vq.data.size={images.size} is not a multiple of the tokenizer's stride {config.stride}.")
    grid = images.size // config.stride

    def loss(model: TokenizerTraining, batch, key, step):
        pictures = data.to_model(batch["image"]).astype(model.tokenizer.codebook.dtype)
        held = jax.lax.stop_gradient(model.discriminator)
        value, made = vq_loss(
            model.tokenizer, pictures, options.loss, perceptual=model.perceptual, discriminator=held, step=step, key=key
        )
        metrics = made.metrics
        if model.discriminator is not None:
            judged, extra = discriminator_loss(model.discriminator, pictures, made.images, options.loss, step=step)
            value, metrics = value + judged, metrics | {f"discriminator_{k}": v for k, v in extra.items()}
        return value, metrics

    def adjust(model: TokenizerTraining, batch, key, step):
        def revived(codebook):
            codes, latents = model.tokenizer.encode(data.to_model(batch["image"]))
            frequencies = code_frequencies(codes, config.codebook_size)
            return revive(model.tokenizer, latents, frequencies, key)[0].codebook[...].astype(codebook.dtype)

        due = (step % options.revive_every == 0) & (step > 0) & (step < 0.7 * total_steps)
        codebook = jax.lax.cond(due, revived, lambda codebook: codebook, model.tokenizer.codebook[...])
        model.tokenizer.codebook[...] = codebook
        return model

    @jax.jit
    def reconstruct(model: TokenizerTraining, pictures):
        codes, _ = model.tokenizer.encode(data.to_model(pictures))
        return to_uint8(model.tokenizer.decode_codes(codes, grid=(grid, grid))), codes

    def reconstruct_split(model, split, limit):
        originals, labels, results, codes = [], [], [], []
        for batch in images.batches(split, batch_size=50, repeat=False):
            new, new_codes = reconstruct(model, batch["image"])
            keep = batch["mask"]
            for parts, value in zip(
                (originals, labels, results, codes), (batch["image"], batch["label"], new, new_codes), strict=True
            ):
                parts.append(np.asarray(value)[keep])
            if sum(map(len, originals)) >= limit:
                break
        return [np.concatenate(parts)[:limit] for parts in (originals, labels, results, codes)]

    def measure(model, split, limit) -> tuple[dict[str, float], Pictures]:
        originals, labels, results, codes = reconstruct_split(model, split, limit)
        error = np.mean((originals / 255.0 - results / 255.0) ** 2)
        metrics = {
            "psnr": float(-10 * np.log10(max(error, 1e-10))),
            "codebook_usage": float((code_frequencies(jnp.asarray(codes), config.codebook_size) > 0).mean()),
        }
        if images.name == "digits":
            classifier = fit_digit_classifier(*images.arrays("train"))
            metrics["accuracy"] = float((classifier.predict(results) == labels).mean())
        pairs = np.stack([originals[:32], results[:32]], axis=1).reshape(-1, *originals.shape[1:])
        return metrics, {"reconstructions": image_grid(pairs, columns=16)}

    def inference(mesh):
        abstract = nnx.eval_shape(lambda: TokenizerTraining(config, options, rngs=nnx.Rngs(0)))
        shape = (batch_size, images.size, images.size, 3)
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        return reconstruct, (abstract, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding))

    def load(model: TokenizerTraining) -> TokenizerTraining:
        model = nnx.clone(model)
        model.perceptual = load_lpips(*options.perceptual)
        return model

    def export(model: TokenizerTraining, workdir: pathlib.Path):
        pretrained.save(workdir / "model.safetensors", model.tokenizer, names.RULES)
        (workdir / "model.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")

    return Task(
        build=lambda rngs: TokenizerTraining(config, options, rngs=rngs),
        loss=loss,
        batch_spec={
            "image": jax.ShapeDtypeStruct((batch_size, images.size, images.size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        },
        batches=lambda: images.batches("train", batch_size=batch_size, seed=seed),
        monitor=lambda model, key: measure(model, "validation", 64),
        evaluate=lambda model, key, workdir: measure(model, "test", 1 << 30),
        inference=inference,
        adjust=adjust if options.revive_every else None,
        pretrained=load if options.perceptual else None,
        export=export,
    )
