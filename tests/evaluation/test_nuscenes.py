"""The nuScenes metric by hand and against a slow one, written from the devkit's description for single objects."""

import json
import math
from typing import Any

import numpy as np
import pytest

from lumen.evaluation.detection import Scan
from lumen.evaluation.nuscenes import (
    CLASSES,
    ERRORS,
    RANGES,
    Sample,
    class_errors,
    counted,
    likely_attribute,
    nuscenes_metrics,
    nuscenes_table,
    write_results,
)

CAR, BARRIER = (CLASSES.index(name) for name in ("car", "barrier"))


def boxes_at(*places, yaw: Any = 0.0, velocity=(0.0, 0.0)):
    boxes = np.zeros((len(places), 9))
    boxes[:, :2], boxes[:, 3:6] = np.reshape(places, (-1, 2)), (4, 2, 1.5)
    boxes[:, 6], boxes[:, 7:] = yaw, velocity
    return boxes


def sample(found, scores, classes, true, true_classes, attributes=None, true_attributes=None, racks=()):
    attributes = [""] * len(found) if attributes is None else attributes
    true_attributes = [""] * len(true) if true_attributes is None else true_attributes
    return Sample(
        Scan(found, np.array(scores, float), np.array(classes, int), true, np.array(true_classes, int)),
        np.array(attributes, object),
        np.array(true_attributes, object),
        np.zeros(2),
        np.reshape(racks, (-1, 7)).astype(float),
    )


def random_sample(seed):
    """Every class; detections that are near misses, doubles and inventions; some velocities and attributes unknown."""
    rng = np.random.default_rng(seed)
    count = 40
    true = boxes_at(*rng.uniform(-45, 45, (count, 2)), yaw=rng.uniform(-9, 9, count))
    true[:, 3:6] *= rng.uniform(0.5, 2, (count, 3))
    true[:, 7:] = np.where(rng.uniform(size=(count, 1)) < 0.2, np.nan, rng.normal(0, 3, (count, 2)))
    classes = np.arange(count) % len(CLASSES)
    attributes = np.array([["", "vehicle.moving", "vehicle.parked"][i] for i in rng.integers(3, size=count)], object)
    drawn = rng.integers(count, size=90)
    found = true[drawn] + rng.normal(0, 1, (90, 9)) * [1, 1, 0, 0, 0, 0, 1, 0, 0]
    found[:, 3:6] *= rng.uniform(0.7, 1.4, (90, 3))
    found[:, 7:] = rng.normal(0, 3, (90, 2))
    found[::6, :2] = rng.uniform(-60, 60, (15, 2))
    guesses = np.array([["vehicle.moving", "vehicle.parked"][i] for i in rng.integers(2, size=90)], object)
    # Scores of two decimals: some are equal.
    scores = rng.uniform(0.1, 1, 90).round(2)
    return sample(found, scores, classes[drawn], true, classes, guesses, attributes)


