"""Published weights in and out, through one table of `Rule`s per model (see `lumen.io.names`).

    RULES = [
        Rule("blocks.{layer}.attn.qkv.weight", "blocks.attention.qkv.kernel", "(c n h) d -> d c n h"),
        Rule("down.{i}.conv.weight", "levels.{i}.conv.kernel", "o i h w -> h w i o"),
    ]

A table is read in both directions: `load` and `save` for files, `from_original` and `to_original` for arrays in memory.
`read` and `write_folder` are the files alone, without a table: one tensor at a time, so that a large model is in memory
once.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from lumen.io.checkpoint import named_leaves, wanted_sharding


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one kind of published tensor goes.

    Attributes:
      original: name in the published file; `{name}` stands for an integer.
      ours: dotted parameter name. A placeholder that appears here too is a list index; one that does not is a stacked
        leading axis of our array, several of them in the order of `original`.
      axes: how the axes go from the published tensor to ours, stacked axes left out: "o i -> i o" for a linear layer,
        "o i h w -> h w i o" for a convolution, "(c n h) d -> d c n h" to split an axis, "1 1 d -> d" to drop axes of
        size 1, "same" for no change. Sizes are read off our array, so every axis stands alone on the right.
    """

    original: str
    ours: str
    axes: str = "same"


