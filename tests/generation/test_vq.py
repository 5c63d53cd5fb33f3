"""The VQ tokenizer against LlamaGen's outputs, and its losses against their equations in NumPy."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.generation.perceptual import LPIPS, load_lpips
from lumen.generation.vq import (
    LossWeights,
    PatchDiscriminator,
    ResidualBlock,
    Upsample,
    VQConfig,
    VQModel,
    code_frequencies,
    discriminator_loss,
    entropy_loss,
    revive,
    to_uint8,
    vq_loss,
)
from lumen.io.names.vq import IGNORED, RULES
from lumen.io.pretrained import from_original, to_original

# From the goldens' README; float32 sums of up to 576 terms through some 30 layers.
FEATURES = {"atol": 2e-4, "rtol": 2e-4}
IMAGE = {"atol": 5e-4, "rtol": 5e-4}


@pytest.fixture(scope="module")
def original(golden):
    """The golden files and the model with their weights: the encoder's are in one file, the decoder's in the other."""
    encode, decode = golden("vq16/encode"), golden("vq16/decode")
    c = encode.meta["config"]
    config = VQConfig(
        channels=c["ch"],
        channel_multipliers=tuple(c["ch_mult"]),
        encoder_blocks=c["num_res_blocks_encoder"],
        decoder_blocks=c["num_res_blocks_decoder"],
        latent_channels=c["z_channels"],
        codebook_size=c["codebook_size"],
        code_dim=c["codebook_embed_dim"],
        groups=c["group_norm_groups"],
    )
    assert config.stride == c["stride"]
    tensors = encode.weights() | decode.weights() | {"quantize.codebook_used": np.zeros(65536, np.float32)}
    return (
        from_original(tensors, jax.eval_shape(lambda: VQModel(config, rngs=nnx.Rngs(0))), RULES, IGNORED),
        encode,
        decode,
    )


def new_model(config, seed):
    """A model with random weights everywhere: the zero biases and unit scales of a fresh one would hide a missing term.

    Drawn by NumPy, which spares compiling the initialisers.
    """
    rng = np.random.default_rng(seed)

    def draw(x):
        scale, offset = (0.1, 0.5) if x.ndim == 1 else (np.prod(x.shape[:-1]) ** -0.5, 0.0)
        return jnp.asarray(offset + scale * rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(draw, jax.eval_shape(lambda: VQModel(config, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def small():
    """A small model, three images and what the model makes of them."""
    model = new_model(VQConfig.debug(), 1)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)

    @jax.jit
    def run(model):
        latents = model.latents(images)
        quantized = model.quantize(latents)
        return latents, quantized, model.decode(quantized.latents)

    return types.SimpleNamespace(
        model=model, images=images, **dict(zip(("latents", "quantized", "reconstruction"), run(model), strict=True))
    )


@pytest.fixture(scope="module")
def tiny():
    """The smallest complete model, one level at full resolution, and two images: for gradients of everything."""
    sizes = {"channels": 4, "channel_multipliers": (1,), "encoder_blocks": 1, "decoder_blocks": 1, "groups": 2}
    model = new_model(VQConfig(**sizes, latent_channels=4, codebook_size=8, code_dim=4), 3)
    return model, np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def discriminator():
    return PatchDiscriminator(2, layers=1, rngs=nnx.Rngs(0))


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def check_features(features, record):
    """Compares with recorded features, some of which hold only the first sample's first 8 channels."""
    for name, got in features.items():
        want = nhwc(record[f"out/features/{name}"])
        np.testing.assert_allclose(got[: want.shape[0], ..., : want.shape[-1]], want, **FEATURES, err_msg=name)


