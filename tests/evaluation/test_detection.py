"""Average precision by hand, and what the picture shows where."""

import numpy as np
import pytest

from lumen.evaluation.detection import Scan, average_precision, boxes_from_above, detection_metrics


def boxes_at(*places):
    boxes = np.zeros((len(places), 7))
    boxes[:, :2], boxes[:, 3:6] = np.reshape(places, (-1, 2)), (4, 2, 1.5)
    return boxes


def test_average_precision_by_hand():
    """Four true boxes; from the best score on right, wrong (the same box again), right, wrong (far away)."""
    scans = [
        Scan(
            boxes_at((0, 0.1), (0.2, 0), (30, 30)),
            np.array([0.9, 0.8, 0.2]),
            np.zeros(3),
            boxes_at((0, 0), (9, 9)),
            np.zeros(2),
        ),
        Scan(boxes_at((5, 5.4)), np.array([0.5]), np.zeros(1), boxes_at((5, 5), (-9, 9)), np.zeros(2)),
    ]
    # Recall 1/4 with precision 1, 1/4 with 1/2, 2/4 with 2/3, 2/4 with 2/4; linear between, 0 beyond recall 1/2.
    recall = np.linspace(0, 1, 101)
    curve = np.interp(recall, [0.25, 0.25, 0.5, 0.5], [1, 1 / 2, 2 / 3, 2 / 4], right=0)
    want = np.mean([max(p - 0.1, 0) for p in curve[11:]]) / 0.9
    assert average_precision(scans, 0, 0.5) == pytest.approx(want)
    # Within 0.3 m only the first one is right.
    curve = np.interp(recall, [0.25] * 4, [1, 1 / 2, 1 / 3, 1 / 4], right=0)
    assert average_precision(scans, 0, 0.3) == pytest.approx(np.mean([max(p - 0.1, 0) for p in curve[11:]]) / 0.9)


def test_perfect_wrong_and_absent():
    true = boxes_at((0, 0), (10, 0), (20, 0))
    scan = Scan(true[:2], np.array([0.9, 0.8]), np.array([0, 1]), true, np.array([0, 1, 2]))
    metrics = detection_metrics([scan], ("car", "pole", "tree", "cloud"))
    assert metrics["ap"] == {"car": pytest.approx(1), "pole": pytest.approx(1), "tree": 0}
    assert metrics["absent"] == ["cloud"]
    assert metrics["mean_ap"] == pytest.approx(2 / 3)
    nothing = Scan(true[:0], np.zeros(0), np.zeros(0, int), true[:0], np.zeros(0, int))
    assert detection_metrics([nothing], ("car",)) == {"mean_ap": 0.0, "ap": {}, "absent": ["car"]}


def test_the_nearest_free_box_is_taken():
    true = boxes_at((0, 0), (1.5, 0))
    found = boxes_at((1.0, 0), (0.9, 0))  # both nearer to the second box; the later one takes the first
    scan = Scan(found, np.array([0.9, 0.8]), np.zeros(2), true, np.zeros(2))
    assert average_precision([scan], 0, 1.0) == pytest.approx(1)
    assert average_precision([scan], 0, 0.8) < 1


def test_picture():
    scan = Scan(boxes_at((0, 20)), np.array([1.0]), np.zeros(1), boxes_at((20, 0)), np.zeros(1))
    picture = boxes_from_above(np.array([[-20.0, 0, 0], [500, 0, 0]]), scan, reach=40, size=400)
    assert picture.shape == (400, 400, 3)
    points = np.argwhere((picture == (150, 150, 150)).all(-1))
    assert points.tolist() == [[300, 200]]  # behind the sensor: below its middle
    green = np.argwhere((picture == (60, 180, 75)).all(-1)).mean(0)
    np.testing.assert_allclose(green, [99, 200], atol=2)  # ahead: above; its front line pulls it up
    red = np.argwhere((picture == (230, 60, 60)).all(-1)).mean(0)
    np.testing.assert_allclose(red, [199, 100], atol=2)  # left
