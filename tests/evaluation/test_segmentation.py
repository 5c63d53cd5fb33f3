"""IoU against scikit-learn and by hand; pictures pixel by pixel."""

import jax
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from lumen.evaluation.segmentation import (
    IGNORE,
    NUSCENES,
    SEMANTIC_KITTI,
    STREET,
    confusion_matrix,
    from_above,
    from_sensor,
    segmentation_metrics,
)

# Panels begin below a title of 20 pixels and a margin of 8 from the left.
TITLE, MARGIN = 20, 8
GROUND, CAR, POLE, BUILDING = (np.array(colour) for colour in STREET.values())


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, 400), rng.integers(0, 5, 400)
    labels[::7] = IGNORE
    return labels, predictions


def test_metrics_match_scikit_learn(labelled):
    labels, predictions = labelled
    confusion = confusion_matrix(predictions, labels, 5)
    counted = labels != IGNORE
    np.testing.assert_array_equal(confusion, sklearn_confusion(labels[counted], predictions[counted]))
    metrics = segmentation_metrics(confusion, list("abcde"))
    iou = jaccard_score(labels[counted], predictions[counted], average=None)
    # Quotients of the same integers.
    np.testing.assert_allclose(list(metrics["iou"].values()), iou, rtol=1e-12)
    np.testing.assert_allclose(metrics["mean_iou"], iou.mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], accuracy_score(labels[counted], predictions[counted]), rtol=1e-12)


def test_batches_on_the_device_add_up(labelled):
    labels, predictions = (values.reshape(4, 100) for values in labelled)
    count = jax.jit(lambda p, t: confusion_matrix(p, t, 5))
    total = sum(np.asarray(count(p, t), np.int64) for p, t in zip(predictions, labels, strict=True))
    np.testing.assert_array_equal(total, confusion_matrix(predictions, labels, 5))


def test_absent_classes_are_left_out_and_listed():
    # Two voxels of a, one of them called c, which is nowhere; b and d do not occur at all.
    metrics = segmentation_metrics(confusion_matrix(np.array([0, 2]), np.array([0, 0]), 4), list("abcd"))
    assert metrics == {"mean_iou": 0.25, "accuracy": 0.5, "iou": {"a": 0.5, "c": 0.0}, "absent": ["b", "d"]}


def test_class_lists():
    assert (len(SEMANTIC_KITTI), len(NUSCENES), len(STREET)) == (19, 16, 4)
    assert SEMANTIC_KITTI["road"] == (255, 0, 255)
    assert SEMANTIC_KITTI["car"] == (100, 150, 245)  # [245, 150, 100] in the file, blue first


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0], r"predictions are \[2\] and labels \[1\]"),
        ([0, 4], [0, 1], r"predictions span 0..4; wanted 0..3"),
        ([0, 1], [0, -1], r"labels span -1..0; wanted 0..3"),
    ],
)
def test_bad_labels_are_named(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(predictions), np.array(labels), 4)


def test_bad_confusion_matrices_are_named():
    with pytest.raises(ValueError, match=r"is \[3, 3\] for 2 classes; wanted \[2, 2\]"):
        segmentation_metrics(np.eye(3, dtype=int), ["a", "b"])
    with pytest.raises(ValueError, match="is empty; wanted labels that count"):
        segmentation_metrics(np.zeros((2, 2), int), ["a", "b"])


def panel(picture, number, height, width, *, side_by_side):
    """The number-th of the three panels."""
    left = MARGIN + (number * (width + MARGIN) if side_by_side else 0)
    top = TITLE + (0 if side_by_side else number * (TITLE + height + MARGIN))
    return picture[top : top + height, left : left + width]


def test_seen_from_above():
    # 10 pixels per metre: a point is 2 x 2 pixels, up and left of the middle (50, 50) for positive x and y.
    points = np.array([[2, 3, 0], [2, 3, 1], [-4, -1, 0], [0, 4, 0], [20, 0, 0]], np.float32)
    labels, predictions = np.array([0, 1, 2, IGNORE, 0]), np.array([3, 1, 0, 3, 3])
    picture = from_above(points, labels, predictions, STREET, reach=5, size=100)
    assert picture.dtype == np.uint8
    truth, guess, errors = (panel(picture, i, 100, 100, side_by_side=True) for i in range(3))
    for shown, colours in (
        (truth, {(30, 20): CAR, (90, 60): POLE}),
        (guess, {(30, 20): CAR, (90, 60): GROUND, (50, 10): BUILDING}),  # the car is above the building
    ):
        background = shown[0, 0]
        for (row, column), colour in colours.items():
            np.testing.assert_array_equal(shown[row : row + 2, column : column + 2], np.broadcast_to(colour, (2, 2, 3)))
        lit = (shown != background).any(-1).sum()
        assert lit == 4 * 3  # nothing of the point beyond the edge
    right, wrong, uncounted = errors[30, 20], errors[90, 60], errors[50, 10]
    assert wrong[0] > 200 > wrong[1]
    assert len({tuple(right), tuple(wrong), tuple(uncounted), tuple(truth[0, 0])}) == 4
    # Every class shown is in the legend.
    legend = {tuple(pixel) for pixel in picture[TITLE + 100 + MARGIN :].reshape(-1, 3)}
    assert legend >= {tuple(GROUND), tuple(CAR), tuple(POLE), tuple(BUILDING), tuple(wrong)}


def test_seen_from_the_sensor():
    # Ahead, to the left, behind to the right; the lowest beam at -45 degrees, the highest level.
    points = np.array([[10, 0, 0], [5, 0, 0], [0, 8, -8], [-7, -0.01, 0]], np.float32)
    labels, predictions = np.array([0, 1, 2, 3]), np.array([0, 1, 1, 3])
    picture = from_sensor(points, labels, predictions, STREET, rows=2, width=100)
    truth, guess, errors = (panel(picture, i, 6, 100, side_by_side=False) for i in range(3))
    np.testing.assert_array_equal(truth[:3, 50], np.broadcast_to(CAR, (3, 3)))  # nearer than the ground behind it
    np.testing.assert_array_equal(truth[3:, 25], np.broadcast_to(POLE, (3, 3)))
    np.testing.assert_array_equal(guess[3:, 25], np.broadcast_to(CAR, (3, 3)))
    np.testing.assert_array_equal(truth[:3, 99], np.broadcast_to(BUILDING, (3, 3)))
    assert (truth != truth[5, 0]).any(-1).sum() == 9
    assert tuple(errors[3, 25]) != tuple(errors[0, 50]) == tuple(errors[0, 99])


def test_bad_clouds_are_named():
    points, labels = np.zeros((3, 3)), np.zeros(3, int)
    with pytest.raises(ValueError, match=r"from_above: points are \[3, 2\], labels \[3\]"):
        from_above(points[:, :2], labels, labels, STREET)
    with pytest.raises(ValueError, match=r"predictions hold \[4\]; wanted 0..3 for 4 classes"):
        from_sensor(points, labels, labels + 4, STREET)
    with pytest.raises(ValueError, match="there are no points; wanted a scan"):
        from_above(points[:0], labels[:0], labels[:0], STREET)
