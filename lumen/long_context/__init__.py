"""Long context: which heads need all of it, and attention to parts of it."""
