"""nuScenes from its tables to a trained detector, on a tiny release in its own format, written here."""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import train as train_program
from lumen.evaluation.detection import Scan, inside_box
from lumen.evaluation.nuscenes import CLASSES, nuscenes_metrics
from lumen.training.config import ConfigError
from lumen.training.detection import DetectionData, DetectionOptions, make_task
from lumen.training.nuscenes import (
    Objects,
    class_balanced,
    nuscenes_objects,
    overlapping,
    paste,
    training_objects,
    write_objects,
)

ROOT = pathlib.Path(__file__).parents[2]
# The LiDAR is turned by a quarter, as nuScenes' is, tilted, and stands above the vehicle's origin.
MOUNT = {"translation": [0.9, 0.0, 1.8], "rotation": [0.7068, 0.01, 0.005, -0.7072]}
SPEED = 4.0  # metres per second, of the moving car


def turn(quaternion, vector):
    """q v q*, of quaternions (w, x, y, z): not by way of a matrix."""
    w, *axis = np.array(quaternion) / np.linalg.norm(quaternion)
    axis = np.array(axis)
    return vector + 2 * np.cross(axis, np.cross(axis, vector) + w * vector)


def inverse(quaternion):
    return [quaternion[0], *(-np.array(quaternion[1:]))]


def vehicle_pose(scene, time):
    """Where the vehicle is at a time, in seconds: it drives a bend over bumpy ground."""
    yaw, pitch = 0.5 * scene + 0.2 * time, 0.02 * math.sin(5 * time)
    ahead, bump = (math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)), (math.cos(pitch / 2), 0, math.sin(pitch / 2), 0)
    w = ahead[0] * bump[0]
    return {
        "translation": [600 + 100 * scene + 3 * time, 1500 - 2 * time, 0.0],
        "rotation": [w, -ahead[3] * bump[2], ahead[0] * bump[2], ahead[3] * bump[0]],
    }


def to_sensor(point, pose):
    return turn(inverse(MOUNT["rotation"]), turn(inverse(pose["rotation"]), point - np.array(pose["translation"]))
                - np.array(MOUNT["translation"]))  # fmt: skip


def to_global(point, pose):
    return turn(pose["rotation"], turn(MOUNT["rotation"], point) + np.array(MOUNT["translation"])) + np.array(
        pose["translation"]
    )


# Places relative to where the vehicle starts, sizes (width, length, height), headings, and whether it moves.
OBJECTS = {
    "vehicle.car": ((5.0, 3.0, 0.9), (1.8, 4.2, 1.6), 0.4, True),
    "vehicle.bus.rigid": ((-5.0, 4.0, 1.5), (2.0, 4.0, 2.5), 1.2, False),
    "human.pedestrian.adult": ((1.0, -4.0, 0.9), (0.7, 0.8, 1.8), -2.0, False),
    "vehicle.bicycle": ((4.0, -5.0, 0.6), (0.6, 1.7, 1.2), 0.0, False),
    "static_object.bicycle_rack": ((4.0, -5.0, 0.6), (1.5, 3.0, 1.5), 0.0, False),
    "animal": ((-2.0, -5.0, 0.4), (0.4, 0.9, 0.7), 0.0, False),
}
BUS_SCENES = ("scene-0061",)


