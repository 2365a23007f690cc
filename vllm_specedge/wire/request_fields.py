"""Fields of a request's JSON that are read here: OpenAI's `prediction`, and where it goes in `vllm_xargs`. Pure."""

from typing import Any

KEY = "specedge_prediction"
"""Of `vllm_xargs`: where a prediction travels to the engine, as text or token ids."""


def take_prediction(asked: dict[str, Any]) -> str:
    """The text that is predicted, empty if there is none; it goes to where the engine reads it. Raises ValueError."""
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
    """What OpenAI's `prediction` field says. Raises ValueError with a sentence."""
    content = given.get("content") if isinstance(given, dict) and given.get("type") == "content" else None
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError('prediction must be {"type": "content", "content": a text, or a list of parts of type \'text\'}.')


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