def slow_metrics(samples):
    """mean AP, mean errors and NDS, one object at a time."""
    precisions, errors = {}, {name: {} for name in CLASSES}
    for number, name in enumerate(CLASSES):
        objects = [
            (s, j)
            for s, one in enumerate(samples)
            for j, box in enumerate(one.scan.true_boxes)
            if one.scan.true_classes[j] == number and math.hypot(box[0], box[1]) < RANGES[name]
        ]
        detections = [
            (one.scan.scores[i], s, i)
            for s, one in enumerate(samples)
            for i, box in enumerate(one.scan.boxes)
            if one.scan.classes[i] == number and math.hypot(box[0], box[1]) < RANGES[name]
        ]
        for limit in (0.5, 1.0, 2.0, 4.0):
            free, points, matched = set(objects), [], []
            for score, s, i in sorted(detections, reverse=True):
                box, best = samples[s].scan.boxes[i], (math.inf, -1)
                for other, j in sorted(free):
                    if other == s:
                        apart = math.dist(box[:2], samples[s].scan.true_boxes[j][:2])
                        best = (apart, j) if apart < best[0] else best
                hit = best[0] < limit
                if hit:
                    free.remove((s, best[1]))
                    matched.append((score, s, i, best[1]))
                points.append(hit)
            # Precision and score at a recall: linear between the points of the curve, as numpy.interp has it.
            recalls = np.cumsum(points) / max(len(objects), 1)
            precision = [sum(points[: k + 1]) / (k + 1) for k in range(len(points))]
            curve = [
                float(np.interp(r / 100, recalls, precision, right=0)) if any(points) else 0.0 for r in range(11, 101)
            ]
            precisions[name, limit] = sum(max(p - 0.1, 0) for p in curve) / 90 / 0.9
            if limit == 2.0:
                reached = [
                    float(np.interp(r / 100, recalls, [d[0] for d in sorted(detections, reverse=True)], right=0))
                    for r in range(101)
                    if any(points)
                ]
                top = max((r for r, score in enumerate(reached) if score), default=0)
                for error in ERRORS:
                    if error in {"traffic_cone": ERRORS[2:], "barrier": ERRORS[3:]}.get(name, ()):
                        continue
                    values = []
                    for _, s, i, j in matched:
                        box, true = samples[s].scan.boxes[i], samples[s].scan.true_boxes[j]
                        if error == "translation":
                            value = math.dist(box[:2], true[:2])
                        elif error == "scale":
                            shared = math.prod(min(a, b) for a, b in zip(box[3:6], true[3:6], strict=True))
                            value = 1 - shared / (math.prod(box[3:6]) + math.prod(true[3:6]) - shared)
                        elif error == "orientation":
                            turns = 1 if name == "barrier" else 2
                            value = min(abs(box[6] - true[6] + turns * math.pi * k) for k in range(-20, 21))
                        elif error == "velocity":
                            value = math.dist(box[7:], true[7:])
                        else:
                            wanted = samples[s].true_attributes[j]
                            value = float(samples[s].attributes[i] != wanted) if wanted else math.nan
                        values.append(value)
                    if top < 11:
                        errors[name][error] = 1.0
                        continue
                    running, known = [], []
                    for value in values:
                        known += [] if math.isnan(value) else [value]
                        running.append(sum(known) / len(known) if known else 0.0)
                    running = running if known else [1.0] * len(values)
                    scores = [one[0] for one in matched]
                    taken = [np.interp(reached[r], scores[::-1], running[::-1]) for r in range(11, top + 1)]
                    errors[name][error] = sum(taken) / len(taken)
    mean_ap = sum(precisions.values()) / len(precisions)
    means = {}
    for error in ERRORS:
        each = [values[error] for values in errors.values() if error in values]
        means[error] = sum(each) / len(each)
    return mean_ap, means, (5 * mean_ap + sum(max(0, 1 - value) for value in means.values())) / 10


def test_perfect_and_empty_handed():
    true = random_sample(0).scan.true_boxes
    classes = np.arange(len(true)) % len(CLASSES)
    true[:, 7:] = 1
    attributes = np.array([likely_attribute(CLASSES[c], 1.4) for c in classes], object)
    perfect = sample(true, np.full(len(true), 0.5), classes, true, classes, attributes, attributes)
    metrics = nuscenes_metrics([perfect])
    # 10 * 4 + 10 + 10 + 9 + 8 + 8 sums of exact zeros and ones; their means round a few times (2**-52 each).
    assert metrics["nds"] == pytest.approx(1, abs=1e-12)
    assert metrics["mean_ap"] == pytest.approx(1, abs=1e-12)
    assert list(metrics["mean_errors"].values()) == pytest.approx([0] * 5, abs=1e-12)
    nothing = sample(true[:0], [], [], true, classes, [], attributes)
    metrics = nuscenes_metrics([nothing])
    assert (metrics["nds"], metrics["mean_ap"]) == (0, 0)
    assert metrics["mean_errors"] == dict.fromkeys(ERRORS, 1.0)
    assert metrics["errors"]["traffic_cone"] == {
        "translation": 1.0,
        "scale": 1.0,
        "orientation": None,
        "velocity": None,
        "attribute": None,
    }
    undefined = [error for error, value in metrics["errors"]["barrier"].items() if value is None]
    assert undefined == ["velocity", "attribute"]


def test_errors_by_hand():
    """Two cars of two found: the surer one 0.6 m away and a right angle off, the other exact but twice as long."""
    true = boxes_at((0, 0), (10, 0), velocity=(3, 4))
    found = true.copy()
    found[0, 1], found[0, 6] = 0.6, math.pi / 2
    found[1, 3] *= 2
    found[1, 7:] = 0
    one = sample(
        found, [0.9, 0.4], [CAR, CAR], true, [CAR, CAR], ["vehicle.moving"] * 2, ["vehicle.moving", "vehicle.parked"]
    )
    errors: dict[str, Any] = class_errors([one], "car")
    # The mean over the first match is its error a, over both (a + b) / 2; up to recall 1/2 the score is 0.9, then it
    # falls linearly to 0.4, and the mean with it: recalls 0.11 to 0.50 count a, 0.51 to 1.00 lines between the means.
    share = sum(k / 50 for k in range(1, 51)) / 90

    def expected(a, b):
        return a + share * ((a + b) / 2 - a)

    assert errors["translation"] == pytest.approx(expected(0.6, 0))
    assert errors["scale"] == pytest.approx(expected(0, 0.5))
    assert errors["orientation"] == pytest.approx(expected(math.pi / 2, 0))
    assert errors["velocity"] == pytest.approx(expected(0, 5))
    assert errors["attribute"] == pytest.approx(expected(0, 1))
    metrics = nuscenes_metrics([one])
    # Within 0.5 m the surer one is wrong: (recall, precision) are (0, 0), then (1/2, 1/2), and on the line between.
    within_half = sum(k / 100 for k in range(1, 41)) / 90 / 0.9
    assert metrics["ap_within"]["car"] == {
        "0.5": pytest.approx(within_half),
        "1": pytest.approx(1),
        "2": pytest.approx(1),
        "4": pytest.approx(1),
    }
    assert metrics["mean_ap"] == pytest.approx((3 + within_half) / 40)
    # Nine other classes without objects: an average precision of 0 and errors of 1.
    assert metrics["mean_errors"]["velocity"] == pytest.approx((7 + errors["velocity"]) / 8)
    assert metrics["mean_errors"]["scale"] == pytest.approx((9 + errors["scale"]) / 10)


