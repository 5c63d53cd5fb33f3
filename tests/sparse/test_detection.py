"""The backbones of both detectors against the original code, and the formats of their weights."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.io.names.openpcdet import IGNORED, backbone_rules, bev_rules, from_spconv, to_spconv
from lumen.io.pretrained import from_original, to_original
from lumen.layers import Statistic
from lumen.sparse.convolution import to_dense
from lumen.sparse.detection import (
    BackboneConfig,
    BEVBackbone,
    BEVConfig,
    SparseBackbone,
    UpsampleBlock,
    VoxelGrid,
    backbone_maps,
    height_compression,
)
from lumen.sparse.tensor import CapacityError, SparseTensor, check_capacity, from_numpy

# Of the goldens: float32 sums of up to 27 x 32 terms through some 20 layers.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
STAGES = ("x_conv1", "x_conv2", "x_conv3", "x_conv4", "out")


def split(tensors):
    """Published tensors of the sparse and of the 2-D backbone."""
    sparse = {name: value for name, value in tensors.items() if not name.startswith("bev2d.")}
    return sparse, {name: value for name, value in tensors.items() if name.startswith("bev2d.")}


@pytest.fixture(scope="module", params=["second_backbone", "centerpoint_backbone"])
def original(golden, request):
    """A golden file, the models with its weights, and what they make of its input, in evaluation and in training."""
    record = golden(f"torchsparse/{request.param}")
    residual = request.param == "centerpoint_backbone"
    config = BackboneConfig(
        widths=(4, 8, 16, 32 if residual else 16), outputs=32, residual=residual, level_fractions=(2.3, 1.4, 0.35, 0.2)
    )
    b = record.meta["config"]["bev2d"]
    names = ("LAYER_NUMS", "LAYER_STRIDES", "NUM_FILTERS", "UPSAMPLE_STRIDES", "NUM_UPSAMPLE_FILTERS")
    bev_config = BEVConfig(*(tuple(b[name]) for name in names))
    sparse, dense = split(record.weights())
    backbone = from_original(
        sparse,
        nnx.eval_shape(lambda: SparseBackbone(config, rngs=nnx.Rngs(0))),
        backbone_rules(theirs="", ours=""),
        IGNORED,
    )
    bev = from_original(
        dense,
        nnx.eval_shape(lambda: BEVBackbone(bev_config, 64, rngs=nnx.Rngs(0))),
        bev_rules(theirs="bev2d.", ours=""),
        IGNORED,
    )
    x = from_numpy(
        record["in/feats"],
        record["in/coords"],
        spatial_shape=record.meta["config"]["sparse_shape_zyx"],
        batch_size=3,
        capacity=768,
    )

    @jax.jit
    def run(backbone, bev, x):
        maps = backbone_maps(x.sites, config)
        features = backbone(x, maps)
        picture = height_compression(features[-1])
        trained = backbone(x, maps, train=True)[-1]
        height, width = record.meta["config"]["bev_crop_for_2d"]
        return features, picture, bev(picture[:, :height, :width]), trained, nnx.state(backbone, Statistic)

    features, picture, bev_features, trained, statistics = run(nnx.clone(backbone), bev, x)
    moved = nnx.clone(backbone)
    nnx.update(moved, statistics)
    return types.SimpleNamespace(**locals())


def rows(x: SparseTensor):
    """Coordinates and features in use, by coordinate."""
    count = int(x.sites.count)
    coordinates, features = np.asarray(x.sites.coordinates[:count]), np.asarray(x.features[:count])
    order = np.lexsort(coordinates.T[::-1])
    return coordinates[order], features[order]


def test_every_level(original):
    check_capacity({name: x.sites for name, x in zip(STAGES, original.features, strict=True)})
    for name, x in zip(STAGES, original.features, strict=True):
        coordinates, features = original.record[f"out/eval/{name}_coords"], original.record[f"out/eval/{name}_feats"]
        order = np.lexsort(coordinates.T[::-1])
        got = rows(x)
        np.testing.assert_array_equal(got[0], coordinates[order], err_msg=name)
        np.testing.assert_allclose(got[1], features[order], **CLOSE, err_msg=name)


def test_picture_and_2d_backbone(original):
    np.testing.assert_allclose(np.moveaxis(original.picture, -1, 1), original.record["out/eval/bev"], **CLOSE)
    np.testing.assert_allclose(np.moveaxis(original.bev_features, -1, 1), original.record["out/eval/bev_2d"], **CLOSE)


def test_training_mode(original):
    coordinates = original.record["out/eval/out_coords"]
    order = np.lexsort(coordinates.T[::-1])
    # Statistics of a hundred rows: 2e-3 and 2e-4, as for the other goldens in training.
    np.testing.assert_allclose(
        rows(original.trained)[1], original.record["out/train/out_feats"][order], rtol=2e-3, atol=2e-4
    )
    got = to_original(original.moved, backbone_rules(theirs="", ours=""))
    want = original.record.weights("out/train/new/")
    assert len(want) == 2 * len([name for name in got if name.endswith("running_mean")])
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("layout", ["krsc", "spconv1"])
def test_weights_come_back_as_they_went_in(original, layout):
    tensors = original.sparse
    if layout == "spconv1":
        tensors = {n: np.moveaxis(a, 0, -1) if a.ndim == 5 else a for n, a in tensors.items()}
    rules = backbone_rules(layout, theirs="", ours="")
    model = from_original(tensors, jax.eval_shape(lambda: original.backbone), rules, IGNORED)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model, original.backbone)
    assert jax.tree.all(same)
    written = to_original(model, rules)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_weights_of_the_2d_backbone_come_back_as_they_went_in(original):
    written = to_original(original.bev, bev_rules(theirs="bev2d.", ours=""))
    assert written.keys() == original.dense.keys()
    for name, value in original.dense.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_a_level_that_overflows_is_named(original):
    small = BackboneConfig(level_fractions=(1.3, 1.4, 0.35, 0.2))
    maps = jax.jit(lambda sites: backbone_maps(sites, small).levels)(original.x.sites)
    count = len(original.record["out/eval/x_conv2_coords"])
    with pytest.raises(CapacityError, match=f"level 2 has {count} and a capacity of 1024"):
        check_capacity(maps)


def test_spconv_layouts():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 3, 1, 2, 4)).astype(np.float32)  # [out, z, y, x, in]
    kernel = from_spconv(weight)
    assert kernel.shape == (3, 1, 2, 4, 5)
    assert kernel[2, 0, 1, 3, 4] == weight[4, 2, 0, 1, 3]
    np.testing.assert_array_equal(to_spconv(kernel), weight)
    np.testing.assert_array_equal(to_spconv(from_spconv(kernel, "spconv1"), "spconv1"), kernel)
    # A window of one site: the memory of [out, 1, 1, 1, in], read row by row, is the matrix [in, out].
    single = rng.standard_normal((5, 1, 1, 1, 4)).astype(np.float32)
    got = from_spconv(single)
    assert got.shape == (1, 1, 1, 4, 5)
    assert got[0, 0, 0, 2, 3] == single.reshape(-1)[2 * 5 + 3]
    np.testing.assert_array_equal(to_spconv(got), single)
    with pytest.raises(ValueError, match=r"weight \[5, 4\]"):
        from_spconv(np.zeros((5, 4)))
    with pytest.raises(ValueError, match="layout='rsck'"):
        to_spconv(kernel, "rsck")  # type: ignore[arg-type]


def test_height_compression_keeps_channels_together():
    coordinates = np.array([[0, 0, 1, 2], [0, 1, 1, 2], [1, 1, 0, 0]])
    x = from_numpy(np.array([[1.0, 2], [3, 4], [5, 6]]), coordinates, spatial_shape=(2, 2, 3), batch_size=2)
    picture = height_compression(x)
    assert picture.shape == (2, 2, 3, 4)
    assert picture[0, 1, 2].tolist() == [1, 3, 2, 4]  # channel 0 of both layers, then channel 1
    assert picture[1, 0, 0].tolist() == [0, 5, 0, 6]
    assert to_dense(x).sum() == picture.sum()


def test_upsampling_lays_windows_side_by_side():
    block = UpsampleBlock(2, 3, 2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).uniform(0, 1, (1, 2, 3, 2)).astype(np.float32)
    want = np.zeros((1, 4, 6, 3))
    for h in range(4):
        for w in range(6):
            want[0, h, w] = x[0, h // 2, w // 2] @ np.asarray(block.kernel[...])[h % 2, w % 2]
    # Of a fresh norm: division by sqrt(1 + eps).
    np.testing.assert_allclose(block(x, train=False), np.maximum(want, 0) / np.sqrt(1.001), atol=1e-6)


def test_grids():
    grid = VoxelGrid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.075, 0.075, 0.2))
    assert grid.cells == (1440, 1440, 40)
    assert grid.spatial_shape == (41, 1440, 1440)
    assert grid.picture.shape == (180, 180)
    with pytest.raises(ValueError, match=r"\(80, 4, 80\) voxels along x, y and z"):
        VoxelGrid((0.0, 0.0, 0.0), (8.0, 0.4, 8.0), (0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="wanted three numbers each"):
        VoxelGrid((0.0, 0.0), (8.0, 0.4), (0.1, 0.1))


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match=r"widths=\(1, 2\); wanted 4 numbers"):
        BackboneConfig(widths=(1, 2))
    with pytest.raises(ValueError, match=r"level_fractions=\(1.5,\); wanted 4 numbers above 0"):
        BackboneConfig(level_fractions=(1.5,))
    with pytest.raises(ValueError, match="wanted as many entries everywhere"):
        BEVConfig(layers=(5, 5, 5))
    with pytest.raises(ValueError, match="back at the size of the input"):
        BEVConfig(upsample_strides=(1, 1))
    bev = BEVBackbone(BEVConfig((1, 1), (1, 2), (2, 2), (1, 2), (2, 2)), 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a picture of 5 x 4 pixels; wanted multiples of 2"):
        bev(jnp.zeros((1, 5, 4, 3)))
