"""Ports for the processes that a test starts."""

import os
import socket
from contextlib import suppress
from itertools import cycle, islice
from zlib import crc32

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Index of this test worker."""
RUN = crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())).encode())
"""Identifies this test run among others on this machine."""
FIRST, PER_WORKER, WORKERS, RUNS = 10_000, 1000, 2, 10
_first = FIRST + (RUN % RUNS * WORKERS + WORKER % WORKERS) * PER_WORKER
_ports = cycle(range(_first, _first + PER_WORKER))


def free_port() -> int:
    """A free port.

    It is reserved for this worker, most probably also among several runs on one machine, and below the kernel's range
    for outgoing connections: a process may take half a minute until it listens, and no other must take the port before.
    """
    for port in islice(_ports, PER_WORKER):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
