"""One table per model: original tensor name, our path, and how the axes move."""
