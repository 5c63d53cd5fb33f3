"""Boxes with a heading: intersection over union from above and in space, and the suppression of duplicates.

A box is (x, y, z, length, width, height, heading), in metres and radians: its centre, its extents along its own axes,
and the angle from the x axis to its length, counter-clockwise. More columns, such as velocity, may follow.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

# Stands for the extent of an edge along an axis that it does not change on.
_FLAT = 1e-12


@functools.partial(jax.tree_util.register_dataclass, data_fields=["boxes", "scores", "classes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Detections:
    """Boxes found, best first.

    Attributes:
      boxes: float32 [..., K, 7 or 9].
      scores: float32 [..., K] in [0, 1]; 0 where there is no detection.
      classes: int32 [..., K]; -1 where there is no detection.
    """

    boxes: Any
    scores: Any
    classes: Any


@dataclasses.dataclass(frozen=True)
class Suppression:
    """How duplicates go: of two detections in conflict the one with the lower score.

    Attributes:
      kind: "rotated": in conflict are boxes whose intersection over union, seen from above, is above the threshold.
        "circle": boxes whose centres are, seen from above, not further apart than the threshold in metres.
      threshold: see there.
      candidates: detections of the highest scores that are looked at.
      detections: how many are kept at most.
    """

    threshold: float
    candidates: int
    detections: int
    kind: Literal["rotated", "circle"] = "rotated"

    def __post_init__(self):
        if not 0 < self.detections <= self.candidates:
            raise ValueError(
                f"Suppression: detections={self.detections}, candidates={self.candidates}; wanted 0 < detections <= "
                "candidates."
            )


def intersection_area(a, b):
    """The area that two boxes share, seen from above.

    In the frame of b, where it is the rectangle |x| <= w, |y| <= h, Green's theorem gives the area as the integral of
    1[|y| <= h] (clip(x, -w, w) + w) dy around a: a sum over the edges of a, each cut where it leaves the bounds and
    integrated exactly. Nothing is sorted or counted twice, so coinciding edges and corners are no special case.

    Args:
      a, b: float32 [..., 7 or more], of shapes that broadcast but for the last axis.
    Returns:
      float32 [...], square metres.
    """
    turn, heading = a[..., 6] - b[..., 6], b[..., 6]
    away_x, away_y = a[..., 0] - b[..., 0], a[..., 1] - b[..., 1]
    centre_x = away_x * jnp.cos(heading) + away_y * jnp.sin(heading)
    centre_y = away_y * jnp.cos(heading) - away_x * jnp.sin(heading)
    along = a[..., 3, None] / 2 * jnp.asarray([1, -1, -1, 1])  # corners, counter-clockwise
    across = a[..., 4, None] / 2 * jnp.asarray([1, 1, -1, -1])
    cos, sin = jnp.cos(turn)[..., None], jnp.sin(turn)[..., None]
    x = centre_x[..., None] + along * cos - across * sin  # [..., 4]
    y = centre_y[..., None] + along * sin + across * cos
    dx, dy = jnp.roll(x, -1, -1) - x, jnp.roll(y, -1, -1) - y
    width, height = b[..., 3, None] / 2, b[..., 4, None] / 2

    def bounds(start, step, limit, first, last):
        """Where an edge enters and leaves |coordinate| <= limit, as shares of it, within [first, last]."""
        step = jnp.where(jnp.abs(step) < _FLAT, _FLAT, step)
        one, other = (-limit - start) / step, (limit - start) / step
        return jnp.clip(jnp.minimum(one, other), first, last), jnp.clip(jnp.maximum(one, other), first, last)

    def reach(share):
        return jnp.clip(x + share * dx, -width, width) + width

    first, last = bounds(y, dy, height, 0.0, 1.0)
    enter, leave = bounds(x, dx, width, first, last)
    pieces = [(first, enter), (enter, leave), (leave, last)]  # on each of them the integrand is linear
    integral = sum((end - begin) * (reach(begin) + reach(end)) for begin, end in pieces)
    return jnp.maximum((integral * dy).sum(-1) / 2, 0)


def bev_iou(a, b):
    """Intersection over union seen from above, [N, 7 or more] and [M, 7 or more] -> [N, M]."""
    shared = intersection_area(a[:, None], b[None])
    return shared / jnp.maximum(_area(a)[:, None] + _area(b)[None] - shared, _FLAT)


def iou_3d(a, b):
    """Intersection over union of the volumes, [N, 7 or more] and [M, 7 or more] -> [N, M]."""
    top = jnp.minimum(*((box[..., 2] + box[..., 5] / 2) for box in (a[:, None], b[None])))
    bottom = jnp.maximum(*((box[..., 2] - box[..., 5] / 2) for box in (a[:, None], b[None])))
    shared = intersection_area(a[:, None], b[None]) * jnp.maximum(top - bottom, 0)
    union = (_area(a) * a[:, 5])[:, None] + (_area(b) * b[:, 5])[None] - shared
    return shared / jnp.maximum(union, _FLAT)


def _area(boxes):
    return boxes[..., 3] * boxes[..., 4]


def suppress(found: Detections, rule: Suppression) -> Detections:
    """The detections of one sample without duplicates, whatever their classes: [K] -> [rule.detections].

    From the highest score to the lowest, a detection is kept unless it is in conflict with one that was kept.
    """
    count = min(rule.candidates, found.scores.shape[0])
    scores, order = jax.lax.top_k(jnp.where(found.classes >= 0, found.scores, -1.0), count)
    boxes = found.boxes[order]
    if rule.kind == "rotated":
        conflict = bev_iou(boxes, boxes) > rule.threshold
    else:
        apart = jnp.square(boxes[:, None, :2] - boxes[None, :, :2]).sum(-1)
        conflict = apart <= rule.threshold**2

    def visit(i, kept):
        return kept & ~(conflict[i] & kept[i] & (jnp.arange(count) > i))

    kept = jax.lax.fori_loop(0, count, visit, scores >= 0)
    best = jnp.argsort(~kept, stable=True)[: rule.detections]
    missing = rule.detections - best.shape[0]
    there = jnp.pad(kept[best], (0, missing))
    return Detections(
        jnp.where(there[:, None], jnp.pad(boxes[best], ((0, missing), (0, 0))), 0),
        jnp.where(there, jnp.pad(scores[best], (0, missing)), 0),
        jnp.where(there, jnp.pad(found.classes[order][best], (0, missing)), -1),
    )
