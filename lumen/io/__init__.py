"""Checkpoints, published weights and data, in and out."""


class DataError(ValueError):
    """Data that cannot be used: damaged, or in another format. The message names the file."""
