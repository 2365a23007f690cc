"""The fault matrix on real processes, in short; all of it is `make test-faults`."""

import os
import subprocess
import sys

from tests.faults.matrix import SHORT
from tests.ports import free_port

from .conftest import ROOT

LIMIT_S = 420


def test_the_fault_matrix_in_short() -> None:
    port, _ = free_port(), free_port()  # its gateway has the next
    command = [sys.executable, "-m", "tests.faults.matrix", "--short", "--port", str(port)]
    path = os.pathsep.join(filter(None, [str(ROOT / "examples"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.endswith("| ok |")]
    assert [row.split()[1] for row in rows] == list(SHORT)
