"""LongLoRA: shifted sparse attention, rotary extension, low-rank adapters."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.attention import Mask, attend
from lumen.evaluation.context_length import attention_pairs, context_curves, draw, step_flops, window_losses
from lumen.io.checkpoint import Checkpointer, flatten
from lumen.io.names.decoder import RULES
from lumen.io.peft import lora_rules
from lumen.io.pretrained import from_original, to_original
from lumen.io.text import instructions
from lumen.language.decoder import Decoder, DecoderConfig, next_token_loss
from lumen.language.pretrained import load, parse_config
from lumen.layers import Frozen
from lumen.long_context.longlora import (
    Lora,
    add_lora,
    extend_vocabulary,
    extended_rope,
    group_size,
    load_adapter,
    merge_lora,
    save_adapter,
    shifted_sparse,
)
from lumen.plan import count_flops
from lumen.qtensor import QuantizedLinear, quantize_linear
from lumen.rope import RopeConfig, inverse_frequencies, rotary_tables, rotate
from lumen.training.language import AttentionOptions, InstructionData, LanguageOptions, LoraOptions, make_task
from lumen.training.loop import TrainConfig, restore, set_up
from pallas_kernels.block_sparse_attention import dense_mask

CHECKPOINT = pathlib.Path(__file__).parents[1] / "goldens/awq/checkpoint_llama_gqa_gemm_g64"


@pytest.fixture(scope="module")
def s2(golden):
    """The golden file of the models, and its decoder."""
    case = golden("longlora/s2_model")
    config = parse_config(case.meta["config"])
    return case, from_original(case.weights(), Decoder(config, rngs=nnx.Rngs(0)), RULES)


VARIANTS = {"full": Mask(), "noleak": shifted_sparse(16, 4), "roll": shifted_sparse(16, 4, leak=True)}


class TestShiftedSparse:
    @pytest.mark.parametrize("variant", ["full", "noleak", "roll"])
    def test_operator_and_its_gradients(self, golden, variant):
        case = golden("longlora/s2_attention")
        mask = {"full": Mask()}.get(variant, shifted_sparse(8, 4, leak=variant == "roll"))
        q, k, v, cotangent = (jnp.asarray(case[f"in/{name}"]) for name in ("q", "k", "v", "grad_out"))
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask=mask), q, k, v)
        # The golden file's own tolerances: float32 softmax over at most 32 keys in another order.
        np.testing.assert_allclose(out, case[f"out/{variant}/attention"], atol=1e-5)
        for name, got in zip("qkv", pull(cotangent), strict=True):
            np.testing.assert_allclose(got, case[f"out/{variant}/grad_{name}"], atol=5e-5, err_msg=name)

    @pytest.mark.parametrize("length", [4500, 9000])
    def test_fine_tuning_rule(self, golden, length):
        case = golden("longlora/s2_attention")
        q, k, v = jnp.asarray(case[f"in/sft_T{length}/qkv"])
        assert group_size(length, fine_tuning=True) == 8192
        mask = shifted_sparse(group_size(length, fine_tuning=True), 2)
        out = jax.jit(lambda *qkv: attend(*qkv, mask=mask))(q, k, v)
        np.testing.assert_allclose(out[:, ::25], case[f"out/sft_T{length}/attention"], atol=1e-5)  # as above

    def test_group_is_a_quarter(self):
        assert [group_size(length) for length in (32768, 2048, 10)] == [8192, 512, 3]
        assert group_size(16384, fine_tuning=True) == 4096

    @pytest.mark.parametrize("variant", ["full", "noleak", "roll"])
    def test_model(self, s2, variant):
        case, model = s2
        mask = VARIANTS[variant]
        tokens, labels = jnp.asarray(case["in/input_ids"]), case["in/labels"]
        logits = jax.jit(lambda model: model.logits(model(tokens, mask=mask)[0]))(model)
        np.testing.assert_allclose(logits, case[f"out/{variant}/logits"], atol=1e-4)  # the golden file's tolerance
        block = jax.tree.map(lambda array: array[0], model.blocks)
        h = block.input_norm(model.embedding[...][tokens])
        q, k, v = block.heads(h, model.tables(jnp.arange(64)))
        layer = attend(q, k, v, mask=mask).reshape(1, 64, 64)
        np.testing.assert_allclose(layer, case[f"out/{variant}/layer0_attention"], atol=1e-4)

        targets = jnp.asarray(np.where(labels == -100, 0, labels))
        tokens_and_target = jnp.concatenate([tokens[:, :1], targets[:, 1:]], axis=1)
        weights = jnp.asarray(labels[:, 1:] != -100, jnp.float32)

        def loss(model):
            hidden, _ = model(tokens, mask=mask)
            logits = model.logits(hidden)[:, :-1]
            chosen = jnp.take_along_axis(logits, tokens_and_target[:, 1:, None], axis=-1)[..., 0]
            return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)) / weights.sum()

        value, gradient = jax.jit(jax.value_and_grad(loss))(model)
        np.testing.assert_allclose(value, case[f"out/{variant}/loss"], rtol=1e-5)
        gradient = to_original(gradient, RULES)
        for name, want in case.weights(f"out/{variant}/grad/").items():
            np.testing.assert_allclose(gradient[name], want, atol=1e-3 * np.abs(want).max(), err_msg=name)

    @pytest.mark.parametrize("variant", ["full", "roll"])
    def test_gptneox(self, golden, variant):
        """Fused queries, keys and values per head, and rotary on half of the channels, before the shift."""
        case = golden("longlora/gptneox")
        weights = {name.removeprefix("gpt_neox."): jnp.asarray(value) for name, value in case.weights().items()}

        def linear(name, x):
            return x @ weights[f"layers.0.{name}.weight"].T + weights[f"layers.0.{name}.bias"]

        def norm(name, x):
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
            return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        x = weights["embed_in.weight"][case["in/input_ids"]]  # [1, 32, 48]
        fused = linear("attention.query_key_value", norm("layers.0.input_layernorm", x)).reshape(1, 32, 4, 36)
        tables = rotary_tables(RopeConfig(), 6, jnp.arange(32))
        q, k, v = jnp.split(fused, 3, axis=-1)
        q, k = (jnp.concatenate([rotate(part[..., :6], tables), part[..., 6:]], axis=-1) for part in (q, k))
        mask = Mask() if variant == "full" else shifted_sparse(group_size(32), 4, leak=True)
        attended = linear("attention.dense", attend(q, k, v, mask=mask).reshape(1, 32, 48))
        h = linear("mlp.dense_h_to_4h", norm("layers.0.post_attention_layernorm", x))
        x = x + attended + linear("mlp.dense_4h_to_h", jax.nn.gelu(h, approximate=False))
        logits = norm("final_layer_norm", x) @ weights["embed_out.weight"].T
        np.testing.assert_allclose(logits, case[f"out/{variant}/logits"], atol=1e-4)  # the golden file's tolerance

    def test_nothing_leaks_from_the_future(self):
        q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 40, 4, 8))  # the last group is short

        def sources(leak):
            out = lambda v: attend(q, k, v, mask=shifted_sparse(8, 4, leak=leak))[0].sum(-1)  # noqa: E731
            return (jnp.abs(jax.jit(jax.jacobian(out))(v)[:, :, 0]).sum((-1, -2)) > 0).any(1)  # [T, S]

        future = np.triu(np.ones((40, 40), bool), 1)
        assert not (np.asarray(sources(False)) & future).any()
        want = np.zeros((40, 40), bool)
        want[:4, 36:] = True
        np.testing.assert_array_equal(np.asarray(sources(True)) & future, want)

    def test_a_padded_sample_is_the_sample_alone(self):
        q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 24, 5, 8))
        mask = dataclasses.replace(shifted_sparse(8, 5), lengths=jnp.array([24, 13]))
        out = jax.jit(lambda *qkv: attend(*qkv, mask=mask))(q, k, v)
        short = (array[1:, :13] for array in (q, k, v))
        alone = jax.jit(lambda *qkv: attend(*qkv, mask=shifted_sparse(8, 5)))(*short)
        np.testing.assert_allclose(out[1:, :13], alone, atol=1e-6)  # float32, the same sums
        assert not np.asarray(out[1, 13:]).any()


class TestRope:
    def test_tables_and_factors(self, golden):
        case = golden("longlora/rope")
        for factor in (1.0, 2.0, 8.0):
            rope = RopeConfig(scaling="linear", factor=factor)
            for name, table in zip(("cos", "sin"), rotary_tables(rope, 16, case["in/positions"]), strict=True):
                want = case[f"out/factor{factor}/{name}"][:, :8]
                # The golden file's tolerance, and angles up to 100 rounded to float32.
                np.testing.assert_allclose(table, want, atol=1e-6 + 100 * 2**-23)
        for (positions, existing, length), want in zip(case["in/factor_cases"], case["out/factor"], strict=True):
            rope = RopeConfig(scaling="linear", factor=existing)
            config = DecoderConfig.debug(max_positions=int(positions), rope=rope)
            assert extended_rope(config, int(length), parity=True).rope.factor == want

    def test_extending_twice_is_extending_once(self):
        config = DecoderConfig.debug(max_positions=4096)
        twice = extended_rope(extended_rope(config, 8192), 32768)
        assert twice == extended_rope(config, 32768)
        assert twice.rope.factor == 8.0
        assert extended_rope(extended_rope(config, 8192), 32768, parity=True).rope.factor == 4.0
        assert extended_rope(twice, 10_000) is twice

    def test_interpolated_positions_are_positions_divided(self):
        model = Decoder(DecoderConfig.debug(max_positions=16), rngs=nnx.Rngs(0))
        tokens = jax.random.randint(jax.random.key(1), (1, 16), 0, 128)
        longer = nnx.clone(model)
        longer.config = extended_rope(model.config, 64)
        # Powers of two: angles are the same to the last bit.
        np.testing.assert_allclose(longer(tokens, positions=4 * jnp.arange(16))[0], model(tokens)[0], atol=1e-6)

    def test_yarn_of_qwen25(self):
        """Qwen2.5's published extension, 32768 tokens times 4, calculated by hand."""
        rope = RopeConfig(1e6, "yarn", 4.0, original_positions=32768)
        unscaled = 1e6 ** (-np.arange(64) / 64)
        # Turns in 32768 tokens: 64 ln(32768 / (2 pi turns)) / ln(1e6) is 23.6 for 32 turns and 39.7 for one.
        divided = np.clip((np.arange(64) - 23) / (40 - 23), 0, 1)
        want = unscaled * (1 - divided) + unscaled / 4 * divided
        # Powers and three more operations in float32.
        np.testing.assert_allclose(inverse_frequencies(rope, 128), want, rtol=16 * 2**-24)
        cosines, sines = rotary_tables(rope, 128, jnp.array([0, 1000]))
        np.testing.assert_allclose(cosines[0], 1.138629436, rtol=2**-23)  # 0.1 ln 4 + 1
        np.testing.assert_allclose(sines[1], 1.138629436 * np.sin(1000 * want), atol=1000 * 16 * 2**-24)
        tables = rotary_tables(dataclasses.replace(rope, attention_factor=2.0), 128, jnp.arange(3))
        np.testing.assert_allclose(tables[0] ** 2 + tables[1] ** 2, 4.0, rtol=8 * 2**-24)

    @pytest.mark.parametrize("beta", [(32.0, 1.0), (8.0, 2.0), (1e-3, 1e-4)])
    @pytest.mark.parametrize("positions", [256, 4096])
    def test_yarn_pair_by_pair(self, positions, beta):
        """The rule of transformers, a pair at a time: first and last are whole numbers, within the head's channels."""
        fast, slow = beta
        rope = RopeConfig(1e4, "yarn", 8.0, original_positions=positions, beta_fast=fast, beta_slow=slow)
        turns = [positions * 1e4 ** (-i / 16) / (2 * math.pi) for i in range(100)]  # of pair i of a head of 32 channels
        first = max((i for i in range(100) if turns[i] >= fast), default=0)
        last = min(min((i for i in range(100) if turns[i] <= slow), default=99), 31)
        for i, got in enumerate(inverse_frequencies(rope, 32)):
            part = min(max((i - first) / (last - first), 0), 1) if last > first else float(i > first)
            want = 1e4 ** (-i / 16) * (1 - part + part / 8)
            np.testing.assert_allclose(got, want, rtol=16 * 2**-24)  # as above

    def test_yarn_extends_what_it_has_extended(self):
        config = DecoderConfig.debug(max_positions=4096)
        once = extended_rope(config, 8192, scaling="yarn")
        assert once.rope == RopeConfig(scaling="yarn", factor=2.0, original_positions=4096)
        # As published, max_position_embeddings may be that of the longer context.
        published = dataclasses.replace(once, max_positions=8192)
        assert extended_rope(published, 32768, scaling="yarn").rope.factor == 8.0
        assert extended_rope(published, 8192, scaling="yarn") is published

    def test_a_run_extends_what_it_starts_from(self):
        def rope(**options):
            options = LanguageOptions(start=str(CHECKPOINT), length=16, lora=LoraOptions(rank=4), **options)
            task = make_task(options, batch_size=2, seed=0, total_steps=2, workdir=pathlib.Path())
            return nnx.eval_shape(lambda: task.build(nnx.Rngs(0))).config.rope

        assert rope() == RopeConfig()
        assert rope(context=500) == RopeConfig(scaling="linear", factor=4.0)
        assert rope(context=500, scaling="yarn") == RopeConfig(scaling="yarn", factor=4.0, original_positions=128)

    @pytest.mark.parametrize(("had", "wanted"), [("llama3", "linear"), ("yarn", "linear"), ("linear", "yarn")])
    def test_other_scalings_are_refused(self, had, wanted):
        with pytest.raises(ValueError, match=f"rotary scaling is '{had}'; wanted 'none' or '{wanted}'"):
            extended_rope(DecoderConfig.debug(rope=RopeConfig(scaling=had)), 10_000, scaling=wanted)


