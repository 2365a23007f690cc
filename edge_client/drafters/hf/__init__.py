"""Models of transformers as drafts."""
