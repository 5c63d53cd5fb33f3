"""DuoAttention against recorded outputs of the released code, and against its own definitions."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.attention import Mask, Streaming, attend
from lumen.io.head_patterns import GATES, read_pattern, write_pattern
from lumen.io.names.decoder import RULES
from lumen.io.pretrained import from_original, to_original
from lumen.language.decoder import Decoder, DecoderConfig
from lumen.language.generate import generate
from lumen.language.pretrained import parse_config
from lumen.layers import unstack
from lumen.long_context.duo_attention import (
    clip_gates,
    deploy,
    gate_loss,
    gated_hidden,
    head_kinds,
    head_order,
    reorder_heads,
    retrieval_heads,
    sparse_hidden,
)
from lumen.qtensor import quantize_linear
from lumen.training.optim import OptimizerConfig, make_optimizer

# The golden files' own tolerances: two orders of float32 sums over widths of 64 and 80.
HIDDEN, LOSS, GRADIENT, LOGITS, CACHE = 5e-5, 1e-4, 1e-3, 1e-4, 1e-5
PATTERN = "lr=0.02-reg=0.05-ctx=1000_32000-multi_passkey10"


@pytest.fixture(scope="module")
def load(golden):
    """load(case) -> (record, model)."""

    @functools.cache
    def load(case):
        record = golden(f"duo_attention/{case}")
        weights = golden(f"duo_attention/{record.meta.get('weights_file', case + '.npz')[:-4]}")
        abstract = jax.eval_shape(lambda: Decoder(parse_config(record.meta["config"]), rngs=nnx.Rngs(0)))
        return record, from_original(weights.weights(), abstract, RULES)

    return load


@functools.partial(jax.jit, static_argnames=("streaming", "branch", "remat"))
def loss_and_gradient(model, gates, tokens, labels, *, streaming, regularisation=0.05, branch="teacher", remat=True):
    options = {"streaming": streaming, "branch": branch, "remat": remat, "regularisation": regularisation}
    return jax.value_and_grad(lambda gates: gate_loss(model, gates, tokens, labels, **options), has_aux=True)(gates)


hidden = jax.jit(gated_hidden, static_argnames=("streaming", "branch", "remat"))
forward = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))
sparse = jax.jit(sparse_hidden, static_argnames="streaming")


@jax.jit
def step(model, tokens, cache):
    rows, cache = model(tokens, cache=cache)
    return model.logits(rows), cache


def random_model(**changes):
    """A debug model with biases that are not zero; K heads of 16 channels."""
    model = Decoder(DecoderConfig.debug(qkv_bias=True, **changes), rngs=nnx.Rngs(0))
    key = jax.random.key(1)
    for linear in (model.blocks.query, model.blocks.key, model.blocks.value):
        linear.bias[...] = jax.random.normal(key, linear.bias[...].shape)
        linear.kernel[...] = 4 * linear.kernel[...]  # attention that is far from uniform
    return model, jax.random.randint(jax.random.key(2), (2, 40), 0, 128)


def assert_near(got, want):
    """Of two float32 evaluations of the same model in other orders: 256 roundings of the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=256 * 2**-24 * np.abs(want).max())


