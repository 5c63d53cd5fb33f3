"""Published folders: config.json in every spelling, weights in and out to the byte, 4-bit linears, damaged files."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lumen.io.awq import AWQFormat
from lumen.io.names.decoder import RULES
from lumen.io.pretrained import published_names, write_folder
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.generate import generate
from lumen.language.pretrained import Folder, config_values, load, parse_config, read_config, save
from lumen.qtensor import QuantizedLinear
from lumen.rope import RopeConfig

QUANTISED = ("checkpoint_llama_gqa_gemm_g64", "checkpoint_qwen2_gemm_g32")
GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "awq"

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def logits(model, tokens):
    return np.asarray(model.logits(model(jnp.asarray(tokens))[0]))


@pytest.fixture
def published(golden, tmp_path):
    """A folder of float16 weights in three shards, a config.json in its own style, and a tokenizer's files."""
    record = golden("decoder/qwen2_tied")
    tensors = {name: tensor.astype(np.float16) for name, tensor in sorted(record.weights().items())}
    text = json.dumps(record.meta["config"], indent=7) + " \n"
    files = {"config.json": text.encode(), "tokenizer.json": b"{ }", "notes.txt": bytes(range(256))}
    write_folder(tmp_path / "published", tensors, files, shard_bytes=60_000)
    assert len(list((tmp_path / "published").glob("*.safetensors"))) == 3
    (tmp_path / "published" / "original").mkdir()
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(b"other weights")
    return tmp_path / "published"


class TestConfig:
    def test_defaults(self):
        want = DecoderConfig(64, 2, 4, 4, 16, 112, 128, norm_epsilon=1e-6, max_positions=2048)
        assert parse_config(LLAMA) == want
        assert parse_config(LLAMA | {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None}) == want

    @pytest.mark.parametrize(
        ("changes", "want"),
        [
            ({"rope_theta": 5e5}, RopeConfig(5e5)),
            ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, RopeConfig(5e5, "linear", 4.0)),
            ({"rope_scaling": {"rope_type": "default"}}, RopeConfig(1e4)),
            ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeConfig(1e6)),
            (
                {"rope_parameters": {"rope_type": "linear", "rope_theta": 7, "factor": 2}},
                RopeConfig(7.0, "linear", 2.0),
            ),
            (
                {
                    "rope_theta": 5e5,
                    "rope_scaling": {
                        "rope_type": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64,
                    },
                },
                RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
            ),
            (  # as Qwen2.5's model card has it
                {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
                RopeConfig(1e4, "yarn", 4.0, original_positions=32768),
            ),
            (
                {
                    "max_position_embeddings": 512,
                    "rope_scaling": {
                        "rope_type": "yarn",
                        "factor": 8,
                        "beta_fast": 16,
                        "beta_slow": 2,
                        "attention_factor": 1.5,
                        "truncate": True,
                    },
                },
                RopeConfig(
                    1e4, "yarn", 8.0, original_positions=512, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5
                ),
            ),
        ],
    )
    def test_rotary_spellings(self, changes, want):
        config = parse_config(LLAMA | changes)
        assert config.rope == want
        assert parse_config(config_values(config)) == config

    def test_qwen2(self):
        values = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 2}
        config = parse_config(values | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1})
        assert (config.qkv_bias, config.tied, config.head_dim, config.kv_heads) == (True, True, 32, 2)
        # A window that begins above the last layer is none; transformers 5 lists the layers instead.
        parse_config(values | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2})
        parse_config(values | {"layer_types": ["full_attention"] * 2, "use_sliding_window": True})
        assert parse_config(config_values(config)) == config

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "mistral"}, "model_type is 'mistral'; wanted 'llama' or 'qwen2'"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; wanted 'silu'"),
            ({"attention_bias": True}, "attention_bias is True; wanted False"),
            ({"mlp_bias": True}, "mlp_bias is True; wanted False"),
            ({"hidden_size": "64"}, "hidden_size is '64'; wanted a whole number of 1 or more"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
            ({"vocab_size": True}, "vocab_size is True"),
            ({"vocab_size": None}, "vocab_size is missing; wanted a whole number"),
            ({"hidden_size": 66}, "hidden_size is 66; wanted a multiple of num_attention_heads=4, or a head_dim"),
            ({"num_key_value_heads": 3}, "config.json: DecoderConfig: heads=4 is not a multiple of kv_heads=3"),
            ({"rms_norm_eps": 0}, "rms_norm_eps is 0; wanted a number above 0"),
            ({"rope_theta": None}, "rope_theta is None"),
            ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; wanted null or an object"),
            ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type is 'dynamic'; wanted 'default', 'linear',"),
            ({"rope_scaling": {"type": "yarn"}}, "rope_scaling has no factor, which 'yarn' needs"),
            ({"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1}}, "rope_scaling.mscale is 1; wanted none"),
            ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "rope_scaling.truncate is False"),
            (
                {"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": 32}},
                "rope_scaling.beta_slow is 32.0; wanted less than beta_fast, 32.0",
            ),
            ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor, which 'linear' needs"),
            ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "rope_parameters.factor is -1"),
            ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding_window is True"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ],
    )
    def test_what_is_not_supported(self, tmp_path, changes, message):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        with pytest.raises(ValueError, match=r"^load: \S*config\.json: ") as caught:
            read_config(tmp_path)
        assert message in str(caught.value)

    def test_no_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
            load(tmp_path)
        for text, message in (("{", "is not JSON"), ("[1]", "holds a list; wanted a JSON object")):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(ValueError, match=message):
                load(tmp_path)


