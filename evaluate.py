"""Evaluates a run of train.py: metrics and pictures by the protocol of its experiment.

  python evaluate.py --config=experiments/lpd/digits.py --workdir=runs/digits
  python evaluate.py --config=experiments/lpd/digits.py --workdir=runs/digits --checkpoint=1500
  python evaluate.py --config=experiments/lpd/latency_l.py --workdir=runs/latency --random_weights
  python evaluate.py --config=experiments/lpd/imagenet_256.py --compile_only --topology=h200:8

Writes WORKDIR/eval/metrics.json and pictures beside it. --compile_only compiles the inference program that evaluation
spends its time in, with the experiment's batch size as its global batch.
"""

import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
from flax import nnx
from PIL import Image

from lumen import plan
from lumen.io.checkpoint import Checkpointer
from lumen.training.config import ConfigError
from lumen.training.loop import TrainState
from train import (
    EXPECTED_ERRORS,
    arguments,
    compile_elsewhere,
    compile_plan,
    configure,
    find_topology,
    parse,
    start_processes,
)


def restored_model(run, workdir, checkpoint: int | None):
    """The model of a checkpoint, by default the newest intact one, and its step."""
    wanted = run.abstract_state._replace(opt_state=None)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        restored = checkpointer.restore(wanted._asdict(), step=checkpoint, partial=True)
    if restored is None:
        raise ConfigError(
            f"--workdir={workdir}: holds no checkpoint; train first, with the same --config and --workdir."
        )
    step, state, _ = restored
    return run.model(TrainState(**state)), step


def write(folder: pathlib.Path, metrics, pictures) -> None:
    """metrics.json, whole or not at all, and pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(temporary, folder / "metrics.json")
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit status."""
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest that is intact")
    parser.add_argument("--random_weights", action="store_true", help="no checkpoint: for measuring speed")
    flags, overrides = parse(parser, argv)
    try:
        if flags.compile_only and not plan.in_child():
            return compile_elsewhere(__file__, argv, flags.topology)
        if flags.compile_only:
            topology = find_topology(flags.topology)
            run, _ = configure(flags, overrides, topology.devices)
            program, abstract = run.task.inference(run.mesh)
            title = f"inference of {flags.config}, global batch {run.config.batch_size}"
            return compile_plan(program, abstract, topology, run.mesh, title)
        start_processes(flags)
        run, _ = configure(flags, overrides)
        if flags.random_weights:
            model, step = run.task.build(nnx.Rngs(jax.random.key(run.config.seed, impl="rbg"))), 0
        else:
            model, step = restored_model(run, flags.workdir, flags.checkpoint)
        with jax.set_mesh(run.mesh):
            metrics, pictures = run.task.evaluate(model, jax.random.key(run.config.seed + 2), flags.workdir)
        if jax.process_index() == 0:
            write(flags.workdir / "eval", {"step": step, **metrics}, pictures)
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if jax.process_index() == 0:
        print(json.dumps({"step": step, **metrics}), flush=True)
    return 0


if __name__ == "__main__":
    # By force: importing Orbax has made absl set up logging already.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    sys.exit(main(sys.argv[1:]))
