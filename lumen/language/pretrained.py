"""Hugging Face folders of Llama and Qwen2 models, read and written: config.json, weights, and what lies beside them.

    model, folder = load("Qwen2.5-0.5B")
    save("copy", model, folder)              # the same files, to the byte

Source: huggingface/transformers models/{llama,qwen2}/configuration_*.py and modeling_rope_utils.py.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.io import pretrained
from lumen.io.awq import AWQFormat, read_linear, write_linear
from lumen.io.checkpoint import named_leaves
from lumen.io.names import decoder as names
from lumen.language.decoder import Block, Decoder, DecoderConfig
from lumen.layers import unstack
from lumen.qtensor import QuantizedLinear
from lumen.rope import RopeConfig
from pallas_kernels.w4a16_matmul import pack, unpack

_CONFIG = "config.json"
_MODELS = ("llama", "qwen2")
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
# Weights in other formats, and what `write_folder` makes itself.
_NOT_KEPT = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a published folder holds beside its weights.

    Attributes:
      files: {name: contents} of config.json, the tokenizer's files and all others that are not weights; folders inside
        the folder are left out.
      layout: how the weights lay in their files.
      quantization: how 4-bit linears are stored; None where there are none.
    """

    files: Mapping[str, bytes]
    layout: pretrained.Layout | None = None
    quantization: AWQFormat | None = None


def load(path: str | os.PathLike, *, dtype=None, stacked: bool = True) -> tuple[Decoder, Folder]:
    """Loads a published model, one tensor at a time.

    Args:
      path: a folder with config.json, and model.safetensors or its shards and their index.
      dtype: what floating-point weights are cast to, and so what the model computes in; None keeps those of the files.
        4-bit weights keep their scales.
      stacked: layers along a leading axis, for training and for compiling one layer; or a list of layers (see
        `lumen.layers.unstack`), for decoding on a CPU. It is a list in any case where layers differ in which of their
        linears are quantised.

    Returns:
      The model, and what else was in the folder.
    Raises:
      FileNotFoundError: naming the file that is not there.
      ValueError: naming the key of config.json that is missing or not supported, the file that is damaged, or every
        tensor that is missing, extra, misshapen or not finite.

    Where config.json ties the embedding to the head, an lm_head.weight in the files is passed over, as the original
    does.
    """
    path = pathlib.Path(path)
    values = _read_json(path)
    config, quantization = parse_config(values, path / _CONFIG), _awq_format(values, path / _CONFIG)
    tensors = pretrained.read(path)
    assert isinstance(tensors, pretrained.Safetensors)

    def converted(prefix):
        return quantization is not None and quantization.converts(prefix)

    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    if not stacked or any(len({*map(converted, prefixes)}) > 1 for _, _, prefixes in _linears(model)):
        model = jax.eval_shape(unstack, model)
    kernels, packed = {}, []  # 4-bit kernels are filled after all the rest
    for block, name, prefixes in _linears(model):
        if converted(prefixes[0]):
            kernels[prefixes] = getattr(block, name).kernel
            packed += prefixes
            del getattr(block, name).kernel
    ignored = [*names.IGNORED, *([r"lm_head\.weight"] if config.tied else [])]
    if packed:
        ignored.append(rf"({'|'.join(map(re.escape, packed))})\.(qweight|qzeros|scaled_zeros|scales)")
    model = pretrained.from_original(tensors, _with_dtypes(model, tensors.dtypes, dtype), _rules(model), ignored)
    for block, name, prefixes in _linears(model):
        if quantization is not None and prefixes in kernels:
            kernel, bias = kernels[prefixes], getattr(block, name).bias
            layers = [_read_packed(tensors, prefix, kernel.shape[-2:], quantization) for prefix in prefixes]
            weight = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers) if kernel.ndim == 3 else layers[0]
            axes = kernel.get_metadata()["axes"]
            setattr(block, name, QuantizedLinear(weight, None if bias is None else bias[...], axes=axes))
    files = {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.is_file() and not file.name.endswith(_NOT_KEPT)
    }
    return model, Folder(files, tensors.layout, quantization)