class TestGatesAgainstTheOriginal:
    def test_both_streams(self, load):
        record, model = load("gated_training_sdpa")
        teacher, student = hidden(model, record["in/gates"], record["in/input_ids"], streaming=Streaming(4, 8))
        np.testing.assert_allclose(teacher, record["out/hidden_full"], rtol=0, atol=HIDDEN)
        np.testing.assert_allclose(student, record["out/hidden_student"], rtol=0, atol=HIDDEN)
        assert np.abs(teacher - student).max() > 100 * HIDDEN

    @pytest.mark.parametrize(
        ("case", "streaming"),
        [("gated_training_sdpa", Streaming(4, 8)), ("gated_training_blocksparse", Streaming(128, 128, block=128))],
    )
    def test_loss_and_gradients(self, load, case, streaming):
        record, model = load(case)
        gates, tokens, labels = record["in/gates"], record["in/input_ids"], record["in/labels"] != -100
        assert gates.max() > 1  # one that is clipped, and whose gradient is that of the penalty alone
        (loss, parts), gradient = loss_and_gradient(model, gates, tokens, labels, streaming=streaming)
        np.testing.assert_allclose(loss, record["out/loss"], rtol=LOSS)
        np.testing.assert_allclose(parts["distillation"], record["out/distill_loss"], rtol=LOSS)
        np.testing.assert_allclose(parts["penalty"], record["out/reg_loss"], rtol=1e-6)
        for weight, want in ((0.05, record["out/grad_loss"]), (0.0, record["out/grad_distill"])):
            _, got = loss_and_gradient(model, gates, tokens, labels, streaming=streaming, regularisation=weight)
            np.testing.assert_allclose(got, want, rtol=0, atol=GRADIENT * np.abs(want).max())
        assert float(gradient[0, 0]) == pytest.approx(0.05 / gates.size, rel=1e-6)

    def test_the_block_kernel_sees_whole_blocks(self, load):
        record, model = load("gated_training_blocksparse")
        tokens = record["in/input_ids"]
        _, student = hidden(model, record["in/gates"], tokens, streaming=Streaming(128, 128, block=128))
        np.testing.assert_allclose(student[:, -60:], record["out/hidden_student_tail"], rtol=0, atol=HIDDEN)
        _, exact = hidden(model, record["in/gates"], tokens, streaming=Streaming(128, 128))
        assert np.abs(exact[:, -60:] - student[:, -60:]).max() > 10 * HIDDEN

    def test_the_training_loop(self, load):
        record, model = load("gate_training_loop")
        steps, peak = record.meta["config"]["steps"], record.meta["config"]["lr"]
        ramp = steps // 5
        config = OptimizerConfig(
            learning_rate=peak, schedule="trapezoid", warmup_steps=ramp, final_learning_rate=peak / 10, beta2=0.999
        )
        optimizer = make_optimizer(config, steps)
        gates = jnp.ones((2, 2))
        state = optimizer.init(gates)
        labels = np.broadcast_to(np.arange(32) >= 16, (1, 32))
        for i in range(steps):
            gates = jnp.clip(gates, 0, 1)
            tokens = record["in/input_ids"][i : i + 1]
            (_, parts), gradient = loss_and_gradient(model, gates, tokens, labels, streaming=Streaming(4, 8))
            want = record["out/grads"][i]
            np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-2 * np.abs(want).max())
            np.testing.assert_allclose(parts["penalty"], record["out/reg"][i], atol=2e-3)
            updates, state = optimizer.update(gradient, state, gates)
            gates = gates + updates
            np.testing.assert_allclose(gates, record["out/gates"][i], rtol=0, atol=2e-3)

    @pytest.mark.parametrize(("sink", "recent"), [(4, 8), (0, 5), (6, 1), (40, 3)])
    def test_streaming_attention(self, golden, sink, recent):
        record = golden("duo_attention/streaming_attention")
        mask, name = Mask(kinds=(Streaming(sink, recent),)), f"out/sink{sink}_recent{recent}"
        q, k, v = (record[f"in/{part}"] for part in "qkv")
        ranges = np.asarray(mask.ranges(37, 37).ranges)[0, 0]  # [T, 4]
        key = np.arange(37)
        first, second = (ranges[:, i, None] <= key for i in (0, 2)), (ranges[:, i, None] > key for i in (1, 3))
        seen = np.logical_or(*(a & b for a, b in zip(first, second, strict=True)))
        np.testing.assert_array_equal(seen, record[f"{name}/mask"])
        got, backward = jax.vjp(jax.jit(lambda q, k, v: attend(q, k, v, mask=mask)), q, k, v)
        np.testing.assert_allclose(got, record[f"{name}/attention"], rtol=0, atol=1e-5)
        if f"{name}/grad_q" in record:
            for part, gradient in zip("qkv", backward(record["in/grad_out"]), strict=True):
                np.testing.assert_allclose(gradient, record[f"{name}/grad_{part}"], rtol=0, atol=5e-5)


