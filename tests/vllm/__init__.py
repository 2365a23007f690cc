"""Tests of real vLLM servers. Of several test processes, each has its own cores, for its servers and edges as well."""

import os

from tests.ports import WORKER

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before examples/stack.py is imported, which divides the cores. Two servers on two shared cores would wait for each
    # other in every step.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[WORKER :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or _cores)