def save(
    path: str | os.PathLike,
    model: Decoder,
    folder: Folder | None = None,
    *,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder that transformers and `load` read.

    A model that is written as it was loaded gives the files it was loaded from, to the byte. Else config.json is
    brought up to date, other files are copied, and the weights are dealt to shards anew.

    Args:
      path: the folder to make; it appears whole or not at all.
      model: stacked or a list of layers.
      folder: what `load` returned with the model, or one with files of your own (a tokenizer's); None: weights and
        config.json alone. For a model that has been quantised since, with the format in `quantization`.
      shard_bytes: the most that one file of weights holds.
      overwrite: replace a folder of the same kind.
    Raises:
      FileExistsError: if there is something at `path`.
      OSError: if the folder cannot be written; then there is none.
      ValueError: if the model holds abstract values, or its linears are not quantised as `folder.quantization` says.
    """
    folder = folder or Folder({})
    quantised = any(isinstance(getattr(block, name), QuantizedLinear) for block, name, _ in _linears(model))
    quantization = folder.quantization if quantised else None
    tensors = _published(model, quantization)
    files = dict(folder.files)
    values = json.loads(files.get(_CONFIG, b"{}"))
    as_loaded = folder.layout is not None and folder.layout.fits(tensors)
    if not as_loaded or (parse_config(values), _awq_format(values)) != (model.config, quantization):
        files[_CONFIG] = _updated_config(values, model, quantization)
    pretrained.write_folder(path, tensors, files, layout=folder.layout, shard_bytes=shard_bytes, overwrite=overwrite)


def _linears(model: Decoder) -> Iterator[tuple[Block, str, tuple[str, ...]]]:
    """(block, attribute, published names) of every linear of the blocks; a stacked one has the names of its layers."""
    blocks: Any = model.blocks
    listed = isinstance(blocks, nnx.List)
    for index, block in enumerate(blocks if listed else [blocks]):
        layers = [index] if listed else range(model.config.depth)
        for theirs, ours in names.LINEARS.items():
            yield block, ours, tuple(names.LAYER.format(layer=layer) + theirs for layer in layers)


def _read_packed(tensors, prefix: str, shape: tuple[int, ...], quantization: AWQFormat):
    """One 4-bit kernel of a [D, F] layer, packed."""
    q, scale, zero = read_linear(tensors, prefix, quantization)
    if q.shape != shape:
        raise ValueError(f"load: {prefix} is {list(q.shape)} as packed; wanted {list(shape)}; check config.json.")
    if wrong := scale.size - np.count_nonzero(np.isfinite(scale.astype(np.float32))):
        raise ValueError(f"load: {prefix}.scales: {wrong} of {scale.size} values are NaN or infinite; get it again.")
    return pack(q, scale, zero, shape[0] if quantization.group == -1 else quantization.group)


def _published(model: Decoder, quantization: AWQFormat | None) -> dict[str, np.ndarray]:
    """All tensors under their published names; what is not packed are views of the model's arrays."""
    packed = {}
    dense = nnx.clone(model)
    for block, name, prefixes in _linears(dense):
        linear = getattr(block, name)
        quantised = isinstance(linear, QuantizedLinear)
        for prefix in prefixes:
            if quantised != (quantization is not None and quantization.converts(prefix)):
                raise ValueError(
                    f"save: {prefix} is {'' if quantised else 'not '}quantised, and folder.quantization is "
                    f"{quantization}; give the format that the model was quantised for."
                )
        if quantised and quantization is not None:
            weight = [np.asarray(part) for part in unpack(linear.packed)]
            layers = zip(*weight, strict=True) if weight[0].ndim == 3 else [weight]
            for prefix, (q, scale, zero) in zip(prefixes, layers, strict=True):
                packed |= write_linear(prefix, q, scale, zero, quantization)
            del linear.words, linear.scale, linear.zero
    return dict(sorted((pretrained.original_views(dense, _rules(dense)) | packed).items()))


def _rules(model: Decoder) -> list[pretrained.Rule]:
    """The table for layers that are stacked, or in a list."""
    if not isinstance(model.blocks, nnx.List):
        return names.RULES
    return [dataclasses.replace(rule, ours=rule.ours.replace("blocks.", "blocks.{layer}.")) for rule in names.RULES]


def _with_dtypes(model: Decoder, published: Mapping[str, np.dtype], dtype) -> Decoder:
    """An abstract model whose weights have the given dtype, or that of the published tensors they come from."""
    found: dict[str, Any] = {}
    for theirs, ours in pretrained.published_names(model, _rules(model)).items():
        if theirs in published and jnp.issubdtype(published[theirs], jnp.floating):
            kind = jax.dtypes.canonicalize_dtype(published[theirs])
            found[ours] = jnp.promote_types(found.get(ours, kind), kind)
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, dtype or found.get(name, leaf.dtype)) for name, leaf, _ in named_leaves(model)
    ]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


