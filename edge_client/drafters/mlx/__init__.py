"""Models in MLX, the runtime for Apple silicon, as drafts."""
