"""Input data: random-access sources, per-record transforms, and Grain pipelines whose position can be saved.

A *source* has `len()` and gives record i as a dict of NumPy values: images as uint8 [H, W, 3], labels as int32 scalars,
image codes as int32. A *transform* is `f(record, rng) -> record`; `rng` is a NumPy generator that depends only on the
run's seed, the transform's place and the record's place in the global stream, never on processes, workers or threads.
`make_batches` shuffles, transforms, batches and shares out:

    source = image_folder("imagenet/train")
    transforms = (on_image(adm_centre_crop, size=256), random_flip)
    with contextlib.closing(make_batches(source, batch_size=256, seed=0, transforms=transforms)) as batches:
        for batch in batches:  # {"image": uint8 [256, 256, 256, 3], "label": int32 [256]}
            ...

Pixels stay uint8 up to the device, a quarter of the bytes; `to_model` makes them float32 in [-1, 1], inside the
compiled step or here.
"""

import bisect
import collections
import functools
import glob
import hashlib
import io
import json
import os
import shutil
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import tqdm
from absl import flags
from PIL import Image, ImageOps

from lumen.io import DataError

Record = dict[str, Any]
Transform = Callable[[Record, np.random.Generator], Record]

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


# --- Images -----------------------------------------------------------------------------------------------------------


def _decode_rgb(file, name: str) -> np.ndarray:
    """Reads an image file or stream of any mode as upright uint8 [H, W, 3]; `name` is what an error calls it."""
    try:
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255 instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:  # Pillow warns about the direct way
                image = image.convert("RGBA")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name} cannot be decoded as an image ({error}); restore the file from its source, or remove it."
        ) from error


def _resize(picture: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    """Resizes along x, rounds to uint8, then along y. Asked for both at once, Pillow 13 begins with y on tall pictures,
    which gives other roundings than the Pillow of ADM's time, by one level in an eighth of the pixels."""
    return picture.resize((width, picture.height), resample).resize((width, height), resample)


def adm_centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of an image at size x size pixels, computed as the ADM reference statistics were.

    While the shorter side is at least 2 * size both sides are halved (floor) with a box filter; then a bicubic resize
    brings the shorter side to `size` and the longer one to round(longer * size / shorter), half to even; then the crop
    starts at floor((side - size) / 2) of each side. Images smaller than `size` are enlarged.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result in pixels, >= 1.
    Returns:
      uint8 [size, size, 3].
    Raises:
      ValueError: for any other dtype or shape.
    Source: openai/guided-diffusion, guided_diffusion/image_datasets.py, center_crop_arr. Under any Pillow, the pixels
      that this function gives with Pillow before 13, bit for bit.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"adm_centre_crop: image is {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3].")
    if size < 1:
        raise ValueError(f"adm_centre_crop: size={size}; it must be at least 1 pixel.")
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = _resize(picture, picture.width // 2, picture.height // 2, Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    picture = _resize(picture, width, height, Image.Resampling.BICUBIC)
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    return np.asarray(picture)[top : top + size, left : left + size]


def to_model(image):
    """What models see of a uint8 image: float32 x / 127.5 - 1, in [-1, 1]. NumPy or JAX array of any shape."""
    return image.astype(np.float32) / 127.5 - 1.0


# --- Transforms -------------------------------------------------------------------------------------------------------


def _apply_on_image(record: Record, rng: np.random.Generator, *, function: Callable, options: Mapping) -> Record:
    del rng
    return {**record, "image": function(record["image"], **options)}


def on_image(function: Callable[..., np.ndarray], **options) -> Transform:
    """The transform that replaces record["image"] by function(record["image"], **options)."""
    return functools.partial(_apply_on_image, function=function, options=options)


def random_flip(record: Record, rng: np.random.Generator) -> Record:
    """Transform: mirrors record["image"], [H, W, C], left to right with probability 1/2."""
    return {**record, "image": record["image"][:, ::-1]} if rng.integers(2) else record


def random_variant(record: Record, rng: np.random.Generator) -> Record:
    """Transform for `codes`: keeps one variant, drawn uniformly; record["codes"] goes from [variants, N] to [N]."""
    return {**record, "codes": record["codes"][rng.integers(len(record["codes"]))]}


def original_variant(record: Record, rng: np.random.Generator) -> Record:
    """Transform for `codes` in evaluation: keeps variant 0, the picture as it was; [variants, N] to [N]."""
    del rng
    return {**record, "codes": record["codes"][0]}


# --- Embedded pictures ------------------------------------------------------------------------------------------------


def _sklearn_datasets(wanted_by: str):
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"{wanted_by} come with scikit-learn, which is not installed; run `pip install lumen[examples]`."
        ) from error
    return datasets


