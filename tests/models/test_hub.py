"""Drafts from a hub: a small local server implements the necessary part of its API."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_client.drafters.hub import is_hub_name, model_name
from tests.ports import free_port
from tests.processes.gateways import BIN

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights again",
    "small.Q4.gguf": b"GGUF and nothing that could be drafted with",
}


class Hub(BaseHTTPRequestHandler):
    """One repository, owner/draft."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = path.removeprefix("/owner/draft/resolve/").partition("/")[2]
        status, headers = 200, {"X-Repo-Commit": COMMIT}
        if path.startswith("/owner/draft/resolve/") and file in FILES:
            body = FILES[file]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        elif path.startswith("/api/models/owner/draft/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in FILES.items()
            ]
            body = json.dumps(entries).encode()
        elif path.startswith("/api/models/owner/draft"):
            names = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "owner/draft", "sha": COMMIT, "siblings": names}).encode()
        else:
            status, body = 404, b"{}"
            headers["X-Error-Code"] = "RepoNotFound" if path.startswith("/api/") else "EntryNotFound"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(command: list[str], hub: str, cache: Path) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**clean, "HF_ENDPOINT": hub, "HF_HOME": str(cache)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def fetch(draft: str, hub: str, cache: Path) -> Path:
    code = f"from edge_client.drafters.hub import fetch; print(fetch({draft!r}, is_quiet=True))"
    done = run([sys.executable, "-c", code], hub, cache)
    assert done.returncode == 0, done.stderr
    assert "%" not in done.stderr, "no bar"
    return Path(done.stdout.strip())


def test_a_model_is_fetched_once_with_one_kind_of_weights(hub: str, tmp_path: Path) -> None:
    directory = fetch("owner/draft", hub, tmp_path)
    assert {file.name for file in directory.iterdir()} == {"config.json", "model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert model_name(directory) == "owner/draft"
    assert fetch("owner/draft", f"http://127.0.0.1:{free_port()}", tmp_path) == directory, "it needs no hub any more"


def test_one_file_is_fetched_by_its_name(hub: str, tmp_path: Path) -> None:
    file = fetch("hf:owner/draft/small.Q4.gguf", hub, tmp_path)
    assert file.name == "small.Q4.gguf"
    assert file.read_bytes() == FILES["small.Q4.gguf"]


@pytest.mark.parametrize("quiet", [True, False])
def test_the_client_fetches_and_shows_a_bar_unless_quiet(hub: str, tmp_path: Path, quiet: bool) -> None:
    command = [str(BIN / "edge-client"), "connect", "http://127.0.0.1:1", "--draft", "owner/draft"]
    done = run([*command, *(["--quiet"] if quiet else [])], hub, tmp_path)
    assert done.returncode == 2
    assert "has no model that transformers can load" in done.stderr
    assert ("Fetching 2 files: 100%" in done.stderr) == (not quiet)
    assert not quiet or done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("draft", "is_there", "sentence"),
    [
        (
            "owner/draft",
            False,
            "is not on this machine and no model hub can be reached: name a local draft",
        ),
        ("owner/none", True, "'owner/none' cannot be fetched (404"),
        ("hf:owner/draft/none.gguf", True, "cannot be fetched (404"),
        ("hf:owner/draft", True, "names no file: write hf:OWNER/NAME/FILE.gguf."),
        ("-owner-/draft--", True, "is not a name on the hub: write OWNER/NAME."),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(
    hub: str, tmp_path: Path, draft: str, is_there: bool, sentence: str
) -> None:
    url = hub if is_there else f"http://127.0.0.1:{free_port()}"
    command = [str(BIN / "edge-client"), "connect", "http://127.0.0.1:1", "--quiet", f"--draft={draft}"]
    done = run(command, url, tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.startswith("edge-client: ")
    assert done.stderr.count("\n") == 1


def test_what_is_on_this_machine_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "draft").mkdir(parents=True)
    assert not is_hub_name("owner/draft")
    assert is_hub_name("owner/other")
    assert is_hub_name("hf:owner/draft/file.gguf")
    for place in ("/owner/draft", "./owner/draft", "a/b/c", "draft.gguf", "ngram"):
        assert not is_hub_name(place)
    assert model_name(tmp_path / "owner" / "draft") == "draft"
