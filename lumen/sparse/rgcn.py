"""R-GCN (arXiv:1703.06103): convolution on a graph with several kinds of edges, on the engine of sparse convolutions.

graph = relational_graph(with_inverses(edges, relations=R), nodes=n, relations=2 * R)
logits = RGCN(RGCNConfig(nodes=n, relations=2 * R, widths=(16, classes)), rngs=rngs)(graph)   # [n, classes]

A relation is to a graph what an offset of the window is to a grid. But a node may have many neighbours of a relation,
and a kernel map holds one row per offset. As a layer is linear in its inputs, neighbours are summed first:

    y_i = W_0ᵀ x_i + b + sum_r W_rᵀ z_(i, r),    z_(i, r) = c_(i, r) sum over j in N_r(i) of x_j

Rows z exist for the pairs of a node and a relation that have an edge. They, the offsets r and the outputs i make a
kernel map, in which each row is read once; no more rows are multiplied than there are such pairs, whatever the edges.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.sparse_convolution import Dataflow, Dataflows, KernelMap, prepare, sparse_convolution

# Most pairs of a node and a relation have no edge: pair lists skip them, tiles of rows would not.
DATAFLOWS = Dataflows(Dataflow("gather_scatter"), Dataflow("gather_scatter"), Dataflow("fetch_on_demand", tile=512))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel_map", "sources", "rows", "counts"], meta_fields=["relations"]
)
@dataclasses.dataclass(frozen=True)
class RelationalGraph:
    """Edges, sorted for convolutions.

    Attributes:
      kernel_map: from P rows, a pair of a node and a relation each, through R relations to n nodes.
      sources: int32 [E], the node that each edge comes from.
      rows: int32 [E], the row that it goes to, ascending.
      counts: float32 [P], edges of each row.
      relations: R.
    """

    kernel_map: KernelMap
    sources: Any
    rows: Any
    counts: Any
    relations: int

    @property
    def nodes(self) -> int:
        """n."""
        return self.kernel_map.table.shape[1]


def relational_graph(edges, *, nodes: int, relations: int, dataflows: Dataflows = DATAFLOWS) -> RelationalGraph:
    """Sorts the edges of a graph, on the host. Its map takes 4 R (n + P) bytes, for P pairs of a node and a relation.

    Args:
      edges: integers [E, 3], (from, to, relation) in any order; an edge that comes twice counts twice.
      nodes: n.
      relations: R.
      dataflows: how convolutions run.
    Raises:
      ValueError: no edges, or one of a node or a relation that there is not.
    """
    edges = np.asarray(edges)
    if edges.ndim != 2 or edges.shape[1] != 3 or not np.issubdtype(edges.dtype, np.integer) or not len(edges):
        raise ValueError(
            f"relational_graph: edges are {edges.dtype} {list(edges.shape)}; wanted integers [E, 3], (from, to, "
            "relation), at least one."
        )
    limits = np.asarray([nodes, nodes, relations])
    wrong = ((edges < 0) | (edges >= limits)).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"relational_graph: {int(wrong.sum())} of {len(edges)} edges are out of range, first edge {row}, "
            f"{edges[row].tolist()}; wanted 0 <= (from, to, relation) < {limits.tolist()}. Number nodes and relations "
            "from 0, or give their true numbers."
        )
    sources, targets, kinds = edges[np.lexsort((edges[:, 0], edges[:, 1], edges[:, 2]))].T
    new = np.r_[True, (np.diff(targets) != 0) | (np.diff(kinds) != 0)]
    rows = np.cumsum(new) - 1
    targets, kinds = targets[new], kinds[new]  # of each row
    numbers = np.arange(len(targets), dtype=np.int32)
    table = np.full((relations, nodes), -1, np.int32)
    table[kinds, targets] = numbers
    transposed = np.full((relations, len(targets)), -1, np.int32)
    transposed[kinds, numbers] = targets
    kernel_map = prepare(jnp.asarray(table), jnp.asarray(transposed), nodes, dataflows)
    return RelationalGraph(
        kernel_map,
        jnp.asarray(sources, jnp.int32),
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(np.bincount(rows), jnp.float32),
        relations,
    )


def with_inverses(edges, *, relations: int) -> np.ndarray:
    """The edges and, as relations R to 2 R - 1, the same in the other direction: [E, 3] -> [2 E, 3]."""
    edges = np.asarray(edges)
    return np.concatenate([edges, np.stack([edges[:, 1], edges[:, 0], edges[:, 2] + relations], 1)])


class RelationalConv(nnx.Module):
    """y_i = W_0ᵀ x_i + b + sum over relations r and neighbours j in N_r(i) of c_(i, r) W_rᵀ x_j, see the module's text.

    c_(i, r) = 1 / |N_r(i)| if normalised, else 1. With a number of bases B the weights are W_r = sum_b a_(r, b) V_b.

    Neighbours are summed by adding rows in place. A GPU does so in any order, unless XLA_FLAGS has
    --xla_gpu_deterministic_ops=true: results then repeat to the bit, as those of the engine always do.

    Attributes:
      kernel: [R, Cin, Cout], or of bases [B, Cin, Cout].
      coefficients: [R, B], or None.
      self_kernel: [Cin, Cout].
      bias: [Cout].
    Source: arXiv:1703.06103, equations 2 and 3.
    """

    def __init__(
        self, inputs: int, outputs: int, relations: int, *, bases: int = 0, normalised: bool = True, rngs: nnx.Rngs
    ):
        """A layer with Glorot-uniform weights; `bases` = 0 gives each relation a matrix of its own."""
        self.normalised = normalised
        glorot = nnx.initializers.glorot_uniform(in_axis=-2, out_axis=-1, batch_axis=0)
        self.kernel = nnx.Param(glorot(rngs.params(), (bases or relations, inputs, outputs)))
        mixed = nnx.initializers.glorot_uniform()(rngs.params(), (relations, bases)) if bases else None
        self.coefficients = None if mixed is None else nnx.Param(mixed)
        self.self_kernel = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x, graph: RelationalGraph):
        """[n, Cin] -> [n, Cout], in x's dtype; sums are float32."""
        kernel = self.kernel[...]
        if self.coefficients is not None:
            kernel = jnp.einsum("RB,BIO->RIO", self.coefficients[...], kernel)
        if len(kernel) != graph.relations or len(x) != graph.nodes:
            raise ValueError(
                f"RelationalConv: x is {list(x.shape)}, of {len(kernel)} relations, the graph has {graph.nodes} nodes "
                f"and {graph.relations} relations; wanted a row per node, and a layer of as many relations."
            )
        rows = jax.ops.segment_sum(
            x[graph.sources].astype(jnp.float32), graph.rows, len(graph.counts), indices_are_sorted=True
        )
        if self.normalised:
            rows = rows / graph.counts[:, None]
        y = sparse_convolution(rows.astype(x.dtype), kernel, graph.kernel_map).astype(jnp.float32)
        y += jnp.matmul(x, self.self_kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
        return (y + self.bias[...]).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RGCNConfig:
    """A classifier of nodes.

    Attributes:
      nodes, relations: of the graph.
      widths: channels of each layer's output; the last are the classes.
      embedding: channels of a node's own, trained vector, the input where there are no features.
      bases: see `RelationalConv`.
    """

    nodes: int
    relations: int
    widths: tuple[int, ...]
    embedding: int = 16
    bases: int = 0


class RGCN(nnx.Module):
    """Layers of relational convolutions with ReLU between them.

    Deviation: the paper's first layer has a matrix [n, 16] per relation, for inputs that name the node. Here a node has
    one vector, which the matrices of the first layer turn into each relation's: n + R 16 rows instead of n R.
    Source: arXiv:1703.06103, section 3.
    """

    def __init__(self, config: RGCNConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = jax.random.normal(rngs.params(), (config.nodes, config.embedding))
        self.embedding = nnx.Param(normal)
        self.layers = nnx.List(
            [
                RelationalConv(inputs, outputs, config.relations, bases=config.bases, rngs=rngs)
                for inputs, outputs in zip((config.embedding, *config.widths[:-1]), config.widths, strict=True)
            ]
        )

    def __call__(self, graph: RelationalGraph, x=None):
        """Logits [n, classes], of features [n, embedding] or, without, of the nodes' own vectors."""
        x = self.embedding[...] if x is None else x
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x, graph))
        return self.layers[-1](x, graph)
