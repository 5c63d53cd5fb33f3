"""The training loop: restore, step, record, evaluate, save."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from lumen.io.checkpoint import Checkpointer
from lumen.sharding import batch_sharding, make_mesh, tree_shardings
from lumen.training.metrics import Recorder
from lumen.training.optim import OptimizerConfig, make_optimizer
from lumen.training.step import Adjust, Loss, TrainState, initial_state, jit_step, make_train_step

Pictures = dict[str, np.ndarray]


class Batches(Protocol):
    """An endless input iterator whose position can be saved and restored."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """What one kind of run is made of; `train.py` and `evaluate.py` know nothing else about a system.

    Attributes:
      build: makes the model from rngs; must be traceable.
      loss: the training loss of a (global) batch.
      batch_spec: shapes and dtypes of one global training batch.
      batches: makes the input of this process.
      monitor: (model, key) -> metrics and pictures during training; quick.
      evaluate: (model, key, workdir) -> metrics and pictures at the end; the published protocol.
      adjust: see `make_train_step`; None for most.
      pretrained: puts weights that come from files into a fresh model; None where there are none.
      export: (model, workdir), what to leave beside the checkpoints when training is over.
      inference: mesh -> (the jitted program that evaluation spends its time in, its abstract arguments); to compile it
        for absent hardware.
      advise: metrics of a step, of which some are not finite -> what to do, in sentences, or "" if they do not say why.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    loss: Loss
    batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    batches: Callable[[], Batches]
    monitor: Callable[[Any, Any], tuple[dict[str, float], Pictures]]
    evaluate: Callable[[Any, Any, pathlib.Path], tuple[dict[str, Any], Pictures]]
    inference: Callable[[jax.sharding.Mesh], tuple[Any, tuple]]
    adjust: Adjust | None = None
    pretrained: Callable[[Any], Any] | None = None
    export: Callable[[Any, pathlib.Path], None] | None = None
    advise: Callable[[Mapping[str, float]], str] | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What every run has, whatever its task.

    Attributes:
      task: a name in train.py's table; the configuration section of that name holds the task's own options.
      seed: of initialisation, data order and every random draw.
      total_steps: updates in all.
      batch_size: samples per update over all devices.
      accumulate: equal parts that a batch is run in, one after the other.
      compute_dtype: of the forward and backward pass; parameters and optimiser stay float32.
      average_decay: decay of the parameters' exponential moving average, which evaluation then uses; 0 is off.
      mesh: devices per mesh axis (data, fsdp, ring, ulysses, tensor); one may be -1: what is left.
      optimizer: see OptimizerConfig.
      log_every, monitor_every, save_every: in steps; 0 is never, for all but log_every.
      keep: checkpoints kept.
      tensorboard: also write TensorBoard event files.
    """

    task: str
    total_steps: int
    batch_size: int
    seed: int = 0
    accumulate: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    average_decay: float = 0.0
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    log_every: int = 50
    monitor_every: int = 0
    save_every: int = 500
    keep: int = 3
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("total_steps", "batch_size", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; wanted at least 1.")
        for name in ("seed", "monitor_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; wanted at least 0.")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay={self.average_decay}; wanted at least 0 and less than 1.")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}.")


class NonFiniteError(RuntimeError):
    """A metric became NaN or infinite."""


class WorkdirError(RuntimeError):
    """The working directory cannot be used."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A task set up on a mesh: the compiled step and how its state and batches lie."""

    config: TrainConfig
    task: Task
    mesh: jax.sharding.Mesh
    graphdef: Any
    step: Any  # jitted (state, batch, key) -> (state, metrics)
    abstract_state: TrainState  # with shardings

    def initial_state(self) -> TrainState:
        """The state of step 0, made where it lies: no device ever holds the whole of a sharded model."""
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        state = jax.jit(lambda key: self._init(key), out_shardings=layout)(jax.random.key(self.config.seed, impl="rbg"))
        if self.task.pretrained is None:
            return state
        model = self.task.pretrained(nnx.merge(self.graphdef, state.params, state.frozen))
        _, params, frozen = nnx.split(model, nnx.Param, ...)
        average = None if state.average is None else jax.tree.map(jnp.copy, params)
        return jax.device_put(state._replace(params=params, frozen=frozen, average=average), layout)

    def _init(self, key):
        optimizer = make_optimizer(self.config.optimizer, self.config.total_steps)
        return initial_state(self.task.build, optimizer, key, average=self.config.average_decay > 0)

    def model(self, state: TrainState) -> nnx.Module:
        """The model to evaluate: with averaged parameters where there are any."""
        params = state.params if state.average is None else state.average
        return nnx.merge(self.graphdef, params, state.frozen)

    def abstract_batch(self):
        """One global batch, shapes only, laid out on the mesh."""
        sharding = batch_sharding(self.mesh)
        return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in self.task.batch_spec.items()}


