"""Street scenes against geometry, readers against files written here, batches against their definition."""

import contextlib
import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

from lumen.evaluation.segmentation import IGNORE, NUSCENES, SEMANTIC_KITTI
from lumen.sparse.tensor import CapacityError, SparseError, SparseTensor, check_voxels
from lumen.sparse.voxels import level_counts, voxelize
from lumen.training.lidar import (
    MAX_RANGE,
    SENSOR_HEIGHT,
    ScanOptions,
    batch_spec,
    capacity_ladder,
    cast_rays,
    evaluation_batches,
    nuscenes,
    nuscenes_folder,
    nuscenes_label_map,
    random_street,
    semantic_kitti,
    semantic_kitti_label_map,
    street_scans,
    training_batches,
    turn_and_scale,
)

SMALL = ScanOptions(voxel_size=0.5, spatial_shape=(400, 400, 64), max_voxels=600)
tiny_streets = functools.partial(street_scans, scans=5, beams=16, azimuths=128)


def take(batches, count):
    with contextlib.closing(batches):
        return list(itertools.islice(batches, count))


# --- Street scenes ----------------------------------------------------------------------------------------------------


def inside(boxes, places, shrink):
    """bool [n, m]: which places [m, 3], z above the ground, are in which boxes made smaller on all sides."""
    apart = places[None, :, :2] - boxes.centres[:, None]
    cos, sin = np.cos(boxes.headings)[:, None], np.sin(boxes.headings)[:, None]
    along, across = apart[..., 0] * cos + apart[..., 1] * sin, apart[..., 1] * cos - apart[..., 0] * sin
    height = places[None, :, 2]
    half = boxes.sizes[:, None] / 2 - shrink
    return (
        (abs(along) < half[..., 0])
        & (abs(across) < half[..., 1])
        & (abs(height - half[..., 2] - shrink) < half[..., 2])
    )


def test_rays_end_at_the_first_surface():
    boxes = random_street(np.random.default_rng(0), boxes=40, reach=40)
    assert np.bincount(boxes.labels, minlength=4).tolist() == [0, 20, 10, 10]
    directions, distances, hits = cast_rays(boxes, 24, 128)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, rtol=1e-12)
    sensor = np.array([0, 0, SENSOR_HEIGHT])
    ends = (sensor + directions * np.where(np.isfinite(distances), distances, 0)[..., None]).reshape(-1, 3)
    hit, of_box, box = np.isfinite(distances).ravel(), hits.ravel() >= 0, hits.ravel()
    assert 300 < of_box.sum() < 2500
    np.testing.assert_allclose(ends[hit & ~of_box, 2], 0, atol=1e-9)
    # Ends lie on a surface: in that box made slightly larger, in no slightly smaller box at all.
    assert hit[of_box].all()
    assert inside(boxes, ends, -1e-6)[box[of_box], np.flatnonzero(of_box)].all()
    assert not inside(boxes, ends, 1e-6)[:, hit].any()
    # Nothing stands in the way, tried every 5 cm, and rays that meet nothing leave the scene.
    way = np.minimum(distances, MAX_RANGE).reshape(-1, 1)
    steps = np.arange(0.05, MAX_RANGE, 0.05)
    for ray in range(0, len(way), 7):
        before = steps[steps < way[ray] - 1e-6]
        places = sensor + directions.reshape(-1, 3)[ray] * before[:, None]
        assert not inside(boxes, places, 1e-6).any()
        assert (places[:, 2] > 0).all()


def test_streets_depend_on_seed_split_and_index_alone():
    source = tiny_streets("train")
    first, again = source[3], tiny_streets("train")[3]
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
    assert (first["points"].dtype, first["labels"].dtype) == (np.float32, np.int32)
    others = [source[2], tiny_streets("validation")[3], tiny_streets("train", seed=1)[3]]
    assert all(not np.array_equal(first["points"], other["points"]) for other in others)
    with pytest.raises(IndexError, match="record 5 of 5"):
        source[5]


