"""Trains anything in lumen.

  python train.py --config=experiments/lpd/digits.py --workdir=runs/digits
  python train.py --config=experiments/lpd/digits.py --workdir=runs/digits --config.optimizer.learning_rate=1e-3
  python train.py --config=experiments/lpd/imagenet_256.py --compile_only --topology=h200:8

The workdir holds config.json, metrics.jsonl, checkpoints/ and media/. Running the same command again resumes from the
newest intact checkpoint; SIGTERM saves and stops. --compile_only compiles the same step for hardware that is absent and
prints its memory, FLOPs and communication per device.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from lumen import plan
from lumen.io import DataError
from lumen.io.checkpoint import CheckpointError
from lumen.sparse.tensor import SparseError
from lumen.training import detection, duo_attention, language, lpd, passkey, segmentation, vq
from lumen.training.config import ConfigError, build_all, load_config
from lumen.training.loop import NonFiniteError, Run, TrainConfig, WorkdirError, prepare_workdir, set_up, train
from lumen.training.metrics import MetricsError

# task name -> (its options, what makes it); the configuration section of that name holds the options.
TASKS = {
    "detection": (detection.DetectionOptions, detection.make_task),
    "duo_attention": (duo_attention.DuoOptions, duo_attention.make_task),
    "language": (language.LanguageOptions, language.make_task),
    "lidar_segmentation": (segmentation.SegmentationOptions, segmentation.make_task),
    "lpd": (lpd.LPDOptions, lpd.make_task),
    "passkey": (passkey.PasskeyOptions, passkey.make_passkey_task),
    "vq": (vq.VQOptions, vq.make_task),
}

# What went wrong outside the code: said in one line, without a traceback.
EXPECTED_ERRORS = (
    ConfigError,
    WorkdirError,
    CheckpointError,
    MetricsError,
    NonFiniteError,
    DataError,
    SparseError,
    OSError,
)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that both entry points have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment: experiments/<system>/<name>.py")
    parser.add_argument("--config.KEY", metavar="VALUE", dest="override", help="replaces a value of the experiment")
    parser.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="where the run keeps everything it writes")
    parser.add_argument(
        "--compile_only", action="store_true", help="compile for --topology, print the plan, run nothing"
    )
    parser.add_argument("--topology", metavar="NAME", help="absent hardware: h200:8, h200:32x8, v5p:2x2x2, cpu:8, ...")
    parser.add_argument(
        "--distributed", action="store_true", help="one process of a multi-host job (SLURM, Cloud TPU, Kubernetes)"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="with --distributed, where no launcher says it")
    parser.add_argument("--processes", type=int, metavar="N", help="with --coordinator: processes in all")
    parser.add_argument("--process", type=int, metavar="I", help="with --coordinator: which of them this is")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags and configuration overrides."""
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    flags = parser.parse_args([argument for argument in argv if not argument.startswith("--config.")])
    if flags.compile_only != (flags.topology is not None):
        parser.error("--compile_only and --topology go together")
    if not flags.compile_only and flags.workdir is None:
        parser.error("--workdir is missing")
    if not flags.distributed and (flags.coordinator, flags.processes, flags.process) != (None, None, None):
        parser.error("--coordinator, --processes and --process go with --distributed")
    return flags, overrides


def start_processes(flags: argparse.Namespace) -> None:
    """Joins the other processes of a multi-host job."""
    if not flags.distributed:
        return
    try:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: cannot join the other processes: {error} Start one process per host under SLURM, "
            "Kubernetes or on Cloud TPU, or give --coordinator, --processes and --process."
        ) from error


def configure(flags: argparse.Namespace, overrides: Sequence[str], devices=None) -> tuple[Run, dict[str, Any]]:
    """From an experiment to a run on a mesh, and the resolved configuration; nothing is compiled yet."""
    tree = load_config(flags.config, overrides)
    name = tree.get("task")
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(f"config.task: came {name!r}; wanted one of {', '.join(map(repr, TASKS))}.")
    kind, make_task = TASKS[name]
    section = tree.pop(name, {})
    config, options = build_all((TrainConfig, tree, "config"), (kind, section, f"config.{name}"))
    workdir = flags.workdir or pathlib.Path("runs/plan")
    try:
        run_options = {"batch_size": config.batch_size, "seed": config.seed, "total_steps": config.total_steps}
        task = make_task(options, workdir=workdir, **run_options)
        run = set_up(config, task, devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return run, dataclasses.asdict(config) | {name: dataclasses.asdict(options)}


def compile_elsewhere(script: str, argv: Sequence[str], topology: str) -> int:
    """Runs this program again in a process of its own that is set up to compile for a topology."""
    try:
        return plan.run_isolated([script, *argv], topology=topology)[0]
    except ValueError as error:
        raise ConfigError(f"--topology={topology}: {error}") from error


def find_topology(name: str) -> plan.Topology:
    """The devices of a topology, in the process that compiles."""
    try:
        return plan.topology(name)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology={name}: {error}") from error


def compile_plan(program, abstract_arguments, topology, mesh, title: str) -> int:
    """Compiles a program for a topology, prints what it needs, and returns an exit status."""
    with jax.set_mesh(mesh):
        made = plan.compile_plan(program, *abstract_arguments, topology=topology, mesh=mesh)
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    print(f"{title}\nmesh: {shape}\n{plan.format_plan(made)}", flush=True)
    print(plan.plan_json(made))
    return 0 if made.fits else 1


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit status."""
    parser = arguments(__doc__)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="trace N steps into WORKDIR/profile")
    flags, overrides = parse(parser, argv)
    try:
        if flags.compile_only and not plan.in_child():
            return compile_elsewhere(__file__, argv, flags.topology)
        if flags.compile_only:
            topology = find_topology(flags.topology)
            run, _ = configure(flags, overrides, topology.devices)
            key = jax.eval_shape(lambda: jax.random.key(0))
            title = f"training step of {flags.config}, global batch {run.config.batch_size}"
            return compile_plan(run.step, (run.abstract_state, run.abstract_batch(), key), topology, run.mesh, title)
        start_processes(flags)
        run, resolved = configure(flags, overrides)
        prepare_workdir(flags.workdir, resolved)
        with jax.set_mesh(run.mesh):
            metrics = train(run, flags.workdir, profile_steps=flags.profile)
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if jax.process_index() == 0:
        print(json.dumps(metrics), flush=True)
    return 0


if __name__ == "__main__":
    # By force: importing Orbax has made absl set up logging already.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    sys.exit(main(sys.argv[1:]))