class TestGates:
    def test_open_gates_change_nothing(self):
        model, tokens = random_model()
        teacher, student = hidden(model, jnp.ones((2, 2)), tokens, streaming=Streaming(2, 4))
        np.testing.assert_array_equal(student, teacher)
        assert_near(model.logits(teacher), forward(model, tokens))

    @pytest.mark.parametrize("branch", ["teacher", "student"])
    def test_closed_gates_are_streaming_llm(self, branch):
        model, tokens = random_model()
        _, student = hidden(model, jnp.zeros((2, 2)), tokens, streaming=Streaming(2, 4), branch=branch)
        want = jax.jit(lambda model, tokens: model(tokens, mask=Mask(kinds=(Streaming(2, 4),)))[0])(model, tokens)
        assert_near(student, want)

    def test_a_window_as_long_as_the_text_changes_nothing(self):
        model, tokens = random_model()
        teacher, student = hidden(model, jnp.full((2, 2), 0.3), tokens, streaming=Streaming(10, 30))
        assert_near(student, teacher)

    def test_branches_differ_from_the_second_layer_on(self):
        model, tokens = random_model()
        gates = jnp.full((2, 2), 0.5)
        rows = [hidden(model, gates, tokens, streaming=Streaming(2, 4), branch=b)[1] for b in ("teacher", "student")]
        assert np.abs(rows[0] - rows[1]).max() > 1e-3
        first = jax.tree.map(lambda array: array[:1], model.blocks)
        model.blocks, model.config = first, DecoderConfig.debug(qkv_bias=True, depth=1)
        rows = [
            hidden(model, gates[:1], tokens, streaming=Streaming(2, 4), branch=b)[1] for b in ("teacher", "student")
        ]
        assert_near(rows[0], rows[1])

    @pytest.mark.parametrize("branch", ["teacher", "student"])
    def test_gradient_is_that_of_finite_differences(self, branch):
        model, tokens = random_model()
        with jax.enable_x64(True):
            model = jax.tree.map(lambda x: x.astype(jnp.float64), model)
            gates = jnp.asarray([[0.2, 0.7], [0.5, 0.9]], jnp.float64)
            labels = np.arange(40) >= np.array([[20], [30]])

            @jax.jit
            def rows(gates):
                teacher, student = gated_hidden(model, gates, tokens, streaming=Streaming(2, 4), branch=branch)
                return jnp.sum(jnp.square(teacher - student) * labels[..., None])

            got = jax.jit(jax.grad(rows))(gates)
            for index in np.ndindex(2, 2):
                step = jnp.zeros((2, 2), jnp.float64).at[index].set(1e-2)
                want = (rows(gates + step) - rows(gates - step)) / 2e-2
                # The curvature's 1e-4, and softmaxes that are float32 inside.
                assert float(got[index]) == pytest.approx(float(want), rel=1e-2)

    def test_no_gradient_reaches_the_teacher(self):
        model, tokens = random_model()

        def teacher_sum(gates, model):
            return jnp.sum(gated_hidden(model, gates, tokens, streaming=Streaming(2, 4))[0] ** 2)

        gradient = jax.jit(jax.grad(teacher_sum))(jnp.full((2, 2), 0.5), model)
        np.testing.assert_array_equal(gradient, 0.0)

    def test_remat_and_lists_of_layers_change_nothing(self):
        model, tokens = random_model()
        gates, labels = jnp.full((2, 2), 0.4), np.ones((2, 40), bool)
        options = {"streaming": Streaming(2, 4)}
        (want, _), gradient = loss_and_gradient(model, gates, tokens, labels, remat=False, **options)
        for other in (model, unstack(model)):
            (got, _), found = loss_and_gradient(other, gates, tokens, labels, **options)
            np.testing.assert_allclose(got, want, rtol=1e-5)
            assert_near(found, gradient)

    def test_segments_are_samples_of_their_own(self):
        model, tokens = random_model()
        packed = tokens.reshape(1, 80)
        segments = np.repeat([[1, 2]], 40, axis=1)
        gates = jnp.full((2, 2), 0.4)
        got = hidden(model, gates, packed, streaming=Streaming(2, 4), segments=segments)
        want = hidden(model, gates, tokens, streaming=Streaming(2, 4))
        for packed_rows, rows in zip(got, want, strict=True):
            # Positions count on, and attention sees their differences only: angles up to 80 radians are rounded.
            np.testing.assert_allclose(packed_rows.reshape(rows.shape), rows, rtol=0, atol=2e-4)

    def test_clipping_lets_gradients_through_at_both_ends(self):
        gates = jnp.array([-0.1, 0.0, 0.4, 1.0, 1.1])
        np.testing.assert_array_equal(clip_gates(gates), jnp.array([0.0, 0.0, 0.4, 1.0, 1.0]))
        np.testing.assert_array_equal(jax.grad(lambda g: clip_gates(g).sum())(gates), [0, 1, 1, 1, 0])

    def test_a_wrong_shape_is_refused(self):
        model, tokens = random_model()
        with pytest.raises(ValueError, match=r"gates is \[2, 4\]; wanted \[2, 2\], the model's layers"):
            gated_hidden(model, jnp.ones((2, 4)), tokens)


