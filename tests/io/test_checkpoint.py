"""Checkpoints: names, the same bits on any mesh, and what happens to files, disks and processes that fail."""

import logging
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lumen.io import checkpoint
from lumen.io.checkpoint import Checkpointer, CheckpointError, flatten, unflatten

AUTO = AxisType.Auto


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = jax.vmap(lambda key: Layer(rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), 3))
        self.heads = nnx.List([nnx.Linear(4, 2, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])


def make_state(seed=0):
    """What training keeps: a module, its Adam moments after one step, a typed key, numbers of every kind."""
    model = Model(rngs=nnx.Rngs(seed))
    params = nnx.state(model, nnx.Param)
    optimizer = optax.adamw(1e-3)
    _, moments = optimizer.update(params, optimizer.init(params), params)
    return {
        "model": model,
        "optimizer": moments,
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        "empty": jnp.zeros((0, 3), jnp.int8),
        "counts": np.arange(3),
        "step": 17,
        "lr": 0.1,
    }


def bits(leaf) -> tuple:
    """Everything that must come back: type, dtype, shape and bytes."""
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), *bits(jax.random.key_data(leaf))
    return type(leaf), np.asarray(leaf).dtype, np.shape(leaf), np.asarray(leaf).tobytes()


def assert_same(got, want):
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for name in want:
        assert bits(got[name]) == bits(want[name]), name


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_bit(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def run(script: str, *args, devices=1, launcher=()) -> subprocess.Popen:
    """Runs a script in a fresh process, warnings as errors."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [*launcher, sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, timeout=120) -> str:
    with process:
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()  # nothing, if it has ended
    assert process.returncode == 0, output
    return output


def restored(checkpointer: Checkpointer, tree_like):
    found = checkpointer.restore(tree_like)
    assert found is not None
    return found


@pytest.fixture
def checkpointer(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        yield checkpointer


# Names.


def test_names_are_the_same_for_module_state_and_moments():
    state = make_state()
    names = ["blocks.down.kernel", "blocks.up.bias", "blocks.up.kernel"]
    names += [f"heads.{i}.{name}" for i in range(2) for name in ("bias", "kernel")]
    assert list(flatten(state["model"])) == names
    assert list(flatten(nnx.state(state["model"]))) == names
    assert list(flatten(state["optimizer"])) == [
        "0.count",
        *(f"0.{moment}.{name}" for moment in ("mu", "nu") for name in names),
    ]
    # A variable may hold a tree; and a parameter may be called `value`.
    assert list(flatten({"q": nnx.Param({"packed": 1, "value": 2})})) == ["q.packed", "q.value"]


def test_unflatten_is_the_inverse_and_lists_differences():
    state = make_state()
    flat = flatten(state)
    assert_same(unflatten(dict(reversed(flat.items())), state), state)
    abstract = jax.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))
    assert_same(unflatten(flatten(state["model"]), abstract), state["model"])

    flat = flatten(state["model"]) | {"more": np.zeros(2)}
    flat["heads.0.bias"] = jnp.zeros(5)
    flat["heads.1.bias"] = jnp.zeros(3, jnp.bfloat16)
    del flat["blocks.up.bias"]
    with pytest.raises(ValueError, match="4 differences") as caught:
        unflatten(flat, state["model"])
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "missing  blocks.up.bias: wanted float32[3, 8]",
        "extra    more: came float64[2]",
        "differs  heads.0.bias: came float32[5], wanted float32[2]",
        "differs  heads.1.bias: came bfloat16[3], wanted float32[3]",
    ]


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"\['a'\]\['b'\] and \['a\.b'\] would both be called 'a\.b'"):
        flatten({"a": {"b": 1}, "a.b": 2})


# Round trips.


def test_round_trip_of_training_state(checkpointer):
    state = make_state()
    extra = {"batches": b"\x00\xff grain", "nested": [1, 2.5, None, True, {"name": "x"}]}
    assert checkpointer.restore(state) is None
    checkpointer.save(12, state, extra)
    step, restored, got = checkpointer.restore(jax.tree.map(lambda leaf: leaf, make_state(seed=1)))
    assert step == 12
    assert got == extra
    assert_same(restored, state)
    assert isinstance(restored["model"], Model)
    assert sorted(os.listdir(checkpointer.directory / "00000012")) == ["extra.json", "manifest.json", "state"]


def test_training_goes_on_with_the_same_bits(checkpointer):
    """Restored moments and key continue exactly as the originals do."""
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params, moments, key):
        key, now = jax.random.split(key)
        noise = jax.random.normal(now, (4,))
        gradients = jax.grad(lambda params: ((params["w"] - noise) ** 2).sum())(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, key

    params = {"w": jnp.ones(4)}
    state = (params, optimizer.init(params), jax.random.key(0))
    start = state
    for i in range(4):
        if i == 2:
            checkpointer.save(i, state)
        state = step(*state)
    _, resumed, _ = checkpointer.restore(start)
    for _ in range(2):
        resumed = step(*resumed)
    assert_same(resumed, state)


def test_arrays_may_be_donated_or_changed_as_soon_as_save_returns(checkpointer):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AUTO,))
    spread = jax.device_put(jnp.arange(2.0**20), NamedSharding(mesh, PartitionSpec("x")))
    whole, host = jnp.arange(1000.0), np.arange(1000)
    state = {"spread": spread, "whole": whole, "host": host}
    want = jax.tree.map(lambda leaf: np.array(leaf), state)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpointer.save(0, state)
    spread, whole = overwrite(spread), overwrite(whole)
    host[:] = -1
    _, restored, _ = checkpointer.restore(want)
    assert_same(restored, want)


def test_save_returns_before_the_files_are_complete(checkpointer, monkeypatch):
    go_on = threading.Event()
    finish_save = Checkpointer._finish
    monkeypatch.setattr(Checkpointer, "_finish", lambda self, *args: (go_on.wait(60), finish_save(self, *args)))
    checkpointer.save(0, {"w": jnp.ones(3)})
    assert checkpointer.steps() == []  # and not yet a checkpoint
    go_on.set()
    checkpointer.wait()
    assert checkpointer.steps() == [0]


def test_uncommitted_arrays_stay_uncommitted(checkpointer):
    """A committed array on one device could not be combined with arrays on a mesh any more."""
    there = jax.device_put(jnp.ones(3), jax.devices()[3])
    state = {"anywhere": jnp.ones(3), "there": there}
    checkpointer.save(0, state)
    _, restored, _ = checkpointer.restore(state)
    assert not restored["anywhere"].committed
    assert restored["there"].sharding == there.sharding
    assert restored["there"].committed
    _, restored, _ = checkpointer.restore({name: jax.ShapeDtypeStruct((3,), jnp.float32) for name in state})
    assert not restored["there"].committed


def test_partial_restore_reads_what_is_asked_for(checkpointer):
    state = make_state()
    checkpointer.save(3, state)
    _, restored, _ = checkpointer.restore({"model": make_state(1)["model"]}, partial=True)
    assert_same(restored, {"model": state["model"]})
    with pytest.raises(CheckpointError, match="missing  other: wanted float32"):
        checkpointer.restore({"other": jnp.ones(3)}, partial=True)


def test_a_tree_that_differs_is_one_error_with_everything(checkpointer):
    checkpointer.save(3, {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)})
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore({"b": jnp.ones(4), "c": jnp.ones(3, jnp.bfloat16), "d": jnp.ones(1)})
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        f"{checkpointer.directory / '00000003'} has 4 differences from the wanted tree:",
        "missing  d: wanted float32[1]",
        "extra    a: came float32[3]",
        "differs  b: came float32[3], wanted float32[4]",
        "differs  c: came float32[3], wanted bfloat16[3]",
        "Build the tree with the configuration it was saved with.",
    ]


@pytest.mark.parametrize(
    ("tree", "extra", "message"),
    [
        ({"name": "x"}, {}, "name is a str"),
        ({"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, {}, "w is a ShapeDtypeStruct"),
        ({"w": jnp.ones(2)}, {"a": [np.ones(2)]}, r"extra\['a'\]\[0\] is a ndarray"),
        ({"w": jnp.ones(2)}, {"a": {1: 2}}, r"extra\['a'\] is a dict; .*string keys"),
    ],
)
def test_what_cannot_be_saved_is_named(checkpointer, tree, extra, message):
    with pytest.raises(TypeError, match=message):
        checkpointer.save(0, tree, extra)
    assert checkpointer.steps() == []


# Meshes.


def test_restore_onto_another_mesh(checkpointer):
    """Saved 8 ways; restored 2 x 4, on one device, and by a process that has one device only."""
    values = jax.random.normal(jax.random.key(0), (16, 8))
    keys = jax.random.split(jax.random.key(1), 8)
    eight = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(AUTO,)), PartitionSpec("x"))
    checkpointer.save(5, {"w": jax.device_put(values, eight), "keys": jax.device_put(keys, eight), "n": jnp.ones(3)})

    grid = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AUTO, AUTO))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    for sharding, keys_sharding, shard in [
        (NamedSharding(grid, PartitionSpec("tensor", "data")), NamedSharding(grid, PartitionSpec("tensor")), (4, 4)),
        (NamedSharding(grid, PartitionSpec()), NamedSharding(grid, PartitionSpec()), (16, 8)),
        (one, one, (16, 8)),
    ]:
        _, restored, _ = checkpointer.restore(
            {
                "w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding),
                "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=keys_sharding),
                "n": jnp.ones(3),
            }
        )
        assert restored["w"].sharding == sharding
        assert restored["w"].addressable_shards[0].data.shape == shard
        assert restored["keys"].sharding.is_equivalent_to(keys_sharding, 1)
        assert_same(restored, {"w": values, "keys": keys, "n": jnp.ones(3)})

    script = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from lumen.io.checkpoint import Checkpointer
        assert jax.device_count() == 1
        like = {"w": jnp.zeros((16, 8)), "keys": jax.random.split(jax.random.key(0), 8), "n": jnp.ones(3)}
        with Checkpointer(sys.argv[1]) as checkpointer:
            _, tree, _ = checkpointer.restore(like)
        np.savez(sys.argv[2], w=tree["w"], keys=jax.random.key_data(tree["keys"]))
    """
    file = checkpointer.directory / "values.npz"
    finish(run(script, checkpointer.directory, file))
    with np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["w"], values)
        np.testing.assert_array_equal(arrays["keys"], jax.random.key_data(keys))


