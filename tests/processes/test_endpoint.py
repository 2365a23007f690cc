"""The endpoint between engines and their gateway, for any directory of temporary files."""

import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from tests.processes.gateways import DEADLINE_S, failing, running_gateway
from vllm_specedge.adapter.start import new_endpoint
from vllm_specedge.config import MAX_SOCKET_PATH_BYTES, parse_options
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.engine_socket import EngineSocket
from vllm_specedge.wire.engine_frames import EngineHello
from vllm_specedge.wire.frames import PROTOCOL_VERSION


@pytest.fixture
def long_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR as long as on batch systems and macOS."""
    directory = tmp_path / ("scratch-of-a-batch-job-" * 5)
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


def meet(endpoint: str) -> Path:
    """Bind to the endpoint like a gateway; returns its directory."""
    EngineSocket(endpoint, lambda engine, data: None).close()
    directory = Path(endpoint.removeprefix("ipc://")).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    shutil.rmtree(directory)
    return directory


def test_it_lies_with_other_temporary_files_where_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    assert meet(new_endpoint()).parent == short
    shutil.rmtree(short)


def test_where_their_directory_s_name_is_too_long_another_is_taken(long_directory: Path) -> None:
    assert long_directory not in meet(new_endpoint()).parents


def test_the_user_s_own_directory_comes_before_the_common_one(
    long_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert meet(new_endpoint()).parent == runtime
    shutil.rmtree(runtime)
    assert meet(new_endpoint()).parent != runtime  # it is gone: another one


def test_where_there_is_no_short_one_a_sentence_says_what_to_set(
    long_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("vllm_specedge.adapter.start.SHORT_DIRECTORIES", (str(long_directory), "/nowhere"))
    with pytest.raises(UserError, match="set TMPDIR to a directory with a short name"):
        new_endpoint()


@pytest.mark.parametrize("letter", ["x", "é"])
def test_an_endpoint_that_is_too_long_is_one_sentence(letter: str) -> None:
    path = "/tmp/" + letter * ((MAX_SOCKET_PATH_BYTES - 5) // len(letter.encode()))
    parse_options({"gateway": f"ipc://{path}"})
    with pytest.raises(UserError, match="at most"):
        parse_options({"gateway": f"ipc://{path}{letter}"})
    assert "at most" in failing("vllm-specedge", "gateway", "--engines", f"ipc://{path}{letter}")


def test_the_longest_endpoint_that_is_taken_can_be_bound(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    path = str(directory / "x")
    path += "x" * (MAX_SOCKET_PATH_BYTES - len(os.fsencode(path)))
    EngineSocket(f"ipc://{path}", lambda engine, data: None).close()
    shutil.rmtree(directory)


def test_an_engine_that_no_gateway_answers_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And it accepts one that answers later."""
    monkeypatch.setattr("vllm_specedge.engine.gateway_link._UNANSWERED_S", -1.0)
    monkeypatch.setattr("vllm_specedge.engine.gateway_link._BEAT_S", 0.05)
    arrived, num_beats, has_beaten = threading.Event(), 0, threading.Event()
    link = EngineLink(
        f"ipc://{tmp_path}/engines", EngineHello(PROTOCOL_VERSION, "toy", "f", 9), arrived.set, lambda: ()
    )
    post = link._post

    def counted(data: bytes) -> None:
        nonlocal num_beats
        post(data)
        num_beats += 1
        if num_beats > 3:
            has_beaten.set()

    monkeypatch.setattr(link, "_post", counted)
    link.start()
    try:
        assert has_beaten.wait(DEADLINE_S)
        assert caplog.text.count("No gateway answers at ipc://") == 1
        with running_gateway(tmp_path):
            assert arrived.wait(DEADLINE_S)
        assert link.num_welcomes == 1
    finally:
        link.stop()