def norm_rules(original: str, ours: str) -> list[Rule]:
    """The rules of a torch BatchNorm, whose arrays are called scale, bias, mean and var here."""
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return [Rule(f"{original}.{theirs}", f"{ours}.{name}") for theirs, name in names.items()]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One published tensor and its place: `ours[index]`, of the given shape without the stacked axes."""

    ours: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    axes: str

    def __str__(self):
        return self.ours + "".join(f"[{i}]" for i in self.index)


def load[Model: nnx.Module](
    path_or_dict: str | os.PathLike | Mapping[str, Any],
    model: Model,
    rules: Sequence[Rule],
    ignored: Sequence[str] = (),
    *,
    prefix: str = "",
) -> Model:
    """Returns a copy of a model with the weights of a published file.

    Args:
      path_or_dict: a .safetensors file; a directory with model.safetensors, or with model.safetensors.index.json and
        its shards; a .npz file; a .pt or .pth file (needs `pip install lumen[convert]`; a state dict, or a dict holding
        it under "model" or "model_state"; read by `torch.load(weights_only=True)`, so nothing in it is executed); or
        {name: array}.
      model, rules, ignored, prefix: as in `from_original`.
    Raises:
      FileNotFoundError: naming the file, or every shard, that is not there.
      ValueError: naming the file that cannot be read and why; or listing every mismatch, as in `from_original`.
      ImportError: for a .pt or .pth file where torch is not installed.
    """
    tensors = path_or_dict if isinstance(path_or_dict, Mapping) else read(pathlib.Path(path_or_dict))
    return from_original(tensors, model, rules, ignored, prefix=prefix)


def save(path: str | os.PathLike, model: nnx.Module, rules: Sequence[Rule]) -> None:
    """Writes a model under its published names into one .safetensors file.

    The same weights always give the same bytes. The file appears whole or not at all: it is written beside its place
    and renamed.

    Raises:
      ValueError: as in `to_original`.
      OSError: if the file cannot be written; what was at `path` before is left as it was.
    """
    path = pathlib.Path(path)
    tensors = original_views(model, rules)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_safetensors(unfinished, _header(tensors), tensors)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"save: cannot write {path}: {error}; free some space or choose another path.") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def from_original[Model: nnx.Module](
    tensors: Mapping[str, Any],
    model: Model,
    rules: Sequence[Rule],
    ignored: Sequence[str] = (),
    *,
    prefix: str = "",
) -> Model:
    """Returns a copy of a model with published weights.

    Args:
      tensors: {published name: array}.
      model: a model, or an abstract one from `jax.eval_shape(lambda: Model(cfg, rngs=nnx.Rngs(0)))`. It gives the
        shapes, the dtypes that weights are cast to and, where its leaves have one, the shardings they are put on.
      rules: the table of this model.
      ignored: regular expressions; a name that one of them matches whole carries no weight and is passed over.
      prefix: taken off the front of the names that start with it, e.g. "module." or "vae.".
    Returns:
      A new model. The variables of a concrete model that no rule covers keep their values, if they are neither
      nnx.Param nor floating-point: counters, constant indices, PRNG state.
    Raises:
      ValueError: one error listing every tensor that is missing, extra, misshapen, not finite or not castable, and
        every parameter that no rule covers; also for a table that contradicts itself. Shapes are in the published
        layout.
    """
    leaves = named_leaves(model)
    slots = _slots(leaves, rules)
    covered = {slot.ours for slot in slots.values()}
    stripped = collections.defaultdict(list)
    for name in tensors:
        stripped[name.removeprefix(prefix)].append(name)

    problems = [
        f"ambiguous  {' and '.join(names)} are both called {name}" for name, names in stripped.items() if names[1:]
    ]
    for name, slot in slots.items():
        if name not in stripped:
            problems.append(f"missing    {name}: wanted {_original_shape(slot.axes, slot.shape)} for {slot}")
    for name, names in stripped.items():
        if name not in slots and not any(re.fullmatch(pattern, name) for pattern in ignored):
            shape = list(np.shape(tensors[names[0]]))
            problems.append(f"extra      {name}: came {shape}, and no rule has a place for it")

    values = {}
    for name, leaf, variable in leaves:
        if name in covered:
            values[name] = np.empty(leaf.shape, leaf.dtype)
        elif _must_be_covered(leaf, variable):
            problems.append(f"uncovered  {name}: no rule fills our {list(leaf.shape)}")
    for name, slot in slots.items():
        if name in stripped:
            problem = _fill(values[slot.ours], slot, np.asarray(tensors[stripped[name][0]]))
            if problem:
                problems.append(f"{problem[0]:<10} {name}: {problem[1]}")

    if problems:
        raise ValueError(
            f"{len(problems)} mismatches between the published tensors and {type(model).__name__}"
            + (f" (names without the prefix '{prefix}')" if prefix else "")
            + ":\n  "
            + "\n  ".join(problems)
            + "\nCheck that the file and the model's configuration are of the same size, and complete the table of "
            "rules or the list of ignored names."
        )
    filled = [
        jax.device_put(values.pop(name), wanted_sharding(leaf)) if name in values else leaf for name, leaf, _ in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(model), filled)


def to_original(model: nnx.Module, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Returns a model's weights under their published names, in their published layout: the inverse of `from_original`.

    Returns:
      {published name: array in the model's dtype, C order}, names sorted.
    Raises:
      ValueError: as in `original_views`.
    """
    # order="C": safetensors writes the memory of a transposed view as it lies, without a word.
    return {name: np.array(view, order="C") for name, view in original_views(model, rules).items()}


def original_views(model: nnx.Module, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """`to_original` without the copy: transposed views of the model's arrays, where those are in host memory.

    Raises:
      ValueError: listing every parameter that no rule covers or that is abstract; or for a table that contradicts
        itself.
    """
    leaves = named_leaves(model)
    slots = _slots(leaves, rules)
    covered = {slot.ours for slot in slots.values()}
    problems = [
        f"uncovered  {name}: no rule gives it a published name"
        for name, leaf, variable in leaves
        if name not in covered and _must_be_covered(leaf, variable)
    ]
    problems += [
        f"abstract   {name}: {list(leaf.shape)} has no values"
        for name, leaf, _ in leaves
        if name in covered and isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} parameters of {type(model).__name__} cannot be written:\n  "
            + "\n  ".join(problems)
            + "\nComplete the table of rules, and give the model its weights first."
        )
    arrays = {name: np.asarray(leaf) for name, leaf, _ in leaves if name in covered}
    return {name: _to_theirs(arrays[slot.ours][slot.index], slot.axes) for name, slot in sorted(slots.items())}


