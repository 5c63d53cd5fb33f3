"""LoRA adapters on disk, against files that the original tools wrote."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lumen.io import peft
from lumen.io.names.decoder import RULES
from lumen.io.pretrained import from_original, to_original
from lumen.language import pretrained
from lumen.language.decoder import Decoder
from lumen.layers import unstack
from lumen.long_context.longlora import load_adapter, merge_lora, save_adapter

ADAPTER = pathlib.Path(__file__).parents[1] / "goldens/longlora/adapter"


@pytest.fixture(scope="module")
def case(golden):
    return golden("longlora/lora_merge")


@pytest.fixture(scope="module")
def base(golden):
    model = golden("longlora/s2_model")
    config = pretrained.parse_config(model.meta["config"])
    return from_original(model.weights(), Decoder(config, rngs=nnx.Rngs(0)), RULES)


@pytest.fixture
def folder(case, tmp_path):
    """The golden adapter with its tensors as .safetensors: what the .bin files hold, without torch."""
    path = tmp_path / "adapter"
    path.mkdir()
    shutil.copy(ADAPTER / "adapter_config.json", path)
    save_file(case.weights("in/adapter/"), path / "adapter_model.safetensors")
    save_file(case.weights("in/trainable_params/"), path / "trainable_params.safetensors")
    return path


def logits(model, tokens):
    return jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))(model, jnp.asarray(tokens))


def test_unmerged_and_merged_are_the_original(case, base, folder):
    tokens = case["in/input_ids"]
    # The golden file's tolerances: logits 2e-4, merged weights 1e-6.
    np.testing.assert_allclose(logits(base, tokens), case["out/logits_initial"], atol=2e-4)
    adapted = load_adapter(folder, base)
    np.testing.assert_allclose(logits(adapted, tokens), case["out/logits_adapter"], atol=2e-4)
    merged = merge_lora(adapted)
    np.testing.assert_allclose(logits(merged, tokens), case["out/logits_merged"], atol=2e-4)
    published = to_original(merged, RULES)
    for name, want in case.weights("out/merged/").items():
        np.testing.assert_allclose(published[name], want, atol=1e-6, err_msg=name)
    for name, want in case.weights("in/trainable_params/").items():
        np.testing.assert_array_equal(published[name], want, err_msg=name)


def test_written_as_it_was_read(base, folder, tmp_path):
    save_adapter(tmp_path / "again", load_adapter(folder, base))
    for name in ("adapter_model.safetensors", "trainable_params.safetensors"):
        want, got = load_file(folder / name), load_file(tmp_path / "again" / name)
        assert got.keys() == want.keys()
        for key, value in want.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)
    want, got = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "again"))
    same = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "task_type", "peft_type", "fan_in_fan_out")
    assert {key: got[key] for key in same} == {key: want[key] for key in same}


def test_layers_in_a_list_and_names_of_a_training_process(case, base, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    # PEFT's own way with parameters that train whole: in one file, under its prefix.
    whole = load_file(folder / "trainable_params.safetensors")
    save_file(
        renamed | {f"base_model.model.{name}": value for name, value in whole.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "trainable_params.safetensors").unlink()

    adapted = load_adapter(folder, unstack(base))
    got = logits(adapted, case["in/input_ids"])
    np.testing.assert_allclose(got, case["out/logits_adapter"], atol=2e-4)  # as above


@pytest.mark.parity
def test_the_files_of_the_original_tools(case, base):
    config, tensors = peft.read(ADAPTER)
    assert config == peft.AdapterConfig(8, 16.0, ("k_proj", "o_proj", "q_proj", "v_proj"))
    assert tensors.keys() == case.weights("in/adapter/").keys() | case.weights("in/trainable_params/").keys()
    for name, want in (case.weights("in/adapter/") | case.weights("in/trainable_params/")).items():
        np.testing.assert_array_equal(tensors[name], want, err_msg=name)
    got = logits(load_adapter(ADAPTER, base), case["in/input_ids"])
    np.testing.assert_allclose(got, case["out/logits_adapter"], atol=2e-4)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"peft_type": "IA3"}, "peft_type is 'IA3'; wanted 'LORA'"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"use_dora": True}, "use_dora is True"),
            ({"r": 0}, "r is 0; wanted a whole number"),
            ({"lora_alpha": "x"}, "lora_alpha is 'x'; wanted a number"),
            ({"target_modules": "all-linear"}, "target_modules is 'all-linear'; wanted a list"),
            ({"target_modules": ["c_attn"]}, "adapts c_attn; wanted some of q_proj"),
            ({"r": 4}, r"misshapen .*q_proj\.lora_A\.weight: came \[8, 64\], wanted \[4, 64\]"),
            ({"target_modules": ["q_proj"]}, r"extra .*k_proj\.lora_A\.weight"),
        ],
    )
    def test_configuration(self, base, folder, change, error):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ValueError, match=error):
            load_adapter(folder, base)

    def test_files(self, base, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors \(100 bytes\) cannot be read"):
            load_adapter(folder, base)
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"holds neither adapter_model\.safetensors nor"):
            load_adapter(folder, base)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match="is not JSON"):
            load_adapter(folder, base)
        (folder / "adapter_config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
            load_adapter(folder, base)
