"""One decoder for Llama 1 to 3.x and Qwen2 / Qwen2.5: pre-norm blocks of grouped-query attention and a gated MLP.

Source: LLaMA (arXiv:2302.13971), Llama 3 (arXiv:2407.21783), Qwen2 (arXiv:2407.10671); huggingface/transformers
models/llama/modeling_llama.py and models/qwen2/modeling_qwen2.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lumen.attention import Full, Mask, Streaming, attend, attend_parts
from lumen.kv_cache import Cache, DenseCache, MixedCache, StreamingHeads
from lumen.layers import run_layers
from lumen.rope import RopeConfig, rotary_tables, rotate
from lumen.sharding import constrain

Record = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Attributes:
      width, depth, heads, kv_heads, head_dim, hidden, vocabulary: D, L, N, K, H, F, V.
      norm_epsilon: of the RMS norms.
      rope: rotary frequencies.
      qkv_bias: whether query, key and value have biases (Qwen2).
      tied: whether the head is the embedding, transposed.
      max_positions: context length of the published model; nothing here depends on it.
      streaming: which heads see attention sinks and recent tokens only; None: none. Its layers are a list.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    norm_epsilon: float = 1e-5
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    qkv_bias: bool = False
    tied: bool = False
    max_positions: int = 4096
    streaming: StreamingHeads | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"DecoderConfig: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}.")
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig: head_dim={self.head_dim} is odd; rotation works on pairs.")
        if self.streaming and len(self.streaming.dense) != self.depth:
            raise ValueError(
                f"DecoderConfig: {self.streaming} is for {len(self.streaming.dense)} of {self.depth} layers."
            )

    @classmethod
    def llama2_7b(cls, **changes):
        """Llama 2 7B, 6.74B parameters (meta-llama/Llama-2-7b-hf config.json)."""
        sizes = {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "head_dim": 128, "hidden": 11008}
        more: dict[str, Any] = {"vocabulary": 32_000, "max_positions": 4096}
        return cls(**{**sizes, **more} | changes)

    @classmethod
    def llama3_8b(cls, **changes):
        """Llama 3 8B, 8.03B parameters (meta-llama/Meta-Llama-3-8B config.json)."""
        sizes = {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 14336}
        rope = RopeConfig(theta=500_000.0)
        return cls(**{**sizes, "vocabulary": 128_256, "rope": rope, "max_positions": 8192} | changes)

    @classmethod
    def qwen25_7b(cls, **changes):
        """Qwen2.5 7B, 7.62B parameters (Qwen/Qwen2.5-7B config.json)."""
        sizes = {"width": 3584, "depth": 28, "heads": 28, "kv_heads": 4, "head_dim": 128, "hidden": 18944}
        rope = RopeConfig(theta=1_000_000.0)
        more = {"vocabulary": 152_064, "norm_epsilon": 1e-6, "rope": rope, "qkv_bias": True, "max_positions": 131_072}
        return cls(**{**sizes, **more} | changes)

    @classmethod
    def debug(cls, **changes):
        """For tests: two layers of width 64."""
        sizes: dict[str, Any] = {
            "width": 64,
            "depth": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "hidden": 112,
            "vocabulary": 128,
        }
        return cls(**sizes | changes)


class Block(nnx.Module):
    """h += output(Attention(RMSNorm(h))); h += down(silu(gate(RMSNorm(h))) * up(RMSNorm(h)))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)

        def linear(inputs, outputs, axes, bias=False):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                kernel_init=init,
                kernel_metadata={"axes": axes},
                bias_metadata={"axes": axes[1:]},
                rngs=rngs,
            )

        def norm():
            return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)

        width, query, key = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.input_norm = norm()
        self.query = linear(width, query, ("embed", "heads"), config.qkv_bias)
        self.key = linear(width, key, ("embed", "heads"), config.qkv_bias)
        self.value = linear(width, key, ("embed", "heads"), config.qkv_bias)
        self.output = linear(query, width, ("heads", "embed"))
        self.mlp_norm = norm()
        self.gate = linear(width, config.hidden, ("embed", "mlp"))
        self.up = linear(width, config.hidden, ("embed", "mlp"))
        self.down = linear(config.hidden, width, ("mlp", "embed"))

    def heads(self, h, tables):
        """Rotated queries and keys, and values, of normalised rows h [B, T, D]: [B, T, N, H], [B, T, K, H] twice."""
        shape = (*h.shape[:2], -1, self.config.head_dim)
        query, key, value = (linear(h).reshape(shape) for linear in (self.query, self.key, self.value))
        return rotate(query, tables), rotate(key, tables), value

    def attention(self, h, tables, mask, *, record: Record = lambda name, x: None):
        """Self-attention of normalised rows h [B, T, D] without a cache: [B, T, D]."""
        attended = attend(*self.heads(h, tables), mask=mask)
        attended = attended.reshape(*h.shape[:2], -1)  # [B, T, N H]
        record("output", attended)
        return self.output(attended)

    def mlp(self, h, *, record: Record = lambda name, x: None):
        """The gated MLP of normalised rows h [B, T, D]: [B, T, D]."""
        hidden = nnx.silu(self.gate(h)) * self.up(h)  # [B, T, F]
        record("down", hidden)
        return self.down(hidden)

    def __call__(self, x, tables, mask, *, record: Record = lambda name, x: None):
        """One layer without a cache.

        Args:
          x: [B, T, D].
          tables: of `rotary_tables` at the rows' positions.
          mask: as `attend` takes it.
          record: called with what enters the weights: "attention" (query, key and value), "output", "mlp" (gate and
            up) and "down", each [B, T, ...]. For calibration.

        Returns:
          [B, T, D].
        """
        h = self.input_norm(x)
        record("attention", h)
        x = x + self.attention(h, tables, mask, record=record)
        h = self.mlp_norm(x)
        record("mlp", h)
        return x + self.mlp(h, record=record)


