"""Two workers share a model (tensor parallelism): each writes the same drafts, and tokens are plain vLLM's."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .engines import WAYS

LIMIT_S = 600.0


def test_tensor_parallelism(model: Path) -> None:
    # Compiled functions need a real Triton.
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.vllm_v2.two_ranks", str(model)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["edge"] == dict.fromkeys(WAYS, said["plain"])
    assert said["num_accepted"] > 10
