"""DuoAttention's pattern folders: the gate of every key/value head, and the settings they were trained with.

    gates, config = read_pattern("attn_patterns/Llama-3-8B-Instruct-Gradient-1048k/lr=0.02-reg=0.05-...")
    write_pattern("runs/gates/pattern", gates, sink_size=128, recent_size=256)

Source: mit-han-lab/duo-attention, duo_attn/utils.py and attn_patterns/.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

GATES = "full_attention_heads.tsv"
CONFIG = "config.json"

# The keys of a published config.json, in their order, with the values of the published runs. Readers want `sink_size`
# and `recent_size` only.
PUBLISHED: dict[str, Any] = {
    "model_name": "",
    "config_name": None,
    "dataset_name": "",
    "dataset_format": "multiple_passkey",
    "split": "train",
    "lr": 0.02,
    "num_steps": 2000,
    "batch_size": 1,
    "max_length": 32000,
    "context_length_min": 1000,
    "context_length_max": 32000,
    "context_lengths_num_intervals": 50,
    "depth_ratio_num_intervals": 1000,
    "num_passkeys": 10,
    "output_dir": "",
    "sink_size": 128,
    "recent_size": 256,
    "deploy_sink_size": None,
    "deploy_recent_size": None,
    "reg_weight": 0.05,
    "initial_value": 1.0,
    "exp_name": "",
    "enable_pp": False,
    "enable_tp": False,
    "disable_wandb": True,
    "min_needle_depth_ratio": 0.05,
    "max_needle_depth_ratio": 0.95,
    "save_steps": 50,
    "gradient_accumulation_steps": 1,
    "resume": False,
    "rope_theta": None,
    "device": "",
    "streaming_attn_implementation": "sdpa",
    "supervision": "distill",
    "n_samples": None,
    "task": "default",
    "attn_load_dir": None,
    "threshold": 0.5,
    "sparsity": None,
    "passkey_length": 32,
    "context_length": 16384,
    "generation_length": 256,
    "stride_length": 256,
    "prefilling_chunk_size": 4096,
    "seed": 42,
}


def read_pattern(folder: str | os.PathLike, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads a pattern folder.

    Args:
      folder: holds full_attention_heads.tsv and config.json.
      shape: (L, K) of the model that the gates are for, to be checked.

    Returns:
      (gates [L, K] float64 as they are written, perhaps a little below 0 or above 1; config.json).
    Raises:
      FileNotFoundError: naming the file that is not there.
      ValueError: if the file is no table of finite numbers, or is of another model.
    """
    path = pathlib.Path(folder) / GATES
    lines = path.read_text().splitlines()
    try:
        gates = np.array([[float(value) for value in line.split("\t")] for line in lines], np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers parted by tabs ({error}); get the file again.") from None
    if gates.ndim != 2 or not np.isfinite(gates).all():
        raise ValueError(f"{path}: wanted a finite number for each layer and key/value head; get the file again.")
    if shape is not None and gates.shape != tuple(shape):
        raise ValueError(
            f"{path}: {gates.shape[0]} layers x {gates.shape[1]} heads came; the model has {shape[0]} x {shape[1]} "
            "key/value heads. Take the pattern of this very model."
        )
    return gates, json.loads((path.parent / CONFIG).read_text())


def write_pattern(folder: str | os.PathLike, gates, **config: Any) -> None:
    """Writes a pattern folder as the original does, for its own loaders too; numbers come back exactly.

    Args:
      folder: made if it is not there.
      gates: [L, K], a row per layer, a column per key/value head in the model's own order.
      config: values of config.json that differ from `PUBLISHED`.
    Raises:
      ValueError: for gates that are no finite [L, K], or a key that the format does not have.
    """
    gates = np.asarray(gates, np.float64)
    if gates.ndim != 2 or not np.isfinite(gates).all():
        raise ValueError(f"write_pattern: gates {list(gates.shape)}; wanted [layers, key/value heads], all finite.")
    if unknown := sorted(set(config) - set(PUBLISHED)):
        raise ValueError(f"write_pattern: {unknown[0]!r} is no key of the format; it has {', '.join(PUBLISHED)}.")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / GATES, gates, delimiter="\t")
    (folder / CONFIG).write_text(json.dumps(PUBLISHED | config))
