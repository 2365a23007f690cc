"""Ports for what a test starts."""

import os
import socket
from contextlib import suppress
from itertools import cycle, islice
from zlib import crc32

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Which of the processes that share the tests this is."""
RUN = crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())).encode())
"""Which of the runs of tests on this machine."""
FIRST, PER_WORKER, WORKERS, RUNS = 10_000, 1000, 2, 10
_first = FIRST + (RUN % RUNS * WORKERS + WORKER % WORKERS) * PER_WORKER
_ports = cycle(range(_first, _first + PER_WORKER))


def free_port() -> int:
    """A port at which nobody listens.

    It is this worker's own, most probably also among several runs on one machine, and below those that the kernel gives
    to whoever connects: what is started may take half a minute until it listens, and nothing is to take the port
    meanwhile.
    """
    for port in islice(_ports, PER_WORKER):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
