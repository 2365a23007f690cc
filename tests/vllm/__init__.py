"""Tests on a real vLLM. Workers of xdist that share them have a core each, and leave nothing behind."""

import os
import subprocess
import sys

from tests.ports import WORKER


def keep_to_one_core() -> None:
    """This process and all that it starts, before anybody asks how many cores there are: threads of several servers
    that wait for each other on the same cores do so in loops, and take several times as long."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[WORKER % len(cores)]})


def end_with_what_was_started() -> "subprocess.Popen[bytes]":
    """Whatever ends this process, somebody sees its pipe closed, and ends its group of processes."""
    os.setpgid(0, 0)
    watch = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"
    command, closed = [sys.executable, "-c", watch, str(os.getpid())], subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=closed, stderr=closed, start_new_session=True)


if "PYTEST_XDIST_WORKER" in os.environ:
    keep_to_one_core()
    _WATCHED = end_with_what_was_started()