def set_up(config: TrainConfig, task: Task, devices=None) -> Run:
    """Traces the model and lays it out on the mesh; compiles nothing. `devices` may be those of an absent topology."""
    mesh = make_mesh(config.mesh, devices)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % (config.accumulate * replicas):
        raise ValueError(
            f"batch_size={config.batch_size} does not split into accumulate={config.accumulate} parts over "
            f"data x fsdp = {replicas} devices; use a multiple of {config.accumulate * replicas}."
        )
    graphdef, _, _ = nnx.split(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))), nnx.Param, ...)
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    step = make_train_step(
        graphdef,
        task.loss,
        optimizer,
        compute_dtype=jnp.dtype(config.compute_dtype),
        accumulate=config.accumulate,
        average_decay=config.average_decay,
        adjust=task.adjust,
    )
    run = Run(config, task, mesh, graphdef, None, None)  # type: ignore[arg-type]
    shapes = jax.eval_shape(run._init, jax.random.key(0))
    layout = tree_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    return dataclasses.replace(run, step=jit_step(step, abstract, mesh), abstract_state=abstract)


def prepare_workdir(workdir: pathlib.Path, resolved: Mapping[str, Any]) -> None:
    """Creates the workdir and writes `config.json`: the resolved configuration, versions and git commit.

    Every process of a job tries to write, so that all of them stop if they cannot; the file of process 0 stays.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        record = {
            "config": resolved,
            "versions": {
                name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")
            },
            "git": _git_commit(),
            "command": sys.argv,
        }
        temporary = workdir / f"config.{jax.process_index()}.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        if jax.process_index() == 0:
            os.replace(temporary, workdir / "config.json")
        else:
            temporary.unlink()
    except OSError as error:
        raise WorkdirError(
            f"--workdir={workdir}: cannot write there: {error.strerror}; give a directory that can be written."
        ) from error


def restore(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, Any] | None:
    """The newest state that verifies and the input position saved with it, or None in a fresh workdir."""
    restored = checkpointer.restore(run.abstract_state._asdict())
    if restored is None:
        return None
    _, state, extra = restored
    return TrainState(**state), extra.get("batches")


def train(run: Run, workdir: pathlib.Path, *, profile_steps: int = 0) -> dict[str, float]:
    """Trains to the end, or to the next safe point after SIGTERM, and returns the last metrics.

    Resumes from the workdir's newest intact checkpoint. Metrics of a step are looked at while the next one runs.

    Args:
      run: what `set_up` made.
      workdir: see `prepare_workdir`; `metrics.jsonl`, `checkpoints/` and `media/` are kept there.
      profile_steps: record a profiler trace of so many steps, after ten where there are more, into `profile/`.

    Raises:
      NonFiniteError: naming the step, its metrics, the checkpoint that is kept, and what to do.
    """
    config, task = run.config, run.task
    main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopOnSignal())
        checkpointer = stack.enter_context(Checkpointer(workdir / "checkpoints", keep=config.keep))
        batches = stack.enter_context(contextlib.closing(task.batches()))
        restored = restore(run, checkpointer)
        if restored is None:
            state = run.initial_state()
        else:
            state, position = restored
            _move_to(batches, position, workdir)
        done = int(state.step)
        recorder = stack.enter_context(Recorder(workdir, first_step=done, tensorboard=config.tensorboard, active=main))
        if main and done:
            print(f"resumed from step {done} of {config.total_steps}", flush=True)
        key = jax.random.key(config.seed + 1)
        progress = stack.enter_context(contextlib.closing(Progress(done, config.total_steps, active=main)))
        skipped = min(done + 10, max(done, config.total_steps - profile_steps))
        trace = stack.enter_context(_Trace(workdir / "profile", skipped, profile_steps))
        waiting, latest = None, {}

        def look(waiting):
            """Brings a step's metrics to the host; the step after it is already running."""
            step, metrics = waiting
            values = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, values.values())):
                checkpointer.wait()
                advice = task.advise(values) if task.advise else ""
                raise NonFiniteError(_not_finite(step, values, checkpointer.steps(), advice))
            return values

        def save(step, state):
            checkpointer.save(step, state._asdict(), {"batches": batches.get_state()})

        if restored is None and config.save_every:
            save(0, state)
        for number in range(done + 1, config.total_steps + 1):
            batch = _global_batch(next(batches), batch_sharding(run.mesh))
            trace.before(number)
            state, metrics = run.step(state, batch, key)
            trace.after(number, state)
            if waiting is not None:
                latest = look(waiting)
            waiting = (number, metrics)
            last = number == config.total_steps
            stopping = stop.requested(number)
            if last or stopping or number % config.log_every == 0:
                latest = look(waiting)
                recorder.scalars(number, latest)
                progress.line(number, latest)
            progress.advance(latest)
            if config.monitor_every and (last or number % config.monitor_every == 0):
                monitor_key = jax.random.fold_in(key, number)
                found = _on_process_0(run, state, lambda model, key=monitor_key: task.monitor(model, key))
                values, pictures = found or ({}, {})
                recorder.scalars(number, values)
                recorder.pictures(number, pictures)
                progress.line(number, values)
                latest |= values
            if last or stopping or (config.save_every and number % config.save_every == 0):
                look(waiting)  # a state that is not finite is never saved: its parameters' norm is a metric
                save(number, state)
            if stopping:
                checkpointer.wait()
                progress.note(f"stopped by {stop.name} after step {number}: saved; run the same command to resume")
                break
    export = task.export
    if export is not None and int(state.step) == config.total_steps:
        _on_process_0(run, state, lambda model: export(model, workdir))
    return {"step": int(state.step), **latest}


