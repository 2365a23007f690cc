"""Hugging Face models as draft models."""
