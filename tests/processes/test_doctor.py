"""`edge-client doctor` against a real gateway process; the engine behind it reports learned step times."""

import io
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2 as httpx
import pytest
from rich.console import Console
from stack import BIN, wait_for

from edge_client.doctor import Asked, Check, Diagnosis, diagnose, rehearse, tables
from edge_client.drafters import Candidate, DrafterOptions
from edge_client.drafters.ngram import NgramDrafter
from edge_client.gateway_link import Gateway
from tests.helpers import Guess, ListSequence
from tests.models.test_gguf_drafter import GGUF
from tests.ports import free_port
from tests.processes.gateways import DEADLINE_S, Engine, Running, metric, running_gateway
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.credentials import TokenFile
from vllm_specedge.policy.step_cost import KNOTS
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import EngineHello, Stats, StepTimes
from vllm_specedge.wire.frames import PROTOCOL_VERSION
from vllm_specedge.wire.telemetry import ENGINE_COUNTERS

SLOW_GPU = StepTimes(tuple(200_000 + 100 * knot for knot in KNOTS), 0, 0, 0)
"""A model so large that any draft pays: 0.2 s per step, 0.1 ms per token."""


def learnt(endpoint: str, fingerprint: str, *frames: Frame) -> EngineLink:
    link = EngineLink(endpoint, EngineHello(PROTOCOL_VERSION, "toy", fingerprint, 49152), lambda: None, lambda: frames)
    link.start()
    return link


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    counted = {"verified_drafts": 100, "verified_tokens": 300, "accepted_tokens": 240}
    stats = Stats(tuple(counted.get(name, 0) for name, _ in ENGINE_COUNTERS))
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        link = learnt(running.endpoint, "f" * 64, stats, SLOW_GPU)
        until_learnt(running)
        yield running
        link.stop()


def until_learnt(running: Running) -> None:
    """Wait until the gateway has the engine's report, which comes once per second."""
    deadline = threading.Event()
    for _ in range(int(DEADLINE_S / 0.1)):
        if "specedge_engine_step_seconds{" in httpx.get(f"{running.url}/metrics", trust_env=False).text:
            return
        deadline.wait(0.1)
    raise running.process.fail("the gateway was not told what steps take")


def look(url: str, draft: str = "ngram", token: str = "", acceptance: float | None = None, ca: str = "") -> Diagnosis:
    options = DrafterOptions(draft, device="cpu", threads=1)
    return diagnose(Asked(Gateway(url, token, ca), options, "pool", "test", 0, 5, acceptance))


def failed(found: Diagnosis) -> dict[str, str]:
    assert found.is_good == (not any(not check.is_good for check in found.checks) and bool(found.speeds))
    return {check.name: check.text for check in found.checks if not check.is_good}


