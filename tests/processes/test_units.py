"""The units that keep an edge running: they are well formed, and edge-client understands their commands."""

import plistlib
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import typer.main

from edge_client.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICE = DEPLOY / "edge-client.service"
PLIST = DEPLOY / "org.specedge.edge-client.plist"
PROGRAM = ".local/bin/edge-client"
"""Where pipx, uv and pip's --user install it, under the home directory."""


def assert_understood(words: list[str]) -> None:
    """Check a subcommand of edge-client and its flags; its other options are in its configuration file."""
    subcommand, *flags = words
    command = typer.main.get_command(app).commands[subcommand]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert flags
    assert not [flag for flag in flags if flag not in known]


def test_the_systemd_unit_runs_what_edge_client_understands() -> None:
    unit = ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(SERVICE)
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program == f"%h/{PROGRAM}"
    assert_understood(words)
    assert unit["Unit"]["ConditionPathExists"] == "%h/.config/specedge/edge.toml"
    assert unit["Service"]["NoNewPrivileges"] == "yes"
    assert unit["Service"]["Restart"] == "on-failure"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, which comes with systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With the program of this environment, since systemd checks that it exists."""
    unit = tmp_path / SERVICE.name
    unit.write_text(SERVICE.read_text().replace(f"%h/{PROGRAM}", str(Path(sys.executable).with_name("edge-client"))))
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "--user", "verify", "--man=no", str(unit)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_launchd_agent_runs_what_edge_client_understands() -> None:
    agent = plistlib.loads(PLIST.read_bytes())
    assert agent["Label"] == PLIST.stem
    shell, flag, script = agent["ProgramArguments"]
    assert (shell, flag) == ("/bin/sh", "-c")
    word, program, *words = shlex.split(script)
    assert (word, program) == ("exec", f"$HOME/{PROGRAM}")
    assert words.pop().startswith("2>>$HOME/Library/Logs/")
    assert_understood(words)
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["Umask"] == 0o077
