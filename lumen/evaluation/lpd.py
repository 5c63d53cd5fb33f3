"""What a trained LPD is judged by: its pictures, their quality, and how fast they come.

Three protocols, chosen by `EvaluationOptions.protocol`:

  digits   the embedded data: quality by an independently fitted classifier, parallel decoding against one token a
           step, locality order against random order, and the time of each part
  adm      ImageNet: 50 images of each class, against reference statistics, with Inception weights given by path
  latency  time per image at batch 1 and images per second at batch 64; needs no weights worth having
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lumen.evaluation.classifier import evaluate_samples, fit_digit_classifier
from lumen.evaluation.fid import evaluate_generation
from lumen.evaluation.inception import feature_extractor, load_inception
from lumen.evaluation.latency import seconds
from lumen.evaluation.pictures import image_grid
from lumen.generation.lpd import LPD, Sampling, generate_codes, generate_images
from lumen.generation.lpd.generate import Mode
from lumen.generation.lpd.order import Kind, make_order
from lumen.generation.lpd.schedule import group_of_rank, group_sizes
from lumen.generation.vq import VQModel, to_uint8

Digits = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images uint8 [n, S, S, 3], labels [n]


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What to generate and how to judge it.

    Attributes:
      protocol: "digits", "adm" or "latency".
      steps: groups of the parallel schedule.
      guidance: classifier-free guidance scale; 0 chooses the candidate with the smallest Fréchet distance to the
        validation digits, once, at the parallel schedule.
      candidates: guidance scales to choose from.
      order: kind of decoding order.
      repulsion_threshold: of the locality order.
      samples: images to generate.
      batch_size: images per program.
      seeds: sampling seeds of the comparison of orders.
      inception: path of the Inception weights; adm only.
      reference: path of the reference .npz; adm only.
      batches: batch sizes to measure latency at.
      runs: timed runs.
      warmup: runs before them.
    """

    protocol: Literal["digits", "adm", "latency"] = "digits"
    steps: int = 20
    guidance: float = 0.0
    candidates: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    order: Kind = "locality"
    repulsion_threshold: int = 2
    samples: int = 2000
    batch_size: int = 64
    seeds: int = 3
    inception: str = ""
    reference: str = ""
    batches: tuple[int, ...] = (1, 64)
    runs: int = 5
    warmup: int = 1


def evaluate_lpd(model: LPD, tokenizer: VQModel, key, options: EvaluationOptions, digits: Digits | None, workdir):
    """Runs the chosen protocol; returns (metrics, pictures)."""
    if options.protocol == "latency":
        return measure_latency(model, tokenizer, key, options), {}
    if options.protocol == "adm":
        return evaluate_adm(model, tokenizer, key, options), {}
    if digits is None:
        raise ValueError("evaluation.protocol='digits' judges digits; with data.name other than 'digits' use 'adm'.")
    return evaluate_digits(model, tokenizer, key, options, digits, pathlib.Path(workdir))


@functools.cache
def _generator(sizes: tuple[int, ...], order: Kind, repulsion: int, guided: bool):
    """One compiled program per schedule and order, for every guidance scale."""

    @jax.jit
    def generate(model, tokenizer, labels, keys, guidance):
        return generate_images(
            model,
            tokenizer,
            labels,
            keys,
            group_sizes=sizes,
            sampling=Sampling(guidance=guidance if guided else 1.0),
            order=order,
            repulsion_threshold=repulsion,
            mode=_mode(sizes),
        )

    return generate


def _mode(sizes: tuple[int, ...]) -> Mode:
    """A body for each of a few steps; for many, a few bodies or, where nearly all steps are equal, one."""
    if len(sizes) <= 8:
        return "unrolled"
    return "scan" if len(sizes) > 40 else "bucketed"


def sample(
    model: LPD,
    tokenizer: VQModel,
    labels: np.ndarray,
    key,
    options: EvaluationOptions,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    order: Kind | None = None,
) -> Iterator[np.ndarray]:
    """Batches of images uint8 [b, H, W, 3] for labels [n]; image i depends on fold_in(key, i) and its label."""
    sizes = group_sizes(model.config.tokens, steps or options.steps)
    guidance = guidance or options.guidance or 1.0
    generate = _generator(sizes, order or options.order, options.repulsion_threshold, guidance != 1.0)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(labels)))
    size = options.batch_size
    for start in tqdm(range(0, len(labels), size), desc=f"{len(sizes)} steps", leave=False, disable=None):
        rows = np.arange(start, start + size) % len(labels)  # the last batch is filled up, so nothing compiles twice
        images, _, _ = generate(model, tokenizer, jnp.asarray(labels[rows]), keys[rows], guidance)
        yield np.asarray(images)[: len(labels) - start]


def sample_grid(
    model: LPD, tokenizer: VQModel, key, options: EvaluationOptions, *, rows: int = 8, **changes
) -> np.ndarray:
    """A picture of `rows` samples of each of the first ten classes, a class per column."""
    classes = min(10, model.config.classes)
    labels = np.tile(np.arange(classes, dtype=np.int32), rows)
    return image_grid(np.concatenate(list(sample(model, tokenizer, labels, key, options, **changes))), columns=classes)


