"""Locality-aware Parallel Decoding (LPD), arXiv:2507.01957."""

from lumen.generation.lpd.generate import Sampling, edit_codes, generate_codes, generate_images, plan_segments
from lumen.generation.lpd.model import LPD, LPDConfig, lpd_loss, resize_positions, training_mask

__all__ = [
    "LPD",
    "LPDConfig",
    "Sampling",
    "edit_codes",
    "generate_codes",
    "generate_images",
    "lpd_loss",
    "plan_segments",
    "resize_positions",
    "training_mask",
]
