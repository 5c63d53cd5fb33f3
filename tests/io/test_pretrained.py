"""Published weights in and out: names, axes, files, and errors that list everything at once."""

import argparse
import json
import os
import sys
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lumen.io.names import torchsparse
from lumen.io.pretrained import Rule, from_original, load, read, save, to_original, write_folder
from lumen.layers import Statistic
from lumen.sparse.minkunet import MinkUNet, MinkUNetConfig

D, N, H, LAYERS = 4, 2, 3, 2

RULES = [
    Rule("mask_token", "mask_token", "1 1 d -> d"),
    Rule("blocks.{layer}.attn.qkv.weight", "blocks.qkv", "(c n h) d -> d c n h"),
    Rule("blocks.{layer}.norm.weight", "blocks.norm.scale"),
    Rule("down.{i}.res.{j}.weight", "levels.{i}.convs.{j}.kernel", "o i h w -> h w i o"),
    Rule("down.{i}.res.{j}.bias", "levels.{i}.convs.{j}.bias"),
    Rule("running_mean", "norm.mean"),
    Rule("running_var", "norm.var"),
]
IGNORED = [r"num_batches_tracked", r"ema\..*"]


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.qkv = nnx.Param(jax.random.normal(rngs.params(), (D, 3, N, H)))
        self.norm = nnx.LayerNorm(D, use_bias=False, rngs=rngs)


class Level(nnx.Module):
    def __init__(self, width, *, rngs):
        self.convs = nnx.List([nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in range(2)])


class Counter(nnx.Variable):
    pass


class Toy(nnx.Module):
    """Stacked layers with fused qkv, lists of lists of unequal shapes, running statistics, a counter, one bfloat16."""

    def __init__(self, *, rngs):
        keys = jax.random.split(rngs.params(), LAYERS)
        self.blocks = jax.vmap(lambda key: Block(rngs=nnx.Rngs(key)))(keys)
        self.levels = nnx.List([Level(width, rngs=rngs) for width in (2, 5)])
        self.mask_token = nnx.Param(jax.random.normal(rngs.params(), (D,), jnp.bfloat16))
        self.norm = nnx.BatchNorm(D, use_bias=False, use_scale=False, rngs=rngs)
        self.seen = Counter(jnp.int32(7))


class Weight(nnx.Module):
    def __init__(self, value):
        self.weight = nnx.Param(value)


@pytest.fixture
def model():
    return Toy(rngs=nnx.Rngs(0))