def evaluate_adm(model: LPD, tokenizer: VQModel, key, options: EvaluationOptions) -> dict[str, float]:
    """FID, sFID, Inception Score, precision and recall of `samples` images, labels in blocks, an order per image.

    Source: guided-diffusion evaluations/evaluator.py (metrics), mit-han-lab/lpd engine.py (what is generated).
    """
    per_class, rest = divmod(options.samples, model.config.classes)
    if rest or not per_class:
        raise ValueError(
            f"evaluation.samples={options.samples} is not a multiple of {model.config.classes} classes; papers use 50 "
            "of each."
        )
    labels = np.repeat(np.arange(model.config.classes, dtype=np.int32), per_class)
    features = feature_extractor(load_inception(options.inception))
    return evaluate_generation(sample(model, tokenizer, labels, key, options), options.reference, features)


def measure_latency(model: LPD, tokenizer: VQModel, key, options: EvaluationOptions) -> dict[str, Any]:
    """Seconds per image at batch 1 and images per second at batch 64, by part.

    Protocol of the paper: labels to pixels, guidance on, after a warm-up; the median of `runs`.
    "tokens" is decoding alone with orders given, "orders" their generation, "pixels" the tokenizer's decoder.
    """
    times = _times(model, tokenizer, key, options, (model.config.tokens, options.steps))
    return {f"{steps}_steps": result for steps, result in times.items()}


def _times(model, tokenizer, key, options, schedules: Sequence[int]) -> dict[int, dict[str, dict[str, float]]]:
    """{steps: {"batch_b": {part: seconds}}}; both schedules are timed in turn."""
    grid, guidance = (model.config.grid,) * 2, options.guidance or 1.0
    times: dict[int, dict[str, dict[str, float]]] = {steps: {} for steps in schedules}
    pixels = jax.jit(lambda tokenizer, codes: to_uint8(tokenizer.decode_codes(codes, grid=grid)))
    for batch in options.batches:
        keys, labels = jax.random.split(key, batch), jnp.arange(batch, dtype=jnp.int32) % model.config.classes
        programs = {}
        for steps in schedules:
            sizes = group_sizes(model.config.tokens, steps)
            given = {"group_sizes": sizes, "sampling": Sampling(guidance=guidance), "mode": _mode(sizes)}

            def order(keys, sizes=sizes):
                return jax.vmap(
                    lambda key: make_order(
                        options.order, key, sizes, grid, repulsion_threshold=options.repulsion_threshold
                    )
                )(keys)

            def decode(model, labels, orders, keys, given=given):
                return generate_codes(model, labels, orders, keys, **given)

            order, decode = jax.jit(order), jax.jit(decode)
            arguments = (model, labels, order(keys), keys)
            whole = _generator(sizes, options.order, options.repulsion_threshold, guidance != 1.0)
            programs |= {
                f"{steps} tokens": (decode, arguments),
                f"{steps} orders": (order, (keys,)),
                f"{steps} pixels": (pixels, (tokenizer, decode(*arguments))),
                f"{steps} whole": (whole, (model, tokenizer, labels, keys, guidance)),
            }
        measured = seconds(programs, runs=options.runs, warmup=options.warmup)
        for steps in schedules:
            parts = {part: measured[f"{steps} {part}"]["median"] for part in ("tokens", "orders", "pixels", "whole")}
            times[steps][f"batch_{batch}"] = {
                **{f"{part}_s": value for part, value in parts.items()},
                "images_per_s": batch / parts["whole"],
                "compile_s": measured[f"{steps} whole"]["compile"],
            }
    return times