class TestDense:
    def test_the_same_files_to_the_byte(self, published, tmp_path):
        model, folder = load(published)
        assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.float16)}
        assert set(folder.files) == {"config.json", "tokenizer.json", "notes.txt"}
        listed, _ = load(published, stacked=False)
        want = {name: data for name, data in contents(published).items() if name != "pytorch_model.bin"}
        for number, loaded in enumerate((model, listed)):
            save(tmp_path / str(number), loaded, folder)
            assert contents(tmp_path / str(number)) == want

    def test_values(self, golden, published):
        record = golden("decoder/qwen2_tied")
        for stacked in (True, False):
            model, _ = load(published, dtype=jnp.float32, stacked=stacked)
            assert isinstance(model.blocks, nnx.List) != stacked
            # The weights of the golden files are exact in float16.
            got = logits(model, record["in/input_ids"])
            np.testing.assert_allclose(got, record["out/nopad/logits"], rtol=0, atol=1e-4)

    def test_changed_models_describe_themselves(self, published, tmp_path):
        model, folder = load(published, dtype=jnp.bfloat16)
        save(tmp_path / "cast", model, folder, shard_bytes=100_000)
        values = json.loads((tmp_path / "cast" / "config.json").read_text())
        assert values["torch_dtype"] == "bfloat16"
        assert values["use_sliding_window"] is False  # says nothing of sizes, and stays
        again, _ = load(tmp_path / "cast")
        for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(got, want)
        assert {path.name for path in (tmp_path / "cast").glob("*.safetensors")} == {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }

    def test_a_model_of_our_own(self, tmp_path):
        rope = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)
        config = DecoderConfig.debug(rope=rope, norm_epsilon=3e-6, head_dim=8, max_positions=99)
        model = Decoder(config, rngs=nnx.Rngs(0))
        save(tmp_path / "a", model, Folder({"tokenizer.json": b"{}"}))
        again, folder = load(tmp_path / "a")
        assert again.config == config
        for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(got, want)
        values = json.loads(folder.files["config.json"])
        assert (values["architectures"], values["torch_dtype"]) == (["LlamaForCausalLM"], "float32")
        save(tmp_path / "b", again, folder)
        assert contents(tmp_path / "b") == contents(tmp_path / "a")

    def test_mixed_dtypes(self, published):
        path = next(path for path in published.glob("*.safetensors") if "model.norm.weight" in load_file(path))
        tensors = load_file(path)
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.float32)}, path)
        model, _ = load(published)
        assert (model.norm.scale[...].dtype, model.embedding[...].dtype) == (jnp.float32, jnp.float16)

    def test_a_tied_head_in_the_file_is_passed_over(self, published):
        path = sorted(published.glob("*.safetensors"))[0]
        tensors = load_file(path)
        save_file(tensors | {"lm_head.weight": np.ones((128, 64), np.float16)}, path)
        index = published / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        values["weight_map"]["lm_head.weight"] = path.name
        index.write_text(json.dumps(values))
        model, _ = load(published)
        assert not hasattr(model, "head")