def published():
    """The tensors as a publisher would ship them, and as we should hold them, by hand (no code under test)."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((LAYERS, 3, N, H, D), np.float32)
    norm = rng.standard_normal((LAYERS, D), np.float32)
    tensors = {"mask_token": rng.standard_normal((1, 1, D), np.float32).astype(ml_dtypes.bfloat16)}
    ours = {"mask_token": tensors["mask_token"][0, 0], "blocks.qkv": np.einsum("lcnhd->ldcnh", qkv)}
    ours["blocks.norm.scale"] = norm
    for layer in range(LAYERS):
        tensors[f"blocks.{layer}.attn.qkv.weight"] = qkv[layer].reshape(3 * N * H, D)
        tensors[f"blocks.{layer}.norm.weight"] = norm[layer]
    for i, width in enumerate((2, 5)):
        for j in range(2):
            kernel = rng.standard_normal((width, width, 3, 3), np.float32)
            tensors[f"down.{i}.res.{j}.weight"] = kernel
            ours[f"levels.{i}.convs.{j}.kernel"] = np.einsum("oihw->hwio", kernel)
            tensors[f"down.{i}.res.{j}.bias"] = ours[f"levels.{i}.convs.{j}.bias"] = kernel[:, 0, 0, 0]
    for name in ("mean", "var"):
        tensors[f"running_{name}"] = ours[f"norm.{name}"] = rng.standard_normal(D, np.float32)
    return tensors, ours


def values(model) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_every_value_goes_to_its_place(model):
    tensors, ours = published()
    before = values(model)
    loaded = from_original(tensors, model, RULES)
    assert_same(values(loaded), ours | {"seen": np.int32(7)})
    assert_same(values(model), before)  # a copy: the model given is untouched


def test_to_original_is_the_inverse(model):
    tensors, _ = published()
    written = to_original(from_original(tensors, model, RULES), RULES)
    assert list(written) == sorted(tensors)
    assert_same(written, tensors)


def test_abstract_model_gets_the_same_weights(model):
    tensors, _ = published()
    rules = [*RULES, Rule("seen", "seen")]  # an abstract counter has no value to keep
    tensors["seen"] = np.array(7)
    abstract = jax.eval_shape(lambda: Toy(rngs=nnx.Rngs(0)))
    assert_same(values(from_original(tensors, abstract, rules)), values(from_original(tensors, model, rules)))
    with pytest.raises(ValueError, match=r"uncovered  seen: no rule fills our \[\]"):
        from_original(tensors, abstract, RULES, [r"seen"])


def test_weights_go_to_the_sharding_of_an_abstract_leaf():
    wanted = jax.sharding.SingleDeviceSharding(jax.devices()[-1], memory_kind="unpinned_host")
    model = jax.eval_shape(lambda: Weight(jnp.zeros(3)))
    model.weight.set_value(jax.ShapeDtypeStruct((3,), jnp.float32, sharding=wanted))
    loaded = from_original({"w": np.ones(3)}, model, [Rule("w", "weight")])
    assert loaded.weight.get_value().sharding == wanted


def test_files_are_cast_to_the_dtype_of_the_model(model):
    tensors, ours = published()
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    assert_same(values(from_original(wide, model, RULES)), ours | {"seen": np.int32(7)})


@pytest.mark.parametrize(
    ("axes", "theirs", "ours"),
    [
        ("a (b c) -> b a c", (2, 12), (3, 2, 4)),
        ("(a b) 1 (c d) -> d c b a", (6, 1, 20), (5, 4, 3, 2)),
        ("() a -> a 1", (1, 3), (3, 1)),
        ("1 -> ", (1,), ()),
        ("same", (2, 3), (2, 3)),
    ],
)
def test_axes_language_against_einsum(axes, theirs, ours):
    tensor = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
    want = {
        "a (b c) -> b a c": lambda x: np.einsum("abc->bac", x.reshape(2, 3, 4)),
        "(a b) 1 (c d) -> d c b a": lambda x: np.einsum("abcd->dcba", x.reshape(2, 3, 4, 5)),
        "() a -> a 1": lambda x: x.T,
        "1 -> ": lambda x: x[0],
        "same": lambda x: x,
    }[axes](tensor)
    rules = [Rule("w", "weight", axes)]
    model = from_original({"w": tensor}, Weight(jnp.zeros(ours)), rules)
    np.testing.assert_array_equal(model.weight.get_value(), want)
    np.testing.assert_array_equal(to_original(model, rules)["w"], tensor)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("o i", "two sides"),
        ("(o i -> i o", "parentheses of '\\(o i' do not match"),
        ("o i -> i o h", r"axes \['h'\] appear on one side only"),
        ("o o -> o", "an axis appears twice in 'o o'"),
        ("o 2 -> o", r"\['2'\] are not axis names"),
        ("o i -> (i o)", "joined on the right"),
        ("o i h -> h i o", r"right side has 3 axes, and our array \[2, 3\] has 2"),
        ("o -> o 1", r"written 1 on the right is not of size 1 in our \[2, 3\]"),
    ],
)
def test_wrong_axes_name_the_rule(axes, message):
    with pytest.raises(ValueError, match=rf"Rule\(original='w'.*{message}"):
        from_original({}, Weight(jnp.zeros((2, 3))), [Rule("w", "weight", axes)])


def test_one_error_lists_everything(model):
    tensors, _ = published()
    del tensors["down.0.res.1.bias"]
    tensors["mask_token"] = tensors["mask_token"][0]
    tensors["blocks.1.attn.qkv.weight"][0, 0] = np.nan
    tensors["blocks.1.attn.qkv.weight"][0, 1] = np.inf
    tensors["running_mean"] = np.arange(D)  # integers
    tensors["running_var"] = np.full(D, 1e300)  # finite, but not in float32
    tensors["blocks.2.norm.weight"] = np.ones(D, np.float32)  # a layer too many
    tensors["num_batches_tracked"] = np.array(3)
    rules = [rule for rule in RULES if rule.ours != "blocks.norm.scale"]
    with pytest.raises(ValueError, match="mismatches") as caught:
        from_original(
            {"module." + name: tensor for name, tensor in tensors.items()}, model, rules, IGNORED, prefix="module."
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 mismatches between the published tensors and Toy (names without the prefix 'module.'):"
    assert sorted(line.strip() for line in lines[1:-1]) == [
        "extra      blocks.0.norm.weight: came [4], and no rule has a place for it",
        "extra      blocks.1.norm.weight: came [4], and no rule has a place for it",
        "extra      blocks.2.norm.weight: came [4], and no rule has a place for it",
        "miscast    running_mean: came int64, wanted float32 or alike for norm.mean",
        "misshapen  mask_token: came [1, 4], wanted [1, 1, 4] for mask_token",
        "missing    down.0.res.1.bias: wanted [2] for levels.0.convs.1.bias",
        "not finite blocks.1.attn.qkv.weight: 2 of 72 values are NaN or infinite as float32",
        "not finite running_var: 4 of 4 values are NaN or infinite as float32",
        "uncovered  blocks.norm.scale: no rule fills our [2, 4]",
    ]
    assert "complete the table of rules" in lines[-1]


def test_ignored_names_must_match_whole(model):
    tensors, ours = published()
    tensors |= {"ema.w": np.zeros(1), "num_batches_tracked": np.zeros(1)}
    assert_same(values(from_original(tensors, model, RULES, IGNORED)), ours | {"seen": np.int32(7)})
    with pytest.raises(ValueError, match=r"1 mismatches.*\n  extra      old_num_batches_tracked: came \[1\]"):
        from_original(tensors | {"old_num_batches_tracked": np.zeros(1)}, model, RULES, IGNORED)


def test_prefix_may_be_absent_but_not_ambiguous(model):
    tensors, _ = published()
    want = values(from_original(tensors, model, RULES))
    prefixed = {"vae." + name: tensor for name, tensor in tensors.items()}
    assert_same(values(from_original(prefixed, model, RULES, prefix="vae.")), want)
    assert_same(values(from_original(tensors, model, RULES, prefix="vae.")), want)
    with pytest.raises(ValueError, match=r"ambiguous  (vae\.)?mask_token and (vae\.)?mask_token are both called"):
        from_original(prefixed | {"mask_token": tensors["mask_token"]}, model, RULES, prefix="vae.")


def test_integer_that_does_not_fit_is_reported():
    with pytest.raises(ValueError, match="miscast    w: has values that do not fit in int8"):
        from_original({"w": np.array([1, 300])}, Weight(jnp.zeros(2, jnp.int8)), [Rule("w", "weight")])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("a", "weight"), Rule("b", "weight")], "both fill weight"),
        ([Rule("a", "weight.{i}")], r"placeholder \['i'\] of `ours` does not appear"),
        ([Rule("{a}.{b}.{c}.w", "weight")], "too few axes to be stacked"),
    ],
)
def test_contradictory_tables(rules, message):
    with pytest.raises(ValueError, match=message):
        from_original({}, Weight(jnp.zeros((2, 3))), rules)


def test_one_published_tensor_has_one_place(model):
    rules = [rule for rule in RULES if "running" not in rule.original]
    rules += [Rule("running", "norm.mean"), Rule("running", "norm.var")]
    with pytest.raises(ValueError, match=r"running already goes to norm\.mean"):
        to_original(model, rules)


def test_writing_lists_what_cannot_be_written(model):
    with pytest.raises(ValueError, match=r"(?s)2 parameters of Toy.*uncovered  mask_token.*uncovered  norm\.var"):
        to_original(model, RULES[1:-1])
    abstract = jax.eval_shape(lambda: Weight(jnp.zeros(3)))
    with pytest.raises(ValueError, match=r"abstract   weight: \[3\] has no values"):
        to_original(abstract, [Rule("w", "weight")])


def test_safetensors_file_round_trip_and_bytes(model, tmp_path):
    tensors, ours = published()
    path = tmp_path / "model.safetensors"
    save(path, from_original(tensors, model, RULES), RULES)
    assert_same(load_file(path), tensors)  # read by safetensors itself
    first = path.read_bytes()
    assert b'"__metadata__":{"format":"pt"}' in first

    again = load(path, model, RULES)
    assert_same(values(again), ours | {"seen": np.int32(7)})
    save(path, again, list(reversed(RULES)))
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]  # nothing half-written left


def minkunet(seed):
    """The smallest MinkUNet, of random numbers."""
    rng, config = np.random.default_rng(seed), MinkUNetConfig(widths=(2,) * 9, classes=3)
    abstract = nnx.eval_shape(lambda: MinkUNet(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(1, 2, leaf.shape), leaf.dtype), abstract)


def test_running_statistics_come_back(tmp_path):
    """Of a network with batch norms: into a file with everything else, and back as what a training step keeps."""
    model = minkunet(0)
    before = values(model)
    path = tmp_path / "model.safetensors"
    save(path, model, torchsparse.RULES)
    tensors = load_file(path)
    assert_same(tensors, to_original(model, torchsparse.RULES))
    names = [name for name in before if name.endswith((".mean", ".var"))]
    assert len(names) == len(jax.tree.leaves(nnx.state(model, Statistic))) == 2 * 46
    assert len([name for name in tensors if name.endswith((".running_mean", ".running_var"))]) == 2 * 46
    np.testing.assert_array_equal(tensors["stem.1.running_mean"], before["stem1.norm.mean"])
    np.testing.assert_array_equal(tensors["up1.1.0.downsample.1.running_var"], before["up.0.block1.shortcut_norm.var"])

    tensors["stem.1.num_batches_tracked"] = np.array(7)
    loaded = from_original(tensors, minkunet(1), torchsparse.RULES, torchsparse.IGNORED)
    assert_same(values(loaded), before)
    assert len(jax.tree.leaves(nnx.state(loaded, Statistic))) == 2 * 46

    del tensors["stem.1.running_mean"], tensors["up1.1.0.downsample.1.running_var"]
    with pytest.raises(ValueError, match=r"^2 mismatches between the published tensors and MinkUNet") as caught:
        load(tensors, minkunet(1), torchsparse.RULES, torchsparse.IGNORED)
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "missing    stem.1.running_mean: wanted [2] for stem1.norm.mean",
        "missing    up1.1.0.downsample.1.running_var: wanted [2] for up.0.block1.shortcut_norm.var",
    ]


def test_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def full(filename, header, tensors):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lumen.io.pretrained._write_safetensors", full)
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: .*No space left on device"):
        save(path, model, RULES)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def every_dtype():
    rng = np.random.default_rng(0)
    dtypes = (np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.float16, ml_dtypes.bfloat16)
    dtypes += (np.int32, np.uint32, np.float32, np.float64, np.int64, np.uint64)
    return {f"{'zyx'[i % 3]}.{i}": rng.integers(0, 2, (i, 3)).astype(dtype) for i, dtype in enumerate(dtypes)}


def test_files_are_those_of_the_library(tmp_path):
    tensors = every_dtype() | {"scalar": np.float32(3.5), "ünïcode": np.arange(3)[::-1]}
    write_folder(tmp_path / "ours", tensors, {})
    contiguous = {name: np.ascontiguousarray(tensor).reshape(np.shape(tensor)) for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert_same(dict(read(tmp_path / "ours")), contiguous)


def test_shards_hold_so_much_and_are_written_again_alike(tmp_path):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(6)} | {"large": np.zeros(50, np.float32)}
    write_folder(tmp_path / "a", tensors, {"config.json": b"{ }"}, shard_bytes=100)
    shards = sorted(tmp_path.glob("a/model-0000?-of-00004.safetensors"))
    assert [sorted(load_file(shard)) for shard in shards] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"], ["large"]]
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6 * 40 + 200}
    assert index["weight_map"]["large"] == "model-00004-of-00004.safetensors"
    got = read(tmp_path / "a")
    assert_same(dict(got), tensors)

    # Its own layout, whatever the size asked for; another tensor has another.
    write_folder(tmp_path / "b", got, {"config.json": b"{ }"}, layout=got.layout)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    write_folder(tmp_path / "c", {**got, "t0": np.zeros(3, np.float32)}, {}, layout=got.layout)
    assert list(contents(tmp_path / "c")) == ["model.safetensors"]


def test_foreign_headers_are_kept(tmp_path):
    """Order, padding and metadata that this library would write otherwise."""
    header = b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"__metadata__":{"z":"1","format":"pt"}, '
    header += b'"a":{"dtype":"I32","shape":[],"data_offsets":[0,4]}}   '
    (tmp_path / "a").mkdir()
    values = np.float32(2).tobytes() + np.float32(3).tobytes()
    (tmp_path / "a" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values)
    tensors = read(tmp_path / "a")
    assert tensors["b"] == 3
    write_folder(tmp_path / "b", tensors, {}, layout=tensors.layout)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_occupied_folders(tmp_path):
    tensors, folder = {"w": np.ones(2, np.float32)}, tmp_path / "model"
    folder.mkdir()
    write_folder(folder, tensors, {"config.json": b"1"})  # an empty one is in nobody's way
    with pytest.raises(FileExistsError, match=r"model exists; choose another folder, empty it"):
        write_folder(folder, tensors, {})
    write_folder(folder, tensors, {"more": b"2"}, overwrite=True)
    assert set(contents(folder)) == {"model.safetensors", "more"}
    with pytest.raises(FileExistsError, match=r"has no config\.json in it, so it is not overwritten"):
        write_folder(folder, tensors, {}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failed_folder_leaves_what_was_there(tmp_path, monkeypatch):
    tensors, folder = {"w": np.ones(2, np.float32)}, tmp_path / "model"
    write_folder(folder, tensors, {"config.json": b"1"})
    before = contents(folder)
    replace = os.replace

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("lumen.io.pretrained.os.replace", refuse)
    for target, overwrite in ((folder, True), (tmp_path / "new", False)):
        with pytest.raises(OSError, match=r"cannot write .*: .*No space left on device"):
            write_folder(target, tensors, {}, overwrite=overwrite)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tensors_are_read_when_asked_for(tmp_path, monkeypatch):
    """So a model is in memory once while it is filled, not beside all of its file."""
    rules = [Rule("w.{layer}", "weight")]
    write_folder(tmp_path / "a", {f"w.{i}": np.full(3, i, np.float32) for i in range(4)}, {})
    tensors = read(tmp_path / "a")
    held, most = [], []
    get = type(tensors).__getitem__

    def counted(self, name):
        tensor = get(self, name)
        held.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in held))
        return tensor

    monkeypatch.setattr(type(tensors), "__getitem__", counted)
    model = from_original(tensors, Weight(jnp.zeros((4, 3))), rules)
    np.testing.assert_array_equal(model.weight.get_value()[:, 0], range(4))
    assert len(held) == 4
    assert max(most) <= 2  # the one before lives until its name is bound anew


def test_dtype_that_numpy_lacks(tmp_path):
    header = b'{"w":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}  '
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"w is of dtype F8_E4M3; wanted one of BOOL, U8"):
        read(tmp_path / "w.safetensors")


def write_shards(folder):
    tensors, _ = published()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_every_kind_of_file_gives_the_same_model(model, tmp_path):
    tensors, ours = published()
    want = ours | {"seen": np.int32(7)}
    write_shards(tmp_path)
    assert_same(values(load(tmp_path, model, RULES)), want)

    (tmp_path / "one").mkdir()
    save(tmp_path / "one" / "model.safetensors", load(tmp_path, model, RULES), RULES)
    assert_same(values(load(tmp_path / "one", model, RULES)), want)

    # NumPy's own format has no bfloat16.
    arrays: dict[str, Any] = tensors | {"mask_token": tensors["mask_token"].astype(np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    assert_same(values(load(tmp_path / "w.npz", model, RULES)), want)
    assert_same(values(load(tensors, model, RULES)), want)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_files_name_file_and_cause(model, tmp_path, kept):
    tensors, _ = published()
    whole = tmp_path / "model.safetensors"
    save(whole, model, RULES)
    whole.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) cannot be read: .*get it again"):
        load(tmp_path, model, RULES)
    archive = tmp_path / "w.npz"
    np.savez(archive, mask_token=tensors["running_mean"])
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"w\.npz \(\d+ bytes\) cannot be read: .*get it again"):
        load(archive, model, RULES)


def test_pickled_npz_is_refused(model, tmp_path):
    np.savez(tmp_path / "w.npz", w=np.array([{}]))
    with pytest.raises(ValueError, match=r"w\.npz .* cannot be read: .*allow_pickle"):
        load(tmp_path / "w.npz", model, RULES)


def test_broken_directories(model, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load(tmp_path, model, RULES)
    weight_map = write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"

    index.write_text(json.dumps({"weight_map": weight_map | {"more": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"b\.safetensors disagree about \['more'\]"):
        load(tmp_path, model, RULES)
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "../../b.safetensors"}}))
    with pytest.raises(ValueError, match="not plain file names"):
        load(tmp_path, model, RULES)
    index.write_text(json.dumps({"weight_map": weight_map})[:-5])
    with pytest.raises(ValueError, match=r"index\.json \(\d+ bytes\) cannot be read: JSONDecodeError"):
        load(tmp_path, model, RULES)

    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 2 shards, of which b\.safetensors are missing"):
        load(tmp_path, model, RULES)


def test_other_paths(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        load(tmp_path / "x.safetensors", model, RULES)
    with pytest.raises(ValueError, match=r"ends in '\.h5'; wanted a directory or one of \.safetensors"):
        load(tmp_path / "x.h5", model, RULES)


def test_torch_file_without_torch_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "lpd.pth").write_bytes(b"")
    with pytest.raises(ImportError, match=r"lpd\.pth needs PyTorch: pip install lumen\[convert\]"):
        load(tmp_path / "lpd.pth", model, RULES)


@pytest.mark.parity
def test_torch_files(model, tmp_path):
    torch = pytest.importorskip("torch")
    tensors, ours = published()

    def to_torch(tensor):
        if tensor.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(tensor.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(tensor))

    state = {name: to_torch(tensor) for name, tensor in tensors.items()}
    want = ours | {"seen": np.int32(7)}
    path = tmp_path / "lpd.pth"
    torch.save(state, path)
    assert_same(values(load(path, model, RULES)), want)
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 3}, path)
    assert_same(values(load(path, model, RULES)), want)
    torch.save({"epoch": 80, "optimizer_state": None, "model_state": state, "version": "pcdet"}, path)
    assert_same(values(load(path, model, RULES)), want)

    torch.save({"state_dict": state, "epoch": 3}, path)
    with pytest.raises(ValueError, match="epoch, state_dict are not tensors; wanted a state dict"):
        load(path, model, RULES)
    torch.save({"model": state, "hook": print}, path)
    with pytest.raises(
        ValueError, match=r"lpd\.pth holds more than tensors .*print.*code in weights is never executed"
    ):
        load(path, model, RULES)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"lpd\.pth .* cannot be read"):
        load(path, model, RULES)
