"""Runs that are killed, stopped, damaged, starved or split over processes go on to the same result.

train.py for real, in processes of its own, on a run of seconds; then the training loop on a problem of six numbers.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import train
from lumen.io.checkpoint import Checkpointer, flatten
from lumen.training import loop
from lumen.training.metrics import MetricsError

# The processes share one uninterrupted run: with pytest-xdist, all of this on one worker.
pytestmark = pytest.mark.xdist_group("reliability")

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENT = pathlib.Path(__file__).with_name("tiny_experiment.py")
TOTAL, SAVE_EVERY = 40, 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of random pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part in ("train", "val"):
        for label in "ab":
            (folder / part / label).mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


def arguments(workdir, pictures, *flags):
    return [f"--config={EXPERIMENT}", f"--workdir={workdir}", f"--config.vq.data.path={pictures}", *map(str, flags)]


# Unoptimised programs compile in half the time, once for all tests.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@pytest.fixture
def start(pictures):
    """start(workdir, *flags) -> a running train.py, which does not outlive the test."""
    processes = []

    def start(workdir, *flags):
        command = [sys.executable, str(ROOT / "train.py"), *arguments(workdir, pictures, *flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def finish(process, status=0):
    """Waits for the end of a run: its output and its errors."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, f"{output}\n{errors}"
    assert "Traceback" not in errors
    return output, errors


def wait_for_step(process, step):
    """Reads the progress lines up to a step or a later one."""
    for line in process.stdout:
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            return int(found[1])
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def folders(workdir, *, complete):
    """The steps with a checkpoint folder, with or without a manifest."""
    found = (workdir / "checkpoints").glob("[0-9]*")
    return {int(folder.name) for folder in found if (folder / "manifest.json").exists() == complete}


