"""Caches of keys and values: plain pytrees that go into a model and come out of it.

    cache, parts = cache.extend(layer, keys, values)     # the new tokens, and all that they may look at
    cache = cache.advance(tokens)                        # once all layers have them

`DenseCache` holds every token, `StreamingCache` attention sinks and the latest tokens in constant memory, `MixedCache`
either of them for each head. What they hold is stored as it is or in 8 or 4 bits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels.decode_attention import QuantizedKV, dequantize_kv, quantize_kv


class Part(NamedTuple):
    """What the new tokens may look at, for some of the key heads.

    Attributes:
      keys, values: [B, K, S, H], or a `QuantizedKV` of that shape.
      ranges: [B or 1, T, 4] int32: token t sees slots [r0, r1) and [r2, r3).
    """

    keys: Any
    values: Any
    ranges: Any

    @property
    def heads(self) -> int:
        """K."""
        return _shape(self.keys)[1]

    def dequantized(self, dtype):
        """Keys and values [B, K, S, H] in a floating dtype."""
        return tuple(_read(store, dtype) for store in (self.keys, self.values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """All keys and values of the past; slot s of a row holds the token at position s.

    Prompts of several lengths are padded on the right: what a row wrote beyond its own length is seen by none of its
    queries and overwritten by what comes next.

    Attributes:
      keys, values: [L, B, K, S, H], keys after rotation; or `QuantizedKV`s of that shape, in which each token of each
        head is quantised by itself. Heads come first, so that no product has to turn them round.
      length: tokens held, int32: a scalar where all rows have the same, or [B].
    """

    keys: Any
    values: Any
    length: Any

    @classmethod
    def empty(cls, shape: Sequence[int], dtype, *, ragged: bool = False) -> "DenseCache":
        """A cache without tokens.

        Args:
          shape: (L, B, K, S, H).
          dtype: a floating dtype, or "int8" or "int4".
          ragged: whether rows will have several lengths.
        """
        length = jnp.zeros(shape[1] if ragged else (), jnp.int32)
        return cls(_empty(shape, dtype), _empty(shape, dtype), length)

    @property
    def slots(self) -> int:
        """S: how many tokens fit."""
        return _shape(self.keys)[3]

    def positions(self, tokens: int):
        """Positions that the next `tokens` tokens of each row will have: [T], or [B, T] for rows of several lengths."""
        return self.length[..., None] + jnp.arange(tokens, dtype=jnp.int32)

    def extend(self, layer, keys, values) -> tuple["DenseCache", list[Part]]:
        """Puts keys and values [B, T, K, H] of one layer behind what the rows hold.

        Returns:
          (the cache with them, not counted yet; one part: each token sees all before it and itself).
        """
        slots = self.positions(keys.shape[1])
        start = self.length if jnp.ndim(self.length) == 0 else slots
        cache = dataclasses.replace(
            self, keys=_write(self.keys, layer, start, keys), values=_write(self.values, layer, start, values)
        )
        stop = jnp.atleast_2d(slots) + 1
        ranges = jnp.stack([jnp.zeros_like(stop), stop, stop, stop], axis=-1)
        return cache, [Part(_layer(cache.keys, layer), _layer(cache.values, layer), ranges)]

    def advance(self, tokens) -> "DenseCache":
        """Counts tokens that every layer has written: an int, or [B]."""
        return self.with_length(self.length + tokens)

    def with_length(self, length) -> "DenseCache":
        """The same tokens, of which each row holds the first `length`."""
        return dataclasses.replace(self, length=length)

    def within(self, lengths) -> "DenseCache":
        """See `StreamingCache.within`; here padding does no harm."""
        del lengths
        return self


@dataclasses.dataclass(frozen=True)
class StreamingHeads:
    """Which heads of a model stream: DuoAttention's deployment.

    Attributes:
      dense: per layer, how many key heads see everything; they come first, the others stream.
      sink, recent, prefill: of `StreamingCache`.
    """

    dense: tuple[int, ...]
    sink: int = 64
    recent: int = 256
    prefill: Literal["token", "chunk"] = "token"

    def __post_init__(self):
        if self.sink < 0 or self.recent < 1 or self.prefill not in ("token", "chunk"):
            raise ValueError(f"{self}: wanted sink >= 0, recent >= 1 and prefill 'token' or 'chunk'.")

    @property
    def slots(self) -> int:
        """Of a streaming head: sink + recent + 1, the newest token's own, in whole rows of 8, as kernels read them."""
        return -(-(self.sink + self.recent + 1) // 8) * 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingCache:
    """The first `sink` tokens and the latest ones, in memory that does not grow.

    The latest tokens lie in a ring: the token at position p >= sink is in slot sink + (p - sink) mod ring. Keys keep
    the rotation of their own position.

    A single token sees sink + recent cached ones and itself. Of several tokens that come at once each sees, with
    prefill "token", what it would have seen had they come one by one, so chunks may be cut anywhere. With "chunk" it
    sees the cached tokens and all of its chunk before it, as DuoAttention's released code does: a first chunk is dense.

    Attributes:
      keys, values: [L, B, K, `StreamingHeads.slots`, H], or `QuantizedKV`s.
      length: tokens seen, int32: a scalar or [B].
      limit: [B] int32, see `within`; None for none.
      sink, recent: tokens kept beside the newest one.
      prefill: how tokens that come together see each other.

    Source: DuoAttention, arXiv:2410.10819, section 2.3; duo_attn/patch/tuple_kv_cache.py.
    """

    keys: Any
    values: Any
    length: Any
    limit: Any
    sink: int = dataclasses.field(metadata={"static": True})
    recent: int = dataclasses.field(metadata={"static": True})
    prefill: Literal["token", "chunk"] = dataclasses.field(default="token", metadata={"static": True})

    @classmethod
    def empty(cls, shape: Sequence[int], dtype, heads: StreamingHeads, *, ragged: bool = False) -> "StreamingCache":
        """A cache without tokens; shape is (L, B, K, H), dtype and ragged as in `DenseCache.empty`."""
        layers, batch, keys, width = shape
        slots = layers, batch, keys, heads.slots, width
        length = jnp.zeros(batch if ragged else (), jnp.int32)
        return cls(_empty(slots, dtype), _empty(slots, dtype), length, None, heads.sink, heads.recent, heads.prefill)

    positions = DenseCache.positions

    def extend(self, layer, keys, values) -> tuple["StreamingCache", list[Part]]:
        """As `DenseCache.extend`."""
        tokens, slots = keys.shape[1], self.sink + self.recent + 1
        position = jnp.atleast_2d(self.positions(tokens))  # [B or 1, T]
        cache = self._written(layer, keys, values, position)
        if tokens == 1:
            stop = jnp.minimum(position + 1, slots)
            ranges = jnp.stack([jnp.zeros_like(stop), stop, stop, stop], axis=-1)
            return cache, [Part(_layer(cache.keys, layer), _layer(cache.values, layer), ranges)]
        # The cached tokens in the order of their positions, the last one at the right end, then the new ones.
        held = jnp.atleast_1d(self.length)[:, None]  # [B or 1, 1]
        entry = jnp.arange(slots, dtype=jnp.int32)
        older = jnp.where((held >= slots) & (entry < self.sink), entry, held - slots + entry)
        order = jnp.where(older < self.sink, older, self.sink + (older - self.sink) % (self.recent + 1))
        order = jnp.broadcast_to(jnp.maximum(order, 0), (keys.shape[0], slots))

        def seen(store, new):
            cached = jnp.take_along_axis(_read(_layer(store, layer), new.dtype), order[:, None, :, None], axis=2)
            return jnp.concatenate([cached, new.swapaxes(1, 2)], axis=2)

        stop = slots + 1 + jnp.arange(tokens, dtype=jnp.int32)[None] + jnp.zeros_like(held)
        first = slots - jnp.minimum(held, slots)
        sink = jnp.minimum(first + self.sink, stop)
        latest = stop - self.recent - 1 if self.prefill == "token" else slots - self.recent
        latest = jnp.minimum(jnp.maximum(latest, sink), stop)
        ranges = jnp.stack(jnp.broadcast_arrays(first, sink, latest, stop), axis=-1)
        return cache, [Part(seen(self.keys, keys), seen(self.values, values), ranges)]

    def _written(self, layer, keys, values, position):
        tokens, ring = keys.shape[1], self.recent + 1
        end = position[:, -1:] + 1 if self.limit is None else jnp.minimum(position[:, -1:] + 1, self.limit[:, None])
        kept = (position < end) & ((position < self.sink) | (position >= end - ring))
        slot = jnp.where(position < self.sink, position, self.sink + (position - self.sink) % ring)
        start = jnp.where(kept, slot, _shape(self.keys)[3])  # a slot that is not there: dropped
        if tokens == 1 and jnp.ndim(self.length) == 0 and self.limit is None:
            start = slot[0, 0]
        else:
            start = jnp.broadcast_to(start, (keys.shape[0], tokens))
        return dataclasses.replace(
            self, keys=_write(self.keys, layer, start, keys), values=_write(self.values, layer, start, values)
        )

    def advance(self, tokens):
        """Counts tokens that every layer has written: an int, or [B]."""
        return dataclasses.replace(self, length=self.length + tokens)

    def with_length(self, length):
        """For the end of a padded prompt: what `within` announced. Tokens that were pushed out do not come back."""
        return dataclasses.replace(self, length=length, limit=None)

    def within(self, lengths):
        """Announces that positions from `lengths` [B] on are padding, which must not push tokens out."""
        return dataclasses.replace(self, limit=jnp.asarray(lengths, jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedCache:
    """For each layer the first heads dense, the others streaming; layers may differ, and none is padded.

    Layers are taken one by one: the model's blocks must be a list (`lumen.layers.unstack`).

    Attributes:
      dense: per layer the (keys, values) of a `DenseCache` of one layer, None where no head is dense.
      streaming: likewise of a `StreamingCache`.
      length, limit: of both, shared.
      heads: which they are.
    """

    dense: list[tuple[Any, Any] | None]
    streaming: list[tuple[Any, Any] | None]
    length: Any
    limit: Any
    heads: StreamingHeads = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, heads: StreamingHeads, shape: Sequence[int], dtype, *, ragged: bool = False) -> "MixedCache":
        """A cache without tokens; shape is (B, K, S, H), dtype and ragged as in `DenseCache.empty`."""
        batch, keys, slots, width = shape
        if any(not 0 <= count <= keys for count in heads.dense):
            raise ValueError(f"MixedCache: {list(heads.dense)} dense heads per layer; wanted 0 to {keys} each.")

        def stores(count, slots):
            shape = (1, batch, count, slots, width)
            return (_empty(shape, dtype), _empty(shape, dtype)) if count else None

        return cls(
            [stores(count, slots) for count in heads.dense],
            [stores(keys - count, heads.slots) for count in heads.dense],
            jnp.zeros(batch if ragged else (), jnp.int32),
            None,
            heads,
        )

    positions = DenseCache.positions

    def extend(self, layer: int, keys, values) -> tuple["MixedCache", list[Part]]:
        """As `DenseCache.extend`, for a layer known while tracing: a part of dense and one of streaming heads."""
        if isinstance(layer, Tracer):
            raise TypeError("MixedCache: the layers came as a scan; pass the model through lumen.layers.unstack first.")
        count, parts = self.heads.dense[layer], []
        held = {"dense": list(self.dense), "streaming": list(self.streaming)}
        cuts = slice(count), slice(count, None)
        for stores, cut, cache in zip(held.values(), cuts, self.layers[layer], strict=True):
            if cache is not None:
                cache, seen = cache.extend(0, keys[:, :, cut], values[:, :, cut])
                stores[layer] = (cache.keys, cache.values)
                parts += seen
        return dataclasses.replace(self, **held), parts

    @property
    def layers(self) -> list[tuple[DenseCache | None, StreamingCache | None]]:
        """Per layer the cache of its dense heads and that of its streaming heads, each of one layer."""
        sink, recent, prefill = self.heads.sink, self.heads.recent, self.heads.prefill

        def one(dense, streaming):
            return (
                dense and DenseCache(dense[0], dense[1], self.length),
                streaming
                and StreamingCache(streaming[0], streaming[1], self.length, self.limit, sink, recent, prefill),
            )

        return [one(*stores) for stores in zip(self.dense, self.streaming, strict=True)]

    advance = StreamingCache.advance
    with_length = StreamingCache.with_length
    within = StreamingCache.within


Cache = DenseCache | StreamingCache | MixedCache


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds room for; works on abstract caches."""
    arrays = [leaf for leaf in jax.tree.leaves(cache) if jnp.ndim(leaf) > 1]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


def _empty(shape, dtype):
    if dtype not in ("int8", "int4"):
        return jnp.zeros(shape, dtype)
    return quantize_kv(jnp.zeros(shape, jnp.bfloat16), int(dtype[3:]))


def _shape(store):
    """[..., K, S] of a store."""
    return store.shape[:-1]


def _layer(store, layer):
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), store)


def _read(store, dtype):
    return dequantize_kv(store, dtype) if isinstance(store, QuantizedKV) else store.astype(dtype)


def _write(store, layer, start, new):
    """Puts new [B, T, K, H] into slots from `start` on, or into the slots `start` [B, T], where they exist."""
    new = new.swapaxes(1, 2)
    new = quantize_kv(new, store.bits) if isinstance(store, QuantizedKV) else new.astype(store.dtype)

    def put(old, new):  # [L, B, K, S, ...], [B, K, T, ...]
        if jnp.ndim(start) == 0:
            return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, start, *[0] * (old.ndim - 4)))
        rows = jnp.arange(old.shape[1])[:, None]
        return old.at[layer, rows, :, start].set(new.swapaxes(1, 2), mode="drop")

    return jax.tree.map(put, store, new)