class Decoder(nnx.Module):
    """A causal language model."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        table = init(rngs.params(), (config.vocabulary, config.width), jnp.float32)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)
        if not config.tied:
            self.head = nnx.Linear(
                config.width,
                config.vocabulary,
                use_bias=False,
                kernel_init=init,
                kernel_metadata={"axes": ("embed", "vocab")},
                rngs=rngs,
            )

    def tables(self, positions):
        """Rotary tables of positions [T] or [B, T]."""
        return rotary_tables(self.config.rope, self.config.head_dim, positions)

    def logits(self, hidden):
        """Next-token logits [..., V], float32, of final hidden rows [..., D]."""
        hidden = constrain(hidden, "batch", *[None] * (hidden.ndim - 1))
        if self.config.tied:
            # [V, D] times columns: a CPU is six times slower at one row times the transposed [D, V].
            rows = hidden.reshape(-1, hidden.shape[-1])
            logits = (self.embedding[...] @ rows.T).T.reshape(*hidden.shape[:-1], -1)
        else:
            logits = self.head(hidden)
        return constrain(logits, "batch", *[None] * (hidden.ndim - 2), "vocab").astype(jnp.float32)

    def __call__(
        self,
        tokens,
        *,
        positions=None,
        segments=None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        remat: bool = False,
    ):
        """Final hidden rows, after the last norm.

        Args:
          tokens: [B, T] int32.
          positions: [T] or [B, T] int32; by default they count from 0, or from where the cache ends.
          segments: [B, T] int32, the sample each token belongs to; tokens see only their own sample. For samples packed
            into one row one after the other, and for padding (a segment of its own). Without a cache only.
          mask: what the heads of every layer see; None for causal attention, in which streaming heads see what they
            will see one token at a time. Without a cache only, which knows itself.
          cache: what came before; the new tokens are written into it and see it.
          remat: recompute each block's activations in the backward pass.

        Returns:
          (hidden [B, T, D], the cache that also holds these tokens, or None). `logits` turns rows into logits.
        """
        batch, count = tokens.shape
        x = self.embedding[...][tokens]
        if cache is None:
            if positions is None:
                positions = jnp.arange(count, dtype=jnp.int32)
            mask = mask or Mask()
            if segments is not None:
                mask = dataclasses.replace(mask, segments=segments)
            tables = self.tables(positions)
            seen = None if self.config.streaming else mask.ranges(count, count)

            def layer(x, block, index):
                ranges = seen or self._streaming_mask(mask, index).ranges(count, count)
                return block(constrain(x, "batch", None, None), tables, ranges)

            x = run_layers(jax.checkpoint(layer) if remat else layer, x, self.blocks)
            return self.norm(x), None
        if segments is not None or mask is not None:
            raise ValueError("Decoder: segments or a mask came with a cache; a cache holds one sample per row.")
        tables = self.tables(cache.positions(count) if positions is None else positions)

        def cached_layer(carry, block: Block, index):
            x, cache = carry
            x = constrain(x, "batch", None, None)
            query, key, value = block.heads(block.input_norm(x), tables)
            cache, parts = cache.extend(index, key, value)
            x = x + block.output(attend_parts(query, parts).reshape(batch, count, -1))
            return x + block.mlp(block.mlp_norm(x)), cache

        x, cache = run_layers(cached_layer, (x, cache), self.blocks)
        return self.norm(x), cache.advance(count)

    def empty_cache(self, batch: int, slots: int, dtype=None, *, ragged: bool = False) -> DenseCache | MixedCache:
        """A cache for `slots` tokens per row, of a dtype or "int8" or "int4"; `ragged` where rows differ in length."""
        config, dtype = self.config, dtype or self.embedding[...].dtype
        shape = (batch, config.kv_heads, slots, config.head_dim)
        if config.streaming:
            return MixedCache.empty(config.streaming, shape, dtype, ragged=ragged)
        return DenseCache.empty((config.depth, *shape), dtype, ragged=ragged)

    def _streaming_mask(self, mask: Mask, layer: int) -> Mask:
        config, heads = self.config, self.config.streaming
        assert heads is not None
        dense = heads.dense[layer] * config.heads // config.kv_heads
        kinds = Full(), Streaming(heads.sink, heads.recent, includes_self=False)
        return dataclasses.replace(mask, kinds=kinds, heads=(0,) * dense + (1,) * (config.heads - dense))


def next_token_loss(
    model: Decoder,
    tokens,
    *,
    weights=None,
    segments=None,
    mask: Mask | None = None,
    remat: bool = False,
    chunk: int = 0,
):
    """Mean cross-entropy of each token given those before it, in nats.

    Args:
      model: the decoder.
      tokens: [B, T + 1] int32; token t + 1 is the target of position t.
      weights: [B, T] of the targets, zero where there is none; None weighs all alike.
      segments: [B, T], see `Decoder`; weigh the last token of a sample with zero.
      mask, remat: see `Decoder`.
      chunk: > 0 computes the logits of so many positions of each row at a time, forward and backward, so that a
        vocabulary of 152,000 never meets a whole row. 0: all at once.

    Returns:
      A float32 scalar: sum of weight x loss / sum of weights.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden, _ = model(inputs, segments=segments, mask=mask, remat=remat)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    count = targets.shape[1]
    chunk = chunk or count
    if count % chunk:
        raise ValueError(f"next_token_loss: chunk={chunk} does not divide the {count} positions of a row.")

    @jax.checkpoint
    def part(total, rows):
        hidden, targets, weights = rows
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)), None

    def cut(array):
        return array.reshape(array.shape[0], -1, chunk, *array.shape[2:]).swapaxes(0, 1)  # [T / chunk, B, chunk, ...]

    total, _ = jax.lax.scan(part, jnp.zeros((), jnp.float32), (cut(hidden), cut(targets), cut(weights)))
    return total / jnp.sum(weights)
