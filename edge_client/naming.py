"""What `edge-client serve` changes in a request that it forwards: it adds the edge that may draft for it. Pure.

Rule 1: nothing else changes, not even how a number is written. Refusing invalid requests is the server's task.
Rule 2: every request that makes the server generate names an edge, if only NOBODY. Any pool edge may read a request
that names none.
"""

import ipaddress
import json
import re
from collections.abc import Collection
from contextlib import suppress
from email.message import Message
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from vllm_specedge import exact_json
from vllm_specedge.wire.request_fields import KEY, prediction_text

NOBODY = "nobody"
"""No edge has this session: gateways generate sessions from 192 random bits."""
ARGUMENTS = "vllm_xargs"
IN_JSON = frozenset({"chat/completions", "chat/completions/batch", "completions", "responses", "messages"})
"""Paths below /v1 that generate and take vLLM's extra arguments (`vllm_xargs`) in a JSON object."""
IN_FORMS = frozenset({"audio/transcriptions", "audio/translations"})
"""Paths below /v1 that generate and take the extra arguments in a multipart form."""
NAMED_PART = rb"\bname=\"?%b\"?\s*(;|\r|$)" % ARGUMENTS.encode()
WITHOUT_TOKENS = frozenset(
    {
        "cancel",
        "count_tokens",
        "derender",
        "detokenize",
        "embeddings",
        "load_lora_adapter",
        "pooling",
        "render",
        "rerank",
        "score",
        "tokenize",
        "unload_lora_adapter",
    }
)
"""Last parts of the paths that generate nothing, so that there is nothing to draft."""


def path_below(path: str) -> str | None:
    """A path below /v1, quoted for a URL; None if it has dot segments, in any quoting, that would lead elsewhere."""
    plain, before = path, ""
    while plain != before:
        plain, before = unquote(plain), plain
    if {".", ".."} & set(re.split(r"[/\\]", plain)):
        return None
    return quote(path, safe="/:@!$&'()*+,;=~")


def is_named(path: str) -> bool:
    """Whether requests to a path below /v1 can name an edge."""
    return path.strip("/") in IN_JSON | IN_FORMS


def is_generating(path: str) -> bool:
    """Whether a POST to a path below /v1 may make the server generate, as far as is known here."""
    return path.strip("/").rpartition("/")[2] not in WITHOUT_TOKENS


def with_session(path: str, kind: str, body: bytes, session: str) -> bytes:
    """The body of a request of content type `kind`, with the edge's session and the predicted output added to it.

    Arguments that the program gave itself take precedence. A body that cannot be parsed stays as it is.
    """
    try:
        match path.strip("/"):
            case name if name in IN_JSON:
                return _object_with_session(body, session)
            case name if name in IN_FORMS:
                return _form_with_session(kind, body, session)
    except (ValueError, RecursionError):
        pass
    return body


def _object_with_session(body: bytes, session: str) -> bytes:
    """Append the arguments at the end of the object: of two keys with the same name, the last counts."""
    encoding = json.detect_encoding(body)
    text = body.decode(encoding, "surrogatepass").rstrip(" \t\r\n")
    asked = exact_json.read(text)
    if not isinstance(asked, dict):
        return body
    more = {"specedge": session}
    if asked.get("prediction") is not None:
        with suppress(ValueError):  # the server refuses it
            more[KEY] = prediction_text(asked["prediction"])
    comma = ", " if asked else ""
    merged = _merged(more, asked.get(ARGUMENTS))
    return f'{text[:-1]}{comma}"{ARGUMENTS}": {merged}}}'.encode(encoding, "surrogatepass")


def _form_with_session(kind: str, body: bytes, session: str) -> bytes:
    """Add the arguments as the first part of the form."""
    header = Message()
    header["content-type"] = kind
    boundary = header.get_param("boundary")
    if header.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        return body
    line = f"\r\n--{boundary}".encode()
    preamble, *parts = (b"\r\n" + body).split(line)
    own = [part for part in parts if re.search(NAMED_PART, part.partition(b"\r\n\r\n")[0])]
    given = exact_json.read(own[-1].partition(b"\r\n\r\n")[2].decode()) if own else None
    head = f'\r\nContent-Disposition: form-data; name="{ARGUMENTS}"\r\n\r\n'
    first = (head + _merged({"specedge": session}, given)).encode()
    if not parts:
        return body
    return line.join([preamble, first, *(part for part in parts if part not in own)]).removeprefix(b"\r\n")


def _merged(more: dict[str, Any], given: Any) -> str:
    """The arguments of both; `given` takes precedence over `more`. Raises ValueError if `given` is not an object."""
    if not isinstance(given or {}, dict):
        raise ValueError(given)
    return exact_json.write({**more, **(given or {})})


def is_own_name(header: str, is_opened: bool, names: Collection[str]) -> bool:
    """Whether a Host header names this endpoint. `names`: the host names that its user allows, * for any.

    A web page that points its own name here (DNS rebinding) sends that name, never an IP address. IP addresses other
    than loopback are accepted only if the user has opened the endpoint to other machines (`is_opened`).
    """
    try:
        host = (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if "*" in names or host == "localhost" or host in {name.lower() for name in names}:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or is_opened
    except ValueError:
        return False


def own_location(location: str, server_url: str) -> str:
    """The target of a redirect, with the server's /v1 replaced by this endpoint's."""
    there, server = urlsplit(location), urlsplit(server_url)
    base = server.path.rstrip("/") + "/"
    is_below = there.path.startswith(base) and there.netloc in ("", server.netloc)
    if not is_below:
        return location
    return there._replace(scheme="", netloc="", path=f"/v1/{there.path.removeprefix(base)}").geturl()