def test_against_a_slow_implementation():
    samples = [random_sample(seed) for seed in range(5)]
    metrics = nuscenes_metrics(samples)
    mean_ap, means, score = slow_metrics(samples)
    # Sums of a few hundred numbers of size 1, rounded to float64 each.
    assert metrics["mean_ap"] == pytest.approx(mean_ap, abs=1e-12)
    assert metrics["mean_errors"] == {error: pytest.approx(value, abs=1e-11) for error, value in means.items()}
    assert metrics["nds"] == pytest.approx(score, abs=1e-12)
    assert 0.05 < mean_ap < 0.9
    assert metrics["nds"] > mean_ap / 2


def test_the_devkit_gives_the_same():
    """Numbers of nuscenes-devkit at commit d9de17a, accumulate, calc_ap and calc_tp, on the same boxes."""
    metrics = nuscenes_metrics([random_sample(seed) for seed in range(20, 26)])
    # As above: sums of a few hundred float64 numbers of size 1, or 5 for velocities.
    assert metrics["nds"] == pytest.approx(0.24633251537416828, abs=1e-12)
    assert metrics["mean_ap"] == pytest.approx(0.25783083336013324, abs=1e-12)
    want = [1.059804179883222, 0.3946342264964442, 0.8917992906787562, 5.0103489401777015, 0.5393954958837832]
    assert list(metrics["mean_errors"].values()) == pytest.approx(want, abs=1e-11)


def test_what_is_far_or_in_a_rack_does_not_count():
    bicycle, pedestrian = CLASSES.index("bicycle"), CLASSES.index("pedestrian")
    places = [(39.9, 0), (40.1, 0), (0, -49.9), (35, 36), (5, 5), (5, 5)]
    classes = [pedestrian, pedestrian, CAR, CAR, bicycle, pedestrian]
    boxes = boxes_at(*places)
    rack = [5.5, 5.5, 0, 4, 1, 2, math.pi / 4]  # (5, 5) lies on its axis, 0.71 m from the centre
    one = sample(boxes, [0.5] * 6, classes, boxes, classes, racks=rack)
    for classes in (counted(one).scan.classes, counted(one).scan.true_classes):
        assert classes.tolist() == [pedestrian, CAR, pedestrian]
    moved = counted(one._replace(vehicle=np.array([10.0, 0.0]), racks=np.zeros((0, 7))))
    assert moved.scan.classes.tolist() == [pedestrian, pedestrian, CAR, bicycle, pedestrian]
    assert len(moved.attributes) == len(moved.true_attributes) == 5


def test_orientation_of_a_barrier_is_known_up_to_half_a_turn():
    true = boxes_at((0, 0))
    one = sample(boxes_at((0, 0), yaw=math.pi - 0.1), [0.5], [BARRIER], true, [BARRIER])
    assert class_errors([one], "barrier")["orientation"] == pytest.approx(0.1)
    assert class_errors([one], "traffic_cone")["orientation"] is None
    cars = one._replace(scan=one.scan._replace(classes=np.array([CAR]), true_classes=np.array([CAR])))
    assert class_errors([cars], "car")["orientation"] == pytest.approx(math.pi - 0.1)
    assert class_errors([cars], "car")["attribute"] == 1.0  # no attribute is known of any


def test_likely_attributes():
    assert [likely_attribute(name, 0.3) for name in ("car", "bus", "bicycle", "pedestrian", "barrier")] == [
        "vehicle.moving",
        "vehicle.moving",
        "cycle.with_rider",
        "pedestrian.moving",
        "",
    ]
    assert [likely_attribute(name, 0.1) for name in ("trailer", "bus", "motorcycle", "pedestrian")] == [
        "vehicle.parked",
        "vehicle.stopped",
        "cycle.without_rider",
        "pedestrian.standing",
    ]


