"""What a release needs: one version, a changelog that has it, licences, and the files that a code host reads."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import vllm_specedge

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
SCHEMAS = {
    "vendor.github-workflows": sorted(GITHUB.glob("workflows/*.yml")),
    "vendor.github-issue-forms": sorted(
        set(GITHUB.glob("ISSUE_TEMPLATE/*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"}
    ),
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE/config.yml"],
}


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "vllm_specedge/__init__.py"


def test_the_changelog_has_this_version_and_those_before_it_in_order() -> None:
    headings = [line.split()[1] for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    versions = [Version(each) for each in headings]
    assert versions[0] == Version(vllm_specedge.__version__)
    assert versions == sorted(versions, reverse=True)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_code_host_understands_its_files(schema: str) -> None:
    files = [str(path) for path in SCHEMAS[schema]]
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    made = [command.split()[1] for command in commands if command and command.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in made)


def test_weights_that_are_here_say_whose_they_are() -> None:
    weights = [*(ROOT / "examples").rglob("*.safetensors"), *(ROOT / "examples").rglob("*.gguf")]
    assert weights
    for path in weights:
        notice = path.with_name("NOTICE").read_text()
        assert "Licensed under the" in notice
        assert path.name in notice
