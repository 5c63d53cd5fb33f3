"""Pictures of many images."""

import numpy as np


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Lays uint8 images [B, H, W, 3] out in rows of `columns` on white, `gap` pixels apart."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas
