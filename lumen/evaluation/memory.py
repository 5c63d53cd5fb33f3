"""What a decoder needs to be served with a long context, by arithmetic alone: memory, work, and the longest that fits.

    heads = StreamingHeads(dense=(4,) * 32)  # of 8 key/value heads in each layer
    deployment = Deployment(DecoderConfig.llama3_8b(streaming=heads), cache_bits=8)
    max_context(deployment, CHIPS["h200"].memory_bytes)
    print(memory_table([memory_report("half of the heads", deployment, 1_048_576, CHIPS["h200"])]))

Heads are as in DuoAttention (arXiv:2410.10819): a full head keeps all keys and values, a streaming head the first
`sink`, the `recent` ones and the newest. Nothing is allocated and nothing compiled; `--compile_only` of evaluate.py
asks the compiler instead.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.pretrained import read_config
from lumen.plan import Chip

PUBLISHED = {"llama3_8b": DecoderConfig.llama3_8b, "qwen25_7b": DecoderConfig.qwen25_7b}


def model_config(name: str) -> DecoderConfig:
    """The sizes of a published model by name (see PUBLISHED), or of a folder with a config.json."""
    if name in PUBLISHED:
        return PUBLISHED[name]()
    if not os.path.isdir(name):
        raise ValueError(f"memory: model {name!r} is neither {' nor '.join(PUBLISHED)} nor a folder with config.json.")
    return read_config(name)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A decoder as it is served. What is not said to be smaller is bfloat16.

    Attributes:
      config: the decoder's sizes, and in `config.streaming` which heads stream.
      weights: of the linears in the blocks: "bf16", or "w4a16" for 4 bits packed, with a 16-bit scale and zero point
        for each `group` input channels.
      group: see `weights`.
      cache_bits: of a cached number: 16, 8 or 4. Below 16 there is a float16 scale and zero point for each token and
        head, of keys and of values.
      batch: sequences, all of the same length.
      prefill_chunk: tokens of each that are read at a time; 0: all at once.
    """

    config: DecoderConfig
    weights: Literal["bf16", "w4a16"] = "bf16"
    group: int = 128
    cache_bits: int = 16
    batch: int = 1
    prefill_chunk: int = 32_000

    def __post_init__(self):
        if self.weights not in ("bf16", "w4a16") or self.cache_bits not in (16, 8, 4):
            raise ValueError(
                f"Deployment: weights={self.weights!r}, cache_bits={self.cache_bits}; wanted 'bf16' or 'w4a16', and "
                "16, 8 or 4."
            )
        inputs = sorted({inputs for inputs, _ in _kernel_shapes(self.config)})
        if self.weights == "w4a16" and (self.group < 1 or any(size % self.group for size in inputs)):
            raise ValueError(
                f"Deployment: group={self.group} does not divide the input channels of every linear, {inputs}; take "
                "another."
            )
        if self.prefill_chunk < 0 or self.batch < 1:
            raise ValueError(
                f"Deployment: prefill_chunk={self.prefill_chunk}, batch={self.batch}; wanted 0 or more, and 1 or more."
            )

    @property
    def full_heads(self) -> int:
        """Key/value heads of all layers that keep everything."""
        config = self.config
        return sum(config.streaming.dense) if config.streaming else config.depth * config.kv_heads

    @property
    def streaming_heads(self) -> int:
        """Key/value heads of all layers that keep sink + recent tokens and the newest."""
        return self.config.depth * self.config.kv_heads - self.full_heads

    @property
    def window(self) -> int:
        """Tokens before it that a streaming head's token sees: sink + recent."""
        return self.config.streaming.sink + self.config.streaming.recent if self.config.streaming else 0


