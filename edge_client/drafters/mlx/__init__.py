"""Draft models in MLX, the runtime for Apple silicon."""
