"""The fault matrix's own verdicts: it must detect a broken promise. (The matrix: tests/vllm/test_faults.py.)"""

from contextlib import ExitStack
from pathlib import Path

import pytest
import typer

from tests.faults.matrix import FAULTS, SHORT, Clock, Credentials, Fault, Result, Site, chosen

HARMLESS = Fault("nothing", lambda site: None)
DEADLY = Fault("everything", lambda site: None, kills_engine=True)


def result(fault: Fault = HARMLESS, **values: object) -> Result:
    kept = {"num_requests": 5, "num_wrong": 0, "num_failed": 0, "longest_pause_s": 0.1}
    return Result(fault, **{**kept, "noticed_s": 0.1, "recovered_s": 1.0, **values})  # type: ignore[arg-type]


def site(tmp_path: Path, *, has_namespace: bool) -> Site:
    return Site(tmp_path, Credentials(tmp_path), Clock(tmp_path / "clock"), 1, 2, has_namespace, ExitStack())


def test_what_is_kept() -> None:
    assert result().is_kept
    assert result(DEADLY, num_failed=3).is_kept
    assert result().row()[0] == "nothing"
    assert result().row()[-1] == "ok"


@pytest.mark.parametrize(
    "values", [{"num_wrong": 1}, {"num_failed": 1}, {"num_requests": 0}, {"noticed_s": None}, {"recovered_s": None}]
)
def test_what_is_broken(values: dict[str, object]) -> None:
    assert not result(**values).is_kept
    assert result(**values).row()[-1] == "BROKEN"


def test_a_killed_engine_excuses_no_wrong_token() -> None:
    assert not result(DEADLY, num_wrong=1).is_kept


def test_what_cannot_be_made_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [fault.name for fault in chosen((), is_short=False, site=site(tmp_path, has_namespace=False))]
    assert "network-cut" not in names
    assert "disk-full" not in names  # an ordinary directory is not filled
    said = capsys.readouterr().err
    assert "network-cut cannot be made here" in said
    assert "disk-full cannot be made here" in said


def test_which_faults(tmp_path: Path) -> None:
    here = site(tmp_path, has_namespace=True)
    assert {fault.name for fault in FAULTS} > {fault.name for fault in chosen((), is_short=True, site=here)} == {*SHORT}
    assert [fault.name for fault in chosen(["jitter-500-ms"], is_short=True, site=here)] == ["jitter-500-ms"]
    with pytest.raises(typer.BadParameter, match="no fault nonsense"):
        chosen(["nonsense"], is_short=False, site=here)