def published_names(model: nnx.Module, rules: Sequence[Rule]) -> dict[str, str]:
    """{published name: dotted name of our parameter} of every tensor that a model, or an abstract one, is filled from.

    Raises:
      ValueError: for a table that contradicts itself.
    """
    return {name: slot.ours for name, slot in _slots(named_leaves(model), rules).items()}


def _slots(leaves: Iterable[tuple[str, Any, Any]], rules: Sequence[Rule]) -> dict[str, _Slot]:
    """Every published name this model asks for. A rule may cover nothing: tables serve variants of a model."""
    slots: dict[str, _Slot] = {}
    filled: dict[str, Rule] = {}
    leaves = list(leaves)
    for rule in rules:
        placeholders = list(dict.fromkeys(re.findall(r"\{(\w+)\}", rule.original)))
        listed = re.findall(r"\{(\w+)\}", rule.ours)
        if unknown := set(listed) - set(placeholders):
            raise ValueError(f"{rule}: placeholder {sorted(unknown)} of `ours` does not appear in `original`.")
        stacked = [name for name in placeholders if name not in listed]
        pattern = re.compile(_regex(rule.ours))
        for ours, leaf, _ in leaves:
            match = pattern.fullmatch(ours)
            if not match:
                continue
            if ours in filled:
                raise ValueError(f"{rule} and {filled[ours]} both fill {ours}; remove one of them.")
            filled[ours] = rule
            if len(stacked) > len(leaf.shape):
                raise ValueError(
                    f"{rule}: {ours} has shape {list(leaf.shape)}, too few axes to be stacked by {stacked}."
                )
            lengths, shape = leaf.shape[: len(stacked)], leaf.shape[len(stacked) :]
            try:
                _original_shape(rule.axes, shape)
            except ValueError as error:
                raise ValueError(f"{rule}: {error}.") from None
            for index in itertools.product(*map(range, lengths)):
                name = rule.original.format_map(match.groupdict() | dict(zip(stacked, index, strict=True)))
                if name in slots:
                    raise ValueError(f"{rule}: {name} already goes to {slots[name]}; one published name, one place.")
                slots[name] = _Slot(ours, index, shape, rule.axes)
    return slots


def _regex(pattern: str) -> str:
    """Literal text with `{name}` standing for an integer; a name that comes back stands for the same integer."""
    seen, out = set(), ""
    for literal, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", pattern):
        out += re.escape(literal)
        if name:
            out += f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)"
            seen.add(name)
    return out


def _must_be_covered(leaf, variable: nnx.Variable | None) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct) or isinstance(variable, nnx.Param) or _kind(leaf.dtype) == "float"


def _fill(out: np.ndarray, slot: _Slot, tensor: np.ndarray) -> tuple[str, str] | None:
    """Writes one published tensor into its place, or says (what, why) it does not fit."""
    wanted = _original_shape(slot.axes, slot.shape)
    if list(tensor.shape) != wanted:
        return "misshapen", f"came {list(tensor.shape)}, wanted {wanted} for {slot}"
    if _kind(tensor.dtype) != _kind(out.dtype):
        return "miscast", f"came {tensor.dtype}, wanted {out.dtype} or alike for {slot}"
    with np.errstate(over="ignore", invalid="ignore"):  # reported below
        cast = tensor.astype(out.dtype, copy=False)
    if _kind(out.dtype) == "float":
        wrong = cast.size - int(np.count_nonzero(np.isfinite(cast)))
        if wrong:
            return "not finite", f"{wrong} of {cast.size} values are NaN or infinite as {out.dtype}"
    elif not np.array_equal(cast, tensor):
        return "miscast", f"has values that do not fit in {out.dtype}"
    out[slot.index] = _to_ours(cast, slot.axes, slot.shape)
    return None


