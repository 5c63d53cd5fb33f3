"""The attention every model calls."""

import jax


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
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
