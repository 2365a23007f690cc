"""OpenAI's `prediction` field of a request's JSON, and its place in `vllm_xargs`. Pure."""

from typing import Any

KEY = "specedge_prediction"
"""The key in `vllm_xargs` that carries a prediction to the engine, as text or token ids."""


def take_prediction(asked: dict[str, Any]) -> str:
    """Move a request's prediction to where the engine reads it. Returns its text, empty if there is none. Raises
    ValueError."""
    given = asked.pop("prediction", None)
    others = asked.get("vllm_xargs")
    if given is None:
        said = others.get(KEY) if isinstance(others, dict) else None
        return said if isinstance(said, str) else ""
    text = prediction_text(given)
    if others is None or isinstance(others, dict):
        asked["vllm_xargs"] = {KEY: text, **(others or {})}
    return text


def prediction_text(given: object) -> str:
    """The text in OpenAI's `prediction` field. Raises ValueError with a sentence."""
    content = given.get("content") if isinstance(given, dict) and given.get("type") == "content" else None
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError('prediction must be {"type": "content", "content": a text, or a list of parts of type \'text\'}.')


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