def write_release(root):
    """v1.0-mini of three scenes, one for validation, of three key frames every half second, with a sweep before each
    but the first; buses in the first scene only. The second pedestrian of a scene has no LiDAR point, the bus of the
    last key frame no other annotation."""
    tables = {
        name: []
        for name in (
            *("scene", "sample", "sample_data", "sample_annotation", "instance", "category", "attribute", "sensor"),
            *("calibrated_sensor", "ego_pose"),
        )
    }
    for name in OBJECTS:
        tables["category"].append({"token": f"category-{name}", "name": name, "description": ""})
    for name in ("vehicle.moving", "vehicle.stopped", "pedestrian.standing"):
        tables["attribute"].append({"token": f"attribute-{name}", "name": name, "description": ""})
    for channel in ("CAM_FRONT", "LIDAR_TOP"):
        tables["sensor"].append({"token": channel, "channel": channel, "modality": channel[:3].lower()})
        tables["calibrated_sensor"].append(
            {"token": f"mounted-{channel}", "sensor_token": channel, **MOUNT, "camera_intrinsic": []}
        )
    for number, scene in enumerate(("scene-0061", "scene-0103", "scene-0553")):
        rng = np.random.default_rng(number)
        tables["scene"].append({"token": f"s{number}", "name": scene, "nbr_samples": 3})
        start = np.array(vehicle_pose(number, 0)["translation"])
        present = [name for name in OBJECTS if name != "vehicle.bus.rigid" or scene in BUS_SCENES]
        spread = {name: rng.uniform(-0.5, 0.5, (80, 3)) * 0.98 for name in present}
        away, around = rng.uniform(6, 12, 400), rng.uniform(0, 2 * np.pi, 400)
        ground = start + np.c_[away * np.cos(around), away * np.sin(around), np.zeros(400)]
        for frame in range(5):
            time = frame / 4
            key = frame % 2 == 0
            sample = f"sample-{number}-{(frame + 1) // 2}"
            pose = vehicle_pose(number, time)
            stamp = 1_500_000_000_000_000 + round(1e6 * time) + number
            tables["ego_pose"].append({"token": f"pose-{number}-{frame}", "timestamp": stamp, **pose})
            points = [ground]
            for name in present:
                place, (width, length, height), heading, moves = OBJECTS[name]
                centre = start + place + [SPEED * time * moves, 0, 0]
                local = spread[name] * [length, width, height]
                cos, sin = math.cos(heading), math.sin(heading)
                along, across, up = local.T
                points.append(centre + np.c_[along * cos - across * sin, along * sin + across * cos, up])
                if key:
                    size = (width, length, height)
                    write_annotations(tables, name, number, frame // 2, sample, centre, size, heading)
            seen = np.array([to_sensor(point, pose) for point in np.concatenate(points)])
            seen = np.concatenate([seen, [[0.5, -0.9, 0.1], [0.3, 1.1, 0.2]]])  # of the vehicle, and just beyond it
            file = f"{'samples' if key else 'sweeps'}/LIDAR_TOP/{number}-{frame}.pcd.bin"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            np.c_[seen, np.full(len(seen), 100.0 + frame), np.zeros(len(seen))].astype(np.float32).tofile(root / file)
            row = {
                "token": f"data-{number}-{frame}",
                "sample_token": sample,
                "ego_pose_token": f"pose-{number}-{frame}",
                "calibrated_sensor_token": "mounted-LIDAR_TOP",
                "timestamp": stamp,
                "is_key_frame": key,
                "filename": file,
                "prev": f"data-{number}-{frame - 1}" if frame else "",
                "next": f"data-{number}-{frame + 1}" if frame < 4 else "",
            }
            camera = {"token": f"camera-{number}-{frame}", "calibrated_sensor_token": "mounted-CAM_FRONT", "prev": ""}
            tables["sample_data"] += [row | camera | {"filename": "samples/CAM_FRONT/x.jpg", "next": ""}, row]
            if key:
                tables["sample"].append({"token": sample, "scene_token": f"s{number}", "timestamp": stamp})
    rng = np.random.default_rng(9)
    for rows in tables.values():  # nothing may rest on their order
        rng.shuffle(rows)
    (root / "v1.0-mini").mkdir(parents=True)
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))


def write_annotations(tables, name, scene, key, sample, centre, size, heading):
    """The annotation of an object at a key frame."""

    def token(k):
        return f"box-{scene}-{name}-{k}" if 0 <= k < 3 else ""

    alone = name == "vehicle.bus.rigid" and key == 2
    attribute = {"vehicle.car": "vehicle.moving", "human.pedestrian.adult": "pedestrian.standing"}.get(name)
    row = {
        "token": token(key),
        "sample_token": sample,
        "instance_token": f"instance-{scene}-{name}",
        "attribute_tokens": [f"attribute-{attribute}"] if attribute else [],
        "translation": centre.tolist(),
        "size": list(size),
        "rotation": [math.cos(heading / 2), 0.0, 0.0, math.sin(heading / 2)],
        "prev": "" if alone else token(key - 1),
        "next": "" if alone or (name == "vehicle.bus.rigid" and key == 1) else token(key + 1),
        "num_lidar_pts": 80,
        "num_radar_pts": 0,
    }
    if key == 0:
        tables["instance"].append({"token": row["instance_token"], "category_token": f"category-{name}"})
    tables["sample_annotation"].append(row)
    if name == "human.pedestrian.adult":
        hidden = {"token": token(key) + "-hidden", "prev": "", "next": "", "num_lidar_pts": 0, "num_radar_pts": key}
        tables["sample_annotation"].append(row | hidden)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("nuscenes")
    write_release(root)
    return root


