"""Start of an engine's link to a gateway, and of the gateway itself unless one already runs."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_specedge.config import MAX_SOCKET_PATH_BYTES, EdgeOptions, parse_options
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.engine.gateway_process import GatewayProcess
from vllm_specedge.errors import UserError
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import EngineHello
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint
from vllm_specedge.wire.frames import MAX_TEXT_BYTES, PROTOCOL_VERSION
from vllm_specedge.wire.vocabulary import pack_vocabulary

logger = logging.getLogger("vllm.specedge.start")

ENDPOINT_VARIABLE = "SPECEDGE_ENDPOINT"
"""The endpoint between the engines of one `vllm serve` and their gateway; set by the API server, inherited by engines.
"""


SHORT_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - a private new directory is made there
"""Directories for the socket if the path of the temporary directory is too long."""


def new_endpoint() -> str:
    """A socket that only this user can access, with a path of allowed length. Raises UserError."""
    for directory in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), *SHORT_DIRECTORIES):
        # As long as the names that mkdtemp makes, with eight random letters.
        if directory and len(os.fsencode(Path(directory) / "specedge-12345678" / "engines")) <= MAX_SOCKET_PATH_BYTES:
            with suppress(OSError):
                return f"ipc://{Path(tempfile.mkdtemp(prefix='specedge-', dir=directory)) / 'engines'}"
    raise UserError("There is no place for the engines' socket: set TMPDIR to a directory with a short name.")


def engine_options(vllm_config: Any) -> EdgeOptions:
    """Our options in additional_config, where the front end puts them; the defaults if there are none."""
    values = (vllm_config.additional_config or {}).get("specedge", {})
    return parse_options(values)


def start_link(
    vllm_config: Any,
    options: EdgeOptions,
    tokenizer: Any,
    wake: Callable[[], None],
    stats: Callable[[], Iterable[Frame]],
) -> tuple[EngineLink | None, GatewayProcess | None]:
    """Start the link and, on the first data-parallel rank, the gateway."""
    model = vllm_config.model_config
    name = model.served_model_name or model.model
    name = name[0] if isinstance(name, list) else name
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    hello = EngineHello(
        version=PROTOCOL_VERSION,
        model=name.encode()[-MAX_TEXT_BYTES:].decode(errors="ignore"),
        fingerprint=vocabulary_fingerprint(vocabulary) if vocabulary else "",
        vocab_size=model.get_vocab_size(),
    )
    endpoint = options.gateway or os.environ.get(ENDPOINT_VARIABLE) or new_endpoint()
    is_first = vllm_config.parallel_config.data_parallel_index == 0
    process = None
    if is_first and not options.gateway:
        process = GatewayProcess(options.of_gateway(), endpoint)
        process.start()
    link = EngineLink(endpoint, hello, wake, stats, pack_vocabulary(vocabulary) if vocabulary else b"")
    link.start()
    return link, process
