"""train.py and evaluate.py as people use them: help, mistakes, plans, a run and what it leaves behind."""

import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import evaluate
import train
from lumen.training.loop import Progress

# The tests share one run: with pytest-xdist, all of this on one worker.
pytestmark = pytest.mark.xdist_group("entry points")

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENT = ROOT / "tests" / "training" / "tiny_experiment.py"
PROGRAMS = pytest.mark.parametrize("program", [train, evaluate], ids=["train", "evaluate"])
NUMBER = r"[-+.e\d]+"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of random pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part in ("train", "val"):
        (folder / part / "thing").mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / part / "thing" / f"{i}.png")
    return folder


def arguments(workdir, pictures):
    return [f"--config={EXPERIMENT}", f"--workdir={workdir}", f"--config.vq.data.path={pictures}"]


def run_program(name, *flags, cwd=ROOT):
    """Runs an entry point in a process of its own, on one device; unoptimised programs compile in half the time."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# Help and usage.


@PROGRAMS
def test_help_is_the_docstring_and_every_flag(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert program.__doc__.strip() in output
    flags = ["config", "config.KEY", "workdir", "compile_only", "topology"]
    flags += ["distributed", "coordinator", "processes", "process"]
    flags += ["profile"] if program is train else ["checkpoint", "random_weights"]
    # Each on a line of its own, with its explanation there or on the next.
    for flag in flags:
        assert re.search(rf"^  --{flag}\b[^\n]*(  |\n +)\w", output, re.M), flag
    assert set(re.findall(r"^  --([\w.]+)", output, re.M)) == set(flags)


@PROGRAMS
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config=x.py"], "--workdir is missing"),
        (["--config=x.py", "--workdir=w", "--topology=cpu:8"], "--compile_only and --topology go together"),
        (["--config=x.py", "--compile_only"], "--compile_only and --topology go together"),
        (["--config=x.py", "--workdir=w", "--process=0"], "--coordinator, --processes and --process go with --distrib"),
        (["--config=x.py", "--workdir=w", "--wrokdir=w"], "unrecognized arguments: --wrokdir=w"),
        (["--config=x.py", "--work=w"], "unrecognized arguments: --work=w"),
        (["--config=x.py", "--workdir=w", "--processes=two"], "argument --processes: invalid int value: 'two'"),
    ],
)
def test_usage_errors(program, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(flags)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("usage: ")
    assert f"error: {message}" in errors.splitlines()[-1]


@PROGRAMS
def test_an_experiment_that_is_absent(program, tmp_path, capsys):
    assert program.main(["--config=nowhere.py", f"--workdir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == (
        "error: --config=nowhere.py: no such file; wanted an experiment such as experiments/lpd/digits.py.\n"
    )
    assert not (tmp_path / "run").exists()


@PROGRAMS
def test_processes_that_cannot_be_joined(program, pictures, tmp_path, capsys):
    flags = ["--distributed", "--coordinator=localhost:1", "--processes=2", "--process=2"]
    assert program.main([*arguments(tmp_path / "run", pictures), *flags]) == 2
    assert re.match("error: --distributed: cannot join the other processes: .* or give --coor", capsys.readouterr().err)


def test_data_that_is_absent(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", tmp_path / "nothing")) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(
        f"error: image_folder: {tmp_path / 'nothing' / 'train'} is not a folder; images are expect"
    )
    assert errors.count("\n") == 1


# Plans.

DIGITS = ROOT / "experiments" / "lpd" / "digits.py"
TINY_LPD = [
    f"--config={DIGITS}",
    "--config.lpd.model={'size': 'debug', 'classes': 10}",
    "--config.lpd.tokenizer={'model': {'size': 'debug'}}",
    "--config.lpd.image_size=16",
    "--config.lpd.data.size=16",
    "--config.lpd.codes=",
    "--config.batch_size=16",
]


@pytest.mark.parametrize(
    ("name", "title", "mesh"),
    [
        ("train.py", f"training step of {DIGITS}, global batch 16", {"fsdp": 4, "tensor": 2}),
        ("evaluate.py", f"inference of {DIGITS}, global batch 16", {"data": -1}),
    ],
    ids=["train", "evaluate"],
)
def test_compile_only(name, title, mesh, tmp_path):
    """A plan for eight devices that this process does not have; nothing runs, nothing is written."""
    flags = [*TINY_LPD, f"--config.mesh={mesh}", "--compile_only", "--topology=cpu:8"]
    result = run_program(name, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    lines = lines[lines.index(title) + 1 :]  # behind what the compiler has to say
    assert lines[0] == "mesh: " + ", ".join(f"{axis}={8 if size < 0 else size}" for axis, size in mesh.items())
    assert lines[1].startswith("cpu:8: 8 x simulated CPU device")
    assert lines[-2].startswith("fits: ")
    made = json.loads(lines[-1])
    assert made["devices"] == 8
    assert made["fits"] is True
    assert 0 < made["argument_bytes"] < made["peak_bytes"] < made["capacity_bytes"]
    assert made["matmul_flops"] > 1e6
    moved = made["collective_bytes"]
    assert moved["all-gather"] > 0 if name == "train.py" else moved == {}
    assert os.listdir(tmp_path) == []


@PROGRAMS
@pytest.mark.parametrize("topology", ["h201:8", "cpu:0", "v5p:2"])
def test_an_unknown_topology_is_one_error(program, topology, capsys):
    assert program.main([*TINY_LPD, "--compile_only", f"--topology={topology}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: --topology={topology}: topology: '{topology}' is unknown; use h200:8, ")
    assert captured.err.count("\n") == 1


def test_a_plan_of_an_impossible_configuration(capfd):
    """The child that compiles says what is wrong, and its status comes through."""
    assert train.main([*TINY_LPD, "--config.batch_size=12", "--compile_only", "--topology=cpu:8"]) == 2
    output = capfd.readouterr().out
    assert output.startswith("error: batch_size=12 does not split into accumulate=1 parts over data x fsdp = 8 devices")
    assert output.count("\n") == 1


# A run.


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """The workdir of a run with everything on, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    options = ["--profile=2", "--config.tensorboard=True", "--config.monitor_every=20", "--config.log_every=4"]
    result = run_program("train.py", *arguments(workdir, pictures), *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return workdir, result.stdout.splitlines()


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


TRAINING = {"loss", "gradient_norm", "parameter_norm", "pixel", "codebook", "commitment", "codebook_usage"}


def test_metrics_are_lines_of_json(run):
    lines = read_metrics(run[0])
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(4, 41, 4))
    assert all(set(line) == {"step", "time"} | TRAINING for line in training)
    assert [line["step"] for line in lines if "psnr" in line] == [20, 40]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert time.time() - 86400 < times[0] <= time.time()
    assert training[-1]["loss"] < training[0]["loss"]


