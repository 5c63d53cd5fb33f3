"""Linear layers whose weight is packed in 4 bits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lumen.layers import Frozen
from lumen.sharding import RULES, partition_spec
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.w4a16_matmul import PackedInt4, dequantize, pack, unsupported, w4a16_matmul
from pallas_kernels.w4a16_matmul.packed_int4 import PLANE


class QuantizedLinear(nnx.Module):
    """y = x W + bias with W [D, F] a PackedInt4; in the place of an nnx.Linear, stacked over layers or not.

    The arrays are `Frozen` variables with axis names, so checkpoints, meshes, scans and `nnx.split` treat them like any
    other weight, and nothing of it trains. Gradients reach x.

    Attributes:
      words: [..., F, D / 128, 32] uint16, a PackedInt4's words tile by tile, so that a mesh can cut D between tiles
        only, and not at all where the last tile has padding.
      scale, zero: [..., D / G, F].
      bias: [..., F] or None.
    """

    def __init__(self, packed: PackedInt4, bias=None, *, axes: tuple[str | None, str | None]):
        """Takes a weight whose leading axes, if any, are layers, and the logical names of D and F."""
        self.group, self.padding, self.axes = packed.group, packed.padding, axes
        inputs, outputs = (None if packed.padding else axes[0]), axes[1]
        self.words = Frozen(_tiles(packed.words), axes=(outputs, inputs, None))
        self.scale = Frozen(packed.scale, axes=(inputs, outputs))
        self.zero = Frozen(packed.zero, axes=(inputs, outputs))
        self.bias = None if bias is None else Frozen(bias, axes=(outputs,))

    @property
    def packed(self) -> PackedInt4:
        """The weight."""
        words = self.words[...]
        words = words.reshape(*words.shape[:-2], -1)
        return PackedInt4(words, self.scale[...], self.zero[...], self.group, self.padding)

    def __call__(self, x, *, implementation: Implementation = "auto"):
        """[..., D] -> [..., F] in x's dtype; `implementation` as `w4a16_matmul` takes it.

        On a mesh (`jax.set_mesh`) XLA splits its own product. A kernel sees local arrays only: each device multiplies
        its part of x and W, and the parts of D are summed in float32.
        """
        packed = self.packed
        mesh = jax.sharding.get_abstract_mesh()
        choice = dispatch.choose("w4a16_matmul", implementation, unsupported(x, packed))
        if choice == "xla" or mesh.empty or mesh.size == 1 or mesh.manual_axes:
            y = w4a16_matmul(x, packed, implementation=implementation)
        else:
            y = self._on_mesh(x, packed, choice, mesh)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def dense(self, dtype=None) -> nnx.Linear:
        """The same layer with its weight unpacked: scale (q - zero), rounded in the scale's dtype, then cast."""
        kernel = dequantize(self.packed, dtype)
        shape = kernel.shape[-2:]
        linear = nnx.eval_shape(lambda: nnx.Linear(*shape, use_bias=self.bias is not None, rngs=nnx.Rngs(0)))
        linear.kernel = nnx.Param(kernel, axes=self.axes)
        if self.bias is not None:
            linear.bias = nnx.Param(self.bias[...].astype(kernel.dtype), axes=self.axes[1:])
        return linear

    def _on_mesh(self, x, packed: PackedInt4, implementation: Implementation, mesh):
        # Mesh axes that split the batch cannot split the product as well: what they hold of the weight is gathered.
        inputs, outputs = (
            None if set(RULES.get(name or "", ())) & set(RULES["batch"]) else name
            for name in (self.words.get_metadata()["axes"][1], self.axes[1])
        )
        outputs, inputs, _ = partition_spec(self.words.shape, (outputs, inputs, None), mesh)
        rows = partition_spec(x.shape[:-1], ("batch", "sequence", *[None] * x.ndim)[: x.ndim - 1], mesh)
        side = PartitionSpec(inputs if packed.scale.shape[0] > 1 else None, outputs)

        def local(x, words, scale, zero):
            part = PackedInt4(words, scale, zero, self.group, self.padding)
            y = w4a16_matmul(x, part, implementation=implementation)
            return y if inputs is None else jax.lax.psum(y.astype(jnp.float32), inputs).astype(y.dtype)

        return jax.shard_map(
            local,
            in_specs=(PartitionSpec(*rows, inputs), PartitionSpec(outputs, inputs), side, side),
            out_specs=PartitionSpec(*rows, outputs),
            check_vma=False,
        )(x, packed.words, packed.scale, packed.zero)


def quantize_linear(linear: nnx.Linear, q, scale, zero) -> QuantizedLinear:
    """A linear with its weight replaced by (q - zero) * scale, and with its bias.

    Args:
      linear: gives bias and axis names.
      q: integers 0..15 [D, F].
      scale: [D / G, F] float16, bfloat16 or float32; G is 32, 64, 128 or D.
      zero: integers 0..15 [D / G, F].
    """
    packed = pack(q, scale, zero, q.shape[0] // scale.shape[0])
    bias = None if linear.bias is None else linear.bias[...]
    return QuantizedLinear(packed, bias, axes=linear.kernel.get_metadata().get("axes", (None, None)))


def _tiles(words):
    """[..., F, W] -> [..., F, W / 32, 32], of an abstract array too."""
    shape = (*words.shape[:-1], words.shape[-1] // PLANE, PLANE)
    return jax.ShapeDtypeStruct(shape, words.dtype) if isinstance(words, jax.ShapeDtypeStruct) else words.reshape(shape)
