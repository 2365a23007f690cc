"""Contents of the wheel and of the source distribution."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path, PurePosixPath

import vllm_specedge

PACKAGES = {"vllm_specedge", "edge_client"}
PAGE = {f"vllm_specedge/gateway/page/{name}" for name in ("index.html", "page.css", "page.js")}
TYPED = {f"{package}/py.typed" for package in PACKAGES}
MAX_BYTES = 1_000_000
"""Largest size of either: no weights, no pictures."""


def wheel(dist: Path) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    assert path.stat().st_size < MAX_BYTES
    return zipfile.ZipFile(path)


def metadata(dist: Path) -> dict[str, list[str]]:
    with wheel(dist) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        message = message_from_string(files.read(name).decode())
    return {key: message.get_all(key, []) for key in message.keys()}  # noqa: SIM118 - a message is no mapping


def test_the_wheel_has_the_packages_and_nothing_else(dist: Path) -> None:
    with wheel(dist) as files:
        names = {name for name in files.namelist() if not name.endswith("/")}
    ours = {name for name in names if ".dist-info/" not in name}
    assert {PurePosixPath(name).parts[0] for name in ours} == PACKAGES
    assert {name for name in ours if not name.endswith(".py")} == PAGE | TYPED
    root = Path(vllm_specedge.__file__).parent.parent
    in_tree = {path.relative_to(root).as_posix() for package in PACKAGES for path in (root / package).rglob("*.py")}
    assert {name for name in ours if name.endswith(".py")} == in_tree


def test_the_wheel_says_what_it_is(dist: Path) -> None:
    said = metadata(dist)
    assert said["Version"] == [vllm_specedge.__version__]
    assert said["License-Expression"] == ["Apache-2.0"]
    assert said["License-File"] == ["LICENSE"]
    assert "Typing :: Typed" in said["Classifier"]
    with wheel(dist) as files:
        (name,) = [name for name in files.namelist() if name.endswith("entry_points.txt")]
        entry_points = files.read(name).decode()
    for line in ("edge-client = edge_client.cli:main", "specedge = vllm_specedge.adapter.plugin:register"):
        assert line in entry_points


def test_an_index_takes_both(dist: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_source_distribution_has_what_the_wheel_is_built_from_and_documents(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    assert path.stat().st_size < MAX_BYTES
    with tarfile.open(path) as files:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix() for name in files.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "docs/protocol.md", *PAGE, *TYPED} <= names
    assert not {name for name in names if PurePosixPath(name).parts[0] in ("tests", "benchmarks", "examples", "deploy")}
    with wheel(dist) as files:
        of_wheel = {name for name in files.namelist() if name.endswith(".py")}
    assert {name for name in names if name.endswith(".py")} == of_wheel