class _Digits:
    """Records of `digits`: 8x8 greys, enlarged when read."""

    def __init__(self, greys: np.ndarray, labels: np.ndarray, size: int):
        self._greys, self._labels, self._size = greys, labels, size

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        grey = Image.fromarray(self._greys[index]).resize((self._size, self._size), Image.Resampling.BICUBIC)
        return {"image": np.asarray(grey.convert("RGB")), "label": self._labels[index]}


def digits(split: str, *, size: int = 32):
    """Handwritten digits: the 1797 pictures of 8x8 pixels and 17 grey levels that come with scikit-learn, enlarged.

    Greys 0..16 become round(grey * 255 / 16), resized with a bicubic filter. Averaging each (size/8)-pixel square of
    the result gives the 8x8 picture back with a root-mean-square error of 1.03 of 16 levels at size 32 (bilinear:
    1.54).

    The split is stratified and fixed for ever: the pictures of each class in the order of the SHA-256 of their greys,
    the first 30 for "test", the next 20 for "validation", the rest for "train". So 300, 200 and 1297 records.

    Args:
      split: "train", "validation" or "test".
      size: side of the pictures, a multiple of 8.
    Returns:
      A source of {"image": uint8 [size, size, 3], "label": int32 in 0..9}.
    Raises:
      ImportError: without scikit-learn.
      ValueError: for an unknown split or size.
    Source: UCI "Optical Recognition of Handwritten Digits", test part, as in sklearn.datasets.load_digits.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"digits: split={split!r}; it must be 'train', 'validation' or 'test'.")
    if size < 8 or size % 8:
        raise ValueError(f"digits: size={size}; it must be a multiple of 8, such as {max(8, size // 8 * 8)}.")
    levels, labels = _sklearn_datasets("The handwritten digits").load_digits(return_X_y=True)
    levels = levels.astype(np.uint8)  # [1797, 64], 0..16
    keys = np.array([hashlib.sha256(level.tobytes()).hexdigest() for level in levels])
    chosen = []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(keys[members])]
        chosen.append({"test": members[:30], "validation": members[30:50], "train": members[50:]}[split])
    chosen = np.sort(np.concatenate(chosen))
    greys = np.round(levels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _Digits(greys, labels[chosen].astype(np.int32), size)


class _Photographs:
    """Records of `photographs`: crops, cut when read."""

    def __init__(self, pictures: Sequence[np.ndarray], size: int, crops: int, seed: int):
        self._pictures, self._size, self._crops, self._seed = pictures, size, crops, seed

    def __len__(self) -> int:
        return self._crops

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._crops:
            raise IndexError(f"photographs: record {index} of {self._crops}.")
        picture = self._pictures[index % len(self._pictures)]
        rng = np.random.default_rng((self._seed, index))
        top, left = (rng.integers(side - self._size + 1) for side in picture.shape[:2])
        crop = picture[top : top + self._size, left : left + self._size]
        return {"image": crop, "label": np.int32(index % len(self._pictures))}


def photographs(*, size: int = 64, crops: int = 1000, seed: int = 0):
    """Random crops of the two photographs, 427 x 640, that come with scikit-learn: for tests of image tokenizers.

    Args:
      size: side of the square crops in pixels, at most 427.
      crops: number of records; record i is a crop of photograph i % 2 at a place drawn uniformly from (seed, i).
      seed: >= 0; another seed, other places.
    Returns:
      A source of {"image": uint8 [size, size, 3], "label": int32, 0 for the temple and 1 for the flower}.
    Raises:
      ImportError: without scikit-learn.
      ValueError: for a size or a number of crops out of range.
    """
    pictures = _sklearn_datasets("The sample photographs").load_sample_images().images
    largest = min(min(picture.shape[:2]) for picture in pictures)
    if not 1 <= size <= largest:
        raise ValueError(f"photographs: size={size}; the photographs allow 1..{largest}.")
    if crops < 1:
        raise ValueError(f"photographs: crops={crops}; at least 1 is needed.")
    return _Photographs(pictures, size, crops, seed)


# --- Image data sets on disk ------------------------------------------------------------------------------------------


class _ImageFolder:
    """Records of `image_folder`. `classes[label]` is a class folder's name."""

    def __init__(self, files: list[str], labels: np.ndarray, classes: tuple[str, ...]):
        self._files, self._labels, self.classes = files, labels, classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = self._files[index]
        return {"image": _decode_rgb(file, f"image_folder: {file}"), "label": self._labels[index]}