@functools.cache
def _parameters(config: DecoderConfig) -> int:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def _kernel_shapes(config: DecoderConfig) -> list[tuple[int, int]]:
    """[D, F] of the linears of one block."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = [(config.width, query), (config.width, key), (config.width, key), (query, config.width)]
    return [*attention, *[(config.width, config.hidden)] * 2, (config.hidden, config.width)]


def weight_bytes(deployment: Deployment) -> int:
    """Bytes of all weights.

    A packed linear [D, F] takes 64 F ceil(D / 128) + 4 F D / G: columns of 4-bit codes in tiles of 128, then scale and
    zero point. Embedding, head, norms and biases stay bfloat16.
    """
    rest = 2 * (_parameters(deployment.config) - _linear_weights(deployment.config))
    return rest + _block_bytes(deployment)


def _block_bytes(deployment: Deployment) -> int:
    """Of the linears of all blocks."""
    if deployment.weights == "bf16":
        return 2 * _linear_weights(deployment.config)
    packed = [
        64 * outputs * -(-inputs // 128) + 4 * outputs * inputs // deployment.group
        for inputs, outputs in _kernel_shapes(deployment.config)
    ]
    return deployment.config.depth * sum(packed)


def cache_bytes(deployment: Deployment, slots: int) -> int:
    """Bytes of keys and values of `slots` tokens: the sum over layers of

        2 B (n_full slots + n_streaming ceil8(sink + recent + 1)) (H bits / 8 + 4 where bits < 16)

    with n_full + n_streaming = K. A streaming head's buffer has its size from the start. What it sees of a prefill
    chunk beyond that is counted with the temporaries.
    """
    streaming = deployment.config.streaming
    tokens = deployment.full_heads * slots + deployment.streaming_heads * (streaming.slots if streaming else 0)
    bits = deployment.cache_bits
    return 2 * deployment.batch * tokens * (deployment.config.head_dim * bits // 8 + 4 * (bits < 16))


def temporary_bytes(deployment: Deployment, tokens: int, context: int) -> int:
    """Upper estimate of what a pass over the last `tokens` of `context` tokens holds beside weights and cache.

    With R = B tokens rows of 2-byte numbers it is the larger of attention, R (2 D + 3 N H + 4 K H): the residual, the
    normalised rows, queries before and after rotation, the result, keys and values twice; and of the MLP,
    R (2 D + 3 F): gate, up and their product. Then float32 logits of one token per sequence, 4 B V, and one layer's
    weights and cache, which a scan over layers copies out of their stacks.

    It takes kernels for granted that attend to the cache as it is stored and hold no logits of attention.
    """
    config = deployment.config
    rows = deployment.batch * tokens
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    widest = 2 * config.width + max(3 * query + 4 * key, 3 * config.hidden)
    copies = (_block_bytes(deployment) + cache_bytes(deployment, context)) // config.depth
    return 2 * rows * widest + 4 * deployment.batch * config.vocabulary + copies


def peak_bytes(deployment: Deployment, context: int) -> int:
    """Weights, the cache of `context` tokens, and the temporaries of its largest prefill chunk."""
    chunk = min(context, deployment.prefill_chunk or context)
    return weight_bytes(deployment) + cache_bytes(deployment, context) + temporary_bytes(deployment, chunk, context)


def _linear_weights(config: DecoderConfig) -> int:
    """Weights that each token is multiplied by, the head left out."""
    return config.depth * sum(inputs * outputs for inputs, outputs in _kernel_shapes(config))


def _attention_flops(deployment: Deployment, full_pairs: int, streaming_pairs: int) -> int:
    """4 H for each query head and each key it sees: the products with keys and with values."""
    config = deployment.config
    pairs = deployment.full_heads * full_pairs + deployment.streaming_heads * streaming_pairs
    return 4 * config.head_dim * (config.heads // config.kv_heads) * deployment.batch * pairs


def prefill_flops(deployment: Deployment, context: int) -> int:
    """Operations of reading `context` tokens of each sequence; matrix products only, a multiply-add being 2.

    Linears: 2 B T P with P weights in the blocks; the head, for the last token, 2 B D V. Attention: 4 H per query head
    and pair of query and visible key. A full head sees T (T + 1) / 2 pairs. A streaming head sees at most sink + recent
    keys before each token, and the token; with prefill "chunk" those it holds when a chunk begins, and the chunk up to
    the query, so the first chunk costs it as much as a full head.
    """
    config, held = deployment.config, deployment.window
    chunk = deployment.prefill_chunk or context
    if config.streaming and config.streaming.prefill == "token":
        chunk = 1
    starts = np.arange(0, context, chunk)
    sizes = np.minimum(chunk, context - starts)
    streaming = int(np.sum(np.minimum(starts, held) * sizes + sizes * (sizes + 1) // 2))
    linears = 2 * deployment.batch * (context * _linear_weights(config) + config.width * config.vocabulary)
    return linears + _attention_flops(deployment, context * (context + 1) // 2, streaming)


def decode_flops(deployment: Deployment, context: int) -> int:
    """Operations of the step whose token is the last of `context`, matrix products only.

    2 B (P + D V), and 4 H per query head and key: a full head sees all T, a streaming head sink + recent keys and the
    token's own.
    """
    config = deployment.config
    streaming = min(context, deployment.window + 1)
    linears = 2 * deployment.batch * (_linear_weights(config) + config.width * config.vocabulary)
    return linears + _attention_flops(deployment, context, streaming)


def decode_bytes(deployment: Deployment, context: int) -> int:
    """Bytes that a decode step reads: all weights once, but of an embedding that is not the head one row per sequence,
    and the whole cache.
    """
    config = deployment.config
    weights = weight_bytes(deployment)
    if not config.tied:
        weights -= 2 * config.width * (config.vocabulary - deployment.batch)
    return weights + cache_bytes(deployment, context)


def max_context(deployment: Deployment, capacity: int) -> int | None:
    """The most tokens per sequence whose `peak_bytes` are within `capacity` bytes, found by bisection.

    Returns:
      0 if not even one token fits; None if there is no limit, because all heads are streaming.
    """
    low, high = 0, 1
    while peak_bytes(deployment, high) <= capacity:
        low, high = high, 2 * high
        if high > 2**50:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak_bytes(deployment, middle) <= capacity else (low, middle)
    return low


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Predictions for one deployment on one chip. Times are lower bounds, at full bandwidth and bf16 peak."""

    name: str
    chip: str
    context: int
    full_heads: int
    streaming_heads: int
    weight_bytes: int
    cache_bytes: int
    prefill_temporary_bytes: int
    decode_temporary_bytes: int
    peak_bytes: int
    capacity_bytes: int
    prefill_flops: int
    prefill_seconds: float | None  # None for a chip without a known speed
    decode_flops: int
    decode_bytes: int
    decode_seconds: float | None
    max_context: int | None  # None: no limit
    fits: bool
    verdict: str


