"""Tests on a real vLLM. Workers of xdist that share them have a core each for their servers, and leave
nothing behind."""

import os
import subprocess
import sys

from tests.ports import WORKER


def put_servers_on_a_core() -> None:
    """One of this worker's own, before anybody asks for it."""
    cores = sorted(os.sched_getaffinity(0))
    first = WORKER % len(cores)
    os.environ["SPECEDGE_CORES"] = ",".join(map(str, cores[first:] + cores[:first]))


def end_with_what_was_started() -> "subprocess.Popen[bytes]":
    """Whatever ends this process, somebody sees its pipe closed, and ends its group of processes."""
    os.setpgid(0, 0)
    watch = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"
    command, closed = [sys.executable, "-c", watch, str(os.getpid())], subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=closed, stderr=closed, start_new_session=True)


if "PYTEST_XDIST_WORKER" in os.environ:
    put_servers_on_a_core()
    _WATCHED = end_with_what_was_started()