def metrics(workdir):
    """metrics.jsonl but for the times, which must be there."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("time") > 0 for line in lines)
    return lines


@pytest.fixture(scope="module")
def abstract_state(pictures):
    """What a checkpoint of the run holds, on one device."""
    flags, overrides = train.parse(train.arguments(None), arguments("unused", pictures))
    run, _ = train.configure(flags, overrides, jax.devices()[:1])
    return run.abstract_state._asdict()


@pytest.fixture(scope="module")
def saved(abstract_state):
    """saved(workdir, step) -> {name: array} of everything in a checkpoint."""

    def saved(workdir, step=TOTAL):
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            restored = checkpointer.restore(abstract_state, step=step)
        assert restored is not None
        return {name: np.asarray(array) for name, array in flatten(restored[1]).items()}

    return saved


@pytest.fixture(scope="module")
def final_bits(saved):
    """final_bits(workdir) -> {name: (dtype, shape, bytes)} of everything in the last checkpoint."""
    return lambda workdir: {name: (x.dtype, x.shape, x.tobytes()) for name, x in saved(workdir).items()}


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(workdir, pictures)]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert [line["step"] for line in metrics(workdir)] == list(range(2, TOTAL + 1, 2))
    return workdir


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """A copy of the uninterrupted run."""
    return shutil.copytree(uninterrupted, tmp_path / "copied")


def test_kill_9_resumes_to_the_same_bits(uninterrupted, start, final_bits, tmp_path):
    """Killed in the middle of a save, then at random moments; each restart goes on from the newest whole checkpoint."""
    workdir, draw, seen = tmp_path / "run", random.Random(0), 0

    def kill(process):
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        return max([seen, *map(int, re.findall(r"step (\d+)/", output))])

    def resumed(process):
        """Checks where a restarted run goes on, and that it lost no more than it may."""
        whole = max(folders(workdir, complete=True))
        # A save is waited for when the next one is due, so at most two periods are lost.
        assert seen - whole <= 2 * SAVE_EVERY
        while not (line := process.stdout.readline()).startswith(("step", "resumed")):
            assert line, process.stderr.read()
        assert line == f"resumed from step {whole} of {TOTAL}\n" if whole else line.startswith("step 2/")

    while not folders(workdir, complete=False) - {0}:
        process = start(workdir)
        while process.poll() is None and not folders(workdir, complete=False) - {0}:
            time.sleep(0.0005)
        seen = kill(process)
    for _ in range(2):
        process = start(workdir)
        resumed(process)
        seen = wait_for_step(process, 0)
        time.sleep(draw.uniform(0.0, 0.1))
        seen = kill(process)
    process = start(workdir)
    resumed(process)
    finish(process)

    assert final_bits(workdir) == final_bits(uninterrupted)
    assert metrics(workdir) == metrics(uninterrupted)
    assert (workdir / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


def test_sigterm_saves_and_says_so(uninterrupted, start, final_bits, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_step(process, 2)
    process.terminate()
    output, errors = finish(process)
    assert errors == ""
    found = re.search(r"^stopped by SIGTERM after step (\d+): saved; run the same command to resume$", output, re.M)
    assert found, output
    stopped = int(found[1])
    assert stopped < TOTAL
    assert json.loads(output.splitlines()[-1])["step"] == stopped
    assert max(folders(workdir, complete=True)) == stopped
    assert metrics(workdir)[-1]["step"] == stopped

    output, _ = finish(start(workdir))
    assert output.startswith(f"resumed from step {stopped} of {TOTAL}\n")
    assert final_bits(workdir) == final_bits(uninterrupted)
    # The step of the stop is recorded whatever log_every says.
    assert [line for line in metrics(workdir) if line["step"] % 2 == 0] == metrics(uninterrupted)


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damaged_checkpoints_are_passed_over(uninterrupted, copied, start, final_bits):
    """The newest is cut short, the one before has a flipped bit: the third one is used, and the result is the same."""
    third, second, newest = sorted(folders(copied, complete=True))
    file = largest_file(copied / "checkpoints" / f"{newest:08d}")
    os.truncate(file, file.stat().st_size // 2)
    flip_bit(largest_file(copied / "checkpoints" / f"{second:08d}"))
    output, errors = finish(start(copied))
    passed_over = r"WARNING: checkpoint \S+/{:08d} passed over: state/\S+ {}.*; trying step {} instead\.\n"
    cut = passed_over.format(newest, r"has \d+ bytes, not the \d+ that were written", second)
    flipped = passed_over.format(second, r"has changed since it was written \(its SHA-256 differs\)", third)
    replaced = rf"(WARNING: checkpoint \S+/({second:08d}|{newest:08d}) exists; replacing it\.\n)*"
    assert re.fullmatch(cut + flipped + replaced, errors), errors
    assert output.startswith(f"resumed from step {third} of {TOTAL}\n")
    assert final_bits(copied) == final_bits(uninterrupted)
    assert metrics(copied) == metrics(uninterrupted)


def test_no_intact_checkpoint_is_one_error(copied, pictures, capsys):
    for step in folders(copied, complete=True):
        flip_bit(largest_file(copied / "checkpoints" / f"{step:08d}"))
    assert train.main(arguments(copied, pictures)) == 2
    errors = capsys.readouterr().err
    assert re.match(r"error: no checkpoint in \S+ is intact \(step 40: .*; step 32: .*; step 24: ", errors)
    assert errors.count("\n") == 1


def test_infinite_numbers_stop_the_run(uninterrupted, copied, start, final_bits):
    """With a learning rate of 1e30 the first update is absurd; no state of it is saved, so a sane rate goes on."""
    shutil.rmtree(copied / "checkpoints" / f"{TOTAL:08d}")
    output, errors = finish(start(copied, "--config.optimizer.learning_rate=1e30"), status=2)
    kept = TOTAL - SAVE_EVERY
    assert output == f"resumed from step {kept} of {TOTAL}\n"
    assert errors.count("\n") == 1
    assert errors.startswith(
        f"error: step {kept + 1}: parameter_norm is inf; training stopped, checkpoint {kept} is the last good one and "
        "is kept. Lower the learning rate"
    )
    assert max(folders(copied, complete=True)) == kept
    output, _ = finish(start(copied))
    assert output.startswith(f"resumed from step {kept} of {TOTAL}\n")
    assert final_bits(copied) == final_bits(uninterrupted)
    assert metrics(copied) == metrics(uninterrupted)


# How much room a checkpoint takes depends on the order of its writes: so the disk is filled, not measured.
FULL_DISK = """
disk=$1 checkpoint=$2 copy=$3; shift 3
mount -t tmpfs -o size=32m tmpfs "$disk" || exit 77
(until [ -e "$checkpoint"/manifest.json ]; do sleep 0.01; done; cat /dev/zero > "$disk"/full 2>&-) &
"$@"; echo "status $?" >&2
wait
rm "$disk"/full
echo room again; "$@" || exit 1
cp -r "$disk" "$copy"
"""


def test_full_disk(uninterrupted, pictures, final_bits, tmp_path):
    """A real one, a small tmpfs of a mount namespace: one error; with room again the run goes on to the same bits."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process mount; tests/io/test_checkpoint.py limits file sizes instead")
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint = disk / "run" / "checkpoints" / f"{SAVE_EVERY:08d}"
    script = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(disk), str(checkpoint), str(tmp_path / "out")]
    command = [*script, sys.executable, str(ROOT / "train.py"), *arguments(disk / "run", pictures)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    if result.returncode == 77:
        pytest.skip("this machine does not let a process mount; tests/io/test_checkpoint.py limits file sizes instead")
    assert result.returncode == 0, result.stderr
    error, status, *rest = result.stderr.splitlines()
    assert re.match(
        r"error: (step \d+ could not be saved in|metrics: cannot write) \S+: No space left on device; free some space",
        error,
    )
    assert status == "status 2"
    assert rest == []
    found = re.search(r"^room again\nresumed from step (\d+) of", result.stdout, re.M)
    assert found
    assert 0 < int(found[1]) < TOTAL
    assert final_bits(tmp_path / "out" / "run") == final_bits(uninterrupted)
    assert metrics(tmp_path / "out" / "run") == metrics(uninterrupted)


def test_a_workdir_that_cannot_be_written_is_one_error(tmp_path, pictures, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(arguments(tmp_path / "file" / "run", pictures)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"error: --workdir={tmp_path / 'file' / 'run'}: cannot write there: Not a directory; "
        "give a directory that can be written.\n"
    )


def test_two_processes_train_as_one_and_stop_together(uninterrupted, start, saved, tmp_path):
    """Each holds half of the parameters. A SIGTERM to one of them stops both after the same step; started again, they
    come to the result of one process.

    The signal comes before the first step: JAX looks for it once a second, which is the whole length of this run.
    """
    workdir, total = tmp_path / "run", 24

    def start_both():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        flags = ["--distributed", coordinator, "--processes=2", "--config.mesh={'fsdp': -1}"]
        flags += [f"--config.total_steps={total}", "--config.save_every=0", "--config.monitor_every=20"]
        return [start(workdir, *flags, f"--process={i}") for i in range(2)]

    first, second = start_both()
    while not (workdir / "config.json").exists():  # both have joined, and listen
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    second.terminate()
    output, _ = finish(first)
    finish(second)
    stop = r"^stopped by a preemption notice \(SIGTERM\) after step (\d+): saved; run the same command to resume$"
    found = re.search(stop, output, re.M)
    assert found, output
    stopped = int(found[1])
    assert max(folders(workdir, complete=True)) == stopped < total
    first, second = start_both()
    output, _ = finish(first)
    silent, _ = finish(second)
    assert f"resumed from step {stopped} of {total}\n" in output
    assert "step" not in silent  # process 0 alone speaks and records
    got = metrics(workdir)
    assert [line["step"] for line in got if "psnr" in line] == [20, 24]
    assert (workdir / "media" / "reconstructions_00000024.png").exists()
    got = [line for line in got if "loss" in line and line["step"] % 2 == 0]
    want = [line for line in metrics(uninterrupted) if line["step"] <= total]
    assert [line["step"] for line in got] == [line["step"] for line in want]
    # Two half batches are summed in another order: float32 rounding (2**-24), grown over 24 updates. Another batch
    # would change the loss by some per cent.
    for name in ("loss", "gradient_norm", "parameter_norm"):
        np.testing.assert_allclose([line[name] for line in got], [line[name] for line in want], rtol=1e-4)
    arrays, expected = saved(workdir, total), saved(uninterrupted, total)
    for name in expected:
        if name.startswith("params."):  # where a gradient is nothing but rounding, Adam still moves by up to 2e-3
            np.testing.assert_allclose(arrays[name], expected[name], atol=1e-3, err_msg=name)
    # Process 0 holds half of the weights, and leaves all of them behind.
    exported = load_file(workdir / "model.safetensors")
    assert exported.keys() == load_file(uninterrupted / "model.safetensors").keys()
    average = [x for name, x in arrays.items() if name.startswith("average.")]
    assert norm(exported.values()) == pytest.approx(norm(average), rel=1e-6)


def norm(arrays):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))


