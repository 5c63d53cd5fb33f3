"""LPD against the original's outputs, and the properties that make parallel decoding right."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumen.generation.lpd import (
    LPD,
    LPDConfig,
    Sampling,
    edit_codes,
    generate_codes,
    lpd_loss,
    plan_segments,
    resize_positions,
    training_mask,
)
from lumen.generation.lpd.generate import guide
from lumen.generation.lpd.schedule import group_of_rank, group_sizes, training_schedules
from lumen.io.names.lpd import IGNORED, RULES
from lumen.io.pretrained import from_original, to_original
from lumen.layers import unstack
from lumen.sampling import draw, filter_logits

MODES = ("unrolled", "scan", "bucketed")

forward = jax.jit(LPD.__call__)


def golden_model(record):
    c = record.meta["config"]
    config = LPDConfig(
        width=c["width"],
        depth=c["depth"],
        heads=c["heads"],
        grid=c["grid"],
        vocabulary=c["vocab"],
        classes=c["classes"],
        mlp_ratio=c["mlp_ratio"],
        dropout=0.0,
    )
    abstract = jax.eval_shape(lambda: LPD(config, rngs=nnx.Rngs(0)))
    return from_original(record.weights(), abstract, RULES, IGNORED)


@pytest.fixture(scope="module")
def small():
    """A small random model, and tokens, labels and orders for two images."""
    config = LPDConfig.debug(grid=8)
    model = LPD(config, rngs=nnx.Rngs(1))
    # Zero biases and unit scales would hide a missing term.
    model = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), model)
    keys = jax.random.split(jax.random.key(2), 2)
    tokens = jax.random.randint(keys[0], (2, config.tokens), 0, config.vocabulary)
    orders = jax.vmap(lambda key: jax.random.permutation(key, config.tokens))(keys).astype(jnp.int32)
    return model, tokens, jnp.array([3, 5]), orders


class TestTrainingForward:
    @pytest.mark.parametrize("case", range(4))
    def test_matches_original(self, golden, case):
        record = golden("lpd/train_forward")
        model, sizes = golden_model(record), record[f"in/{case}/group_sizes"]
        tokens, labels, orders = (jnp.asarray(record[k]) for k in ("in/tokens", "in/labels", f"in/{case}/orders"))
        groups = group_of_rank(sizes)
        # The original leaves the last group's context rows out; ours are masked.
        count = model.config.tokens
        kept = np.r_[: count + 1 - sizes[-1], count : 2 * count]
        np.testing.assert_array_equal(training_mask(groups)[np.ix_(kept, kept)], record[f"out/{case}/mask"])
        logits = forward(model, tokens, labels, orders, groups)
        np.testing.assert_allclose(logits, record[f"out/{case}/logits"], atol=2e-4, rtol=2e-4)
        np.testing.assert_allclose(lpd_loss(logits, tokens, orders), record[f"out/{case}/loss"], atol=1e-5)
        if case == 0:
            rows = model.embed(tokens, orders, model.embed_class(labels))
            np.testing.assert_allclose(rows[:, kept], record["out/0/embed"], atol=1e-4, rtol=1e-4)

    def test_gradients_match_original(self, golden):
        record = golden("lpd/train_forward")
        model = golden_model(record)
        tokens, labels, orders, dropped = (
            jnp.asarray(record[f"in/{k}"]) for k in ("tokens", "labels", "train/orders", "train/label_dropped")
        )
        groups = group_of_rank(record["in/0/group_sizes"])

        def loss(model):
            return lpd_loss(model(tokens, labels, orders, groups, dropped=dropped, remat=True), tokens, orders)

        value, grads = jax.jit(jax.value_and_grad(loss))(model)
        np.testing.assert_allclose(value, record["out/train/loss"], atol=1e-5)
        wanted = record.weights("out/train/grad/")
        got = to_original(grads, RULES)
        assert set(got) == set(wanted)
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], rtol=2e-3, atol=1e-5, err_msg=name)

    def test_weight_decay_list_matches_original(self, golden):
        from lumen.training.optim import decayed

        record = golden("lpd/train_forward")
        params = nnx.state(golden_model(record), nnx.Param)
        marks = jax.tree.map_with_path(lambda path, x: jnp.full(x.shape, decayed(path, x), jnp.float32), params)
        model = golden_model(record)
        nnx.update(model, marks)
        got = {name for name, value in to_original(model, RULES).items() if value.all()}
        assert got == set(record.meta["weight_decay_params"])

    def test_dropout_changes_with_the_key_only(self):
        model = LPD(LPDConfig.debug(dropout=0.5), rngs=nnx.Rngs(0))
        arguments = (
            jnp.zeros((1, 16), jnp.int32),
            jnp.zeros(1, jnp.int32),
            jnp.arange(16)[None],
            group_of_rank([1, 15]),
        )
        first, again, other = (forward(model, *arguments, key=jax.random.key(k)) for k in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, other)
        assert not np.allclose(first, forward(model, *arguments))


class TestDecoding:
    RUNS = ("cfg_linear_greedy", "cfg_linear_forced", "cfg_const_forced", "nocfg_greedy", "nocfg_uncond_forced")

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("run", RUNS)
    def test_matches_original(self, golden, run, mode):
        record = golden("lpd/sample")
        model, options = golden_model(golden("lpd/train_forward")), record.meta["runs"][run]
        orders = jnp.asarray(record[f"in/{run}/orders"], jnp.int32)
        labels = jnp.asarray(record[f"in/{run}/labels"]) if options["labels"] else None
        forced = None
        if options["mode"] == "forced":
            by_rank = jnp.asarray(record[f"in/{run}/tokens_by_rank"], jnp.int32)
            codes = jnp.put_along_axis(jnp.zeros_like(orders), orders, by_rank, axis=1, inplace=False)
            forced = (codes, jnp.ones(codes.shape, bool))
        sampling = Sampling(guidance=options["cfg"], schedule=options["schedule"], temperature=0.0)
        sizes = tuple(int(n) for n in record[f"in/{run}/group_sizes"])
        keys = jax.random.split(jax.random.key(0), 2)
        codes, logits = jax.jit(
            lambda model: generate_codes(
                model,
                labels,
                orders,
                keys,
                group_sizes=sizes,
                sampling=sampling,
                mode=mode,
                forced=forced,
                return_logits=True,
            )
        )(model)
        np.testing.assert_array_equal(codes, record[f"out/{run}/tokens"])
        wanted = record[f"out/{run}/raw_logits"]
        if options["cfg"] != 1.0:  # the original stacks [conditional; unconditional]
            guided = guide(logits, jnp.arange(16), 16, sampling)
            np.testing.assert_allclose(guided, record[f"out/{run}/cfg_logits"], atol=1e-3, rtol=1e-3)
            wanted = wanted.reshape(2, 2, *wanted.shape[1:]).swapaxes(0, 1).reshape(wanted.shape)
        np.testing.assert_allclose(logits, wanted, atol=2e-4, rtol=2e-4)

    @pytest.mark.parametrize(
        ("sizes", "mode"),
        [((1,) * 64, "scan")] + [(s, m) for s in [(1, 63), (1, 3, 4, 8, 8, 8, 32), (1, 30, 2, 31)] for m in MODES],
    )
    def test_equals_training_forward(self, small, sizes, mode):
        """Every token's logits given forced earlier groups, step by step with a cache, are the training forward's."""
        model, tokens, labels, orders = small
        want = forward(model, tokens, labels, orders, group_of_rank(sizes))
        forced = (tokens, jnp.ones(tokens.shape, bool))
        keys = jax.random.split(jax.random.key(0), 2)
        decode = lambda m: generate_codes(  # noqa: E731
            m, labels, orders, keys, group_sizes=sizes, mode=mode, forced=forced, return_logits=True
        )
        codes, got = jax.jit(decode)(model)
        np.testing.assert_array_equal(codes, tokens)
        np.testing.assert_allclose(got, want, atol=1e-4)  # float32, logits of order 10, two layers

    @pytest.mark.parametrize(("tokens", "steps"), [(n, len(s)) for n in (256, 1024) for s in training_schedules(n)])
    def test_every_published_schedule_equals_training_forward(self, tokens, steps):
        config = LPDConfig.debug(grid=math.isqrt(tokens), depth=1, width=32)
        model = LPD(config, rngs=nnx.Rngs(0))
        codes = jax.random.randint(jax.random.key(1), (1, tokens), 0, config.vocabulary)
        orders = jax.random.permutation(jax.random.key(2), tokens)[None].astype(jnp.int32)
        sizes, labels = group_sizes(tokens, steps), jnp.array([2])
        want = forward(model, codes, labels, orders, group_of_rank(sizes))
        forced, keys = (codes, jnp.ones(codes.shape, bool)), jax.random.split(jax.random.key(0), 1)
        _, got = jax.jit(
            lambda m: generate_codes(
                m, labels, orders, keys, group_sizes=sizes, mode="scan", forced=forced, return_logits=True
            )
        )(model)
        # float32; the softmax over up to 1024 keys is summed in another order.
        np.testing.assert_allclose(got, want, atol=2e-5)

    def test_modes_and_batches_draw_the_same_codes(self, small):
        model, _, labels, orders = small
        # Six steps in four buckets: two buckets hold two steps each, padded to one size.
        keys, sizes = jax.random.split(jax.random.key(5), 2), group_sizes(64, 6)
        options = {"group_sizes": sizes, "sampling": Sampling(guidance=2.0, top_k=20, top_p=0.9)}

        def run(model, chosen=slice(None), mode="bucketed"):
            program = jax.jit(lambda model, *rest: generate_codes(model, *rest, mode=mode, **options))
            return program(model, labels[chosen], orders[chosen], keys[chosen])

        want = run(model)
        for mode in ("unrolled", "scan"):
            np.testing.assert_array_equal(run(model, mode=mode), want)
        np.testing.assert_array_equal(run(model, slice(1, 2)), want[1:])
        np.testing.assert_array_equal(run(unstack(model), mode="scan"), want)

    def test_later_groups_never_change_earlier_logits(self, small):
        model, tokens, labels, orders = small
        groups = group_of_rank(group_sizes(64, 8))
        first_of_last = int(jnp.argmax(groups == 6))
        changed = tokens.at[jnp.arange(2)[:, None], orders[:, first_of_last:]].set(0)
        before, after = (forward(model, t, labels, orders, groups) for t in (tokens, changed))
        up_to_group_6 = np.asarray(groups) <= 6
        np.testing.assert_array_equal(before[:, up_to_group_6], after[:, up_to_group_6])
        assert not np.allclose(before[:, ~up_to_group_6], after[:, ~up_to_group_6])

    def test_order_inside_a_group_only_permutes_the_logits(self, small):
        model, tokens, labels, orders = small
        groups = np.asarray(group_of_rank(group_sizes(64, 8)))
        swap = np.arange(64)
        inside = np.flatnonzero(groups == 5)
        swap[inside] = inside[::-1]
        before = forward(model, tokens, labels, orders, jnp.asarray(groups))
        after = forward(model, tokens, labels, orders[:, swap], jnp.asarray(groups))
        np.testing.assert_allclose(after, before[:, swap], atol=2e-5)  # float32 sums in another order

    def test_program_holds_no_callback_and_compiles_once(self, small):
        model, _, labels, orders = small
        generate = jax.jit(lambda m, l, o, k: generate_codes(m, l, o, k, group_sizes=group_sizes(64, 8)))
        for seed in range(3):
            generate(model, labels, orders, jax.random.split(jax.random.key(seed), 2))
        assert generate._cache_size() == 1
        assert "callback" not in str(
            jax.make_jaxpr(generate)(model, labels, orders, jax.random.split(jax.random.key(0), 2))
        )

    def test_wrong_group_sizes(self, small):
        model, _, labels, orders = small
        with pytest.raises(ValueError, match="sum to 3; wanted 64"):
            generate_codes(model, labels, orders, jax.random.split(jax.random.key(0), 2), group_sizes=(1, 2))


class TestSegments:
    def test_rows_processed(self):
        """256 tokens in 20 steps: 493 rows without padding, 800 in one padded scan, in between with buckets."""
        sizes = group_sizes(256, 20)
        rows = {mode: sum(s.rows * (s.last - s.first + 1) for s in plan_segments(sizes, mode)) for mode in MODES}
        assert rows["unrolled"] == 493
        assert rows["scan"] == 800
        assert 493 < rows["bucketed"] < 620

    def test_unknown_mode(self):
        with pytest.raises(ValueError, match="wanted 'unrolled', 'scan' or 'bucketed'"):
            plan_segments((1, 3), "fast")


class TestSampling:
    def test_filter_matches_original(self, golden):
        record = golden("lpd/misc")
        logits = jnp.asarray(record["in/filter/logits"])
        for i, (k, p) in enumerate(zip(record["in/filter/top_k"], record["in/filter/top_p"], strict=True)):
            np.testing.assert_array_equal(filter_logits(logits, int(k), float(p)), record[f"out/filter/{i}"])
        ties = jnp.asarray(record["in/filter/logits_ties"])
        for i, k in enumerate(record["in/filter/ties_top_k"]):
            np.testing.assert_array_equal(filter_logits(ties, int(k)), record[f"out/filter_ties/{i}"])

    @pytest.mark.parametrize(("case", "temperature", "k", "p"), [(0, 0.7, 6, 0.9), (1, 1.0, 0, 0.9), (2, 1.6, 0, 0.9)])
    def test_draws_follow_the_probabilities(self, golden, case, temperature, k, p):
        record = golden("lpd/misc")
        logits, want = jnp.asarray(record["in/filter/logits"])[0], record[f"out/probs/{case}"][0]
        draws = 20_000
        keys = jax.random.split(jax.random.key(case), draws)
        sampling = Sampling(temperature=temperature, top_k=k, top_p=p)
        drawn = draw(jnp.broadcast_to(logits, (draws, 1, logits.size)), keys, jnp.zeros(1, jnp.int32), sampling)
        share = np.bincount(np.asarray(drawn).ravel(), minlength=logits.size) / draws
        assert not share[want == 0].any()
        # Five standard deviations of a binomial share.
        np.testing.assert_allclose(share, want, atol=5 * np.sqrt(0.25 / draws))

    def test_guidance_grows_with_the_rank(self):
        logits = jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])
        linear = guide(logits, jnp.arange(4), 4, Sampling(guidance=5.0))
        np.testing.assert_allclose(linear[0, :, 0], [1.0, 2.0, 3.0, 4.0])
        constant = guide(logits, jnp.arange(4), 4, Sampling(guidance=5.0, schedule="constant"))
        np.testing.assert_allclose(constant[0, :, 0], 5.0)

    def test_bad_options(self):
        with pytest.raises(ValueError, match="wanted temperature >= 0"):
            Sampling(temperature=-1.0)


class TestEditing:
    def test_keeps_what_is_kept(self, small):
        model, tokens, labels, _ = small
        region = np.zeros((8, 8), bool)
        region[2:6, 3:7] = True
        keys = jax.random.split(jax.random.key(0), 2)
        for prefill in (1, 3):
            edit = jax.jit(functools.partial(edit_codes, region=region, steps=5, prefill_groups=prefill))
            edited = edit(model, tokens, labels, keys)
            np.testing.assert_array_equal(edited[:, ~region.ravel()], tokens[:, ~region.ravel()])
            assert (edited[:, region.ravel()] != tokens[:, region.ravel()]).mean() > 0.5

    def test_nothing_to_do(self, small):
        model, tokens, labels, _ = small
        keys = jax.random.split(jax.random.key(0), 2)
        same = edit_codes(model, tokens, labels, keys, region=np.zeros((8, 8), bool), steps=5)
        np.testing.assert_array_equal(same, tokens)

    def test_label_matters(self, small):
        model, tokens, labels, _ = small
        keys, region = jax.random.split(jax.random.key(0), 2), np.tri(8, dtype=bool)
        edit = jax.jit(functools.partial(edit_codes, region=region, steps=4))
        one, other = (edit(model, tokens, chosen, keys) for chosen in (labels, labels + 1))
        assert (one != other).any()

    def test_wrong_region(self, small):
        model, tokens, labels, _ = small
        with pytest.raises(ValueError, match=r"wanted one bool per code, \(8, 8\)"):
            edit_codes(model, tokens, labels, jax.random.split(jax.random.key(0), 2), region=np.ones(64, bool), steps=4)


class TestPublishedModel:
    @pytest.mark.parametrize(
        ("config", "millions"),
        [(LPDConfig.l(), 337), (LPDConfig.xl(), 752), (LPDConfig.xxl(), 1412)],  # the README has 337M, 752M, 1.4B
    )
    def test_parameters(self, config, millions):
        shapes = nnx.eval_shape(lambda: LPD(config, rngs=nnx.Rngs(0)))
        assert sum(x.size for x in jax.tree.leaves(nnx.state(shapes))) / 1e6 == pytest.approx(millions, abs=0.5)

    def test_names_round_trip(self, golden):
        weights = golden("lpd/train_forward").weights()
        back = to_original(golden_model(golden("lpd/train_forward")), RULES)
        assert set(back) == set(weights)
        for name, value in weights.items():
            np.testing.assert_array_equal(back[name], value, err_msg=name)

    def test_position_resize(self, golden):
        record = golden("lpd/misc")
        got = resize_positions(jnp.asarray(record["in/pos_resize/pos_embed"][0]), 8)
        np.testing.assert_allclose(got, record["out/pos_resize/out"][0], atol=2e-6)
