"""Sources read the real on-disk formats; batches are shuffled, shared out and resumed exactly."""

import collections
import hashlib
import io
import itertools
import json
import pickle
import sys

import grain
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from PIL import Image
from sklearn.datasets import load_digits

from lumen.training import data

META = {"grid": [2, 3], "vocabulary": 16384, "tokenizer_sha256": "ab" * 32, "source": "made by the tests"}


def numbered(count):
    """A source (a list is one) whose records can be told apart."""
    return [{"label": np.int32(number)} for number in range(count)]


def picture(height=20, width=30, seed=0):
    """A smooth colour picture, so that lossy formats stay near it: uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    return (127.5 + 120 * np.sin((x / 7 + y / 5)[..., None] + phase)).astype(np.uint8)


def encode(image, kind, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def take(batches, count):
    return list(itertools.islice(batches, count))


def labels_of(batches):
    return [batch["label"].tolist() for batch in batches]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


# --- Images and transforms --------------------------------------------------------------------------------------------


def resample(image, out, axis, kernel, support):
    """One axis of a Pillow resize by its definition: weights at pixel centres, widened when shrinking; then rounded."""
    scale = image.shape[axis] / out
    width = max(scale, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * scale
    offset = (np.arange(image.shape[axis])[None] + 0.5 - centre) / width
    weight = np.where(np.abs(offset) <= support, kernel(offset), 0.0)
    weight /= weight.sum(1, keepdims=True)
    return np.clip(np.floor(np.moveaxis(np.tensordot(weight, image, (1, axis)), 0, axis) + 0.5), 0, 255)


def resize(image, height, width, kernel, support):
    for axis, out in ((1, width), (0, height)):
        image = resample(image, out, axis, kernel, support) if image.shape[axis] != out else image
    return image


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x):
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)


@pytest.mark.parametrize(
    ("height", "width", "resized"),
    [
        (67, 100, (32, 48)),  # shorter side 33 after one halving; 50 * 32 / 33 = 48.48
        (301, 150, (32, 65)),  # 150 -> 75 -> 37, 301 -> 150 -> 75; 75 * 32 / 37 = 64.86; odd sides on the way
        (64, 64, (32, 32)),  # one exact halving, then nothing to do
        (20, 45, (32, 72)),  # smaller than the crop: enlarged
        (32, 33, (32, 33)),  # cut only, one column off the right: floor(1 / 2) = 0
    ],
)
def test_centre_crop_against_its_definition(height, width, resized):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    want = image.astype(float)
    while min(want.shape[:2]) >= 64:
        want = resize(want, want.shape[0] // 2, want.shape[1] // 2, box, 0.5)
    short, long = sorted(want.shape[:2])
    assert (32, round(long * 32 / short)) == resized
    want = resize(want, *(resized if height <= width else resized[::-1]), cubic, 2.0)
    top, left = (want.shape[0] - 32) // 2, (want.shape[1] - 32) // 2
    got = data.adm_centre_crop(image, 32)
    assert got.dtype == np.uint8
    assert got.shape == (32, 32, 3)
    # Pillow's weights have 22 bits: a rounding falls to the other side once in thousands, by one level.
    difference = np.abs(got - want[top : top + 32, left : left + 32])
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_centre_crop_of_a_tall_image_is_that_of_old_pillow():
    """The digest is of guided-diffusion's steps under Pillow 10.4; the same calls under Pillow 13 give other pixels."""
    y, x, channel = np.mgrid[:301, :150, :3]
    image = ((x * x + 3 * x * y + 7 * y * channel + 31 * channel) % 256).astype(np.uint8)
    digest = hashlib.sha256(data.adm_centre_crop(image, 32).tobytes()).hexdigest()
    assert digest == "d29992ddc009fb5d935e086cf279e6f7b5ea11b3879749375a2f6a1dfc8c4edd"


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_centre_crop_refuses_other_arrays(image):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        data.adm_centre_crop(image, 4)