class TestGoldens:
    def test_encoder_features(self, original):
        model, record, _ = original
        features = jax.jit(self.encoder_features)(model, nhwc(record["in/image"]))
        check_features(features, record)

    @staticmethod
    def encoder_features(model, images):
        encoder, features = model.encoder, {}
        h = features["encoder.conv_in"] = encoder.conv_in(images)
        features["encoder.conv_blocks.0.res.0"] = encoder.levels[0].blocks[0](h)
        h = features["encoder.conv_blocks.0.downsample"] = encoder.downsamples[0](encoder.levels[0](h))
        h = encoder.downsamples[1](encoder.levels[1](h))
        block = features["encoder.conv_blocks.2.res.0"] = encoder.levels[2].blocks[0](h)
        features["encoder.conv_blocks.2.attn.0"] = encoder.levels[2].attentions[0](block)
        features["encoder.mid.1"] = encoder.middle.attention(encoder.middle.block1(encoder.levels[2](h)))
        features["encoder"] = encoder(images)
        features["quant_conv"] = model.latents(images)
        return features

    def test_encode(self, original):
        model, record, _ = original
        codes, latents = jax.jit(lambda model, x: model.encode(x))(model, nhwc(record["in/image"]))
        assert codes.dtype == jnp.int32
        np.testing.assert_array_equal(codes, record["out/indices"])
        np.testing.assert_allclose(latents, nhwc(record["out/features/quant_conv"]), **FEATURES)
        np.testing.assert_allclose(
            model.lookup(codes).reshape(latents.shape), nhwc(record["out/quantised"]), atol=1e-6
        )  # float32 rounding of a unit vector

    def test_quantiser_terms(self, original):
        model, record, _ = original
        quantized = model.quantize(nhwc(record["out/features/quant_conv"]))
        np.testing.assert_array_equal(quantized.codes, record["out/indices"])
        np.testing.assert_allclose(quantized.latents, nhwc(record["out/quantised"]), atol=1e-6)
        beta = LossWeights().commitment
        np.testing.assert_allclose(quantized.codebook, record["out/vq_loss"], rtol=1e-4)
        np.testing.assert_allclose(beta * quantized.commitment, record["out/commit_loss"], rtol=1e-4)
        np.testing.assert_allclose(quantized.entropy, record["out/entropy_loss_unscaled"], rtol=1e-4)

    def test_decoder_features(self, original):
        model, _, record = original
        codes = model.lookup(record["in/indices"].reshape(-1, *record["in/grid"]))
        np.testing.assert_allclose(codes, nhwc(record["out/codes"]), atol=1e-6)
        check_features(jax.jit(self.decoder_features)(model, codes), record)

    @staticmethod
    def decoder_features(model, codes):
        decoder, features = model.decoder, {}
        h = features["post_quant_conv"] = model.from_code(codes)
        h = features["decoder.conv_in"] = decoder.conv_in(h)
        features["decoder.mid.1"] = decoder.middle.attention(decoder.middle.block1(h))
        h = decoder.middle(h)
        features["decoder.conv_blocks.0.res.0"] = decoder.levels[0].blocks[0](h)
        h = features["decoder.conv_blocks.0.attn.2"] = decoder.levels[0](h)
        h = features["decoder.conv_blocks.0.upsample"] = decoder.upsamples[0](h)
        h = features["decoder.conv_blocks.2.res.2"] = decoder.levels[2](decoder.upsamples[1](decoder.levels[1](h)))
        features["decoder.norm_out"] = decoder.norm_out(h)
        return features

    def test_decode(self, original):
        model, _, record = original
        grid = tuple(record["in/grid"].tolist())
        images = jax.jit(lambda model, codes: model.decode_codes(codes, grid=grid))(model, record["in/indices"])
        np.testing.assert_allclose(images, nhwc(record["out/image"]), **IMAGE)
        pixels, want = to_uint8(images), record["out/uint8"]
        assert pixels.dtype == jnp.uint8
        value = 127.5 * (nhwc(record["out/image"]) + 1)
        # Off by one only where the float tolerance, 127.5 * (5e-4 + 5e-4 |x|), reaches the next rounding boundary.
        slack = 127.5 * (IMAGE["atol"] + IMAGE["rtol"] * np.abs(nhwc(record["out/image"])))
        near_boundary = np.abs(value - np.floor(value) - 0.5) < slack
        difference = np.abs(pixels.astype(np.int32) - want.astype(np.int32))
        assert difference.max() <= 1
        assert not np.any((difference == 1) & ~near_boundary)

    def test_forward_is_encode_then_decode(self, original):
        model, record, _ = original
        images = nhwc(record["in/image"])
        reconstruction, quantized = jax.jit(lambda model, x: model(x))(model, images)
        np.testing.assert_array_equal(quantized.codes, record["out/indices"])
        # z + (e - z) differs from e by the rounding of a unit vector, amplified by the decoder.
        decoded = jax.jit(lambda model, codes: model.decode_codes(codes, grid=(8, 8)))(model, quantized.codes)
        np.testing.assert_allclose(reconstruction, decoded, **IMAGE)