def _kind(dtype) -> str:
    """Casts go from one kind to the same kind only."""
    if jax.numpy.issubdtype(dtype, np.floating):
        return "float"
    if jax.numpy.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return "integer"
    return str(dtype)


# The axes language: "(c n h) d -> d c n h".


def _parse(axes: str) -> tuple[list[list[str]], list[list[str]]]:
    """Both sides of a pattern, each a list of groups of axis names; the group of an axis of size 1 is empty."""
    sides = axes.split("->")
    if len(sides) != 2:
        raise ValueError("wanted 'same' or two sides with '->' between them")
    groups = []
    for side in sides:
        tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", side)
        if "(" in tokens or ")" in tokens:
            raise ValueError(f"the parentheses of '{side.strip()}' do not match")
        groups.append([[name for name in token.strip("()").split() if name != "1"] for token in tokens])
        names = [name for group in groups[-1] for name in group]
        if wrong := [name for name in names if not name.isidentifier()]:
            raise ValueError(f"{wrong} are not axis names; wanted names, 1 and parentheses")
        if len(set(names)) != len(names):
            raise ValueError(f"an axis appears twice in '{side.strip()}'")
    left, right = ({name for group in side for name in group} for side in groups)
    if left != right:
        raise ValueError(f"axes {sorted(left ^ right)} appear on one side only")
    if any(len(group) > 1 for group in groups[1]):
        raise ValueError("axes are joined on the right, so their sizes cannot be known; keep them apart in our array")
    return groups[0], groups[1]


def _factors(axes: str, shape: tuple[int, ...]) -> tuple[list[list[str]], list[str], dict[str, int]]:
    """The published tensor's groups of axes, the axes of an array of ours of the given shape, and the axes' sizes."""
    left, right = _parse(axes)
    if len(right) != len(shape):
        raise ValueError(f"the right side has {len(right)} axes, and our array {list(shape)} has {len(shape)}")
    if any(not group and size != 1 for group, size in zip(right, shape, strict=True)):
        raise ValueError(f"an axis written 1 on the right is not of size 1 in our {list(shape)}")
    return (
        left,
        [a for group in right for a in group],
        {group[0]: size for group, size in zip(right, shape, strict=True) if group},
    )


def _original_shape(axes: str, shape: tuple[int, ...]) -> list[int]:
    """The shape of the published tensor that becomes an array of ours of the given shape."""
    if axes == "same":
        return list(shape)
    left, _, sizes = _factors(axes, shape)
    return [math.prod(sizes[name] for name in group) for group in left]


