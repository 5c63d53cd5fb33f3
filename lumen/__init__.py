"""lumen: efficient multimodal AI in JAX."""