def test_a_full_scan_is_as_described():
    source = street_scans("train", scans=1)
    scan = source[0]
    assert source.largest == 64 * 2048 >= len(scan["points"])
    distance = np.linalg.norm(scan["points"][:, :3], axis=1)
    assert distance.max() < MAX_RANGE + 0.1
    assert set(np.unique(scan["labels"])) == {0, 1, 2, 3}
    # Ground is where it should be but for noise of 1 cm along rays that fall by at most 25 degrees.
    ground = scan["points"][scan["labels"] == 0]
    assert abs(ground[:, 2] + SENSOR_HEIGHT).max() < 0.05
    assert 0 <= ground[:, 3].min() < ground[:, 3].max() <= 1
    voxels = voxelize(scan["points"], 0.05, rule="round")
    counts = level_counts(np.pad(voxels.coordinates, ((0, 0), (1, 0))), 4)
    # Streets differ by several percent, coarse levels by more.
    np.testing.assert_allclose(len(scan["points"]), 126_000, rtol=0.03)
    np.testing.assert_allclose(counts[0], 85_000, rtol=0.08)
    np.testing.assert_allclose(np.array(counts) / counts[0], [1, 0.60, 0.30, 0.13, 0.05], rtol=0.3)
    neighbours = []
    for level in range(2):
        sites = np.unique(voxels.coordinates.astype(np.int64) >> level, axis=0)
        keys = ((sites[:, 0] + 1) * 8192 + sites[:, 1] + 1) * 8192 + sites[:, 2] + 1
        shifts = [(x * 8192 + y) * 8192 + z for x, y, z in itertools.product((-1, 0, 1), repeat=3)]
        neighbours.append(sum(np.isin(keys + shift, keys).sum() for shift in shifts) / len(keys))
    np.testing.assert_allclose(neighbours, [4.0, 5.0], rtol=0.15)


