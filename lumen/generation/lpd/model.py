"""The LPD transformer: learned position queries, and a mask that lets any order and any grouping be trained.

Source: Locality-aware Parallel Decoding, arXiv:2507.01957; mit-han-lab/lpd models/lpd.py.

A sequence has two kinds of rows. *Context* rows carry what is known: the class (slot 0) and the tokens in generation
order. *Query* rows ask for a token at a position: one shared mask vector plus the position's embedding. Only query
rows reach the head. `rank` is a token's 0-based place in the generation order; block 0 is the class and block i >= 1
the i-th group of tokens decoded together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lumen.attention import attend
from lumen.layers import dropout, run_layers
from lumen.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LPDConfig:
    """Sizes of an LPD transformer. Published ones from mit-han-lab/lpd models/lpd.py."""

    width: int  # D
    depth: int  # L
    heads: int  # N
    grid: int  # tokens per image side; grid**2 tokens in all
    vocabulary: int = 16384  # V
    classes: int = 1000
    mlp_ratio: int = 4  # F = mlp_ratio * D
    dropout: float = 0.1  # after the attention projection and at both points of the MLP

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"LPDConfig: width={self.width} is not a multiple of heads={self.heads}.")

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.grid**2

    @classmethod
    def l(cls, image_size: int = 256, **changes):  # noqa: E743 - the published name
        """LPD-L: 337M parameters at 256 pixels."""
        return cls(**{"width": 1024, "depth": 24, "heads": 16, "grid": image_size // 16} | changes)

    @classmethod
    def xl(cls, image_size: int = 256, **changes):
        """LPD-XL: 752M parameters at 256 pixels."""
        return cls(**{"width": 1280, "depth": 36, "heads": 20, "grid": image_size // 16} | changes)

    @classmethod
    def xxl(cls, image_size: int = 256, **changes):
        """LPD-XXL: 1.4B parameters at 256 pixels."""
        return cls(**{"width": 1536, "depth": 48, "heads": 24, "grid": image_size // 16} | changes)

    @classmethod
    def debug(cls, **changes):
        """For tests: 16 tokens, two layers."""
        sizes = {"width": 64, "depth": 2, "heads": 2, "grid": 4, "vocabulary": 32, "classes": 8, "dropout": 0.0}
        return cls(**sizes | changes)


class Block(nnx.Module):
    """Pre-norm transformer block: h += Attention(LN(h)); h += MLP(LN(h)), with biases and exact GELU."""

    def __init__(self, config: LPDConfig, *, rngs: nnx.Rngs):
        width, hidden = config.width, config.width * config.mlp_ratio
        heads, head_dim = config.heads, config.width // config.heads
        self.dropout = config.dropout
        init = nnx.initializers.xavier_uniform()

        def linear(inputs, outputs, axes):
            return nnx.Linear(inputs, outputs, kernel_init=init, kernel_metadata={"axes": axes}, rngs=rngs)

        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        # Xavier over the fused [D, 3D] matrix, as the original initialises it.
        qkv = init(rngs.params(), (width, 3 * width), jnp.float32).reshape(width, 3, heads, head_dim)
        self.qkv = nnx.Param(qkv, axes=("embed", None, "heads", None))
        self.qkv_bias = nnx.Param(jnp.zeros((3, heads, head_dim)), axes=(None, "heads", None))
        projection = init(rngs.params(), (width, width), jnp.float32).reshape(heads, head_dim, width)
        self.projection = nnx.Param(projection, axes=("heads", None, "embed"))
        self.projection_bias = nnx.Param(jnp.zeros(width))
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.up = linear(width, hidden, ("embed", "mlp"))
        self.down = linear(hidden, width, ("mlp", "embed"))

    def heads(self, x):
        """Queries, keys and values of rows x [B, T, D]: three of [B, T, N, H]."""
        qkv = jnp.einsum("BTD,DCNH->BTCNH", self.norm1(x), self.qkv[...]) + self.qkv_bias[...]
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def finish(self, x, attended, *, key=None):
        """The rest of the block after attention: x [B, T, D], attended [B, T, N, H] -> [B, T, D]."""
        drop = [None] * 3 if key is None else jax.random.split(key, 3)
        attended = jnp.einsum("BTNH,NHD->BTD", attended, self.projection[...]) + self.projection_bias[...]
        x = x + dropout(attended, self.dropout, drop[0])
        hidden = dropout(nnx.gelu(self.up(self.norm2(x)), approximate=False), self.dropout, drop[1])  # [B, T, F]
        return x + dropout(self.down(hidden), self.dropout, drop[2])


class LPD(nnx.Module):
    """The class-conditional LPD transformer over a square grid of VQ codes."""

    def __init__(self, config: LPDConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width

        def table(*shape, axes):
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape), axes=axes)

        self.class_embedding = table(config.classes, width, axes=(None, "embed"))
        self.null_class = table(width, axes=("embed",))
        self.token_embedding = table(config.vocabulary, width, axes=("vocab", "embed"))
        self.position_embedding = table(config.tokens + 1, width, axes=(None, "embed"))  # row 0: the class
        self.mask_token = table(width, axes=("embed",))
        self.input_norm = nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(
            width,
            config.vocabulary,
            use_bias=False,
            kernel_init=nnx.initializers.xavier_uniform(),
            kernel_metadata={"axes": ("embed", "vocab")},
            rngs=rngs,
        )

    def embed_class(self, labels, dropped=None):
        """Class vectors [B, D] of labels [B]; the learned null class where `dropped` [B] is True."""
        if dropped is None:
            return self.class_embedding[...][labels]
        return jnp.where(dropped[:, None], self.null_class[...], self.class_embedding[...][labels])

    def run_blocks(self, x, mask, *, key=None, remat: bool = False):
        """All blocks over rows that see each other as `mask` says; x [B, T, D] -> [B, T, D]."""

        def layer(x, block, index):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x = constrain(x, "batch", None, None)
            return block.finish(x, attend(*block.heads(x), mask=mask), key=layer_key)

        return run_layers(jax.checkpoint(layer) if remat else layer, x, self.blocks)

    def logits(self, rows):
        """Next-code logits [..., V], float32, of query rows [..., D]."""
        logits = self.head(self.norm(constrain(rows, "batch", None, None)))
        return constrain(logits, "batch", None, "vocab").astype(jnp.float32)

    def embed(self, tokens, orders, class_vectors):
        """The normalised input rows [B, 2N, D]: class and the first N - 1 tokens as context, then N queries.

        Both parts are in generation order. The last token's context row is never seen by anything, so it is left out.
        """
        positions = self.position_embedding[...]
        context = self.token_embedding[...][jnp.take_along_axis(tokens, orders, axis=1)[:, :-1]]
        context = jnp.concatenate([class_vectors[:, None], context], axis=1)  # [B, N, D]
        slots = jnp.concatenate([jnp.zeros_like(orders[:, :1]), orders + 1], axis=1)  # [B, N + 1]
        positions = positions[slots]  # [B, N + 1, D]
        rows = jnp.concatenate([context + positions[:, :-1], self.mask_token[...] + positions[:, 1:]], axis=1)
        return self.input_norm(rows)

    def __call__(self, tokens, labels, orders, groups, *, dropped=None, key=None, remat: bool = False):
        """Teacher-forced logits of every token given the groups before its own.

        Args:
          tokens: [B, N] int32 codes in raster order.
          labels: [B] int32 classes.
          orders: [B, N] int32, the raster index of the token of rank j, a permutation per sample.
          groups: [N] int32, the 1-based group of rank j, non-decreasing (traced: one program serves every schedule).
          dropped: [B] bool, samples trained on the null class, for classifier-free guidance.
          key: dropout key, None when not training.
          remat: recompute each block's activations in the backward pass.

        Returns:
          [B, N, V] float32 logits in rank order.

        Source: LPD section 3.2. The original cuts the last group's context rows; here only the last token's is cut
        and the mask hides the rest, so that the shape does not depend on the grouping.
        """
        rows = self.embed(tokens, orders, self.embed_class(labels, dropped))
        rows = self.run_blocks(rows, training_mask(groups), key=key, remat=remat)
        return self.logits(rows[:, self.config.tokens :])


def training_mask(groups):
    """Who sees whom in training: [2N, 2N] boolean, query rows by key rows, for the layout of `LPD.embed`.

    Context of group i has block id 2i (the class 0), queries of group i have 2i - 1. A row sees its own block, and the
    context of earlier blocks; nobody outside the group sees a query. Source: mit-han-lab/lpd models/lpd.py.

    Args:
      groups: [N] int32, the 1-based group of rank j.
    """
    context = jnp.concatenate([jnp.zeros(1, groups.dtype), 2 * groups[:-1]])
    ids = jnp.concatenate([context, 2 * groups - 1])
    is_context = jnp.arange(ids.size) < context.size
    return (ids[:, None] == ids) | ((ids < ids[:, None]) & is_context)


def lpd_loss(logits, tokens, orders):
    """Mean cross-entropy over all N tokens, in nats; logits [B, N, V] in rank order, tokens and orders [B, N]."""
    targets = jnp.take_along_axis(tokens, orders, axis=1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def resize_positions(positions, grid: int):
    """Resizes a position table [1 + n**2, D] to [1 + grid**2, D]; row 0, the class, is copied.

    Bicubic with a = -0.75 and half-pixel centres, no antialiasing: torch's `interpolate(mode="bicubic")`, which is what
    the 512-pixel models start from. `jax.image.resize` has a = -0.5 and gives other numbers.
    """
    old = round((positions.shape[0] - 1) ** 0.5)
    if old**2 != positions.shape[0] - 1:
        raise ValueError(f"resize_positions: {positions.shape[0]} rows; wanted 1 + a square number.")
    weights = _bicubic_matrix(old, grid)
    table = positions[1:].reshape(old, old, -1)
    table = jnp.einsum("ih,jw,hwd->ijd", weights, weights, table)
    return jnp.concatenate([positions[:1], table.reshape(grid**2, -1)])


def _bicubic_matrix(old: int, new: int, a: float = -0.75):
    """[new, old] weights of one-dimensional bicubic interpolation, edge samples repeated."""
    centre = (jnp.arange(new) + 0.5) * old / new - 0.5
    base = jnp.floor(centre).astype(jnp.int32)
    matrix = jnp.zeros((new, old))
    for tap in range(-1, 3):
        distance = jnp.abs(centre - base - tap)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        weight = jnp.where(distance <= 1, near, far)
        matrix = matrix.at[jnp.arange(new), jnp.clip(base + tap, 0, old - 1)].add(weight)
    return matrix