def _to_ours(tensor: np.ndarray, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    if axes == "same":
        return tensor
    left, ours, sizes = _factors(axes, shape)
    theirs = [a for group in left for a in group]
    return tensor.reshape([sizes[a] for a in theirs]).transpose([theirs.index(a) for a in ours]).reshape(shape)


def _to_theirs(array: np.ndarray, axes: str) -> np.ndarray:
    if axes == "same":
        return array
    left, ours, sizes = _factors(axes, array.shape)
    theirs = [a for group in left for a in group]
    split = array.reshape([sizes[a] for a in ours])
    return split.transpose([ours.index(a) for a in theirs]).reshape(_original_shape(axes, array.shape))


# Files.

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(_DTYPES)}  # safetensors writes later ones first

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which tensor lies where in the .safetensors files of a folder.

    Attributes:
      headers: {file name: the JSON at its beginning}.
      index: contents of model.safetensors.index.json, or None where one file holds everything.
    """

    headers: Mapping[str, bytes]
    index: bytes | None = None

    def fits(self, tensors: Mapping[str, np.ndarray]) -> bool:
        """Whether it is a layout of just these names, shapes and dtypes."""
        listed = {}
        for header in self.headers.values():
            listed |= {name: (entry["dtype"], entry["shape"]) for name, entry in _entries(header).items()}
        return listed == {name: (_CODES[array.dtype], list(array.shape)) for name, array in tensors.items()}


class Safetensors(Mapping[str, np.ndarray]):
    """The tensors of one or several .safetensors files, each read from the disk when it is asked for.

    Attributes:
      layout: for `write_folder`, to write the same files again.
      dtypes: {name: dtype}.
    """

    def __init__(self, paths: Sequence[pathlib.Path], index: bytes | None = None):
        headers, self.dtypes, self._files = {}, {}, {}
        for path in paths:
            try:
                file = safe_open(path, framework="np")
            except SafetensorError as error:
                raise _unreadable(path, error) from error
            with open(path, "rb") as start:  # which safetensors has just found to be sound
                headers[path.name] = start.read(int.from_bytes(start.read(8), "little"))
            for name, entry in _entries(headers[path.name]).items():
                if entry["dtype"] not in _DTYPES:
                    raise ValueError(
                        f"load: {path}: {name} is of dtype {entry['dtype']}; wanted one of {', '.join(_DTYPES)}; "
                        "convert it to bfloat16."
                    )
                self.dtypes[name] = _DTYPES[entry["dtype"]]
                self._files[name] = file
        self.layout = Layout(headers, index)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read(path: str | os.PathLike) -> Mapping[str, np.ndarray]:
    """The tensors of a published file or directory under their published names; see `load` for the kinds of path.

    Those of .safetensors files come as `Safetensors`.
    """
    path = pathlib.Path(path)
    readers = {
        ".safetensors": lambda path: Safetensors([path]),
        ".npz": _read_npz,
        ".bin": _read_torch,
        ".pt": _read_torch,
        ".pth": _read_torch,
    }
    if path.is_dir():
        index = path / _INDEX
        if index.exists():
            return _read_shards(index)
        path = path / _WEIGHTS
        if not path.exists():
            raise FileNotFoundError(f"load: {path.parent} holds neither {_WEIGHTS} nor {_INDEX}.")
    if path.suffix not in readers:
        raise ValueError(f"load: {path} ends in '{path.suffix}'; wanted a directory or one of {', '.join(readers)}.")
    if not path.exists():
        raise FileNotFoundError(f"load: {path} does not exist.")
    return readers[path.suffix](path)


def write_folder(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    files: Mapping[str, bytes],
    *,
    layout: Layout | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a published folder: weights in one .safetensors file or in shards with their index, and other files.

    The same arguments always give the same bytes. The folder appears whole or not at all: it is written beside its
    place and renamed.

    Args:
      path: the folder to make. There may be an empty one.
      tensors: {published name: array}, in the order in which they are dealt to the shards.
      files: {file name: contents}.
      layout: of `Safetensors`; where it fits the tensors the files are laid out, and named, as they were.
      shard_bytes: else, how much one file may hold; a larger tensor has a file of its own.
      overwrite: replace a folder that is not empty, if it holds one of the same kind: something called config.json.
    Raises:
      FileExistsError: if there is something at `path`.
      OSError: if the folder cannot be written; what was at `path` before is left as it was.
    """
    path = pathlib.Path(path).absolute()
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not overwrite:
        raise FileExistsError(f"save: {path} exists; choose another folder, empty it, or ask to overwrite it.")
    if occupied and not (path / "config.json").exists():
        raise FileExistsError(
            f"save: {path} has no config.json in it, so it is not overwritten; choose another folder."
        )
    if layout is None or not layout.fits(tensors):
        layout = _deal(tensors, shard_bytes)
    unfinished, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{state}") for state in ("tmp", "old"))
    try:
        unfinished.mkdir(parents=True)
        for name, contents in {**files, **({} if layout.index is None else {_INDEX: layout.index})}.items():
            with open(unfinished / name, "wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
        for name, header in layout.headers.items():
            _write_safetensors(unfinished / name, header, tensors)
        try:
            if occupied:
                os.replace(path, replaced)
            os.replace(unfinished, path)
        except BaseException:
            if replaced.exists() and not path.exists():
                os.replace(replaced, path)
            raise
    except OSError as error:
        raise OSError(f"save: cannot write {path}: {error}; free some space or choose another folder.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _entries(header: bytes) -> dict[str, dict[str, Any]]:
    """The tensors that the header of a .safetensors file lists."""
    return {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}


def _header(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The header that the safetensors library writes for these tensors with the metadata {"format": "pt"}."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in sorted(tensors.items(), key=lambda item: (-_RANKS[_CODES[item[1].dtype]], item[0])):
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _write_safetensors(path: pathlib.Path, header: bytes, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors of a header, one copied at a time."""
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(entries := _entries(header), key=lambda name: entries[name]["data_offsets"]):
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _deal(tensors: Mapping[str, np.ndarray], shard_bytes: int) -> Layout:
    """Deals tensors to shards in the order they come."""
    shards, room = [], -1
    for name, array in tensors.items():
        if array.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = array
        room -= array.nbytes
    if len(shards) == 1:
        return Layout({_WEIGHTS: _header(tensors)})
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    headers = {file: _header(shard) for file, shard in zip(names, shards, strict=True)}
    return Layout(headers, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _unreadable(path: pathlib.Path, cause: object) -> ValueError:
    size = path.stat().st_size
    return ValueError(f"load: {path} ({size} bytes) cannot be read: {cause}; the file is damaged: get it again.")


def _read_shards(index: pathlib.Path) -> Safetensors:
    text = index.read_bytes()
    try:
        shard_of = json.loads(text)["weight_map"]
        shards = sorted(set(shard_of.values()))
        # A name with a folder in it could point outside the directory.
        if outside := [shard for shard in shards if pathlib.PurePath(shard).name != shard]:
            raise ValueError(f"shards {outside} are not plain file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(index, f"{type(error).__name__}: {error}") from error
    if absent := [shard for shard in shards if not (index.parent / shard).exists()]:
        raise FileNotFoundError(
            f"load: {index} names {len(shards)} shards, of which {', '.join(absent)} are missing; get them again."
        )
    tensors = Safetensors([index.parent / shard for shard in shards], text)
    for shard, header in tensors.layout.headers.items():
        listed = {name for name, file in shard_of.items() if file == shard}
        if listed != _entries(header).keys():
            raise ValueError(
                f"load: {index} and {shard} disagree about {sorted(listed ^ _entries(header).keys())}; "
                "get both files again."
            )
    return tensors


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile, zlib and NumPy each have their own for a damaged file
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"load: reading {path} needs PyTorch: pip install lumen[convert].") from error
    try:
        # Published files keep the command line beside the weights, as an argparse.Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = str(error).partition("WeightsUnpickler error: ")[2].partition(". ")[0] or error
        raise ValueError(
            f"load: {path} holds more than tensors and plain values ({cause}), and code in "
            "weights is never executed; where you trust the file, save its tensors alone as .safetensors."
        ) from error
    except Exception as error:  # the zip archive around the pickle is damaged
        raise _unreadable(path, f"{type(error).__name__}: {str(error).split('. ')[0]}") from error
    state = held
    if isinstance(held, dict):
        state = next((held[name] for name in ("model", "model_state") if name in held), held)
    if not isinstance(state, dict):
        raise ValueError(f"load: {path} holds a {type(state).__name__}; wanted a dict of tensors.")
    if others := sorted(str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)):
        raise ValueError(
            f"load: {path}: {', '.join(others)} are not tensors; wanted a state dict, or one under the key 'model' or "
            "'model_state'."
        )

    def to_numpy(tensor):
        if tensor.dtype == torch.bfloat16:  # which torch does not hand to NumPy; float32 holds every bfloat16
            return tensor.float().numpy().astype(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {name: to_numpy(tensor.detach()) for name, tensor in state.items()}