# The loop on a problem of six numbers.


class Line(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)[:, 0]


class Numbers:
    """Batches of a fixed random stream; `at` is called with the number of each batch before it is given, from 1."""

    def __init__(self, at=lambda number: None, seed=0):
        self.at, self.seed, self.given, self.closed = at, seed, 0, False

    def __next__(self):
        self.given += 1
        x = np.random.default_rng((self.seed, self.given)).normal(size=(8, 5)).astype(np.float32)
        poison = self.at(self.given)
        return {"x": x, "y": x.sum(1) if poison is None else np.full(8, poison, np.float32)}

    def get_state(self):
        return {"given": self.given, "seed": self.seed}

    def set_state(self, state):
        if state["seed"] != self.seed:
            raise ValueError(f"seed was {state['seed']} and is now {self.seed}.")
        self.given = state["given"]

    def close(self):
        self.closed = True


def line_run(batches, **changes):
    """A run of ten steps."""

    def loss(model, batch, key, step):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2), {}

    shapes = {"x": jax.ShapeDtypeStruct((8, 5), jnp.float32), "y": jax.ShapeDtypeStruct((8,), jnp.float32)}
    absent = lambda *_: pytest.fail("not asked for")  # noqa: E731
    task = loop.Task(Line, loss, shapes, lambda: batches, monitor=absent, evaluate=absent, inference=absent)
    config = loop.TrainConfig(task="line", total_steps=10, batch_size=8, log_every=100, **changes)
    return loop.set_up(config, task)


