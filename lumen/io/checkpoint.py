"""Training checkpoints: dotted names for any tree, written by Orbax in the background and proven intact before use.

    directory/00001200/state/          the arrays, one Orbax tree {dotted name: array}
                       extra.json      what goes with them, the position in the data included
                       manifest.json   SHA-256 and size of every other file; written last, so a save cut off has none

Orbax by itself hands back a flipped bit without a word, hence the manifest.
"""

import atexit
import base64
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

_LOG = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_EXTRA = "extra.json"
_STATE = "state"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used. The message names the directory, the cause and what to do."""


# Names.


def named_leaves(tree) -> list[tuple[str, Any, nnx.Variable | None]]:
    """Lists the leaves of a tree with their dotted names, in the order of `jax.tree.leaves`.

    A name is the path of attribute names, keys and indices joined with dots: `blocks.attention.qkv.kernel`,
    `levels.0.bias`, `1.0.mu.head.kernel`. An nnx.Variable adds nothing to the name, so a module and its `nnx.state`
    give the same names.

    Returns:
      (name, leaf, the nnx.Variable that holds the leaf or None) of every leaf.
    Raises:
      ValueError: if two leaves would have the same name, e.g. {"a": {"b": x}, "a.b": y}.
    """
    found, seen = [], {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        variable = node if isinstance(node, nnx.Variable) else None
        inner = [((), node)] if variable is None else jax.tree_util.tree_leaves_with_path(node.get_value())
        for rest, leaf in inner:
            full = path + tuple(rest)
            name = jax.tree_util.keystr(full, simple=True, separator=".")
            if name in seen:
                raise ValueError(
                    f"flatten: {jax.tree_util.keystr(seen[name])} and {jax.tree_util.keystr(full)} would both be "
                    f"called '{name}'; rename one of the keys so that it has no dot in it."
                )
            seen[name] = full
            found.append((name, leaf, variable))
    return found


def flatten(tree) -> dict[str, Any]:
    """Turns any tree of arrays (nnx modules and states, optax states, dicts, lists) into {dotted name: leaf}.

    Names do not depend on the mesh, and depend on Python classes only through their field names; see `named_leaves`.

    Raises:
      ValueError: if two leaves would have the same name.
    """
    return {name: leaf for name, leaf, _ in named_leaves(tree)}


def unflatten[Tree](flat: Mapping[str, Any], like: Tree) -> Tree:
    """Puts named leaves back into a tree: the inverse of `flatten`.

    Args:
      flat: {dotted name: leaf}.
      like: a tree of the wanted structure; its leaves (arrays, jax.ShapeDtypeStruct) give the wanted shapes and dtypes.
        A leaf without a shape, here or in `flat`, is not compared.
    Returns:
      A tree of `like`'s structure with the leaves of `flat`.
    Raises:
      ValueError: listing every missing name, every extra name and every shape or dtype that differs.
    """
    wanted = flatten(like)
    if differences := _differences(flat, wanted):
        raise ValueError(_mismatch(differences))
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in wanted])


def _differences(came: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    lines = [f"missing  {name}: wanted {_spec(leaf)}" for name, leaf in wanted.items() if name not in came]
    lines += [f"extra    {name}: came {_spec(leaf)}" for name, leaf in came.items() if name not in wanted]
    lines += [
        f"differs  {name}: came {_spec(came[name])}, wanted {_spec(leaf)}"
        for name, leaf in wanted.items()
        if name in came and hasattr(leaf, "shape") and hasattr(came[name], "shape") and _spec(came[name]) != _spec(leaf)
    ]
    return lines


def _mismatch(differences: list[str]) -> str:
    return (
        f"{len(differences)} differences from the wanted tree:\n  "
        + "\n  ".join(differences)
        + "\nBuild the tree with the configuration it was saved with."
    )


def _spec(leaf) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else type(leaf).__name__


def wanted_sharding(leaf) -> jax.sharding.Sharding | None:
    """Where an array that takes this leaf's place belongs; None if anywhere will do.

    An array that was never given a place is uncommitted: jit may move it to any mesh, and so what replaces it.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False):
        return leaf.sharding
    return None


# Checkpoints.