def test_two_processes_save_and_restore_together(tmp_path):
    """The multi-host path for real: two processes, two devices each, one global array; then process 0 alone fails."""
    script = """
        import pathlib, sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.experimental import multihost_utils
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from lumen.io import checkpoint
        from lumen.io.checkpoint import Checkpointer, CheckpointError
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
        mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        values = np.arange(64.0, dtype=np.float32)
        spread = jax.make_array_from_callback((64,), sharding, lambda index: values[index])
        tree = {"spread": spread, "local": jnp.ones(3), "host": np.arange(2), "step": 4}
        checkpointer = Checkpointer(sys.argv[1], keep=1)
        assert checkpointer.restore(tree) is None
        for step in (1, 2):
            checkpointer.save(step, tree, {"step": step})
        step, got, extra = checkpointer.restore(tree)
        assert (step, extra, got["step"], checkpointer.steps()) == (2, {"step": 2}, 4, [2])
        assert got["spread"].sharding == sharding
        for shard in got["spread"].addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])
        np.testing.assert_array_equal(got["local"], tree["local"])

        folder = pathlib.Path(sys.argv[1]) / "00000003"
        multihost_utils.sync_global_devices("both have restored")
        if jax.process_index() == 0:
            folder.parent.joinpath("00000002", "extra.json").write_text("damaged")
        try:
            checkpointer.restore(tree)
            raise SystemExit("restored a damaged checkpoint")
        except CheckpointError as error:
            print(jax.process_index(), error)
        def failing(*_, **__):
            raise OSError(28, "No space left on device")
        checkpoint._digest = failing  # which process 0 alone calls
        checkpointer.save(3, tree)
        try:
            checkpointer.close()
            raise SystemExit("lost an error")
        except CheckpointError as error:
            print(jax.process_index(), error)
        assert jax.process_index() == 1 or not folder.exists()
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [run(script, tmp_path / "c", port, index, devices=2) for index in range(2)]
    first, second = map(finish, processes)
    assert "0 no checkpoint in" in first
    assert re.search("1 process 0 could not go on", second)
    assert re.search("0 step 3 could not be saved in .*: No space left on device", first)
    assert re.search("1 step 3 could not be saved in .*process 0 could not save it", second)


# Damage.


def save_two(checkpointer):
    trees = {step: {"w": jnp.full((300, 300), step, jnp.float32), "b": jnp.ones(3)} for step in (1, 2)}
    for step, tree in trees.items():
        checkpointer.save(step, tree, {"step": step})
    checkpointer.wait()
    return trees


def truncate(folder):
    file = largest_file(folder)
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: flip_bit(largest_file(folder)),
            r"state/.* has changed since it was written \(its SHA-256 differs\)",
        ),
        (truncate, r"state/.* has \d+ bytes, not the \d+ that were written"),
        (lambda folder: largest_file(folder).unlink(), r"state/.* cannot be read: No such file or directory"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json is missing \(the save was cut off"),
        (lambda folder: os.truncate(folder / "manifest.json", 100), r"manifest\.json cannot be read: JSONDecodeError"),
        (lambda folder: os.truncate(folder / "manifest.json", 0), r"manifest\.json cannot be read: JSONDecodeError"),
        (
            lambda folder: (folder / "manifest.json").write_text("{}"),
            r"manifest\.json cannot be read: KeyError: 'step'",
        ),
        (lambda folder: flip_bit(folder / "extra.json"), r"extra\.json has changed since it was written"),
        (
            lambda folder: shutil.copytree(folder.parent / "00000001", folder, dirs_exist_ok=True),
            r"manifest\.json is that of step 1",
        ),
    ],
    ids=["bit", "truncated", "absent", "no-manifest", "half-manifest", "empty-manifest", "not-ours", "extra", "copied"],
)
def test_damaged_checkpoint_is_passed_over(checkpointer, caplog, damage, message):
    trees = save_two(checkpointer)
    damaged = checkpointer.directory / "00000002"
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        step, restored, extra = checkpointer.restore(trees[2])
    assert (step, extra) == (1, {"step": 1})
    assert_same(restored, trees[1])
    assert len(caplog.messages) == 1
    assert re.fullmatch(
        rf"checkpoint {re.escape(str(damaged))} passed over: {message}.*; trying step 1 instead\.", caplog.messages[0]
    )
    with pytest.raises(CheckpointError, match=rf"00000002: {message}.*choose one of them"):
        checkpointer.restore(trees[2], step=2)
    assert checkpointer.restore(trees[1], step=1)[0] == 1


def test_every_single_damaged_file_is_noticed(checkpointer):
    trees = save_two(checkpointer)
    folder = checkpointer.directory / "00000002"
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 5
    for file in files:
        whole = file.read_bytes()
        flip_bit(file)
        assert checkpointer.restore(trees[1])[0] == 1, file
        file.write_bytes(whole)
    assert checkpointer.restore(trees[1])[0] == 2


def test_nothing_intact_is_an_error_but_nothing_complete_is_a_fresh_start(checkpointer, caplog):
    trees = save_two(checkpointer)
    for step in (1, 2):
        flip_bit(largest_file(checkpointer.directory / f"{step:08d}"))
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint in .* is intact \(step 2: .*; step 1: .*move the dir"
    ):
        checkpointer.restore(trees[1])
    assert "there is no older one" in caplog.messages[-1]
    for step in (1, 2):
        (checkpointer.directory / f"{step:08d}" / "manifest.json").unlink()
    assert checkpointer.restore(trees[1]) is None  # two saves that were cut off: there never was a checkpoint
    with pytest.raises(CheckpointError, match="00000007: does not exist"):
        checkpointer.restore(trees[1], step=7)


# Keeping.


def test_old_checkpoints_are_removed_after_the_new_one_is_complete(tmp_path, monkeypatch):
    present = []
    write = checkpoint._write_durably
    with Checkpointer(tmp_path, keep=2) as checkpointer:

        def watch(path, text):
            write(path, text)
            if path.name == "manifest.json":
                present.append(checkpointer.steps())

        monkeypatch.setattr(checkpoint, "_write_durably", watch)
        for step in (1, 2, 3, 10):
            checkpointer.save(step, {"w": jnp.ones(2)})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 10]
        assert present == [[1], [1, 2], [1, 2, 3], [2, 3, 10]]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_spoil_the_new_one(tmp_path, monkeypatch, caplog):
    def failing(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoint, "_remove", failing)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": jnp.ones(2)})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
    assert "00000001, too old to keep, could not be removed: [Errno 13] Permission denied" in caplog.text


def test_a_rerun_from_an_older_step_keeps_what_it_writes(tmp_path, caplog):
    """After a fall-back the damaged newest one must not push out the new ones, and is replaced when its turn comes."""
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(10, {"w": jnp.zeros(2)})
        checkpointer.wait()
        flip_bit(largest_file(tmp_path / "00000010"))
        checkpointer.save(5, {"w": jnp.full(2, 5.0)})
        checkpointer.wait()
        assert restored(checkpointer, {"w": jnp.zeros(2)})[0] == 5
        checkpointer.save(10, {"w": jnp.full(2, 10.0)})
        step, tree, _ = restored(checkpointer, {"w": jnp.zeros(2)})
        assert (step, float(tree["w"][0]), checkpointer.steps()) == (10, 10.0, [10])
        assert "exists; replacing it" in caplog.text


def test_leftovers_are_removed_by_the_next_save_not_by_readers(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2)})
    leftover = tmp_path / "00000002" / "state.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with Checkpointer(tmp_path) as reader:  # it may be a live training's save in progress
        assert restored(reader, {"w": jnp.zeros(2)})[0] == 1
        assert leftover.exists()
        reader.save(3, {"w": jnp.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000003", "notes.txt"]
    assert "00000002 is not complete (its save or its removal was cut off); removing what is left" in caplog.text


# Disks and processes that fail.

FULL_DISK = """
    import os, resource, subprocess, sys
    import jax.numpy as jnp
    from lumen.io.checkpoint import Checkpointer, CheckpointError
    directory, kind = sys.argv[1:]
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    with Checkpointer(directory) as checkpointer:
        small, large = {"w": jnp.arange(1000.0)}, {"w": jnp.arange(2.0**20)}  # 4 KB and 4 MB
        checkpointer.save(1, small)
        for late in (checkpointer.wait, lambda: checkpointer.save(9, small)):
            try:
                checkpointer.save(2, large)
                late()
                sys.exit("no error")
            except CheckpointError as error:
                print("ERROR", error)
            assert checkpointer.steps() == [1], checkpointer.steps()
            assert os.listdir(directory) == ["00000001"], os.listdir(directory)
        step, tree, _ = checkpointer.restore(small)
        assert step == 1 and (tree["w"] == small["w"]).all()
        checkpointer.save(3, small)  # there is room again
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]
"""


@pytest.mark.parametrize(
    ("kind", "cause", "fix"),
    [("tmpfs", "No space left on device", "free some space"), ("limit", "File too large", "raise the file size limit")],
)
def test_full_disk(tmp_path, kind, cause, fix):
    """A real one: a 2 MB tmpfs in a mount namespace of its own; and a file size limit, which needs no privilege."""
    launcher = ("unshare", "-rm") if kind == "tmpfs" else ()
    if kind == "tmpfs":
        probe = [*launcher, "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
        if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
            pytest.skip("this machine does not let a process mount; the file size limit stands in")
    output = finish(run(FULL_DISK, tmp_path, kind, launcher=launcher))
    # Nothing but the two errors: no traceback of Orbax's, no chatter.
    want = f"ERROR step 2 could not be saved in {tmp_path}: {cause}; {fix}"
    assert [line[: len(want)] for line in output.splitlines()] == [want, want]
    assert output.count("Checkpoints saved before are untouched.") == 2


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with Checkpointer(tmp_path / "file" / "checkpoints") as checkpointer:
        assert checkpointer.restore({"w": jnp.ones(2)}) is None
        with pytest.raises(CheckpointError, match=r"step 0 could not be saved in .*/file/checkpoints: Not a directory"):
            checkpointer.save(0, {"w": jnp.ones(2)})


def test_an_error_in_the_background_is_raised_once(checkpointer, monkeypatch):
    checkpointer.save(1, {"w": jnp.ones(2)})
    checkpointer.wait()
    with monkeypatch.context() as patch:

        def failing(*_, **__):
            raise OSError(5, "Input/output error")

        patch.setattr(checkpoint, "_digest", failing)
        checkpointer.save(2, {"w": jnp.ones(2)})
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved in .*Input/output error"):
            checkpointer.save(3, {"w": jnp.ones(2)})
    checkpointer.wait()
    assert checkpointer.steps() == [1]


KILLED = """
    import os, random, signal, sys, time, warnings
    import jax, jax.numpy as jnp
    from lumen.io.checkpoint import Checkpointer

    def train(directory, keep, ready):
        # Saves as fast as it can, from where the one killed before it had come.
        make = lambda step: {"w": jnp.arange(2.0**16) + step, "key": jax.random.key(step)}
        with Checkpointer(directory, keep=keep) as checkpointer:
            found = checkpointer.restore(make(0))
            step = 0
            if found is not None:
                step, tree, extra = found
                assert extra == {"step": step}
                assert (tree["w"] == make(step)["w"]).all() and tree["key"] == make(step)["key"]
            print("found", step, flush=True)
            os.write(ready, b"!")
            while True:
                step += 1
                checkpointer.save(step, make(step), {"step": step})

    random.seed(0)
    for round in range(int(sys.argv[2])):
        begun, ready = os.pipe()
        with warnings.catch_warnings():  # JAX objects to forks; it has not started its threads yet
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            try:
                train(sys.argv[1], (2, 1000)[round % 2], ready)  # removing old ones is cut off too
            finally:
                os._exit(1)
        os.close(ready)
        assert os.read(begun, 1), "training failed before its first save"
        time.sleep(random.uniform(0.1, 0.5))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "training failed before it was killed"
