"""The attention every model calls, and the few facts that say which keys a query sees.

    attend(q, k, v, mask=Mask())                                                   # causal
    attend(q, k, v, mask=Mask(segments=segments))                                  # packed samples
    attend(q, k, v, mask=Mask(kinds=(Full(), Streaming(64, 256)), heads=kinds))    # a kind for each head

A mask is a description: nothing of the size T x S is ever held for long inputs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from lumen.kv_cache import Part
from lumen.sharding import partition_spec
from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import (
    Extent,
    RangeMask,
    block_sparse_attention,
    count_logits,
    dense_mask,
    unsupported,
)
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import Implementation

# Up to so many logits a head XLA computes them all at once, which is faster than block by block.
DENSE_LOGITS = 2**18


@dataclasses.dataclass(frozen=True)
class Full:
    """A head that sees all keys: with a causal mask those up to its query."""

    def ranges(self, query, start, stop, end):
        """See `Mask.ranges`."""
        del query, end
        return start, stop, stop, stop


@dataclasses.dataclass(frozen=True)
class Streaming:
    """A head that sees the first tokens, attention sinks, and the latest ones: StreamingLLM's Λ.

    Query i sees key j if j <= i and (j < sink or j > i - recent). The papers and their code count differently:

        DuoAttention, exact training mask       Streaming(128, 256)
        DuoAttention, kernel of 128-blocks      Streaming(128, 256, block=128)
        DuoAttention, decoding                  Streaming(64, 256, includes_self=False)
        LServe, prefill and decoding            Streaming(128, 8192) and Streaming(128, 256)
        sliding window                          Streaming(0, window)

    Attributes:
      sink: tokens at the start of a sample, 0 or more.
      recent: latest tokens, 1 or more.
      includes_self: whether the query's own token is one of the `recent`; else it comes on top of them.
      block: both numbers are rounded up to whole blocks of so many tokens, the query's own block being the last one,
        so that between recent - block + 1 and recent tokens are seen.

    Source: StreamingLLM, arXiv:2309.17453; DuoAttention, arXiv:2410.10819, section 2.
    """

    sink: int
    recent: int
    includes_self: bool = True
    block: int = 1

    def __post_init__(self):
        if self.sink < 0 or self.recent < 1 or self.block < 1:
            raise ValueError(f"{self}: wanted sink >= 0, recent >= 1 and block >= 1.")

    def ranges(self, query, start, stop, end):
        """See `Mask.ranges`."""
        del end
        sink, recent = (-(-size // self.block) * self.block for size in (self.sink, self.recent))
        block_end = start + ((query - start) // self.block + 1) * self.block
        first = block_end - recent - (0 if self.includes_self else 1)
        sink = _clip(start + sink, start, stop)
        return start, sink, _clip(first, sink, stop), stop


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A head that sees its own group of `size` tokens up to its query: LongLoRA's shifted sparse attention, S².

    Query i sees key j if j <= i and (i + shift) // size == (j + shift) // size. With `leak`, as the paper's figure has
    it, the sample is a ring: its first `shift` tokens also see its last ones, which lie in their future.

    Source: LongLoRA, arXiv:2309.12307, section 3.2; llama_attn_replace.py has both ways.
    """

    size: int
    shift: int = 0
    leak: bool = False

    def __post_init__(self):
        if self.size < 1 or not 0 <= self.shift < self.size:
            raise ValueError(f"{self}: wanted size >= 1 and 0 <= shift < size.")

    def ranges(self, query, start, stop, end):
        """See `Mask.ranges`."""
        own = start + (query - start + self.shift) // self.size * self.size - self.shift
        own = _clip(own, start, stop)
        if not self.leak or not self.shift:
            return own, stop, stop, stop
        where = end.__array_namespace__().where
        tail = where((query - start < self.shift) & (stop > own), _clip(end - self.shift, stop, end), end)
        # A row that sees nothing, beyond the sample's length, stays empty.
        return own, stop, where(stop > own, tail, stop), where(stop > own, end, stop)


