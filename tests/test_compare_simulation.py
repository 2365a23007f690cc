"""The simulation against results files: benchmarks/compare_simulation.py."""

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.compare_simulation import fitted, main
from vllm_specedge.simulation import report
from vllm_specedge.simulation.models import SERVERS

A100, CPU = SERVERS["a100-14b"], SERVERS["cpu-135m"]


def test_a_fitted_server_takes_what_was_measured() -> None:
    sizes = [(requests, requests * (1 + drafts)) for requests in (1, 2, 8, 32, 64) for drafts in range(6)]
    server = fitted([(requests, tokens, A100.step_s(requests, tokens), 0) for requests, tokens in sizes])
    for requests, tokens in [*sizes, (16, 48), (64, 600)]:
        assert server.step_s(requests, tokens) == pytest.approx(A100.step_s(requests, tokens), rel=0.06)


def test_what_verifying_adds_is_fitted_too() -> None:
    sizes = [(requests, requests * (1 + drafts)) for requests in (1, 4, 16) for drafts in range(6)]
    rows = [(n, tokens, CPU.step_s(n, tokens, tokens > n), int(tokens > n)) for n, tokens in sizes]
    server = fitted(rows)
    for requests, tokens, seconds, is_verifying in rows:
        assert server.step_s(requests, tokens, bool(is_verifying)) == pytest.approx(seconds, rel=0.03)


@pytest.mark.parametrize("row", [(1, 1, 0.05), (1, 1, 0.05, 2), (0, 1, 0.05, 0), (1, 1, -0.05, 0)])
def test_rows_of_another_form_are_refused(row: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        fitted([row])


def test_one_row_is_a_server_too() -> None:
    server = fitted([(1, 1, 0.05, 0)])
    assert server.step_s(1, 1) == pytest.approx(0.05)
    assert server.step_s(4, 8) >= 0.05


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TOTAL_TOKENS", 100)
    monkeypatch.setattr(report, "MIN_TOKENS", 30)


def run(file: str, status: int = 0) -> str:
    done = CliRunner().invoke(_app(), [file, "--prompt-tokens", "2", "--output-tokens", "60"])
    assert done.exit_code == status, done.output
    return done.output


def write_results(path: Path, tokens_per_s: float) -> str:
    rows = [[n, n * (1 + k), CPU.step_s(n, n * (1 + k), k > 0), int(k > 0)] for n in (1, 2, 4) for k in range(6)]
    cell = {"requests": 2, "rtt_ms": 5, "edge": "dead", "tokens_per_s": tokens_per_s, "vanilla_tokens_per_s": 63.0}
    path.write_text(json.dumps({"server_model": {"rows": rows}, "cells": [cell]}))
    return str(path)


def test_it_compares_with_what_was_measured(tmp_path: Path) -> None:
    plain = 2 / CPU.step_s(2, 2)
    near = write_results(tmp_path / "near.json", plain)
    assert "dead" in run(near)
    run(write_results(tmp_path / "far.json", 2 * plain), status=1)


def test_a_file_that_cannot_be_read_is_one_sentence() -> None:
    done = CliRunner().invoke(_app(), ["/nowhere.json"])
    assert "cannot be read" in str(done.exception)


def _app() -> Typer:
    app = Typer()
    app.command()(main)
    return app