class TestPatternFolder:
    @pytest.fixture
    def folder(self):
        return pathlib.Path(__file__).parents[1] / "goldens/duo_attention/attn_patterns/tiny" / PATTERN

    def test_reads_what_the_original_wrote(self, golden, folder):
        record = golden("duo_attention/pattern_file")
        gates, config = read_pattern(folder, (5, 4))
        np.testing.assert_array_equal(gates, record["in/gates"].astype(np.float64))
        np.testing.assert_array_equal(np.clip(gates, 0, 1), record["out/loaded"])
        assert (config["sink_size"], config["recent_size"]) == (128, 256)

    def test_writes_what_the_original_wrote(self, golden, folder, tmp_path):
        gates, config = read_pattern(folder)
        write_pattern(tmp_path, jnp.asarray(gates, jnp.float32), **config)
        for name in (GATES, "config.json"):
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name

    def test_any_number_comes_back(self, tmp_path):
        gates = np.random.default_rng(0).normal(size=(7, 3))
        write_pattern(tmp_path, gates, sink_size=16)
        got, config = read_pattern(tmp_path)
        np.testing.assert_array_equal(got, gates)
        assert config["sink_size"] == 16

    def test_errors_say_what_is_wrong(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"5 layers x 4 heads came; the model has 32 x 8"):
            read_pattern(folder, (32, 8))
        with pytest.raises(ValueError, match="'sink' is no key of the format"):
            write_pattern(tmp_path, np.ones((2, 2)), sink=4)
        with pytest.raises(ValueError, match="all finite"):
            write_pattern(tmp_path, np.full((2, 2), np.nan))
        write_pattern(tmp_path, np.ones((2, 2)))
        for text, message in (
            ("1.0\tx\n", "not a table"),
            ("1.0\tnan\n", "finite"),
            ("1.0\n1.0\t0.0\n", "not a table"),
        ):
            (tmp_path / GATES).write_text(text)
            with pytest.raises(ValueError, match=message):
                read_pattern(tmp_path)
        (tmp_path / GATES).unlink()
        with pytest.raises(FileNotFoundError, match=GATES):
            read_pattern(tmp_path)


class TestChoice:
    @pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 1.0])
    @pytest.mark.parametrize("seed", [None, 3])
    def test_as_the_original(self, golden, sparsity, seed):
        record = golden("duo_attention/pattern_file")
        got = retrieval_heads(record["in/gates"], sparsity, seed=seed)
        np.testing.assert_array_equal(got, record[f"out/binary/sparsity{sparsity}"])

    @pytest.mark.parametrize("seed", range(4))
    def test_any_sparsity_is_the_quantile_rule(self, seed):
        gates = np.random.default_rng(seed).random((7, 3 + seed))
        for sparsity in np.linspace(0.01, 0.99, 41):
            want = gates >= np.quantile(gates, sparsity)
            np.testing.assert_array_equal(retrieval_heads(gates, sparsity), want)
            assert abs(want.sum() - np.ceil((1 - sparsity) * gates.size)) <= 1

    def test_ties_go_to_the_first(self):
        gates = np.array([[0.5, 1.0], [1.3, 0.5], [-1.0, 0.5]])
        np.testing.assert_array_equal(retrieval_heads(gates, 0.5), [[1, 1], [1, 0], [0, 0]])
        chosen = {retrieval_heads(gates, 0.5, seed=seed).tobytes() for seed in range(20)}
        assert len(chosen) == 3  # the third head is one of the three at 0.5
        assert all(np.frombuffer(heads, bool).sum() == 3 for heads in chosen)

    def test_per_layer_and_threshold(self):
        gates = np.array([[0.9, 0.8, 0.7], [0.1, 0.3, 0.2]])
        np.testing.assert_array_equal(retrieval_heads(gates, 0.5), [[1, 1, 1], [0, 0, 0]])
        np.testing.assert_array_equal(retrieval_heads(gates, 0.5, per_layer=True), [[1, 1, 0], [0, 1, 1]])
        np.testing.assert_array_equal(retrieval_heads(gates, threshold=0.75), [[1, 1, 0], [0, 0, 0]])