class TestDamage:
    def rewrite(self, published, change):
        """Applies a function to the tensors of the shard that holds the last norm."""
        path = next(path for path in published.glob("*.safetensors") if "model.norm.weight" in load_file(path))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def test_not_finite(self, published):
        self.rewrite(published, lambda tensors: tensors["model.norm.weight"].__setitem__(3, np.nan))
        with pytest.raises(ValueError, match=r"not finite model\.norm\.weight: 1 of 64 values are NaN or infinite"):
            load(published)

    def test_misshapen(self, published):
        self.rewrite(published, lambda tensors: tensors.update({"model.norm.weight": np.ones(65, np.float16)}))
        with pytest.raises(ValueError, match=r"misshapen  model\.norm\.weight: came \[65\], wanted \[64\]"):
            load(published)

    def test_integers(self, published):
        self.rewrite(published, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int32)}))
        with pytest.raises(ValueError, match=r"miscast    model\.norm\.weight: came int32"):
            load(published)

    def test_too_many_layers(self, published):
        text = (published / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
        (published / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"12 mismatches(?s:.*)missing    model\.layers\.2\.input_layernorm"):
            load(published)

    def test_truncated_and_missing_shards(self, published):
        shard = sorted(published.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-7])
        with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors \(\d+ bytes\) cannot be read"):
            load(published)
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=r"names 3 shards, of which model-00002-of-00003\.safetensors"):
            load(published)

    def test_no_partial_output(self, published, tmp_path, monkeypatch):
        model, folder = load(published)
        before = {path.name for path in tmp_path.iterdir()}

        def full(path, header, tensors):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lumen.io.pretrained._write_safetensors", full)
        with pytest.raises(OSError, match=r"cannot write .*: .*No space left on device; free some space"):
            save(tmp_path / "out", model, folder)
        with pytest.raises(FileExistsError, match="published exists"):
            save(published, model, folder)
        assert {path.name for path in tmp_path.iterdir()} == before