def evaluate_digits(
    model: LPD, tokenizer: VQModel, key, options: EvaluationOptions, digits: Digits, workdir: pathlib.Path
):
    """The embedded protocol: quality and speed of parallel decoding next to one token a step, from the same weights.

    Everything is judged against the test digits, by a classifier that was fitted to the training digits and had no
    part in training the model. The guidance is chosen once, on the validation digits, and used throughout.

    Returns:
      Metrics: "guidance"; "schedules": for the parallel and the one-token schedule quality and times; "orders": for
      locality and random order at the parallel schedule, mean and standard deviation over seeds, from half as many
      samples each. Pictures: "samples", "decoding_order", "comparison".
    """
    from lumen.evaluation import lpd_figures  # needs matplotlib, of the `examples` extra

    classifier = fit_digit_classifier(*digits["train"])
    classes, tokens = model.config.classes, model.config.tokens

    def judge(count, split, seed, **changes):
        labels = np.arange(count, dtype=np.int32) % classes
        images = np.concatenate(
            list(sample(model, tokenizer, labels, jax.random.fold_in(key, seed), options, **changes))
        )
        return evaluate_samples(classifier, images, labels, digits[split][0])

    guidance, tried = options.guidance, {}
    if not guidance:
        tried = {scale: judge(500, "validation", 0, guidance=scale) for scale in options.candidates}
        guidance = min(tried, key=lambda scale: tried[scale]["frechet_distance"])
    options = dataclasses.replace(options, guidance=guidance)

    times = _times(model, tokenizer, key, options, (tokens, options.steps))
    schedules = {
        steps: {"quality": judge(options.samples, "test", 1, steps=steps), "times": times[steps]}
        for steps in (tokens, options.steps)
    }
    orders = {
        order: _mean_and_deviation(
            [judge(options.samples // 2, "test", 10 + seed, order=order) for seed in range(options.seeds)]
        )
        for order in ("locality", "random")
    }
    one, parallel = (schedules[steps]["times"]["batch_1"] for steps in (tokens, options.steps))
    metrics = {
        "guidance": guidance,
        "guidance_tried": {scale: result["frechet_distance"] for scale, result in tried.items()},
        "accuracy": schedules[options.steps]["quality"]["accuracy"],
        # How real digits fare that neither the classifier nor the model has seen.
        "real_digits": evaluate_samples(classifier, *digits["validation"], digits["test"][0]),
        "token_decoding_speedup": one["tokens_s"] / parallel["tokens_s"],
        "schedules": schedules,
        "orders": orders,
    }
    labels = np.arange(classes, dtype=np.int32)
    snapshots = {
        steps: _snapshots(model, tokenizer, labels, key, options, steps=steps) for steps in (tokens, options.steps)
    }
    pictures = {
        "samples": lpd_figures.samples(sample_grid(model, tokenizer, key, options, rows=10), classes),
        "decoding_order": lpd_figures.decoding_order(snapshots),
        "comparison": lpd_figures.comparison(metrics),
    }
    (workdir / "eval").mkdir(exist_ok=True, parents=True)
    (workdir / "eval" / "comparison.md").write_text(comparison_table(metrics))
    return metrics, pictures


def _mean_and_deviation(results: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    columns = {name: [result[name] for result in results] for name in results[0]}
    return {
        name: {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
        for name, values in columns.items()
    }


def _snapshots(model, tokenizer, labels, key, options, *, steps: int) -> dict[str, np.ndarray]:
    """For one image per class: when each cell was decoded, and the picture with the cells of each step filled in."""
    sizes = group_sizes(model.config.tokens, steps)
    grid, guidance = model.config.grid, options.guidance or 1.0
    generate = _generator(sizes, options.order, options.repulsion_threshold, guidance != 1.0)
    filled = jnp.asarray(np.resize(labels, options.batch_size))  # the batch that the samples were compiled for
    images, _, orders = generate(model, tokenizer, filled, jax.random.split(key, len(filled)), guidance)
    images, orders = images[: len(labels)], orders[: len(labels)]
    step_of_cell = np.empty((len(labels), model.config.tokens), np.int32)
    np.put_along_axis(step_of_cell, np.asarray(orders), group_of_rank(sizes)[None], axis=1)
    return {"images": np.asarray(images), "step_of_cell": step_of_cell.reshape(-1, grid, grid)}


def comparison_table(metrics: dict[str, Any]) -> str:
    """The schedules side by side, and the orders, as Markdown."""
    rows = [
        ("accuracy", lambda s: f"{s['quality']['accuracy']:.3f}"),
        ("Fréchet distance", lambda s: f"{s['quality']['frechet_distance']:.4f}"),
        ("diversity (real digits: 1)", lambda s: f"{s['quality']['diversity']:.2f}"),
        ("recall", lambda s: f"{s['quality']['recall']:.2f}"),
        ("distance to the nearest training digit", lambda s: f"{s['quality']['nearest_train']:.2f}"),
    ]
    for batch in next(iter(metrics["schedules"].values()))["times"]:
        number = batch.split("_")[1]
        rows += [
            (f"token decoding, batch {number}", lambda s, b=batch: f"{1e3 * s['times'][b]['tokens_s']:.1f} ms"),
            (f"order generation, batch {number}", lambda s, b=batch: f"{1e3 * s['times'][b]['orders_s']:.1f} ms"),
            (f"pixel decoding, batch {number}", lambda s, b=batch: f"{1e3 * s['times'][b]['pixels_s']:.1f} ms"),
            (f"labels to pixels, batch {number}", lambda s, b=batch: f"{1e3 * s['times'][b]['whole_s']:.1f} ms"),
        ]
    names = [f"{steps} steps" for steps in metrics["schedules"]] + ["real digits"]
    schedules = [*metrics["schedules"].values(), {"quality": metrics["real_digits"]}]
    lines = [f"guidance {metrics['guidance']}, chosen on the validation digits", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, show in rows:
        cells = [show(schedule) if "times" in schedule or "batch" not in title else "" for schedule in schedules]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| order, mean ± deviation over sampling seeds | accuracy | Fréchet distance | diversity |",
        "|---|---|---|---|",
    ]
    for order, result in metrics["orders"].items():
        cells = [
            f"{result[name]['mean']:.4f} ± {result[name]['deviation']:.4f}"
            for name in ("accuracy", "frechet_distance", "diversity")
        ]
        lines.append(f"| {order} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