@pytest.fixture(scope="module")
def train(release):
    return nuscenes_objects(release, "train", version="v1.0-mini")


@pytest.fixture(scope="module")
def validation(release):
    return nuscenes_objects(release, "validation", version="v1.0-mini")


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_splits_and_order(train, validation):
    assert train.tokens == [f"sample-{scene}-{key}" for scene in (0, 2) for key in range(3)]
    assert validation.tokens == [f"sample-1-{key}" for key in range(3)]


def test_sweeps_are_moved_into_the_key_frame(train, release):
    """The world stands still but for the car: in the global frame, every sweep sees it where it is."""
    record = train[2]
    points, pose = record["points"], vehicle_pose(0, 1.0)
    assert points.dtype == np.float32
    ages = np.unique(points[:, 4])
    # Ages are differences of two times of 1.5e9 s in float64, which are known to 2**-22 s.
    np.testing.assert_allclose(ages, [0, 0.25, 0.5, 0.75, 1.0], atol=1e-6)
    np.testing.assert_array_equal(np.unique(points[:, 3]), [100, 101, 102, 103, 104])
    assert points[0, 4] == 0
    assert (np.diff(points[:, 4]) >= 0).all()  # latest first
    counts = [np.count_nonzero(points[:, 4] == age) for age in ages]
    # Of each sweep one point within 1 m along both axes goes, the key frame keeps both.
    assert counts == [counts[1] + 1] + [counts[1]] * 4
    per_frame = [points[points[:, 4] == age][: 400 + 80] for age in ages]
    world = [np.array([to_global(point.astype(float), pose) for point in frame[:, :3]]) for frame in per_frame]
    for frame, age in zip(world[1:], (0.25, 0.5, 0.75, 1.0), strict=True):
        # Float32 coordinates of up to 20 m, written once and rounded once after the move: 2 * 20 * 2**-24 each.
        np.testing.assert_allclose(frame[:400], world[0][:400], atol=1e-5)
        np.testing.assert_allclose(frame[400:, 0], world[0][400:, 0] - SPEED * age, atol=1e-5)
    assert len(nuscenes_objects(release, "train", version="v1.0-mini", sweeps=2)[2]["points"]) == counts[0] + counts[1]
    assert len(np.unique(train[0]["points"][:, 4])) == 1  # nothing is before the first key frame


def test_boxes_in_the_frame_of_the_sensor(train):
    record, pose = train[1], vehicle_pose(0, 0.5)
    boxes = dict(zip(record["names"].tolist(), record["boxes"], strict=True))
    # The pedestrian without a LiDAR point is left out; what is none of the ten classes keeps its category.
    assert sorted(record["names"]) == [
        "animal", "bicycle", "bus", "car", "pedestrian", "static_object.bicycle_rack"
    ]  # fmt: skip
    start = np.array(vehicle_pose(0, 0)["translation"])
    car, (place, (width, length, height), heading, _) = boxes["car"], OBJECTS["vehicle.car"]
    centre = start + place + [SPEED * 0.5, 0, 0]
    # Float32 of numbers up to 10 and angles up to pi.
    np.testing.assert_allclose(car[:3], to_sensor(centre, pose), atol=1e-5)
    np.testing.assert_allclose(car[3:6], [length, width, height], rtol=1e-6)
    step = np.array([math.cos(heading), math.sin(heading), 0])
    ahead = to_sensor(centre + step, pose) - to_sensor(centre, pose)
    assert car[6] == pytest.approx(math.atan2(ahead[1], ahead[0]), abs=1e-5)
    velocity = to_sensor(centre + np.array([SPEED, 0, 0]), pose) - to_sensor(centre, pose)
    np.testing.assert_allclose(car[7:], velocity[:2], atol=1e-4)
    # Its points of the key frame are in the box, which is a little tilted against them.
    now = record["points"][record["points"][:, 4] == 0][400:480]
    assert inside_box(now, car + np.float32([0, 0, 0, 0.2, 0.2, 0.3, 0, 0, 0])).all()
    assert len(train[3]["names"]) == 5  # the other scene has no bus


def test_velocities(train, validation):
    def of(record, name):
        return record["boxes"][record["names"] == name][0, 7:]

    for key in range(3):  # both sides, or one where there is only one
        assert math.hypot(*of(validation[key], "car")) == pytest.approx(SPEED, rel=1e-3)
        np.testing.assert_allclose(of(validation[key], "pedestrian"), 0, atol=1e-6)
    assert np.isnan(of(train[2], "bus")).all()