TARGETS = ("query", "key", "value", "output")


class TestLora:
    @pytest.fixture
    def model(self):
        return Decoder(DecoderConfig.debug(), rngs=nnx.Rngs(0))

    def test_what_trains(self, model, golden):
        published = {
            name.split("base_model.model.")[1]
            for name in golden("longlora/lora_merge").meta["trainable_parameter_names"]
        }
        rules = [
            *RULES,
            *(
                dataclasses.replace(
                    rule, original=rule.original.replace("base_model.model.", "").replace(".weight", ".default.weight")
                )
                for rule in lora_rules(RULES)
            ),
        ]
        trains = nnx.state(add_lora(model, key=jax.random.key(0)), nnx.Param)
        assert to_original(trains, rules).keys() == published
        plain = nnx.state(add_lora(model, trained=(), key=jax.random.key(0)), nnx.Param)
        assert all("lora_" in name for name in to_original(plain, rules))

    def test_factors_begin_as_they_should(self, model, golden):
        lora = add_lora(model, key=jax.random.key(0)).blocks.query
        assert lora.a.shape == (2, 64, 8)
        assert lora.b.shape == (2, 8, 64)
        assert not np.asarray(lora.b[...]).any()
        assert np.abs(lora.a[...]).max() <= 1 / 8
        recorded = list(golden("longlora/lora_merge").meta["lora_A_initial_std"].values())
        # Uniform within ± 1/8: 0.0722; of 512 draws the deviation is known to 2 %, and six sigmas are allowed.
        for std in [*recorded, *np.asarray(lora.a[...]).std(axis=(1, 2))]:
            np.testing.assert_allclose(std, 0.125 / 3**0.5, rtol=0.12)

    def test_a_fresh_adapter_changes_nothing_and_merging_is_exact(self, model):
        tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 128)
        adapted = add_lora(model, rank=4, targets=("query", "down"), key=jax.random.key(0))
        np.testing.assert_array_equal(adapted(tokens)[0], model(tokens)[0])
        for name in ("query", "down"):
            lora = getattr(adapted.blocks, name)
            lora.b[...] = 0.1 * jax.random.normal(jax.random.key(2), lora.b.shape)
        merged = merge_lora(adapted)
        assert jax.tree.structure(merged) == jax.tree.structure(model)
        assert np.abs(np.asarray(adapted(tokens)[0] - model(tokens)[0])).max() > 1e-2
        # float32 sums of 64 to 112 terms in another order, in two layers.
        np.testing.assert_allclose(merged(tokens)[0], adapted(tokens)[0], atol=1e-5)
        assert isinstance(model.blocks.query, nnx.Linear)  # the model that came is as it was

    def test_only_what_trains_is_updated_and_a_checkpoint_restores_it(self, tmp_path):
        options = LanguageOptions(model={"size": "debug"}, length=16, lora=LoraOptions(rank=4, frozen_dtype="bfloat16"))
        run = _run(options)
        state = run.initial_state()
        before = jax.tree.map(np.asarray, state)
        batch = {"tokens": jax.random.randint(jax.random.key(1), (2, 17), 0, 128)}
        for _ in range(2):
            state, _ = run.step(state, batch, jax.random.key(0))
        was, now = flatten(before.params), flatten(state.params)
        assert {name for name in now if np.array_equal(was[name], now[name])} == set()
        assert all(value.dtype == jnp.float32 for value in now.values())
        frozen = flatten(state.frozen)
        assert set(frozen) == {
            *(f"blocks.{name}.base.kernel" for name in TARGETS),
            "head.kernel",
            *(f"blocks.{name}.kernel" for name in ("gate", "up", "down")),
        }
        for name, value in flatten(before.frozen).items():
            assert value.dtype == jnp.bfloat16
            np.testing.assert_array_equal(value, frozen[name], err_msg=name)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(2, state._asdict(), {"batches": None})
            checkpointer.wait()
            restored, _ = restore(run, checkpointer) or (None, None)
        for name, value in flatten(restored).items():
            np.testing.assert_array_equal(value, flatten(state)[name], err_msg=name)
            assert value.dtype == flatten(state)[name].dtype

    def test_packed_weights(self):
        """QLoRA: gradients pass through 4-bit weights, which stay as they are; merged it is a dense model."""
        model = Decoder(DecoderConfig.debug(), rngs=nnx.Rngs(0))
        for name in ("query", "output", "up"):
            linear = getattr(model.blocks, name)
            setattr(model.blocks, name, jax.vmap(_rounded)(linear))
        adapted = add_lora(model, key=jax.random.key(0))
        tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 128)
        graph, trains, frozen = nnx.split(adapted, nnx.Param, ...)
        loss = lambda trains: next_token_loss(nnx.merge(graph, trains, frozen), tokens)  # noqa: E731
        gradient = jax.jit(jax.grad(loss))(trains)
        for name, value in flatten(gradient).items():
            # B is zero, so A cannot matter yet; everything else does.
            assert np.asarray(value).any() != name.endswith(".a"), name
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trains))
        adapted.blocks.query.b[...] = 0.1 * jnp.ones(adapted.blocks.query.b.shape)
        merged = merge_lora(adapted)
        assert isinstance(merged.blocks.query, nnx.Linear)
        assert isinstance(merged.blocks.up, QuantizedLinear)
        assert isinstance(merged.blocks.up.words, Frozen)
        hidden = jax.jit(lambda model: model(tokens)[0])
        np.testing.assert_allclose(hidden(merged), hidden(adapted), atol=2e-5)  # float32, as above

    def test_a_run_on_a_packed_folder(self, tmp_path):
        """QLoRA from an AWQ checkpoint to the adapter it leaves."""
        options = LanguageOptions(start=str(CHECKPOINT), length=16, lora=LoraOptions(rank=4))
        run = _run(options)
        state = run.initial_state()
        base, _ = load(CHECKPOINT, dtype=jnp.float32)
        tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, base.config.vocabulary)
        hidden = jax.jit(lambda model: model(tokens)[0])
        # Scales in float16 times integers, or the same scales in float32: the product's rounding differs by 2**-11.
        got, want = hidden(run.model(state)), hidden(base)
        np.testing.assert_allclose(got, want, atol=2**-9 * np.abs(want).max())
        before = flatten(jax.tree.map(np.asarray, state.frozen))
        state, metrics = run.step(state, {"tokens": tokens}, jax.random.key(0))
        assert np.isfinite(metrics["loss"])
        for name, value in flatten(state.frozen).items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)
        assert any(name.endswith(".words") for name in before)
        run.task.export(run.model(state), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        again = hidden(load_adapter(tmp_path / "adapter", base))
        np.testing.assert_allclose(again, hidden(run.model(state)), atol=2**-9 * np.abs(want).max())  # as above
        with pytest.raises(ValueError, match=r"packed in 4 bits; give lora\.rank"):
            _run(dataclasses.replace(options, lora=LoraOptions()))

    def test_wrong_names_are_refused(self, model):
        with pytest.raises(ValueError, match="no linear is called q_proj"):
            add_lora(model, targets=("query", "q_proj"), key=jax.random.key(0))
        with pytest.raises(ValueError, match="rank=0"):
            add_lora(model, rank=0, key=jax.random.key(0))

    def test_new_tokens(self, s2, golden):
        _, model = s2
        case = golden("longlora/lora_merge")
        extended = extend_vocabulary(model, 1)
        assert extended.config.vocabulary == 65
        # Means of 64 rows of float32.
        np.testing.assert_allclose(extended.embedding[...][-1], case["out/resized/embed_last_row"], atol=1e-6)
        np.testing.assert_allclose(extended.head.kernel[...][:, -1], case["out/resized/lm_head_last_row"], atol=1e-6)
        tokens = jnp.arange(12)[None]
        want = model.logits(model(tokens)[0])
        np.testing.assert_array_equal(extended.logits(extended(tokens)[0])[..., :-1], want)

    def test_an_adapter_saved_and_loaded(self, model, tmp_path):
        adapted = add_lora(
            extend_vocabulary(model, 1), rank=4, alpha=6.0, targets=("query", "up"), key=jax.random.key(0)
        )
        adapted.blocks.up.b[...] = jax.random.normal(jax.random.key(2), adapted.blocks.up.b.shape)
        save_adapter(tmp_path, adapted, base="base")
        again = load_adapter(tmp_path, model)  # which lacks a token
        assert again.blocks.up.scale == 1.5
        for name, value in flatten(nnx.state(adapted, nnx.Param)).items():
            np.testing.assert_array_equal(value, flatten(nnx.state(again, nnx.Param))[name], err_msg=name)
        assert nnx.state(again, nnx.Param).keys() == nnx.state(adapted, nnx.Param).keys()
        assert isinstance(again.blocks.query, Lora)


def _rounded(linear):
    """A linear in 4 bits, one group."""
    weight = linear.kernel[...]
    low, high = weight.min(axis=0, keepdims=True), weight.max(axis=0, keepdims=True)
    scale = (high - low) / 15
    zero = jnp.clip(jnp.round(-low / scale), 0, 15)
    q = jnp.clip(jnp.round(weight / scale) + zero, 0, 15)
    return quantize_linear(linear, q.astype(jnp.uint8), scale, zero.astype(jnp.uint8))


def _run(options, **changes):
    sizes = {"task": "language", "total_steps": 2, "batch_size": 2} | changes
    config = TrainConfig(**sizes)
    task = make_task(options, batch_size=2, seed=0, total_steps=2, workdir=pathlib.Path())
    return set_up(config, task, jax.devices()[:1])


class TestInstructions:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "instructions.json"
        records = [
            {"instruction": "Add.", "input": "1 2", "output": "3", "file": "x"},
            {"instruction": "Greet.", "output": "Hello"},
            {"instruction": "Write.", "input": "", "output": "a" * 500},
            {"instruction": "Held.", "output": "out"},
        ]
        path.write_text(json.dumps(records))
        return path

    def test_templates(self, path):
        first, second, *_ = instructions(path, system="Be brief.")
        assert first.prompt == "[INST] <<SYS>>\nBe brief.\n<</SYS>> \n\n Add. \n1 2 [/INST]"
        assert (second.prompt, second.answer) == ("[INST]Greet.[/INST]", "Hello")

    def test_rows_teach_answers_only(self, path):
        data = InstructionData(str(path), system="S", held_out=1)
        rows = data.records(100, train=True)
        assert len(rows) == 2  # the first two share a row, the third is cut to one
        tokens, weights, segments = (rows[0][name] for name in ("tokens", "weights", "segments"))
        learnt = tokens[1:][weights == 1]
        assert bytes(learnt[learnt < 256].tolist()) == b"3Hello"
        assert (learnt == 257).sum() == 2  # each with its end
        assert (tokens == 256).sum() == 2
        starts = np.flatnonzero(tokens == 256)
        assert segments[starts].tolist() == [1, 2]
        assert segments[-1] == 0
        assert rows[1]["tokens"].shape == (101,)
        assert rows[1]["weights"].sum() == 101 - 1 - len("[INST]Write.[/INST]")
        (held,) = data.records(100, train=False)
        assert bytes(held["tokens"][1:][held["weights"] == 1][:3].tolist()) == b"out"

    def test_a_run_learns_from_them(self, path):
        options = LanguageOptions(
            model={"size": "debug"},
            length=100,
            instructions=InstructionData(str(path), held_out=1),
            attention=AttentionOptions("shifted"),
        )
        run = _run(options)
        batches = run.task.batches()
        batch = next(batches)
        batches.close()
        assert {name: value.shape for name, value in batch.items()} == {
            name: value.shape for name, value in run.task.batch_spec.items()
        }
        state = run.initial_state()
        state, metrics = run.step(state, batch, jax.random.key(0))
        assert 3 < float(metrics["loss"]) < 9  # log(259) = 5.6 for a fresh model
        found, _ = run.task.monitor(run.model(state), None)
        assert 3 < found["answer_loss"] < 9

    @pytest.mark.parametrize(
        ("text", "error"),
        [("[", "is not JSON"), ("{}", "holds a dict"), ('[{"instruction": "x"}]', "record 0: wanted texts")],
    )
    def test_errors(self, tmp_path, text, error):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=error):
            list(instructions(path))


