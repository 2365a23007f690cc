"""The corpus that fuzzing has found (tests/fuzz) still passes."""

import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"


@pytest.mark.parametrize("target", ["frames", "session", "driver"])
def test_the_corpus_passes(target: str) -> None:
    files = sorted(str(path) for path in (CORPUS / target).iterdir())
    assert len(files) > 10
    command = [sys.executable, "-m", "tests.fuzz.fuzz", target, *files]
    done = subprocess.run(command, cwd=CORPUS.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
