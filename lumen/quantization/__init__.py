"""Post-training quantisation: calibration, search and packing of weights."""