def published_shapes():
    """Every tensor of vq_ds16_c2i.pt: specs/lpd.md section 4.2, written out."""
    shapes = {}

    def add(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def residual(name, inputs, outputs):
        add(f"{name}.norm1", inputs)
        add(f"{name}.conv1", outputs, inputs, 3, 3)
        add(f"{name}.norm2", outputs)
        add(f"{name}.conv2", outputs, outputs, 3, 3)

    def attention(name):
        add(f"{name}.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", 512, 512, 1, 1)

    encoder, decoder = "encoder.conv_blocks", "decoder.conv_blocks"
    add("encoder.conv_in", 128, 3, 3, 3)
    for i, (inputs, width) in enumerate([(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]):
        residual(f"{encoder}.{i}.res.0", inputs, width)
        residual(f"{encoder}.{i}.res.1", width, width)
        if i < 4:
            add(f"{encoder}.{i}.downsample.conv", width, width, 3, 3)
    add(f"{encoder}.2.res.0.nin_shortcut", 256, 128, 1, 1)
    add(f"{encoder}.4.res.0.nin_shortcut", 512, 256, 1, 1)
    attention(f"{encoder}.4.attn.0")
    attention(f"{encoder}.4.attn.1")
    for half in ("encoder", "decoder"):
        residual(f"{half}.mid.0", 512, 512)
        attention(f"{half}.mid.1")
        residual(f"{half}.mid.2", 512, 512)
    add("encoder.norm_out", 512)
    add("encoder.conv_out", 256, 512, 3, 3)
    add("decoder.conv_in", 512, 256, 3, 3)
    for i, (inputs, width) in enumerate([(512, 512), (512, 256), (256, 256), (256, 128), (128, 128)]):
        residual(f"{decoder}.{i}.res.0", inputs, width)
        residual(f"{decoder}.{i}.res.1", width, width)
        residual(f"{decoder}.{i}.res.2", width, width)
        if i < 4:
            add(f"{decoder}.{i}.upsample.conv", width, width, 3, 3)
    for j in range(3):
        attention(f"{decoder}.0.attn.{j}")
    add(f"{decoder}.1.res.0.nin_shortcut", 256, 512, 1, 1)
    add(f"{decoder}.3.res.0.nin_shortcut", 128, 256, 1, 1)
    add("decoder.norm_out", 128)
    add("decoder.conv_out", 3, 128, 3, 3)
    add("quant_conv", 8, 256, 1, 1)
    add("post_quant_conv", 256, 8, 1, 1)
    shapes["quantize.embedding.weight"] = (16384, 8)
    return shapes


class TestPublishedWeights:
    def test_table_covers_vq16(self):
        shapes = published_shapes()
        assert round(sum(np.prod(shape) for shape in shapes.values()) / 1e6, 1) == 71.9
        abstract = jax.eval_shape(lambda: VQModel(VQConfig.vq16(), rngs=nnx.Rngs(0)))
        # Broadcast zeros take no memory; any missing, extra or misshapen name raises.
        tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        from_original(tensors | {"quantize.codebook_used": np.zeros(65536, np.float32)}, abstract, RULES, IGNORED)

    def test_round_trip(self, original):
        model, encode, decode = original
        written = to_original(model, RULES)
        for name, tensor in (encode.weights() | decode.weights()).items():
            np.testing.assert_array_equal(written.pop(name), tensor, err_msg=name)
        assert not written


class TestQuantiser:
    def test_codes_are_the_nearest_in_float64(self):
        model = new_model(VQConfig.debug(codebook_size=100, code_dim=8), 2)
        latents = np.random.default_rng(1).normal(size=(2, 5, 7, 8)).astype(np.float32)
        z, e = np.float64(latents.reshape(-1, 1, 8)), np.float64(model.codebook[...])
        z, e = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, e))
        distances = ((z - e) ** 2).sum(-1)
        ordered = np.sort(distances, axis=-1)
        assert (ordered[:, 1] - ordered[:, 0]).min() > 1e-5  # no tie within float32 rounding
        quantized = model.quantize(latents)
        np.testing.assert_array_equal(quantized.codes.ravel(), distances.argmin(-1))
        # The mean over D entries of the squared distance is distance / D.
        np.testing.assert_allclose(quantized.codebook, ordered[:, 0].mean() / 8, rtol=1e-5)

    def test_latent_length_does_not_matter(self, small):
        codes = small.model.quantize(100 * small.latents).codes
        np.testing.assert_array_equal(codes, small.quantized.codes)

    def test_lookup_has_unit_length(self, small):
        rows = small.model.lookup(jnp.arange(32))
        np.testing.assert_allclose(jnp.linalg.norm(rows, axis=-1), 1, rtol=1e-6)
        assert jnp.linalg.norm(small.model.codebook[...], axis=-1).max() < 0.9  # the parameters have not

    def test_straight_through(self, small):
        """The decoder's gradient reaches the unit latent as if quantisation were the identity."""
        direction = np.random.default_rng(2).normal(size=small.latents.shape).astype(np.float32)
        got = jax.grad(lambda z: jnp.sum(small.model.quantize(z).latents * direction))(small.latents)
        want = jax.grad(lambda z: jnp.sum(z / jnp.linalg.norm(z, axis=-1, keepdims=True) * direction))(small.latents)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())

    def test_which_side_each_term_trains(self, small):
        for term, trains_codebook in (("codebook", True), ("commitment", False)):
            model, latents = jax.grad(lambda model, z, term=term: getattr(model.quantize(z), term), argnums=(0, 1))(
                small.model, small.latents
            )
            assert bool(jnp.any(model.codebook[...])) == trains_codebook
            assert bool(jnp.any(latents)) != trains_codebook

    def test_no_array_of_all_differences(self, small):
        """Comparing N latents to V codes never builds [N, V, D]."""
        jaxpr = jax.make_jaxpr(lambda z: small.model.quantize(z))(small.latents)
        largest = max(var.aval.size for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars)
        assert largest == small.quantized.codes.size * small.model.config.codebook_size

    def test_zero_latent_has_a_finite_gradient(self, small):
        grads = jax.grad(lambda z: small.model.quantize(z).commitment)(jnp.zeros((1, 1, 1, 4)))
        assert jnp.all(jnp.isfinite(grads))