class TestContextLength:
    def test_windows_by_brute_force(self):
        model = Decoder(DecoderConfig.debug(), rngs=nnx.Rngs(0))
        stream = np.asarray(jax.random.randint(jax.random.key(1), (50,), 0, 128))
        found = window_losses(model, stream, length=20, stride=8)
        assert found.shape == (4, 19)  # windows from 0, 8, 16 and 24; one from 32 would be too long
        for row, start in zip(found, (0, 8, 16, 24), strict=True):
            window = jnp.asarray(stream[None, start : start + 20])
            logits = np.asarray(model.logits(model(window[:, :-1])[0])[0], np.float64)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(row, -logits[np.arange(19), stream[start + 1 : start + 20]], atol=1e-5)
        curves = context_curves(model, stream, lengths=(10, 20), stride=8)
        np.testing.assert_allclose(curves["perplexity"][20], np.exp(found.mean()), rtol=1e-6)
        (position, first), (last, rest) = curves["loss_by_position"]
        assert (position, last) == (16, 19)
        np.testing.assert_allclose((16 * first + 3 * rest) / 19, found.mean(), rtol=1e-6)

    def test_a_picture_ends_at_the_highest_perplexity(self):
        def picture(losses, **options):
            curves = [("low", (1.0, 1.2)), ("high", losses)]
            found = {
                name: {
                    "perplexity": {16: math.exp(first), 32: math.exp(last)},
                    "loss_by_position": [[16, first], [32, last]],
                }
                for name, (first, last) in curves
            }
            return draw(found, **options)

        # What lies above shows only where nothing is cut off.
        assert picture((3.0, 3.5)) != picture((3.5, 3.0))
        assert picture((3.0, 3.5), highest=5.0) == picture((3.5, 3.0), highest=5.0)

    def test_pairs_are_those_of_the_closed_form(self):
        length = 8192
        mask = shifted_sparse(group_size(length), 4)
        full = attention_pairs(Mask(), length, heads=4, block=16)
        part = attention_pairs(mask, length, heads=4, block=16)
        # Without diagonals (2 + 1.75) / 2 of 8 g²; blocks of 16 add half a block a row to both: 16 / 8192 at most.
        np.testing.assert_allclose(part / full, 3.75 / 2 / 8, rtol=0.01)
        small = shifted_sparse(16, 4)
        assert attention_pairs(small, 64, heads=4) == dense_mask(small.ranges(64, 64), 64).sum()

    def test_flops_of_a_step(self):
        config = DecoderConfig.debug()
        found = step_flops(config, Mask(), 128)
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((1, 129), jnp.int32)
        at_once = count_flops(jax.make_jaxpr(jax.value_and_grad(next_token_loss))(model, tokens)).matmul
        pairs = 2 * 2 * config.depth * config.head_dim * config.heads * 128**2  # of 2 products
        assert found["rest"] == at_once - 3 * pairs  # 2 products forward and 4 backward
        weights = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 112) + 64 * 128
        # Every weight once forward, twice backward; the head once more, as its rows are recomputed.
        assert found["rest"] == 128 * 2 * (3 * weights + 64 * 128)
        assert found["attention"] == 7 * 2 * config.depth * config.head_dim * config.heads * 128**2
