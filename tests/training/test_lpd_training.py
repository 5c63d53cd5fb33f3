"""The LPD run as a whole: tokenizer, code files, training, evaluation; and what its programs cost."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lumen.generation.lpd import LPD, LPDConfig, Sampling, generate_images, lpd_loss
from lumen.generation.lpd.schedule import group_of_rank, group_sizes, training_schedules
from lumen.generation.vq import VQConfig, VQModel
from lumen.io import pretrained
from lumen.plan import count_collectives, count_flops
from lumen.sharding import make_mesh
from lumen.training.lpd import LPDOptions, make_task
from lumen.training.vq import ImageData, TokenizerRef

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = {"size": "debug", "channels": 8, "channel_multipliers": (1, 2, 2), "groups": 4, "codebook_size": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_program):
    """Workdirs of a tiny tokenizer run and a tiny LPD run on its codes, through the entry points."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer, lpd = root / "tokenizer", root / "lpd"
    common = ["--config.total_steps=3", "--config.batch_size=16", "--config.log_every=1"]
    vq_model = [f"--config.vq.model={TOKENIZER}"]
    first = ["--config=experiments/lpd/digits_tokenizer.py", f"--workdir={tokenizer}", *common, *vq_model]
    run_program("train.py", *first)
    second = [
        "--config=experiments/lpd/digits.py",
        f"--workdir={lpd}",
        *common,
        "--config.monitor_every=3",
        f"--config.lpd.tokenizer.path={tokenizer}",
        "--config.lpd.model={'size': 'debug', 'classes': 10}",
        "--config.lpd.evaluation={'samples': 40, 'batch_size': 20, 'steps': 8, 'runs': 1, 'seeds': 2, "
        "'candidates': (1.5,), 'batches': (1,)}",
    ]
    run_program("train.py", *second)
    run_program("evaluate.py", *second)
    return tokenizer, lpd


def test_pipeline_leaves_everything_a_reader_needs(runs):
    tokenizer, lpd = runs
    assert (tokenizer / "model.safetensors").is_file()
    assert len((lpd / "metrics.jsonl").read_text().splitlines()) == 4  # three steps and the monitor
    assert {p.name for p in (lpd / "eval").iterdir()} >= {
        "metrics.json",
        "comparison.md",
        "samples.png",
        "decoding_order.png",
        "comparison.png",
    }
    assert list((lpd / "media").glob("samples_*.png"))
    metrics = json.loads((lpd / "eval" / "metrics.json").read_text())
    assert set(metrics["schedules"]) == {"64", "8"}
    assert set(metrics["orders"]) == {"locality", "random"}
    assert metrics["real_digits"]["accuracy"] > 0.95


def test_code_files_hold_every_shift(runs):
    tokenizer, lpd = runs
    codes = np.load(lpd / "codes" / "codes.npy")
    assert codes.shape == (1297, 9, 64)
    images, _ = ImageData(name="digits", size=32).arrays("train")
    model = TokenizerRef(path=str(tokenizer)).load()
    want, _ = model.encode(images[:4].astype(np.float32) / 127.5 - 1.0)
    # The same weights, another batch size: a code may flip where two are equally near.
    assert (codes[:4, 0] == np.asarray(want)).mean() > 0.99


def test_exported_weights_start_a_larger_grid(runs):
    _, lpd = runs
    # The tokenizer's stride is 4: 64 pixels are 16 x 16 codes, and the exported model has 8 x 8 positions.
    options = LPDOptions(
        model={"size": "debug", "classes": 10},
        image_size=64,
        tokenizer=TokenizerRef(path=str(runs[0])),
        data=ImageData(name="digits", size=64),
        start=str(lpd / "model.safetensors"),
    )
    task = make_task(options, batch_size=8, seed=0, total_steps=1, workdir=lpd)
    model = task.pretrained(task.build(nnx.Rngs(0)))
    assert model.lpd.position_embedding.shape == (257, 64)
    before = pretrained.read(lpd / "model.safetensors")
    np.testing.assert_array_equal(model.lpd.position_embedding[0], before["pos_embed"][0, 0])
    np.testing.assert_array_equal(model.lpd.head.kernel[...], before["head.weight"].T)


def test_tokenizer_missing():
    options = LPDOptions(model={"size": "debug"}, image_size=32, tokenizer=TokenizerRef(model=TOKENIZER))
    task = make_task(options, batch_size=8, seed=0, total_steps=1, workdir=None)
    with pytest.raises(ValueError, match=r"tokenizer\.path: missing; give the workdir of a tokenizer run"):
        task.pretrained(None)


@pytest.mark.parametrize("config", [LPDConfig.l(), LPDConfig.xl(), LPDConfig.xxl(512)], ids=["l", "xl", "xxl_512"])
def test_step_flops_match_the_closed_form(config):
    """Matrix products of forward and backward, without rematerialisation: three times the forward's.

    Forward, per image: 2N rows through blocks of 12 D^2 weights, attention of 2N x 2N scores twice, N rows through the
    head; 2 FLOP per multiply-add.
    """
    model = nnx.eval_shape(lambda: LPD(config, rngs=nnx.Rngs(0)))
    n, batch = config.tokens, 4
    ints = jax.ShapeDtypeStruct((batch, n), jnp.int32)
    groups = jnp.asarray(group_of_rank(training_schedules(n)[0]))

    def loss(model, tokens, labels, orders):
        return lpd_loss(model(tokens, labels, orders, groups), tokens, orders)

    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    counted = count_flops(jax.make_jaxpr(jax.grad(loss))(model, ints, labels, ints)).matmul
    blocks = config.depth * (2 * n * 12 * config.width**2 + 2 * (2 * n) ** 2 * config.width)
    head = n * config.width * config.vocabulary
    assert counted == pytest.approx(3 * 2 * batch * (blocks + head), rel=1e-6)


def test_generation_sharded_over_data_needs_no_communication():
    """Sixteen images on eight devices: each device makes its two, orders, codes and pixels."""
    mesh = make_mesh({"data": 8}, jax.devices()[:8])
    config = LPDConfig.debug(grid=8)
    model = LPD(config, rngs=nnx.Rngs(0))
    tokenizer = VQModel(VQConfig.debug(), rngs=nnx.Rngs(0))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    options = {"group_sizes": group_sizes(64, 8), "sampling": Sampling(guidance=2.0)}
    labels, keys = jnp.arange(16) % 8, jax.random.split(jax.random.key(0), 16)

    def program(model, tokenizer, labels, keys):
        return generate_images(model, tokenizer, labels, keys, **options)

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(program)
            .lower(*jax.device_put((model, tokenizer), whole), *jax.device_put((labels, keys), rows))
            .compile()
        )
        got = compiled(*jax.device_put((model, tokenizer), whole), *jax.device_put((labels, keys), rows))
    assert sum(count_collectives(compiled.as_text()).values()) == 0
    want = jax.jit(program)(model, tokenizer, labels, keys)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[2], want[2])
