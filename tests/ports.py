"""Ports for what a test starts."""

import os
import socket
from contextlib import suppress
from itertools import cycle, islice

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Which of the processes that share the tests this is."""
FIRST, PER_WORKER = 10_000, 1000
_ports = cycle(range(FIRST + WORKER * PER_WORKER, FIRST + (WORKER + 1) * PER_WORKER))


def free_port() -> int:
    """A port at which nobody listens.

    It is this worker's own, and below those that the kernel gives to whoever connects: what is started may take half a
    minute until it listens, and nothing is to take the port meanwhile.
    """
    for port in islice(_ports, PER_WORKER):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