@pytest.mark.parametrize("module", [np, jnp])
def test_to_model_spans_minus_one_to_one(module):
    x = data.to_model(module.arange(256, dtype=module.uint8))
    assert x.dtype == np.float32
    # XLA multiplies by the rounded reciprocal: it and the product err by 2**-24 each, relative to values up to 2.
    np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, rtol=0, atol=2**-22)
    assert (x[0], x[255]) == (-1, 1)


# --- Embedded pictures ------------------------------------------------------------------------------------------------


def averaged(image, size):
    """8x8 grey levels 0..16 of an enlarged digit."""
    return image[..., 0].reshape(8, size // 8, 8, size // 8).mean((1, 3)) * 16 / 255


def test_digits_split_is_stratified_disjoint_and_complete():
    seen = collections.Counter()
    for split, size, per_class in (("train", 1297, None), ("validation", 200, 20), ("test", 300, 30)):
        source = data.digits(split, size=8)  # size 8 is the original picture
        assert len(source) == size
        counts = collections.Counter(int(record["label"]) for record in source)
        assert per_class is None or set(counts.values()) == {per_class}
        seen.update((record["image"].tobytes(), int(record["label"])) for record in source)
    levels, labels = load_digits(return_X_y=True)
    greys = np.round(levels * 255 / 16).astype(np.uint8)
    original = ((np.repeat(grey, 3).tobytes(), int(label)) for grey, label in zip(greys, labels, strict=True))
    assert seen == collections.Counter(original)


def test_digits_split_never_changes():
    pictures = b"".join(record["image"].tobytes() for record in data.digits("test", size=8))
    digest = hashlib.sha256(pictures).hexdigest()
    assert digest == "a0fc7cba3fbc0e2faa06ba203115c39086453e14380fd73ef4ca9b8df361c02d"


@pytest.mark.parametrize("size", [16, 32])
def test_digits_averaged_back_find_their_original(size):
    original = np.stack([averaged(record["image"], 8) for record in data.digits("test", size=8)])
    restored = np.stack([averaged(record["image"], size) for record in data.digits("test", size=size)])
    assert np.sqrt(np.mean((restored - original) ** 2)) < 1.1  # of 16 levels; the docstring's 1.03, and 0.92 at 16
    distance = ((restored[:, None] - original[None]) ** 2).sum((2, 3))
    np.testing.assert_array_equal(distance.argmin(1), np.arange(len(original)))


def test_digits_records():
    source = data.digits("train", size=32)
    record = pickle.loads(pickle.dumps(source))[5]
    np.testing.assert_array_equal(record["image"], source[5]["image"])
    assert record["image"].dtype == np.uint8
    assert record["image"].shape == (32, 32, 3)
    assert record["label"].dtype == np.int32
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        data.digits("val")
    with pytest.raises(ValueError, match="multiple of 8, such as 24"):
        data.digits("train", size=28)


def test_embedded_pictures_name_the_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for source in (lambda: data.digits("train"), data.photographs):
        with pytest.raises(ImportError, match=r"pip install lumen\[examples\]"):
            source()


def test_photographs_are_crops_of_both():
    source = pickle.loads(pickle.dumps(data.photographs(size=48, crops=6, seed=1)))
    records = list(source)
    assert [int(record["label"]) for record in records] == [0, 1, 0, 1, 0, 1]
    assert {record["image"].shape for record in records} == {(48, 48, 3)}
    assert len({record["image"].tobytes() for record in records}) == 6
    np.testing.assert_array_equal(records[3]["image"], data.photographs(size=48, crops=6, seed=1)[3]["image"])
    assert (records[3]["image"] != data.photographs(size=48, crops=6, seed=2)[3]["image"]).any()
    assert data.photographs(size=427, crops=1)[0]["image"].shape == (427, 427, 3)
    with pytest.raises(ValueError, match=r"1\.\.427"):
        data.photographs(size=428)


# --- Image data sets on disk ------------------------------------------------------------------------------------------


def test_image_folder_reads_every_kind_of_image(tmp_path):
    image = picture()
    pillow = Image.fromarray(image)
    grey = np.asarray(pillow.convert("L"))
    rotate = Image.Exif()
    rotate[0x0112] = 6  # "turn 90 degrees clockwise to view"
    see_through = Image.fromarray(np.dstack([image, np.full((20, 30), 99, np.uint8)]))
    palette = pillow.quantize(256)
    files = {
        "bird/a.JPEG": (encode(pillow.convert("CMYK"), "JPEG", quality=100, subsampling=0), image),
        "bird/b.jpg": (encode(np.rot90(image), "JPEG", quality=100, subsampling=0, exif=rotate), image),
        "bird/c.jpeg": (encode(grey, "JPEG", quality=100), grey[..., None]),
        "bird/inside/d.webp": (encode(image, "WEBP", lossless=True), image),
        "cat/1.png": (encode(see_through, "PNG"), image),
        "cat/2.png": (encode(palette, "PNG", transparency=bytes(range(256))), np.asarray(palette.convert("RGB"))),
        "cat/3.png": (encode(grey.astype(np.uint16) * 257, "PNG"), grey[..., None]),
        "cat/4.png": (encode(pillow.convert("1"), "PNG"), np.asarray(pillow.convert("1").convert("RGB"))),
        "cat/5.png": (encode(Image.merge("LA", (pillow.convert("L"),) * 2), "PNG"), grey[..., None]),
        "dog/only.png": (encode(image, "PNG"), image),
        "dog/notes.txt": (b"not an image", None),
        "dog/._only.png": (b"not an image either", None),
        ".cache/x.png": (b"nor this", None),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = pickle.loads(pickle.dumps(data.image_folder(tmp_path)))
    assert source.classes == ("bird", "cat", "dog")
    wanted = [(name, want) for name, (_, want) in files.items() if want is not None]
    assert len(source) == len(wanted)
    for record, (name, want) in zip(source, wanted, strict=True):
        assert record["image"].dtype == np.uint8
        assert record["image"].shape == (20, 30, 3)
        assert source.classes[record["label"]] == name.split("/")[0]
        # JPEG rounds to whole levels in its own colour space, there and back.
        lossy = name.lower().endswith(("jpeg", "jpg"))
        assert np.abs(record["image"].astype(int) - want).max() <= (4 if lossy else 0), name


def test_image_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent is not a folder; images are expected in"):
        data.image_folder(tmp_path / "absent")
    (tmp_path / "loose.png").write_bytes(encode(picture(), "PNG"))
    with pytest.raises(FileNotFoundError, match=r"no class folders; images are expected in .*<class name>"):
        data.image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "cut.png").write_bytes(encode(picture(), "PNG")[:200])
    (tmp_path / "cat" / "text.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 class folders of .* hold no images, such as 'dog'"):
        data.image_folder(tmp_path)
    (tmp_path / "dog").rmdir()
    source = data.image_folder(tmp_path)
    with pytest.raises(ValueError, match=r"cut\.png cannot be decoded"):
        source[0]
    with pytest.raises(ValueError, match=r"text\.jpg cannot be decoded"):
        source[1]
    with pytest.raises(ValueError, match=r"(cut\.png|text\.jpg) cannot be decoded"):  # through the pipeline as well
        next(data.make_batches(source, batch_size=1, seed=0))


def write_parquet(path, images, labels, *, rows_per_group, raw=False):
    """As the Hugging Face hub lays out an image data set."""
    kind = pyarrow.binary() if raw else pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    cells = images if raw else [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "label": pyarrow.array(labels, pyarrow.int64())})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)


