"""Measures of quality and speed, each with the protocol it reproduces."""
