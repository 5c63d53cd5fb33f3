"""Meshes, and which axis of an array goes to which axis of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lumen.generation.lpd import LPD, LPDConfig
from lumen.io.checkpoint import flatten
from lumen.sharding import MESH_AXES, batch_sharding, constrain, make_mesh, partition_spec, tree_shardings


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"data": 8}, (8, 1, 1, 1, 1)),
        ({"data": -1}, (8, 1, 1, 1, 1)),
        ({"fsdp": 4, "tensor": 2}, (1, 4, 1, 1, 2)),
        ({"tensor": 2, "fsdp": -1}, (1, 4, 1, 1, 2)),
        ({"data": -1, "fsdp": 8}, (1, 8, 1, 1, 1)),
        ({"data": 2, "ring": 2, "ulysses": 2}, (2, 1, 2, 2, 1)),
    ],
)
def test_mesh(shape, sizes):
    mesh = make_mesh(shape)
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_of_given_devices():
    devices = jax.devices()[2:6]
    mesh = make_mesh({"fsdp": 2, "tensor": -1}, devices)
    assert list(mesh.devices.flat) == devices
    assert make_mesh({}, devices[:1]).size == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 8}, r"unknown axis \['model'\]; the axes are data, fsdp, ring, ulysses, tensor"),
        ({"data": 3}, r"data=3 x fsdp=1 .* does not give 8 devices; choose sizes whose product is 8"),
        ({"data": 3, "fsdp": -1}, "fsdp=-1 .* does not give 8 devices"),
        ({"data": -1, "fsdp": -1}, "does not give 8 devices"),
        ({"data": -8, "fsdp": -1}, "does not give 8 devices"),
        ({"data": 0, "fsdp": -1}, "does not give 8 devices"),
        ({}, "does not give 8 devices"),
    ],
)
def test_mesh_that_cannot_be(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


@pytest.mark.parametrize(
    ("mesh_shape", "shape", "axes", "want"),
    [
        ({"fsdp": 4, "tensor": 2}, (8, 6), ("embed", "mlp"), ("fsdp", "tensor")),
        ({"fsdp": 4, "tensor": 2}, (6, 8), ("embed", "mlp"), (None, "tensor")),  # 4 does not divide 6: replicated
        ({"fsdp": 8}, (8, 8), ("embed", "mlp"), ("fsdp", None)),  # an axis of one device splits nothing
        ({"data": 8}, (8, 8), ("embed", "mlp"), (None, None)),
        ({"fsdp": 4, "tensor": 2}, (8, 8, 4), ("embed", "mlp"), (None, "fsdp", "tensor")),  # stacked layers in front
        ({"fsdp": 4, "tensor": 2}, (3, 2, 8, 4), ("heads",), (None, None, None, "tensor")),
        ({"fsdp": 4, "tensor": 2}, (8, 4), (None, "vocab"), (None, "tensor")),
        ({"fsdp": 4, "tensor": 2}, (8, 4), ("strange", "vocab"), (None, "tensor")),
        ({"fsdp": 4, "tensor": 2}, (8, 4), (), (None, None)),
        ({"data": 2, "fsdp": 4}, (8, 5), ("batch",), (None, None)),  # of the last axis
        ({"data": 2, "fsdp": 4}, (8, 5), ("batch", None), (("data", "fsdp"), None)),
        ({"data": 2, "fsdp": 4}, (4, 5), ("batch", None), (None, None)),  # all of its mesh axes or none
        ({"ring": 2, "ulysses": 4}, (1, 16), ("batch", "sequence"), (None, ("ring", "ulysses"))),
    ],
)
def test_partition_spec(mesh_shape, shape, axes, want):
    assert partition_spec(shape, axes, make_mesh(mesh_shape)) == PartitionSpec(*want)


def test_partition_spec_on_a_mesh_of_ones_own():
    mesh = jax.make_mesh((2, 4), ("fsdp", "mine"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert partition_spec((8, 8), ("batch", "embed"), mesh) == PartitionSpec("fsdp", "fsdp")
    assert partition_spec((8, 8), ("mlp", None), mesh) == PartitionSpec(None, None)


def test_batch_lies_over_data_and_fsdp():
    sharding = batch_sharding(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    batch = jax.device_put(np.arange(8.0), sharding)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2,)}
    # The devices of a tensor pair hold the same rows.
    assert sorted(float(shard.data[0]) for shard in batch.addressable_shards) == [0, 0, 2, 2, 4, 4, 6, 6]


class Tower(nnx.Module):
    def __init__(self, *, rngs):
        def block(key):
            return nnx.Linear(
                8, 16, kernel_metadata={"axes": ("embed", "mlp")}, bias_metadata={"axes": ("mlp",)}, rngs=nnx.Rngs(key)
            )

        self.blocks = jax.vmap(block)(jax.random.split(rngs.params(), 3))
        self.norm = nnx.LayerNorm(8, rngs=rngs)


def test_tree_shardings_follow_the_names_of_variables():
    """Of a module, of its state, and of its abstract state; what names no axes is replicated."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    want = {
        "blocks.bias": PartitionSpec(None, "tensor"),
        "blocks.kernel": PartitionSpec(None, "fsdp", "tensor"),
        "norm.bias": PartitionSpec(None),
        "norm.scale": PartitionSpec(None),
    }
    module = Tower(rngs=nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: Tower(rngs=nnx.Rngs(0)))
    for tree in (module, nnx.state(module), abstract, nnx.state(abstract)):
        found = flatten(tree_shardings(tree, mesh))
        assert found == {name: NamedSharding(mesh, spec) for name, spec in want.items()}
    gathered = flatten(tree_shardings(module, mesh, gathered=("embed",)))
    assert gathered["blocks.kernel"].spec == PartitionSpec(None, None, "tensor")
    assert flatten(tree_shardings({"step": jnp.zeros(()), "table": jnp.zeros((8, 8))}, mesh)) == {
        "step": NamedSharding(mesh, PartitionSpec()),
        "table": NamedSharding(mesh, PartitionSpec(None, None)),
    }


def test_every_large_parameter_of_lpd_is_split():
    """On fsdp=4 x tensor=2 no matrix of the published sizes is left whole on every device."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = nnx.eval_shape(lambda: LPD(LPDConfig.xl(), rngs=nnx.Rngs(0)))
    shapes = flatten(nnx.state(model, nnx.Param))
    shardings = flatten(tree_shardings(nnx.state(model, nnx.Param), mesh))
    parts = {name: x.size / np.prod(shardings[name].shard_shape(x.shape)) for name, x in shapes.items()}
    assert all(parts[name] == 8 for name in ("blocks.qkv", "blocks.projection", "blocks.up.kernel", "head.kernel"))
    held = sum(x.size / parts[name] for name, x in shapes.items())
    total = sum(x.size for x in shapes.values())
    assert held < 1.05 * total / 8, {name: part for name, part in parts.items() if part < 8}


def test_constrain():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    x = jnp.zeros((8, 6))
    assert constrain(x, "batch", None) is x  # no mesh in the context
    with jax.set_mesh(mesh):
        laid = jax.jit(lambda x: constrain(x, "batch", "mlp"))(x)
    assert laid.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), 2)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        assert constrain(x, "batch", None) is x
