"""Experiments, overrides and the checks that come before anything is compiled."""

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest

import evaluate
import train
from lumen.training.config import ConfigError, build, build_all, load_config


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["warm", "cold"] = "warm"
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate={self.rate}; wanted at least 0.")


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    name: str = "x"
    flag: bool = False
    limit: int | None = None
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; wanted at least 1.")


def test_build():
    values = {
        "steps": 3,
        "limit": 7,
        "mesh": {"data": -1},
        "free": {"anything": [1, "a", {"b": None}]},
        "inner": {"rate": 2, "kind": "cold", "sizes": [3, 4, 5]},
    }
    want = Outer(3, limit=7, mesh={"data": -1}, free=values["free"], inner=Inner(2.0, "cold", (3, 4, 5)))
    made = build(Outer, values)
    assert made == want
    assert isinstance(made.inner.rate, float)  # from an int
    assert isinstance(made.inner.sizes, tuple)  # from a list
    assert build(Outer, {"steps": 1, "limit": None}) == Outer(1)
    assert build(Outer, {"steps": 1, "flag": True}).flag is True


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "config.steps: missing; wanted int."),
        ({"steps": 1, "stepps": 2}, "config.stepps: unknown key with value 2; did you mean config.steps?"),
        (
            {"steps": 1, "zzz": 2},
            "config.zzz: unknown key with value 2; the keys are steps, name, flag, limit, mesh, free, inner.",
        ),
        (
            {"steps": 1, "inner": {"rat": 1.0}},
            "config.inner.rat: unknown key with value 1.0; did you mean config.inner.rate?",
        ),
        ({"steps": "3"}, "config.steps: came '3' of type str; wanted int."),
        ({"steps": 3.0}, "config.steps: came 3.0 of type float; wanted int."),
        ({"steps": True}, "config.steps: came True of type bool; wanted int."),
        ({"steps": 1, "flag": 1}, "config.flag: came 1 of type int; wanted bool."),
        ({"steps": 1, "name": 5}, "config.name: came 5 of type int; wanted str."),
        ({"steps": 1, "name": None}, "config.name: came None of type NoneType; wanted str."),
        ({"steps": 1, "limit": 1.5}, "config.limit: came 1.5 of type float; wanted int."),
        ({"steps": 1, "inner": 3}, "config.inner: came 3 of type int; wanted keys among rate, kind, sizes."),
        ({"steps": 1, "inner": {"rate": "1e-3"}}, "config.inner.rate: came '1e-3' of type str; wanted float."),
        ({"steps": 1, "inner": {"rate": False}}, "config.inner.rate: came False of type bool; wanted float."),
        (
            {"steps": 1, "inner": {"kind": "wram"}},
            "config.inner.kind: came 'wram' of type str; wanted one of 'warm', 'cold'; did you mean 'warm'?",
        ),
        ({"steps": 1, "inner": {"kind": 3}}, "config.inner.kind: came 3 of type int; wanted one of 'warm', 'cold'."),
        (
            {"steps": 1, "inner": {"kind": [3]}},
            "config.inner.kind: came [3] of type list; wanted one of 'warm', 'cold'.",
        ),
        ({"steps": 1, "inner": {"sizes": [1, "2"]}}, "config.inner.sizes[1]: came '2' of type str; wanted int."),
        ({"steps": 1, "inner": {"sizes": 4}}, "config.inner.sizes: came 4 of type int; wanted tuple[int, ...]."),
        ({"steps": 1, "mesh": {"data": "8"}}, "config.mesh.data: came '8' of type str; wanted int."),
        ({"steps": 1, "mesh": "data"}, "config.mesh: came 'data' of type str; wanted dict[str, int]."),
        ({"steps": 0}, "config: steps=0; wanted at least 1."),
        ({"steps": 1, "inner": {"rate": -1}}, "config.inner: rate=-1.0; wanted at least 0."),
        (7, "config: came 7 of type int; wanted keys among steps, name, flag, limit, mesh, free, inner."),
    ],
)
def test_problems(values, problem):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    assert str(caught.value) == f"The configuration has errors:\n  {problem}"


