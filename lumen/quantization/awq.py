"""AWQ: 4-bit and 3-bit weights, rescaled by what the activations say before they are rounded.

Rounding hurts most where activations are large. Before rounding, the input channels of a weight are multiplied by s and
whatever feeds them is divided by s, which changes nothing in exact arithmetic; s = mean|x|^r, with the exponent r that
costs the block the least. Then every group of weights is clipped where that costs the least. No gradients.

    tokens = calibration_tokens(passages("corpus.jsonl"), tokenizer.encode)
    quantized, report = quantize_decoder(model, tokens, AWQConfig(group=128))
    print(report_table(report))

Source: AWQ, arXiv:2306.00978; mit-han-lab/llm-awq awq/quantize/{quantizer,auto_scale,auto_clip,pre_quant}.py and
casper-hansen/AutoAWQ awq/quantize/{quantizer,scale}.py; `parity` chooses between the two. Deviations:

- The search rounds weights and sums errors in float32, and computes the block in the weights' dtype; the originals do
  all but the sum in that dtype.
- Errors of a linear, in the clip search and where a linear alone is inspected, are quadratic forms in Q(w) - w with the
  second moments of x; the originals subtract two outputs, token by token.
- With more than `AWQConfig.race_after` sequences a scale that can no longer win is not measured on the rest.
- A group that is clipped on both sides has min(w) / scale = -7.5 (3 bits: -3.5) up to rounding, so the last bit of a
  scale says which way its zero goes, and with it which of the 10 ranges is best. Activations of another implementation
  differ in that bit, and so a few of the limits do.
- A whole row as one group can be clipped too, where the originals raise.
- Of a bias the last len(s) entries are divided by s, those of the channels that are; the originals divide all.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from lumen.io.checkpoint import flatten
from lumen.language.decoder import Block, Decoder, DecoderConfig
from lumen.qtensor import quantize_linear
from lumen.quantization.calibrate import input_statistics
from lumen.quantization.report import LinearReport

_RATIOS = np.arange(20, dtype=np.float32) / 20
_SHRINKS = (1 - np.arange(10) / 20).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class AWQConfig:
    """How weights are quantised.

    Attributes:
      bits: 4, or 3, which is stored in 4 bits all the same.
      group: G, input channels that share a scale and a zero: 32, 64, 128, or -1 for all of them.
      method: "awq": scale and clip search; "scale" or "clip": one of them; "rtn": plain rounding, for comparison.
      parity: which original to follow. "autoawq": the scale also looks at the weights (`duo_scaling`), and the final
        rounding is in float16 arithmetic. "llm-awq": the paper; the final rounding is in the weights' dtype.
      duo_scaling: of "autoawq": s = mean|x|^r / (mean of the normalised |w|)^(1 - r); without it, the paper's s.
      gqa_output: scale the input of the attention's output layer also where query heads share key/value heads, with
        one s per shared head. The originals leave that layer unscaled there.
      batch: sequences per micro-batch of the search; memory grows with it, results do not depend on it.
      race_after: sequences that every scale is tried on. With more, a scale of attention or MLP whose loss is then
        above the best by more than four standard errors of their difference is tried no further.
    """

    bits: int = 4
    group: int = 128
    method: Literal["awq", "scale", "clip", "rtn"] = "awq"
    parity: Literal["autoawq", "llm-awq"] = "autoawq"
    duo_scaling: bool = True
    gqa_output: bool = False
    batch: int = 4
    race_after: int = 16

    def __post_init__(self):
        for name, wanted in {
            "bits": (4, 3),
            "group": (32, 64, 128, -1),
            "method": ("awq", "scale", "clip", "rtn"),
            "parity": ("autoawq", "llm-awq"),
        }.items():
            if getattr(self, name) not in wanted:
                choices = ", ".join(repr(choice) for choice in wanted)
                raise ValueError(f"AWQConfig: {name}={getattr(self, name)!r}; wanted one of {choices}.")
        for name, least in {"batch": 1, "race_after": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"AWQConfig: {name}={getattr(self, name)!r}; wanted {least} or more.")

    def final_dtype(self, linear: nnx.Linear):
        """The arithmetic of a linear's final rounding."""
        return jnp.dtype(jnp.float16) if self.parity == "autoawq" else linear.kernel[...].dtype