def line_bits(workdir):
    run = line_run(Numbers())
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        restored = checkpointer.restore(run.abstract_state._asdict())
    assert restored is not None
    return restored[0], {name: np.asarray(array).tobytes() for name, array in flatten(restored[1]).items()}


@pytest.mark.parametrize(("poison", "save_every", "kept"), [(np.nan, 4, 4), (np.inf, 1, 6), (np.nan, 7, 0)])
def test_a_poisoned_batch_stops_the_run_before_its_state_is_saved(tmp_path, poison, save_every, kept):
    batches = Numbers(lambda number: poison if number == 7 else None)
    with pytest.raises(
        loop.NonFiniteError,
        match=rf"^step 7: loss is (nan|inf); training stopped, checkpoint {kept} is the last good one and is kept\.",
    ) as caught:
        loop.train(line_run(batches, save_every=save_every), tmp_path)
    # Where the newest state was never seen to work, the message says how to go back behind it.
    again = "remove the checkpoint to go back to the one of step"
    assert (again in str(caught.value)) == (kept == 6)
    assert batches.closed
    assert not (tmp_path / "metrics.jsonl").exists()
    assert loop.train(line_run(Numbers()), tmp_path)["step"] == 10
    (tmp_path / "other").mkdir()
    loop.train(line_run(Numbers()), tmp_path / "other")
    assert line_bits(tmp_path) == line_bits(tmp_path / "other")


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    with pytest.raises(loop.NonFiniteError, match="training stopped, no checkpoint was saved yet"):
        loop.train(line_run(Numbers(lambda number: np.nan), save_every=0), tmp_path)


def test_the_error_gives_all_metrics_and_the_advice_of_the_task(tmp_path):
    run = line_run(Numbers(lambda number: np.nan), save_every=0)
    advise = lambda metrics: f"Look at {', '.join(metrics)}." if np.isnan(metrics["loss"]) else ""  # noqa: E731
    task = dataclasses.replace(run.task, advise=advise)
    with pytest.raises(
        loop.NonFiniteError,
        match=r"^step 1: loss is nan; .* saved yet\. Look at gradient_norm, loss, parameter_norm\. Then run the same "
        r"command to resume\. The step's metrics: gradient_norm nan, loss nan, parameter_norm nan\.$",
    ):
        loop.train(dataclasses.replace(run, task=task), tmp_path)


def test_an_interrupt_stops_after_the_step_in_flight(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    batches = Numbers(lambda number: signal.raise_signal(signal.SIGINT) if number == 5 else None)
    assert loop.train(line_run(batches), tmp_path)["step"] == 5
    assert "stopped by SIGINT after step 5: saved; run the same command to resume" in capsys.readouterr().out
    assert line_bits(tmp_path)[0] == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_is_not_held_back(tmp_path):
    def twice(number):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # What is in a shell's background ignores interrupts, and so do these tests there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train(line_run(Numbers(twice)), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_data_settings_are_refused(tmp_path):
    loop.train(line_run(Numbers(lambda number: signal.raise_signal(signal.SIGTERM) if number == 5 else None)), tmp_path)
    with pytest.raises(
        loop.WorkdirError, match=r"was made with other data settings, .*: seed was 0 and is now 1\. Restore those"
    ):
        loop.train(line_run(Numbers(seed=1)), tmp_path)


def test_records_of_lost_steps_are_replaced(tmp_path):
    """Lines of steps after the checkpoint, and one that was cut off, go; the others stay as they are."""
    loop.train(line_run(Numbers(), save_every=4, keep=9), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "00000010")
    lines = [f'{{"step": {step}, "mark": {step}}}\n' for step in (2, 8, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 10, "lo')
    loop.train(line_run(Numbers()), tmp_path)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert kept[:2] == lines[:2]
    assert [json.loads(line)["step"] for line in kept[2:]] == [10]


def test_records_that_cannot_be_written_are_one_error(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(
        MetricsError,
        match=r"cannot write \S+/metrics\.jsonl: Is a directory; free some space or give another --workdir",
    ):
        loop.train(line_run(Numbers()), tmp_path)
    (tmp_path / "other").mkdir()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as where it is not installed
    with pytest.raises(MetricsError, match=r"tensorboardX is not installed; run `pip install lumen\[tensorboard\]`"):
        loop.train(line_run(Numbers(), tensorboard=True), tmp_path / "other")