def image_folder(root: str | os.PathLike):
    """An ImageNet-style tree, root/<class>/**/*.{jpeg,jpg,png,webp}, suffixes in any case.

    Labels number the class folders in sorted order, and records are ordered by class, folder and name: the numbering
    and the order of torchvision's ImageFolder for a tree of these suffixes. Class folders and files whose names begin
    with a dot are skipped. The tree is listed once, here; images are read one by one. Images of any mode (grey,
    palette, CMYK, 16-bit, with alpha, which is dropped) come as RGB, turned upright where their EXIF says so; ADM and
    torchvision do not turn them.

    Returns:
      A source of {"image": uint8 [H, W, 3] of the file's own size, "label": int32}. Its `classes` are the folder names,
      by label.
    Raises:
      FileNotFoundError: if root is absent or holds no class folder, or a class folder holds no image.
      DataError: when a record is read whose file cannot be decoded; it names the file.
    """
    root = Path(root)
    layout = f"images are expected in {root}/<class name>/ and end in {', '.join(IMAGE_SUFFIXES)}"
    if not root.is_dir():
        raise FileNotFoundError(f"image_folder: {root} is not a folder; {layout}.")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FileNotFoundError(f"image_folder: {root} holds no class folders; {layout}.")
    files, labels, empty = [], [], []
    for label, name in enumerate(classes):
        found = [
            os.path.join(folder, file)
            for folder, _, names in sorted(os.walk(root / name, followlinks=True))
            for file in sorted(names)
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
        ]
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if empty:
        raise FileNotFoundError(
            f"image_folder: {len(empty)} of the {len(classes)} class folders of {root} hold no images, such as "
            f"{empty[0]!r}; {layout}. Fill or remove them: an empty one would still take a label."
        )
    return _ImageFolder(files, np.array(labels, np.int32), tuple(classes))


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "image_parquet reads with pyarrow, which is not installed; run `pip install lumen[data]`."
        ) from error
    return pyarrow


