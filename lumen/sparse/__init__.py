"""Sparse tensors and the networks on them."""
