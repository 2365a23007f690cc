"""An edge's output for its user, and its temperature limit."""

import io
import os
import pty
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from stack import wait_for

from edge_client.client import EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.drafting.pacing import Pace
from edge_client.drafting.speculation import SpeculationStats
from edge_client.gateway_link import Gateway
from edge_client.temperature import MARGIN_C, MIN_SHARE, cooler_share, hottest_c
from edge_client.view import AcceptedRate, heat, panel, status_line, summary
from tests.processes.gateways import BIN, DEADLINE_S, Running
from vllm_specedge.errors import UserError


@pytest.fixture
def client() -> EdgeClient:
    client = EdgeClient(Gateway("http://localhost:1"), NgramDrafter(), "edge")
    client.state, client.model = "connected", "toy"
    client.totals.append(SpeculationStats(num_requests=3, proposed_tokens=50, accepted_tokens=20))
    stats = client.speculation.stats
    stats.num_requests, stats.proposed_tokens, stats.accepted_tokens, stats.rejected_tokens = 1, 10, 6, 2
    return client


def shown(what: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_panel_says_where_what_and_how_well(client: EdgeClient) -> None:
    text = " ".join(shown(panel(client, 12.4, heat(81.6, 80.0, 0.5))).replace("│", " ").split())
    for said in (
        "gateway http://localhost:1, connected",
        "model toy",
        "draft prompt lookup (no model)",
        "requests 0 now, 4 in all",
        "acceptance 75%",
        "tokens/s saved 12",
        "tokens 60 proposed, 26 accepted",
        "round trip -",
        "temperature 82 °C, cap 80 °C, drafting 50% of the time",
    ):
        assert said in text
    assert "temperature" not in shown(panel(client, 0.0, heat(None, 0.0, 1.0)))
    assert all(len(line) <= 40 for line in shown(panel(client, 0.0), width=40).splitlines())


def test_a_log_gets_one_line(client: EdgeClient) -> None:
    assert str(status_line(client, 12.4)) == (
        "connected toy | prompt lookup (no model) | 0 requests | acceptance 75% | 12 accepted tokens/s | RTT -"
    )


def test_what_is_over_is_counted_once(client: EdgeClient) -> None:
    said = "Drafted for 4 requests: 60 tokens proposed, 26 accepted."
    assert summary(client) == said
    client.totals.append(client.speculation.stats)  # its connection has ended
    assert summary(client) == said


def test_the_rate_is_that_since_the_last_look(client: EdgeClient) -> None:
    rate = AcceptedRate(10.0)
    assert rate(client, 12.0) == 3.0
    assert rate(client, 13.0) == 0.0
    client.speculation.stats.accepted_tokens = 0  # a new connection
    assert rate(client, 14.0) == 0.0
    client.speculation.stats.accepted_tokens = 4
    assert rate(client, 16.0) == 2.0


# -- a terminal ----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("engine")


def read_until(descriptor: int, wanted: str) -> str:
    deadline_s, text = time.monotonic() + DEADLINE_S, ""
    while wanted not in text:
        assert time.monotonic() < deadline_s, text
        text += os.read(descriptor, 4096).decode()
    return text


def test_a_terminal_gets_the_panel(gateway: Running, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [str(BIN / "edge-client"), "connect", gateway.url, "--draft", "ngram"]
    edge = subprocess.Popen(command, stderr=theirs, env={**os.environ, "COLUMNS": "100", "TERM": "xterm"})
    os.close(theirs)
    try:
        text = read_until(ours, "connected")
        assert "Drafting by prompt lookup" in text
        assert "tokens/s saved" in text
        edge.send_signal(signal.SIGINT)
        read_until(ours, "Drafted for 0 requests")
        assert edge.wait(DEADLINE_S) == 0
    finally:
        edge.kill()
        edge.wait()
        os.close(ours)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_gets_lines_and_a_quiet_edge_says_nothing(gateway: Running, tmp_path: Path, quiet: bool) -> None:
    log = tmp_path / "log"
    command = [str(BIN / "edge-client"), "connect", gateway.url, "--draft", "ngram", *(["--quiet"] if quiet else [])]
    with log.open("wb") as file:
        edge = subprocess.Popen(command, stderr=file, stdout=file)
    try:
        wait_for(gateway.process, f"{gateway.url}/healthz", "edges", 1)
        edge.send_signal(signal.SIGINT)
        assert edge.wait(DEADLINE_S) == 0
    finally:
        edge.kill()
        edge.wait()
    said = log.read_text().splitlines()
    if quiet:
        assert said == []
    else:
        assert said[0] == "Drafting by prompt lookup: no model, no device."
        assert said[-1] == "Drafted for 0 requests: 0 tokens proposed, 0 accepted."
        assert "─" not in "".join(said)


# -- temperature ---------------------------------------------------------------------------------------------------

shares = st.floats(MIN_SHARE, 1.0)
degrees = st.floats(-20.0, 120.0)


@given(degrees, degrees, shares)
def test_what_is_too_hot_goes_slower_and_what_is_cool_faster(temperature_c: float, cap_c: float, share: float) -> None:
    after = cooler_share(temperature_c, cap_c, share)
    assert MIN_SHARE <= after <= 1.0
    if temperature_c > cap_c:
        assert after < share or share == MIN_SHARE
    elif temperature_c > cap_c - MARGIN_C:
        assert after == share
    else:
        assert after > share or share == 1.0


def test_a_machine_that_heats_as_it_drafts_settles_at_the_cap() -> None:
    temperature_c, share, seen = 40.0, 1.0, []
    for _ in range(600):  # towards 40 degrees idle and 100 at full speed, like a case that warms slowly
        temperature_c += 0.05 * (40.0 + 60.0 * share - temperature_c)
        share = cooler_share(temperature_c, 80.0, share)
        seen.append(temperature_c)
    assert max(seen[200:]) < 85.0
    assert min(seen[200:]) > 65.0


def test_a_share_of_the_time_is_kept_to() -> None:
    pace, now_s, busy_s = Pace(share=0.25), 100.0, 0.0
    for took_s in (0.01, 0.02, 0.01, 0.05) * 50:
        now_s = max(now_s, pace.rest_until_s)
        pace.drafted(1, now_s, took_s)
        now_s += took_s
        busy_s += took_s
    assert busy_s / (pace.rest_until_s - 100.0) == pytest.approx(0.25)


def test_the_hottest_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cool, hot = SimpleNamespace(current=40), SimpleNamespace(current=61.5)
    found = {"cpu": [cool, hot], "disk": [cool]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    assert hottest_c() == 61.5
    for none in ({}, {"cpu": []}):
        monkeypatch.setattr(psutil, "sensors_temperatures", lambda none=none: none)
        with pytest.raises(UserError, match="has no temperature sensor"):
            hottest_c()
    monkeypatch.delattr(psutil, "sensors_temperatures")
    with pytest.raises(UserError, match="instead of --max-temperature-c"):
        hottest_c()
