"""Relational graph convolution against a dense oracle, and a classifier that has to look two edges far."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lumen.sparse.rgcn import RGCN, RelationalConv, RGCNConfig, relational_graph, with_inverses
from pallas_kernels.sparse_convolution import Dataflow, Dataflows

TILES = Dataflows(Dataflow("sorted", splits=2, tile=8), Dataflow("unsorted"), Dataflow("tile_skip", tile=8))


def dense(x, edges, kernel, self_kernel, bias, normalised):
    """The layer with a matrix of neighbours per relation, float64."""
    y = x @ self_kernel + bias
    for relation, weight in enumerate(kernel):
        adjacency = np.zeros((len(x), len(x)))
        for source, target, kind in edges:
            adjacency[target, source] += kind == relation
        if normalised:
            adjacency /= np.maximum(adjacency.sum(1, keepdims=True), 1)
        y = y + adjacency @ x @ weight
    return y


def layer_of(kernel, self_kernel, bias, normalised):
    layer = RelationalConv(*kernel.shape[1:], len(kernel), normalised=normalised, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.self_kernel[...], layer.bias[...] = map(jnp.asarray, (kernel, self_kernel, bias))
    return layer


@pytest.mark.parametrize(("name", "normalised"), [("norm", True), ("sum", False)])
def test_golden(golden, name, normalised):
    record = golden("torchsparse/rgcn")
    layer = layer_of(record["weights/W"], record["weights/W0"], record["weights/bias"], normalised)
    graph = relational_graph(record["in/edges"], nodes=11, relations=4)
    x, cotangent = record["in/x"], record["in/grad_out"]

    def loss(layer, x):
        before = layer(x, graph)
        after = jax.nn.relu(before)
        return (after * cotangent).sum(), (before, after)

    (_, results), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(layer, x)
    # float32 sums of up to 60 terms of about 1.
    close = {"atol": 1e-5, "rtol": 1e-5}
    for got, want in zip(results, ("preact", "out"), strict=True):
        np.testing.assert_allclose(got, record[f"out/{name}/{want}"], **close)
    wanted = {"kernel": "W", "self_kernel": "W0", "bias": "bias"}
    for ours, theirs in wanted.items():
        np.testing.assert_allclose(getattr(grads[0], ours)[...], record[f"out/{name}/grad_{theirs}"], **close)
    np.testing.assert_allclose(grads[1], record[f"out/{name}/grad_x"], **close)


def run(layer, x, graph):
    """Compiled as one program, which is quicker than op by op."""
    return jax.jit(lambda layer, x, graph: layer(x, graph))(layer, x, graph)


@pytest.mark.parametrize("dataflows", [None, TILES], ids=["pairs", "tiles"])
def test_many_edges_of_a_relation_and_edges_that_come_twice(dataflows):
    rng = np.random.default_rng(0)
    edges = rng.integers(0, [9, 9, 2], (80, 3))  # on average more than four per node and relation
    edges = np.concatenate([edges, edges[:5]])
    kernel, self_kernel = rng.standard_normal((3, 4, 5)), rng.standard_normal((4, 5))  # the third relation has no edge
    bias, x = rng.standard_normal(5), rng.standard_normal((9, 4))
    options = {} if dataflows is None else {"dataflows": dataflows}
    graph = relational_graph(edges, nodes=9, relations=3, **options)
    weights = [array.astype(np.float32) for array in (kernel, self_kernel, bias)]
    layers = [layer_of(*weights, normalised) for normalised in (True, False)]
    both = jax.jit(lambda layers, x, graph: [layer(x, graph) for layer in layers])(layers, x.astype(np.float32), graph)
    for got, normalised in zip(both, (True, False), strict=True):
        want = dense(x, edges, kernel, self_kernel, bias, normalised)
        # float32 sums of some 9 neighbours x 4 channels x 2 relations.
        np.testing.assert_allclose(got, want, rtol=0, atol=100 * 2**-24 * np.abs(want).max())


def test_no_more_is_multiplied_than_pairs_of_a_node_and_a_relation():
    star = np.asarray([(i, 0, 0) for i in range(1, 100)])  # 99 edges into one node
    graph = relational_graph(star, nodes=100, relations=1)
    assert graph.counts.tolist() == [99]
    assert int((graph.kernel_map.table >= 0).sum()) == 1


def test_bases_mix_matrices():
    rng = np.random.default_rng(1)
    edges = rng.integers(0, [6, 6, 3], (20, 3))
    graph = relational_graph(edges, nodes=6, relations=3)
    layer = RelationalConv(4, 5, 3, bases=2, rngs=nnx.Rngs(0))
    assert layer.coefficients is not None
    kernel = np.einsum("rb,bio->rio", layer.coefficients[...], layer.kernel[...])
    x = rng.standard_normal((6, 4))
    want = dense(x, edges, kernel, np.asarray(layer.self_kernel[...]), np.asarray(layer.bias[...]), True)
    np.testing.assert_allclose(run(layer, x.astype(np.float32), graph), want, rtol=0, atol=1e-5)


def test_bfloat16_sums_in_float32():
    rng = np.random.default_rng(2)
    edges = np.stack([np.arange(1, 400), np.zeros(399, int), np.zeros(399, int)], 1)
    graph = relational_graph(edges, nodes=400, relations=1)
    layer = layer_of(np.eye(4, dtype=np.float32)[None], np.zeros((4, 4), np.float32), np.zeros(4, np.float32), True)
    x = jnp.asarray(rng.uniform(1, 2, (400, 4)), jnp.bfloat16)
    want = np.asarray(x[1:], np.float64).mean(0)
    # The mean and the output are rounded to bfloat16, the sum of 399 terms is not.
    np.testing.assert_allclose(np.asarray(run(layer, x, graph)[0], np.float64), want, rtol=2**-7)


def test_learns_what_only_two_relations_tell():
    """A node's class is the thing it points to, or the next thing if it does so through another relation."""
    rng = np.random.default_rng(3)
    things, nodes = 4, 204
    points_to = rng.integers(0, things, nodes - things)
    kinds = rng.integers(0, 2, nodes - things)
    edges = np.stack([np.arange(things, nodes), points_to, kinds], 1)
    noise = np.stack([rng.integers(things, nodes, 400), rng.integers(things, nodes, 400), np.full(400, 2)], 1)
    graph = relational_graph(with_inverses(np.concatenate([edges, noise]), relations=3), nodes=nodes, relations=6)
    labels = jnp.asarray(np.where(kinds == 1, (points_to + 1) % things, points_to))  # the relation matters
    train = np.arange(nodes - things) < 120
    model = RGCN(RGCNConfig(nodes, 6, (16, things)), rngs=nnx.Rngs(0))
    optimizer = optax.adamw(0.02, weight_decay=0.05)
    state = optimizer.init(model)

    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(graph)[things:], labels)
        return jnp.where(train, losses, 0).sum() / train.sum()

    @jax.jit
    def step(model, state):
        updates, state = optimizer.update(jax.grad(loss)(model), state, model)
        return optax.apply_updates(model, updates), state

    for _ in range(60):
        model, state = step(model, state)
    logits = jax.jit(lambda model: model(graph))(model)
    right = (logits[things:].argmax(-1) == labels)[~train]
    assert right.mean() > 0.9  # by chance 0.25


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"edges are float64 \[2, 3\]; wanted integers \[E, 3\]"):
        relational_graph(np.zeros((2, 3)), nodes=3, relations=1)
    with pytest.raises(ValueError, match=r"1 of 2 edges are out of range, first edge 1, \[0, 3, 0\].*< \[3, 3, 1\]"):
        relational_graph([(0, 1, 0), (0, 3, 0)], nodes=3, relations=1)
    graph = relational_graph([(0, 1, 0)], nodes=3, relations=1)
    layer = RelationalConv(2, 2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"of 2 relations, the graph has 3 nodes and 1 relations"):
        layer(jnp.zeros((3, 2)), graph)
