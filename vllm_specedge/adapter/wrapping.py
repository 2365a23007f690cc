"""Wrapping of vLLM's functions, once per process."""

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_wrapped_by_specedge"


def wrap(owner: Any, name: str, wrapped_by: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrapped_by(owner.name)`, unless that was done before."""
    original = getattr(owner, name)
    if getattr(original, _MARK, None) is wrapped_by:
        return
    wrapper = wraps(original)(wrapped_by(original))
    setattr(wrapper, _MARK, wrapped_by)
    setattr(owner, name, wrapper)
