"""Kernels for quantised, sparse and long-context models; depends on jax and numpy only."""