class _ImageParquet:
    """Records of `image_parquet`: one row group is read at a time, the latest few are kept."""

    ROW_GROUPS_KEPT = 4

    def __init__(self, files: list[str], image_column: str, label_column: str):
        self._files, self._image_column, self._label_column = files, image_column, label_column
        self._groups: list[tuple[int, int]] = []  # (file, row group in the file)
        self._starts: list[int] = []  # first record of each group, ascending
        self._length = 0
        for number, file in enumerate(files):
            metadata = self._checked_metadata(file)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if rows:  # an empty group would share its start with the next one
                    self._groups.append((number, group))
                    self._starts.append(self._length)
                    self._length += rows
        if not self._length:
            raise DataError(f"image_parquet: the {len(files)} files hold no rows, from {files[0]} on.")
        self._open_cache()

    def _checked_metadata(self, file: str):
        """The footer of one file, once its columns are what is wanted."""
        pyarrow = _pyarrow()
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                schema, metadata = parquet.schema_arrow, parquet.metadata
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(
                f"image_parquet: {file} is not a readable parquet file ({error}); download it again."
            ) from error
        for argument, column in (("image_column", self._image_column), ("label_column", self._label_column)):
            if column not in schema.names:
                raise DataError(
                    f"image_parquet: {file} has no column {column!r}; its columns are {', '.join(schema.names)}. "
                    f"Set {argument}."
                )
        images, labels = schema.field(self._image_column).type, schema.field(self._label_column).type
        is_struct = pyarrow.types.is_struct(images) and images.get_field_index("bytes") >= 0
        encoded = images.field("bytes").type if is_struct else images
        if not (pyarrow.types.is_binary(encoded) or pyarrow.types.is_large_binary(encoded)):
            raise DataError(
                f"image_parquet: column {self._image_column!r} of {file} is {images}; it must be encoded images, as "
                "binary or as struct<bytes: binary, path: string>."
            )
        if not pyarrow.types.is_integer(labels):
            raise DataError(f"image_parquet: column {self._label_column!r} of {file} is {labels}; it must be integers.")
        return metadata

    def _open_cache(self):
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):  # a worker process starts with a cache of its own
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_cache()

    def __len__(self) -> int:
        return self._length

    def _row_group(self, position: int):
        """The table of one row group. Read under the lock: threads that walk the same group must not each read it."""
        pyarrow = _pyarrow()
        number, group = self._groups[position]
        with self._lock:
            if position not in self._cache:
                try:
                    with pyarrow.parquet.ParquetFile(self._files[number]) as parquet:
                        columns = [self._image_column, self._label_column]
                        self._cache[position] = parquet.read_row_group(group, columns=columns)
                except (pyarrow.ArrowInvalid, OSError) as error:
                    raise DataError(
                        f"image_parquet: row group {group} of {self._files[number]} cannot be read ({error}); "
                        "download the file again."
                    ) from error
                if len(self._cache) > self.ROW_GROUPS_KEPT:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(position)
            return self._cache[position]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(f"image_parquet: record {index} of {self._length}.")
        position = bisect.bisect_right(self._starts, index) - 1
        number, group = self._groups[position]
        row = int(index) - self._starts[position]
        name = f"image_parquet: row {row} of row group {group} of {self._files[number]}"
        table = self._row_group(position)
        image, label = (table.column(column)[row].as_py() for column in (self._image_column, self._label_column))
        encoded = image.get("bytes") if isinstance(image, dict) else image
        if encoded is None:
            raise DataError(f"{name} holds no image bytes; export the data set with its images embedded.")
        if label is None:
            raise DataError(f"{name} holds no label; drop unlabelled rows when exporting the data set.")
        return {"image": _decode_rgb(io.BytesIO(encoded), name), "label": np.int32(label)}


def image_parquet(path: str | os.PathLike, *, image_column: str = "image", label_column: str = "label"):
    """Parquet files of encoded images, as on the Hugging Face hub: rows in file order, files in sorted order.

    A row group is read whole, and the four latest are kept in memory (the hub writes 100 images to a group, about 11 MB
    for ImageNet). Reading in order costs each byte once; reading shuffled costs one row group per record, so shuffle
    after tokenising (`write_codes`), or from an `image_folder`.

    Args:
      path: one file, or a glob pattern such as "imagenet/data/train-*.parquet".
      image_column: struct<bytes: binary, path: string>, or binary.
      label_column: integers.
    Returns:
      A source of {"image": uint8 [H, W, 3], RGB and upright as in `image_folder`, "label": int32}.
    Raises:
      ImportError: without pyarrow.
      FileNotFoundError: if no file matches.
      DataError: for an unreadable file, or a column that is absent or of another type; when a record is read, for an
        image that is absent or cannot be decoded, naming file and row.
    """
    _pyarrow()
    pattern = os.fspath(path)
    files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        hint = f"name the files of one split, such as {os.path.join(pattern, 'train-*.parquet')}"
        raise FileNotFoundError(
            f"image_parquet: {pattern} is a folder; {hint}."
            if os.path.isdir(pattern)
            else f"image_parquet: no file matches {pattern}."
        )
    return _ImageParquet(files, image_column, label_column)


# --- Image codes ------------------------------------------------------------------------------------------------------

_META_KEYS = (
    "grid ([rows, columns]), vocabulary (an integer), tokenizer_sha256 (64 hexadecimal digits), source (a text)"
)