"""


def test_killed_at_any_moment(tmp_path):
    """Every restart finds a whole checkpoint, not older than the one before; at the end only whole ones verify."""
    output = finish(run(KILLED, tmp_path, 6))
    found = [int(step) for step in re.findall(r"found (\d+)", output)]
    assert len(found) == 6
    assert found == sorted(found)
    assert found[-1] > 0
    # At least one was killed in the middle of a save: its remains are newer than what the next one found.
    assert any(int(left) > int(step) for step, left in re.findall(r"found (\d+)\n.*/(\d+) is not complete", output))
    with Checkpointer(tmp_path) as checkpointer:
        last = checkpointer.steps()[-1]
        step, tree, extra = restored(checkpointer, {"w": jnp.zeros(2**16), "key": jax.random.key(0)})
    assert step == last == extra["step"]
    assert_same(tree, {"w": jnp.arange(2.0**16) + step, "key": jax.random.key(step)})


def test_a_process_that_ends_without_close_says_what_is_lost(tmp_path):
    script = """
        import os, sys, time
        import jax.numpy as jnp
        from lumen.io.checkpoint import Checkpointer
        mkdir = os.mkdir
        os.mkdir = lambda *arguments: (time.sleep(0.5), mkdir(*arguments))  # a slow disk: the end comes first
        Checkpointer(sys.argv[1]).save(1, {"w": jnp.arange(2.0**22)})
    """
    output = finish(run(script, tmp_path))  # ends, that is
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1] or "ended without waiting for it: call Checkpointer.close()" in output


def test_orbax_is_quiet(tmp_path, caplog):
    with caplog.at_level(logging.INFO), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"w": jnp.ones(2)})
        checkpointer.restore({"w": jnp.ones(2)})
    assert [record for record in caplog.records if "orbax" in record.pathname] == []