class TestReordering:
    def test_as_the_original(self, load):
        record, model = load("deployment")
        retrieval = record["in/pattern"] > 0.5
        for layer, order in enumerate(head_order(retrieval)):
            np.testing.assert_array_equal(order, record[f"out/reordered/layer{layer}/kv_order"])
        got = to_original(reorder_heads(model, retrieval), RULES)
        wanted = {name: want for name, want in record.weights("out/reordered/").items() if name.startswith("model.")}
        assert len(wanted) == 4  # of layer 0, whose first head is the retrieval head
        # In layer 1 the second is: groups of two query heads of 16 channels, and key heads of 16, change places.
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
            name = f"model.layers.1.self_attn.{name}.weight"
            weight = record[f"weights/{name}"]
            wanted[name] = np.roll(weight, rows, axis=1 if "o_proj" in name else 0)
        for name, want in wanted.items():
            np.testing.assert_array_equal(got[name], want, err_msg=name)

    @pytest.mark.parametrize(("heads", "kv_heads", "listed"), [(4, 4, False), (6, 3, True), (4, 1, False)])
    def test_the_function_stays(self, heads, kv_heads, listed):
        model, tokens = random_model(heads=heads, kv_heads=kv_heads)
        retrieval = np.random.default_rng(3).random((2, kv_heads)) < 0.5
        retrieval[1, 0], retrieval[1, -1] = False, True  # something moves
        given = unstack(model) if listed else model
        changed = reorder_heads(given, retrieval)
        assert_near(forward(changed, tokens), forward(model, tokens))
        assert kv_heads == 1 or not np.array_equal(
            jax.tree.leaves(changed.blocks)[-1], jax.tree.leaves(given.blocks)[-1]
        )

    @pytest.mark.parametrize(("group", "listed"), [(32, False), (-1, True)])
    def test_packed_weights(self, group, listed):
        # Two query heads of 16 channels to a key head: 32 input channels of the output layer move together.
        model, tokens = random_model(heads=8, kv_heads=4, width=128, hidden=128)
        model = quantized(unstack(model) if listed else model, group)
        retrieval = np.array([[0, 1, 0, 1], [1, 0, 0, 1]], bool)
        assert_near(forward(reorder_heads(model, retrieval), tokens), forward(model, tokens))

    def test_a_scale_for_several_heads_is_refused(self):
        model, _ = random_model(heads=8, kv_heads=4, width=128, hidden=128)
        with pytest.raises(ValueError, match=r"one scale serves 64 input channels .* have 32; quantise with a group"):
            reorder_heads(quantized(model, 64), np.array([[0, 1, 0, 1], [1, 0, 0, 1]], bool))


def quantized(model, group):
    """The model with random 4-bit weights in its attention layers."""
    rng = np.random.default_rng(0)

    def linear(old):
        inputs, outputs = old.kernel.shape[-2:]
        q = jnp.asarray(rng.integers(0, 16, (inputs, outputs)), jnp.uint8)
        rows = 1 if group == -1 else inputs // group
        scale = jnp.asarray(0.01 * rng.random((rows, outputs)) + 0.005, jnp.float32)
        return quantize_linear(old, q, scale, jnp.asarray(rng.integers(0, 16, (rows, outputs)), jnp.float32))

    listed = unstack(model) if not isinstance(model.blocks, nnx.List) else model
    for block in listed.blocks:
        for name in ("query", "key", "value", "output"):
            setattr(block, name, linear(getattr(block, name)))
    if listed is model:
        return model
    model.blocks = jax.tree.map(lambda *arrays: jnp.stack(arrays), *listed.blocks)
    return model


