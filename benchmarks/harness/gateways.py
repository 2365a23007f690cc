"""A gateway by itself, with an engine's end of its link but no vLLM; measurements of its frames."""

import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import trustme
from certificates import write_certificate
from stack import BIN, Process, start

from harness.light_edge import AUTHORITY
from harness.servers import free_ports
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.wire.engine_frames import EngineHello
from vllm_specedge.wire.frames import PROTOCOL_VERSION

VOCAB_SIZE = 1 << 22
START_LIMIT_S = 60.0


@contextmanager
def gateway(directory: Path, *arguments: str) -> Iterator[tuple[Process, str, EngineLink]]:
    """A real gateway, its address (host and port), and an engine's end of the link that it has accepted."""
    endpoint, listen = f"ipc://{directory}/engines", f"127.0.0.1:{free_ports(1)[0]}"
    command = [str(BIN / "vllm-specedge"), "gateway", "--engines", endpoint, "--listen", listen, *arguments]
    process, is_welcome = start(command, directory / "gateway.log"), threading.Event()
    engine = EngineLink(endpoint, EngineHello(PROTOCOL_VERSION, "bench", "", VOCAB_SIZE), is_welcome.set, lambda: ())
    engine.start()
    try:
        if not is_welcome.wait(START_LIMIT_S):
            raise process.fail("the gateway does not accept an engine")
        yield process, listen, engine
    finally:
        engine.stop()
        process.stop()


def tls(directory: Path) -> tuple[list[str], ssl.SSLContext]:
    """A gateway's options for TLS, and a client's context that trusts it."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    return write_certificate(directory, authority, AUTHORITY), context


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(seconds, (50, 99))
    return 1e3 * float(p50), 1e3 * float(p99)
