"""The user's file of options, and what takes precedence over it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from edge_client.cli import app
from edge_client.settings import Kind, folder, kind_of, options_of
from tests.ports import free_port
from tests.processes.gateways import BIN
from vllm_specedge.errors import UserError

NAMES = {"connect": {"url", "draft", "max_requests"}, "serve": {"url", "draft", "port"}}
FILE = Path("edge.toml")


def test_a_tables_keys_come_before_those_of_all() -> None:
    values = {"url": "u", "draft": "a", "port": 1, "serve": {"draft": "b"}, "connect": {"max-requests": 3}}
    assert options_of("connect", values, NAMES, FILE) == {"url": "u", "draft": "a", "max_requests": 3}
    assert options_of("serve", values, NAMES, FILE) == {"url": "u", "draft": "b", "port": 1}
    assert values["serve"] == {"draft": "b"}


def test_a_tilde_is_the_home_folder() -> None:
    assert options_of("connect", {"draft": "~/a.gguf"}, NAMES, FILE) == {"draft": str(Path.home() / "a.gguf")}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"speed": 1}, "In edge.toml, there is no option speed"),
        ({"connect": {"port": 1}}, r"In edge.toml, \[connect\], there is no option port"),
        ({"serve": {"max_requests": 1}}, r"In edge.toml, \[serve\], there is no option max_requests"),
        ({"fly": {}}, r"there is no command \[fly\]: tables are connect, serve"),
        ({"api-key": "x"}, "put it into its own file, and set api_key_file to that file"),
        ({"serve": {"token": "x"}}, "token would be a secret in the clear"),
    ],
)
def test_what_no_command_knows_is_said(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        options_of("connect", values, NAMES, FILE)


def test_kinds_are_those_of_the_command_line() -> None:
    assert kind_of(Annotated[int | None, typer.Option(min=0)]) == Kind(int, low=0)
    assert kind_of(Annotated[float, typer.Option(min=0, max=2)]) == Kind(float, low=0, high=2)
    assert kind_of(Annotated[list[str] | None, typer.Option()]) == Kind(str, is_list=True)
    assert kind_of(Annotated[Path | None, typer.Option()]).type is Path
    assert kind_of(Annotated[bool, typer.Option("--quiet")]) == Kind(bool)
    assert kind_of(int) == Kind(int)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Kind(int, low=1), [1, 5], [True, 1.0, "1", 0, [1]]),
        (Kind(float, low=0, high=2), [1, 0.5, 2], [True, "1", -1, 2.5]),
        (Kind(bool), [True, False], [1, "true"]),
        (Kind(str), ["a", ""], [1, True, ["a"]]),
        (Kind(Path), ["a"], [1]),
        (Kind(str, is_list=True), [["a", "b"], []], ["a", [1], [True]]),
    ],
)
def test_values_of_another_kind_are_said(kind: Kind, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        kind.check("option", value, FILE)
    for value in bad:
        with pytest.raises(UserError, match=r"In edge\.toml, option is .*: it takes "):
            kind.check("option", value, FILE)


HOME = Path("/home/u")


@pytest.mark.parametrize(
    ("platform", "environment", "place"),
    [
        ("linux", {}, HOME / ".config/specedge"),
        ("linux", {"XDG_CONFIG_HOME": "/x"}, Path("/x/specedge")),
        ("linux", {"XDG_CONFIG_HOME": "", "APPDATA": "/a"}, HOME / ".config/specedge"),
        ("darwin", {}, HOME / ".config/specedge"),
        ("win32", {"APPDATA": "/a", "XDG_CONFIG_HOME": "/x"}, Path("/a/specedge")),
        ("win32", {}, HOME / "AppData/Roaming/specedge"),
    ],
)
def test_each_system_has_one_place_for_it(platform: str, environment: dict[str, str], place: Path) -> None:
    assert folder(platform, environment, HOME) == place


@pytest.mark.parametrize(("platform", "place"), [("darwin", ".config"), ("win32", "AppData/Roaming")])
def test_the_file_is_found_on_other_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, place: str
) -> None:
    for name in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    file = tmp_path / place / "specedge" / "edge.toml"
    file.parent.mkdir(parents=True)
    file.write_text("speed = 1\n")
    done = CliRunner().invoke(app, ["connect"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"In {file}, there is no option speed")


# -- the command ---------------------------------------------------------------------------------------------------


def edge_client(home: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Status and output of edge-client with `home` as its home."""
    clean = {name: value for name, value in os.environ.items() if name not in ("SPECEDGE_TOKEN", "XDG_CONFIG_HOME")}
    done = subprocess.run(
        [str(BIN / "edge-client"), *arguments],
        env={**clean, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("folder", [".config", "elsewhere"])
def test_the_default_file_is_found_and_the_command_line_comes_first(tmp_path: Path, folder: str) -> None:
    file = tmp_path / folder / "specedge" / "edge.toml"
    file.parent.mkdir(parents=True)
    url = f"http://127.0.0.1:{free_port()}"
    file.write_text(f'url = "{url}"\ndraft = "{tmp_path}/in-the-file.gguf"\nserver = "http://localhost/v1"\n')
    xdg = {} if folder == ".config" else {"XDG_CONFIG_HOME": str(tmp_path / folder)}
    for command in ("connect", "serve"):
        assert "in-the-file.gguf cannot be read" in edge_client(tmp_path, command, **xdg)[1]
    status, said = edge_client(tmp_path, "connect", "--draft", "ngram", "--quiet", **xdg)
    assert (status, url in said) == (2, True)
    other = f"http://127.0.0.1:{free_port()}"
    assert other in edge_client(tmp_path, "connect", other, "--draft", "ngram", **xdg)[1]


def test_a_file_is_named_on_the_command_line(tmp_path: Path) -> None:
    status, said = edge_client(tmp_path, "connect", "--config", str(tmp_path / "none.toml"))
    assert (status, "The configuration" in said, "cannot be read" in said) == (2, True, True)
    file = tmp_path / "mine.toml"
    file.write_text("[connect\n")
    assert "is not valid TOML" in edge_client(tmp_path, "connect", "--config", str(file))[1]
    file.write_text("max_requests = -1\n")
    said = edge_client(tmp_path, "connect", "--config", str(file))[1]
    assert said == f"edge-client: In {file}, max_requests is -1: it takes a whole number from 0 to 4096.\n"


def test_a_secrets_file_is_for_its_owner_alone_and_the_environment_comes_first(tmp_path: Path) -> None:
    token, file = tmp_path / "token", tmp_path / "edge.toml"
    token.write_text("se-secret")
    token.chmod(0o644)
    file.write_text(f'url = "http://192.0.2.1:1"\ndraft = "ngram"\ntoken_file = "{token}"\n')
    status, said = edge_client(tmp_path, "connect", "--config", str(file))
    assert status == 2
    assert said.endswith(f"token_file is {token}, which others may read: chmod 600 {token}.\n")
    token.chmod(0o600)
    assert "A token is not sent over plain http://" in edge_client(tmp_path, "connect", "--config", str(file))[1]
    file.write_text(f'url = "http://127.0.0.1:{free_port()}"\ndraft = "ngram"\ntoken_file = "{tmp_path}/none"\n')
    assert "The token file" in edge_client(tmp_path, "connect", "--config", str(file))[1]
    assert "cannot be used" in edge_client(tmp_path, "connect", "--config", str(file), SPECEDGE_TOKEN="x")[1]