class TestDeployment:
    @pytest.fixture
    def case(self, load):
        record, model = load("deployment")
        return record, model, record["in/pattern"] > 0.5

    def run(self, model, tokens, chunks, **options):
        """Logits of each call's last token, and the cache at the end."""
        cache = model.empty_cache(len(tokens), tokens.shape[1])
        got, start = [], 0
        for count in chunks:
            logits, cache = step(model, tokens[:, start : start + count], cache)
            got.append(logits[:, -1])
            start += count
        return np.stack(got, axis=1), cache

    def test_chunks_and_decoding_as_the_original(self, case):
        record, model, retrieval = case
        chunks = [*record.meta["config"]["chunks"], *[1] * record.meta["config"]["decode_tokens"]]
        deployed = deploy(model, retrieval, sink=4, recent=8, prefill="chunk")
        got, cache = self.run(deployed, record["in/input_ids"], chunks)
        np.testing.assert_allclose(got, record["out/logits"], rtol=0, atol=LOGITS)
        assert np.abs(record["out/logits"] - record["out/logits_dense"]).max() > 100 * LOGITS
        held = record["out/end/streaming_positions"]
        # Ours keeps one token more, the one that decoding added beside `recent`.
        slots = np.where(held < 4, held, 4 + (held - 4) % 9)
        for layer, (dense, streaming) in enumerate(cache.layers):
            want = f"out/end/layer{layer}"
            np.testing.assert_allclose(dense.keys[0], record[f"{want}/full_key"], rtol=0, atol=CACHE)
            for array, name in ((streaming.keys, "key"), (streaming.values, "value")):
                got = array[0][:, :, slots]
                np.testing.assert_allclose(got, record[f"{want}/streaming_{name}"], rtol=0, atol=CACHE)

    @pytest.mark.parametrize("chunks", [(42,), (18, 18, 5, 1)])
    def test_token_by_token_any_chunks_give_the_masked_pass(self, case, chunks):
        record, model, retrieval = case
        tokens = record["in/input_ids"]
        kinds = head_kinds(retrieval, 2)
        rows = sparse(model, kinds, tokens, streaming=Streaming(4, 8, includes_self=False))
        ends = np.cumsum(chunks) - 1
        got, _ = self.run(deploy(model, retrieval, sink=4, recent=8), tokens, chunks)
        assert_near(got, model.logits(rows)[:, ends])

    def test_no_streaming_heads_is_the_dense_model(self, case):
        record, model, _ = case
        got, _ = self.run(deploy(model, np.ones((2, 2), bool), prefill="chunk"), record["in/input_ids"], (20, 22))
        assert_near(got, forward(model, record["in/input_ids"])[:, [19, 41]])

    def test_a_prompt_in_one_chunk_is_dense(self, case):
        record, model, retrieval = case
        deployed = deploy(model, retrieval, sink=4, recent=8, prefill="chunk")
        got, _ = self.run(deployed, record["in/input_ids"], (42,))
        assert_near(got[:, 0], forward(model, record["in/input_ids"])[:, -1])

    def test_generation_with_packed_weights(self):
        model, tokens = random_model(heads=8, kv_heads=4, width=128, hidden=128)
        model = quantized(model, 32)
        retrieval = np.array([[0, 1, 0, 1], [1, 0, 0, 1]], bool)
        deployed = deploy(model, retrieval, sink=2, recent=6)
        prompt = np.asarray(tokens[0, :30]).tolist()
        got, _ = generate(deployed, [prompt], max_new_tokens=4, prefill_chunk=16)
        kinds, text = head_kinds(retrieval, 2), np.array([[*prompt, 0, 0, 0, 0]])
        for place in range(30, 34):
            rows = sparse(model, kinds, text, streaming=Streaming(2, 6, includes_self=False))
            text[0, place] = jnp.argmax(model.logits(rows[0, place - 1]))
        np.testing.assert_array_equal(text[:, 30:], got)

    def test_settings_travel_with_the_pattern(self, case, tmp_path):
        _, model, retrieval = case
        write_pattern(tmp_path, retrieval, sink_size=3, recent_size=5)
        gates, config = read_pattern(tmp_path, (model.config.depth, model.config.kv_heads))
        deployed = deploy(model, retrieval_heads(gates), sink=config["sink_size"], recent=config["recent_size"])
        assert deployed.config.streaming.dense == (1, 1)
        assert json.loads((tmp_path / "config.json").read_text())["recent_size"] == 5
        assert deployed.empty_cache(1, 64).layers[0][1].keys.shape == (1, 1, 1, 16, 16)