def test_velocities_across_gaps(release, tmp_path):
    """Up to 1.5 s between two annotations, and 3 s between those before and after, tell a velocity."""
    shutil.copytree(release, tmp_path / "copy")
    file = tmp_path / "copy/v1.0-mini/sample.json"
    rows = json.loads(file.read_text())
    for row in rows:
        if row["token"] == "sample-0-2":
            row["timestamp"] += 1_500_000
    file.write_text(json.dumps(rows))
    source = nuscenes_objects(tmp_path / "copy", "train", version="v1.0-mini", sweeps=1)
    speeds = [np.hypot(*source[i]["boxes"][source[i]["names"] == "car"][0, 7:]) for i in range(3)]
    assert speeds[0] == pytest.approx(SPEED, rel=1e-3)
    assert speeds[1] == pytest.approx(SPEED * 1.0 / 2.5, rel=1e-3)
    assert np.isnan(speeds[2])


def edited(release, folder, table, change):
    """A copy of the release, but for a table whose rows went through `change`."""
    shutil.copytree(release, folder)
    file = folder / "v1.0-mini" / f"{table}.json"
    rows = change(json.loads(file.read_text()))
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return functools.partial(nuscenes_objects, folder, "train", version="v1.0-mini")


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("ego_pose", lambda rows: rows[1:], r"sample_data.json of .* names the token 'pose-.*', which ego_pose.json"),
        ("instance", lambda rows: rows[:-9], r"sample_annotation.json of .*'instance-.*', which instance.json"),
        ("sample_data", lambda rows: [r for r in rows if r["token"] != "data-0-1"], r"names the token 'data-0-1'"),
        ("sample_data", lambda rows: [r for r in rows if r["token"] != "data-2-4"], r"'sample-2-2' has no LIDAR_TOP"),
        ("scene", lambda rows: json.dumps(rows)[:-5], r"scene.json is no table with the fields token, name .*cut off"),
        ("sample", lambda rows: [{"token": "x"}], r"sample.json is no table with the fields token, scene_token"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit(release, tmp_path, table, change, message):
    with pytest.raises(ValueError, match=message):
        edited(release, tmp_path / "copy", table, change)()


@pytest.fixture(scope="module")
def unannotated(release, tmp_path_factory):
    """The release as v1.0-test: with all tables, but no rows of what is annotated."""
    root = tmp_path_factory.mktemp("test") / "nuscenes"
    shutil.copytree(release, root)
    (root / "v1.0-mini").rename(root / "v1.0-test")
    for table in ("sample_annotation", "instance"):
        (root / "v1.0-test" / f"{table}.json").write_text("[]")
    return root


def test_the_test_split(unannotated, release, train):
    source = nuscenes_objects(unannotated, "test", version="v1.0-test")
    assert source.tokens == [f"sample-{scene}-{key}" for scene in range(3) for key in range(3)]
    record = source[2]
    assert (record["boxes"].shape, record["names"].shape) == ((0, 9), (0,))
    np.testing.assert_array_equal(record["points"], train[2]["points"])
    for root, split, version in (
        (unannotated, "train", "v1.0-test"),
        (unannotated, "validation", "v1.0-test"),
        (release, "test", "v1.0-mini"),
    ):
        with pytest.raises(ValueError, match=rf"version='{version}' has no split '{split}'; wanted 'test' of v1.0-t"):
            nuscenes_objects(root, split, version=version)


def test_missing_and_damaged_files(release, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"v1.0-trainval/scene.json is missing; .* Unpack its metadata archive"):
        nuscenes_objects(release, "train")
    with pytest.raises(ValueError, match=r"sweeps=0; wanted at least 1"):
        nuscenes_objects(release, "train", version="v1.0-mini", sweeps=0)
    source = edited(release, tmp_path / "copy", "attribute", lambda rows: rows)()
    file = tmp_path / "copy/sweeps/LIDAR_TOP/0-1.pcd.bin"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"0-1.pcd.bin has \d+ bytes; wanted a multiple of 20"):
        source[1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"0-1.pcd.bin is missing, which the tables of v1.0-mini name"):
        source[2]
    source[0]  # needs no sweep
    with pytest.raises(IndexError, match="record 6 of 6"):
        source[6]
    for scene in ("scene-0061", "scene-0553"):
        file = tmp_path / "copy/v1.0-mini/scene.json"
        file.write_text(file.read_text().replace(scene, "scene-0916"))
    with pytest.raises(FileNotFoundError, match=r"name no sample of split 'train'"):
        nuscenes_objects(tmp_path / "copy", "train", version="v1.0-mini")