class TestQuantised:
    @pytest.mark.parametrize("case", QUANTISED)
    def test_logits_of_the_original(self, golden, case):
        record = golden(f"awq/{case}")
        model, folder = load(GOLDENS / case, dtype=jnp.float32)
        assert isinstance(model.blocks.query, QuantizedLinear)
        assert folder.quantization == AWQFormat(64 if "llama" in case else 32)
        got = logits(model, record["in/input_ids"])
        np.testing.assert_allclose(got, record["out/logits_fp32"], rtol=0, atol=2e-4)

    @pytest.mark.parametrize("stacked", [True, False])
    @pytest.mark.parametrize("case", QUANTISED)
    def test_the_same_files_to_the_byte(self, tmp_path, case, stacked):
        model, folder = load(GOLDENS / case, stacked=stacked)
        save(tmp_path / "copy", model, folder)
        assert contents(tmp_path / "copy") == contents(GOLDENS / case)

    def test_generation(self, golden):
        """Greedy tokens of stacked and listed layers are those of a model with the weights unpacked."""
        record = golden("awq/checkpoint_llama_gqa_gemm_g64")
        prompts = [record["in/input_ids"][0, :9].tolist(), record["in/input_ids"][1, :6].tolist()]
        stacked, _ = load(GOLDENS / QUANTISED[0], dtype=jnp.float32)
        listed, _ = load(GOLDENS / QUANTISED[0], dtype=jnp.float32, stacked=False)
        dense = nnx.clone(stacked)
        for name, layer in vars(stacked.blocks).items():
            if isinstance(layer, QuantizedLinear):
                setattr(dense.blocks, name, layer.dense(jnp.float32))
        want = generate(dense, prompts, max_new_tokens=6)[0]
        for model in (stacked, listed):
            np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=6)[0], want)

    def unconverted(self, tmp_path, parts):
        """The Llama checkpoint with some linears unpacked, which its config.json then names."""
        model, folder = load(GOLDENS / QUANTISED[0], stacked=False)
        names = {"self_attn.o_proj": "output", "mlp.down_proj": "down"}
        for layer, block in enumerate(model.blocks):
            for theirs, ours in names.items():
                if any(part in f"model.layers.{layer}.{theirs}" for part in parts):
                    setattr(block, ours, getattr(block, ours).dense())
        assert folder.quantization is not None
        quantization = dataclasses.replace(folder.quantization, unconverted=tuple(parts))
        save(tmp_path / "some", model, dataclasses.replace(folder, quantization=quantization))

    @pytest.mark.parametrize(("parts", "stacked"), [(["down_proj", "lm_head"], True), (["1.mlp.down_proj"], False)])
    def test_modules_not_converted(self, golden, tmp_path, parts, stacked):
        self.unconverted(tmp_path, parts)
        values = json.loads((tmp_path / "some" / "config.json").read_text())["quantization_config"]
        assert values["modules_to_not_convert"] == parts
        again, folder = load(tmp_path / "some")
        # Layers that differ cannot be stacked.
        assert isinstance(again.blocks, nnx.List) != stacked
        save(tmp_path / "again", again, folder)
        assert contents(tmp_path / "again") == contents(tmp_path / "some")
        # Unpacked or not, these are the weights of the checkpoint.
        record = golden(f"awq/{QUANTISED[0]}")
        again, _ = load(tmp_path / "some", dtype=jnp.float32)
        got = logits(again, record["in/input_ids"])
        np.testing.assert_allclose(got, record["out/logits_fp32"], rtol=0, atol=2e-4)

    def test_other_layouts(self, tmp_path, golden):
        """Written in another layout, the model is the same."""
        model, folder = load(GOLDENS / QUANTISED[0], dtype=jnp.float32)
        tokens = golden(f"awq/{QUANTISED[0]}")["in/input_ids"]
        for layout in ("gemv", "gemv_fast", "llm-awq"):
            save(tmp_path / layout, model, dataclasses.replace(folder, quantization=AWQFormat(64, layout)))
            again, read = load(tmp_path / layout)
            assert read.quantization == AWQFormat(64, layout)
            np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))

    def test_damage(self, tmp_path):
        folder = tmp_path / "copy"
        shutil.copytree(GOLDENS / QUANTISED[0], folder)
        path = folder / "model.safetensors"
        whole = load_file(path)
        name = "model.layers.1.mlp.up_proj"
        for change, message in (
            ({f"{name}.scales": np.full((2, 256), np.nan, np.float16)}, r"scales: 512 of 512 values are NaN"),
            ({f"{name}.qweight": np.zeros((128, 64), np.int32)}, r"up_proj\.scales came|up_proj is \[128, 512\]"),
            ({f"{name}.qzeros": None}, r"up_proj\.qzeros is missing"),
            (
                {f"{name}.weight": np.zeros((256, 128), np.float16)},
                r"extra      model\.layers\.1\.mlp\.up_proj\.weight",
            ),
        ):
            tensors = {key: value for key, value in (whole | change).items() if value is not None}
            save_file(tensors, path)
            with pytest.raises(ValueError, match=message):
                load(folder)
        for change, message in (({"bits": 3}, "bits is 3"), ({"quant_method": "gptq"}, "quant_method is 'gptq'")):
            values = json.loads((GOLDENS / QUANTISED[0] / "config.json").read_text())
            values["quantization_config"] |= change
            (folder / "config.json").write_text(json.dumps(values))
            with pytest.raises(ValueError, match=rf"config\.json: quantization_config: {message}"):
                load(folder)

    def test_a_model_quantised_otherwise_than_said(self, tmp_path):
        model, folder = load(GOLDENS / QUANTISED[0])
        with pytest.raises(ValueError, match=r"q_proj is quantised, and folder\.quantization is None"):
            save(tmp_path / "x", model, dataclasses.replace(folder, quantization=None))
        quantization = AWQFormat(64, unconverted=("up_proj",))
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is quantised, and .*unconverted=\('up_proj',\)"):
            save(tmp_path / "x", model, dataclasses.replace(folder, quantization=quantization))
        assert not (tmp_path / "x").exists()


def test_bfloat16_weights_survive(tmp_path):
    config = DecoderConfig.debug(tied=True)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), Decoder(config, rngs=nnx.Rngs(1)))
    save(tmp_path / "a", model)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    again, _ = load(tmp_path / "a")
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(got, want)


def test_every_rule_is_used():
    """A table with a misspelt name would leave a parameter uncovered, or a rule without one."""
    used = set()
    for config in (DecoderConfig.debug(), DecoderConfig.debug(qkv_bias=True, tied=True)):
        used |= set(published_names(jax.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0))), RULES))
    kinds = {re.sub(r"layers\.\d", "layers.{layer}", name) for name in used}
    biased = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
    assert kinds == {rule.original for rule in RULES if rule.original.endswith((".weight", *biased))}