@pytest.mark.parametrize("raw", [False, True])
def test_image_parquet_reads_in_any_order(tmp_path, raw):
    pictures = [picture(8, 8, seed) for seed in range(23)]
    encoded = [encode(image, "PNG") for image in pictures]
    write_parquet(tmp_path / "train-00000.parquet", encoded[:16], range(16), rows_per_group=3, raw=raw)
    write_parquet(tmp_path / "train-00001.parquet", [], [], rows_per_group=3, raw=raw)
    write_parquet(tmp_path / "train-00002.parquet", encoded[16:], range(16, 23), rows_per_group=5, raw=raw)
    write_parquet(tmp_path / "validation.parquet", encoded[:1], [99], rows_per_group=3, raw=raw)
    source = pickle.loads(pickle.dumps(data.image_parquet(tmp_path / "train-*.parquet")))
    assert len(source) == 23
    for index in np.random.default_rng(0).permutation(23):  # more row groups than are kept
        record = source[index]
        assert (record["label"], record["label"].dtype) == (index, np.int32)
        np.testing.assert_array_equal(record["image"], pictures[index])
    with pytest.raises(IndexError):
        source[23]
    assert len(data.image_parquet(tmp_path / "validation.parquet")) == 1
    batches = data.make_batches(source, batch_size=23, seed=0)  # read by several threads at once
    assert [sorted(row) for row in labels_of(take(batches, 3))] == [list(range(23))] * 3
    batches.close()