def test_progress_says_what_is_left(run):
    *progress, last = run[1]
    pattern = rf"step (\d+)/40  (\w+ {NUMBER}  )+\({NUMBER} s/step, \d+:\d\d:\d\d left\)"
    found = [re.fullmatch(pattern, line) for line in progress]
    assert all(found), progress
    steps = [int(match[1]) for match in found if match]
    assert sorted({*steps}) == list(range(4, 41, 4))
    assert len(steps) == 12  # two of them with monitored values as well
    assert progress[-1].endswith("0:00:00 left)")
    values = json.loads(last)
    assert values["step"] == 40
    assert set(values) == {"step", "psnr"} | TRAINING
    assert values["loss"] == read_metrics(run[0])[-2]["loss"]


def test_workdir(run, pictures):
    workdir, _ = run
    record = json.loads((workdir / "config.json").read_text())
    assert set(record) == {"config", "versions", "git", "command"}
    assert record["config"]["task"] == "vq"
    assert record["config"]["optimizer"]["beta2"] == 0.95  # defaults are written out
    assert record["config"]["monitor_every"] == 20  # and overrides
    assert record["config"]["vq"]["data"]["path"] == str(pictures)
    assert record["versions"]["jax"] == jax.__version__
    assert "--profile=2" in record["command"]
    assert sorted(os.listdir(workdir / "checkpoints")) == ["00000024", "00000032", "00000040"]
    for step in (20, 40):
        with Image.open(workdir / "media" / f"reconstructions_{step:08d}.png") as image:
            assert image.mode == "RGB"
    assert (workdir / "model.safetensors").stat().st_size > 1000
    assert not list(workdir.glob("*.tmp"))