def memory_report(name: str, deployment: Deployment, context: int, chip: Chip) -> MemoryReport:
    """All of the above for one chip.

    Args:
      name: what the table calls it.
      deployment: what is served.
      context: tokens per sequence, prompt and answer together.
      chip: one of `lumen.plan.CHIPS`. Its capacity is what CUDA or libtpu reports; a process also holds 1 to 2 GiB of
        context and communication buffers, and JAX takes 0.75 of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says
        otherwise.
    """
    if context < 1:
        raise ValueError(f"memory: context={context}; wanted 1 token or more.")
    chunk = min(context, deployment.prefill_chunk or context)
    peak, capacity = peak_bytes(deployment, context), chip.memory_bytes
    verdict = f"{'fits' if peak <= capacity else 'does not fit'}: {peak / 1e9:.1f} of {capacity / 1e9:.1f} GB"
    step_flops, step_bytes = decode_flops(deployment, context), decode_bytes(deployment, context)
    reading_flops = prefill_flops(deployment, context)
    peak_flops, bandwidth = chip.peak_flops, chip.bandwidth
    return MemoryReport(
        name=name,
        chip=chip.name,
        context=context,
        full_heads=deployment.full_heads,
        streaming_heads=deployment.streaming_heads,
        weight_bytes=weight_bytes(deployment),
        cache_bytes=cache_bytes(deployment, context),
        prefill_temporary_bytes=temporary_bytes(deployment, chunk, context),
        decode_temporary_bytes=temporary_bytes(deployment, 1, context),
        peak_bytes=peak,
        capacity_bytes=capacity,
        prefill_flops=reading_flops,
        prefill_seconds=reading_flops / peak_flops if peak_flops else None,
        decode_flops=step_flops,
        decode_bytes=step_bytes,
        decode_seconds=max(step_bytes / bandwidth, step_flops / peak_flops) if bandwidth and peak_flops else None,
        max_context=max_context(deployment, capacity),
        fits=peak <= capacity,
        verdict=verdict,
    )


def memory_table(reports: Sequence[MemoryReport]) -> str:
    """Markdown: a column for each deployment, GB of 10^9 bytes."""

    def seconds(value, scale, unit):
        return "unknown" if value is None else f">= {value * scale:.1f} {unit}"

    rows: dict[str, Any] = {
        "full heads": lambda r: f"{r.full_heads} of {r.full_heads + r.streaming_heads}",
        "weights": lambda r: f"{r.weight_bytes / 1e9:.2f} GB",
        "keys and values": lambda r: f"{r.cache_bytes / 1e9:.2f} GB",
        "temporaries, prefill chunk": lambda r: f"{r.prefill_temporary_bytes / 1e9:.2f} GB",
        "temporaries, decode step": lambda r: f"{r.decode_temporary_bytes / 1e9:.2f} GB",
        "peak": lambda r: f"{r.peak_bytes / 1e9:.2f} GB",
        "verdict": lambda r: r.verdict,
        "longest context": lambda r: "no limit" if r.max_context is None else f"{r.max_context:,}",
        "prefill operations": lambda r: f"{r.prefill_flops:.3g}",
        "prefill time": lambda r: seconds(r.prefill_seconds, 1, "s"),
        "decode operations": lambda r: f"{r.decode_flops:.3g}",
        "decode bytes": lambda r: f"{r.decode_bytes / 1e9:.2f} GB",
        "decode time": lambda r: seconds(r.decode_seconds, 1e3, "ms"),
    }
    head = f"{reports[0].context:,} tokens, {reports[0].chip}"
    lines = [f"| {head} | " + " | ".join(r.name for r in reports) + " |", "|---" * (len(reports) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cell(r) for r in reports) + " |" for label, cell in rows.items()]
    return "\n".join(lines) + "\n"