def test_image_parquet_names_what_is_wrong(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    with pytest.raises(FileNotFoundError, match=r"is a folder; name the files of one split"):
        data.image_parquet(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        data.image_parquet(path)
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"x\.parquet is not a readable parquet file"):
        data.image_parquet(path)
    write_parquet(path, [b"junk", None], [0, 1], rows_per_group=2, raw=True)
    with pytest.raises(ValueError, match=r"no column 'img'; its columns are image, label\. Set image_column"):
        data.image_parquet(path, image_column="img")
    with pytest.raises(ValueError, match=r"'label' of .* is int64; it must be encoded images"):
        data.image_parquet(path, image_column="label")
    with pytest.raises(ValueError, match=r"'image' of .* is binary; it must be integers"):
        data.image_parquet(path, label_column="image")
    source = data.image_parquet(path)
    with pytest.raises(ValueError, match=r"row 0 of row group 0 of .*x\.parquet cannot be decoded"):
        source[0]
    with pytest.raises(ValueError, match=r"row 1 of .* holds no image bytes"):
        source[1]
    write_parquet(path, [encode(picture(), "PNG")], [None], rows_per_group=2)
    with pytest.raises(ValueError, match=r"row 0 of .* holds no label"):
        data.image_parquet(path)[0]
    write_parquet(path, [], [], rows_per_group=2)
    with pytest.raises(ValueError, match="hold no rows"):
        data.image_parquet(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install lumen\[data\]"):
        data.image_parquet(path)


# --- Image codes ------------------------------------------------------------------------------------------------------


def code_batches(sizes, *, variants=2, vocabulary=16384):
    rng = np.random.default_rng(0)
    for size in sizes:
        codes = rng.integers(0, vocabulary, (size, variants, 6))
        codes.flat[0] = vocabulary - 1  # the largest code is stored as well
        yield {"codes": codes, "label": rng.integers(0, 1000, size)}


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_codes_round_trip(tmp_path, capsys, vocabulary, dtype):
    batches = list(code_batches([4, 1, 7], vocabulary=vocabulary))
    meta = {**META, "vocabulary": vocabulary, "split": "train"}
    data.write_codes(tmp_path / "sub" / "codes", batches, meta, total=12)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["codes"]  # the temporary folder is gone
    assert capsys.readouterr() == ("", "")  # no progress bar where there is no terminal
    assert np.load(tmp_path / "sub" / "codes" / "codes.npy").dtype == dtype
    source = data.codes(tmp_path / "sub" / "codes", expect={"vocabulary": vocabulary})
    assert source.meta == meta
    assert len(source) == 12
    records = list(source)
    assert records[0]["codes"].dtype == records[0]["label"].dtype == np.int32
    np.testing.assert_array_equal([r["codes"] for r in records], np.concatenate([b["codes"] for b in batches]))
    np.testing.assert_array_equal([r["label"] for r in records], np.concatenate([b["label"] for b in batches]))
    travelled = pickle.dumps(source)
    assert len(travelled) < 500  # its path, not its contents
    np.testing.assert_array_equal(pickle.loads(travelled)[7]["codes"], records[7]["codes"])


def test_codes_grow_past_the_header_of_zero_rows(tmp_path):
    data.write_codes(tmp_path / "codes", code_batches([1] * 1001), META)  # the shape gains three digits
    assert np.load(tmp_path / "codes" / "codes.npy").shape == (1001, 2, 6)


def test_codes_from_a_masked_pass_of_jax_arrays(tmp_path):
    """An evaluation pass over a source, tokenised on a device, comes out once and in order."""
    passes = data.make_batches(numbered(10), batch_size=4, seed=0, repeat=False)
    tokenised = ({**batch, "codes": jnp.tile(batch["label"][:, None, None], (1, 2, 6))} for batch in passes)
    data.write_codes(tmp_path / "codes", tokenised, META)
    assert [(int(r["label"]), int(r["codes"][1, 5])) for r in data.codes(tmp_path / "codes")] == [
        (i, i) for i in range(10)
    ]


def test_codes_from_npz(tmp_path):
    codes = np.arange(24, dtype=np.uint16).reshape(4, 1, 6)
    np.savez(tmp_path / "x.npz", codes=codes, labels=np.arange(4, dtype=np.int32), meta=json.dumps(META))
    source = data.codes(tmp_path / "x.npz")
    np.testing.assert_array_equal([record["codes"] for record in source], codes)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x\.npz cannot be read"):
        data.codes(tmp_path / "x.npz")


def test_writing_codes_is_all_or_nothing(tmp_path):
    def interrupted():
        yield from code_batches([4])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_codes(tmp_path / "codes", interrupted(), META)
    with pytest.raises(ValueError, match="hold no images"):
        data.write_codes(tmp_path / "codes", [], META)
    assert not list(tmp_path.iterdir())
    data.write_codes(tmp_path / "codes", code_batches([4]), META)
    before = (tmp_path / "codes" / "codes.npy").read_bytes()
    with pytest.raises(FileExistsError, match="remove it or choose another name"):
        data.write_codes(tmp_path / "codes", code_batches([5]), META)
    assert (tmp_path / "codes" / "codes.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.full((2, 2, 6), 16384)}, r"codes span 16384\.\.16384, outside the vocabulary 0\.\.16383"),
        ({"codes": np.full((2, 2, 6), -1)}, r"codes span -1\.\.-1"),
        ({"codes": np.zeros((2, 2, 5), int)}, r"int64 \[2, 2, 5\]; they must be integers \[b, 2, 6\]"),
        ({"codes": np.zeros((2, 3, 6), int)}, r"int64 \[2, 3, 6\]; they must be integers \[b, 2, 6\]"),
        ({"codes": np.zeros((2, 2, 6))}, r"float64 \[2, 2, 6\]; they must be integers"),
        ({"label": np.zeros(3, int)}, r"labels are int64 \[3\]; they must be integers \[2\]"),
    ],
)
def test_writing_codes_refuses_wrong_batches(tmp_path, change, message):
    (good,) = code_batches([2])
    with pytest.raises(ValueError, match=message):
        data.write_codes(tmp_path / "codes", [good, {**good, **change}], META)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 6}, "grid=6"),
        ({"grid": [2, 0]}, r"grid=\[2, 0\]"),
        ({"vocabulary": "16384"}, "vocabulary='16384'"),
        ({"tokenizer_sha256": "abc"}, "tokenizer_sha256='abc'"),
        ({"source": None, "vocabulary": True}, "vocabulary=True, source=None"),
    ],
)
def test_codes_metadata_is_checked_on_both_ways(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        data.write_codes(tmp_path / "codes", code_batches([2]), {**META, **change})
    data.write_codes(tmp_path / "codes", code_batches([2]), META)
    (tmp_path / "codes" / "meta.json").write_text(json.dumps({**META, **change}))
    with pytest.raises(ValueError, match=message):
        data.codes(tmp_path / "codes")


def test_reading_codes_names_what_is_wrong(tmp_path):
    folder = tmp_path / "codes"
    with pytest.raises(FileNotFoundError, match="does not exist; make it with write_codes"):
        data.codes(folder)
    data.write_codes(folder, code_batches([4]), META)
    whole = {name: (folder / name).read_bytes() for name in ("codes.npy", "labels.npy", "meta.json")}

    def damage(name, content, error, message):
        for good, original in whole.items():
            (folder / good).write_bytes(original)
        if isinstance(content, np.ndarray):
            np.save(folder / name, content)
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(error, match=message):
            data.codes(folder)

    damage("codes.npy", whole["codes.npy"][:-2], ValueError, "cannot be read")
    damage("codes.npy", b"\x93NUMPY", ValueError, "cannot be read")
    damage("labels.npy", np.array([{}] * 4), ValueError, "cannot be read")  # objects: would need unpickling
    damage("meta.json", b"{", ValueError, "cannot be read")
    damage("meta.json", b"[]", ValueError, "wrong metadata grid=None, vocabulary=None")
    damage("meta.json", json.dumps({**META, "grid": [4, 4]}).encode(), ValueError, r"codes uint16 \[4, 2, 6\].*16\]")
    damage("codes.npy", np.zeros((4, 2, 6), np.int64), ValueError, r"int64 \[4, 2, 6\]; they must be uint16 or uint32")
    damage("codes.npy", np.zeros((4, 6), np.uint16), ValueError, r"uint16 \[4, 6\]")
    damage("labels.npy", np.zeros(3, np.int32), ValueError, r"int32 \[3\]; they must be int32 \[4\]")
    damage("labels.npy", np.zeros(4, np.int64), ValueError, r"int64 \[4\]; they must be int32 \[4\]")
    for name, original in whole.items():
        (folder / name).write_bytes(original)
    with pytest.raises(ValueError, match=r"written with tokenizer_sha256='abab.*but 'cdcd"):
        data.codes(folder, expect={"tokenizer_sha256": "cd" * 32})
    (folder / "meta.json").write_text(json.dumps({**META, "vocabulary": 100}))
    with pytest.raises(ValueError, match=r"record 0 of .* holds code 16383, but its vocabulary is 100"):
        data.codes(folder)[0]
    (folder / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks labels\.npy"):
        data.codes(folder)


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_of_its_own():
    batches = data.make_batches(numbered(10), batch_size=4, seed=0)
    stream = np.concatenate(labels_of(take(batches, 10))).reshape(4, 10)  # 10 batches are 4 epochs, joined
    assert [sorted(epoch) for epoch in stream.tolist()] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 4
    other = data.make_batches(numbered(10), batch_size=4, seed=1)
    assert labels_of(take(other, 10)) != stream.reshape(10, 4).tolist()
    # Seed 1 is no shifted seed 0: none of its epochs is one of seed 0's.
    again = np.concatenate(labels_of(take(data.make_batches(numbered(10), batch_size=4, seed=1), 10))).reshape(4, 10)
    assert not {tuple(epoch) for epoch in stream.tolist()} & {tuple(epoch) for epoch in again.tolist()}


@pytest.mark.parametrize("records", [1, 3])
def test_fewer_records_than_a_batch(records):
    batches = take(data.make_batches(numbered(records), batch_size=8, seed=0), 3)
    assert {batch["label"].shape for batch in batches} == {(8,)}
    stream = np.concatenate(labels_of(batches))[: 24 // records * records].reshape(-1, records)
    assert [sorted(epoch) for epoch in stream.tolist()] == [list(range(records))] * len(stream)


def test_repeating_in_order():
    batches = data.make_batches(numbered(3), batch_size=2, seed=0, shuffle=False)
    assert labels_of(take(batches, 3)) == [[0, 1], [2, 0], [1, 2]]


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_global_batch(processes, repeat):
    options = {"batch_size": 6, "seed": 3, "transforms": (data.random_flip,), "repeat": repeat}
    source = data.digits("validation", size=8)
    whole = take(data.make_batches(source, **options, process_index=0, process_count=1), 40)
    parts = [
        take(data.make_batches(source, **options, process_index=process, process_count=processes), 40)
        for process in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in blocks]) for key in blocks[0]}
        for blocks in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_one_pass_is_in_order_and_padded_with_a_mask():
    batches = list(data.make_batches(numbered(10), batch_size=4, seed=0, repeat=False))
    assert labels_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    # The second process has nothing real in the last batch, and still takes part in it.
    second = list(data.make_batches(numbered(10), batch_size=4, seed=0, repeat=False, process_index=1, process_count=2))
    assert [batch["mask"].tolist() for batch in second] == [[True, True], [True, True], [False, False]]
    shuffled = list(data.make_batches(numbered(10), batch_size=4, seed=0, repeat=False, shuffle=True))
    stream, mask = np.concatenate(labels_of(shuffled)), np.concatenate([batch["mask"] for batch in shuffled])
    assert sorted(stream[mask].tolist()) == list(range(10))
    assert stream[mask].tolist() != list(range(10))


@pytest.mark.parametrize("place", range(8))
def test_state_resumes_exactly(place):
    """At every batch of two epochs, in a fresh iterator, through JSON, and on another number of processes."""
    source = [{"image": np.full((1, 2, 3), [[[i], [100 + i]]], np.uint8), "label": np.int32(i)} for i in range(20)]

    def make(**sharding):
        return data.make_batches(source, batch_size=6, seed=5, transforms=(data.random_flip,), **sharding)

    batches = make()
    take(batches, place)
    state = json.loads(json.dumps(batches.get_state()))
    want = take(batches, 3)
    batches.set_state(state)  # back in the same iterator
    assert_same(take(batches, 3), want)
    fresh = make()
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 3), want)
    second = make(process_index=1, process_count=2)
    second.set_state(state)
    assert_same(take(second, 3), [{key: value[3:] for key, value in batch.items()} for batch in want])