Kind = Full | Streaming | Grouped


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees.

    Attributes:
      kinds: what sorts of head there are.
      heads: [N] integers, the kind of each query head; None where there is one kind. A tuple or a NumPy array where it
        is known before tracing: XLA then does each kind's work only. (A mask that is an argument of jax.jit has traced
        heads: close over it instead.)
      causal: whether a query sees none of the keys after it.
      segments: [B, S] int32, the sample that each token belongs to; tokens see only their own. A sample is a run of
        equal numbers: a number that comes back later is another sample.
      lengths: [B] int32: keys from there on are padding: not seen, and as queries they see nothing.
      offset: the slot of the first query among the keys, an int or an int32 scalar.
    """

    kinds: tuple[Kind, ...] = (Full(),)
    heads: Any = None
    causal: bool = True
    segments: Any = None
    lengths: Any = None
    offset: Any = 0

    def __post_init__(self):
        if self.heads is None and len(self.kinds) != 1:
            raise ValueError(f"Mask: {len(self.kinds)} kinds and no heads; say which kind each query head is.")
        if not self.causal and any(not isinstance(kind, Full) for kind in self.kinds):
            raise ValueError(f"Mask: kinds {self.kinds} look back from their query; only Full can do without causal.")

    def ranges(self, queries: int, keys: int) -> RangeMask:
        """The mask of T queries over S keys as ranges, int32 arithmetic of size T.

        Each kind gives (r0, r1, r2, r3) for the slot `query` of a query whose sample has the slots [start, end), and
        which may see those in [start, stop).
        """
        query = self.offset + jnp.arange(queries, dtype=jnp.int32)[None]  # [B or 1, T]
        start, end = jnp.zeros_like(query), jnp.full_like(query, keys)
        if self.segments is not None:
            starts, ends = _runs(self.segments)
            start, end = (jnp.take_along_axis(a, jnp.broadcast_to(query, (len(a), queries)), 1) for a in (starts, ends))
        if self.lengths is not None:
            end = jnp.minimum(end, self.lengths[:, None])
        patterns = _patterns(self.kinds, self.causal, query, start, end)
        heads: Any = self.heads
        if heads is not None and not isinstance(heads, jax.Array):
            heads = jnp.stack(heads) if any(isinstance(head, jax.Array) for head in heads) else np.asarray(heads)
        extent = None
        if not isinstance(self.offset, Tracer):
            logits = _count_logits(self.kinds, self.causal, int(self.offset), queries, keys)
            extent = Extent(logits, self.segments is None and self.lengths is None)
        return RangeMask(patterns, heads, extent)


jax.tree_util.register_dataclass(
    Mask, data_fields=["heads", "segments", "lengths", "offset"], meta_fields=["kinds", "causal"]
)


def attend(
    q,
    k,
    v,
    *,
    mask: Mask | RangeMask | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    with_lse: bool = False,
    heads_first: bool = False,
    implementation: Implementation = "auto",
) -> Any:
    """Scaled dot-product attention, softmax(cap(scale q kᵀ)) v over the keys that the mask shows, in float32.

    Short inputs are computed at once. Long ones go block by block over the blocks that the mask keeps, by the kernel on
    a chip that has it, with memory linear in length and exact gradients. On a mesh (`jax.set_mesh`) each device attends
    for its own samples and heads.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H]; K divides N, query head n reads key head n // (N / K).
      mask: a description; or its ranges; or, for short inputs, booleans broadcastable to [B, N, T, S], True where a
        query may see a key, at least one in every row. None: everything is seen.
      scale: None for 1 / sqrt(H).
      soft_cap: c for logits c tanh(logits / c); None for none.
      with_lse: whether to return log-sum-exp too; not with a boolean mask.
      heads_first: k and v are [B, K, S, H], as caches have them; not with a boolean mask.
      implementation: as `block_sparse_attention` takes it.

    Returns:
      o [B, T, N, H] in q's dtype, zero for a query that sees nothing; with_lse: (o, lse [B, N, T] float32).
    """
    if isinstance(mask, jax.Array | np.ndarray):
        if with_lse or heads_first or soft_cap is not None:
            raise ValueError(
                "attend: a boolean mask came with with_lse, heads_first or soft_cap; describe the mask with a Mask."
            )
        if q.shape[1] == 1:
            return _attend_one(q, k, v, mask, scale)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")
    mask = Mask(causal=False) if mask is None else mask
    slots = k.shape[2 if heads_first else 1]
    if isinstance(mask, Mask):
        mask = mask.ranges(q.shape[1], slots)
    choice = dispatch.choose("attend", implementation, unsupported(q, k, v, soft_cap))
    if (choice == "xla" and q.shape[1] * slots <= DENSE_LOGITS) or q.shape[1] == 1:
        seen = dense_mask(mask, slots)
        if heads_first:
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if q.shape[1] == 1 and not with_lse and soft_cap is None:
            return _attend_one(q, k, v, seen, scale)
        o, lse = _attend_at_once(q, k, v, seen, scale, soft_cap)
    else:
        options = {"scale": scale, "soft_cap": soft_cap, "heads_first": heads_first, "implementation": choice}
        o, lse = _on_mesh(q, k, v, mask, options)
    return (o, lse) if with_lse else o


def attend_parts(q, parts: Sequence[Part], *, implementation: Implementation = "auto"):
    """Attention to what a cache gave back for new tokens: q [B, T, N, H] -> [B, T, N, H].

    Args:
      q: queries of the tokens that the cache was extended with.
      parts: of `extend`; their key heads, one part after the other, are the model's.
      implementation: as in `attend`.
    """
    group = q.shape[2] // sum(part.heads for part in parts)
    outs, first = [], 0
    for part in parts:
        queries = q[:, :, first : (first := first + group * part.heads)]
        if q.shape[1] == 1:
            outs.append(_attend_cache(queries[:, 0], part, implementation)[:, None])
        else:
            keys, values = part.dequantized(q.dtype)
            mask = RangeMask(part.ranges[None])
            outs.append(attend(queries, keys, values, mask=mask, heads_first=True, implementation=implementation))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)


def _attend_at_once(q, k, v, seen, scale, soft_cap):
    """(o, lse) with all logits in memory; `seen` [B or 1, N or 1, T, S]."""
    batch, queries, heads, width = q.shape
    keys = k.shape[2]
    q = q.reshape(batch, queries, keys, heads // keys, width)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    logits *= width**-0.5 if scale is None else scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    seen = _grouped(seen, keys)
    logits = jnp.where(seen, logits, -jnp.inf)
    some = seen.any(axis=-1, keepdims=True)
    # A row that sees nothing takes part with finite numbers, so that no gradient is NaN, and is then struck out.
    lse = jax.nn.logsumexp(jnp.where(some, logits, 0.0), axis=-1, keepdims=True)
    weights = jnp.where(some, jnp.exp(logits - lse), 0.0).astype(v.dtype)
    o = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(batch, queries, heads, width)
    lse = jnp.where(some, lse, -jnp.inf)[..., 0]
    return o, lse.reshape(batch, heads, queries)


def _attend_one(q, k, v, mask, scale):
    """One query a row: products of the keys as they lie in memory, twice as fast on a CPU."""
    batch, _, heads, width = q.shape
    keys = k.shape[2]
    q = q.reshape(batch, keys, -1, width)  # [B, K, N / K, H]
    logits = jnp.einsum("BSKH,BKGH->BKSG", k, q, preferred_element_type=jnp.float32).swapaxes(2, 3)
    logits *= width**-0.5 if scale is None else scale
    if mask is not None:
        logits = jnp.where(_grouped(mask, keys)[:, :, :, 0], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)  # [B, K, N / K, S]
    return jnp.einsum("BKGS,BSKH->BKGH", weights, v).reshape(batch, 1, heads, width)


def _on_mesh(q, k, v, mask: RangeMask, options):
    """`block_sparse_attention` of each device's own samples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return block_sparse_attention(q, k, v, mask, **options)
    axes = ("batch", "heads", None, None) if options["heads_first"] else ("batch", None, "heads", None)
    of_keys = partition_spec(k.shape, axes, mesh)
    samples, heads = of_keys[0], of_keys[axes.index("heads")]
    rows = PartitionSpec(samples, None, heads, None)
    of_mask = PartitionSpec(None, samples if mask.ranges.shape[1] > 1 else None, None, None)
    pattern, extent = mask.pattern, mask.extent

    def local(q, k, v, ranges, pattern=pattern):
        return block_sparse_attention(q, k, v, RangeMask(ranges, pattern, extent), **options)

    if pattern is None or (heads is None and not isinstance(pattern, Tracer)):
        operands, specs = (q, k, v, mask.ranges), (rows, of_keys, of_keys, of_mask)
    else:  # heads are split: each device takes its own part of the pattern
        if extent is not None and not isinstance(pattern, Tracer):  # the mean head, since devices run one program
            logits = sum(extent.logits[head] for head in np.asarray(pattern).tolist()) // len(pattern)
            extent = Extent((logits,) * len(extent.logits), extent.exact)
        operands = q, k, v, mask.ranges, jnp.asarray(pattern)
        specs = rows, of_keys, of_keys, of_mask, PartitionSpec(heads)
    out = rows, PartitionSpec(samples, heads, None)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*operands)