class TestInitialisation:
    def test_weights(self):
        # The rbg generator compiles faster than the default one.
        model = VQModel(VQConfig.debug(channel_multipliers=(1, 2)), rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
        kernel, bias = model.encoder.middle.block1.conv1.kernel[...], model.encoder.middle.block1.conv1.bias[...]
        bound = (9 * 16) ** -0.5
        assert 0.95 * bound < jnp.abs(kernel).max() <= bound
        assert 0.5 * bound < jnp.abs(bias).max() <= bound
        np.testing.assert_allclose(jnp.std(kernel), bound / 3**0.5, rtol=0.05)  # 2304 draws: 1.5 % standard error
        rows = model.codebook[...]
        np.testing.assert_allclose(jnp.linalg.norm(rows, axis=-1), 1, rtol=1e-6)
        assert jnp.abs(rows.mean(0)).max() < 0.4  # 32 directions: standard deviation 0.5 / sqrt(32) = 0.09


class TestLayers:
    @pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 5, 4)])
    def test_upsample_is_repeat_then_convolution(self, shape):
        layer = Upsample(4, rngs=nnx.Rngs(0))
        x, direction = (
            jax.random.normal(jax.random.key(i), (b, h * i, w * i, c)) for i in (1, 2) for b, h, w, c in [shape]
        )

        @functools.partial(jax.jit, static_argnums=0)
        def value_and_gradients(apply, layer, x):
            y, pull_back = jax.vjp(apply, layer, x)
            return y, *pull_back(direction)

        direct = value_and_gradients(
            lambda layer, x: layer.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)), layer, x
        )
        # float32 sums of 36 products of order 1, or of one per position for the kernel's gradient.
        atol = max(36, direction.size) * 2**-23
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=atol),
            value_and_gradients(lambda layer, x: layer(x), layer, x),
            direct,
        )

    def test_downsample_pads_only_below_and_right(self, small):
        """A kernel that copies its top left tap sees no padding; one that copies its bottom right tap sees it last."""
        conv = small.model.encoder.downsamples[0]
        x = jax.random.normal(jax.random.key(0), (1, 6, 6, 8))

        def copy_tap(row, column):
            kernel = jnp.zeros((3, 3, 8, 8)).at[row, column].set(jnp.eye(8))
            graphdef, state = nnx.split(conv)
            state["kernel"], state["bias"] = kernel, jnp.zeros(8)
            return nnx.merge(graphdef, state)(x)

        np.testing.assert_array_equal(copy_tap(0, 0), x[:, ::2, ::2])
        np.testing.assert_array_equal(copy_tap(2, 2), jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 2::2, 2::2])

    def test_dropout_needs_a_key(self, tiny):
        block = ResidualBlock(dataclasses.replace(tiny[0].config, dropout=0.5), 4, 4, rngs=nnx.Rngs(0))
        x = jnp.asarray(tiny[1][..., :1] + jnp.arange(4.0))
        run = jax.jit(lambda key: block(x, key=key))
        a, again, b, plain = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1)), run(None)
        np.testing.assert_array_equal(a, again)
        assert jnp.any(a != b)
        assert jnp.any(a != plain)

    def test_every_block_drops_differently(self, tiny, monkeypatch):
        keys = []
        monkeypatch.setattr(ResidualBlock, "__call__", lambda self, x, *, key: keys.append(key) or x)
        tiny[0](tiny[1], key=jax.random.key(0))
        assert len(keys) == 6  # one block and two in the middle, for encoder and decoder
        assert len(np.unique([jax.random.key_data(key) for key in keys], axis=0)) == 6

    def test_bfloat16_parameters_give_bfloat16_images(self, small):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.model)
        decode = jax.jit(lambda model, codes: model.decode_codes(codes, grid=(4, 6)))
        want, got = (decode(model, small.quantized.codes) for model in (small.model, half))
        assert got.dtype == jnp.bfloat16
        # About 20 layers, each rounding to 2**-9 of values of order 1.
        assert jnp.sqrt(jnp.mean((got.astype(jnp.float32) - want) ** 2)) < 20 * 2**-9 * jnp.std(want)

    @pytest.mark.parametrize(("multipliers", "stride"), [((1,), 1), ((1, 2), 2), ((1, 1, 2, 2, 4), 16)])
    def test_shapes_at_other_strides(self, multipliers, stride):
        config = VQConfig(channels=4, channel_multipliers=multipliers, groups=2, latent_channels=6, codebook_size=5)
        assert config.stride == stride

        def run():
            model = VQModel(config, rngs=nnx.Rngs(0))
            codes, latents = model.encode(jnp.zeros((2, 3 * stride, 2 * stride, 3)))
            return codes, latents, model.decode_codes(codes, grid=(3, 2))

        shapes = [x.shape for x in jax.eval_shape(run)]
        assert shapes == [(2, 6), (2, 3, 2, 8), (2, 3 * stride, 2 * stride, 3)]