def test_table_and_errors():
    metrics = nuscenes_metrics([random_sample(0)])
    lines = nuscenes_table(metrics).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {11}
    by_name = {row[0]: row[1:] for row in cells}
    assert by_name["car"][0] == f"{metrics['ap']['car']:.3f}"
    assert by_name["traffic_cone"][-3:] == ["", "", ""]
    assert by_name["mean"][5:] == [f"{value:.3f}" for value in metrics["mean_errors"].values()]
    assert by_name["NDS"][0] == f"{metrics['nds']:.3f}"
    many = boxes_at(*np.zeros((501, 2)))
    with pytest.raises(ValueError, match=r"sample 0 has 501 detections; nuScenes allows 500. Lower the model's supp"):
        nuscenes_metrics([sample(many, [0.5] * 501, [CAR] * 501, many[:0], [])])


def results(samples):
    """What `samples` of results read from a file say: boxes, scores, classes and attributes, for each sample."""
    for rows in samples.values():
        boxes = np.zeros((len(rows), 9))
        for box, row in zip(boxes, rows, strict=True):
            w, x, y, z = row["rotation"]
            width, length, height = row["size"]
            # The direction in which q turns the x axis.
            heading = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
            box[:] = *row["translation"], length, width, height, heading, *row["velocity"]
        yield (
            boxes,
            np.array([row["detection_score"] for row in rows]),
            np.array([CLASSES.index(row["detection_name"]) for row in rows], int),
            np.array([row["attribute_name"] for row in rows], object),
        )


def test_results_say_what_was_found(tmp_path):
    samples = [random_sample(seed) for seed in range(3)]
    samples[1] = samples[1]._replace(
        scan=samples[1].scan._replace(boxes=np.zeros((0, 9)), scores=np.zeros(0), classes=np.zeros(0, int)),
        attributes=np.zeros(0, object),
    )
    write_results(tmp_path / "results.json", ["b", "a", "ö"], samples)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["meta"] == {
        "use_camera": False,
        "use_lidar": True,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    assert list(written) == ["meta", "results"]
    assert list(written["results"]) == ["b", "a", "ö"]
    assert written["results"]["a"] == []
    lengths = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
    texts = ("sample_token", "detection_name", "attribute_name")
    for token, rows in written["results"].items():
        for row in rows:
            assert set(row) == {*lengths, *texts, "detection_score"}
            for name, length in lengths.items():
                assert [type(number) for number in row[name]] == [float] * length
            assert [type(row[name]) for name in texts] == [str] * 3
            assert type(row["detection_score"]) is float
            assert row["sample_token"] == token
            # A turn about the vertical axis.
            assert row["rotation"][1:3] == [0, 0]
            assert math.hypot(*row["rotation"]) == pytest.approx(1, abs=1e-15)
    read = []
    for one, (boxes, scores, classes, attributes) in zip(samples, results(written["results"]), strict=True):
        turned = np.abs((boxes[:, 6] - one.scan.boxes[:, 6] + math.pi) % (2 * math.pi) - math.pi)
        # Headings of up to 20, of which half goes through a sine and back: a few roundings of 20 * 2**-53.
        np.testing.assert_allclose(turned, 0, atol=1e-14)
        rest = [*range(6), 7, 8]
        np.testing.assert_array_equal(boxes[:, rest], one.scan.boxes[:, rest])
        np.testing.assert_array_equal(scores, one.scan.scores)
        scan = one.scan._replace(boxes=boxes, scores=scores, classes=classes)
        read.append(one._replace(scan=scan, attributes=attributes))
    # Sums of a few hundred numbers of size 1, of which the headings' errors moved by 1e-14.
    assert nuscenes_metrics(read)["nds"] == pytest.approx(nuscenes_metrics(samples)["nds"], abs=1e-12)


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("as it was")
    one = random_sample(0)
    boxes = one.scan.boxes.copy()
    boxes[3, 7] = np.inf
    with pytest.raises(ValueError, match=r"sample 'b' has a detection with a NaN or an infinity; .*earlier check"):
        write_results(path, ["a", "b"], [one, one._replace(scan=one.scan._replace(boxes=boxes))])
    many = boxes_at(*np.zeros((501, 2)))
    with pytest.raises(ValueError, match="501 detections"):
        write_results(path, ["a"], [sample(many, [0.5] * 501, [CAR] * 501, many[:0], [])])
    unknown = one.scan._replace(classes=one.scan.classes + len(CLASSES))
    with pytest.raises(IndexError):  # when the first sample is in the file
        write_results(path, ["a", "b"], [one, one._replace(scan=unknown)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "as it was"
