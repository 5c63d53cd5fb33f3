"""DuoAttention: which key/value heads need the whole context, found by training a gate for each of them.

    teacher, student = gated_hidden(model, gates, tokens)             # identification: gates train, the model does not
    loss, metrics = gate_loss(model, gates, tokens, labels)
    retrieval = retrieval_heads(gates, sparsity=0.5)                  # bool [L, K]
    model = deploy(model, retrieval)                                  # only retrieval heads keep all tokens

Source: DuoAttention, arXiv:2410.10819; mit-han-lab/duo-attention.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lumen.attention import Full, Mask, Streaming, attend
from lumen.kv_cache import StreamingHeads
from lumen.language.decoder import Block, Decoder
from lumen.layers import freeze, run_layers, unstack
from lumen.qtensor import QuantizedLinear
from lumen.sharding import constrain
from pallas_kernels.block_sparse_attention import RangeMask
from pallas_kernels.w4a16_matmul import PackedInt4, pack, unpack

Branch = Literal["teacher", "student"]
TRAINING = Streaming(128, 256)


class GatedDecoder(nnx.Module):
    """What gate training holds: a decoder that does not train, and gates [L, K] float32 that do, at first 1."""

    def __init__(self, decoder: Decoder):
        self.decoder: Decoder = freeze(decoder)
        self.gates = nnx.Param(jnp.ones((decoder.config.depth, decoder.config.kv_heads)), axes=(None, None))


def clip_gates(gates):
    """Gates between 0 and 1. The gradient is 1 in [0, 1], its ends included, and 0 outside."""
    return jnp.where((gates < 0) | (gates > 1), jax.lax.stop_gradient(jnp.clip(gates, 0, 1)), gates)


def gated_hidden(
    model: Decoder,
    gates,
    tokens,
    *,
    streaming: Streaming = TRAINING,
    branch: Branch = "teacher",
    segments=None,
    remat: bool = True,
):
    """Two streams through a decoder: one with full attention, one whose heads mix full and streaming attention.

    In each layer, with a gate a for each key/value head and all query heads of its group,

        teacher: A_F = full attention of the teacher's rows
        student: a A + (1 - a) A_S, A_S = streaming attention of the student's rows

    and A = A_F, the teacher's, or, with branch "student", the full attention of the student's rows. The paper's formula
    reads like the latter; the released code does the former, which costs two attentions a layer rather than three. The
    teacher is a constant: gradients reach the gates and the student's rows.

    Args:
      model: the decoder, stacked or a list of layers, its weights dense or packed.
      gates: [L, K], clipped to [0, 1] here.
      tokens: [B, T] int32.
      streaming: what streaming heads see. The original's default kernel is Streaming(128, 256, block=128).
      branch: whose full attention the student mixes in.
      segments: [B, T] int32, see `Decoder`. Padding at the end of a row needs none: attention is causal.
      remat: recompute each layer in the backward pass; the teacher's attention is kept.

    Returns:
      (teacher [B, T, D], student [B, T, D]), after the final norm.
    Source: duo_attn/patch/llama.py.
    """
    config, (batch, count) = model.config, tokens.shape
    _check("gated_hidden", "gates", gates, model)
    full = Mask(segments=segments).ranges(count, count)
    recent = Mask(kinds=(streaming,), segments=segments).ranges(count, count)
    tables = model.tables(jnp.arange(count, dtype=jnp.int32))
    gates = jnp.repeat(clip_gates(gates), config.heads // config.kv_heads, axis=1)  # [L, N]

    def layer(rows, block: Block, index):
        teacher, student = (constrain(x, "batch", None, None) for x in rows)
        attended = attend(*block.heads(block.input_norm(teacher), tables), mask=full)  # [B, T, N, H]
        attended = checkpoint_name(jax.lax.stop_gradient(attended), "teacher")
        heads = block.heads(block.input_norm(student), tables)
        whole = attended if branch == "teacher" else attend(*heads, mask=full)
        gate = gates[index][:, None]
        mixed = (gate * whole + (1 - gate) * attend(*heads, mask=recent)).astype(student.dtype)

        def finish(x, attended):
            x = x + block.output(attended.reshape(batch, count, -1))
            return x + block.mlp(block.mlp_norm(x))

        return finish(teacher, attended), finish(student, mixed)

    if remat:
        layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("teacher"))
    x = model.embedding[...][tokens]
    teacher, student = run_layers(layer, (x, x), model.blocks)
    return model.norm(teacher), model.norm(student)


def gate_loss(model: Decoder, gates, tokens, labels, *, regularisation: float = 0.05, **options):
    """What gates are trained to minimise: distillation at the labelled tokens plus the price of full attention.

    distillation = sum over labelled tokens of mean over D of (teacher - student)² / number of labelled tokens
    penalty      = mean |gate|
    loss         = distillation + regularisation * penalty

    in float32. The paper sums over D and over gates; its weight 0.05 belongs to the means of the released code, which
    are these.

    Args:
      model, gates, tokens: as in `gated_hidden`.
      labels: [B, T] bool, the tokens whose hidden rows are compared; a batch has at least one.
      regularisation: λ.
      options: of `gated_hidden`.

    Returns:
      (loss, {"distillation": ..., "penalty": ...}), float32 scalars.
    Source: duo_attn/loss.py and train.py; arXiv:2410.10819, section 2.2.
    """
    teacher, student = gated_hidden(model, gates, tokens, **options)
    squared = jnp.mean(jnp.square(teacher.astype(jnp.float32) - student.astype(jnp.float32)), axis=-1)  # [B, T]
    distillation = jnp.sum(squared * labels) / jnp.sum(labels)
    penalty = jnp.mean(jnp.abs(gates.astype(jnp.float32)))
    return distillation + regularisation * penalty, {"distillation": distillation, "penalty": penalty}


def retrieval_heads(
    gates,
    sparsity: float = 0.5,
    *,
    per_layer: bool = False,
    threshold: float | None = None,
    seed: int | None = None,
) -> np.ndarray:
    """Which heads keep the whole context: those with the largest gates.

    The original's rule: a head whose gate, clipped to [0, 1], is at least the quantile `sparsity` of all gates, so that
    n - ceil(sparsity (n - 1)) of n heads are retrieval heads; none for sparsity >= 1, all for sparsity <= 0. (The paper
    writes "more than".) Among equal gates, and clipping makes many equal, the original draws; here the head of the
    earlier layer, then of the smaller number, goes first.

    Args:
      gates: [L, K].
      sparsity: share of streaming heads.
      per_layer: the same number of retrieval heads in every layer, so that all layers have one shape.
      threshold: instead of a share: heads with a clipped gate above it.
      seed: draws among equal gates as the original does after numpy.random.seed(seed).

    Returns:
      [L, K] bool.
    Source: duo_attn/utils.py, sparsify_attention_heads.
    """
    gates = np.clip(np.asarray(gates, np.float64), 0.0, 1.0)
    if threshold is not None:
        return gates > threshold
    if seed is not None:
        gates = gates + np.random.RandomState(seed).uniform(0, 1e-6, gates.shape)
    rows = gates if per_layer else gates.reshape(1, -1)
    heads = rows.shape[1]
    if sparsity <= 0 or sparsity >= 1:
        return np.full(gates.shape, sparsity <= 0)
    count = heads - int(np.ceil(np.round(sparsity * (heads - 1), 9)))
    rank = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1)
    return (rank < count).reshape(gates.shape)


def head_kinds(retrieval, group: int) -> np.ndarray:
    """The kinds of query heads for `Mask(kinds=(Full(), Streaming(...)), heads=...)`.

    Args:
      retrieval: [..., K] bool.
      group: N / K, query heads per key/value head.

    Returns:
      [..., N] int32: 0 for heads that see everything, 1 for streaming ones.
    """
    return np.repeat(~np.asarray(retrieval, bool), group, axis=-1).astype(np.int32)


def sparse_hidden(model: Decoder, kinds, tokens, *, streaming: Streaming = TRAINING, segments=None):
    """Final hidden rows [B, T, D] in one pass without caches, streaming heads masked token by token.

    What a deployed model computes, for judging choices of heads: with streaming = Streaming(sink, recent,
    includes_self=False) that of caches filled token by token.

    Args:
      model: the decoder, its heads in their own order.
      kinds: [L, N] int32, of `head_kinds`. It may be traced: one program serves all choices.
      tokens, streaming, segments: as in `gated_hidden`.
    """
    count = tokens.shape[1]
    ranges = [Mask(kinds=(kind,), segments=segments).ranges(count, count).ranges for kind in (Full(), streaming)]
    ranges, kinds = jnp.concatenate(ranges), jnp.asarray(kinds)
    tables = model.tables(jnp.arange(count, dtype=jnp.int32))

    def layer(x, block: Block, index):
        return block(constrain(x, "batch", None, None), tables, RangeMask(ranges, kinds[index]))

    return model.norm(run_layers(layer, model.embedding[...][tokens], model.blocks))


def head_order(retrieval) -> np.ndarray:
    """[L, K] int32: the key/value heads of each layer, retrieval heads first, otherwise in their own order."""
    return np.argsort(~np.asarray(retrieval, bool), axis=1, kind="stable").astype(np.int32)


def reorder_heads(model: Decoder, retrieval) -> Decoder:
    """The same function with each layer's retrieval heads first: of what `retrieval` says, layer by layer.

    Columns of query, key and value (with their biases) and rows of output are moved by whole heads; of packed weights
    the codes and scales are. The caches of both kinds of head are then slices.

    Args:
      model: the decoder, stacked or a list of layers; it stays as it was.
      retrieval: [L, K] bool, in the order of the model's heads.

    Raises:
      ValueError: for a choice of another shape, or packed output weights of which one scale serves several key/value
        heads' groups but not the whole row.
    Source: duo_attn/utils.py, reorder_linear_weights and reorder_full_attn_heads, which would permute the output's
      bias too.
    """
    _check("reorder_heads", "retrieval", retrieval, model)
    config = model.config
    group, width = config.heads // config.kv_heads, config.head_dim
    order = head_order(retrieval)[:, :, None]  # [L, K, 1]
    of_keys = (order * width + np.arange(width)).reshape(config.depth, -1)  # [L, K H]
    of_queries = (order * group * width + np.arange(group * width)).reshape(config.depth, -1)  # [L, N H]
    model = nnx.clone(model)
    blocks: Any = model.blocks
    listed = isinstance(blocks, nnx.List)
    for index, block in enumerate(blocks if listed else [blocks]):
        queries, keys = (channels[index] if listed else channels for channels in (of_queries, of_keys))
        block.query = _outputs_taken(block.query, queries)
        block.key, block.value = _outputs_taken(block.key, keys), _outputs_taken(block.value, keys)
        block.output = _inputs_taken(block.output, queries, group * width)
    return model


def deploy(
    model: Decoder,
    retrieval,
    *,
    sink: int = 64,
    recent: int = 256,
    prefill: Literal["token", "chunk"] = "token",
) -> Decoder:
    """A model that runs with the chosen heads: reordered, its layers a list, its caches of two kinds.

    `generate`, `stream` and `model.empty_cache` then work as ever; a retrieval head's cache holds everything, that of a
    streaming head `sink` + `recent` tokens and the newest one. With prefill "token" every token sees what it would have
    seen had the tokens come one by one, however a prompt is cut; with "chunk" a streaming head sees what it kept and
    the whole chunk, as in the original, so that a prompt in one piece is dense.

    Args:
      model: the decoder, stacked or a list of layers; dense or quantised.
      retrieval: [L, K] bool, in the order of the model's heads; of `retrieval_heads`.
      sink, recent, prefill: of the streaming heads.

    Returns:
      A decoder whose `config.streaming` says all this.
    """
    counts = np.asarray(retrieval, bool).sum(axis=1).tolist()
    model = reorder_heads(model, retrieval)
    if not isinstance(model.blocks, nnx.List):
        model = unstack(model)
    heads = StreamingHeads(tuple(counts), sink, recent, prefill)
    model.config = dataclasses.replace(model.config, streaming=heads)
    return model


def _check(function: str, name: str, array, model: Decoder) -> None:
    config = model.config
    if jnp.shape(array) != (config.depth, config.kv_heads):
        raise ValueError(
            f"{function}: {name} is {list(jnp.shape(array))}; wanted [{config.depth}, {config.kv_heads}], the model's "
            "layers and key/value heads."
        )


def _take(array, channels, axis: int):
    """Rows or columns of [..., D, F] (axis -2 or -1) or entries of [..., F], in the order of channels [..., n]."""
    channels = jnp.asarray(channels)
    index = channels.reshape(*channels.shape[:-1], *(1,) * (array.ndim - channels.ndim), channels.shape[-1])
    return jnp.take_along_axis(array, jnp.moveaxis(index, -1, axis), axis=axis)


def _replaced(variable, array):
    return type(variable)(array, **variable.get_metadata())


def _outputs_taken(linear, channels):
    """A linear with its output channels in another order."""
    if isinstance(linear, QuantizedLinear):
        packed = linear.packed
        moved = PackedInt4(
            _take(packed.words, channels, -2),
            _take(packed.scale, channels, -1),
            _take(packed.zero, channels, -1),
            packed.group,
            packed.padding,
        )
        bias = None if linear.bias is None else _take(linear.bias[...], channels, -1)
        return QuantizedLinear(moved, bias, axes=linear.axes)
    linear = nnx.clone(linear)
    linear.kernel = _replaced(linear.kernel, _take(linear.kernel[...], channels, -1))
    if linear.bias is not None:
        linear.bias = _replaced(linear.bias, _take(linear.bias[...], channels, -1))
    return linear


def _inputs_taken(linear, channels, unit: int):
    """A linear with its input channels in another order, which moves whole runs of `unit` channels."""
    if not isinstance(linear, QuantizedLinear):
        linear = nnx.clone(linear)
        linear.kernel = _replaced(linear.kernel, _take(linear.kernel[...], channels, -2))
        return linear
    q, scale, zero = unpack(linear.packed)
    inputs, group = q.shape[-2], linear.group
    if group < inputs:
        if unit % group:
            raise ValueError(
                f"reorder_heads: one scale serves {group} input channels of the output layer, and the query heads of a "
                f"key/value head have {unit}; quantise with a group that divides {unit} or with whole rows, or reorder "
                "before quantising."
            )
        groups = channels[..., ::group] // group
        scale, zero = _take(scale, groups, -2), _take(zero, groups, -2)
    repack = lambda q, scale, zero: pack(q, scale, zero, group)  # noqa: E731
    packed = (jax.vmap(repack) if q.ndim == 3 else repack)(_take(q, channels, -2), scale, zero)
    bias = None if linear.bias is None else linear.bias[...]
    return QuantizedLinear(packed, bias, axes=linear.axes)