class TestErrors:
    def test_groups_must_divide_widths(self):
        with pytest.raises(ValueError, match=r"level widths \[16, 48\] are not multiples of groups=32; use groups=16"):
            VQConfig(channels=16, channel_multipliers=(1, 2, 3))

    def test_levels_must_exist(self):
        with pytest.raises(ValueError, match="channel_multipliers is empty"):
            VQConfig(channel_multipliers=())

    def test_images_must_fit_the_stride(self, small):
        with pytest.raises(ValueError, match="16 x 18 pixels; wanted multiples of the stride 4"):
            small.model.encode(jnp.zeros((1, 16, 18, 3)))

    def test_codes_must_fill_the_grid(self, small):
        with pytest.raises(ValueError, match="24 codes do not fill a grid of 4 x 4"):
            small.model.decode_codes(jnp.zeros((1, 24), int), grid=(4, 4))

    def test_discriminator_needs_a_step(self, tiny, discriminator):
        with pytest.raises(ValueError, match="a discriminator was given but no step"):
            vq_loss(*tiny, discriminator=discriminator)

    def test_discriminator_needs_large_images(self, discriminator):
        with pytest.raises(ValueError, match="images of 16 x 5 pixels, but 1 layers need sides of 6"):
            discriminator(jnp.zeros((1, 16, 5, 3)))