# --- For the metric ---------------------------------------------------------------------------------------------------


def found_as_there(record, classes) -> Scan:
    """The boxes of a record as a perfect detector gives them, each with a score of its own."""
    own = np.isin(record["names"], classes)
    numbers = np.array([classes.index(name) for name in record["names"][own]])
    scores = np.linspace(0.5, 0.9, own.sum(), dtype=np.float32)
    return Scan(record["boxes"][own], scores, numbers, np.zeros((0, 9)), np.zeros(0))


def test_what_is_there_when_found_is_perfect(validation):
    """Boxes of the sensor's frame go through the metric's global frame."""
    classes = ("pedestrian", "bus", "car", "bicycle")
    found = [found_as_there(validation[index], classes) for index in range(3)]
    samples = [validation.sample(index, one, classes) for index, one in enumerate(found)]
    one = samples[1]
    start = np.array(vehicle_pose(1, 0)["translation"])
    car = one.scan.true_boxes[one.scan.true_classes == CLASSES.index("car")][0]
    np.testing.assert_allclose(car, [*(start + np.array([7, 3, 0.9])), 4.2, 1.8, 1.6, 0.4, SPEED, 0], atol=1e-6)
    np.testing.assert_allclose(one.vehicle, vehicle_pose(1, 0.5)["translation"][:2])
    np.testing.assert_allclose(one.racks[0, :3], start + np.array([4, -5, 0.6]))
    # One radar point is enough here; the bicycle stands in the rack.
    names = [CLASSES[number] for number in one.scan.true_classes]
    assert sorted(names) == ["bicycle", "car", "pedestrian", "pedestrian"]
    assert one.true_attributes[names.index("car")] == "vehicle.moving"
    assert sorted(one.attributes) == ["cycle.without_rider", "pedestrian.standing", "vehicle.moving"]
    metrics = nuscenes_metrics(samples)
    assert metrics["ap"]["car"] == pytest.approx(1)
    assert metrics["ap"]["bicycle"] == metrics["ap"]["bus"] == 0
    errors = metrics["errors"]["car"]
    # Float32 boxes, whose headings lie in the tilted sensor's plane: its tilt squared, 0.02**2, is lost of a length.
    assert errors["translation"] < 1e-5
    assert errors["scale"] < 1e-5
    assert errors["orientation"] < 1e-3
    assert errors["velocity"] < SPEED * 1e-3
    assert errors["attribute"] == 0
    # Three of the five pedestrians with a point are found; the two others stand in the same places.
    assert metrics["ap"]["pedestrian"] == pytest.approx((50 * 0.9) / 90 / 0.9)
    flat = found[0]._replace(boxes=found[0].boxes[:, :7])
    assert validation.sample(0, flat, classes).scan.boxes.shape[1] == 9
    with pytest.raises(ValueError, match=r"the model has the classes pole; wanted some of car, .*Set model.groups"):
        validation.sample(0, found[0], ("car", "pole"))


def test_results_are_of_the_global_frame(validation, release, tmp_path, caplog):
    """What is there, given as found in the sensor's frame, is in the file where the tables have it."""
    classes = ("pedestrian", "bus", "car", "bicycle")
    found = [found_as_there(validation[index], classes) for index in range(3)]
    data = DetectionData("nuscenes", str(release), "v1.0-mini")
    metrics = data.metrics(validation, found, classes, tmp_path / "eval")
    assert metrics["ap"]["car"] == pytest.approx(1)
    results = json.loads((tmp_path / "eval/nuscenes_results.json").read_text())["results"]
    assert list(results) == validation.tokens
    table = json.loads((release / "v1.0-mini/sample_annotation.json").read_text())
    names = {"vehicle.car": "car", "human.pedestrian.adult": "pedestrian", "vehicle.bicycle": "bicycle"}
    attributes = {"car": "vehicle.moving", "pedestrian": "pedestrian.standing", "bicycle": "cycle.without_rider"}
    for index, (token, rows) in enumerate(results.items()):
        there = {
            name: row
            for row in table
            if row["sample_token"] == token
            and row["num_lidar_pts"]
            and (name := names.get(row["instance_token"].split("-")[2]))
        }
        assert sorted(row["detection_name"] for row in rows) == sorted(there)
        scores = dict(zip(found[index].classes.tolist(), found[index].scores.tolist(), strict=True))
        for row in rows:
            name = row["detection_name"]
            want = there[name]
            # Float32 boxes of up to 10 m.
            np.testing.assert_allclose(row["translation"], want["translation"], atol=1e-5)
            np.testing.assert_allclose(row["size"], want["size"], rtol=1e-6)
            # As above, of a heading in the tilted sensor's plane its tilt squared is lost.
            ahead, wanted = (turn(one["rotation"], np.array([1.0, 0, 0])) for one in (row, want))
            np.testing.assert_allclose(ahead, wanted, atol=1e-3)
            speed = SPEED if name == "car" else 0
            np.testing.assert_allclose(row["velocity"], [speed, 0], atol=SPEED * 1e-3)
            assert row["attribute_name"] == attributes[name]
            assert row["detection_score"] == scores[classes.index(name)]
    assert not caplog.records
    (tmp_path / "part").mkdir()
    data.metrics(validation, found[:2], classes, tmp_path / "part")
    assert [entry.name for entry in (tmp_path / "part").iterdir()] == ["nuscenes.md"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "nuscenes: 2 of 3 scans were run; nuscenes_results.json, which is of all, is not written. Set "
        "config.detection.evaluation_scans=0."
    ]


