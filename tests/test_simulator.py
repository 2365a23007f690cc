"""The simulator is deterministic, counts each token once, agrees with arithmetic, and finds drafting never slower."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_specedge.cli import app
from vllm_specedge.errors import UserError
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.simulation import report
from vllm_specedge.simulation.clock import VirtualTime
from vllm_specedge.simulation.models import (
    SERVERS,
    Faults,
    RooflineServer,
    Server,
    SimulatedTarget,
    chance,
    in_server_gain,
    key_of,
)
from vllm_specedge.simulation.run import Served, Simulation, simulate
from vllm_specedge.simulation.scenario import EdgeModel, Scenario

A100, H100_8B, CPU = SERVERS["a100-14b"], SERVERS["h100-8b"], SERVERS["cpu-135m"]
K = 5
SMALL = Scenario(requests=3, tokens=60, output_tokens=30, prompt_tokens=20)


class Watched(Simulation):
    """Keeps the served requests."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.answers: list[tuple[int, list[int]]] = []

    def ended(self, request: Served) -> None:
        self.answers.append((request.number, list(request.tokens)))
        super().ended(request)


SCENARIOS = {
    "plain": replace(SMALL, share=0.0),
    "edges": SMALL,
    "half": replace(SMALL, share=0.5),
    "one edge for all": replace(SMALL, max_edges=1),
    "jitter": replace(SMALL, jitter_s=0.03),
    "stalling": replace(SMALL, edge=EdgeModel(fault="stalling")),
    "dead": replace(SMALL, edge=EdgeModel(fault="dead")),
    "little room": replace(SMALL, max_running=2, max_step_tokens=8),
    "in step": replace(SMALL, is_in_step=True),
    "wait": replace(SMALL, limits=HoldLimits(1.0, "wait")),
    "oracle": replace(SMALL, is_oracle=True),
    "asynchronous": replace(SMALL, gap_s=0.002),
    "asynchronous, without": replace(SMALL, gap_s=0.002, share=0.0),
    "asynchronous, little room": replace(SMALL, gap_s=0.002, max_running=2, max_step_tokens=8),
    "asynchronous, in step": replace(SMALL, gap_s=0.002, is_in_step=True),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_answer_is_whole_and_every_token_counts_once(name: str) -> None:
    scenario = replace(SCENARIOS[name], warm_up=0.0, seed=3)
    simulation = Watched(scenario)
    outcome = simulation.run()
    target = simulation.target
    assert len(simulation.answers) >= scenario.requests
    for number, tokens in simulation.answers:
        prompt = target.prompt(number, scenario.prompt_tokens)
        said = [target.token(target.key(number), position) for position in range(len(prompt), len(tokens))]
        assert tokens == prompt + said
        assert len(said) <= scenario.output_tokens
    assert outcome.tokens >= scenario.requests * scenario.tokens
    for number in range(simulation.driver.counters["opened_requests"]):
        simulation.driver.close(f"r{number}")
    assert simulation.driver.counters["committed_tokens"] == outcome.tokens
    accepted, steps = (simulation.driver.counters[name] for name in ("accepted_tokens", "steps"))
    assert outcome.tokens == steps + accepted


def test_the_same_scenario_has_the_same_outcome_and_another_seed_another() -> None:
    scenario = replace(SMALL, jitter_s=0.01, edge=EdgeModel(fault="stalling"))
    assert simulate(scenario) == simulate(scenario)
    assert simulate(scenario) != simulate(replace(scenario, seed=1))


# -- arithmetic ----------------------------------------------------------------------------------------------------

LONG = Scenario(tokens=400, output_tokens=10**6, prompt_tokens=2)


@pytest.mark.parametrize("requests", [1, 8, 200])
def test_without_edges_a_step_makes_a_token_for_each_request(requests: int) -> None:
    outcome = simulate(replace(LONG, requests=requests, share=0.0, tokens=20))
    step_s = A100.step_s(requests, requests)
    assert outcome.tokens_per_s == pytest.approx(requests / step_s)
    assert outcome.itl_p50_s == pytest.approx(step_s)
    assert outcome.itl_p99_s == pytest.approx(step_s)
    assert outcome.verified_per_accepted == 0.0


@pytest.mark.parametrize("requests", [1, 8])
def test_an_asynchronous_engine_has_no_gap_between_its_steps_and_a_synchronous_one_has(requests: int) -> None:
    gap_s = 0.004
    outcome = simulate(replace(LONG, requests=requests, share=0.0, tokens=40, gap_s=gap_s))
    assert outcome.itl_p50_s == pytest.approx(A100.step_s(requests, requests))
    perfect = EdgeModel(pass_s=1e-4, acceptance=1.0, branch=0.0, max_width=1)
    drafted = replace(LONG, requests=requests, rtt_s=0.0, processing_s=0.0, edge=perfect, gap_s=gap_s)
    step_s = A100.step_s(requests, requests * (K + 1), True) + gap_s
    assert simulate(drafted).tokens_per_s == pytest.approx(requests * (K + 1) / step_s, rel=0.03)


@pytest.mark.parametrize("gap_s", [0.001, 0.003])
@pytest.mark.parametrize(("name", "requests"), [("a100-14b", 4), ("h100-8b", 32)])
@pytest.mark.parametrize("edge", ["poor", "dead"])
def test_an_asynchronous_server_is_no_slower_by_edges_that_are_of_no_use(
    name: str, requests: int, edge: str, gap_s: float
) -> None:
    scenario = Scenario(server=SERVERS[name], requests=requests, gap_s=gap_s, tokens=300)
    assert report.cell(report.with_edge(scenario, edge)).ratio() > 0.98


@pytest.mark.parametrize("requests", [1, 8, 32])
def test_good_edges_are_worth_a_gap_that_is_a_third_of_a_step(requests: int) -> None:
    """Once a step is synchronous the gap is paid, whatever it verifies."""
    edge = EdgeModel(pass_s=0.002, acceptance=0.9)
    scenario = Scenario(server=SERVERS["h100-8b"], requests=requests, gap_s=0.003, tokens=150, edge=edge)
    assert report.cell(scenario).ratio() > 1.3


@dataclass
class SlowAtFirst:
    """A server whose first step that verifies takes several times as long, as kernels are compiled for it."""

    server: Server
    times: float
    num_verifying: int = 0
    draft_step_s: float | None = None

    def step_s(self, requests: int, tokens: int, is_verifying: bool = False) -> float:
        self.num_verifying += is_verifying
        is_slow = is_verifying and self.num_verifying == 1
        return self.server.step_s(requests, tokens, is_verifying) * (self.times if is_slow else 1.0)


@pytest.mark.parametrize("times", [1.5, 3, 20])
@pytest.mark.parametrize("requests", [8, 64])
def test_a_slow_first_step_with_drafts_does_not_end_their_use(requests: int, times: float) -> None:
    scenario = Scenario(server=SlowAtFirst(A100, times), requests=requests, gap_s=0.003, tokens=60)
    outcome, plain = simulate(scenario), simulate(replace(scenario, share=0.0))
    assert outcome.tokens_per_s > 1.4 * plain.tokens_per_s


def test_a_prompt_takes_the_steps_that_its_tokens_fill() -> None:
    outcome = simulate(
        Scenario(share=0.0, prompt_tokens=100, output_tokens=1, tokens=5, max_step_tokens=40, warm_up=0.0)
    )
    assert outcome.ttft_p50_s == pytest.approx(2 * A100.step_s(1, 40) + A100.step_s(1, 20))


def test_a_draft_that_is_always_right_and_there_fills_every_step() -> None:
    perfect = EdgeModel(pass_s=1e-4, acceptance=1.0, branch=0.0, max_width=1)
    outcome = simulate(replace(LONG, rtt_s=0.0, processing_s=0.0, edge=perfect))
    assert outcome.tokens_per_s == pytest.approx((K + 1) / A100.step_s(1, K + 1), rel=0.02)
    assert outcome.verified_per_accepted == 1.0
    assert outcome.itl_p50_s == pytest.approx(A100.step_s(1, K + 1))


def test_waiting_for_a_draft_takes_the_round_trip_and_its_passes() -> None:
    """With `a` right, no branches and no drafting ahead: a step, then the trip to the edge, k passes, and back."""
    limits, rtt_s = HoldLimits(1.0, "wait"), 0.05
    edge = EdgeModel(acceptance=0.75, max_width=1, uplink_bytes_per_token=1000.0)
    scenario = replace(LONG, tokens=2000, rtt_s=rtt_s, processing_s=0.0, edge=edge, limits=limits, credit_tokens=K)
    made = sum(0.75**depth for depth in range(K + 1))
    round_s = A100.step_s(1, K + 1) + rtt_s + K * edge.pass_s
    assert simulate(scenario).tokens_per_s == pytest.approx(made / round_s, rel=0.1)


def test_drafting_on_the_server_is_a_formula() -> None:
    made = 1 + 0.5 + 0.25
    assert in_server_gain(A100, 1, 2, 0.5) == pytest.approx(made * A100.step_s(1, 1) / (0.008 + A100.step_s(1, 3)))
    assert in_server_gain(RooflineServer(0.01, 0.0, 0.0, 0.0), 1, 2, 0.5) is None


# -- never slower --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", report.EDGES)
@pytest.mark.parametrize(("name", "requests"), [("a100-14b", 1), ("a100-14b", 24), ("h100-8b", 8), ("cpu-135m", 6)])
def test_edges_of_whatever_kind_are_never_slower_than_none(name: str, requests: int, edge: str) -> None:
    base = Scenario(server=SERVERS[name], requests=requests, tokens=max(60, 500 // requests), output_tokens=100)
    scenario = report.with_edge(base, edge)
    assert report.cell(scenario).ratio() >= 0.97


def test_good_edges_help() -> None:
    assert report.cell(replace(SMALL, tokens=200)).verdict == "helps"


def test_an_oracle_is_no_worse() -> None:
    cell = report.cell(replace(LONG, server=CPU, requests=4, tokens=150), has_oracle=True)
    assert cell.ratio("oracle") >= 0.95 * cell.ratio()


# -- its parts -----------------------------------------------------------------------------------------------------


def test_what_is_due_at_the_same_time_is_done_in_order() -> None:
    time, done = VirtualTime(), list[int]()
    for number in range(5):
        time.at(1.0, done.append, number)
    time.after(0.5, done.append, 9)
    time.run(2.0, lambda: False)
    assert done == [9, 0, 1, 2, 3, 4]
    assert time.now_s == 1.0


def test_chance_is_even() -> None:
    drawn = [chance(key_of(1, 2), index) for index in range(5000)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.02)
    counts = Counter(int(10 * value) for value in drawn)
    assert min(counts.values()) > 400
    assert len({key_of(a, b) for a in range(50) for b in range(50)}) == 2500


def test_a_prompt_names_its_request() -> None:
    target = SimulatedTarget(0, 100)
    assert [target.named(target.prompt(number, 5)) for number in (0, 7, 4321)] == [0, 7, 4321]


def test_stalls_take_their_part_of_the_time() -> None:
    faults = Faults(key_of(1), "stalling", stall_s=2.0, every_s=5.0)
    stalled = [free_s > now_s for now_s in map((0.1).__mul__, range(20_000)) if (free_s := faults.free_s(now_s))]
    assert sum(stalled) / len(stalled) == pytest.approx(0.4, abs=0.05)


# -- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["simulate", *arguments])
    assert done.exit_code == status, done.output
    return done.output


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TOTAL_TOKENS", 100)
    monkeypatch.setattr(report, "MIN_TOKENS", 30)
    monkeypatch.setattr(report, "HALVINGS", 1)


@pytest.mark.usefixtures("quick")
def test_the_command_prints_a_table_and_the_break_even() -> None:
    text = run("--requests", "1,2", "--rtt-ms", "20", "--all-modes", "--oracle")
    assert "helps" in text
    assert "in-server" in text
    assert "never-wait, no branches" in text
    assert "With one request edges help" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.usefixtures("quick")
def test_the_command_prints_json_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, loads in (("load.svg", ("--requests", "1,2")), ("rtt.png", ("--requests", "1", "--rtt-ms", "5,50"))):
        text = run(*loads, "--json", "--no-break-even", "--curve", str(tmp_path / name), "--server", "custom",
                   "--weights-ms", "20", "--token-us", "100")  # fmt: skip
        found = json.loads(text)
        assert [cell["requests"] for cell in found["cells"]]
        assert found["cells"][0]["arms"]["auto"]["ratio"] > 1
        assert found["break_even_rtt_ms"] is None
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--server", "b200"], "takes a100-14b"),
        (["--requests", "one"], "numbers separated by commas"),
        (["--requests", "0"], "from 1 on"),
        (["--edge", "angry"], "kind 'angry'"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["simulate", *arguments])
    assert isinstance(done.exception, UserError)
    assert sentence in str(done.exception)


def test_a_missing_plot_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install"):
        report.draw([], tmp_path / "x.svg")
