"""The class of a request, which determines its targets: by vLLM's priority, a header, or its API key.

Rule 1: if the operator's header or key determines the class, the request gets the priority of that class, whatever it
sets itself, as the engine only knows priorities. vLLM reads the priority from a header, which takes precedence over the
body; on some paths it only reads the body.
Rule 2: a body is read only if nothing else determines the class, and only up to MAX_BODY_BYTES. Only one number is
parsed from it, which takes some milliseconds at most, however long or deeply nested it is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from vllm_specedge.errors import UserError
from vllm_specedge.policy.slo import DEFAULT_CLASS

MAX_BODY_BYTES = 1 << 20
"""A longer body is not searched for a priority: it counts as of the default class."""
MAX_REWRITTEN_BYTES = 64 << 20
"""A longer body is refused if its class's priority must be written to it."""
PRIORITY_HEADER = b"x-vllm-priority"
"""vLLM's header (entrypoints/generate/base/serving.py)."""
PATHS_BY_HEADER = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""Paths that generate, on which vLLM reads this header."""
PATHS_BY_BODY = ("/v1/chat/completions/batch", "/inference/v1/generate", "/cohere/v2/chat")
"""Paths that generate, on which vLLM does not."""
Headers: TypeAlias = Sequence[tuple[bytes, bytes]]
Source: TypeAlias = Literal["priority", "header", "key"]


class _Asked(msgspec.Struct):
    """The only part of a body that is parsed."""

    priority: int = 0


_read = msgspec.json.Decoder(_Asked, strict=False).decode


@dataclass(frozen=True, slots=True)
class RequestClasses:
    """The classes of one server, and how a request's class is determined."""

    priorities: Mapping[str, int] = field(default_factory=dict)
    """vLLM's priority of each class, and of the default class if it has one."""
    source: Source = "priority"
    header: str = ""
    """Name of the header, in lower case."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """The class of each key, by its SHA-256 in hexadecimal digits."""

    @property
    def names(self) -> list[str]:
        """All classes, in a fixed order."""
        return [DEFAULT_CLASS, *sorted(self.priorities.keys() - {DEFAULT_CLASS})]

    def of_headers(self, path: str, headers: Headers) -> str | None:
        """The class of a request by its headers; None if only its body can tell."""
        match self.source:
            case "priority":
                with suppress(ValueError):
                    if path.endswith(PATHS_BY_HEADER):
                        return self._known(str(int(_value(headers, PRIORITY_HEADER))))
                length = _value(headers, b"content-length")
                return DEFAULT_CLASS if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES else None
            case "header":
                return self._known(_value(headers, self.header.encode()))
            case "key":
                scheme, _, key = _value(headers, b"authorization").partition(" ")
                digest = hashlib.sha256(key.encode("latin-1")).hexdigest() if scheme.lower() == "bearer" else ""
                return self._known(self.keys.get(digest, DEFAULT_CLASS))

    def with_priority(self, class_: str, headers: Headers) -> Headers:
        """The headers for vLLM of a request of this class."""
        if self.source == "priority":
            return headers
        priority = str(self.priorities.get(class_, 0)).encode()
        return [*(pair for pair in headers if pair[0] != PRIORITY_HEADER), (PRIORITY_HEADER, priority)]

    def of_body(self, body: bytes) -> str:
        """The class of a request by the priority in its body."""
        try:
            return self._known(str(_read(body).priority))
        except (ValueError, RecursionError):
            return DEFAULT_CLASS  # the application reports the error

    def _known(self, name: str) -> str:
        return name if name in self.priorities else DEFAULT_CLASS

    # -- the file that the API server's main process writes for the others --------------------------------------------

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, path: Path) -> "RequestClasses":
        """The classes in this file; those of a server without any if there is no such file."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError:
            return cls()


def _value(headers: Headers, name: bytes) -> str:
    """A header's first value, as Starlette reads it; empty if there is none. Header names are lower case in ASGI."""
    return next((value.decode("latin-1") for each, value in headers if each == name), "")


def with_priority(body: bytes, priority: int) -> bytes:
    """The body with this priority at its end: of two equal keys the last counts. A body that is no object stays."""
    encoding = json.detect_encoding(body)
    try:
        text = body.decode(encoding, "surrogatepass").rstrip(" \t\r\n")
    except UnicodeDecodeError:
        return body
    inner = text[:-1].rstrip(" \t\r\n")
    if text[-1:] != "}" or not inner.lstrip(" \t\r\n").startswith("{"):
        return body
    comma = "" if inner.strip(" \t\r\n") == "{" else ","
    return f'{inner}{comma}"priority":{priority}}}'.encode(encoding, "surrogatepass")


def read_key_groups(path: Path, classes: Mapping[str, int]) -> dict[str, str]:
    """The class of each API key by its hash, from a JSON file with lists of hashes by class. Raises UserError."""
    wanted = (
        f'slo_keys_file lists, by class, SHA-256 hashes of API keys: {{"{next(iter(classes), "gold")}": ["9f86d0..."]}}'
    )
    try:
        groups: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"slo_keys_file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{wanted}, and {path} does not.") from None
    if not isinstance(groups, dict) or not all(map(_is_group, groups.values())):
        raise UserError(f"{wanted}, and {path} does not.")
    unknown = groups.keys() - classes.keys()
    if unknown:
        raise UserError(f"slo_keys_file names the class '{min(unknown):.50}', which has no targets in slo.")
    return {digest.lower(): name for name, digests in groups.items() for digest in digests}


def _is_group(digests: Any) -> bool:
    return isinstance(digests, list) and all(
        isinstance(each, str) and len(each) == 64 and set(each.lower()) <= set("0123456789abcdef") for each in digests
    )
