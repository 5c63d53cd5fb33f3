"""From an experiment file and command-line overrides to checked dataclasses.

Experiments are Python files whose `get_config()` returns an `ml_collections.ConfigDict`; `--config.a.b=value` replaces
or adds a value. Everything behind the entry points works on frozen dataclasses, and `build` turns the one into the
other: an unknown key, a wrong type or an impossible value fails here, before anything is compiled.
"""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_collections


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists every problem."""


def load_config(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads an experiment file and applies overrides of the form `--config.a.b=value`.

    Values are Python literals; anything that is not one is a string.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"--config={path}: no such file; wanted an experiment such as experiments/lpd/digits.py.")
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"--config={path}: not a Python file; wanted an experiment such as experiments/lpd/digits.py."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={path}: has no get_config() function; every experiment defines one.")
    config: ml_collections.ConfigDict = module.get_config()
    config.lock()
    tree = config.to_dict()
    for override in overrides:
        name, equals, text = override.partition("=")
        if not name.startswith("--config.") or not equals:
            raise ConfigError(f"{override}: not understood; overrides look like --config.optimizer.learning_rate=1e-3.")
        *parents, key = name.removeprefix("--config.").split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{override}: {parent!r} holds the value {node!r} and has no keys of its own.")
        try:
            node[key] = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError):
            node[key] = text
    return tree


def build[T](kind: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Makes the dataclass `kind` from a mapping, recursively; every problem is reported in one ConfigError.

    An int is taken where a float is wanted and a list where a tuple is; nothing else is converted.
    """
    return build_all((kind, values, where))[0]


def build_all(*parts: tuple[type, Mapping[str, Any], str]) -> list[Any]:
    """What `build` makes of each (kind, values, where), with the problems of all in one ConfigError."""
    problems: list[str] = []
    results = [_build(kind, values, where, problems) for kind, values, where in parts]
    if problems:
        raise ConfigError("The configuration has errors:\n  " + "\n  ".join(problems))
    return results


def _build(kind, values, where, problems):
    if not isinstance(values, Mapping):
        problems.append(f"{where}: came {_came(values)}; wanted {_describe(kind)}.")
        return None
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    found = len(problems)
    for name in sorted(set(values) - set(fields)):
        close = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {where}.{close[0]}?" if close else f"the keys are {', '.join(fields)}."
        problems.append(f"{where}.{name}: unknown key with value {values[name]!r}; {hint}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}.{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{where}.{name}: missing; wanted {_describe(hints[name])}.")
    if len(problems) > found:
        return None
    try:
        return kind(**arguments)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def _convert(hint, value, where, problems):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, problems)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(hint, value, where, problems)
    if hint is Any:
        return value
    if (origin or hint) is dict and isinstance(value, Mapping):
        kind = arguments[1] if arguments else Any
        return {name: _convert(kind, item, f"{where}.{name}", problems) for name, item in value.items()}
    if origin is Literal and value in arguments and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (origin or hint) is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1) if origin is Literal else []
    hint_text = f"; did you mean {close[0]!r}?" if close else "."
    problems.append(f"{where}: came {_came(value)}; wanted {_describe(hint)}{hint_text}")
    return None


def _came(value) -> str:
    return f"{value!r} of type {type(value).__name__}"


def _describe(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "keys among " + ", ".join(field.name for field in dataclasses.fields(hint))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
