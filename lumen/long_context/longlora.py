"""LongLoRA: a longer context for a trained decoder at the price of LoRA.

    config = extended_rope(config, 32768)                                 # positions interpolated
    model = add_lora(model, key=key)                                      # what trains: factors, embedding, norms
    loss = next_token_loss(model, tokens, mask=shifted_sparse(group_size(length), config.heads))
    save_adapter("adapter", model)                                        # the files of PEFT
    model = merge_lora(model)                                             # a plain decoder again, with full attention

Shifted sparse attention, S², is for training alone. Which keys a head sees is a `Mask`, so it works with any decoder
that takes one; the LoRA part works on any model made of `nnx.Linear` and `QuantizedLinear`.

Source: arXiv:2309.12307; dvlab-research/LongLoRA llama_attn_replace.py, llama_attn_replace_sft.py, fine-tune.py,
merge_lora_weights_and_save_hf_model.py.
"""

import dataclasses
import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lumen.attention import Grouped, Mask
from lumen.io import peft, pretrained
from lumen.io.names import decoder as names
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.layers import Frozen, freeze
from lumen.qtensor import QuantizedLinear

ATTENTION = ("query", "key", "value", "output")
PLUS = ("embed", "norm")


def shifted_sparse(size: int, heads: int, *, leak: bool = False) -> Mask:
    """S² attention: half of the heads see their group of tokens, the other half groups that lie half a group later.

    With g = size, query i of the first floor(N / 2) query heads sees key j <= i if i // g = j // g, of the others if
    (i + g // 2) // g = (j + g // 2) // g. Groups are counted from the start of each sample; the last one may be short.
    At T = 4 g that is 23.4 % of the pairs of causal attention.

    Args:
      size: g, tokens of a group.
      heads: N.
      leak: the variant of the paper's pseudocode, which rolls the sequence: the first g // 2 tokens of the shifted
        heads also see the last g // 2, in their future. For lengths that are multiples of g; to compare with only.

    Deviation: under grouped queries the original repeats the key heads; here they are read in place.
    Source: arXiv:2309.12307, section 3.2; llama_attn_replace.py, forward_flashattn and forward_noflashattn (`leak`).
    """
    kinds = Grouped(size), Grouped(size, size // 2, leak)
    return Mask(kinds, heads=(0,) * (heads // 2) + (1,) * (heads - heads // 2))


def group_size(length: int, *, fine_tuning: bool = False) -> int:
    """The paper's group for rows of `length` tokens: a quarter of them, rounded up.

    fine_tuning: the rule of supervised fine-tuning, where lengths vary: a quarter of a multiple of 4096, else 8192.
    Source: llama_attn_replace_sft.py.
    """
    if fine_tuning and length % 4096:
        return 8192
    return -(-length // 4)


def extended_rope(
    config: DecoderConfig, length: int, *, scaling: Literal["linear", "yarn"] = "linear", parity: bool = False
) -> DecoderConfig:
    """The configuration of a decoder whose positions are interpolated to a longer context.

    factor = existing * ceil(length / (original * existing)) of the context length of pre-training: positions are
    divided by it, under "yarn" those of slow pairs alone (see `RopeConfig`). original is max_positions, which stays, so
    that this may be repeated; a "yarn" config has its own. A context that is long enough already changes nothing.

    Args:
      config: of the decoder; its rotary scaling is "none" or `scaling`.
      length: tokens of the new context.
      scaling: "linear", LongLoRA's, or "yarn", with its paper's constants unless the config has others.
      parity: the original's rule, whose new factor replaces the existing one and so is too small for a decoder that
        has been extended before.

    Raises:
      ValueError: for another scaling.
    Source: fine-tune.py; position interpolation, arXiv:2306.15595; YaRN, arXiv:2309.00071.
    """
    rope = config.rope
    if rope.scaling not in ("none", scaling):
        raise ValueError(
            f"extended_rope: the rotary scaling is {rope.scaling!r}; wanted 'none' or {scaling!r}, which can be "
            "extended; start from the model before that scaling."
        )
    existing = rope.factor if rope.scaling == scaling else 1.0
    original = rope.original_positions if rope.scaling == "yarn" else config.max_positions
    if length <= original * existing:
        return config
    factor = float(math.ceil(length / (original * existing))) * (1.0 if parity else existing)
    changes = {"original_positions": original} if scaling == "yarn" else {}
    return dataclasses.replace(config, rope=dataclasses.replace(rope, scaling=scaling, factor=factor, **changes))


class Lora(nnx.Module):
    """y = base(x) + alpha / r * (x A) B, in the place of a linear layer, stacked over layers or not.

    Attributes:
      base: an nnx.Linear or a QuantizedLinear [D, F], frozen.
      a: [..., D, r] float32, uniform within ± 1 / sqrt(D) at first, Kaiming's bound for a slope of sqrt(5).
      b: [..., r, F] float32, zero at first: a new layer computes what its base does.
      alpha: scales the product.

    Source: LoRA, arXiv:2106.09685; huggingface/peft tuners/lora/layer.py, whose factors are the transposed ones.
    """

    def __init__(self, base: nnx.Linear | QuantizedLinear, rank: int, alpha: float, *, key):
        if isinstance(base, QuantizedLinear):
            *layers, groups, outputs = base.scale.shape
            inputs, axes = groups * base.group, base.axes
        else:
            *layers, inputs, outputs = base.kernel.shape
            axes = base.kernel.get_metadata().get("axes", (None, None))
        bound = inputs**-0.5
        self.base, self.alpha = base, alpha
        a = jax.random.uniform(key, (*layers, inputs, rank), jnp.float32, -bound, bound)
        self.a = nnx.LoRAParam(a, axes=(axes[0], None))
        self.b = nnx.LoRAParam(jnp.zeros((*layers, rank, outputs), jnp.float32), axes=(None, axes[1]))

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.a.shape[-1]

    def __call__(self, x):
        """[..., D] -> [..., F] in the base's dtype."""
        y = self.base(x)
        return y + (self.scale * ((x @ self.a[...]) @ self.b[...])).astype(y.dtype)

    def merged(self) -> nnx.Linear:
        """One linear with the weight W + alpha / r * A B, added in float32; packed weights are unpacked."""
        base = self.base.dense(jnp.float32) if isinstance(self.base, QuantizedLinear) else nnx.clone(self.base)
        kernel = base.kernel[...]
        change = self.scale * jnp.matmul(self.a[...], self.b[...], precision="highest")
        base.kernel = _param(base.kernel, (kernel.astype(jnp.float32) + change).astype(kernel.dtype))
        return base


def add_lora[Model: nnx.Module](
    model: Model,
    *,
    targets: tuple[str, ...] = ATTENTION,
    rank: int = 8,
    alpha: float = 16.0,
    trained: tuple[str, ...] = PLUS,
    key,
) -> Model:
    """A copy of a model of which little trains: low-rank factors beside some linears, and some parameters whole.

    `nnx.split(model, nnx.Param, ...)` then gives what trains, in float32; the rest is `Frozen` and keeps its dtype. The
    copy computes what the model does until a factor has been trained.

    Args:
      model: any model, its layers stacked or in lists; its linears may be packed (QLoRA).
      targets: attribute names of the linears that get factors.
      rank: r.
      alpha: the factors' product is scaled by alpha / r.
      trained: a parameter trains whole if one of these is part of its dotted name: the embedding and all norms by
        default, which the paper calls LoRA+; ("embed", "norm", "head") also the output head; () is plain LoRA. An
        embedding that is also the head (tied) trains as both.
      key: of the factors.

    Raises:
      ValueError: if no linear has such a name, or for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"add_lora: rank={rank}; wanted at least 1.")
    model = freeze(model)
    adapted = []
    for path, node in list(nnx.iter_modules(model)):
        for name, value in list(vars(node).items()):
            dotted = ".".join(map(str, (*path, name)))
            if name in targets and isinstance(value, nnx.Linear | QuantizedLinear):
                key, own = jax.random.split(key)
                setattr(node, name, Lora(value, rank, alpha, key=own))
                adapted.append(dotted)
            elif isinstance(value, Frozen) and any(part in dotted for part in trained):
                setattr(node, name, _param(value, value[...].astype(jnp.float32)))
    if missing := [target for target in targets if not any(dotted.endswith(target) for dotted in adapted)]:
        raise ValueError(f"add_lora: no linear is called {' or '.join(missing)}; wanted attribute names of linears.")
    return model


def merge_lora[Model: nnx.Module](model: Model) -> Model:
    """A plain copy of a model from `add_lora`: factors added to their weights; all but packed weights train again.

    A packed linear that had factors is a dense float32 one afterwards.
    """
    model = nnx.clone(model)
    for _, node in list(nnx.iter_modules(model)):
        for name, value in list(vars(node).items()):
            if isinstance(value, Lora):
                setattr(node, name, value.merged())
    for _, node in nnx.iter_modules(model):
        for name, value in list(vars(node).items()):
            if isinstance(value, Frozen) and not isinstance(node, QuantizedLinear):
                setattr(node, name, _param(value, value[...]))
    return model


def _param(like: nnx.Variable, array) -> nnx.Param:
    """A parameter that trains, with the axis names of another variable."""
    axes = like.get_metadata().get("axes")
    return nnx.Param(array) if axes is None else nnx.Param(array, axes=axes)


def extend_vocabulary(model: Decoder, count: int) -> Decoder:
    """A copy of a decoder with `count` more tokens, whose rows of embedding and head are the means of the old ones.

    For tokens that a published tokenizer lacks, such as LongLoRA's "[PAD]" of Llama 2.
    Source: fine-tune.py, smart_tokenizer_and_embedding_resize.
    """

    def extended(weight, axis):
        mean = jnp.mean(weight, axis=axis, keepdims=True, dtype=jnp.float32).astype(weight.dtype)
        return jnp.concatenate([weight, jnp.repeat(mean, count, axis=axis)], axis=axis)

    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, vocabulary=model.config.vocabulary + count)
    model.embedding = _param(model.embedding, extended(model.embedding[...], 0))
    if not model.config.tied:
        model.head.kernel = _param(model.head.kernel, extended(model.head.kernel[...], 1))
        model.head.out_features += count
    return model


def save_adapter(path: str | os.PathLike, model: Decoder, *, base: str = "") -> None:
    """Writes what trains of a decoder from `add_lora` as PEFT and LongLoRA keep it; see `lumen.io.peft`.

    Args:
      path: the folder to write into.
      model: stacked or a list of layers.
      base: the name of the model that was adapted, for the adapter's config.
    """
    loras = {path[-1]: node for path, node in nnx.iter_modules(model) if isinstance(node, Lora)}
    first = next(iter(loras.values()))
    targets = tuple(theirs.rpartition(".")[2] for theirs, ours in names.LINEARS.items() if ours in loras)
    config = peft.AdapterConfig(first.a.shape[-1], first.alpha, targets, base)
    factors = nnx.state(model, nnx.LoRAParam)
    whole = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    peft.write(path, config, factors, whole, _rules(model))


def load_adapter(path: str | os.PathLike, model: Decoder) -> Decoder:
    """A copy of a decoder with the adapter of a folder, as `add_lora` makes it and ready to train on or to merge.

    Args:
      path: a folder as PEFT, LongLoRA or `save_adapter` wrote it; see `lumen.io.peft`.
      model: the decoder it was trained on, packed or not. If the adapter's embedding has more rows, tokens are added
        as `extend_vocabulary` does.

    Raises:
      FileNotFoundError: naming the file that is not there.
      ValueError: for an adapter of another kind, or listing every tensor that does not fit the model.
    """
    config, tensors = peft.read(path)
    ours = {theirs.rpartition(".")[2]: ours for theirs, ours in names.LINEARS.items()}
    if unknown := sorted(set(config.targets) - set(ours)):
        raise ValueError(f"load_adapter: {path} adapts {', '.join(unknown)}; wanted some of {', '.join(ours)}.")
    rules = _rules(model)
    rows = tensors.get("model.embed_tokens.weight")
    if rows is not None and len(rows) > model.config.vocabulary:
        model = extend_vocabulary(model, len(rows) - model.config.vocabulary)
    whole = pretrained.published_names(model, rules)
    model = add_lora(
        model,
        targets=tuple(ours[name] for name in config.targets),
        rank=config.rank,
        alpha=config.alpha,
        trained=tuple({whole[name] for name in tensors if name in whole}),
        key=jax.random.key(0),
    )
    graph, state, frozen = nnx.split(model, nnx.Param, ...)
    trains: Any = state  # the tables serve any tree of variables
    trains = pretrained.from_original(tensors, trains, [*rules, *peft.lora_rules(rules)])
    return nnx.merge(graph, trains, frozen)


def _rules(model: Decoder) -> list[pretrained.Rule]:
    """The table for layers that are stacked, or in a list."""
    if not isinstance(model.blocks, nnx.List):
        return names.RULES
    return [dataclasses.replace(rule, ours=rule.ours.replace("blocks.", "blocks.{layer}.")) for rule in names.RULES]