def _check_meta(meta: Any, where: str) -> tuple[int, int]:
    """Checks the keys and types of a codes' metadata; returns cells per image and vocabulary."""

    def positive(value):
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    meta = meta if isinstance(meta, Mapping) else {}
    grid, digest = meta.get("grid"), meta.get("tokenizer_sha256")
    wrong = [
        f"{key}={meta.get(key)!r}"
        for key, right in (
            ("grid", isinstance(grid, list | tuple) and len(grid) == 2 and all(map(positive, grid))),
            ("vocabulary", positive(meta.get("vocabulary")) and meta["vocabulary"] <= 2**31),
            (
                "tokenizer_sha256",
                isinstance(digest, str) and len(digest) == 64 and not set(digest) - set("0123456789abcdef"),
            ),
            ("source", isinstance(meta.get("source"), str)),
        )
        if not right
    ]
    if wrong:
        raise DataError(f"{where}: wrong metadata {', '.join(wrong)}; it must hold {_META_KEYS}.")
    return grid[0] * grid[1], meta["vocabulary"]


class _Codes:
    """Records of `codes`; `meta` is its metadata. Travels to other processes as its path."""

    def __init__(self, path: Path, expect: Mapping[str, Any]):
        self._path, self._expect = path, dict(expect)
        self._codes, self._labels, self.meta = _open_codes(path)
        cells, self._vocabulary = _check_meta(self.meta, f"codes: {path}")
        codes, labels = self._codes, self._labels
        if codes.dtype not in (np.uint16, np.uint32) or codes.ndim != 3 or codes.shape[2] != cells or 0 in codes.shape:
            raise DataError(
                f"codes: {path} holds codes {codes.dtype} {list(codes.shape)}; they must be uint16 or uint32 [images, "
                f"variants, {cells}] for its grid {list(self.meta['grid'])}. Write it again with write_codes."
            )
        if labels.dtype != np.int32 or labels.shape != codes.shape[:1]:
            raise DataError(
                f"codes: {path} holds labels {labels.dtype} {list(labels.shape)}; they must be int32 [{len(codes)}], "
                "one per image. Write it again with write_codes."
            )
        for key, value in self._expect.items():
            if self.meta.get(key) != value:
                raise DataError(
                    f"codes: {path} was written with {key}={self.meta.get(key)!r}, but {value!r} is wanted; tokenise "
                    "the images again, or use the tokenizer these codes came from."
                )

    def __reduce__(self):  # not the arrays: pickling a memory map copies the file
        return _Codes, (self._path, self._expect)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: int) -> Record:
        record = np.asarray(self._codes[index])
        if record.max() >= self._vocabulary:
            raise DataError(
                f"codes: record {index} of {self._path} holds code {record.max()}, but its vocabulary is "
                f"{self._vocabulary}; the file is damaged or its metadata is wrong. Write it again with write_codes."
            )
        return {"codes": record.astype(np.int32), "label": self._labels[index]}


def _open_codes(path: Path) -> tuple[np.ndarray, np.ndarray, Any]:
    """Codes, labels and metadata of a folder (memory-mapped) or of an .npz (in memory)."""
    if path.is_dir():
        missing = [name for name in ("codes.npy", "labels.npy", "meta.json") if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"codes: {path} lacks {', '.join(missing)}; it must hold codes.npy, labels.npy and meta.json."
            )
    elif not path.is_file():
        raise FileNotFoundError(f"codes: {path} does not exist; make it with write_codes.")
    try:
        if path.is_dir():
            codes = np.load(path / "codes.npy", mmap_mode="r")
            return codes, np.load(path / "labels.npy"), json.loads((path / "meta.json").read_text(encoding="utf-8"))
        with open(path, "rb") as file, np.load(file) as archive:  # np.load alone leaves a damaged file open
            return archive["codes"], archive["labels"], json.loads(archive["meta"].item())
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"codes: {path} cannot be read ({error}); it is damaged, or was not written by write_codes. Write it again."
        ) from error


