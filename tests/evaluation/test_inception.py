"""The FID network against a NumPy network written from the published torch names and layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lumen.evaluation import inception
from lumen.io import pretrained
from lumen.io.names import inception as names

# --- The architecture once more, from pytorch-fid's constructors: {convolution: (in, out, window)} --------------------

STEM = {
    "Conv2d_1a_3x3": (3, 32, (3, 3)),
    "Conv2d_2a_3x3": (32, 32, (3, 3)),
    "Conv2d_2b_3x3": (32, 64, (3, 3)),
    "Conv2d_3b_1x1": (64, 80, (1, 1)),
    "Conv2d_4a_3x3": (80, 192, (3, 3)),
}


def block_a(c, pool):
    return {
        "branch1x1": (c, 64, (1, 1)),
        "branch5x5_1": (c, 48, (1, 1)),
        "branch5x5_2": (48, 64, (5, 5)),
        "branch3x3dbl_1": (c, 64, (1, 1)),
        "branch3x3dbl_2": (64, 96, (3, 3)),
        "branch3x3dbl_3": (96, 96, (3, 3)),
        "branch_pool": (c, pool, (1, 1)),
    }


def block_b(c):
    return {
        "branch3x3": (c, 384, (3, 3)),
        "branch3x3dbl_1": (c, 64, (1, 1)),
        "branch3x3dbl_2": (64, 96, (3, 3)),
        "branch3x3dbl_3": (96, 96, (3, 3)),
    }


def block_c(c, c7):
    return {
        "branch1x1": (c, 192, (1, 1)),
        "branch7x7_1": (c, c7, (1, 1)),
        "branch7x7_2": (c7, c7, (1, 7)),
        "branch7x7_3": (c7, 192, (7, 1)),
        "branch7x7dbl_1": (c, c7, (1, 1)),
        "branch7x7dbl_2": (c7, c7, (7, 1)),
        "branch7x7dbl_3": (c7, c7, (1, 7)),
        "branch7x7dbl_4": (c7, c7, (7, 1)),
        "branch7x7dbl_5": (c7, 192, (1, 7)),
        "branch_pool": (c, 192, (1, 1)),
    }


def block_d(c):
    return {
        "branch3x3_1": (c, 192, (1, 1)),
        "branch3x3_2": (192, 320, (3, 3)),
        "branch7x7x3_1": (c, 192, (1, 1)),
        "branch7x7x3_2": (192, 192, (1, 7)),
        "branch7x7x3_3": (192, 192, (7, 1)),
        "branch7x7x3_4": (192, 192, (3, 3)),
    }


def block_e(c):
    return {
        "branch1x1": (c, 320, (1, 1)),
        "branch3x3_1": (c, 384, (1, 1)),
        "branch3x3_2a": (384, 384, (1, 3)),
        "branch3x3_2b": (384, 384, (3, 1)),
        "branch3x3dbl_1": (c, 448, (1, 1)),
        "branch3x3dbl_2": (448, 384, (3, 3)),
        "branch3x3dbl_3a": (384, 384, (1, 3)),
        "branch3x3dbl_3b": (384, 384, (3, 1)),
        "branch_pool": (c, 192, (1, 1)),
    }


BLOCKS = {
    "Mixed_5b": block_a(192, 32),
    "Mixed_5c": block_a(256, 64),
    "Mixed_5d": block_a(288, 64),
    "Mixed_6a": block_b(288),
    "Mixed_6b": block_c(768, 128),
    "Mixed_6c": block_c(768, 160),
    "Mixed_6d": block_c(768, 160),
    "Mixed_6e": block_c(768, 192),
    "Mixed_7a": block_d(768),
    "Mixed_7b": block_e(1280),
    "Mixed_7c": block_e(2048),
}
CONVOLUTIONS = STEM | {f"{block}.{name}": shape for block, inner in BLOCKS.items() for name, shape in inner.items()}


def published_shapes():
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, (c_in, c_out, window) in CONVOLUTIONS.items():
        shapes[f"{name}.conv.weight"] = (c_out, c_in, *window)
        shapes |= {f"{name}.bn.{part}": (c_out,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def random_weights(rng):
    """Random weights whose normalisation fits them, so that features depend on the image as after training."""
    weights = {}
    for name, shape in published_shapes().items():
        value = rng.standard_normal(shape, np.float32)
        if name.endswith("conv.weight"):
            # Output deviations from 0.01 to 1: variances down to 1e-4, where the epsilon of 1e-3 counts.
            value *= 10 ** rng.uniform(-2, 0, (shape[0], 1, 1, 1)) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("bn.weight"):
            value = rng.uniform(0.7, 1.4, shape)
        elif name == "fc.weight":
            value /= np.sqrt(2048)
        else:
            value *= 0.3
        weights[name] = value.astype(np.float32)
    image = inception.resize_tf1(rng.integers(0, 256, (1, 24, 17, 3)))[0]  # as smooth as the images of the tests
    forward(weights, np.asarray(image, np.float64), fit_normalisation=True)
    return weights


# --- The network once more, in NumPy float64, on one image [H, W, C] --------------------------------------------------


def windows(x, window, stride, pad, fill):
    x = np.pad(x, ((pad[0],) * 2, (pad[1],) * 2, (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, window, axis=(0, 1))[::stride, ::stride]  # [H', W', C, h, w]


def pool(x, kind, stride=1, pad=1):
    if kind == "max":
        return windows(x, (3, 3), stride, (pad, pad), -np.inf).max(axis=(3, 4))
    total = windows(x, (3, 3), stride, (pad, pad), 0).sum(axis=(3, 4))
    return total / windows(np.ones_like(x), (3, 3), stride, (pad, pad), 0).sum(axis=(3, 4))


def forward(weights, image, fit_normalisation=False):
    """(pool, spatial, logits) of a resized image float64 [299, 299, 3], values 0 ... 255."""

    def conv(x, name, stride=1, same=True):
        kernel = weights[f"{name}.conv.weight"].astype(np.float64)
        pad = [size // 2 if same else 0 for size in kernel.shape[2:]]
        x = np.tensordot(windows(x, kernel.shape[2:], stride, pad, 0), kernel, axes=([2, 3, 4], [1, 2, 3]))
        if fit_normalisation:
            weights[f"{name}.bn.running_mean"] = x.mean(axis=(0, 1)).astype(np.float32)
            weights[f"{name}.bn.running_var"] = x.var(axis=(0, 1)).astype(np.float32)
        mean, var, gamma, beta = (
            weights[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return np.maximum((x - mean) / np.sqrt(var + 0.001) * gamma + beta, 0)

    def chain(x, block, *branches):
        for branch in branches:
            x = conv(x, f"{block}.{branch}")
        return x

    def join(*parts):
        return np.concatenate(parts, axis=-1)

    x = (image - 128) / 128
    x = conv(x, "Conv2d_1a_3x3", stride=2, same=False)
    x = conv(conv(x, "Conv2d_2a_3x3", same=False), "Conv2d_2b_3x3")
    x = pool(x, "max", stride=2, pad=0)
    x = conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False)
    x = pool(x, "max", stride=2, pad=0)
    assert x.shape == (35, 35, 192)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = join(
            chain(x, b, "branch1x1"),
            chain(x, b, "branch5x5_1", "branch5x5_2"),
            chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            chain(pool(x, "average"), b, "branch_pool"),
        )
    double = conv(chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2"), "Mixed_6a.branch3x3dbl_3", 2, False)
    x = join(conv(x, "Mixed_6a.branch3x3", 2, False), double, pool(x, "max", stride=2, pad=0))
    assert x.shape == (17, 17, 768)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        first = chain(x, b, "branch1x1")
        if b == "Mixed_6d":
            spatial = first[..., :7].ravel()
        x = join(
            first,
            chain(x, b, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
            chain(x, b, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
            chain(pool(x, "average"), b, "branch_pool"),
        )
    seven = chain(x, "Mixed_7a", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    x = join(
        conv(chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2, False),
        conv(seven, "Mixed_7a.branch7x7x3_4", 2, False),
        pool(x, "max", stride=2, pad=0),
    )
    assert x.shape == (8, 8, 1280)
    for b, kind in (("Mixed_7b", "average"), ("Mixed_7c", "max")):
        three = chain(x, b, "branch3x3_1")
        double = chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2")
        x = join(
            chain(x, b, "branch1x1"),
            chain(three, b, "branch3x3_2a"),
            chain(three, b, "branch3x3_2b"),
            chain(double, b, "branch3x3dbl_3a"),
            chain(double, b, "branch3x3dbl_3b"),
            chain(pool(x, kind), b, "branch_pool"),
        )
    features = x.mean(axis=(0, 1))
    return features, spatial, weights["fc.weight"].astype(np.float64) @ features


def resize(image, height, width):
    """The definition, pixel by pixel."""
    out = np.empty((height, width, image.shape[2]))
    for i in range(height):
        for j in range(width):
            y, x = i * image.shape[0] / height, j * image.shape[1] / width
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            y, x = y - top, x - left
            upper = (1 - x) * image[top, left] + x * image[top, right]
            lower = (1 - x) * image[bottom, left] + x * image[bottom, right]
            out[i, j] = (1 - y) * upper + y * lower
    return out


@pytest.fixture(scope="module")
def weights():
    return random_weights(np.random.default_rng(0))


@pytest.fixture(scope="module")
def model(weights):
    counters = {f"{name}.bn.num_batches_tracked": np.int64(0) for name in CONVOLUTIONS}
    abstract = jax.eval_shape(lambda: inception.InceptionV3(rngs=nnx.Rngs(0)))
    return pretrained.from_original(weights | counters, abstract, names.RULES, names.IGNORED)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 24, 17, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def features(model, images):
    """Three images in batches of two: the second batch is filled up."""
    return inception.feature_extractor(model, batch_size=2)(images)


# --- Tests ------------------------------------------------------------------------------------------------------------


def test_resize_enlarges_without_half_pixel_centres():
    row = jnp.asarray([[0.0, 10.0], [100.0, 200.0]])[None, :, :, None]
    got = inception.resize_tf1(row, 4, 4)[0, :, :, 0]
    # Positions 0, 0.5, 1, 1.5: the last lies past the last pixel and repeats it. (Half-pixel centres would start at
    # -0.25.)
    want = [[0, 5, 10, 10], [50, 77.5, 105, 105], [100, 150, 200, 200], [100, 150, 200, 200]]
    np.testing.assert_array_equal(got, np.asarray(want, np.float32))


def test_resize_shrinks_without_averaging():
    column = jnp.asarray([1.0, 99.0, 3.0, 99.0, 5.0, 99.0])[None, :, None, None]
    np.testing.assert_array_equal(inception.resize_tf1(column, 3, 1)[0, :, 0, 0], [1, 3, 5])


@pytest.mark.parametrize("shape", [(8, 8), (24, 17), (40, 64), (1, 1)])
def test_resize_matches_definition(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    got = inception.resize_tf1(image[None], 31, 29)[0]
    # Positions up to 64 in float32 are off by 64 * 2**-24, times differences of up to 255.
    np.testing.assert_allclose(got, resize(image.astype(np.float64), 31, 29), atol=64 * 2**-24 * 255 * 2)


def test_same_size_is_identity():
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    np.testing.assert_array_equal(inception.resize_tf1(image), image)


def test_names_and_sizes_are_the_published_ones(weights, model):
    back = pretrained.to_original(model, names.RULES)
    assert {name: value.shape for name, value in back.items()} == published_shapes()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)


def test_parameter_count(weights):
    # Keras publishes 23,851,784 for its Inception-v3: 1000 classes, no gamma. Ours: 1008 classes, 17,216 gammas.
    assert sum(value.size for value in weights.values()) == 23_851_784 + 8 * (2048 + 1) + 17_216
    assert len(CONVOLUTIONS) == 94
    assert len(weights) == 94 * 5 + 2


def test_network_matches_numpy(weights, images, features):
    # The third image was alone in its batch, the first was not.
    for index in (0, 2):
        resized = np.asarray(inception.resize_tf1(images[index : index + 1])[0], np.float64)
        for name, want in zip(inception.InceptionFeatures._fields, forward(weights, resized), strict=True):
            got = getattr(features, name)[index]
            # float32 against float64 through 48 layers of sums of up to 3456 terms: errors add like a random walk,
            # sqrt(48 * 3456) * 2**-24 = 2.4e-5 of the features' scale; eight of them. A wrong pool is off by 0.2.
            np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), err_msg=name)
            assert got.dtype == np.float32


def test_features_are_told_apart(features):
    assert [x.shape for x in features] == [(3, 2048), (3, 2023), (3, 1008)]
    for x in features:
        # What the comparison above resolves is far finer than what the images differ by.
        assert np.abs(x[0] - x[2]).max() > 0.01 * np.abs(x).max()


def test_logits_with_and_without_bias(weights, model, features):
    pool_features = jnp.asarray(features.pool)
    without, with_bias = model.logits(pool_features), model.logits(pool_features, bias=True)
    # Sums of 2048 terms: 2**-24 * sqrt(2048) of their scale, twice.
    tolerance = 1e-5 * np.abs(with_bias).max()
    np.testing.assert_allclose(without, features.logits, atol=tolerance)
    np.testing.assert_allclose(with_bias - without, np.tile(weights["fc.bias"], (3, 1)), atol=tolerance)


def test_load_inception(tmp_path, weights, model):
    path = tmp_path / "weights.npz"
    np.savez(path, **weights)
    loaded = inception.load_inception(path)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(FileNotFoundError, match=r"nothing is downloaded here.*pt_inception-2015-12-05"):
        inception.load_inception(tmp_path / "absent.pth")


def test_load_inception_lists_what_does_not_fit(tmp_path):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in published_shapes().items()}
    del tensors["Mixed_6d.branch1x1.conv.weight"]
    # What a later model zoo's file has:
    others = {"fc.weight": np.zeros((1000, 2048), np.float32), "AuxLogits.fc.bias": np.zeros(1000, np.float32)}
    save_file(tensors | others, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="3 mismatches") as error:
        inception.load_inception(tmp_path / "other.safetensors")
    for name in ("Mixed_6d.branch1x1.conv.weight", "fc.weight", "AuxLogits.fc.bias"):
        assert name in str(error.value)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_extractor_wants_uint8_batches(model, images):
    with pytest.raises(ValueError, match=r"wanted uint8 \[n, H, W, 3\]"):
        inception.feature_extractor(model)(images)