def test_state_of_a_finished_pass():
    batches = data.make_batches(numbered(10), batch_size=4, seed=0, repeat=False)
    assert len(list(batches)) == 3
    state = batches.get_state()
    fresh = data.make_batches(numbered(10), batch_size=4, seed=0, repeat=False)
    fresh.set_state(state)
    assert list(fresh) == []
    fresh.set_state({**state, "batches_given": 2})
    assert labels_of(fresh) == [[8, 9, 9, 9]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"batch_size": 2}, "batch_size was 4 and is now 2"),
        ({"shuffle": False}, "shuffle was True and is now False"),
        ({"source": numbered(11)}, "records was 10 and is now 11"),
    ],
)
def test_state_of_another_stream_is_refused(change, message):
    options = {"source": numbered(10), "batch_size": 4, "seed": 0}
    state = data.make_batches(**options).get_state()
    batches = data.make_batches(**{**options, **change})
    want = labels_of(take(batches, 1))
    with pytest.raises(ValueError, match=message):
        batches.set_state(state)
    with pytest.raises(ValueError, match="batches_given is None"):
        batches.set_state({})
    batches.set_state({**batches.get_state(), "batches_given": 0})
    assert labels_of(take(batches, 1)) == want


def test_state_is_saved_by_grains_checkpoint_handler(tmp_path):
    batches = data.make_batches(numbered(10), batch_size=4, seed=0)
    take(batches, 3)
    grain.checkpoint.CheckpointHandler().save(epath.Path(tmp_path), item=batches)
    want = take(batches, 2)
    fresh = data.make_batches(numbered(10), batch_size=4, seed=0)
    grain.checkpoint.CheckpointHandler().restore(epath.Path(tmp_path), item=fresh)
    assert_same(take(fresh, 2), want)