def test_all_problems_come_in_one_message():
    with pytest.raises(ConfigError) as caught:
        build_all(
            (Outer, {"stepps": 2, "flag": 0, "inner": {"rate": "x", "kind": "hot"}}, "config"),
            (Inner, {"rate": -2.0}, "config.other"),
        )
    assert [line.partition(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "config.stepps",
        "config.steps",
        "config.flag",
        "config.inner.rate",
        "config.inner.kind",
        "config.other",
    ]
    made = build_all((Inner, {}, "a"), (Outer, {"steps": 2}, "b"))
    assert made == [Inner(), Outer(2)]


EXPERIMENT = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.task = "vq"
    config.total_steps = 4
    config.batch_size = 8
    config.optimizer = dict(learning_rate=1e-3)
    config.vq = dict(model=dict(size="debug"), data=dict(size=8))
    return config
"""


@pytest.fixture
def experiment(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    return str(file)


def test_overrides(experiment):
    tree = load_config(
        experiment,
        [
            "--config.total_steps=9",
            "--config.optimizer.learning_rate=2e-3",
            "--config.optimizer.schedule=constant",
            "--config.tensorboard=True",
            "--config.mesh={'fsdp': -1}",
            "--config.vq.model.channel_multipliers=(1, 2)",
            "--config.vq.data.path=",
            "--config.vq.data.name=image=folder",
            "--config.new.and.deep='7'",
            "--config.odd={[]: 1}",
            "--config.total_steps=10",
        ],
    )
    assert tree == {
        "task": "vq",
        "total_steps": 10,  # the last one counts
        "batch_size": 8,
        "optimizer": {"learning_rate": 2e-3, "schedule": "constant"},
        "tensorboard": True,
        "mesh": {"fsdp": -1},
        "vq": {
            "model": {"size": "debug", "channel_multipliers": (1, 2)},
            "data": {"size": 8, "path": "", "name": "image=folder"},
        },
        "new": {"and": {"deep": "7"}},
        "odd": "{[]: 1}",
    }


def test_experiments_and_overrides_that_cannot_be_read(experiment, tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    for path, overrides, message in [
        (tmp_path / "absent.py", [], "no such file; wanted an experiment such as experiments/lpd/digits.py"),
        (tmp_path, [], "no such file"),
        (tmp_path / "notes.txt", [], "not a Python file"),
        (tmp_path / "empty.py", [], r"has no get_config\(\) function"),
        (experiment, ["--config.total_steps"], r"--config\.total_steps: not understood; overrides look like --config"),
        (experiment, ["--config.total_steps.x=3"], "'total_steps' holds the value 4 and has no keys of its own"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(str(path), overrides)


# Through the entry points.


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ["--config.total_stpes=3"],
            ["config.total_stpes: unknown key with value 3; did you mean config.total_steps?"],
        ),
        (
            ["--config.optimizer.learning_rate=fast", "--config.log_every=0.5", "--config.vq.data.sizes=8"],
            [
                "config.optimizer.learning_rate: came 'fast' of type str; wanted float.",
                "config.log_every: came 0.5 of type float; wanted int.",
                "config.vq.data.sizes: unknown key with value 8; did you mean config.vq.data.size?",
            ],
        ),
        (["--config.vq=3"], ["config.vq: came 3 of type int; wanted keys among "]),
        (["--config.batch_size=0"], ["config: batch_size=0; wanted at least 1."]),
        (
            ["--config.batch_size=8", "--config.accumulate=3"],
            ["config: batch_size=8 is not a multiple of accumulate=3."],
        ),
        (["--config.keep=0"], ["config: keep=0; wanted at least 1."]),
        (["--config.seed=-1"], ["config: seed=-1; wanted at least 0."]),
        (["--config.average_decay=1.0"], ["config: average_decay=1.0; wanted at least 0 and less than 1."]),
        (
            ["--config.optimizer.learning_rate=-1.0"],
            ["config.optimizer: learning_rate=-1.0; wanted a positive number."],
        ),
        (
            ["--config.compute_dtype=float16"],
            ["config.compute_dtype: came 'float16' of type str; wanted one of 'float32',"],
        ),
    ],
)
@pytest.mark.parametrize("program", [train, evaluate], ids=["train", "evaluate"])
def test_errors_of_the_configuration(program, experiment, flags, lines, tmp_path, capsys):
    assert program.main([f"--config={experiment}", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *problems = captured.err.splitlines()
    assert first == "error: The configuration has errors:"
    assert len(problems) == len(lines)
    # In the order of the fields.
    assert all(any(problem.strip().startswith(line) for problem in problems) for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.task=lpdd"],
            "config.task: came 'lpdd'; wanted one of 'detection', 'duo_attention', 'language', "
            "'lidar_segmentation', 'lpd', 'passkey', 'vq'.",
        ),
        (
            ["--config.task=[1]"],
            "config.task: came [1]; wanted one of 'detection', 'duo_attention', 'language', "
            "'lidar_segmentation', 'lpd', 'passkey', 'vq'.",
        ),
        (["--config.batch_size=9"], "batch_size=9 does not split into accumulate=1 parts over data x fsdp = 8 devices"),
        (["--config.mesh={'model': 8}"], "mesh: unknown axis ['model']; the axes are data, fsdp,"),
        (["--config.mesh={'data': 3}"], "mesh: data=3 x fsdp=1 "),
        (["--config.vq.data.size=9"], "vq.data.size=9 is not a multiple of the tokenizer's stride 4."),
        (["--config.vq.model.size=huge"], ".size: came 'huge'; wanted one of 'vq16', 'debug'."),
        (["--config.vq.model.groups=3"], "level widths [8, 8, 16] are not multiples of groups=3"),
    ],
)
def test_what_cannot_be_set_up(experiment, flags, message, tmp_path, capsys, caplog):
    """One line on stderr, no workdir, and nothing compiled."""
    with jax.log_compiles():
        assert train.main([f"--config={experiment}", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(r"error: .*" + re.escape(message), captured.err, re.S), captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()
    assert "XLA compilation" not in caplog.text


def test_compilations_would_have_been_noticed(caplog):
    with jax.log_compiles():
        jax.jit(lambda x: x + 2)(jnp.arange(3))
    assert "XLA compilation" in caplog.text
