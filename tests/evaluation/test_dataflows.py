"""What dataflows execute against counts by hand, and the commands that report and choose them."""

import itertools
import json

import jax
import numpy as np
import pytest

from lumen import cli
from lumen.evaluation import dataflows
from lumen.sparse.minkunet import LEVELS, MAP_NAMES, MinkUNetConfig, unet_maps
from lumen.sparse.tuning import Tuning

POINTS = np.random.default_rng(0).uniform(0, 8, (300, 4)).astype(np.float32)
VOXEL = 0.5


@pytest.fixture
def few(monkeypatch):
    """Three dataflows instead of nine, which compile faster."""
    names = ("unsorted", "tile-skip, 16 rows", "fetch-on-demand, 128 pairs")
    monkeypatch.setattr(dataflows, "FLOWS", {name: dataflows.FLOWS[name] for name in names})


@pytest.fixture
def scan(tmp_path):
    POINTS.tofile(tmp_path / "scan.bin")
    return ["--scan", str(tmp_path / "scan.bin"), "--voxel-size", str(VOXEL), "--ratio", "0.1"]


def windows(sites: np.ndarray) -> np.ndarray:
    """bool [n, 27]: whose neighbours are there."""
    there = set(map(tuple, sites.tolist()))
    offsets = list(itertools.product((-1, 0, 1), repeat=3))
    return np.array([[tuple(np.add(site, offset)) in there for offset in offsets] for site in sites])


def up_to_tiles(count: np.ndarray | int, tile: int):
    return -(-count // tile) * tile


def test_redundancy_is_what_windows_need(few):
    x = dataflows.scan_tensor(POINTS, VOXEL)
    rows = dataflows.redundancy(x, MinkUNetConfig.scaled(0.1))
    sites = np.asarray(x.sites.coordinates)[: int(x.sites.count), 1:]
    assert len(rows) == LEVELS + 1
    for level, row in enumerate(rows):
        if level:  # in the order of the finer level's first child: Morton order stays
            sites = np.array(list(dict.fromkeys(map(tuple, (sites // 2).tolist()))))
        found = windows(sites)
        needed, count = found.sum(), len(sites)
        assert row["voxels"] == count
        assert row["neighbours"] == needed / count
        assert row["unsorted"] == up_to_tiles(count, 128) * 27 / needed
        tiles = np.pad(found, ((0, up_to_tiles(count, 16) - count), (0, 0))).reshape(-1, 16, 27).any(1)
        assert row["tile-skip, 16 rows"] == 16 * tiles.sum() / needed
        others = np.delete(found, 13, axis=1)  # the pairs of the centre are the rows themselves, and need no list
        pairs = count + up_to_tiles(others.sum(0), 128).sum()
        assert row["fetch-on-demand, 128 pairs"] == pairs / needed


def test_fitted_capacities_hold_the_scan_and_no_more():
    x = dataflows.scan_tensor(POINTS, VOXEL)
    config = dataflows.fitted(MinkUNetConfig.scaled(0.1), x)
    maps = jax.jit(lambda sites: unet_maps(sites, config))(x.sites)
    for name, level in maps.levels.items():
        assert level.count <= level.capacity == up_to_tiles(int(level.count), 128), name


def test_the_report_is_a_table(few, scan, capsys):
    assert cli.main(["evaluate", "dataflows", *scan]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head == "| level | voxels | neighbours | unsorted | tile-skip, 16 rows | fetch-on-demand, 128 pairs |"
    assert set(rule) == {"|", "-"}
    assert [row.split(" | ")[0] for row in rows] == [f"| {level}" for level in range(LEVELS + 1)]


def test_tuning_by_the_cost_model(scan, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    assert cli.main(["tune", *scan, "--device", "h200", "--dtype", "bfloat16", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "nothing was timed; a cost model of h200 decided" in printed.err
    told = json.loads(printed.out)
    tuning = Tuning.load(out)
    assert told["objective"] == tuning.objective == "cost model"
    assert told["tuned_seconds"] == tuning.tuned_seconds <= tuning.default_seconds == told["default_seconds"]
    assert {name for name, _ in tuning.dataflows} == set(MAP_NAMES)
    assert (tuning.provenance["device"], tuning.provenance["dtype"]) == ("h200", "bfloat16")
    assert tuning.provenance["voxels"] == int(dataflows.scan_tensor(POINTS, VOXEL).sites.count)
