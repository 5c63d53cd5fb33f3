"""Checkpoints and published weights, in and out."""