# --- Augmentation -----------------------------------------------------------------------------------------------------


def test_class_balance(train):
    classes = ("car", "bus", "trailer")
    source = class_balanced(train, classes, seed=0)
    # Cars are in 6 scans, buses in 3: of 9 in all, half each, rounded down.
    assert len(source) == 8
    assert (source.places[4:] < 3).all()
    assert (class_balanced(train, classes, seed=0).places == source.places).all()
    assert any((class_balanced(train, classes, seed=s).places != source.places).any() for s in range(1, 4))
    np.testing.assert_array_equal(source[5]["points"], train[int(source.places[5])]["points"])
    with pytest.raises(ValueError, match="no scan has one of trailer"):
        class_balanced(train, ("trailer",), seed=0)


def test_overlap():
    rng = np.random.default_rng(0)
    boxes = np.c_[rng.uniform(-4, 4, (40, 2)), np.zeros(40), rng.uniform(0.3, 4, (40, 3)), rng.uniform(-4, 4, 40)]
    got = overlapping(boxes[:20], boxes[20:])
    grid = np.stack(np.meshgrid(*[np.linspace(-7, 7, 281)] * 2), -1).reshape(-1, 2)  # every 0.05 m
    points = np.c_[grid, np.zeros(len(grid))]
    covered = [np.array([inside_box(points, box + np.array([0, 0, 0, d, d, 0, 0])) for box in boxes]) for d in (0, 0.1)]
    shared, nearly = ((one[:20].astype(int) @ one[20:].T.astype(int)) > 0 for one in covered)
    assert got[shared].all()  # a common point of the grid
    assert not got[~nearly].any()  # none, even of boxes larger by the grid's step on every side
    assert 0.1 < got.mean() < 0.9


@pytest.fixture(scope="module")
def objects(train, tmp_path_factory):
    return training_objects(tmp_path_factory.mktemp("pasted") / "objects", train, ("bus", "car", "pedestrian"))


def test_objects_are_those_of_the_scans(train, objects):
    assert sorted(objects.names) == ["bus"] * 3 + ["car"] * 6 + ["pedestrian"] * 6
    first = int(np.flatnonzero(objects.names == "bus")[0])
    record = train[0]
    box = record["boxes"][record["names"] == "bus"][0]
    np.testing.assert_array_equal(objects.boxes[first], box)
    # Moved to the centre and back in float32: numbers of up to 8 m.
    np.testing.assert_allclose(objects.points(first), record["points"][inside_box(record["points"], box)], atol=1e-6)
    copied = pickle.loads(pickle.dumps(objects))
    assert len(pickle.dumps(objects)) < 500
    np.testing.assert_array_equal(copied.points(first), objects.points(first))