class TestPixelsAndUsage:
    def test_to_uint8(self):
        # 127.5 rounds to the even 128; 0.996 -> 254.49, 0.9962 -> 254.5155.
        values = jnp.array([-3.0, -1.0, 0.0, 0.996, 0.9962, 1.0, 7.0])
        np.testing.assert_array_equal(to_uint8(values), [0, 0, 128, 254, 255, 255, 255])

    def test_code_frequencies(self):
        np.testing.assert_array_equal(
            code_frequencies(jnp.array([[3, 3], [0, 7]]), 8), [0.25, 0, 0, 0.5, 0, 0, 0, 0.25]
        )


class TestRevive:
    def test_moves_only_dead_codes_onto_latents(self, small):
        # Evenly used: 1/32. Dead below a tenth of that: 1/320.
        frequencies = jnp.full(32, 1 / 32).at[3].set(1 / 321).at[7].set(0.0).at[9].set(1 / 319)
        revived, after = jax.jit(revive)(small.model, small.latents, frequencies, jax.random.key(0))
        old, new = np.asarray(small.model.codebook[...]), np.asarray(revived.codebook[...])
        assert np.flatnonzero(np.any(old != new, axis=1)).tolist() == [3, 7]
        units = np.asarray(small.latents / jnp.linalg.norm(small.latents, axis=-1, keepdims=True)).reshape(-1, 4)
        for row in new[[3, 7]]:
            assert np.abs(units - row).max(1).min() < 1e-6
        assert np.any(new[3] != new[7])
        np.testing.assert_array_equal(after, frequencies.at[jnp.array([3, 7])].set(1 / 32))
        before = nnx.to_pure_dict(nnx.state(small.model))
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, nnx.to_pure_dict(nnx.state(revived)))
        assert not same.pop("codebook")
        assert all(jax.tree.leaves(same))

    def test_repeats_under_the_same_key(self, small):
        a, b, c = (
            revive(small.model, small.latents, jnp.zeros(32), jax.random.key(seed))[0].codebook[...]
            for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(a, b)
        assert jnp.any(a != c)


class TestEntropyLoss:
    def test_extremes(self):
        """Sure and spread: -log V. Unsure: 0, whatever the spread. Sure of one code: 0."""
        size = 8
        sure = entropy_loss(2 * jnp.eye(size) - 2)
        # 1e-5 inside the logarithm changes log(1/8) by 8e-5.
        np.testing.assert_allclose(sure, -np.log(size), atol=1e-4)
        np.testing.assert_allclose(entropy_loss(jnp.zeros((5, size))), 0, atol=1e-4)
        np.testing.assert_allclose(entropy_loss(jnp.tile(jnp.eye(size)[:1], (5, 1))), 0, atol=1e-4)

    def test_equation(self):
        affinity = np.random.default_rng(0).uniform(-0.05, 0, (3, 4, 6))
        p = np.exp(affinity.reshape(12, 6) / 0.01)
        p /= p.sum(-1, keepdims=True)
        mean = p.mean(0)
        want = -(p * np.log(p)).sum(-1).mean() + (mean * np.log(mean + 1e-5)).sum()
        np.testing.assert_allclose(entropy_loss(jnp.float32(affinity)), want, rtol=1e-5)


def convolve(x, kernel, bias=0.0, stride=1):
    """[B, H, W, I], [k, k, I, O] -> [B, H', W', O] in float64, zero padding of 1."""
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0))), kernel.shape[:2], axis=(1, 2)
    )[:, ::stride, ::stride]  # [B, H', W', I, k, k]
    return np.tensordot(windows, np.float64(kernel), axes=[(3, 4, 5), (2, 0, 1)]) + np.float64(bias)


