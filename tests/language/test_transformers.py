"""Against huggingface/transformers itself: folders that lumen wrote, and its greedy text. Run by `make parity`."""

import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from lumen.io.awq import AWQFormat
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.generate import generate
from lumen.language.pretrained import Folder, load, save
from lumen.quantization.awq import AWQConfig, quantize_decoder
from lumen.rope import RopeConfig

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

CONFIGS = {
    "llama": DecoderConfig.debug(width=128, head_dim=32, hidden=256, rope=RopeConfig(500_000.0, "llama3", 8.0)),
    "qwen2": DecoderConfig.debug(
        width=128,
        head_dim=32,
        hidden=256,
        qkv_bias=True,
        tied=True,
        rope=RopeConfig(scaling="yarn", factor=4, original_positions=16),
    ),
}


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    model = Decoder(CONFIGS[request.param], rngs=nnx.Rngs(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    # Every parameter matters, and logits lie apart.
    return jax.tree.map(lambda x: x * 2.5 + 0.05 * jax.random.normal(next(keys), x.shape), model)


def transformers_logits(path, tokens, **options):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        loaded = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
        with torch.no_grad():
            return loaded, loaded(torch.tensor(tokens)).logits.float().numpy()


def our_logits(model, tokens):
    return np.asarray(model.logits(model(tokens)[0]))


def test_a_dense_folder_has_equal_logits_and_greedy_text(model, tmp_path):
    import torch

    save(tmp_path / "model", model)
    tokens = np.random.default_rng(0).integers(0, 128, (2, 24))
    loaded, want = transformers_logits(tmp_path / "model", tokens, dtype=torch.float32)
    np.testing.assert_allclose(our_logits(model, tokens), want, atol=1e-4 * np.abs(want).max())
    with torch.no_grad():
        prompt = torch.tensor(tokens[:1])
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    ours, lengths = generate(model, tokens[:1].tolist(), max_new_tokens=16)
    assert lengths.tolist() == [16]
    np.testing.assert_array_equal(ours[0], text[0, 24:].numpy())


def test_a_gemm_folder_of_lumen_loads_in_transformers(model, tmp_path):
    import torch

    tokens = np.random.default_rng(0).integers(0, 128, (4, 32)).astype(np.int32)
    quantized, _ = quantize_decoder(model, tokens, AWQConfig(group=64), progress=False)
    quantized = jax.tree.map(lambda x: x.astype(np.float16) if x.dtype == np.float32 else x, quantized)
    save(tmp_path / "awq", quantized, Folder({}, quantization=AWQFormat(64, "gemm")))
    ours, _ = load(tmp_path / "awq", dtype=np.float32)
    _, want = transformers_logits(tmp_path / "awq", tokens[:, :16], dtype=torch.float16, device_map="cpu")
    got = our_logits(ours, tokens[:, :16])
    # transformers computes in float16: 2**-11 for each of some 30 roundings along the way.
    assert np.abs(got - want).max() < 30 * 2**-11 * np.abs(want).max()
    # The unquantised model is much farther away: it is really the packed weights that agree.
    assert np.abs(our_logits(model, tokens[:, :16]) - want).max() > 4 * np.abs(got - want).max()
