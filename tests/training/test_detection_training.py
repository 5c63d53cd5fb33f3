"""Scans with boxes: sources, augmentation, batches; and a detection run as people start it."""

import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from lumen.sparse.centerpoint import CenterPointConfig
from lumen.sparse.second import SECONDConfig
from lumen.training.config import ConfigError
from lumen.training.detection import (
    DetectionData,
    DetectionOptions,
    augment,
    collate,
    make_task,
    scene_folder,
    to_voxels,
    without_intensity,
)
from lumen.training.lidar import street_scans

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def street():
    return street_scans("train", scans=4, beams=32, azimuths=512)[1]


@pytest.fixture(scope="module")
def scene(street):
    return without_intensity(street, np.random.default_rng(0))


def points_in_boxes(points, boxes):
    """How many points each box holds."""
    counts = []
    for x, y, z, *size, heading in boxes[:, :7]:
        away = points[:, :3] - np.array([x, y, z])
        ahead, left = [np.cos(heading), np.sin(heading), 0], [-np.sin(heading), np.cos(heading), 0]
        local = away @ np.transpose([ahead, left, [0, 0, 1]])
        counts.append((np.abs(local) <= np.array(size) / 2).all(1).sum())
    return np.array(counts)


def test_boxes_of_streets_have_points(street, scene):
    assert 10 < len(street["boxes"]) < 60  # some are hidden
    assert set(street["names"]) == {"car", "pole", "building"}
    grown = street["boxes"] + np.float32([0, 0, 0, 0.1, 0.1, 0.1, 0, 0, 0])  # the noise of a point is 1 cm
    assert points_in_boxes(street["points"], grown).min() >= 5
    # Points of a class that are in no box of it are at most 4 of each box that is not there.
    for label, (name, count) in enumerate({"car": 30, "pole": 15, "building": 15}.items(), 1):
        own = points_in_boxes(street["points"][street["labels"] == label], grown[street["names"] == name])
        assert (street["labels"] == label).sum() - own.sum() <= 4 * (count - len(own))
    # Boxes stand on the ground, 1.73 m below the sensor.
    np.testing.assert_allclose(street["boxes"][:, 2] - street["boxes"][:, 5] / 2, -1.73, atol=1e-5)
    np.testing.assert_array_equal(scene["points"][:, :3], street["points"][:, :3])
    assert abs(np.corrcoef(scene["points"][:, 3], street["points"][:, 3])[0, 1]) < 0.05
    assert not scene["points"][:, 4].any()


def test_points_in_a_turned_box():
    box = np.array([[1, 2, 0, 4, 1, 2, math.pi / 2]])
    points = np.array([[1, 3.9, 0, 0], [1, 4.1, 0, 0], [1.6, 2, 0, 0], [1.4, 2, 0.9, 0], [1, 2, 1.1, 0]])
    assert points_in_boxes(points, box).tolist() == [2]


def test_augmentation_moves_points_and_boxes_alike(scene):
    record = {**scene, "boxes": scene["boxes"].copy()}
    record["boxes"][:, 7:] = np.stack([np.cos(record["boxes"][:, 6]), np.sin(record["boxes"][:, 6])], 1) * 3
    record["boxes"][:, 3:6] += 0.1

    def winding(boxes):
        (ax, ay), (bx, by) = boxes[1, :2] - boxes[0, :2], boxes[2, :2] - boxes[0, :2]
        return ax * by - ay * bx

    before = points_in_boxes(record["points"], record["boxes"])
    seen = set()
    for seed in range(8):
        moved = augment(record, np.random.default_rng(seed))
        after = points_in_boxes(moved["points"], moved["boxes"])
        # A point on the rim of a box may change sides by rounding.
        assert np.abs(after - before).max() <= 2
        heading, velocity = moved["boxes"][:, 6], moved["boxes"][:, 7:]
        scale = moved["boxes"][0, 3] / record["boxes"][0, 3]
        assert 0.9 <= scale <= 1.1
        # Who drives ahead still does.
        np.testing.assert_allclose(velocity, np.stack([np.cos(heading), np.sin(heading)], 1) * 3 * scale, atol=1e-4)
        seen.add(bool(winding(moved["boxes"]) * winding(record["boxes"]) > 0))
    assert seen == {True, False}


def test_voxels_and_boxes_of_the_grid(scene):
    config = CenterPointConfig.debug(groups=(("car",), ("building",)))
    scene = {**scene, "boxes": scene["boxes"] * np.float32([0.2, 0.2, 0.2, 1, 1, 1, 1, 1, 1])}
    record = to_voxels(scene, np.random.default_rng(0), config=config, train=True)
    assert record["coordinates"].min() >= 0
    assert (record["coordinates"] < config.grid.spatial_shape).all()
    # A voxel holds the points whose mean it is, in z, y, x.
    centres = (record["features"][:, :3] - config.grid.lower) / config.grid.voxel
    np.testing.assert_array_equal(np.floor(centres + 1e-4).astype(int)[:, ::-1].clip(0), record["coordinates"])
    inside = (np.abs(scene["boxes"][:, :2]) < 6.4).all(1) & (np.abs(scene["boxes"][:, 2]) < 2)
    wanted = [{"car": 0, "building": 1}[n] for n in scene["names"][inside] if n != "pole"]
    assert record["classes"].tolist() == wanted
    assert 0 < len(wanted) < len(scene["names"])
    assert to_voxels(scene, np.random.default_rng(0), config=SECONDConfig.debug(), train=False)["boxes"].shape[1] == 7
    with pytest.raises(ValueError, match=r"points have 4 columns and the model reads 5.*backbone.inputs=4"):
        to_voxels({**scene, "points": scene["points"][:, :4]}, np.random.default_rng(0), config=config, train=True)