# What is quantised.


@dataclasses.dataclass(frozen=True)
class ScaleGroup:
    """Linears of a block that share an input, and so one scale per channel of it.

    Attributes:
      linears: attribute names of nnx.Linears of the block.
      input: the name under which the block records what enters them.
      previous: attribute name of the nnx.RMSNorm, nnx.LayerNorm or nnx.Linear that absorbs 1 / s; None: unscaled.
      inspected: (block, input, *context) -> the output whose error is minimised; None: that of the (one) linear.
      shared: (K, N / K) where `previous` is a linear of K heads, each of which feeds N / K heads of the input, side by
        side: s is then the same for those.
      norm_offset: 1.0 if `previous` is a norm that multiplies by 1 + its scale.
    """

    linears: tuple[str, ...]
    input: str
    previous: str | None = None
    inspected: Callable[..., Any] | None = None
    shared: tuple[int, int] = (1, 1)
    norm_offset: float = 0.0

    def output(self, block, x, *context):
        """What `inspected` says, between the largest finite numbers of its dtype."""
        assert self.inspected is not None
        y = self.inspected(block, x, *context)
        return jnp.clip(y, jnp.finfo(y.dtype).min, jnp.finfo(y.dtype).max)

    def share(self, values):
        """Means [..., D] over the channels that must have one value."""
        split = values.reshape(*values.shape[:-1], *self.shared, -1)
        return jnp.broadcast_to(split.mean(-2, keepdims=True), split.shape).reshape(values.shape)

    def absorbed(self, scale):
        """The part of a scale [D] that `previous` absorbs: one value per channel of its own."""
        return scale.reshape(*self.shared, -1)[:, 0].reshape(-1)


@dataclasses.dataclass(frozen=True)
class ScaleGraph:
    """Which weights of a block are quantised, and what may be moved between them.

    A block is an nnx.Module called as block(x, *context, record=record), which calls record(name, value) with what
    enters its weights.

    Attributes:
      groups: all linears that are quantised, each once.
      unclipped: of those, the ones that the clip search leaves alone.
    """

    groups: tuple[ScaleGroup, ...]
    unclipped: tuple[str, ...] = ()

    @property
    def linears(self) -> dict[str, ScaleGroup]:
        """{attribute name: its group}."""
        return {name: group for group in self.groups for name in group.linears}


def decoder_graph(config: DecoderConfig, *, gqa_output: bool = False) -> ScaleGraph:
    """The graph of a Llama or Qwen2 block.

    The input of `output` is scaled where the kernels of value and output have equal shapes; with `gqa_output` anywhere.
    """
    square = config.heads * config.head_dim == config.kv_heads * config.head_dim == config.width
    return ScaleGraph(
        groups=(
            ScaleGroup(("query", "key", "value"), "attention", "input_norm", Block.attention),
            ScaleGroup(
                ("output",),
                "output",
                "value" if square or gqa_output else None,
                shared=(config.kv_heads, config.heads // config.kv_heads),
            ),
            ScaleGroup(("gate", "up"), "mlp", "mlp_norm", _mlp),
            ScaleGroup(("down",), "down", "up"),
        ),
        unclipped=("query", "key"),
    )


def _mlp(block: Block, x, *context):
    del context
    return block.mlp(x)


# The quantiser.


def quantize_groups(w, bits: int, group: int, *, dtype=jnp.float32):
    """Rounds a weight to integers, every group on its own grid.

    scale = max(max(w) - min(w), 1e-5) / (2^bits - 1);  zero = clip(-round(min(w) / scale));
    q = clip(round(w / scale) + zero), both clipped to 0..2^bits - 1; halves are rounded to even.

    The grid is not stretched to contain zero: an all-positive group has zero = 0 and saturates, as in the originals.

    Args:
      w: [D, F].
      bits: of q.
      group: G, divides D; -1 for D.
      dtype: w and the result of every operation are rounded to it: float32, float16 or bfloat16.

    Returns:
      q [D, F] uint8, scale [D/G, F] in dtype, zero [D/G, F] uint8; the weight is (q - zero) * scale.

    Source: pseudo_quantize_tensor of both originals.
    """
    q, scale, zero = _quantize(w, bits, group, dtype)
    return q.reshape(w.shape).astype(jnp.uint8), scale[:, 0].astype(dtype), zero[:, 0].astype(jnp.uint8)


def _quantize(w, bits, group, dtype):
    """q [D/G, G, F], scale and zero [D/G, 1, F], all float32."""

    def rounded(x):
        # One operation in float32, rounded to 16 bits, is that operation in 16 bits: 24 bits >= 2 * 11 + 2. Without the
        # barrier XLA leaves the rounding out.
        return x if dtype == jnp.float32 else jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)

    depth, features = w.shape
    w = rounded(w.astype(jnp.float32)).reshape(-1, depth if group == -1 else group, features)
    low, high, top = w.min(1, keepdims=True), w.max(1, keepdims=True), 2**bits - 1
    scale = rounded(_divide(jnp.maximum(rounded(high - low), rounded(jnp.float32(1e-5))), top))
    zero = jnp.clip(-jnp.rint(rounded(_divide(low, scale))), 0, top)
    return jnp.clip(jnp.rint(rounded(_divide(w, scale))) + zero, 0, top), scale, zero


