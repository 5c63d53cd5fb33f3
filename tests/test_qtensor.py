"""Packed linears: in the place of dense ones, through every way a model is handled, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lumen.io.checkpoint import Checkpointer, flatten
from lumen.layers import Frozen, run_layers, unstack
from lumen.qtensor import QuantizedLinear, quantize_linear
from lumen.sharding import make_mesh, tree_shardings
from pallas_kernels.w4a16_matmul import unpack


def make_linear(depth, features, group, *, bias=True, axes=("mlp", "embed"), seed=0, dtype=np.float32):
    """(layer, its weight in float64)."""
    rng = np.random.default_rng(seed)
    group = depth if group == -1 else group
    q = rng.integers(0, 16, (depth, features))
    zero = rng.integers(0, 16, (depth // group, features))
    scale = rng.uniform(0.5, 1.5, zero.shape).astype(np.float16).astype(dtype)
    linear = nnx.Linear(depth, features, use_bias=bias, kernel_metadata={"axes": axes}, rngs=nnx.Rngs(0))
    if bias:
        linear.bias.set_value(jnp.asarray(rng.normal(size=features), jnp.float32))
    weight = (q - np.repeat(zero, group, 0)) * np.repeat(scale.astype(np.float64), group, 0)
    return quantize_linear(linear, q, jnp.asarray(scale), zero), weight


def make_x(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rounding(x, weight):
    """Bound on the error of a float32 product: every one of D terms rounded at most D times, in any order."""
    return x.shape[-1] * 2**-24 * (np.abs(np.asarray(x, np.float64)) @ np.abs(weight))


@pytest.mark.parametrize(("depth", "features", "group"), [(256, 24, 32), (384, 10, 128), (96, 7, 32), (200, 5, -1)])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_float64(depth, features, group, bias):
    layer, weight = make_linear(depth, features, group, bias=bias)
    x = make_x(2, 3, depth)
    want = np.asarray(x, np.float64) @ weight + (np.asarray(layer.bias[...], np.float64) if bias else 0)
    assert (np.abs(jax.jit(lambda layer, x: layer(x))(layer, x) - want) <= rounding(x, weight) + 1e-6).all()


def test_dense_and_back():
    layer, weight = make_linear(192, 8, 64)
    dense = layer.dense()
    np.testing.assert_array_equal(dense.kernel[...], weight.astype(np.float32))  # float32 holds (q - z) s exactly
    np.testing.assert_array_equal(dense.bias[...], layer.bias[...])
    again = quantize_linear(dense, *unpack(layer.packed))
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    jax.tree.map(np.testing.assert_array_equal, again, layer)


def stack(count, **shape):
    layers = [make_linear(seed=i, **shape)[0] for i in range(count)]
    return layers, jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def test_stacked_layers():
    layers, stacked = stack(3, depth=128, features=128, group=32, bias=True)
    x = make_x(2, 128)
    want = x
    for layer in layers:
        want = jnp.tanh(layer(want))

    def step(x, layer, index):
        del index
        return jnp.tanh(layer(x))

    class Model(nnx.Module):
        def __init__(self):
            self.blocks = stacked

    # The same float32 products compiled in three ways: sums of 128 terms, each of at most |x w| <= 23, through a tanh.
    for came in (
        jax.jit(lambda x, layers: run_layers(step, x, layers))(x, stacked),
        run_layers(step, x, unstack(Model()).blocks),
    ):
        np.testing.assert_allclose(came, want, rtol=0, atol=128 * 128 * 2**-24 * 23)
    batched = jax.vmap(lambda layer, x: layer(x))(stacked, jnp.stack([x] * 3))
    np.testing.assert_allclose(batched, jnp.stack([layer(x) for layer in layers]), rtol=1e-5, atol=1e-3)


def test_nothing_trains_and_gradients_reach_the_input():
    layer, weight = make_linear(128, 16, 64)
    _, params, rest = nnx.split(layer, nnx.Param, ...)
    assert not jax.tree.leaves(params)
    assert all(isinstance(variable, Frozen) for _, variable in nnx.to_flat_state(rest))
    gradient = jax.grad(lambda x: layer(x).sum())(make_x(128))
    np.testing.assert_allclose(gradient, weight.sum(1), rtol=0, atol=16 * 2**-24 * np.abs(weight).sum(1).max())


def test_checkpoint(tmp_path):
    _, stacked = stack(2, depth=128, features=8, group=32, bias=True)
    model = {"blocks": {"down": stacked}}
    names = flatten(model)
    assert sorted(names) == [f"blocks.down.{name}" for name in ("bias", "scale", "words", "zero")]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, model)
        _, restored, _ = checkpointer.restore(jax.tree.map(jnp.zeros_like, model))
    for name, array in flatten(restored).items():
        assert array.dtype == names[name].dtype
        np.testing.assert_array_equal(array, names[name])


@pytest.mark.parametrize(
    ("depth", "group", "cut"),
    [
        (512, 32, True),  # 4 tiles of 128 over 2 devices
        (512, -1, True),  # the one scale per column stays whole
        (384, 32, False),  # 3 tiles: not in the middle of one
        (160, 32, False),  # a padded tile
    ],
)
def test_mesh_cuts_between_tiles_only(depth, group, cut):
    layer, _ = make_linear(depth, 16, group)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = tree_shardings(layer, mesh)
    assert shardings.words.get_value().spec == PartitionSpec("fsdp", "tensor" if cut else None, None)
    assert shardings.bias.get_value().spec == PartitionSpec("fsdp")
    words = layer.words[...]
    for shard in jax.device_put(words, shardings.words.get_value()).addressable_shards:
        assert shard.data.shape[-1] == words.shape[-1]  # whole tiles
    side = shardings.scale.get_value().spec
    if group == -1 or depth == 160:
        assert side[0] is None


def test_abstract_layers_have_the_same_layout():
    concrete, _ = make_linear(512, 16, 64)
    abstract = jax.eval_shape(lambda: concrete)
    packed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), concrete.packed)
    rebuilt = QuantizedLinear(packed, abstract.bias.get_value(), axes=("mlp", "embed"))
    assert jax.tree.structure(rebuilt) == jax.tree.structure(concrete)
    assert [leaf.shape for leaf in jax.tree.leaves(rebuilt)] == [leaf.shape for leaf in jax.tree.leaves(concrete)]


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("axes", [("mlp", "embed"), ("embed", "mlp")])  # D over tensor, then F over tensor
def test_on_a_mesh(axes, by_hand):
    """Sharded weights give what whole ones give: XLA's own partition, and the shard_map around a kernel.

    The interpreter runs one device at a time only, so plain JAX stands in for the kernel here.
    """
    layer, weight = make_linear(256, 128, 64, axes=axes)
    x = make_x(4, 2, 256)
    mesh = make_mesh({"fsdp": 2, "ring": 2, "tensor": 2})

    def apply(layer, x):
        if by_hand:
            return layer._on_mesh(x, layer.packed, "xla", mesh) + layer.bias[...]
        return layer(x)

    with jax.set_mesh(mesh):
        placed = jax.device_put(layer, tree_shardings(layer, mesh))
        compiled = jax.jit(apply).lower(placed, x).compile()
        y = compiled(placed, x)
    split = placed.words.get_value().sharding.spec
    assert split == PartitionSpec(*("fsdp" if name == "embed" else "tensor" for name in reversed(axes)), None)
    if by_hand:  # D over tensor is summed; what fsdp holds of the weight is gathered, as the batch is split over it
        assert ("all-reduce" in compiled.as_text()) == (axes[0] == "mlp")
        assert "all-gather" in compiled.as_text()
    want = np.asarray(x, np.float64) @ weight + np.asarray(layer.bias[...], np.float64)
    assert (np.abs(np.asarray(y, np.float64) - want) <= rounding(x, weight) + 1e-6).all()
