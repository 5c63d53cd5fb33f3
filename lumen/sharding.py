"""Where arrays live: logical axis names, the mesh they map to, and shardings for whole trees.

Parameters name their axes ("embed", "mlp", ...) in their variable metadata; this module alone knows which mesh axis
each name goes to. Mesh axes, in order:

  data     replicas of the model; the batch is split over it
  fsdp     the batch is split over it, and so are the parameters (ZeRO-3)
  ring     sequence parallelism by ring attention
  ulysses  sequence parallelism by all-to-all over heads
  tensor   heads, feed-forward and vocabulary (Megatron)
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "ring", "ulysses", "tensor")

# Logical name -> mesh axes. A name that is absent is replicated.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("ring", "ulysses"),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(shape: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
    """Builds the five-axis mesh.

    Args:
      shape: devices per mesh axis, e.g. {"fsdp": 4, "tensor": 2}; absent axes are 1; one axis may be -1: what is left.
      devices: the devices to use, default all of the process's backend. May be the devices of an absent topology.

    Raises:
      ValueError: for an unknown axis, or sizes whose product is not the number of devices.
    """
    unknown = set(shape) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"mesh: unknown axis {sorted(unknown)}; the axes are {', '.join(MESH_AXES)}.")
    count = len(jax.devices() if devices is None else devices)
    sizes = [shape.get(axis, 1) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if any(size < 1 for size in sizes) or math.prod(sizes) != count:
        asked = " x ".join(f"{axis}={shape.get(axis, 1)}" for axis in MESH_AXES)
        raise ValueError(f"mesh: {asked} does not give {count} devices; choose sizes whose product is {count}.")
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    if devices is None:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=axis_types)


def partition_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one array: a named axis is split where its mesh axes divide it, else it is replicated.

    Args:
      shape: the array's shape.
      axes: logical names of the *last* len(axes) dimensions; missing leading dimensions are stacked layers, never
        split.
      mesh: the mesh to split over; of its axes, those of other names than MESH_AXES have no part in this.
    """
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    spec = []
    for size, name in zip(shape, names, strict=True):
        targets = tuple(axis for axis in RULES.get(name or "", ()) if axis in mesh.shape)
        parts = math.prod(mesh.shape[axis] for axis in targets)
        divides = parts > 1 and size % parts == 0
        spec.append((targets[0] if len(targets) == 1 else targets) if divides else None)
    return PartitionSpec(*spec)


def tree_shardings(tree, mesh: Mesh, *, gathered: Sequence[str] = ()):
    """NamedShardings in the structure of a tree of nnx variables; leaves outside a variable are replicated.

    A variable's axis names come from its `axes` metadata. Works on abstract trees.

    Args:
      tree: the variables.
      mesh: the mesh to split over.
      gathered: logical names to replicate all the same, e.g. "embed" for inference, which would gather the weights of
        an fsdp mesh again at every pass.
    """

    def shardings(leaf):
        axes = leaf.get_metadata().get("axes", ()) if isinstance(leaf, nnx.Variable) else ()
        axes = tuple(None if axis in gathered else axis for axis in axes)
        return jax.tree.map(lambda array: NamedSharding(mesh, partition_spec(array.shape, axes, mesh)), leaf)

    return jax.tree.map(shardings, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an input batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def constrain(x, *axes: str | None):
    """Pins an activation's layout to the mesh of the context (`jax.set_mesh`); without one, x as it is.

    Without such a pin at every layer's input the compiler may split a contraction over fsdp and all-reduce activations
    (LPD-XL on 8 GPUs: 856 GiB a step) where gathering the weights costs a hundredth.

    Args:
      x: an array.
      axes: a logical name or None per dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))
