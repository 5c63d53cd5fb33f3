"""The decoder against transformers' Llama and Qwen2, and against itself: caches, packing, ways to run the layers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.io.names.decoder import RULES
from lumen.io.pretrained import from_original, to_original
from lumen.kv_cache import DenseCache, StreamingHeads
from lumen.language.decoder import Decoder, DecoderConfig, next_token_loss
from lumen.language.generate import generate
from lumen.language.pretrained import parse_config
from lumen.layers import unstack
from lumen.rope import inverse_frequencies, rotary_tables

CASES = ("llama_gqa", "llama_rope_llama3", "llama_rope_linear", "qwen2_tied")
WITH_GRADIENTS = ("llama_gqa", "qwen2_tied")
LOGITS = 1e-4  # the golden files' own tolerance; two releases of torch differ by 1e-5


@pytest.fixture(scope="module")
def load(golden):
    """load(case) -> (record, model)."""

    @functools.cache
    def load(case):
        record = golden(f"decoder/{case}")
        abstract = jax.eval_shape(lambda: Decoder(parse_config(record.meta["config"]), rngs=nnx.Rngs(0)))
        return record, from_original(record.weights(), abstract, RULES)

    return load


@jax.jit
def forward(model, tokens, positions=None, segments=None):
    return model.logits(model(tokens, positions=positions, segments=segments)[0])


@jax.jit
def step(model, tokens, cache):
    hidden, cache = model(tokens, cache=cache)
    return model.logits(hidden), cache


def rounding(want, terms):
    """Largest difference of two float32 evaluations that sum up to `terms` products in other orders, four sums deep."""
    return 4 * terms * 2**-24 * np.abs(want).max()


class TestAgainstTransformers:
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("case", CASES)
    def test_logits_and_loss_with_padding(self, load, case, side):
        record, model = load(case)
        tokens, mask = record["in/input_ids"], record[f"in/{side}/attention_mask"]
        # Padding is a sample of its own: the tokens of the row do not see it.
        logits = forward(model, tokens, record[f"in/{side}/position_ids"], mask)
        valid = mask == 1
        np.testing.assert_allclose(logits[valid], record[f"out/{side}/logits"][valid], rtol=0, atol=LOGITS)
        # Attention sees differences of positions only, so they may count from the padding on.
        weights = record[f"in/{side}/labels"][:, 1:] != -100
        loss = next_token_loss(model, tokens, weights=weights, segments=mask[:, :-1])
        np.testing.assert_allclose(loss, record[f"out/{side}/loss"], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("case", CASES)
    def test_logits_without_padding(self, load, case):
        record, model = load(case)
        got = forward(model, record["in/input_ids"])
        np.testing.assert_allclose(got, record["out/nopad/logits"], rtol=0, atol=LOGITS)

    @pytest.mark.parametrize("case", WITH_GRADIENTS)
    def test_hidden_states(self, load, case):
        record, model = load(case)
        mask = record["in/right/attention_mask"]
        tables = model.tables(record["in/right/position_ids"])
        visible = np.tril(np.ones((24, 24), bool)) & (mask[:, :, None] == mask[:, None])
        x = model.embedding[...][record["in/input_ids"]]
        rows = [x]
        for block in unstack(model).blocks:
            rows.append(block(rows[-1], tables, visible[:, None]))
        rows[-1] = model.norm(rows[-1])
        valid = mask == 1
        for got, want in zip(rows, record["out/right/hidden_states"], strict=True):
            np.testing.assert_allclose(got[valid], want[valid], rtol=0, atol=LOGITS)

    @pytest.mark.parametrize(("case", "remat"), [("llama_gqa", False), ("qwen2_tied", True)])
    def test_gradients(self, load, case, remat):
        record, model = load(case)
        weights, mask = record["in/right/labels"][:, 1:] != -100, record["in/right/attention_mask"]

        def loss(model):
            tokens = record["in/input_ids"]
            return next_token_loss(model, tokens, weights=weights, segments=mask[:, :-1], remat=remat)

        got = to_original(jax.jit(jax.grad(loss))(model), RULES)
        wanted = record.weights("out/right/grad/")
        # Recorded are the embedding, everything in the first layer and the last norm, through which the rest flows.
        assert len(wanted) == (14 if case == "qwen2_tied" else 11)
        for name, want in wanted.items():
            np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=name)

    @pytest.mark.parametrize(("case", "layers"), [*((case, "stacked") for case in CASES), ("llama_gqa", "listed")])
    def test_prefill_and_decode(self, load, case, layers):
        record, model = load(case)
        model = model if layers == "stacked" else unstack(model)
        # The recorded prompt of 16 tokens is padded on the left, our caches on the right.
        tokens, mask = record["in/input_ids"], record["in/decode/attention_mask"]
        prompt = 16
        lengths = mask[:, :prompt].sum(axis=1)
        rows = np.stack([np.roll(row[:prompt], length - prompt) for row, length in zip(tokens, lengths, strict=True)])
        logits, cache = step(model, rows, model.empty_cache(len(rows), tokens.shape[1]))
        for row, length in enumerate(lengths):
            for got, name in ((cache.keys, "prefill_keys"), (cache.values, "prefill_values")):
                want = record[f"out/decode/{name}"][:, row, :, prompt - length :]  # [L, K, S, H]
                np.testing.assert_allclose(got[:, row, :, :length], want, rtol=0, atol=1e-5)
        want = record["out/decode/step_logits"]
        np.testing.assert_allclose(logits[np.arange(3), lengths - 1], want[:, 0], rtol=0, atol=LOGITS)
        cache = dataclasses.replace(cache, length=jnp.asarray(lengths, jnp.int32))
        for i in range(tokens.shape[1] - prompt):
            logits, cache = step(model, tokens[:, prompt + i, None], cache)
            np.testing.assert_allclose(logits[:, 0], want[:, i + 1], rtol=0, atol=LOGITS)
        np.testing.assert_array_equal(cache.length, lengths + 8)

    @pytest.mark.parametrize("case", CASES)
    def test_rotary_tables(self, load, case):
        record, model = load(case)
        config = model.config
        got = inverse_frequencies(config.rope, config.head_dim)
        # One rounding of a power, and one of each operation of the scaling.
        np.testing.assert_allclose(got, record["out/rope_inv_freq"], rtol=4 * 2**-23)
        cosines, sines = rotary_tables(config.rope, config.head_dim, record["in/offset/position_ids"][0])
        # An angle of up to 60 radians is off by the rounding of its frequency.
        for got, name in ((cosines, "rope_cos"), (sines, "rope_sin")):
            want = record[f"out/offset/{name}"]
            np.testing.assert_allclose(np.tile(got, 2), want, rtol=0, atol=60 * 4 * 2**-23)


class TestCache:
    @pytest.mark.parametrize("chunks", [(24,), (8, 8, 8), (16, 7, 1), (1,) * 24])
    def test_any_chunks_give_the_full_forward(self, load, chunks):
        record, model = load("llama_gqa")
        tokens = record["in/input_ids"]
        want = forward(model, tokens)
        cache, got, start = model.empty_cache(3, 30), [], 0
        for count in chunks:
            logits, cache = step(model, tokens[:, start : start + count], cache)
            got.append(logits)
            start += count
        np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=0, atol=rounding(want, 112))
        assert cache.length == 24

    def test_long_prompt(self, load):
        """Long enough for attention in blocks, in one pass and in two."""
        _, model = load("llama_gqa")
        tokens = jax.random.randint(jax.random.key(0), (2, 300), 0, 128)
        want = forward(model, tokens)
        logits, _ = step(model, tokens, model.empty_cache(2, 600))
        np.testing.assert_allclose(logits, want, rtol=0, atol=rounding(want, 300))
        _, cache = step(model, tokens[:, :131], model.empty_cache(2, 600))
        logits, _ = step(model, tokens[:, 131:], cache)
        np.testing.assert_allclose(logits, want[:, 131:], rtol=0, atol=rounding(want, 300))

    def test_rows_of_several_lengths(self, load):
        """Each row of a ragged cache decodes as it does alone, whatever was written beyond its length."""
        record, model = load("qwen2_tied")
        tokens, lengths = record["in/input_ids"], np.array([17, 1, 9])
        alone = forward(model, tokens)
        _, cache = step(model, tokens[:, :17], model.empty_cache(3, 24))
        cache = dataclasses.replace(cache, length=jnp.asarray(lengths, jnp.int32))
        for i in range(4):
            fed = tokens[np.arange(3), lengths + i][:, None]
            logits, cache = step(model, fed, cache)
            for row, length in enumerate(lengths):
                want = alone[row, length + i]
                np.testing.assert_allclose(logits[row, 0], want, rtol=0, atol=rounding(want, 112))

    def test_ragged_writes_beyond_the_end_are_dropped(self):
        cache = DenseCache(jnp.zeros((1, 2, 1, 3, 2)), jnp.zeros((1, 2, 1, 3, 2)), jnp.array([1, 3], jnp.int32))
        written = cache.extend(0, jnp.ones((2, 2, 1, 2)), jnp.ones((2, 2, 1, 2)))[0].keys[0, :, 0, :, 0]
        np.testing.assert_array_equal(written, [[0, 1, 1], [0, 0, 0]])

    def test_narrow_cache(self, load):
        record, model = load("llama_gqa")
        tokens = record["in/input_ids"]
        want = forward(model, tokens)
        logits, cache = step(model, tokens, model.empty_cache(3, 24, jnp.bfloat16))
        assert cache.keys.dtype == jnp.bfloat16
        # Keys and values are rounded to 8 bits: 2**-8 of each, averaged over heads and keys.
        np.testing.assert_allclose(logits, want, rtol=0, atol=2**-8 * np.abs(want).max())

    def test_segments_are_refused(self, load):
        record, model = load("llama_gqa")
        with pytest.raises(ValueError, match="a cache holds one sample per row"):
            model(record["in/input_ids"], segments=record["in/right/attention_mask"], cache=model.empty_cache(3, 24))


class TestStreamingHeads:
    """Two caches a layer against the same model under its mask, layers with 2, 1 and 0 dense heads."""

    HEADS = StreamingHeads((2, 0), sink=3, recent=5)

    def deployed(self, load, dense=(1, 0), **changes):
        record, model = load("llama_gqa")
        model = unstack(model)
        heads = dataclasses.replace(self.HEADS, dense=dense, **changes)
        model.config = dataclasses.replace(model.config, streaming=heads)
        return record["in/input_ids"], model

    @pytest.mark.parametrize("dense", [(1, 0), (2, 1), (0, 2)])
    @pytest.mark.parametrize("chunks", [(1,) * 24, (24,), (7, 1, 1, 12, 3)])
    def test_any_chunks_give_the_masked_forward(self, load, dense, chunks):
        tokens, model = self.deployed(load, dense)
        want, got = forward(model, tokens), []
        cache = model.empty_cache(len(tokens), 24)
        for start, end in itertools.pairwise([0, *itertools.accumulate(chunks)]):
            logits, cache = step(model, tokens[:, start:end], cache)
            got.append(logits)
        np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=0, atol=rounding(want, 112))
        # The mask hides something: 24 tokens do not fit into 3 + 5 + 1.
        assert np.abs(want - forward(load("llama_gqa")[1], tokens)).max() > 1e-3

    def test_everything_dense_is_the_plain_model(self, load):
        tokens, model = self.deployed(load, (2, 2))
        want = forward(load("llama_gqa")[1], tokens)
        np.testing.assert_allclose(forward(model, tokens), want, rtol=0, atol=rounding(want, 112))

    def test_generation_of_prompts_of_several_lengths(self, load):
        """Greedy tokens of a padded batch in chunks equal those of each prompt alone, token by token under the mask."""
        tokens, model = self.deployed(load)
        prompts = [np.asarray(tokens[0, :17]).tolist(), np.asarray(tokens[1, :4]).tolist()]
        got, _ = generate(model, prompts, max_new_tokens=6, prefill_chunk=5)
        for row, prompt in zip(got, prompts, strict=True):
            text = list(prompt)
            for token in row:
                assert token == int(np.argmax(forward(model, jnp.asarray([text]))[0, -1]))
                text.append(int(token))

    def test_counts_per_layer(self, load):
        with pytest.raises(ValueError, match=r"is for 3 of 2 layers"):
            self.deployed(load, (1, 1, 1))


class TestEquivalentRuns:
    def test_packed_samples_are_separate(self, load):
        record, model = load("llama_rope_llama3")
        tokens, cuts = record["in/input_ids"][:1], (0, 5, 17, 24)
        lengths = np.diff(cuts)
        segments = np.repeat(np.arange(3), lengths)[None]
        positions = np.concatenate([np.arange(n) for n in lengths])[None]
        got = forward(model, tokens, positions, segments)
        for start, end in itertools.pairwise(cuts):
            want = forward(model, tokens[:, start:end])
            np.testing.assert_allclose(got[:, start:end], want, rtol=0, atol=rounding(want, 112))

    def test_loss_in_chunks(self, load):
        record, model = load("qwen2_tied")
        tokens, weights = record["in/input_ids"], record["in/right/labels"][:, 1:] != -100
        tokens, weights = tokens[:, :21], weights[:, :20]
        whole, parts = (
            jax.jit(
                jax.value_and_grad(functools.partial(next_token_loss, tokens=tokens, weights=weights, chunk=chunk))
            )(model)
            for chunk in (0, 5)
        )
        np.testing.assert_allclose(parts[0], whole[0], rtol=60 * 2**-24)  # a sum of 60 losses
        for got, want in zip(*(jax.tree.leaves(grads) for _, grads in (parts, whole)), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=rounding(want, 60))
        with pytest.raises(ValueError, match="chunk=7 does not divide the 20 positions"):
            next_token_loss(model, tokens, chunk=7)

    def test_stacked_and_listed_layers(self, load):
        record, model = load("qwen2_tied")
        tokens = record["in/input_ids"]
        want = forward(model, tokens)
        np.testing.assert_allclose(forward(unstack(model), tokens), want, rtol=0, atol=rounding(want, 112))

    def test_half_precision(self, load):
        record, model = load("llama_gqa")
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
        hidden, _ = half(record["in/input_ids"])
        assert hidden.dtype == jnp.bfloat16
        got, want = half.logits(hidden), record["out/nopad/logits"]
        assert got.dtype == jnp.float32
        # Two layers of some ten roundings to 2**-8 each.
        assert np.linalg.norm(got - want) < 20 * 2**-8 * np.linalg.norm(want)


class TestConfig:
    @pytest.mark.parametrize(("changes", "message"), [({"kv_heads": 3}, "heads=4 is not"), ({"head_dim": 7}, "is odd")])
    def test_impossible_sizes(self, changes, message):
        with pytest.raises(ValueError, match=message):
            DecoderConfig.debug(**changes)

    def test_published_sizes(self):
        """Parameter counts of the model cards."""
        for config, want in (
            (DecoderConfig.llama2_7b(), 6_738_415_616),
            (DecoderConfig.llama3_8b(), 8_030_261_248),
            (DecoderConfig.qwen25_7b(), 7_615_616_512),
        ):
            model = jax.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
            assert sum(leaf.size for leaf in jax.tree.leaves(model)) == want
