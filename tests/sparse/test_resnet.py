"""SparseResNet21D: sites, published names, sizes."""

import jax
import numpy as np
import pytest
from flax import nnx

from lumen.io.names.torchsparse import resnet_rules
from lumen.io.pretrained import from_original, to_original
from lumen.sparse.resnet import LEVELS_21D, SparseResNet, SparseResNetConfig, resnet_maps
from lumen.sparse.tensor import check_capacity, from_numpy

RULES = resnet_rules([level.layers for level in LEVELS_21D])


@pytest.fixture(scope="module")
def scan():
    rng = np.random.default_rng(0)
    coordinates = np.unique(rng.integers(0, (1, 32, 32, 32), (90, 4)), axis=0)
    features = rng.normal(size=(len(coordinates), 4)).astype(np.float32)
    return from_numpy(features, coordinates, spatial_shape=(32, 32, 32), batch_size=1)


def test_levels_have_the_sites_of_unpadded_windows(scan):
    model = SparseResNet(SparseResNetConfig.debug(), rngs=nnx.Rngs(0))
    maps = jax.jit(lambda sites: resnet_maps(sites, model.config))(scan.sites)
    check_capacity(maps.levels)
    levels = model(scan, maps)
    assert [level.features.shape[1] for level in levels] == [4, 8, 16, 32, 32]
    sites = {tuple(row) for row in np.asarray(scan.sites.coordinates[: int(scan.sites.count)])[:, 1:].tolist()}
    shape = np.array([32, 32, 32])
    for level, one in zip(LEVELS_21D, levels, strict=True):
        kernel, stride = np.array(level.kernel_size), np.array(level.stride)
        if (stride > 1).any():
            shape = (shape - kernel) // stride + 1
            sites = {
                tuple(((np.array(u) - k) // stride).tolist())
                for u in sites
                for k in np.ndindex(*kernel)
                if ((np.array(u) - k) % stride == 0).all()
                and (np.array(u) >= k).all()
                and ((np.array(u) - k) // stride < shape).all()
            }
        found = np.asarray(one.sites.coordinates[: int(one.sites.count)])[:, 1:]
        assert {tuple(row) for row in found.tolist()} == sites
        assert not np.asarray(one.features)[int(one.sites.count) :].any()
        assert np.asarray(one.features)[: int(one.sites.count)].any()


def test_published_names_there_and_back():
    model = SparseResNet(SparseResNetConfig.debug(), rngs=nnx.Rngs(0))
    published = to_original(model, RULES)
    assert published["0.0.0.kernel"].shape == (27, 4, 4)
    assert published["3.2.main.3.kernel"].shape == (27, 32, 32)
    assert published["4.0.0.kernel"].shape == (3, 32, 32)
    assert not any(name.startswith("4.1") for name in published)
    # TorchSparse's first axis is the fastest of an odd kernel: entry 1 is the offset (1, 0, 0).
    np.testing.assert_array_equal(published["0.0.0.kernel"][1], model.enter[0].conv.kernel[1, 0, 0])
    again = from_original(published, nnx.eval_shape(lambda: SparseResNet(model.config, rngs=nnx.Rngs(1))), RULES)
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_published_size():
    model = nnx.eval_shape(lambda: SparseResNet(SparseResNetConfig.resnet21d(), rngs=nnx.Rngs(0)))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if leaf.ndim > 1)
    blocks = sum(4 * 27 * c * c for c in (16, 32, 64, 128))
    assert kernels == blocks + 27 * (4 * 16 + 16 * 32 + 32 * 64 + 64 * 128) + 3 * 128 * 128