def _divide(x, y):
    """x / y, rounded correctly: where a group is clipped on both sides, min(w) / scale is 7.5 up to just that.

    XLA turns x / 15, x / broadcast(y) and x / (y / z) into products that round differently, unless the divisor hides
    in a select.
    """
    return x / jnp.where(jnp.isnan(x), x, y)


def _rounded_weight(w, config: AWQConfig, dtype=jnp.float32):
    """The nearest that the quantiser comes to w [D, F], float32."""
    q, scale, zero = _quantize(w, config.bits, config.group, dtype)
    return ((q - zero) * scale).reshape(w.shape)


# One block.


def _kernel(block, name):
    return getattr(block, name).kernel[...].astype(jnp.float32)


def _with_kernels(block, kernels: Mapping[str, Any]):
    """A copy of the block with other kernels."""
    block = jax.tree.map(lambda leaf: leaf, block)
    for name, kernel in kernels.items():
        getattr(block, name).kernel.set_value(kernel)
    return block


def _scale_candidates(group: ScaleGroup, mean_abs, kernels, config: AWQConfig):
    """Scales to try [C, D]: ones first, then one per ratio if this group is to be scaled."""
    ones = jnp.ones((1, mean_abs.shape[0]), jnp.float32)
    if group.previous is None or config.method not in ("awq", "scale"):
        return ones
    ratios = _RATIOS[:, None]
    s = group.share(mean_abs) ** ratios
    if config.parity == "autoawq" and config.duo_scaling:
        w = jnp.abs(jnp.concatenate(kernels, 1))  # [D, all outputs]
        grouped = w.reshape(-1, w.shape[0] if config.group == -1 else config.group, w.shape[1])
        normalised = _divide(grouped, grouped.max(1, keepdims=True) + 1e-6).reshape(w.shape)
        s = _divide(s, group.share(normalised.mean(1)) ** (1 - ratios) + 1e-4)
    s = jnp.maximum(s, 1e-4)
    s = _divide(s, jnp.sqrt(s.max(1, keepdims=True) * s.min(1, keepdims=True)))
    return jnp.concatenate([ones, jnp.where(jnp.isfinite(s), s, 1.0)])


def _apply_scales(block, graph: ScaleGraph, scales):
    """The block with weights times s and what feeds them divided by s: the same function in exact arithmetic.

    Args:
      block: one block.
      graph: its graph.
      scales: {input: s [D]}.

    Returns:
      A block with float32 kernels, and {linear: what its outputs were divided by [F]}.
    """
    kernels = {name: _kernel(block, name) * scales[group.input][:, None] for name, group in graph.linears.items()}
    divisors = {name: jnp.ones(kernel.shape[1]) for name, kernel in kernels.items()}
    block = _with_kernels(block, kernels)
    for group in graph.groups:
        if group.previous is None:
            continue
        previous: Any = getattr(block, group.previous)
        divisor = group.absorbed(scales[group.input])
        if isinstance(previous, nnx.Linear):
            # Of a fused projection, the last channels feed the group.
            kernel = previous.kernel[...]
            divisor = jnp.pad(divisor, (kernel.shape[1] - len(divisor), 0), constant_values=1.0)
            previous.kernel.set_value(_divide(kernel, divisor))
            divisors[group.previous] = divisor
        else:
            scale = previous.scale[...].astype(jnp.float32)
            scale = (scale + group.norm_offset) / divisor - group.norm_offset
            previous.scale.set_value(scale.astype(previous.scale[...].dtype))
        bias = getattr(previous, "bias", None)
        if bias is not None:
            bias.set_value((bias[...].astype(jnp.float32) / divisor).astype(bias[...].dtype))
    return block, divisors