# config.json.


def read_config(path: str | os.PathLike) -> DecoderConfig:
    """The sizes in a folder's config.json.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: naming file, key, value and what is supported.
    """
    return parse_config(_read_json(pathlib.Path(path)), pathlib.Path(path) / _CONFIG)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    file = path / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"load: {path} holds no {_CONFIG}; wanted a folder as transformers writes it.")
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"load: {file} is not JSON: {error}; get it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"load: {file} holds a {type(values).__name__}; wanted a JSON object.")
    return values


def _awq_format(values: Mapping[str, Any], file: str | os.PathLike = _CONFIG) -> AWQFormat | None:
    described = values.get("quantization_config")
    if described is None:
        return None
    if not isinstance(described, Mapping):
        raise ValueError(f"load: {file}: quantization_config is {described!r}; wanted a JSON object.")
    try:
        return AWQFormat.from_config(described)
    except ValueError as error:
        raise ValueError(f"load: {file}: {error}") from None


def parse_config(values: Mapping[str, Any], file: str | os.PathLike = _CONFIG) -> DecoderConfig:
    """The sizes in the contents of a config.json, of transformers 4 or 5.

    Args:
      values: the JSON object.
      file: what errors call it.
    Raises:
      ValueError: for a key that is missing or malformed, and for what the decoder lacks: other model types and
        activations, biases of Llama models, windowed attention, other rotary scalings.
    """

    def wrong(key, value, wanted):
        return ValueError(f"load: {file}: {key} is {value!r}; wanted {wanted}.")

    def size(key, default=None):
        value = values.get(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"load: {file}: {key} is missing; wanted a whole number.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise wrong(key, value, "a whole number of 1 or more")
        return value

    def number(key, value):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise wrong(key, value, "a number above 0")
        return float(value)

    def only(key, supported, default):
        value = values.get(key, default)
        if value not in supported:
            raise wrong(key, value, f"{' or '.join(map(repr, supported))}, which is all that this decoder has")
        return value

    kind = only("model_type", _MODELS, None)
    only("hidden_act", ("silu",), "silu")
    only("attention_bias", (False, None), False)
    only("mlp_bias", (False, None), False)
    only("partial_rotary_factor", (1, None), 1)
    depth = size("num_hidden_layers")
    layer_types = values.get("layer_types") or []
    windowed = values.get("use_sliding_window") and values.get("sliding_window") is not None
    if windowed and not layer_types and values.get("max_window_layers", depth) < depth:
        raise wrong("use_sliding_window", True, "false, or max_window_layers of all layers: attention is full here")
    if others := [layer for layer in layer_types if layer != "full_attention"]:
        raise wrong("layer_types", others[0], "'full_attention' in every layer")

    # transformers 5 has everything rotary in one place; before, theta stood alone.
    rotary = values.get("rope_parameters")
    key = "rope_scaling" if rotary is None else "rope_parameters"
    rotary = (values.get("rope_scaling") or {}) if rotary is None else rotary
    if not isinstance(rotary, Mapping):
        raise wrong(key, rotary, "null or an object with a rope_type")
    theta = number("rope_theta", rotary.get("rope_theta", values.get("rope_theta", 10_000.0)))
    scaling = rotary.get("rope_type", rotary.get("type", "default"))

    def rotary_number(name):
        if name not in rotary:
            raise ValueError(f"load: {file}: {key} has no {name}, which {scaling!r} needs.")
        return number(f"{key}.{name}", rotary[name])

    if scaling == "default":
        rope = RopeConfig(theta)
    elif scaling == "linear":
        rope = RopeConfig(theta, "linear", rotary_number("factor"))
    elif scaling == "llama3":
        low, high = rotary_number("low_freq_factor"), rotary_number("high_freq_factor")
        if low >= high:
            raise wrong(f"{key}.low_freq_factor", low, f"less than high_freq_factor, {high}")
        positions = int(rotary_number("original_max_position_embeddings"))
        rope = RopeConfig(theta, "llama3", rotary_number("factor"), low, high, positions)
    elif scaling == "yarn":
        for name in ("mscale", "mscale_all_dim"):
            if rotary.get(name) is not None:
                raise wrong(f"{key}.{name}", rotary[name], "none, or an attention_factor in its place")
        if rotary.get("truncate", True) is not True:
            raise wrong(f"{key}.truncate", rotary["truncate"], "true: the ramp begins and ends at whole pairs")
        given = {name: rotary_number(name) for name in _YARN if rotary.get(name) is not None}
        positions = int(given.pop("original_max_position_embeddings", size("max_position_embeddings", 2048)))
        rope = RopeConfig(theta, "yarn", rotary_number("factor"), original_positions=positions, **given)
        if rope.beta_slow >= rope.beta_fast:
            raise wrong(f"{key}.beta_slow", rope.beta_slow, f"less than beta_fast, {rope.beta_fast}")
    else:
        raise wrong(f"{key}.rope_type", scaling, "'default', 'linear', 'llama3' or 'yarn'")

    heads, width = size("num_attention_heads"), size("hidden_size")
    if values.get("head_dim") is None and width % heads:
        raise wrong("hidden_size", width, f"a multiple of num_attention_heads={heads}, or a head_dim")
    try:
        return DecoderConfig(
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", width // heads),
            hidden=size("intermediate_size"),
            vocabulary=size("vocab_size"),
            norm_epsilon=number("rms_norm_eps", values.get("rms_norm_eps", 1e-6)),
            rope=rope,
            qkv_bias=kind == "qwen2",
            tied=bool(values.get("tie_word_embeddings", False)),
            max_positions=size("max_position_embeddings", 2048),
        )
    except ValueError as error:
        raise error if str(error).startswith("load:") else ValueError(f"load: {file}: {error}") from None


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """What config.json says of a decoder, in the keys that every release of transformers reads."""
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if scaling is not None and rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    if scaling is not None and rope.scaling == "yarn":
        scaling |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "original_max_position_embeddings": rope.original_positions,
        }
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    kind = "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_positions,
        "model_type": kind,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.depth,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_scaling": scaling,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocabulary,
    }


def _updated_config(values: Mapping[str, Any], model: Decoder, quantization: AWQFormat | None) -> bytes:
    """A config.json that describes the model; what an older one says of other things stays."""
    described = {"quantization_config": quantization.to_config()} if quantization is not None else {}
    dtype = {"dtype" if "dtype" in values else "torch_dtype": str(model.embedding[...].dtype)}
    stale = ("rope_parameters", "quantization_config")
    kept = {key: value for key, value in values.items() if key not in stale}
    return json.dumps(kept | config_values(model.config) | dtype | described, indent=2, sort_keys=True).encode() + b"\n"
