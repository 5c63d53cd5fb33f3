"""LoRA adapters on disk, as PEFT writes them and with the second file of LongLoRA.

    adapter_config.json                     rank, alpha, which linears
    adapter_model.safetensors (or .bin)     base_model.model.<linear>.lora_A.weight [r, D], .lora_B.weight [F, r]
    trainable_params.safetensors (or .bin)  parameters that train whole, under the model's own names

PEFT itself keeps whole parameters, its `modules_to_save`, in the first of the two; that is read too.

Source: huggingface/peft utils/save_and_load.py; dvlab-research/LongLoRA get_trainable_weights.py.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lumen.io import pretrained
from lumen.io.pretrained import Rule

_CONFIG, _FACTORS, _WHOLE = "adapter_config.json", "adapter_model", "trainable_params"
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The contents of adapter_config.json that matter.

    Attributes:
      rank: r.
      alpha: the product of the factors is scaled by alpha / r.
      targets: last part of the published names of the linears that have factors, such as "q_proj".
      base: name of the model that was adapted, or "".
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str = ""

    @classmethod
    def from_values(cls, values: Mapping[str, Any], file: str | os.PathLike = _CONFIG) -> "AdapterConfig":
        """Reads the JSON object of a file that errors call `file`.

        Raises:
          ValueError: naming a key that is missing or not supported: other kinds than LoRA, trained biases, transposed
            weights, rank-stabilised and decomposed variants, ranks that differ, targets that are not a list of names.
        """

        def wrong(key, wanted):
            return ValueError(f"adapter: {file}: {key} is {values.get(key)!r}; wanted {wanted}.")

        if values.get("peft_type") != "LORA":
            raise wrong("peft_type", "'LORA'")
        if values.get("bias", "none") != "none":
            raise wrong("bias", "'none'")
        for key in ("fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform"):
            if values.get(key):
                raise wrong(key, "nothing: every adapted linear is treated alike here")
        rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
        if not isinstance(rank, int) or rank < 1:
            raise wrong("r", "a whole number of 1 or more")
        if not isinstance(alpha, int | float):
            raise wrong("lora_alpha", "a number")
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise wrong("target_modules", "a list of names")
        return cls(rank, float(alpha), tuple(sorted(targets)), values.get("base_model_name_or_path") or "")

    def to_values(self) -> dict[str, Any]:
        """The JSON object that `from_values` reads."""
        return {
            "base_model_name_or_path": self.base or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": sorted(self.targets),
            "task_type": "CAUSAL_LM",
        }


def lora_rules(rules: Sequence[Rule]) -> list[Rule]:
    """Rules of the factors `a` [D, r] and `b` [r, F] beside every weight of a linear, `kernel`, in a model's table."""
    found = []
    for rule in rules:
        if rule.ours.endswith(".kernel") and rule.original.endswith(".weight"):
            theirs, ours = _PREFIX + rule.original.removesuffix("weight"), rule.ours.removesuffix("kernel")
            found += [
                Rule(f"{theirs}lora_A.weight", f"{ours}a", "r d -> d r"),
                Rule(f"{theirs}lora_B.weight", f"{ours}b", "f r -> r f"),
            ]
    return found


def read(path: str | os.PathLike) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """An adapter's configuration, and its tensors: factors as in `lora_rules`, others under the model's own names.

    Args:
      path: a folder. Each of the two files of tensors is a .safetensors or, with `pip install lumen[convert]`, a .bin
        that is read by `torch.load(weights_only=True)`; the second may be absent.

    Raises:
      FileNotFoundError: naming the file that is not there.
      ValueError: naming the file that is damaged, or the key that is not supported.
      ImportError: for a .bin file where torch is not installed.
    """
    path = pathlib.Path(path)
    file = path / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"adapter: {path} holds no {_CONFIG}; wanted a folder as PEFT writes it.")
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"adapter: {file} is not JSON: {error}; get it again.") from error
    config = AdapterConfig.from_values(values, file)
    factors, whole = _tensors(path, _FACTORS), _tensors(path, _WHOLE)
    if factors is None:
        raise FileNotFoundError(f"adapter: {path} holds neither {_FACTORS}.safetensors nor {_FACTORS}.bin.")
    found = {}
    for name, tensor in {**factors, **(whole or {})}.items():
        # Inside a training process PEFT names the adapter too.
        name = name.replace(".default.weight", ".weight")
        found[name if ".lora_" in name else name.removeprefix(_PREFIX)] = tensor
    return config, found


def write(path: str | os.PathLike, config: AdapterConfig, factors: Any, whole: Any, rules: Sequence[Rule]) -> None:
    """Writes an adapter's folder: the factors, then what trains whole if there is any, then the configuration.

    Args:
      path: the folder; it may exist.
      config: of the adapter.
      factors: the nnx.State of the model's parameters `a` and `b`.
      whole: that of its other parameters that train.
      rules: the model's own table, which covers `whole`.

    Raises:
      ValueError: if a parameter has no rule.
      OSError: if a file cannot be written.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    pretrained.save(path / f"{_FACTORS}.safetensors", factors, lora_rules(rules))
    if jax.tree.leaves(whole):
        pretrained.save(path / f"{_WHOLE}.safetensors", whole, rules)
    (path / _CONFIG).write_text(json.dumps(config.to_values(), indent=2, sort_keys=True) + "\n")


def _tensors(path: pathlib.Path, name: str) -> Mapping[str, np.ndarray] | None:
    for file in (path / f"{name}.safetensors", path / f"{name}.bin"):
        if file.is_file():
            return dict(pretrained.read(file))
    return None
