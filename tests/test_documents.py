"""Every command in the documents exists and accepts its options; every link leads somewhere."""

import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import edge_client.cli
import vllm_specedge.cli

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "deploy", ".github", "examples/distill_draft")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
MAX_README_BYTES = 6 << 10
OTHER_SITES = ("https://github.com/vllm-project/vllm", "https://arxiv.org/", "https://keepachangelog.com/")
"""Links to these sites are not followed by tests, but checked by hand."""
COMMANDS = {
    "edge-client": typer.main.get_command(edge_client.cli.app),
    "vllm-specedge": typer.main.get_command(vllm_specedge.cli.app),
}
ELSEWHERE = {"vllm"}
"""Commands that a test on the real vLLM parses (tests/vllm/test_documents.py)."""
OTHERS = {
    "cd",
    "curl",
    "docker",
    "openssl",
    "promtool",
    "source",
    "python",
    "ssh",
    "systemctl",
    "mkdir",
    "cp",
    "launchctl",
    "git",
}


@dataclass(frozen=True)
class Command:
    """One line of a document."""

    document: str
    line: str
    is_whole: bool = True
    """Not only a mention of an option or two."""

    def __str__(self) -> str:
        return f"{self.document}: {self.line}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def commands() -> list[Command]:
    """Lines of shell blocks, and code spans in the text that are commands with options."""
    found = []
    for document in DOCUMENTS:
        name, text = document.relative_to(ROOT).as_posix(), document.read_text()
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        blocks += re.findall(r"^    ((?:edge-client|vllm-specedge|make) .*)$", text, re.MULTILINE)
        for block in blocks:
            found += [Command(name, line) for line in _lines(block)]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        quoted = re.findall(r"`((?:edge-client|vllm-specedge) [^`]+)`", prose)
        found += [Command(name, " ".join(each.split()), is_whole=False) for each in quoted]
    return found


def _lines(block: str) -> list[str]:
    """Commands of a block; one may continue on the next line, after a backslash or inside quotes."""
    lines, begun = [], ""
    for line in block.splitlines():
        begun += line
        if begun.endswith("\\"):
            begun = begun[:-1]
            continue
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quote is open
            begun += "\n"
            continue
        if words:
            lines.append(begun)
        begun = ""
    assert not begun, f"a command is never finished: {begun}"
    return lines


ALL = commands()


def of(*programs: str) -> list[Command]:
    return [command for command in ALL if command.words and command.words[0] in programs]


def test_there_are_commands_and_each_is_looked_at() -> None:
    assert len(ALL) > 20
    known = {*COMMANDS, *ELSEWHERE, *OTHERS, "make", "pip"}
    assert {command.words[0] for command in ALL} <= known


@pytest.mark.parametrize("command", of(*COMMANDS), ids=str)
def test_a_command_of_ours_is_one_that_it_takes(command: Command) -> None:
    """Parsed by the command itself, down to the last subcommand; nothing is run."""
    program, *words = command.words
    found = COMMANDS[program]
    while words and hasattr(found, "commands") and not words[0].startswith("-"):
        found = found.commands[words.pop(0)]
    if command.is_whole:
        found.make_context(program, words)
    known = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_a_make_target_is_there(command: Command) -> None:
    targets = [word for word in command.words[1:] if "=" not in word]
    declared = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert set(targets) <= set(declared)


@pytest.mark.parametrize("command", of("pip"), ids=str)
def test_an_extra_is_there(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in command.words:
        for names in re.findall(r"\[(.+)\]", word):
            assert set(names.split(",")) <= extras.keys()


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The text without code blocks and code spans."""
    return re.sub(r"`[^`\n]+`", "`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(document: Path) -> set[str]:
    """Anchors of its headings, as generated by GitHub and the site."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", without_code(document.read_text())):
        if "://" in link:
            assert link.startswith(OTHER_SITES)
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_page_of_contents_has_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", text)) == pages


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= MAX_README_BYTES


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_shell_blocks_are_shell(document: Path) -> None:
    for block in re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_the_table_of_options_is_what_the_models_say() -> None:
    """`make options` writes it."""
    said = CliRunner().invoke(vllm_specedge.cli.app, ["options"])
    assert said.stdout == (ROOT / "docs" / "options.md").read_text()
