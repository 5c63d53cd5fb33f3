"""MinkUNet against SPVNAS's class on TorchSparse's engine, and its published sizes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from lumen.io.names.torchsparse import IGNORED, RULES
from lumen.io.pretrained import from_original, to_original
from lumen.sparse.minkunet import MAP_NAMES, MinkUNet, MinkUNetConfig, parameter_count, segmentation_loss, unet_maps
from lumen.sparse.tensor import from_numpy
from pallas_kernels.sparse_convolution import Dataflow, Dataflows

# From the goldens' README: float32 sums through 42 layers; training divides by the spread of few rows.
EVAL = {"rtol": 1e-3, "atol": 1e-4}
TRAIN = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture(scope="module")
def original(golden):
    file = golden("torchsparse/minkunet")
    config = MinkUNetConfig(widths=tuple(file.meta["config"]["widths"]))
    abstract = nnx.eval_shape(lambda: MinkUNet(config, rngs=nnx.Rngs(0)))
    return from_original(file.weights(), abstract, RULES, IGNORED), file


def tensor(file, rows=slice(None)):
    coordinates = file["in/coords"][rows]
    shape = coordinates[:, 1:].max(0) + 1
    return from_numpy(file["in/feats"][rows], coordinates, spatial_shape=shape, batch_size=3)


def test_evaluation_matches_the_original(original):
    model, file = original
    x = tensor(file)

    @jax.jit
    def run(model, x):
        maps = unet_maps(x.sites, model.config)
        return model(x, maps), [sites.count for sites in maps.levels.values()]

    logits, counts = run(model, x)
    assert counts == file.meta["config"]["level_sizes_floor"]
    np.testing.assert_allclose(logits[: len(file["in/feats"])], file["out/eval_floor/logits"], **EVAL)
    assert not np.asarray(logits[len(file["in/feats"]) :]).any()


def test_names_and_layouts_there_and_back(original):
    model, file = original
    written = to_original(model, RULES)
    assert set(written) == set(file.weights())
    for name, array in file.weights().items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_training_matches_the_original(original):
    model, file = original
    x = tensor(file)
    rows = len(file["in/feats"])
    labels = np.pad(file["in/labels"], (0, x.sites.capacity - rows), constant_values=255)
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    # The quickest to compile; evaluation is in the default dataflows.
    flows = Dataflows(*(Dataflow("unsorted"),) * 3)
    config = dataclasses.replace(model.config, dataflows=tuple((name, flows) for name in MAP_NAMES))

    def loss(params, features):
        trained = nnx.merge(graphdef, params, statistics, copy=True)
        logits = trained(type(x)(features, x.sites), unet_maps(x.sites, config), train=True)
        return segmentation_loss(logits, labels), (logits, to_arrays(nnx.state(trained)))

    def to_arrays(state):
        return nnx.to_pure_dict(state)

    (value, (logits, moved)), (grads, grad_features) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        params, x.features
    )
    np.testing.assert_allclose(value, file["out/train/loss"], **TRAIN)
    np.testing.assert_allclose(logits[:rows], file["out/train/logits"], **TRAIN)
    np.testing.assert_allclose(grad_features[:rows], file["out/train/grad_feats"], **TRAIN)
    assert not np.asarray(grad_features[rows:]).any()
    after = nnx.merge(graphdef, params, statistics)
    nnx.replace_by_pure_dict(state := nnx.state(after), moved)
    nnx.update(after, state)
    new = to_original(after, RULES)
    wanted = file.weights("out/train/new/")
    assert len(wanted) == 2 * sum("running_var" in name for name in wanted) > 0
    for name, array in wanted.items():
        np.testing.assert_allclose(new[name], array, err_msg=name, **TRAIN)
    gradients = to_original(nnx.merge(graphdef, grads, statistics), RULES)
    wanted = file.weights("out/train/grad/")
    assert set(wanted) == {name for name in file.weights() if "running" not in name}
    for name, array in wanted.items():
        np.testing.assert_allclose(gradients[name], array, err_msg=name, **TRAIN)


@pytest.mark.parametrize(("ratio", "parameters"), [(0.5, 5_435_235), (0.64, 8_771_298), (1.0, 21_723_315)])
def test_published_sizes(ratio, parameters):
    assert parameter_count(MinkUNetConfig.scaled(ratio)) == parameters