def _clip(kernel, limit):
    """Weights [D, F] between -limit and limit [D/G, F]."""
    grouped = kernel.reshape(limit.shape[0], -1, kernel.shape[1])
    return jnp.clip(grouped, -limit[:, None], limit[:, None]).reshape(kernel.shape)


def _search_clip(kernel, rows, config: AWQConfig):
    """For every group the limit, of 10 from max|w| down to 0.55 of it, that costs its part of the output the least.

    The mean of ((Q(w) - w) x)^2 over rows x of a group is a quadratic form in the group's weights.

    Args:
      kernel: [D, F].
      rows: [R, D] inputs.

    Returns:
      [D/G, F].
    """
    depth, features = kernel.shape
    group = depth if config.group == -1 else config.group
    grouped = rows.reshape(len(rows), -1, group)
    moment = jnp.einsum("RMG,RMH->MGH", grouped, grouped, precision="highest") / len(rows)  # [D/G, G, G]
    top = jnp.abs(kernel.reshape(-1, group, features)).max(1)  # [D/G, F]

    def attempt(best, shrink):
        least, limit = best
        tried = top * shrink
        error = (_rounded_weight(_clip(kernel, tried), config) - kernel).reshape(-1, group, features)
        loss = (error * jnp.matmul(moment, error, precision="highest")).sum(1)
        return (jnp.where(loss < least, loss, least), jnp.where(loss < least, tried, limit)), None

    return jax.lax.scan(attempt, (jnp.full_like(top, jnp.inf), top), _SHRINKS)[0][1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Race:
    """Losses of the candidates of a group, sequence after sequence; who is too far behind drops out.

    The first candidate is there for comparison: it never drops out, and never wins where there are others.

    Attributes:
      losses: [C, N, M] mean squared error of each sequence; zero where there is none.
      measured: [N, M] bool, sequences measured.
      counts: [C] how many sequences each candidate was measured on.
      running: [C] bool.
    """

    losses: Any
    measured: Any
    counts: Any
    running: Any

    @classmethod
    def start(cls, candidates: int, shape: tuple[int, int]):
        """Before any of N x M sequences is measured."""
        return cls(
            jnp.zeros((candidates, *shape)),
            jnp.zeros(shape, bool),
            jnp.zeros(candidates, jnp.int32),
            jnp.ones(candidates, bool),
        )

    def lap(self, index, measure: Callable[[Any], Any], candidates, real, after: int):
        """The race after micro-batch `index`.

        Args:
          index: of the micro-batch.
          measure: candidate -> its mean squared error on each sequence of the micro-batch [M].
          candidates: [C, ...].
          real: [M] bool, which sequences count.
          after: nobody drops out on fewer sequences.
        """

        def one(given):
            running, candidate = given
            return jax.lax.cond(running, measure, lambda _: jnp.zeros(len(real)), candidate)

        found = jnp.where(real, jax.lax.map(one, (self.running, candidates)), 0.0)
        measured = self.measured.at[index].set(real)
        count = measured.sum()
        race = _Race(
            self.losses.at[:, index].set(found), measured, jnp.where(self.running, count, self.counts), self.running
        )
        difference = race.losses - race.losses[race.leader]
        behind = difference.sum((1, 2)) / count
        squares = jnp.where(measured, (difference - behind[:, None, None]) ** 2, 0.0).sum((1, 2))
        near = behind <= 4 * jnp.sqrt(squares / (count * (count - 1)))
        return dataclasses.replace(race, running=race.running & (near | (count < after)).at[0].set(True))

    @property
    def means(self):
        """[C] mean losses, each over the sequences its candidate was measured on."""
        return self.losses.sum((1, 2)) / self.counts

    @property
    def leader(self):
        """The least loss of those that run; of equals the first."""
        return _least(jnp.where(self.running, self.means, jnp.inf))


def _least(losses):
    """Index of the least loss, the first of equals. The first loss is there for comparison, if there are others."""
    first = min(1, len(losses) - 1)
    return first + jnp.argmin(jnp.where(jnp.isnan(losses[first:]), jnp.inf, losses[first:]))


@functools.partial(jax.jit, static_argnames=("graph", "config", "sequences"))
def _search(block, x, context, *, graph: ScaleGraph, config: AWQConfig, sequences: int) -> dict[str, Any]:
    """The whole search of one block: one XLA program, the same for every block of its shape.

    Args:
      block: in full precision, unscaled.
      x: [N, M, T, D], what enters it, in N micro-batches; only the first `sequences` sequences count.
      context: what else it is called with.
      graph: of such a block.
      config: of the search.
      sequences: S.

    Returns:
      "scale": {input: [D]}, "choice": {input: index of the candidate}, "loss": {input: [C], plain rounding first},
      "limit": {linear: [D/G, F]}; and of each linear, as mean squares over sampled rows: "signal", its output, "plain"
      and "error", the error of that after plain rounding and at the end.
    """

    def inputs(x):
        found: dict[str, Any] = {}
        block(x, *context, record=found.__setitem__)
        return {group.input: found[group.input] for group in graph.groups}

    kernels = {name: _kernel(block, name) for name in graph.linears}
    direct = [group for group in graph.groups if group.inspected is None]
    indirect = [group for group in graph.groups if group.inspected is not None]
    statistics = input_statistics(inputs, x, sequences=sequences, moments=[group.input for group in direct])
    candidates = {
        group.input: _scale_candidates(
            group, statistics[group.input].mean_abs, [kernels[name] for name in group.linears], config
        )
        for group in graph.groups
    }

    def attempt(group, s):
        """Kernels of a group, scaled, rounded and scaled back, in their own dtype."""
        tried = {name: _rounded_weight(kernels[name] * s[:, None], config) / s[:, None] for name in group.linears}
        return {name: weight.astype(getattr(block, name).kernel[...].dtype) for name, weight in tried.items()}

    def loss(group, s):
        # Of a linear, the mean of (x (W' - W))^2 is a quadratic form, whatever the number of tokens.
        (name,) = group.linears
        error = attempt(group, s)[name].astype(jnp.float32) - kernels[name]
        product = jnp.matmul(statistics[group.input].moment, error, precision="highest")
        return (error * product).sum() / error.shape[1]

    def measure(races, index):
        recorded = inputs(x[index])
        real = index * x.shape[1] + jnp.arange(x.shape[1]) < sequences  # [M]
        new = {}
        for group in indirect:
            given = recorded[group.input]
            wanted = group.output(block, given, *context)

            def squares(s, group=group, given=given, wanted=wanted):
                output = group.output(_with_kernels(block, attempt(group, s)), given, *context)
                return ((output - wanted).astype(jnp.float32) ** 2).reshape(len(output), -1).mean(1)

            new[group.input] = races[group.input].lap(index, squares, candidates[group.input], real, config.race_after)
        return new, None

    losses = {group.input: jax.lax.map(functools.partial(loss, group), candidates[group.input]) for group in direct}
    choice = {name: _least(values) for name, values in losses.items()}
    races = {group.input: _Race.start(len(candidates[group.input]), x.shape[:2]) for group in indirect}
    # In random order, so that whoever drops out does so on sequences from everywhere.
    races = jax.lax.scan(measure, races, np.random.default_rng(0).permutation(len(x)))[0]
    losses |= {name: race.means for name, race in races.items()}
    choice |= {name: race.leader for name, race in races.items()}
    scale = {name: candidates[name][index] for name, index in choice.items()}
    scaled, divisors = _apply_scales(block, graph, scale)
    found = {"scale": scale, "choice": choice, "loss": losses, "limit": {}, "signal": {}, "plain": {}, "error": {}}
    for name, group in graph.linears.items():
        rows, kernel = statistics[group.input].rows, _kernel(scaled, name)
        scaled_rows = rows / scale[group.input]
        if config.method in ("awq", "clip") and name not in graph.unclipped:
            found["limit"][name] = _search_clip(kernel, scaled_rows, config)
            kernel = _clip(kernel, found["limit"][name])
        dtype = config.final_dtype(getattr(block, name))
        wanted = rows @ kernels[name]
        plain = rows @ _rounded_weight(kernels[name], config, dtype)
        final = scaled_rows @ _rounded_weight(kernel, config, dtype) * divisors[name]
        for key, value in (("signal", wanted), ("plain", plain - wanted), ("error", final - wanted)):
            found[key][name] = (value**2).mean()
    return found


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def _pack_block(block, scale, limit, *, graph: ScaleGraph, config: AWQConfig):
    """The block scaled, clipped, rounded and packed."""
    packed, _ = _apply_scales(block, graph, scale)
    for name in graph.linears:
        dense, original = getattr(packed, name), getattr(block, name)
        kernel = _clip(dense.kernel[...], limit[name]) if name in limit else dense.kernel[...]
        codes = quantize_groups(kernel, config.bits, config.group, dtype=config.final_dtype(original))
        setattr(packed, name, quantize_linear(dense, *codes))
    return packed


@functools.partial(jax.jit, donate_argnames=("x",))
def _advance(block, x, context):
    """What leaves the block in full precision, in the place of what enters it: [N, M, T, D] both."""
    return jax.lax.fori_loop(0, len(x), lambda i, x: x.at[i].set(block(x[i], *context)), x)


# A model.


def quantize_decoder(
    model: Decoder,
    tokens: np.ndarray,
    config: AWQConfig = AWQConfig(),
    *,
    progress: bool = True,
    resume_dir: str | os.PathLike | None = None,
) -> tuple[Decoder, list[LinearReport]]:
    """Quantises the linears of a decoder's blocks; embedding, norms and head keep their precision.

    Each block is searched with what enters it in the full-precision model. Beside the model, memory holds those inputs
    ([S, T, D] in its dtype) and the search of one block, whose size depends on `config.batch` but not on S.

    Args:
      model: in full precision, layers stacked; left as it is.
      tokens: [S, T] integers, calibration sequences.
      config: how.
      progress: show a bar on a terminal.
      resume_dir: a folder for what was found of every finished block. A run that was cut off goes on from there, and
        ends as if it had not been cut off.

    Returns:
      (a decoder whose blocks have `QuantizedLinear`s, stacked; what became of each linear).

    Raises:
      ValueError: naming the layer, for input channels that are no multiple of the group, and for weights or activations
        that are not finite; for tokens that are none, or outside the vocabulary; for a float16 model on a CPU; for a
        `resume_dir` of another model, other tokens or another configuration.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"AWQ: calibration tokens are {tokens.dtype}{list(tokens.shape)}; wanted integers [S, T], at least one."
        )
    if tokens.min() < 0 or tokens.max() >= model.config.vocabulary:
        raise ValueError(
            f"AWQ: calibration tokens go from {tokens.min()} to {tokens.max()}, and the vocabulary has "
            f"{model.config.vocabulary}; use the model's own tokenizer."
        )
    if model.embedding[...].dtype == jnp.float16 and jax.default_backend() == "cpu":
        raise ValueError(
            "AWQ: the model is float16, in which a CPU has no attention; load it with dtype float32 or bfloat16."
        )
    graph = decoder_graph(model.config, gqa_output=config.gqa_output)
    _check_weights(model.blocks, graph, config)
    folder = None if resume_dir is None else _open_folder(pathlib.Path(resume_dir), model, tokens, config)

    sequences, length = tokens.shape
    batch = min(config.batch, sequences)
    padded = np.pad(tokens, ((0, -sequences % batch), (0, 0)), mode="edge").reshape(-1, batch, length)
    x = model.embedding[...][padded]  # [N, M, T, D]
    context = model.tables(jnp.arange(length)), jnp.tril(jnp.ones((length, length), bool))
    blocks, report = [], []
    for layer in tqdm(range(model.config.depth), desc="AWQ", unit="block", disable=None if progress else True):
        block = jax.tree.map(lambda array, layer=layer: array[layer], model.blocks)
        found = None if folder is None else _load_block(folder, layer)
        if found is None:
            found = _search(block, x, context, graph=graph, config=config, sequences=sequences)
            found = jax.tree.map(np.asarray, found)
            _check_losses(found, layer, graph)
            if folder is not None:
                _save_block(folder, layer, found)
        blocks.append(_pack_block(block, found["scale"], found["limit"], graph=graph, config=config))
        report += _report(found, layer, graph, blocks[-1])
        if layer + 1 < model.config.depth:
            x = _advance(block, x, context)
    quantized = jax.tree.map(lambda leaf: leaf, model)
    quantized.blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)
    return quantized, report


def _check_weights(blocks, graph: ScaleGraph, config: AWQConfig) -> None:
    for name in graph.linears:
        kernel = getattr(blocks, name).kernel[...]  # [L, D, F]
        if config.group != -1 and kernel.shape[1] % config.group:
            raise ValueError(
                f"AWQ: blocks.{name} has {kernel.shape[1]} input channels, not a multiple of group={config.group}; "
                "choose a smaller group, or -1 for one scale per output channel."
            )
        finite = np.asarray(jnp.isfinite(kernel).all((1, 2)))
        if not finite.all():
            raise ValueError(
                f"AWQ: blocks.{np.argmin(finite)}.{name} has weights that are NaN or infinite; get the model again."
            )


def _check_losses(found, layer: int, graph: ScaleGraph) -> None:
    for group in graph.groups:
        if not np.isfinite(found["loss"][group.input][found["choice"][group.input]]):
            raise ValueError(
                f"AWQ: blocks.{layer}: no scale of the input '{group.input}' gives a finite error: activations are NaN "
                "or infinite; check embedding and norms, or load the model in a wider dtype."
            )


def _report(found, layer: int, graph: ScaleGraph, block) -> Iterator[LinearReport]:
    for name, group in graph.linears.items():
        choice, loss = int(found["choice"][group.input]), found["loss"][group.input]
        packed = getattr(block, name).packed
        stored = sum(array.nbytes for array in (packed.words, packed.scale, packed.zero))
        yield LinearReport(
            layer=layer,
            linear=name,
            input=group.input,
            ratio=float(_RATIOS[choice - 1]) if choice else None,
            loss_plain=float(loss[0]),
            loss=float(loss[choice]),
            signal=float(found["signal"][name]),
            error_plain=float(found["plain"][name]),
            error=float(found["error"][name]),
            bits=8 * stored / (packed.shape[0] * packed.shape[1]),
        )


# Finished blocks on disk.


def _open_folder(folder: pathlib.Path, model: Decoder, tokens: np.ndarray, config: AWQConfig) -> pathlib.Path:
    """Makes the folder and says in it what it belongs to; or checks that it belongs to this run."""
    weights = hashlib.sha256()
    for name, leaf in flatten(model).items():
        weights.update(f"{name} {leaf.dtype}{list(leaf.shape)}".encode())
        weights.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    wanted = {
        "configuration": dataclasses.asdict(config),
        "calibration tokens": f"{list(tokens.shape)} {hashlib.sha256(tokens.astype('<i4').tobytes()).hexdigest()}",
        "weights": weights.hexdigest(),
    }
    path = folder / "run.json"
    if path.exists():
        came = json.loads(path.read_text())
        if changed := [name for name, value in wanted.items() if came.get(name) != value]:
            raise ValueError(
                f"AWQ: {folder} holds blocks of another run: other {' and '.join(changed)}; "
                "choose another resume_dir, or delete this one."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(wanted, indent=1)))
    return folder


def _block_path(folder: pathlib.Path, layer: int) -> pathlib.Path:
    return folder / f"block_{layer:05}.safetensors"


def _save_block(folder: pathlib.Path, layer: int, found) -> None:
    tensors = {f"{kind}/{name}": np.array(value) for kind, values in found.items() for name, value in values.items()}
    _write_whole(_block_path(folder, layer), lambda unfinished: save_file(tensors, unfinished))


def _load_block(folder: pathlib.Path, layer: int) -> dict[str, dict[str, np.ndarray]] | None:
    if not _block_path(folder, layer).exists():
        return None
    found: dict[str, dict[str, np.ndarray]] = {"limit": {}}
    with safe_open(_block_path(folder, layer), framework="np") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            kind, name = key.split("/")
            found.setdefault(kind, {})[name] = file.get_tensor(key)
    return found


def _write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """The file appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