def _attend_cache(q, part: Part, implementation: Implementation):
    """`decode_attention` of q [B, N, H] to a part of a cache, on a mesh each device's own samples and heads."""

    def local(q, keys, values, ranges):
        return decode_attention(q, keys, values, ranges, implementation=implementation)[0]

    mesh = jax.sharding.get_abstract_mesh()
    operands = q, part.keys, part.values, part.ranges
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return local(*operands)
    samples, heads = partition_spec(part.keys.shape[:2], ("batch", "heads"), mesh)
    own = PartitionSpec(samples, heads)
    specs = own, own, own, PartitionSpec(samples if part.ranges.shape[0] > 1 else None)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)(*operands)


def _grouped(mask, keys: int):
    """A mask broadcastable to [B, N, T, S] as one broadcastable to [B, K, N / K, T, S]."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return mask.reshape(mask.shape[0], keys if mask.shape[1] > 1 else 1, -1, *mask.shape[2:])


def _patterns(kinds, causal: bool, query, start, end):
    """Ranges [P, B or 1, T, 4] of the queries in slots `query` of samples in [start, end), all of jax or of NumPy."""
    xp = end.__array_namespace__()
    stop = xp.minimum(query + 1, end) if causal else end
    stop = xp.where(query < end, stop, start)  # padding sees nothing
    stop, end = xp.maximum(stop, start), xp.maximum(end, start)
    every = [xp.broadcast_arrays(*kind.ranges(query, start, stop, end)) for kind in kinds]
    return xp.stack([xp.stack(ranges, axis=-1) for ranges in every])


@functools.lru_cache(maxsize=256)
def _count_logits(kinds, causal: bool, offset: int, queries: int, keys: int) -> tuple[int, ...]:
    """What a head of each kind sees of a sample that fills all slots: with segments or lengths it sees less."""
    query = offset + np.arange(queries, dtype=np.int32)[None]
    ranges = _patterns(kinds, causal, query, np.zeros_like(query), np.full_like(query, keys))
    return tuple(count_logits(ranges, keys)[:, 0].tolist())


def _clip(x, low, high):
    xp = x.__array_namespace__()
    return xp.minimum(xp.maximum(x, low), high)


def _runs(segments):
    """First slot of each token's run of equal numbers, and the slot after its last: int32 [B, S] each."""
    slots = segments.shape[1]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), segments.shape)
    new = jnp.diff(segments, axis=1) != 0
    starts = jax.lax.cummax(jnp.pad(jnp.where(new, slot[:, 1:], 0), ((0, 0), (1, 0))), axis=1)
    ends = jnp.pad(jnp.where(new, slot[:, 1:], slots), ((0, 0), (0, 1)), constant_values=slots)
    return starts, jax.lax.cummin(ends, axis=1, reverse=True)