def codes(path: str | os.PathLike, *, expect: Mapping[str, Any] | None = None):
    """Images as a tokenizer's codes, computed once: LPD trains on the codes of each image and of its mirror image.

    Args:
      path: a folder made by `write_codes`: codes.npy, uint16 or uint32 [n, variants, N], memory-mapped; labels.npy,
        int32 [n]; and meta.json. Or an .npz with `codes`, `labels` and `meta`, the metadata as a JSON text; it is read
        into memory. The metadata holds grid [rows, columns] with rows * columns = N (codes are in raster order),
        vocabulary, tokenizer_sha256 (of the tokenizer's weights) and source (where the images came from).
      expect: metadata that the codes must have, such as {"vocabulary": 16384, "tokenizer_sha256": ...}: codes of
        another tokenizer of the same vocabulary train without complaint, to nothing.
    Returns:
      A source of {"codes": int32 [variants, N], "label": int32}, with its metadata as `meta`. Train with the transform
      `random_variant`, evaluate with `original_variant`.
    Raises:
      FileNotFoundError: if a file is absent.
      DataError: for damaged files, shapes, dtypes or metadata that do not agree, or metadata other than expected; when
        a record is read, for a code outside the vocabulary.
    Source: the cached `indices` and `indices_flip` of mit-han-lab/lpd. Deviation: one array, not one file per image.
    """
    return _Codes(Path(path), expect or {})


def write_codes(
    path: str | os.PathLike, batches: Iterable[Mapping[str, Any]], meta: Mapping[str, Any], *, total: int | None = None
) -> None:
    """Writes the folder that `codes` reads, all of it or nothing, with a progress bar where there is a terminal.

    Everything goes to a temporary folder beside `path`, which is renamed at the end and removed if anything fails.
    Codes are stored as uint16 where the vocabulary allows it, else as uint32. Call it in one process.

    Args:
      path: a folder that does not exist yet.
      batches: dicts of `codes`, integers [b, variants, N], and `label`, integers [b]; a bool `mask` [b], as made by
        `make_batches(repeat=False)`, leaves out the rows where it is False. NumPy or JAX arrays.
      meta: the metadata described at `codes`; further JSON values are kept.
      total: number of images to come, for the progress bar's time left.
    Raises:
      FileExistsError: if path exists.
      ValueError: for wrong metadata, shapes that differ or do not fit the grid, codes outside the vocabulary, or no
        images at all.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"write_codes: {path} exists; remove it or choose another name.")
    cells, vocabulary = _check_meta(meta, "write_codes")
    text = json.dumps(dict(meta), indent=2) + "\n"
    dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    folder.mkdir(parents=True)
    try:
        variants, labels = None, []
        with open(folder / "codes.npy", "wb") as file, tqdm.tqdm(total=total, unit=" images", disable=None) as progress:
            for batch in batches:
                keep = np.asarray(batch["mask"]) if "mask" in batch else slice(None)
                images, label = np.asarray(batch["codes"])[keep], np.asarray(batch["label"])[keep]
                if variants is None and images.ndim == 3:
                    variants = images.shape[1]
                    _write_npy_header(file, dtype, (0, variants, cells))
                _check_code_batch(images, label, variants, cells, vocabulary)
                file.write(images.astype(dtype).tobytes())
                labels.append(label.astype(np.int32))
                progress.update(len(images))
            if not sum(map(len, labels)):
                raise ValueError("write_codes: the batches hold no images.")
            labels = np.concatenate(labels)
            body = file.tell()
            file.seek(0)
            _write_npy_header(file, dtype, (len(labels), variants, cells))
            file.seek(body)
        np.save(folder / "labels.npy", labels)
        (folder / "meta.json").write_text(text, encoding="utf-8")
        for written in (*folder.iterdir(), folder):
            _flush_to_disk(written)
        folder.rename(path)
        _flush_to_disk(path.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_npy_header(file, dtype: np.dtype, shape: tuple) -> None:
    """Begins an .npy file. NumPy leaves room for the first axis to grow: all rows' header fits over that of 0 rows."""
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


