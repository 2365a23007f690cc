"""vLLM 0.33 for these tests: `python -m tests.vllm_v2.unpack_vllm DIRECTORY`.

There is no build of it for CPUs. Its Python code runs with the libraries of the installed CPU build, because the V2
runner's kernels run in Triton's interpreter here. If the wheel is not available, the tests run with the installed vLLM.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

VERSION = "0.33.0"
LIMIT_S = 900.0


def unpack(directory: Path) -> None:
    """Put vLLM's Python into a directory, with the libraries of the installed one."""
    installed = find_spec("vllm")
    assert installed is not None
    assert installed.origin is not None
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*command, f"vllm=={VERSION}"], check=True, timeout=LIMIT_S)
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            wheel.extractall(unfinished, names)
    for library in Path(installed.origin).parent.glob("*.so"):
        (unfinished / "vllm" / library.name).symlink_to(library)
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)


if __name__ == "__main__":
    try:
        unpack(Path(sys.argv[1]))
    except (subprocess.SubprocessError, OSError) as error:
        print(
            f"vLLM {VERSION} cannot be had ({error}): the V2 runner is tested with what is installed.", file=sys.stderr
        )
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
