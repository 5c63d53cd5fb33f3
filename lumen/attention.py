"""The attention every model calls."""

import jax
import jax.numpy as jnp


def attend(q, k, v, *, mask=None):
    """Scaled dot-product attention, softmax(q kᵀ / sqrt(H) + mask) v, with a float32 softmax.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; K divides N, query head n reads key head n // (N / K).
      v: [B, S, K, H].
      mask: boolean, True where a query may see a key; broadcastable to [B, N, T, S]. None: everything is seen.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    if q.shape[1] == 1:
        return _attend_one(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def attend_in_blocks(q, k, v, *, mask, block: tuple[int, int] = (128, 512)):
    """`attend` without ever holding all logits: a block of queries meets one block of keys after the other.

    Blocks that the mask hides whole are passed over, so causal attention costs half. For long inputs where nothing is
    differentiated: a backward pass would keep every block. A query that sees no key gets zeros.

    Args:
      q, k, v, mask: as in `attend`.
      block: queries and keys per block; fewer queries than that are left to `attend`.

    Returns:
      [B, T, N, H] in q's dtype.

    Source: FlashAttention, arXiv:2205.14135, algorithm 1, with the loop over queries outside.
    """
    batch, queries, heads, width = q.shape
    slots, keys = k.shape[1:3]
    rows, columns = block
    if queries <= rows:
        return attend(q, k, v, mask=mask)

    def pad(array, axis, size):
        return jnp.pad(array, [(0, -array.shape[i] % size if i == axis else 0) for i in range(array.ndim)])

    q = pad(q, 1, rows).reshape(batch, -1, rows, keys, heads // keys, width).transpose(1, 0, 3, 4, 2, 5)
    k = pad(k, 1, columns).reshape(batch, -1, columns, keys, width).transpose(1, 0, 3, 4, 2)  # [J, B, K, H, c]
    v = pad(v, 1, columns).reshape(batch, -1, columns, keys, width).transpose(1, 0, 3, 2, 4)  # [J, B, K, c, H]
    mask = _grouped(mask, keys)
    mask = jnp.broadcast_to(mask, (*mask.shape[:3], queries, slots))
    mask = pad(pad(mask, 3, rows), 4, columns)
    mask = mask.reshape(*mask.shape[:3], q.shape[0], rows, k.shape[0], columns).transpose(3, 5, 0, 1, 2, 4, 6)

    def rows_of(given):
        q, masks = given  # [B, K, N / K, r, H], [J, ..., r, c]

        def meet(carry, given):
            k, v, mask = given

            def update(carry):
                largest, total, weighted = carry
                logits = jnp.einsum("BKGRH,BKHC->BKGRC", q, k, preferred_element_type=jnp.float32) * width**-0.5
                logits = jnp.where(mask, logits, -jnp.inf)
                larger = jnp.maximum(largest, logits.max(axis=-1, keepdims=True))
                weights, kept = jnp.exp(logits - larger), jnp.exp(largest - larger)
                values = jnp.einsum("BKGRC,BKCH->BKGRH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
                return larger, total * kept + weights.sum(axis=-1, keepdims=True), weighted * kept + values

            return jax.lax.cond(mask.any(), update, lambda carry: carry, carry), None

        # The lowest number instead of -inf: a row that has seen nothing must not subtract one infinity from another.
        largest = jnp.full((*q.shape[:-1], 1), jnp.finfo(jnp.float32).min)
        start = largest, jnp.zeros_like(largest), jnp.zeros(q.shape, jnp.float32)
        (_, total, weighted), _ = jax.lax.scan(meet, start, (k, v, masks))
        return (weighted / jnp.where(total == 0, 1, total)).astype(q.dtype)

    out = jax.lax.map(rows_of, (q, mask))  # [I, B, K, N / K, r, H]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :queries]


def _attend_one(q, k, v, mask):
    """`attend` for one query a row: products of the keys as they lie in memory, twice as fast on a CPU."""
    batch, _, heads, width = q.shape
    keys = k.shape[2]
    q = q.reshape(batch, keys, -1, width)  # [B, K, N / K, H]
    logits = jnp.einsum("BSKH,BKGH->BKSG", k, q, preferred_element_type=jnp.float32).swapaxes(2, 3) * width**-0.5
    if mask is not None:
        logits = jnp.where(_grouped(mask, keys)[:, :, :, 0], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)  # [B, K, N / K, S]
    return jnp.einsum("BKGS,BSKH->BKGH", weights, v).reshape(batch, 1, heads, width)


def _grouped(mask, keys: int):
    """A mask broadcastable to [B, N, T, S] as one broadcastable to [B, K, N / K, T, S]."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return mask.reshape(mask.shape[0], keys if mask.shape[1] > 1 else 1, -1, *mask.shape[2:])