class Checkpointer:
    """Saves training state in the background and restores the newest intact checkpoint.

    All processes call every method alike, on a filesystem they share; process 0 does everything but the arrays. One
    Checkpointer writes to a directory at a time; any number may restore from it.

    Args:
      directory: where the checkpoints are, each in a folder named after its step; made by the first save.
      keep: after a save, this many checkpoints up to and including its step are kept, the older ones removed.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"Checkpointer: keep={keep}; wanted 1 or more.")
        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._step = -1
        self._failure: Exception | None = None
        _quieten_orbax()
        # Weights hardly compress, and compressing them takes longer than writing them.
        # Folders made in the background are signalled to threads, which wait ten minutes for the signal of a process
        # that has ended.
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False),
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        atexit.register(self._report_at_exit)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def save(self, step: int, tree, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save a tree, and returns as soon as it is copied: its arrays may then be donated or changed.

        Waits for the save before this one. A step that was saved before is replaced. Folders of saves that were cut off
        are removed.

        Args:
          step: number of the checkpoint, 0 or more.
          tree: arrays, PRNG keys and numbers in any tree; see `flatten` for their names.
          extra: what is not an array: dicts with string keys, lists, strings, numbers, None and bytes (such as the
            state of a Grain iterator). With several processes, that of process 0 is written.
        Raises:
          CheckpointError: if this save cannot start, or if the one before it failed: on a full disk or an unwritable
            directory, say. Checkpoints saved before are untouched.
          TypeError: for something in `tree` or `extra` that cannot be saved.
        """
        self.wait()
        if step < 0:
            raise ValueError(f"save: step={step}; wanted 0 or more.")
        text = json.dumps(_encode(extra or {}, "extra"), indent=1)
        arrays = {name: _stored(name, leaf) for name, leaf in flatten(tree).items() if np.size(leaf)}
        folder = self._folder(step)
        try:
            _on_first_process(lambda: self._prepare(folder))
            self._orbax.save(folder / _STATE, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:  # Orbax and TensorStore raise what they like for a full disk
            self._discard(folder)
            raise self._not_saved(step, error) from error
        self._step = step
        self._thread = threading.Thread(target=self._finish, args=(folder, step, text), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Blocks until the save in progress is complete on disk.

        Raises:
          CheckpointError: if it failed; raised once. What it had written is removed.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.array(failure is not None))
            if failed.any() and failure is None:
                failure = CheckpointError(f"process {int(np.argmax(failed))} could not save it; its log says why")
        if failure is not None:
            self._discard(self._folder(self._step))
            raise self._not_saved(self._step, failure) from failure

    def close(self) -> None:
        """Waits for the save in progress and frees the background threads.

        Raises:
          CheckpointError: if that save failed.
        """
        try:
            self.wait()
        finally:
            atexit.unregister(self._report_at_exit)
            with contextlib.suppress(Exception):  # a failed save is reported by wait, a second time by Orbax
                self._orbax.close()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending. Complete: its manifest is there; not yet: it verifies."""
        return [step for step in self._folders() if (self._folder(step) / _MANIFEST).exists()]

    def restore[Tree](
        self, tree_like: Tree, step: int | None = None, *, partial: bool = False
    ) -> tuple[int, Tree, dict[str, Any]] | None:
        """Reads a checkpoint whose every file is as it was written.

        Args:
          tree_like: the wanted tree: arrays, or jax.ShapeDtypeStructs, whose shardings say where each array goes; the
            mesh need not be the one it was saved from. A leaf without a sharding, and an uncommitted array, gives an
            uncommitted array on the default device; NumPy arrays and Python numbers come back as such.
          step: which checkpoint. None: the newest intact one; those passed over are logged as warnings, with the file
            that is damaged.
          partial: leave out what `tree_like` does not ask for (evaluation needs no optimizer state) instead of raising.
        Returns:
          (step, tree, extra), or None if `step` is None and nothing was ever saved completely.
        Raises:
          CheckpointError: if the checkpoint of `step` is absent or damaged, or all are; or listing every name, shape
            and dtype in which the checkpoint and `tree_like` differ.
        """
        self.wait()
        step = _on_first_process(lambda: self._newest_intact() if step is None else self._intact(step))
        if step == -1:
            return None
        folder = self._folder(step)
        wanted = flatten(tree_like)
        stored = {name: _stored_like(leaf) for name, leaf in wanted.items() if np.size(leaf)}
        try:
            saved: Any = self._orbax.metadata(folder / _STATE).item_metadata
            kept = {name: spec for name, spec in saved.tree.items() if not partial or name in stored}
            if differences := _differences(kept, stored):
                raise CheckpointError(f"{folder} has {_mismatch(differences)}")
            arrays = self._orbax.restore(
                folder / _STATE,
                args=ocp.args.PyTreeRestore(
                    item=stored,
                    restore_args={name: _restore_args(spec) for name, spec in stored.items()},
                    partial_restore=partial,
                ),
            )
            extra = _decode(json.loads((folder / _EXTRA).read_text()))
        except CheckpointError:
            raise
        except Exception as error:  # whatever Orbax raises: every file has been verified, so this is no damage
            raise CheckpointError(f"{folder} is intact, but cannot be restored: {error}") from error
        leaves = [_restored(arrays.get(name), leaf) for name, leaf in wanted.items()]
        return step, jax.tree.unflatten(jax.tree.structure(tree_like), leaves), extra

    # Writing.

    def _prepare(self, folder: pathlib.Path) -> int:
        """Removes saves that were cut off, and what is in the way; then makes the step's folder."""
        for step in self._folders():
            cut_off = self._folder(step)
            if not (cut_off / _MANIFEST).exists():
                _LOG.warning(
                    "checkpoint %s is not complete (its save or its removal was cut off); removing what is left.",
                    cut_off,
                )
                shutil.rmtree(cut_off)
        if folder.exists():
            _LOG.warning("checkpoint %s exists; replacing it.", folder)
            _remove(folder)
        folder.mkdir(parents=True)
        return 0

    def _finish(self, folder: pathlib.Path, step: int, extra: str) -> None:
        """In the background: waits for the arrays, then makes the checkpoint whole and removes old ones."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                _write_durably(folder / _EXTRA, extra)
                names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    files = dict(
                        zip(names, pool.map(lambda name: _digest(folder / name, sync=True), names), strict=True)
                    )
                for path in [*filter(pathlib.Path.is_dir, folder.rglob("*")), folder.parent]:
                    _sync_folder(path)
                _write_durably(folder / _MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
                self._prune(step)
        except Exception as error:  # handed to the next wait
            self._failure = error

    def _prune(self, step: int) -> None:
        # Later steps are of an earlier run, which this one has gone back behind: they do not count, and stay.
        for old in [other for other in self.steps() if other <= step][: -self._keep]:
            try:
                _remove(self._folder(old))
            except OSError as error:  # the new checkpoint is complete all the same
                _LOG.warning("checkpoint %s, too old to keep, could not be removed: %s", self._folder(old), error)

    def _discard(self, folder: pathlib.Path) -> None:
        """Frees the space of a save that failed. What cannot be removed now is removed by the next save."""
        if jax.process_index() == 0 and not (folder / _MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)

    def _report_at_exit(self) -> None:
        """Python stops lending threads before it waits for those that run, so a save that nobody waits for fails."""
        if self._failure is not None:
            error = self._not_saved(self._step, self._failure)
            _LOG.error("%s The process ended without waiting for it: call Checkpointer.close().", error)

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        cause, fix = _explain(error)
        return CheckpointError(
            f"step {step} could not be saved in {self.directory}: {cause}; {fix}. "
            "Checkpoints saved before are untouched."
        )

    # Reading.

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / f"{step:08d}"

    def _folders(self) -> list[int]:
        try:
            return sorted(int(name) for name in os.listdir(self.directory) if re.fullmatch(r"\d{8,}", name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _intact(self, step: int) -> int:
        if fault := _fault(self._folder(step), step):
            raise CheckpointError(
                f"checkpoint {self._folder(step)}: {fault}. Complete checkpoints in {self.directory}: "
                f"{self.steps() or 'none'}; choose one of them, or no step for the newest intact one."
            )
        return step

    def _newest_intact(self) -> int:
        damaged = []
        steps = self._folders()
        while steps:
            step = steps.pop()
            folder = self._folder(step)
            fault = _fault(folder, step)
            if fault is None:
                return step
            follows = f"trying step {steps[-1]} instead" if steps else "there is no older one"
            _LOG.warning("checkpoint %s passed over: %s; %s.", folder, fault, follows)
            if (folder / _MANIFEST).exists():
                damaged.append(f"step {step}: {fault}")
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is intact ({'; '.join(damaged)}). Put back a copy of one of them, "
                "or move the directory away to start from the beginning."
            )
        return -1


# Files.


def _fault(folder: pathlib.Path, step: int) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every file is as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["step"] != step:
            return f"{_MANIFEST} is that of step {manifest['step']}"
        files = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            return "does not exist"
        return f"{_MANIFEST} is missing (the save was cut off, or is still being written)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {type(error).__name__}: {error}"

    def fault_of(name: str) -> str | None:
        size, digest = files[name]
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not the {size} that were written"
            if _digest(folder / name)["sha256"] != digest:
                return f"{name} has changed since it was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return next(filter(None, pool.map(fault_of, files)), None)


def _digest(path: pathlib.Path, *, sync: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _write_durably(path: pathlib.Path, text: str) -> None:
    """The file appears whole or not at all, and stays after a power cut."""
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync_folder(path.parent)


def _sync_folder(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: pathlib.Path) -> None:
    """The manifest goes first: what is left if this is cut short is no checkpoint any more."""
    with contextlib.suppress(FileNotFoundError):
        (folder / _MANIFEST).unlink()
    shutil.rmtree(folder)


# The operating system's words, as they appear in the messages of Orbax and TensorStore, and what to do.
_FIXES = {
    errno.ENOSPC: "free some space or keep fewer checkpoints",
    errno.EDQUOT: "free some space or keep fewer checkpoints",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another file system",
    errno.EROFS: "choose a directory that can be written to",
    errno.EACCES: "choose a directory that can be written to",
    errno.EPERM: "choose a directory that can be written to",
    errno.ENOTDIR: "choose a directory that is not below a file",
}


def _explain(error: BaseException) -> tuple[str, str]:
    """The operating system's cause behind an error, and the fix."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    for code, fix in _FIXES.items():
        if any(getattr(link, "errno", None) == code or os.strerror(code) in str(link) for link in chain):
            return os.strerror(code), fix
    return f"{type(error).__name__}: {error}", "mend that and save again"


@functools.cache
def _quieten_orbax() -> None:
    """Once in a process: leaves of Orbax's messages those that say something new.

    When one array cannot be written, Orbax raises that error and ends its event loop; the errors of the other arrays
    then surface one by one, from asyncio and from the threads of TensorStore, which find the loop closed.
    """
    show = sys.unraisablehook

    def show_others(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = show_others
    logging.getLogger("absl").addFilter(_not_orbax_chatter)
    logging.getLogger("asyncio").addFilter(_not_orbax_leftover)


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    """Orbax tells every step at INFO, and the errors that it raises as well."""
    return "/orbax/" not in record.pathname or (record.levelno >= logging.WARNING and not record.exc_info)


def _not_orbax_leftover(record: logging.LogRecord) -> bool:
    lost = "exception was never retrieved" in record.getMessage()
    return not (lost and "orbax" in logging.Formatter().format(record))


# Processes.


def _on_first_process(call: Callable[[], int]) -> int:
    """Runs `call` on process 0 alone; its result is everybody's, and so is its failure."""
    if jax.process_count() == 1:
        return call()
    result, failure = 0, None
    if jax.process_index() == 0:
        try:
            result = call()
        except Exception as error:
            failure = error
    failed, result = multihost_utils.broadcast_one_to_all((np.array(failure is not None), np.array(result)))
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError("process 0 could not go on; its log says why")
    return int(result)


# Leaves.


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(name: str, leaf) -> jax.Array | np.ndarray:
    """What is written for a leaf: device arrays as they are, a key's data, a copy of anything on the host."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return leaf
    value = np.array(leaf)
    if value.dtype.kind in "OSUMm":
        raise TypeError(
            f"save: {name} is a {type(leaf).__name__}; wanted an array or a number; give the rest as `extra`."
        )
    return value


def _stored_like(leaf) -> jax.ShapeDtypeStruct | np.ndarray:
    """What was written for such a leaf: with a sharding if Orbax is to put it there, on the host otherwise."""
    sharding = wanted_sharding(leaf)
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if sharding is not None and jax.process_count() > 1 and sharding.is_fully_addressable:
        sharding = None  # on this process alone
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _restore_args(spec) -> ocp.RestoreArgs:
    if spec.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=spec.sharding, global_shape=spec.shape, dtype=spec.dtype)


def _restored(value, leaf):
    """The leaf's successor, from what was stored."""
    if value is None:  # no values: an array with an axis of size 0 is not stored
        value = np.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return value
    if not hasattr(leaf, "dtype"):
        return type(leaf)(value)
    if isinstance(value, np.ndarray):
        value = jax.device_put(value, wanted_sharding(leaf))
    if _is_key(leaf):
        implementations = []
        jax.eval_shape(lambda keys: implementations.append(jax.random.key_impl(keys)), leaf)
        return jax.random.wrap_key_data(value, impl=implementations[0])
    return value


# Extra.


def _encode(value, where: str) -> Any:
    """JSON for a value; bytes as {"__bytes__": base64}."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key != "__bytes__" for key in value):
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"save: {where} is a {type(value).__name__}; wanted None, a number, a string, bytes, a list or a dict with "
        "string keys (but '__bytes__'); arrays belong in the tree."
    )


def _decode(value) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__bytes__"}:
            return base64.b64decode(value["__bytes__"])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
