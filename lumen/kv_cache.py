"""Caches of keys and values: plain pytrees that go into a model and come out of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """All keys and values of the past; slot s of a row holds the token at position s.

    Prompts of several lengths are padded on the right: what a row wrote beyond its own length is seen by none of its
    queries and overwritten by what comes next.

    Attributes:
      keys, values: [L, B, K, S, H], keys after rotation. Heads come first, so that no product has to turn them round.
      length: tokens held, int32: a scalar where all rows have the same, or [B].
    """

    keys: Any
    values: Any
    length: Any

    @property
    def slots(self) -> int:
        """S: how many tokens fit."""
        return self.keys.shape[3]

    def positions(self, tokens: int):
        """Positions that the next `tokens` tokens of each row will have: [T], or [B, T] for rows of several lengths."""
        return self.length[..., None] + jnp.arange(tokens, dtype=jnp.int32)

    def write(self, layer, keys, values) -> "DenseCache":
        """Puts keys and values [B, T, K, H] of one layer behind what the rows hold; `advance` then counts them."""
        batch, tokens = keys.shape[:2]

        def put(old, new):
            new = new.astype(old.dtype)
            if jnp.ndim(self.length) == 0:
                return jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2)[None], (layer, 0, 0, self.length, 0))
            return old.at[layer, jnp.arange(batch)[:, None], :, self.positions(tokens)].set(new, mode="drop")

        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def read(self, layer):
        """Keys and values [B, S, K, H] of one layer."""
        return tuple(
            jax.lax.dynamic_index_in_dim(array, layer, keepdims=False).swapaxes(1, 2)
            for array in (self.keys, self.values)
        )

    def advance(self, tokens) -> "DenseCache":
        """Counts tokens that every layer has written: an int, or [B]."""
        return dataclasses.replace(self, length=self.length + tokens)