def test_a_machine_that_would_help(gateway: Running) -> None:
    done = subprocess.run(
        [str(BIN / "edge-client"), "doctor", gateway.url, "--draft", "ngram"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    for said in ("Drafting by prompt lookup", "no token is needed", "it serves toy", "a step takes 200.1 ms"):
        assert said in " ".join(done.stdout.split())
    assert "This machine would help: about" in done.stdout


def test_acceptance_is_what_the_server_has_counted_unless_it_is_given(gateway: Running) -> None:
    found = look(gateway.url)
    assert not failed(found)
    [acceptance] = [check.text for check in found.checks if check.name == "acceptance"]
    assert acceptance.startswith("0.89, measured by this server")
    assert found.speeds[0].ratio > 1.5
    found = look(gateway.url, acceptance=0.01)
    assert not found.is_good
    assert found.verdict.startswith("would not help: ")


def test_another_vocabulary_is_said(gateway: Running) -> None:
    found = look(gateway.url, str(GGUF))
    assert list(failed(found)) == ["vocabulary"]
    assert "The draft model's tokenizer is not that of toy" in failed(found)["vocabulary"]
    assert "round trip" in [check.name for check in found.checks if check.is_good]
    assert found.verdict == "cannot be judged: fix what failed above first"


def test_a_draft_that_cannot_be_loaded_is_one_check_of_several(gateway: Running) -> None:
    found = look(gateway.url, "/nowhere.gguf")
    assert list(failed(found)) == ["draft model"]
    assert "round trip" in [check.name for check in found.checks]


def test_what_is_in_brackets_is_shown() -> None:
    console = Console(file=io.StringIO(), width=100)
    for table in tables(Diagnosis([Check("draft model", False, "pip install 'vllm-specedge[hf]'")])):
        console.print(table)
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "draft model FAILED pip install 'vllm-specedge[hf]'" in said


def test_no_gateway_and_no_server(tmp_path: Path) -> None:
    found = look(f"http://127.0.0.1:{free_port()}")
    assert list(failed(found)) == ["gateway"]
    assert "start the server with --speculative-config edge" in failed(found)["gateway"]
    with running_gateway(tmp_path) as running:
        assert failed(look(running.url)) == {"server": "No vLLM server is connected to this gateway: start one."}
        link = learnt(running.endpoint, "f" * 64, StepTimes((), 0, 0, 0))
        wait_for(running.process, f"{running.url}/healthz", "engines", 1)
        assert "has not measured its steps yet" in failed(look(running.url))["server"]
        link.stop()


def test_a_token_is_accepted_or_refused(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    token = tokens.issue("pool", "pool")
    with running_gateway(tmp_path, "--tokens-file", str(tmp_path / "tokens.json")) as running:
        link = learnt(running.endpoint, "f" * 64, SLOW_GPU)
        until_learnt(running)
        assert "name its file with --token-file" in failed(look(running.url, token="se-wrong"))["admission"]
        found = look(running.url, token=token)
        assert not failed(found)
        assert "the token is accepted; it serves toy" in [check.text for check in found.checks]
        assert any("assumed" in check.text for check in found.checks if check.name == "acceptance")
        link.stop()


def test_it_takes_no_requests_from_others(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as running:
        engine = Engine(running.endpoint)
        wait_for(running.process, f"{running.url}/healthz", "engines", 1)
        engine.link.send(engine.driver.open("waiting", [1] * 20, ""))
        assert "admission" not in failed(look(running.url))
        assert metric(running, "specedge_gateway_assigned_total") == 0
        engine.link.stop()


def test_a_users_fault_ends_with_2() -> None:
    with pytest.raises(UserError, match="is not a gateway URL"):
        look("localhost:8100")
    with pytest.raises(UserError, match="CA file"):
        look("https://localhost:1", ca="/nowhere")


class ToyDrafter:
    fingerprint, max_context_tokens, max_width, description = "", 4096, 8, "toy"

    def __init__(self) -> None:
        self.opened: list[ListSequence] = []

    def open(self) -> ListSequence:
        self.opened.append(ListSequence(lambda tokens: []))
        return self.opened[-1]


class Watched(ListSequence):
    """Fails if a rollback goes further back than `num_seen` entries, and records the calls."""

    def __init__(self, guess: Guess, num_seen: int) -> None:
        super().__init__(guess)
        self.num_seen, self.longest = num_seen, 0
        self.num_rollbacks = self.num_branches = self.num_moved = 0

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        self.num_moved += bool(moved)
        if length + len(moved) < len(self.entries):
            self.num_rollbacks += 1
            if len(self.entries) > self.num_seen:
                raise RuntimeError("`crop` was called")
        super().keep(length, moved)
        self.longest = max(self.longest, len(self.entries))

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        self.num_branches += 1
        return super().branch(tokens, parents, width)


class WatchedDrafter(ToyDrafter):
    def __init__(self, num_seen: int = 1 << 20, probability: float = 0.6) -> None:
        super().__init__()
        self.num_seen, self.probability = num_seen, probability

    def open(self) -> Watched:
        said = [Candidate(2, self.probability), Candidate(3, 0.3)]
        self.opened.append(Watched(lambda tokens: said, self.num_seen))
        return self.opened[-1]  # type: ignore[return-value]


def test_a_rehearsal_is_as_long_as_a_request_with_branches_and_rollbacks() -> None:
    drafter = WatchedDrafter()
    num_tokens = rehearse(drafter, lambda: 0.0)
    [sequence] = drafter.opened
    assert isinstance(sequence, Watched)
    assert num_tokens > 1200
    assert sequence.longest > 1200
    assert min(sequence.num_rollbacks, sequence.num_branches, sequence.num_moved) >= 5
    narrow = WatchedDrafter()
    narrow.max_width = 1
    assert rehearse(narrow, lambda: 0.0) > 1200
    assert rehearse(NgramDrafter(), lambda: 0.0) > 1200
    short = WatchedDrafter()
    short.max_context_tokens = 100
    assert 36 < rehearse(short, lambda: 0.0) <= 100


def test_a_slow_draft_is_not_tried_to_the_end() -> None:
    times = iter([0.0, *[100.0] * 99])
    assert rehearse(WatchedDrafter(), lambda: next(times)) <= 1200 + 6


@pytest.mark.parametrize(("num_seen", "probability"), [(512, 0.6), (1 << 20, float("nan"))])
def test_a_draft_that_fails_on_real_requests_does_not_pass(
    gateway: Running, monkeypatch: pytest.MonkeyPatch, num_seen: int, probability: float
) -> None:
    monkeypatch.setattr("edge_client.doctor.load_drafter", lambda options, say: WatchedDrafter(num_seen, probability))
    found = look(gateway.url)
    assert list(failed(found)) == ["forward pass"]
    assert "choose another draft" in failed(found)["forward pass"]
    assert found.verdict == "cannot be judged: fix what failed above first"