def test_worker_processes_change_nothing(tmp_path):
    """Two workers give what threads give, and a state goes from threads to workers and back."""
    data.write_codes(tmp_path / "codes", code_batches([30]), META)
    options = {"batch_size": 8, "seed": 2, "transforms": (data.random_variant,)}
    threads = data.make_batches(data.codes(tmp_path / "codes"), **options)
    want = take(threads, 12)
    threads.set_state({**threads.get_state(), "batches_given": 4})
    with_workers = data.make_batches(data.codes(tmp_path / "codes"), workers=2, **options)
    with_workers.set_state(threads.get_state())
    try:
        assert_same(take(with_workers, 5), want[4:9])
    finally:
        with_workers.close()
    threads.set_state(with_workers.get_state())
    assert_same(take(threads, 3), want[9:])
    with pytest.raises(ValueError, match="closed"):
        next(with_workers)


def test_a_failed_read_can_be_tried_again():
    class Flaky:
        """Fails the first time that record 5 is read, as a network file system may."""

        failures = 1

        def __len__(self):
            return 8

        def __getitem__(self, index):
            if index == 5 and self.failures:
                self.failures -= 1
                raise OSError("stale handle")
            return {"label": np.int32(index)}

    batches = data.make_batches(Flaky(), batch_size=2, seed=0, shuffle=False)
    got = labels_of(take(batches, 2))
    with pytest.raises(OSError, match="stale handle"):
        next(batches)
    assert batches.get_state()["batches_given"] == 2
    assert got + labels_of(take(batches, 2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_random_transforms_draw_by_place_in_the_stream():
    """Each record of each epoch has its own draw, both outcomes come equally often, and transforms are independent."""
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    record = {"image": image, "codes": np.array([[0], [1]]), "label": np.int32(0)}
    transforms = (data.random_flip, data.random_variant)
    batches = take(data.make_batches([record], batch_size=1000, seed=0, transforms=transforms), 4)
    flipped = np.concatenate([batch["image"][:, 0, 0, 0] == 3 for batch in batches])
    variant = np.concatenate([batch["codes"][:, 0] for batch in batches])
    assert (batches[0]["image"][flipped[:1000]] == image[:, ::-1]).all()
    # 4000 fair coins: the share's standard deviation is 0.0079; five of them, for the shares and for their agreement.
    for heads in (flipped, variant, flipped == variant):
        assert abs(heads.mean() - 0.5) < 0.04
    # A transform's draws do not depend on what follows it.
    alone = next(data.make_batches([record], batch_size=1000, seed=0, transforms=(data.random_flip,)))
    np.testing.assert_array_equal(alone["image"], batches[0]["image"])


def test_a_whole_pipeline_over_files(tmp_path):
    for name, (height, width) in {"cat": (40, 70), "dog": (90, 33)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encode(picture(height, width), "PNG"))
    transforms = (data.on_image(data.adm_centre_crop, size=16), data.on_image(data.to_model))
    batch = next(
        data.make_batches(data.image_folder(tmp_path), batch_size=2, seed=0, transforms=transforms, repeat=False)
    )
    want = [data.to_model(data.adm_centre_crop(picture(*size), 16)) for size in ((40, 70), (90, 33))]
    np.testing.assert_array_equal(batch["image"], np.stack(want))
    assert (batch["label"].dtype, batch["label"].tolist()) == (np.int32, [0, 1])


def test_evaluation_takes_the_original_variant():
    record = {"codes": np.arange(4).reshape(2, 2), "label": np.int32(0)}
    batch = next(data.make_batches([record], batch_size=3, seed=0, transforms=(data.original_variant,)))
    assert batch["codes"].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not a positive multiple of the 1 processes that share it; use 1"),
        ({"process_count": 3, "process_index": 0}, "batch_size=4 .* 3 processes .* use 3"),
        ({"process_count": 2, "process_index": 2}, "process_index=2 is not one of 2"),
        ({"seed": -1}, "seed=-1 and workers=0 must not be negative"),
        ({"source": []}, "no records"),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        data.make_batches(**{"source": numbered(3), "batch_size": 4, "seed": 0, **options})