def test_profile(run):
    (trace,) = (run[0] / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    # Two steps were traced: each is one call of the step's program.
    assert b"jit_step" in content


def test_tensorboard(run):
    """Everything that metrics.jsonl has, the last step included."""
    (file,) = (run[0] / "tensorboard").glob("events.out.tfevents.*")
    data, at, found = file.read_bytes(), 0, set()
    while at < len(data):  # TFRecord: length, its checksum, the record, its checksum
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found |= {(event.step, value.tag, round(value.simple_value, 5)) for value in event.summary.value}
        at += length + 16
    want = {
        (line["step"], name, round(float(np.float32(value)), 5))
        for line in read_metrics(run[0])
        for name, value in line.items()
        if name not in ("step", "time")
    }
    assert found == want


def test_a_finished_run_is_left_alone(run, pictures, capsys):
    before = (run[0] / "metrics.jsonl").read_bytes()
    assert train.main(arguments(run[0], pictures)) == 0
    assert capsys.readouterr().out == 'resumed from step 40 of 40\n{"step": 40}\n'
    assert (run[0] / "metrics.jsonl").read_bytes() == before


# Evaluation.


def test_evaluation(run, pictures):
    workdir, _ = run
    result = run_program("evaluate.py", *arguments(workdir, pictures))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    metrics = json.loads((workdir / "eval" / "metrics.json").read_text())
    assert json.loads(result.stdout.splitlines()[-1]) == metrics
    assert set(metrics) == {"step", "psnr", "codebook_usage"}
    assert metrics["step"] == 40
    # Both look at all twelve pictures of the validation folder, with the averaged parameters.
    assert metrics["psnr"] == pytest.approx(read_metrics(workdir)[-1]["psnr"], rel=1e-6)
    with Image.open(workdir / "eval" / "reconstructions.png") as image:
        assert image.mode == "RGB"


def test_evaluation_of_an_earlier_checkpoint(run, pictures, capsys):
    """On eight devices here, of a run on one; and with another optimizer, whose state is not asked for."""
    flags = [*arguments(run[0], pictures), "--config.optimizer.clip_norm=0.0"]
    assert evaluate.main([*flags, "--checkpoint=32"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 32
    assert evaluate.main([*flags, "--checkpoint=33"]) == 2
    assert re.match(
        r"error: checkpoint \S+/00000033: does not exist. Complete checkpoints in \S+: \[24, 32, 40\]; choose one of",
        capsys.readouterr().err,
    )


def test_evaluation_without_training(pictures, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert evaluate.main(arguments(workdir, pictures)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"error: --workdir={workdir}: holds no checkpoint; train first, with the same --config and --workdir.\n"
    )
    assert not workdir.exists()
    result = run_program("evaluate.py", *arguments(workdir, pictures), "--random_weights")
    assert result.returncode == 0, result.stderr
    assert json.loads((workdir / "eval" / "metrics.json").read_text())["step"] == 0


def test_evaluation_of_another_model(run, pictures, capsys):
    flags = [*arguments(run[0], pictures), "--config.vq.model.latent_channels=6"]
    assert evaluate.main(flags) == 2
    errors = capsys.readouterr().err
    assert re.match(r"error: \S+/00000040 has \d+ differences from the wanted tree:\n", errors)
    assert "wanted float32" in errors


# The progress bar.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_with_the_time_left(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(4, 12)
    for _ in range(4):
        time.sleep(0.12)  # tqdm draws ten times a second
        progress.advance({"loss": 0.25})
    progress.line(8, {"loss": 0.25})
    progress.close()
    assert re.search(r"8/12 \[00:00<00:\d\d, .*step/?s?.*, loss=0\.25\]", terminal.getvalue()), terminal.getvalue()
    assert re.search(r"step 8/12  loss 0\.25  \(0\.\d+ s/step, 0:00:0\d left\)", capsys.readouterr().out)


def test_time_left(monkeypatch, capsys):
    """Of a run that was resumed at step 4 and has made 2 steps in 6 seconds; 6 more take 18 seconds."""
    now = iter([100.0, 106.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = Progress(4, 12)
    monkeypatch.setattr(time, "monotonic", lambda: 106.0)
    progress.line(6, {"loss": 0.125, "accuracy": 1.0})
    assert capsys.readouterr().out == "step 6/12  loss 0.125  accuracy 1  (3 s/step, 0:00:18 left)\n"