def test_bad_street_options_are_named():
    with pytest.raises(ValueError, match=r"split='val'; wanted one of 'train', 'validation', 'test'"):
        street_scans("val", scans=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scans=1, beams=0"):
        street_scans("train", scans=1, beams=0)


# --- SemanticKITTI ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kitti(tmp_path, golden):
    """A folder with the golden scan as 08/000000 and its first ten points as 08/000001."""
    z = golden("torchsparse/semantickitti_item")
    for part in ("velodyne", "labels"):
        (tmp_path / "sequences" / "08" / part).mkdir(parents=True)
    for number, rows in enumerate((slice(None), slice(10))):
        z["in/points"][rows].tofile(tmp_path / f"sequences/08/velodyne/{number:06d}.bin")
        z["in/raw_labels"][rows].tofile(tmp_path / f"sequences/08/labels/{number:06d}.label")
    return tmp_path, z


def sorted_rows(coordinates, *others):
    order = np.lexsort(coordinates.T[::-1])
    return coordinates[order], *(rows[order] for rows in others)


def test_validation_scans_are_those_of_spvnas(kitti):
    root, z = kitti
    source = semantic_kitti(root, "validation")
    assert (len(source), source.largest, list(source.classes)) == (2, 500, z.meta["config"]["class_names"])
    options = ScanOptions(voxel_size=z.meta["config"]["voxel_size"], spatial_shape=(512, 512, 64))
    batch = take(evaluation_batches(source, options), 1)[0]
    count = batch["count"][0]
    assert count == len(z["out/val/coords"])
    assert not batch["coordinates"][0, :, 0].any()
    rows = batch["coordinates"][0, :count, 1:], batch["features"][0, :count], batch["labels"][0, :count]
    for got, name in zip(sorted_rows(*rows), ("coords", "feats", "labels"), strict=True):
        np.testing.assert_array_equal(got, z[f"out/val/{name}"])
    np.testing.assert_array_equal(rows[0][batch["inverse"][0]], z["out/val/point_coords"])
    np.testing.assert_array_equal(batch["point_labels"][0], z["out/val/point_labels"])
    np.testing.assert_array_equal(batch["points"][0], z["in/points"])


def test_augmented_scans_are_those_of_spvnas(kitti):
    root, z = kitti
    record = semantic_kitti(root, "validation")[0]
    moved = turn_and_scale(record["points"], float(z["in/theta"]), float(z["in/scale"]))
    voxels = voxelize(moved, z.meta["config"]["voxel_size"], rule="round")
    np.testing.assert_array_equal(voxels.coordinates[voxels.inverse], z["out/train/point_coords"])
    np.testing.assert_array_equal(voxels.inverse, z["out/train/inverse"])  # before the subset
    rows = {tuple(cell): row for row, cell in enumerate(voxels.coordinates.tolist())}
    chosen = [rows[tuple(cell)] for cell in z["out/train/coords"].tolist()]
    # float64 rounded to float32 on both sides.
    np.testing.assert_allclose(voxels.features[chosen], z["out/train/feats"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(record["labels"][voxels.first][chosen], z["out/train/labels"])


def test_label_maps(golden):
    spvnas, benchmark = semantic_kitti_label_map("spvnas"), semantic_kitti_label_map("benchmark")
    np.testing.assert_array_equal(spvnas == -1, benchmark == -1)
    assert (spvnas >= 0).sum() == 34  # labels that the data set defines
    want = golden("torchsparse/semantickitti_item")["out/label_map"]
    np.testing.assert_array_equal(spvnas[spvnas >= 0], want[spvnas >= 0])
    # The benchmark's own numbers are one higher; where the maps differ it has
    differing = {label: int(benchmark[label]) + 1 for label in np.flatnonzero(spvnas != benchmark)}
    assert differing == {13: 5, 16: 5, 60: 9, 256: 5, 257: 5}
    assert list(SEMANTIC_KITTI)[benchmark[60]] == "road"
    with pytest.raises(ValueError, match="label_map='official'; wanted 'spvnas' or 'benchmark'"):
        semantic_kitti_label_map("official")  # type: ignore[arg-type]


def test_the_test_split_has_no_labels(tmp_path):
    for sequence in range(11, 22):
        folder = tmp_path / "sequences" / str(sequence) / "velodyne"
        folder.mkdir(parents=True)
        np.full((3, 4), sequence, np.float32).tofile(folder / "000000.bin")
    source = semantic_kitti(tmp_path, "test")
    assert len(source) == 11
    assert [record["points"][0, 0] for record in map(source.__getitem__, range(11))] == list(range(11, 22))
    assert (source[0]["labels"] == IGNORE).all()


def cut_scan(root):
    path = root / "sequences/08/velodyne/000001.bin"
    path.write_bytes(path.read_bytes()[:-3])


def cut_labels(root):
    path = root / "sequences/08/labels/000001.label"
    path.write_bytes(path.read_bytes()[:-4])


def undefined_label(root):
    np.full(10, 7, np.uint32).tofile(root / "sequences/08/labels/000001.label")


def beyond_labels(root):
    np.full(10, 4000, np.uint32).tofile(root / "sequences/08/labels/000001.label")


def no_number(root):
    np.full((10, 4), np.nan, np.float32).tofile(root / "sequences/08/velodyne/000001.bin")


def empty_scan(root):
    (root / "sequences/08/velodyne/000001.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_scan, r"velodyne/000001.bin has 157 bytes; wanted a multiple of 16, a point being 4 float32"),
        (cut_labels, r"labels/000001.label has 36 bytes, 9 labels, and .*000001.bin has 10 points; wanted 40 bytes"),
        (undefined_label, r"000001.label has the labels \[7\], which the data set does not define"),
        (beyond_labels, r"000001.label has the labels \[4000\]"),
        (no_number, r"000001.bin: row 0 is \[nan, nan, nan, nan\]; wanted points with finite coordinates"),
        (empty_scan, r"000001.bin: it is empty"),
    ],
)
def test_damaged_files_are_named(kitti, damage, message):
    root, _ = kitti
    damage(root)
    source = semantic_kitti(root, "validation")
    with pytest.raises(ValueError, match=message):
        source[1]
    assert len(source[0]["points"]) == 500


def test_missing_files_are_named(kitti):
    root, _ = kitti
    with pytest.raises(FileNotFoundError, match=r"sequences/00/velodyne is not a folder; wanted .* correct the root"):
        semantic_kitti(root, "train")
    (root / "sequences/08/labels/000001.label").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 scans have no labels, first .*08/labels/000001.label"):
        semantic_kitti(root, "validation")
    (root / "sequences/08/labels/000000.label").unlink()
    with pytest.raises(FileNotFoundError, match=r"08/labels holds no .label files"):
        semantic_kitti(root, "validation")


# --- nuScenes ---------------------------------------------------------------------------------------------------------


def write_scan(folder, name, points, labels):
    """Files of both formats; the label file has the name that nuScenes gives it."""
    scan, label = folder / f"samples/LIDAR_TOP/{name}.pcd.bin", folder / f"lidarseg/v1.0-mini/{name}_lidarseg.bin"
    for path in (scan, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    points.astype(np.float32).tofile(scan)
    np.asarray(labels, np.uint8).tofile(label)
    return str(scan.relative_to(folder)), str(label.relative_to(folder))


@pytest.fixture
def tables(tmp_path):
    """Two scenes of v1.0-mini, one of them for validation; the second key frame of scene-0061 is listed first."""
    rows = {name: [] for name in ("scene", "sample", "sample_data", "lidarseg")}
    for scene in ("scene-0061", "scene-0103"):
        rows["scene"].append({"token": scene, "name": scene})
        for time in (2, 1):
            sample = f"{scene}-{time}"
            rows["sample"].append({"token": sample, "scene_token": scene})
            points = np.c_[np.full((3, 3), time), [[0], [255], [51]], np.ones((3, 1))]
            scan, label = write_scan(tmp_path, sample, points, [17, 24, 0])
            for token, file, key in ((sample, scan, True), (f"{sample}-sweep", "sweeps/LIDAR_TOP/x.pcd.bin", False)):
                rows["sample_data"].append(
                    {"token": token, "sample_token": sample, "filename": file, "is_key_frame": key, "timestamp": time}
                )
            camera = {"token": f"{sample}-camera", "filename": "samples/CAM_FRONT/x.jpg"}
            rows["sample_data"].append(rows["sample_data"][-2] | camera)
            rows["lidarseg"].append({"token": sample, "sample_data_token": sample, "filename": label})
    (tmp_path / "v1.0-mini").mkdir()
    for name, values in rows.items():
        (tmp_path / "v1.0-mini" / f"{name}.json").write_text(json.dumps(values))
    return tmp_path


def test_nuscenes_tables_say_which_files_belong_together(tables):
    train, validation = nuscenes(tables, "mini_train"), nuscenes(tables, "mini_validation")
    assert (len(train), len(validation), train.largest) == (2, 2, 3)
    assert [train[i]["points"][0, 0] for i in range(2)] == [1, 2]  # in order of time
    np.testing.assert_allclose(train[0]["points"][:, 3], [0, 1, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(train[0]["labels"], [3, 10, IGNORE])
    assert [list(NUSCENES)[label] for label in (3, 10)] == ["car", "driveable surface"]


def test_nuscenes_errors(tables):
    with pytest.raises(FileNotFoundError, match=r"v1.0-trainval/scene.json is missing; .* use nuscenes_folder"):
        nuscenes(tables, "train")
    with pytest.raises(ValueError, match=r"split='val'; wanted one of 'train'"):
        nuscenes(tables, "val")  # type: ignore[arg-type]
    file = tables / "v1.0-mini" / "lidarseg.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:1]))
    with pytest.raises(ValueError, match=r"has no row in .*lidarseg.json; wanted one per key frame"):
        nuscenes(tables, "mini_train")
    (tables / "v1.0-mini" / "sample_data.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"name no LIDAR_TOP key frame of split 'mini_train'"):
        nuscenes(tables, "mini_train")


def test_nuscenes_validation_scenes(tmp_path):
    folder = tmp_path / "v1.0-trainval"
    folder.mkdir()
    names = [f"scene-{number:04d}" for number in range(1, 1111)]
    frames = [
        {"token": n, "sample_token": n, "filename": f"samples/LIDAR_TOP/{n}", "is_key_frame": True, "timestamp": 0}
        for n in names
    ]
    for table, rows in {
        "scene": [{"token": n, "name": n} for n in names],
        "sample": [{"token": n, "scene_token": n} for n in names],
        "sample_data": frames,
        "lidarseg": [{"sample_data_token": n, "filename": n} for n in names],
    }.items():
        (folder / f"{table}.json").write_text(json.dumps(rows))
    assert len(nuscenes(tmp_path, "validation")) == 150
    assert len(nuscenes(tmp_path, "train")) == 1110 - 150  # here also numbers that nuScenes does not use


def test_nuscenes_labels():
    # Official numbers of the benchmark's classes are one higher, and 0 is what does not count.
    official = [0, 0, 7, 7, 7, 0, 7, 0, 0, 1, 0, 0, 8, 0, 2, 3, 3, 4, 5, 0, 0, 6, 9, 10, 11, 12, 13, 14, 15, 0, 16, 0]
    np.testing.assert_array_equal(nuscenes_label_map(), [number - 1 if number else IGNORE for number in official])


def test_nuscenes_without_tables(tmp_path):
    for part, dtype in (("points", np.float32), ("labels", np.uint8)):
        (tmp_path / part).mkdir()
        for name in ("b", "a"):
            suffix = ".pcd.bin" if part == "points" else ".bin"
            np.full((4, 5) if part == "points" else 4, 14 + (name == "b"), dtype).tofile(
                tmp_path / part / (name + suffix)
            )
    source = nuscenes_folder(tmp_path)
    assert [(source[i]["points"].shape, source[i]["labels"][0]) for i in range(2)] == [((4, 4), 1), ((4, 4), 2)]
    (tmp_path / "labels/a.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"a.bin has 3 bytes, 3 labels, and .*a.pcd.bin has 4 points; wanted 4 bytes"):
        source[0]


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_capacities():
    assert capacity_ladder(80_000, 1) == (80_000,)
    assert capacity_ladder(80_000, 3) == (51_200, 64_000, 80_000)
    assert capacity_ladder(100, 3) == (128,)


def test_training_batches_hold_augmented_subsets():
    """Everything in a batch is found again in a scan that was turned and scaled as the features say."""
    options = dataclasses.replace(SMALL, scans_per_group=2)
    source = tiny_streets("train")
    batches = take(training_batches(source, options, batch_size=4, seed=3), 4)
    spec = batch_spec(options, 4)
    angles, seen_scans = [], []
    for batch in batches:
        assert batch.keys() == spec.keys()
        rows = batch["coordinates"].shape[1]
        assert rows in capacity_ladder(1200, 3)
        for name, value in batch.items():
            assert value.dtype == spec[name].dtype
            assert value.shape == tuple(rows if size == 1280 else size for size in spec[name].shape)
        for group in range(2):
            count = batch["count"][group]
            used, features = batch["coordinates"][group, :count], batch["features"][group, :count]
            check_voxels(features, used, options.spatial_shape, 2)
            assert not batch["coordinates"][group, count:].any()
            assert not batch["features"][group, count:].any()
            assert (batch["labels"][group, count:] == IGNORE).all()
            for scan in range(2):
                mine = used[:, 0] == scan
                assert mine.sum() == 600  # of about 1000
                intensities = {float(value): i for i in range(5) for value in source[i]["points"][:, 3]}
                (number,) = {intensities[float(value)] for value in features[mine, 3] if 0 < value < 1}
                record = source[number]
                rows_of = {float(v): row for row, v in enumerate(record["points"][:, 3])}
                inner = np.flatnonzero(mine & (features[:, 3] > 0) & (features[:, 3] < 1))
                original = np.array([rows_of[float(v)] for v in features[inner, 3]])
                np.testing.assert_array_equal(batch["labels"][group, inner], record["labels"][original])
                # The angle and scale of the first of them are those of all.
                before, after = record["points"][original, :2] @ [1, 1j], features[inner, :2] @ [1, 1j]
                ratio = after[0] / before[0]
                assert 0.95 <= abs(ratio) <= 1.05
                moved = turn_and_scale(record["points"], float(np.angle(ratio)), float(abs(ratio)))
                np.testing.assert_allclose(features[inner, :3], moved[original, :3], rtol=1e-3, atol=1e-3)
                angles.append(np.angle(ratio))
                seen_scans.append(number)
    assert np.ptp(angles) > 3
    assert sorted(seen_scans[:5]) == [0, 1, 2, 3, 4]  # an epoch


def test_streams_go_on_and_are_shared_out():
    source = tiny_streets("train")
    options = dataclasses.replace(SMALL, max_voxels=5000)  # of which scans need about 1000
    stream = training_batches(source, options, batch_size=4, seed=5)
    with contextlib.closing(stream):
        next(stream)
        state = json.loads(json.dumps(stream.get_state()))
        later = next(stream)
    resumed = training_batches(source, options, batch_size=4, seed=5)
    resumed.set_state(state)
    again = take(resumed, 1)[0]
    for name, value in later.items():
        np.testing.assert_array_equal(again[name], value)
    parts = []
    for process in range(2):
        shared = training_batches(source, options, batch_size=4, seed=5, process_index=process, process_count=2)
        shared.set_state(state)
        parts += take(shared, 1)
    # Processes agree on the largest capacity; up to padding they have the global batch's halves.
    assert {part["features"].shape for part in parts} == {(2, 5120, 4)}
    assert later["features"].shape == (4, 3200, 4)
    for name, value in later.items():
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined[:, : value.shape[1]] if value.ndim > 1 else joined, value)


def test_evaluation_covers_every_point_once():
    source = tiny_streets("test")
    options = dataclasses.replace(SMALL, scans_per_group=2, max_voxels=10)
    batches = take(evaluation_batches(source, options, batch_size=4), 10)
    assert len(batches) == 2
    points = np.concatenate([b["points"][g][b["inverse"][g] >= 0] for b in batches for g in range(2)])
    np.testing.assert_array_equal(points[: sum(len(source[i]["points"]) for i in range(5))], _all(source, "points"))
    labels = np.concatenate([b["point_labels"][b["point_labels"] != IGNORE] for b in batches])
    np.testing.assert_array_equal(labels, _all(source, "labels"))  # the three scans that fill up do not count
    for batch in batches:
        assert batch["coordinates"].shape[1] in capacity_ladder(2 * source.largest, 3)
        for group in range(2):
            inverse, count = batch["inverse"][group], batch["count"][group]
            used = inverse >= 0
            assert used[: used.sum()].all()
            assert set(inverse[used].tolist()) == set(range(count))  # every voxel, and no padding
            cells = batch["coordinates"][group][inverse[used], 1:]
            offset = cells - np.round(batch["points"][group, used, :3] / np.float32(0.5)).astype(int)
            for scan in range(2):  # each starts at its own minimum
                of_scan = batch["coordinates"][group][inverse[used], 0] == scan
                assert (offset[of_scan] == offset[of_scan][0]).all()
    x = SparseTensor.create(
        batches[0]["features"][0], batches[0]["coordinates"][0], batches[0]["count"][0], options.spatial_shape, 2
    )
    found = x.sites.find(batches[0]["coordinates"][0][:50])
    np.testing.assert_array_equal(found, np.arange(50))


def _all(source, name):
    return np.concatenate([source[i][name] for i in range(len(source))])


def test_too_small_capacities_and_grids_are_named():
    source = tiny_streets("train")
    small = dataclasses.replace(SMALL, capacity=256)
    with pytest.raises(CapacityError, match=r"voxels in all, and the capacity is 256; wanted at least \d+") as error:
        take(evaluation_batches(source, small), 1)
    assert error.value.needed == len(voxelize(source[0]["points"], 0.5, rule="round").first)
    flat = dataclasses.replace(SMALL, spatial_shape=(400, 400, 4))
    with pytest.raises(SparseError, match=r"spatial_shape=\(400, 400, 4\); wanted at least as many"):
        take(training_batches(source, flat, batch_size=1, seed=0), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voxel_size": 0.0}, "voxel_size=0.0; wanted metres above 0"),
        ({"spatial_shape": (4, 4)}, "wanted three sizes"),
        ({"max_voxels": 0}, "max_voxels=0"),
        ({"capacity": -1}, "capacity=-1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ScanOptions(**options)


def test_bad_batch_sizes_are_named():
    source, options = tiny_streets("train"), ScanOptions(scans_per_group=2)
    with pytest.raises(
        ValueError, match="batch_size=6 is not a positive multiple of scans_per_group=2 x 2 processes; use 8"
    ):
        training_batches(source, options, batch_size=6, seed=0, process_index=0, process_count=2)
    with pytest.raises(ValueError, match="batch_size=3 is not a positive multiple of scans_per_group=2"):
        evaluation_batches(source, options, batch_size=3)