def _on_process_0[Result](run: Run, state: TrainState, call: Callable[[Any], Result]) -> Result | None:
    """call(the model to evaluate) on process 0. Where there are others, it gets whole arrays and one device."""
    model = run.model(state)
    if jax.process_count() == 1:
        return call(model)
    model = jax.tree.map(lambda array: multihost_utils.process_allgather(array, tiled=True), model)
    if jax.process_index() != 0:
        return None
    with jax.set_mesh(make_mesh({}, jax.local_devices()[:1])):
        return call(model)


def _move_to(batches: Batches, position, workdir: pathlib.Path) -> None:
    try:
        batches.set_state(position)
    except ValueError as error:
        raise WorkdirError(
            f"--workdir={workdir}: was made with other data settings, so its input cannot be continued: {error} "
            "Restore those settings, or give another --workdir."
        ) from error


def _not_finite(step: int, values: Mapping[str, float], kept: Sequence[int], advice: str) -> str:
    name = min((name for name, value in values.items() if not math.isfinite(value)), key=lambda name: name != "loss")
    last = f"checkpoint {kept[-1]} is the last good one and is kept" if kept else "no checkpoint was saved yet"
    advice = advice or "Lower the learning rate, clip gradients, or look at the data of this step."
    text = (
        f"step {step}: {name} is {values[name]}; training stopped, {last}. {advice} Then run the same command to "
        "resume."
    )
    if len(kept) > 1 and kept[-1] == step - 1:
        text += f" If that fails here again, remove the checkpoint to go back to the one of step {kept[-2]}."
    metrics = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
    return f"{text} The step's metrics: {metrics}."


def _global_batch(local, sharding):
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


class Progress:
    """A bar with the time left on a terminal; elsewhere a plain line for each record."""

    def __init__(self, done: int, total: int, *, active: bool = True):
        self._terminal = active and sys.stderr.isatty()
        self._active, self._done, self._total, self._start = active, done, total, time.monotonic()
        self._bar = tqdm(total=total, initial=done, disable=not self._terminal, dynamic_ncols=True, unit="step")

    def advance(self, values: dict[str, float]) -> None:
        """One more step."""
        if values:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        self._bar.update(1)

    def line(self, step: int, values: dict[str, float]) -> None:
        """A record of a step, with the time left."""
        if not self._active:
            return
        rate = (time.monotonic() - self._start) / max(step - self._done, 1)
        left = datetime.timedelta(seconds=round(rate * (self._total - step)))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.note(f"step {step}/{self._total}  {numbers}  ({rate:.3g} s/step, {left} left)")

    def note(self, text: str) -> None:
        """A line that does not disturb the bar."""
        if self._active:
            tqdm.write(text) if self._terminal else print(text, flush=True)

    def close(self) -> None:
        """Leaves the terminal clean."""
        self._bar.close()


class _Trace:
    """A profiler trace of `steps` steps after the step `start`; whatever was traced is written at the end."""

    def __init__(self, folder: pathlib.Path, start: int, steps: int):
        self._folder, self._first, self._last, self._running = folder, start + 1, start + steps, False

    def __enter__(self):
        return self

    def before(self, step: int) -> None:
        """Starts at the first step."""
        if step == self._first and self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state) -> None:
        """Stops when the last step's state is there."""
        if step == self._last and self._running:
            jax.block_until_ready(state)
            self.__exit__()

    def __exit__(self, *_):
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class _StopOnSignal:
    """Turns SIGTERM and SIGINT into a request that the loop obeys after the step in flight; a second one kills.

    A job of several processes leaves the signals to JAX: its preemption service notices a SIGTERM to any of them and
    makes all of them stop at the same step.
    """

    def __init__(self):
        self.name = ""
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.name = signal.Signals(number).name
        signal.signal(number, self._previous[number])

    def requested(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "a preemption notice (SIGTERM)"
        return bool(self.name)


def _git_commit() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError as error:
        logging.info("git is not available: %s", error)
        return None
    return result.stdout.strip() or None