def test_objects_are_written_once_and_whole(train, tmp_path, monkeypatch):
    folder = tmp_path / "objects"
    training_objects(folder, train, ("car",), per_class=2)
    assert len(Objects(folder).names) == 2
    before = (folder / "points.bin").stat().st_mtime_ns
    training_objects(folder, train, ("car",), per_class=2)
    write_objects(folder, train, ("car",))  # another process that was slower
    assert (folder / "points.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"were made of .*'per_class': 2.*; wanted .*'per_class': 20000.* remove this"):
        training_objects(folder, train, ("car",))
    (folder / "points.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be read .*Remove the folder: it will be made again"):
        Objects(folder)
    broken = copy.copy(train)
    monkeypatch.setattr(broken, "_root", tmp_path)
    with pytest.raises(FileNotFoundError, match="LIDAR_TOP"):
        write_objects(tmp_path / "other", broken, ("car",))
    with pytest.raises(ValueError, match="no object of trailer has 5 points"):
        write_objects(tmp_path / "other", train, ("car", "trailer")[1:])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["objects"]


def test_pasted_objects(train, objects):
    wanted = {"bus": 1, "car": 1, "pedestrian": 2}
    record = train[3]  # of the scene without a bus
    kinds = set()
    for seed in range(8):
        result = paste(record, np.random.default_rng(seed), objects=objects, wanted=wanted)
        again = paste(record, np.random.default_rng(seed), objects=objects, wanted=wanted)
        np.testing.assert_array_equal(result["points"], again["points"])
        old = len(record["boxes"])
        added, names = result["boxes"][old:], result["names"][old:]
        np.testing.assert_array_equal(result["boxes"][:old], record["boxes"])
        assert np.count_nonzero(result["names"] == "car") == 1  # there is one already
        assert result["points"].dtype == result["boxes"].dtype == np.float32
        assert not overlapping(added, record["boxes"]).any()
        assert np.array_equal(overlapping(added, added), np.eye(len(added), dtype=bool))
        for box, name in zip(added, names, strict=True):
            place = np.flatnonzero((objects.boxes[:, :7] == box[:7]).all(1))[0]
            assert objects.names[place] == name
            inside = inside_box(result["points"], box + np.float32([0, 0, 0, 1e-5, 1e-5, 1e-5, 0, 0, 0]))
            assert np.count_nonzero(inside) == len(objects.points(place))  # its own ones, and none of the scan's
            kinds.add(str(name))
        covered = sum(np.count_nonzero(inside_box(record["points"], box)) for box in added)
        new = sum(len(objects.points(np.flatnonzero((objects.boxes[:, :7] == b[:7]).all(1))[0])) for b in added)
        assert len(result["points"]) == len(record["points"]) - covered + new
    assert "bus" in kinds
    unchanged = paste(record, np.random.default_rng(0), objects=objects, wanted={"car": 1, "trailer": 3})
    np.testing.assert_array_equal(unchanged["points"], record["points"])


# --- A run ------------------------------------------------------------------------------------------------------------


def options(release, **data):
    """A toy's options on the release."""
    model = {"size": "debug", "groups": (("car",), ("bus", "pedestrian")), "voxels": 256}
    data = {"balanced": True, "pasted": {"bus": 2, "pedestrian": 3}, **data}
    return DetectionOptions(
        model=model, data=DetectionData("nuscenes", str(release), "v1.0-mini", **data), scans_per_group=2, boxes=8
    )


def test_batches_resume(release, tmp_path):
    """The batch that comes next depends on the seed and the place alone."""
    make = functools.partial(make_task, batch_size=2, total_steps=9, workdir=tmp_path)
    with contextlib.closing(make(options(release), seed=1).batches()) as batches:
        next(batches)
        state = batches.get_state()
        want = [next(batches) for _ in range(3)]
    for other, seed, same in (
        (options(release), 1, True),
        (options(release), 2, False),
        (options(release, pasted={}), 1, False),
    ):
        with contextlib.closing(make(other, seed=seed).batches()) as batches:
            batches.set_state(state | {"seed": seed})
            got = [next(batches) for _ in range(3)]
        equal = [
            all(np.array_equal(a[name], b[name], equal_nan=True) for name in a) for a, b in zip(want, got, strict=True)
        ]
        assert equal == [same] * 3
    assert len(list(tmp_path.iterdir())) == 1  # the objects, written once


def test_options_that_do_not_go_together(release, tmp_path):
    make = functools.partial(make_task, batch_size=2, seed=0, total_steps=1, workdir=tmp_path)
    with pytest.raises(ConfigError, match=r"detection.model has the classes building, pole, which nuScenes does not"):
        make(dataclasses.replace(options(release), model={"size": "debug"}))
    with pytest.raises(
        ConfigError, match=r"detection.data.pasted names trailer; wanted classes of the model: car, bus"
    ):
        make(options(release, pasted={"trailer": 2}))
    many = options(release).model | {"suppression": {"candidates": 400, "detections": 300}}
    with pytest.raises(ConfigError, match=r"up to 600 objects in a scan; nuScenes counts 500. Lower .*, which is 300"):
        make(dataclasses.replace(options(release), model=many))
    with pytest.raises(ValueError, match=r"balanced=True and pasted={} with name='street_scenes'; wanted name='nusc"):
        DetectionData(balanced=True)


def test_the_step_compiles_once(release, tmp_path):
    """After an update no array has a weak type: one that begins with it makes the second step another program."""
    task = make_task(options(release), batch_size=2, seed=0, total_steps=1, workdir=tmp_path)
    state = jax.tree.leaves_with_path(nnx.state(nnx.eval_shape(lambda: task.build(nnx.Rngs(0)))))
    assert [jax.tree_util.keystr(path) for path, leaf in state if getattr(leaf, "weak_type", False)] == []


def test_a_damaged_release_is_one_line(release, tmp_path, capsys):
    edited(release, tmp_path / "copy", "scene", lambda rows: json.dumps(rows)[:-5])
    flags = [f"--config.detection.data.path={tmp_path / 'copy'}", "--config.detection.data.version=v1.0-mini"]
    config = f"--config={ROOT / 'experiments/torchsparse/centerpoint_nuscenes.py'}"
    assert train_program.main([config, f"--workdir={tmp_path / 'run'}", "--config.batch_size=8", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: nuscenes: ")
    assert error.endswith("It is cut off, or of another release: unpack it again.")


def test_training_on_the_test_split_is_one_line(unannotated, tmp_path, capsys):
    flags = [f"--config.detection.data.path={unannotated}", "--config.detection.data.version=v1.0-test"]
    config = f"--config={ROOT / 'experiments/torchsparse/centerpoint_nuscenes.py'}"
    assert train_program.main([config, f"--workdir={tmp_path / 'run'}", "--config.batch_size=8", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: nuscenes: version='v1.0-test' has no split 'train'; wanted 'test' of v1.0-test")


def test_a_run_from_training_to_evaluation(release, unannotated, tmp_path, run_program):
    """A toy of CenterPoint, whose 256 voxels fit in one capacity only; then the scans without annotations."""
    (tmp_path / "experiment.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    config = ml_collections.ConfigDict(dict(task='detection', total_steps=3, batch_size=1, log_every=1))\n"
        "    config.optimizer = dict(schedule='one_cycle', warmup_steps=1, learning_rate=1e-3, beta1_at_peak=0.85)\n"
        "    config.detection = dict(\n"
        "        model=dict(size='debug', groups=(('car', 'bus', 'pedestrian', 'bicycle'),), voxels=256,\n"
        "            backbone=dict(level_fractions=(4.0, 3.0, 2.0, 2.0), residual=False),\n"
        "            bev=dict(layers=(1,), strides=(1,), widths=(8,), upsample_strides=(1,), upsample_widths=(8,))),\n"
        f"        data=dict(name='nuscenes', path='{release}', version='v1.0-mini', balanced=True,\n"
        "            pasted=dict(bus=2, pedestrian=3)),\n"
        "        boxes=8)\n"
        "    return config\n"
    )
    for script in ("train.py", "evaluate.py"):
        flags = [f"--config={tmp_path / 'experiment.py'}", f"--workdir={tmp_path / 'run'}"]
        run_program(script, *flags)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run/objects/objects.npz").is_file()
    metrics = json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert metrics["scans"] == 3
    assert 0 <= metrics["nds"] <= 1
    assert set(metrics["mean_errors"]) == {"translation", "scale", "orientation", "velocity", "attribute"}
    assert metrics["errors"]["traffic_cone"]["velocity"] is None
    table = (tmp_path / "run/eval/nuscenes.md").read_text()
    assert f"| NDS | {metrics['nds']:.3f} |" in table
    results = json.loads((tmp_path / "run/eval/nuscenes_results.json").read_text())["results"]
    assert list(results) == [f"sample-1-{key}" for key in range(3)]
    flags += [f"--config.detection.data.path={unannotated}", "--config.detection.data.version=v1.0-test"]
    last = json.loads(run_program("evaluate.py", *flags).splitlines()[-1])
    assert last == json.loads((tmp_path / "run/eval/metrics.json").read_text()) == {"step": 3, "scans": 9}
    after = json.loads((tmp_path / "run/eval/nuscenes_results.json").read_text())["results"]
    assert list(after) == [f"sample-{scene}-{key}" for scene in range(3) for key in range(3)]
    assert {token: after[token] for token in results} == results  # the same scans, the same model
    assert any(results.values())
