"""Generation: transformers' greedy tokens, the same tokens however a batch is cut, draws, penalties and stops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.io.names.decoder import RULES
from lumen.io.pretrained import from_original
from lumen.language.decoder import Decoder
from lumen.language.generate import generate, stream
from lumen.language.pretrained import parse_config
from lumen.layers import unstack
from lumen.sampling import Sampling, penalise_repeats

CASES = ("llama_gqa", "llama_rope_llama3", "llama_rope_linear", "qwen2_tied")
HOT = Sampling(temperature=1.5, top_k=40, top_p=0.95)


def load(golden, case):
    record = golden(f"decoder/{case}")
    abstract = jax.eval_shape(lambda: Decoder(parse_config(record.meta["config"]), rngs=nnx.Rngs(0)))
    return record, from_original(record.weights(), abstract, RULES)


@pytest.fixture(scope="module")
def model(golden):
    return unstack(load(golden, "llama_gqa")[1])


@pytest.fixture(scope="module")
def prompts(golden):
    record = golden("decoder/llama_gqa")
    return [row[:length].tolist() for row, length in zip(record["in/input_ids"], (16, 5, 9), strict=True)]


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def joined(pieces):
    """What stream yields, put together: one list per row."""
    return [list(itertools.chain.from_iterable(parts)) for parts in zip(*pieces, strict=True)]


def rows(tokens, lengths):
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize(("case", "layers"), [*((case, "stacked") for case in CASES), ("qwen2_tied", "listed")])
def test_greedy_tokens_of_transformers(golden, case, layers):
    record, model = load(golden, case)
    model = model if layers == "stacked" else unstack(model)
    tokens, lengths = generate(model, [record["in/input_ids"][0, :16]], max_new_tokens=8)
    np.testing.assert_array_equal(tokens, record["out/decode/greedy_row0"])
    np.testing.assert_array_equal(lengths, [8])


def test_rows_do_not_depend_on_the_batch(model, prompts):
    options = {"max_new_tokens": 6, "prefill_chunk": 16, "sampling": HOT, "repetition_penalty": 1.3}
    together, lengths = generate(model, prompts, keys=keys(3), **options)
    assert (lengths == 6).all()
    for row, prompt in enumerate(prompts):
        alone, _ = generate(model, [prompt], keys=keys(3)[row : row + 1], **options)
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("chunk", [1, 6, 50])
def test_chunks_of_the_prompt_change_nothing(model, prompts, chunk):
    want, _ = generate(model, prompts, max_new_tokens=6)
    got, _ = generate(model, prompts, max_new_tokens=6, prefill_chunk=chunk)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("every", [1, 4, 100])
def test_stream_is_generate_in_pieces(model, prompts, every):
    options = {"max_new_tokens": 6, "sampling": HOT, "keys": keys(3)}
    want = generate(model, prompts, **options)[0]
    pieces = list(stream(model, prompts, every=every, **options))
    assert [len(piece[0]) for piece in pieces] == {1: [1] * 6, 4: [1, 4, 1], 100: [1, 5]}[every]
    np.testing.assert_array_equal(joined(pieces), want)


def test_stop_tokens_end_a_row(model, prompts):
    whole = generate(model, prompts, max_new_tokens=8)[0]
    # A token that only some rows draw, and one that nobody has.
    stop = int(whole[0, 3])
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in whole.tolist()]
    assert len(cut[0]) < 8
    assert any(len(row) != len(cut[0]) for row in cut)
    tokens, lengths = generate(model, prompts, max_new_tokens=8, stop=(stop, 127))
    assert rows(tokens, lengths) == cut
    assert all(not row[length:].any() for row, length in zip(tokens, lengths, strict=True))
    pieces = list(stream(model, prompts, max_new_tokens=8, stop=(stop, 127)))
    assert joined(pieces) == cut


def test_the_loop_ends_when_all_rows_have_stopped(model, prompts):
    first = generate(model, prompts[:1], max_new_tokens=1)[0]
    pieces = list(stream(model, prompts[:1], max_new_tokens=1000, every=999, stop=first[0].tolist()))
    assert pieces == [first.tolist()]


def test_repetition_penalty_against_its_definition(model, prompts):
    """Each step's choice, recomputed by a full forward pass and NumPy."""
    forward = jax.jit(lambda tokens: model.logits(model(tokens)[0]))
    penalty = 1.7
    tokens, _ = generate(model, prompts, max_new_tokens=6, repetition_penalty=penalty)
    plain, _ = generate(model, prompts, max_new_tokens=6)
    assert not np.array_equal(tokens, plain)
    for prompt, drawn in zip(prompts, tokens.tolist(), strict=True):
        padded = np.zeros((1, 22), np.int32)
        padded[0, : len(prompt) + 6] = prompt + drawn
        logits = np.asarray(forward(padded), np.float64)[0]
        for i, token in enumerate(drawn):
            score = logits[len(prompt) - 1 + i]
            for seen in set(prompt + drawn[:i]):
                score[seen] = score[seen] * penalty if score[seen] < 0 else score[seen] / penalty
            assert token == score.argmax()


def test_penalty_signs():
    seen = jnp.array([True, True, False, True])
    np.testing.assert_allclose(penalise_repeats(jnp.array([2.0, -2.0, 2.0, 0.0]), seen, 2.0), [1, -4, 2, 0])


def test_draws_follow_the_probabilities(model, prompts):
    draws = 4000
    options = Sampling(temperature=0.7)
    tokens, _ = generate(model, [prompts[1]] * draws, max_new_tokens=1, sampling=options, keys=keys(draws, 3))
    logits = jax.jit(lambda tokens: model.logits(model(tokens)[0])[0, -1])(np.asarray([prompts[1]]))
    want = np.asarray(jax.nn.softmax(logits / 0.7), np.float64)
    # Five standard deviations of a binomial share.
    share = np.bincount(tokens[:, 0], minlength=128) / draws
    np.testing.assert_allclose(share, want, atol=5 * np.sqrt(0.25 / draws))
    # Most shares are below that, but not all of them together: chi-squared of 127 has mean 127 and deviation 254**0.5.
    assert (draws * (share - want) ** 2 / want).sum() < 127 + 5 * 254**0.5


def test_same_shapes_compile_once(model, prompts):
    from lumen.language import generate as module

    generate(model, prompts, max_new_tokens=5)
    sizes = [function._cache_size() for function in (module._prefill, module._first, module._continue)]
    generate(model, [prompt[::-1] for prompt in prompts], max_new_tokens=5)
    list(stream(model, prompts, max_new_tokens=5, every=2))
    assert [function._cache_size() for function in (module._prefill, module._first, module._continue)] == sizes


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, r"prompts of \[\] tokens; wanted one or more"),
        ([[1], []], {}, r"prompts of \[1, 0\] tokens; .* none of them empty"),
        ([[1, 128]], {}, r"tokens from 1 to 128 came; the model's vocabulary has 128"),
        ([[-1]], {}, "tokens from -1 to -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ([[1]], {"sampling": HOT}, r"keys=None; wanted 1 keys, one per prompt"),
        ([[1]], {"sampling": HOT, "keys": keys(2)}, r"keys=\[2\]; wanted 1 keys"),
    ],
)
def test_bad_calls(model, given, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, given, **{"max_new_tokens": 4, **options})
    with pytest.raises(ValueError, match="every=0"):
        next(stream(model, [[1]], max_new_tokens=2, every=0))
