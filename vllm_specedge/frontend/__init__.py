"""ASGI middlewares of vLLM's API server."""