class TestDiscriminator:
    def test_published_size(self):
        abstract = jax.eval_shape(lambda: PatchDiscriminator(rngs=nnx.Rngs(0)))
        # pix2pix: 3136 + 131328 + 524800 + 2098176 + 8193; no bias where a normalisation follows.
        assert sum(x.size for x in jax.tree.leaves(abstract)) == 2_765_633
        logits = jax.eval_shape(lambda d: d(jnp.zeros((2, 256, 256, 3))), abstract)
        assert logits.shape == (2, 30, 30, 1)

    def test_equation(self):
        d = PatchDiscriminator(4, layers=2, rngs=nnx.Rngs(0))
        d = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), d)
        images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 12, 3)).astype(np.float32)

        def leaky(x):
            return np.where(x > 0, x, 0.2 * x)

        h = leaky(convolve(images, d.conv_in.kernel[...], d.conv_in.bias[...], stride=2))
        for conv, norm, stride in zip(d.convs, d.norms, (2, 1), strict=True):
            h = convolve(h, conv.kernel[...], stride=stride)
            h = (h - h.mean((0, 1, 2))) / np.sqrt(h.var((0, 1, 2)) + 1e-5)
            h = leaky(h * np.float64(norm.scale[...]) + np.float64(norm.bias[...]))
        want = convolve(h, d.conv_out.kernel[...], d.conv_out.bias[...])
        assert want.shape == (3, 2, 1, 1)
        got = jax.jit(lambda d: d(images))(d)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())

    def test_hinge_loss(self):
        d = PatchDiscriminator(4, layers=1, rngs=nnx.Rngs(0))
        real, generated = np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8, 3)).astype(np.float32)
        loss, logits = discriminator_loss(d, real, generated, LossWeights(adversarial_start=5), step=5)
        a, b = np.float64(d(real)), np.float64(d(generated))
        # 0.5 is the adversarial weight, another 0.5 the mean of the two sides.
        want = 0.5 * 0.5 * (np.maximum(1 - a, 0).mean() + np.maximum(1 + b, 0).mean())
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        np.testing.assert_allclose([logits["real"], logits["generated"]], [a.mean(), b.mean()], rtol=1e-4, atol=1e-6)
        assert discriminator_loss(d, real, generated, LossWeights(adversarial_start=5), step=4)[0] == 0
        grads = jax.grad(lambda x: discriminator_loss(d, real, x, LossWeights(), step=30_000)[0])(generated)
        assert not jnp.any(grads)


class TestLoss:
    def test_sum_of_weighted_terms(self, small, discriminator):
        weights = LossWeights(pixel=2, perceptual=3, codebook=5, commitment=7, entropy=11, adversarial=13)

        def perceptual(a, b):
            return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))

        def run(model, images):
            return vq_loss(model, images, weights, perceptual=perceptual, discriminator=discriminator, step=20_000)

        loss, aux = jax.jit(run)(small.model, small.images)
        np.testing.assert_allclose(aux.images, small.reconstruction, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(aux.codes, small.quantized.codes)
        terms = {
            "pixel": np.mean((small.reconstruction - small.images) ** 2),
            "perceptual": np.mean(np.abs(small.reconstruction - small.images)),
            "codebook": small.quantized.codebook,
            "commitment": small.quantized.commitment,
            "entropy": small.quantized.entropy,
            "adversarial": -np.mean(discriminator(small.reconstruction)),
        }
        for name, value in terms.items():
            np.testing.assert_allclose(aux.metrics[name], value, rtol=1e-4, err_msg=name)
        assert aux.metrics["codebook_usage"] == len(np.unique(small.quantized.codes)) / 32
        want = sum(getattr(weights, name) * value for name, value in terms.items())
        np.testing.assert_allclose(loss, want, rtol=1e-4)

    def test_published_weights(self, tiny):
        loss, aux = jax.jit(vq_loss)(*tiny)
        m = aux.metrics
        np.testing.assert_allclose(loss, m["pixel"] + m["codebook"] + 0.25 * m["commitment"], rtol=1e-6)
        assert set(m) == {"pixel", "codebook", "commitment", "codebook_usage"}

    def test_adversarial_term_starts_later(self, tiny, discriminator):
        run = jax.jit(lambda step: vq_loss(*tiny, discriminator=discriminator, step=step))
        (before, aux), (after, _) = run(19_999), run(20_000)
        np.testing.assert_allclose(after - before, 0.5 * aux.metrics["adversarial"], rtol=1e-3)

    def test_adaptive_weight_balances_gradients_at_the_last_layer(self, tiny, discriminator):
        model, images = tiny
        weights = LossWeights(adversarial_start=0, adversarial=1.0, adaptive=True, codebook=0, commitment=0)

        def last_kernel(loss):
            return jnp.linalg.norm(jax.grad(loss)(model).decoder.conv_out.kernel[...].ravel())

        @jax.jit
        def run():
            # The same gradients, the long way: through the whole model.
            pixel = last_kernel(lambda model: jnp.mean((model(images)[0] - images) ** 2))
            adversarial = last_kernel(lambda model: -jnp.mean(discriminator(model(images)[0])))
            loss = functools.partial(vq_loss, images=images, weights=weights, discriminator=discriminator, step=0)
            return pixel / (adversarial + 1e-4), jax.grad(loss, has_aux=True)(model)

        want, (adaptive, aux) = run()
        scale = aux.metrics["adversarial_weight"]
        np.testing.assert_allclose(scale, want, rtol=1e-3)

        # The weight is a constant to the generator's gradient.
        weights = dataclasses.replace(weights, adaptive=False, adversarial=float(scale))
        fixed, _ = jax.jit(
            jax.grad(lambda m: vq_loss(m, images, weights, discriminator=discriminator, step=0), has_aux=True)
        )(model)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), adaptive, fixed)

    def test_training_reduces_it(self, tiny):
        """Thirty plain gradient steps on one batch at least halve the pixel error."""
        graphdef, params, rest = nnx.split(tiny[0], nnx.Param, ...)

        @jax.jit
        def step(params):
            def loss(params):
                return vq_loss(nnx.merge(graphdef, params, rest), tiny[1])

            (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), aux.metrics["pixel"]

        params, first = step(params)
        for _ in range(30):
            params, last = step(params)
        assert last < first / 2


