"""Output of `--help`: options in panels, the most important ones first, each with a sentence."""

import re

import pytest
import typer.main
from typer.testing import CliRunner

import edge_client.cli
import vllm_specedge.cli

APPS = {"edge-client": edge_client.cli.app, "vllm-specedge": vllm_specedge.cli.app}
FIRST = {
    "connect": ["draft", "token_file", "ca_file", "config", "role"],
    "serve": ["server", "api_key_file", "token_file", "ca_file", "config", "draft"],
    "chat": ["server", "api_key_file", "token_file", "ca_file", "config", "draft", "model"],
    "doctor": ["token_file", "ca_file", "config", "draft", "role", "acceptance", "spec_tokens"],
}


@pytest.mark.parametrize("command", FIRST)
def test_what_matters_most_comes_first_and_the_rest_in_panels(command: str) -> None:
    parameters = typer.main.get_command(edge_client.cli.app).commands[command].params  # type: ignore[attr-defined]
    options = [each for each in parameters if each.name != "url"]
    assert [each.name for each in options if not getattr(each, "rich_help_panel", None)] == FIRST[command]
    shown = CliRunner().invoke(edge_client.cli.app, [command, "--help"], env={"COLUMNS": "120"}).stdout
    panels = re.findall(r"^╭─ ([\w ]+) ─", shown, re.MULTILINE)
    assert panels[:3] == ["Arguments", "Options", "Connection"]
    assert set(panels[2:]) <= {"Connection", "Draft model", "Limits", "Endpoint", "Output"}


@pytest.mark.parametrize("program", APPS)
def test_every_option_and_command_has_a_sentence(program: str) -> None:
    todo = [typer.main.get_command(APPS[program])]
    while todo:
        command = todo.pop()
        todo += getattr(command, "commands", {}).values()
        assert command.help, command.name
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            text = getattr(parameter, "help", None)
            assert text, f"{command.name} {parameter.name}"
            assert text.endswith("."), text