def _check_code_batch(images, label, variants: int | None, cells: int, vocabulary: int) -> None:
    if not np.issubdtype(images.dtype, np.integer) or images.shape != (len(images), variants, cells):
        raise ValueError(
            f"write_codes: a batch's codes are {images.dtype} {list(images.shape)}; they must be integers "
            f"[b, {variants or 'variants'}, {cells}], for the grid and for the variants of the first batch."
        )
    if not np.issubdtype(label.dtype, np.integer) or label.shape != images.shape[:1]:
        raise ValueError(
            f"write_codes: a batch's labels are {label.dtype} {list(label.shape)}; they must be integers "
            f"[{len(images)}], one per image."
        )
    if images.size and not 0 <= images.min() <= images.max() < vocabulary:
        raise ValueError(
            f"write_codes: codes span {images.min()}..{images.max()}, outside the vocabulary 0..{vocabulary - 1}; "
            "correct meta['vocabulary'], or the tokenizer."
        )


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Batches ----------------------------------------------------------------------------------------------------------


class Batches(grain.DatasetIterator):
    """The iterator of `make_batches`: Grain's interface, with a state that no number of processes or workers changes.

    `get_state()` is a JSON-able dict: the number of global batches already given, and what identifies the stream.
    `set_state` moves to that place, forwards or backwards; the next batch is bit for bit the one that would have come.
    The state is the same on every process and may be restored with other numbers of processes and workers. `close()`
    ends threads and worker processes.
    """

    def __init__(self, batches: grain.MapDataset, workers: int, identity: Mapping[str, Any]):
        super().__init__()
        self._batches, self._workers, self._identity = batches, workers, dict(identity)
        self._given = 0
        self._running: grain.DatasetIterator | None = None
        self._ended = False

    def __next__(self) -> dict[str, np.ndarray]:
        if self._ended:
            raise ValueError("make_batches: this iterator is closed; make another one and set its state.")
        self.start_prefetch()
        if self._running is None or self._given >= len(self._batches):
            raise StopIteration
        try:
            batch = next(self._running)
        except BaseException:
            # Grain's iterator has lost the batch it failed on and would skip it; a fresh one tries it again.
            self._stop()
            raise
        self._given += 1
        return batch

    def start_prefetch(self) -> None:
        """Begins to prepare batches in the background; the first `next` does it otherwise."""
        if self._running is None and self._given < len(self._batches) and not self._ended:
            # A thread prepares a whole batch, and as many are held ready as there are threads: memory bounds both.
            held = 2 if self._workers else 8
            remaining = self._batches[self._given :]
            stream = remaining.to_iter_dataset(grain.ReadOptions(num_threads=held, prefetch_buffer_size=held))
            if self._workers:
                _allow_workers_without_absl()
                stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
            self._running = iter(stream)
            self._running.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        """The place in the stream, JSON-able."""
        return {"batches_given": self._given, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a place given by `get_state`.

        Raises:
          ValueError: if the state comes from another stream: other records, batch size, seed or order.
        """
        differing = [
            f"{key} was {state.get(key)!r} and is now {value!r}"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        given = state.get("batches_given")
        if not isinstance(given, int) or not 0 <= given <= len(self._batches):
            differing.append(f"batches_given is {given!r}")
        if differing:
            raise ValueError(
                f"make_batches: the saved state belongs to another stream: {'; '.join(differing)}. Build the iterator "
                "as it was when the state was saved, or begin anew without restoring it."
            )
        self._stop()
        self._given = int(state["batches_given"])

    def close(self) -> None:
        """Ends threads and worker processes; the iterator gives no more batches, its state stays readable."""
        self._ended = True
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def _allow_workers_without_absl() -> None:
    """Lets Grain 0.2.18 start workers in a program that is not run by absl: it reads this flag before any parsing.

    The flag then has its default. Known as google/grain#1355 and gone after that version.
    """
    name = "grain_enable_multiprocess_worker_profiling"
    if name in flags.FLAGS and not flags.FLAGS.is_parsed():
        flags.FLAGS[name].present = 1


def _record_or_last(index: int, *, records: grain.sources.RandomAccessDataSource) -> Record:
    return records[min(index, len(records) - 1)]


def _add_mask(index: int, record: Record, *, records: int) -> Record:
    return {**record, "mask": np.bool_(index < records)}


def make_batches(
    source: grain.sources.RandomAccessDataSource,
    *,
    batch_size: int,
    seed: int,
    transforms: Sequence[Transform] = (),
    shuffle: bool | None = None,
    repeat: bool = True,
    workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    collate: Callable[[Sequence[Record]], Record] | None = None,
) -> Batches:
    """An iterator over batches of a source: dicts of NumPy arrays, the records' values stacked along a new first axis.

    The global stream is one sequence of records that depends on the seed alone; global batch k is its records k *
    batch_size to (k + 1) * batch_size, and of b = batch_size / process_count rows each, process p gets the p-th block.
    So the blocks of all processes, in order, are the global batch, and the stream is the same for any number of
    processes and workers. Where processes hold the same rows (a tensor axis that spans hosts), give them the same
    index, and as the count the number of different blocks.

    repeat=True: epoch follows epoch without end, each in another order. Epochs are joined before batches are cut: no
    record is dropped, a batch may span epochs, and a source smaller than a batch works. repeat=False: one pass,
    ceil(records / batch_size) batches of full size, so that nothing is compiled twice and every process takes part in
    each; every batch has a bool `mask` [b] that is False for the rows beyond the last record, which repeat that record.

    Args:
      source: random-access source of at least one record.
      batch_size: rows of the global batch, a multiple of process_count.
      seed: >= 0; decides the order and every transform's draws.
      transforms: applied to each record in turn, before stacking; see the module's text for their random numbers.
      shuffle: random order, or the source's own; default: random when repeating.
      workers: worker processes that prepare batches; 0 means threads of this process, enough where decoding is light.
        Workers are spawned, so the caller's script needs an `if __name__ == "__main__"` guard, and transforms must be
        picklable by cloudpickle.
      process_index, process_count: default: JAX's.
      collate: makes a batch of its records where these cannot be stacked.
    Returns:
      `Batches`, with get_state, set_state and close.
    Raises:
      ValueError: for an empty source, sizes out of range, or a batch size that the processes do not divide.
    """
    process_count = jax.process_count() if process_count is None else process_count
    process_index = jax.process_index() if process_index is None else process_index
    if not 0 <= process_index < process_count:
        raise ValueError(f"make_batches: process_index={process_index} is not one of {process_count} processes.")
    if batch_size < 1 or batch_size % process_count:
        nearest = max(1, round(batch_size / process_count)) * process_count
        raise ValueError(
            f"make_batches: batch_size={batch_size} is not a positive multiple of the {process_count} processes that "
            f"share it; use {nearest}."
        )
    if seed < 0 or workers < 0:
        raise ValueError(f"make_batches: seed={seed} and workers={workers} must not be negative.")
    if len(source) == 0:
        raise ValueError("make_batches: the source holds no records.")
    shuffle = repeat if shuffle is None else shuffle

    # Independent seeds for the order and for each transform: one more transform at the end changes no other's draws.
    seeds = [int(word) for word in np.random.SeedSequence(seed).generate_state(1 + len(transforms), np.uint32)]
    records = grain.MapDataset.source(source)
    if shuffle:
        records = records.shuffle(seed=seeds[0])
    if not repeat:
        whole = -(-len(source) // batch_size) * batch_size
        records = grain.MapDataset.range(whole).map(functools.partial(_record_or_last, records=records))
    for transform, transform_seed in zip(transforms, seeds[1:], strict=True):
        records = records.random_map(transform, seed=transform_seed)
    add_mask = functools.partial(_add_mask, records=len(source))
    records = records.repeat() if repeat else records.map_with_index(add_mask)
    # Blocks of b rows, of which this process takes every process_count-th: exactly its part of each global batch.
    blocks = records.batch(batch_size // process_count, drop_remainder=True, batch_fn=collate)
    blocks = blocks[process_index::process_count]
    # Plain types, whatever the configuration held: the state is written as JSON.
    identity = {
        "records": len(source),
        "batch_size": int(batch_size),
        "seed": int(seed),
        "shuffle": bool(shuffle),
        "repeat": bool(repeat),
    }
    return Batches(blocks, workers, identity)
