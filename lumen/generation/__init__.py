"""Image generation: tokenizers and the models that predict their codes."""