VGG_LAYERS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
VGG_LAYERS |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}


@pytest.fixture(scope="module")
def vgg_tensors():
    """Random weights under torchvision's and LPIPS' names, of He's scale so that activations keep their size."""
    rng = np.random.default_rng(0)
    vgg, heads = {"classifier.0.weight": np.zeros((2, 2), np.float32)}, {}
    for i, (inputs, outputs) in VGG_LAYERS.items():
        kernel = rng.standard_normal((outputs, inputs, 3, 3), np.float32)
        vgg[f"features.{i}.weight"] = kernel * np.float32((2 / (9 * inputs)) ** 0.5)
        vgg[f"features.{i}.bias"] = 0.1 * rng.standard_normal(outputs, np.float32)
    for i, width in enumerate((64, 128, 256, 512, 512)):
        heads[f"lin{i}.model.1.weight"] = rng.random((1, width, 1, 1), np.float32)
    return vgg, heads


@pytest.fixture(scope="module")
def lpips(vgg_tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    for name, tensors in zip(("vgg", "heads"), vgg_tensors, strict=True):
        np.savez(folder / f"{name}.npz", **tensors)
    return load_lpips(folder / "vgg.npz", folder / "heads.npz")


class TestLPIPS:
    def test_equation(self, lpips, vgg_tensors):
        vgg, heads = vgg_tensors
        x, y = np.random.default_rng(1).uniform(-1, 1, (2, 2, 16, 20, 3)).astype(np.float32)

        def features(images):
            h = (np.float64(images) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
            out = []
            for i in VGG_LAYERS:
                if i in (5, 10, 17, 24):  # a pooling layer stands before these
                    out.append(h)
                    b, height, width, c = h.shape
                    h = h[:, : height // 2 * 2, : width // 2 * 2].reshape(b, height // 2, 2, width // 2, 2, c)
                    h = h.max((2, 4))
                h = convolve(h, vgg[f"features.{i}.weight"].transpose(2, 3, 1, 0), vgg[f"features.{i}.bias"])
                h = np.maximum(h, 0)
            return [*out, h]

        want = np.zeros(2)
        for i, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
            a, b = (f / (np.linalg.norm(f, axis=-1, keepdims=True) + 1e-10) for f in (a, b))
            want += ((a - b) ** 2 @ np.float64(heads[f"lin{i}.model.1.weight"].ravel())).mean((1, 2))
        # float32 sums of up to 4608 terms through 13 layers.
        distance = jax.jit(lambda lpips, x, y: lpips(x, y))
        np.testing.assert_allclose(distance(lpips, x, y), want, rtol=1e-4)
        # Differences of unit vectors by float32 rounding, squared.
        np.testing.assert_allclose(distance(lpips, x, x), 0, atol=1e-12)

    def test_gradient_is_finite_where_all_features_are_zero(self):
        """Zero weights leave every activation at 0, where a bare square root has no derivative."""
        x = jnp.ones((1, 16, 16, 3))
        grads = jax.jit(jax.grad(lambda y: LPIPS()(x, y).sum()))(0.5 * x)
        np.testing.assert_array_equal(grads, np.zeros_like(grads))

    def test_nothing_trains(self, lpips):
        assert not jax.tree.leaves(nnx.state(lpips, nnx.Param))
