"""Overlaps of turned boxes against polygon clipping, and suppression against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumen.sparse.boxes import Detections, Suppression, bev_iou, intersection_area, iou_3d, suppress


def corners(box):
    x, y, _, length, width, _, heading = box[:7]
    along, across = np.array([1, -1, -1, 1]) * length / 2, np.array([1, 1, -1, -1]) * width / 2
    cos, sin = np.cos(heading), np.sin(heading)
    return np.stack([x + along * cos - across * sin, y + along * sin + across * cos], 1)


def clipped_area(a, b):
    """Sutherland-Hodgman, float64: the polygon of one box, cut by every side of the other."""
    polygon, window = list(corners(a)), corners(b)
    for begin, end in zip(window, np.roll(window, -1, 0), strict=True):
        side = [(end - begin)[0] * (p - begin)[1] - (end - begin)[1] * (p - begin)[0] for p in polygon]
        cut = []
        for i, (p, s) in enumerate(zip(polygon, side, strict=True)):
            q, t = polygon[(i + 1) % len(polygon)], side[(i + 1) % len(polygon)]
            if s >= 0:
                cut.append(p)
            if (s >= 0) != (t >= 0):
                cut.append(p + (q - p) * s / (s - t))
        polygon = cut
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def random_boxes(rng, count):
    return np.concatenate(
        [
            rng.uniform(-4, 4, (count, 2)),
            rng.uniform(-1, 1, (count, 1)),
            rng.uniform(0.3, 6, (count, 3)),
            rng.uniform(-7, 7, (count, 1)),
        ],
        1,
    )


def test_overlaps_of_random_boxes():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 40), random_boxes(rng, 30)
    want = np.array([[clipped_area(p, q) for q in b] for p in a])
    assert 0.2 < (want > 0).mean() < 0.9  # both kinds are there
    area_a, area_b = a[:, 3] * a[:, 4], b[:, 3] * b[:, 4]
    low = np.maximum((a[:, 2] - a[:, 5] / 2)[:, None], b[:, 2] - b[:, 5] / 2)
    high = np.minimum((a[:, 2] + a[:, 5] / 2)[:, None], b[:, 2] + b[:, 5] / 2)
    volume = want * np.maximum(high - low, 0)
    volumes = (area_a * a[:, 5])[:, None] + area_b * b[:, 5]
    got = jax.jit(lambda a, b: (bev_iou(a, b), iou_3d(a, b)))(a.astype(np.float32), b.astype(np.float32))
    # float32: coordinates up to 7, areas up to 36, about 30 sums of products.
    np.testing.assert_allclose(got[0], want / (area_a[:, None] + area_b - want), atol=1e-5)
    np.testing.assert_allclose(got[1], volume / (volumes - volume), atol=1e-5)


@pytest.mark.parametrize(
    ("other", "area"),
    [
        ((0, 0, 0, 4, 2, 1, 0), 8),  # itself
        ((0, 0, 0, 4, 2, 1, np.pi), 8),  # turned half around
        ((0, 0, 0, 2, 4, 1, np.pi / 2), 8),  # length and width exchanged
        ((2, 0, 0, 4, 2, 1, 0), 4),  # sides on one line
        ((4, 0, 0, 4, 2, 1, 0), 0),  # a side in common
        ((0, 0, 0, 1, 1, 1, np.pi / 4), 1),  # inside
        ((0, 0, 0, 40, 40, 1, 0.3), 8),  # around
        ((2, 1, 0, np.sqrt(2), np.sqrt(2), 1, np.pi / 4), 0.5),  # a diamond on a corner: a quarter of 2
        ((300, 200, 0, 4, 2, 1, 0.3), 0),  # far away
        ((1, 0, 0, 0, 0, 1, 0), 0),  # nothing
    ],
)
def test_overlaps_by_hand(other, area):
    box = jnp.asarray([0, 0, 0, 4, 2, 1, 0], jnp.float32)
    moved = jnp.asarray([50, -20, 0, 0, 0, 0, 0], jnp.float32)  # where boxes are does not matter
    other = jnp.asarray(other, jnp.float32)
    for one, two in [(box, other), (other, box), (box + moved, other + moved)]:
        # Coordinates up to 300 round to 2e-5, times sides of 4.
        np.testing.assert_allclose(intersection_area(one, two), area, atol=2e-4)


def greedy(boxes, scores, valid, conflict, count):
    """Indices kept, best first."""
    kept = []
    for i in np.argsort(-scores):
        if valid[i] and not any(conflict(boxes[j], boxes[i]) for j in kept):
            kept.append(i)
    return kept[:count]


# Compiled as one program, which is quicker than op by op.
compiled_suppress = jax.jit(suppress, static_argnums=1)


@pytest.mark.parametrize("kind", ["rotated", "circle"])
def test_suppression(kind):
    rng = np.random.default_rng(1)
    boxes = random_boxes(rng, 40)
    scores, classes = rng.permutation(40) / 40 + 0.01, rng.integers(-1, 3, 40)
    if kind == "circle":
        rule, conflict = Suppression(1.2, 40, 8, "circle"), lambda a, b: np.hypot(*(a - b)[:2]) <= 1.2
    else:
        rule = Suppression(0.15, 40, 8)

        def conflict(a, b):
            shared = clipped_area(a, b)
            return shared > 0.15 * (a[3] * a[4] + b[3] * b[4] - shared)

    want = greedy(boxes, scores, classes >= 0, conflict, 8)
    assert len(want) == 8  # more would be left
    assert want != [i for i in np.argsort(-scores) if classes[i] >= 0][:8]  # and something is suppressed
    found = Detections(jnp.asarray(boxes, jnp.float32), jnp.asarray(scores, jnp.float32), jnp.asarray(classes))
    got = compiled_suppress(found, rule)
    np.testing.assert_array_equal(got.boxes, boxes[want].astype(np.float32))
    np.testing.assert_array_equal(got.scores, scores[want].astype(np.float32))
    np.testing.assert_array_equal(got.classes, classes[want])


def test_only_the_best_candidates_are_looked_at_and_the_rest_is_padding():
    boxes = np.zeros((6, 7), np.float32)
    boxes[:, 0], boxes[:, 3:6] = [0, 10, 20, 30, 40, 50], 1
    found = Detections(boxes, np.linspace(0.1, 0.6, 6, dtype=np.float32), np.array([0, 1, 2, 3, -1, 0]))
    got = compiled_suppress(found, Suppression(0.1, 3, 3))
    assert got.classes.tolist() == [0, 3, 2]
    wide = compiled_suppress(found, Suppression(0.1, 100, 8))  # more than there are
    assert wide.classes.tolist() == [0, 3, 2, 1, 0, -1, -1, -1]
    assert wide.scores[5:].tolist() == [0, 0, 0]
    assert not wide.boxes[5:].any()
    with pytest.raises(ValueError, match="detections=5, candidates=4"):
        Suppression(0.1, 4, 5)