def test_groups():
    def record(voxels, boxes):
        return {
            "coordinates": np.full((voxels, 3), voxels, np.int32),
            "features": np.ones((voxels, 5), np.float32),
            "boxes": np.full((boxes, 9), boxes, np.float32),
            "classes": np.arange(boxes, dtype=np.int32),
        }

    records = [record(3, 1), record(200, 0), record(100, 5), record(7, 2)]
    batch = collate(records, scans_per_group=2, capacities=(128, 256, 384), boxes=4)
    assert {name: value.shape for name, value in batch.items()} == {
        "coordinates": (2, 256, 4),
        "features": (2, 256, 5),
        "count": (2,),
        "boxes": (2, 2, 4, 9),
        "classes": (2, 2, 4),
    }
    assert batch["count"].tolist() == [203, 107]
    assert batch["coordinates"][0, [0, 2, 3, 202, 203]].tolist() == [[0] + [3] * 3] * 2 + [[1] + [200] * 3] * 2 + [
        [0] * 4
    ]
    assert batch["classes"].tolist() == [[[0, -1, -1, -1], [-1] * 4], [[0, 1, 2, 3], [0, 1, -1, -1]]]


def test_scene_folders(tmp_path, scene):
    np.savez(tmp_path / "b.npz", **scene)
    np.savez(tmp_path / "a.npz", points=scene["points"], boxes=scene["boxes"])
    np.savez(tmp_path / "c.npz", **{**scene, "names": scene["names"][1:]})
    source = scene_folder(tmp_path)
    assert len(source) == 3
    np.testing.assert_array_equal(source[1]["boxes"], scene["boxes"])
    with pytest.raises(ValueError, match=r"a.npz cannot be read \(.*names.*wanted an .npz file of points, boxes"):
        source[0]
    with pytest.raises(
        ValueError, match=r"c.npz holds points .* and names \[\d+\]; wanted \[n, C\], \[m, 9\] and \[m\]"
    ):
        source[2]
    with pytest.raises(FileNotFoundError, match=r"holds no .npz files"):
        scene_folder(tmp_path / "nothing")


def test_options():
    config = DetectionOptions(
        model={"size": "nuscenes", "backbone": {"residual": False, "widths": [1, 2, 3, 4]}}
    ).config()
    assert isinstance(config, CenterPointConfig)
    assert config.backbone.inputs == 5  # what is not named stays
    assert config.backbone.widths == (1, 2, 3, 4)
    assert not config.backbone.residual
    assert config.grid == CenterPointConfig.nuscenes().grid
    second = DetectionOptions("second", {"size": "kitti", "score": 0.3}).config()
    assert isinstance(second, SECONDConfig)
    assert (second.score, second.anchors) == (0.3, SECONDConfig.kitti().anchors)
    with pytest.raises(ConfigError, match=r"model.size: came 'kitti'; wanted one of 'nuscenes', 'waymo', 'debug'"):
        DetectionOptions(model={"size": "kitti"}).config()
    with pytest.raises(ConfigError, match=r"did you mean detection.model.backbone.widths"):
        DetectionOptions(model={"size": "debug", "backbone": {"width": 3}}).config()
    with pytest.raises(ConfigError, match=r"batch_size=3 is no multiple of detection.scans_per_group=2"):
        make_task(
            DetectionOptions(model={"size": "debug"}, scans_per_group=2),
            batch_size=3,
            seed=0,
            total_steps=1,
            workdir=pathlib.Path(),
        )
    task = make_task(
        DetectionOptions(model={"size": "waymo"}), batch_size=1, seed=0, total_steps=1, workdir=pathlib.Path()
    )
    assert task.advise is not None
    assert "set config.detection.model.backbone.level_fractions=(2.02, 1.27, 0.64, 0.52) or larger" in task.advise(
        {"most_missing_rows": 1000.0}  # inputs have from 96 000 rows
    )
    with pytest.raises(ValueError, match="scans_per_group=0"):
        DetectionOptions(scans_per_group=0)
    assert DetectionData().source("train", 0)[0]["boxes"].shape[1] == 9


def test_a_run_from_training_to_evaluation(tmp_path, run_program):
    """A toy of SECOND, which has the smaller program."""
    (tmp_path / "experiment.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    config = ml_collections.ConfigDict(dict(task='detection', total_steps=2, batch_size=1, log_every=1))\n"
        "    config.detection = dict(\n"
        "        detector='second',\n"
        "        model=dict(size='debug', backbone=dict(level_fractions=(4, 3, 1, 1))),\n"
        "        data=dict(scans=8, beams=16, azimuths=256), boxes=8, evaluation_scans=1)\n"
        "    return config\n"
    )
    for script in ("train.py", "evaluate.py"):
        flags = [f"--config={tmp_path / 'experiment.py'}", f"--workdir={tmp_path / 'run'}"]
        run_program(script, *flags)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"class_loss", "box_loss", "direction_loss", "most_missing_rows", "loss"} <= lines[0].keys()
    assert all(line["most_missing_rows"] == 0 for line in lines)
    metrics = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())
    assert {"mean_ap", "ap", "absent", "scans"} <= metrics.keys()
    assert np.asarray(Image.open(tmp_path / "run" / "eval" / "boxes.png")).shape == (800, 800, 3)
    assert (tmp_path / "run" / "model.safetensors").is_file()
