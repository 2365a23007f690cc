"""A real gateway process, real sockets, the real edge client; only the engine behind it has no vLLM."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import httpx2 as httpx
import msgpack
import pytest
import trustme
from certificates import write_certificate
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from raw_client import pack, unpack
from stack import BIN, start, wait_for

from benchmarks.harness.light_edge import LightEdge
from edge_client.client import DraftModelError, EdgeClient
from edge_client.drafters import CacheFullError, Candidate
from edge_client.drafters.ngram import NgramDrafter, NgramSequence
from edge_client.drafting.pacing import HTTP2_HEADER_BYTES
from edge_client.gateway_link import Gateway, Link, LinkError
from tests.faults.matrix import FAKETIME, Clock
from tests.ports import free_port
from tests.processes.gateways import (
    DEADLINE_S,
    FINGERPRINT,
    VOCAB_SIZE,
    Engine,
    Running,
    edge_in_thread,
    failing,
    hello,
    metric,
    refused,
    running_gateway,
    until_closed,
    wait_for_port,
)
from vllm_specedge.config import GatewayOptions
from vllm_specedge.engine.gateway_process import GatewayProcess
from vllm_specedge.engine.plan import Row, StepOutcome
from vllm_specedge.errors import ByeCode, RemoteProtocolError, UserError
from vllm_specedge.gateway.connection import TokenBucket
from vllm_specedge.gateway.connections import RTT_TICKS
from vllm_specedge.gateway.credentials import TokenFile
from vllm_specedge.gateway.gateway import Gateway as EdgeGateway
from vllm_specedge.gateway.known import ROLES
from vllm_specedge.gateway.pages import is_from_here
from vllm_specedge.gateway.server import make_app
from vllm_specedge.wire.codec import Frame, encode, pack_tokens, unpack_tokens
from vllm_specedge.wire.engine_frames import Demand, EngineHello, EngineOpen, Report
from vllm_specedge.wire.frames import (
    MAX_FRAME_BYTES,
    MAX_TOKENS_PER_FRAME,
    MAX_UINT32,
    PROTOCOL_VERSION,
    Bye,
    Close,
    Greet,
    Hello,
    Open,
    Pong,
    Propose,
    Welcome,
)
from vllm_specedge.wire.session import State
from vllm_specedge.wire.telemetry import DEMAND_COUNTERS, REQUEST_COUNTERS, capacity_frame, engine_values


def test_drafts_are_accepted(gateway: Running, engine: Engine) -> None:
    with edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "edge")):
        # A step verifies at least one token and adds one; how many it verifies depends on timing.
        assert engine.generate("one", 60) >= 30
        assert engine.generate("two", 20) >= 10
    engine.wait(lambda: engine.driver.num_edges == 0)


class FullDrafter(NgramDrafter):
    """A drafter whose cache is full."""

    def open(self) -> NgramSequence:
        raise CacheFullError("no room for anything")


def test_an_edge_whose_cache_is_full_gives_its_requests_back(
    gateway: Running, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with edge_in_thread(EdgeClient(Gateway(gateway.url), FullDrafter(), "full")):
        engine.wait(lambda: engine.driver.num_edges == 1)
        engine.link.send(engine.driver.open("for nobody", [1, 2, 3], ""))
        engine.wait(lambda: any("is declined" in record.message for record in caplog.records))
        engine.link.send(engine.driver.close("for nobody"))
        with edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "other")):
            engine.wait(lambda: engine.driver.num_edges == 2)
            assert engine.generate("for the other", 60) > 0
    assert not any(record.exc_info for record in caplog.records)


class SickSequence(NgramSequence):
    """Returns NaN for texts that begin with `first`."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.is_sick: bool | None = None

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        if self.is_sick is None:
            self.is_sick = tokens[0] == self.first
        said = super().append(tokens, width)
        return [Candidate(1, float("nan"))] if self.is_sick else said


class SickDrafter(NgramDrafter):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def open(self) -> NgramSequence:
        return SickSequence(self.first)


A_CHECK_BEGINS_WITH = 1


def test_drafts_that_are_no_numbers_give_their_requests_back_in_one_line(
    gateway: Running, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    client = EdgeClient(Gateway(gateway.url), SickDrafter(7), "sick")
    with edge_in_thread(client):
        engine.wait(lambda: engine.driver.num_edges == 1)
        for number in (1, 2):
            engine.link.send(engine.driver.open(f"sick {number}", [7, 8, 9], ""))
            engine.wait(lambda so_many=number: client.speculation.stats.num_failed == so_many)
            engine.link.send(engine.driver.close(f"sick {number}"))
        assert engine.generate("well", 20) > 0
    said = [record for record in caplog.records if "is declined" in record.message]
    assert [(record.exc_info, "not finite" in record.message) for record in said] == [(False, True)]


def test_a_draft_model_that_does_nothing_any_more_ends_drafting_with_a_sentence(
    gateway: Running, engine: Engine
) -> None:
    client = EdgeClient(Gateway(gateway.url), SickDrafter(A_CHECK_BEGINS_WITH), "gone")
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(lambda: asyncio.run(client.run(DEADLINE_S)))
        engine.wait(lambda: engine.driver.num_edges == 1)
        engine.link.send(engine.driver.open("for nobody else", [A_CHECK_BEGINS_WITH, 2, 3], ""))
        with pytest.raises(DraftModelError, match="choose another --device"):
            running.result(DEADLINE_S)
    engine.link.send(engine.driver.close("for nobody else"))
    engine.wait(lambda: engine.driver.num_edges == 0)
    assert client.open_session() == ""


class ShortDrafter(NgramDrafter):
    max_context_tokens = 64


def test_a_request_that_is_too_long_is_given_back_and_that_is_said_once(
    gateway: Running, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    client = EdgeClient(Gateway(gateway.url), ShortDrafter(), "short")
    with edge_in_thread(client):
        engine.wait(lambda: engine.driver.num_edges == 1)
        for number in range(2):
            engine.link.send(engine.driver.open(f"long {number}", [1] * 65, ""))
        engine.wait(lambda: client.speculation.stats.num_too_long == 2)
        for number in range(2):
            engine.link.send(engine.driver.close(f"long {number}"))
    said = [record.message for record in caplog.records if "longer" in record.message]
    assert said == ["Requests that are longer than this draft's context (64 tokens) are declined"]


def test_another_edge_takes_over_when_one_dies(gateway: Running, engine: Engine) -> None:
    command = [str(BIN / "edge-client"), "connect", gateway.url, "--draft", "ngram", "--quiet"]
    edge = subprocess.Popen(command)
    try:
        engine.wait(lambda: engine.driver.num_edges == 1)
        assert engine.generate("first", 20) > 0
        with edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "second")):
            engine.wait(lambda: engine.driver.num_edges == 2)
            edge.send_signal(signal.SIGKILL)
            assert engine.generate("second", 40) > 0
    finally:
        edge.kill()
        edge.wait()
    engine.wait(lambda: engine.driver.num_edges == 0)


@pytest.mark.parametrize(
    ("greeting", "sentence"),
    [
        (hello(version=99), "update the older"),
        (hello(fingerprint="0" * 64), "tokenizer is not that of toy"),
        (hello(role="king"), "does not allow the role"),
    ],
)
def test_an_edge_that_cannot_help_is_told_why(gateway: Running, engine: Engine, greeting: Hello, sentence: str) -> None:
    error = refused(gateway.url, greeting)
    assert isinstance(error, UserError)
    assert sentence in str(error)


class Rogue(Link):
    """An edge that sends `data` once it is admitted, or proposes `tokens` for each request, from its last token on."""

    def __init__(self, url: str, data: bytes = b"", tokens: Sequence[int] = (), branches: Sequence[int] = ()) -> None:
        super().__init__(Gateway(url), hello(), self._on)
        self.data, self.tokens, self.branches = data, tuple(tokens), tuple(branches)

    def _on(self, frame: Frame) -> None:
        if isinstance(frame, Welcome) and self.data:
            self._outbox.append(self.data)
            self._wake.set()
        elif isinstance(frame, Open) and self.tokens:
            # As bytes: some of these are not frames.
            values = [Propose.CODE, frame.request, frame.num_tokens - 1, pack_tokens(self.tokens), self.branches]
            body = msgpack.packb(values)
            self._outbox.append(len(body).to_bytes(2, "big") + body)
            self._wake.set()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ((MAX_FRAME_BYTES + 1).to_bytes(2, "big"), "over the limit"),
        (b"\x00\x01\xc0", "a frame is an array"),
        (b"\x00\x03\x92\x63\x00", "unknown frame code"),
        (b"\x00\x06\x94\x05\x01\x02\xc4\x00", "not legal"),
        (b"\x00\x08\x95\x07\x01\x02\x92\x03\x04\x90", "no Propose"),
        (b"\x00\x0a\x95\x07\x01\x02\xc4\x03\x02\x03\x00\x90", "fit fewer bytes"),
    ],
)
def test_a_rogue_is_closed_and_the_others_stay(gateway: Running, engine: Engine, data: bytes, sentence: str) -> None:
    with edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "honest")):
        with pytest.raises(UserError, match=sentence):
            asyncio.run(until_closed(Rogue(gateway.url, data)))
        engine.wait(lambda: engine.driver.num_edges == 1)
        assert engine.generate(sentence, 20) > 0


@pytest.mark.parametrize(
    ("tokens", "branches", "sentence"),
    [
        ([3, 5, VOCAB_SIZE], (), f"Token id {VOCAB_SIZE} is outside"),
        ([3, 5], (1,), "do not add up"),
        ([3, 5], (1, 3), "do not add up"),
        ([3, 5], (4, 1), "do not add up"),
        ([3, 5], (0, 2), "must start with a token of their trunk"),
    ],
)
def test_a_proposal_that_cannot_be_meant_never_reaches_the_engine(
    gateway: Running, engine: Engine, tokens: list[int], branches: tuple[int, ...], sentence: str
) -> None:
    before = engine.driver.counters["proposed_tokens"]
    errors: list[BaseException] = []

    def attack() -> None:
        try:
            asyncio.run(until_closed(Rogue(gateway.url, tokens=tokens, branches=branches)))
        except UserError as error:
            errors.append(error)

    attacking = threading.Thread(target=attack)
    attacking.start()
    engine.wait(lambda: engine.driver.num_edges == 1)
    engine.link.send(engine.driver.open("victim", [1, 2, 3], ""))
    engine.wait(lambda: not attacking.is_alive())
    attacking.join()
    engine.link.send(engine.driver.close("victim"))
    assert sentence in str(errors[0])
    assert engine.driver.counters["proposed_tokens"] == before


def test_what_follows_a_branch_is_there_when_the_target_takes_it(gateway: Running, engine: Engine) -> None:
    edge = Rogue(gateway.url, tokens=[3, 5, 6, 9, 8], branches=(2, 2))
    loop = asyncio.new_event_loop()
    task = loop.create_task(until_closed(edge))
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    try:
        engine.wait(lambda: engine.driver.num_edges == 1)
        tokens, rows = [1, 2, 3], [Row("forked", 4)]
        engine.link.send(engine.driver.open("forked", tokens, ""))
        engine.wait(lambda: engine.driver.begin(rows, 0.0).drafts == {"forked": [5, 6]})
        tokens.append(9)
        engine.end_step(engine.driver.begin(rows, 0.0), StepOutcome({"forked": 3}, {"forked": 2}))
        assert engine.driver.begin(rows, 0.0).drafts == {"forked": [8]}
        engine.link.send(engine.driver.close("forked"))
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(DEADLINE_S)
        loop.close()
    engine.wait(lambda: engine.driver.num_edges == 0)


def test_health_and_metrics_over_http_1(gateway: Running, engine: Engine) -> None:
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{gateway.url}/healthz").json()["engines"] == 1
        families = {family.name for family in text_string_to_metric_families(client.get(f"{gateway.url}/metrics").text)}
        assert {"specedge_edges", "specedge_gateway_assigned", "specedge_engine_steps"} <= families
        assert client.post(f"{gateway.url}/edge/v1/up").status_code == 409


def test_a_gateway_without_an_engine_is_alive_and_not_ready(tmp_path: Path) -> None:
    """A liveness probe must not restart a gateway because an engine is missing: that is not the gateway's fault."""
    with running_gateway(tmp_path) as running, httpx.Client(trust_env=False, timeout=DEADLINE_S) as client:
        for ask in (client.get, client.head):
            assert ask(f"{running.url}/livez").status_code == 200
            assert ask(f"{running.url}/healthz").status_code == 503
        engine = Engine(running.endpoint)
        wait_for(running.process, f"{running.url}/healthz", "engines", 1)
        assert client.get(f"{running.url}/livez").status_code == client.get(f"{running.url}/healthz").status_code == 200
        engine.link.stop()


def test_one_gateway_shows_the_capacity_of_each_of_its_engines_and_the_demand_of_all(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as running, httpx.Client(trust_env=False, timeout=DEADLINE_S) as client:
        engines = [Engine(running.endpoint) for _ in range(2)]
        wait_for(running.process, f"{running.url}/healthz", "engines", 2)
        offered = engine_values(Counter({"offered_requests": 3, "refused_requests": 1}), DEMAND_COUNTERS)
        for engine, capacity in zip(engines, (100.0, 300.0), strict=True):
            engine.link.send([Demand("gold", offered), capacity_frame(capacity, 50.0, 90.0)])

        def samples() -> dict[str, list[float]]:
            families = text_string_to_metric_families(client.get(f"{running.url}/metrics").text)
            found: dict[str, list[float]] = {}
            for sample in (sample for family in families for sample in family.samples):
                found.setdefault(sample.name, []).append(sample.value)
            return found

        engines[0].wait(lambda: len(samples().get("specedge_capacity_tokens_per_second", ())) == 2)
        assert sorted(samples()["specedge_capacity_tokens_per_second"]) == [100.0, 300.0]
        assert samples()["specedge_offered_requests_total"] == [6.0]
        assert samples()["specedge_engine_start_seconds"] == [90.0, 90.0]
        shown = client.get(f"{running.url}/status.json").json()["capacity"]
        assert sorted(each["with_edges"] for each in shown["engines"]) == [100.0, 300.0]
        for engine in engines:
            engine.link.stop()


def test_what_finished_requests_came_to_is_served_newest_first(gateway: Running, engine: Engine) -> None:
    number = 4_000_000_000
    with httpx.Client(trust_env=False) as client:

        def rows() -> list[dict[str, int]]:
            return list(client.get(f"{gateway.url}/requests").json()["requests"])

        before = histograms(client.get(f"{gateway.url}/metrics").text)
        for values in ((10, 25), (8, 16, *[0] * 7, 10, 5, *[1] * 99)):
            frames: list[Frame] = [EngineOpen(number, 1, 4, ""), Report(number, values), Close(number, 0)]
            engine.link.send(frames)
        engine.wait(lambda: [row["steps"] for row in rows()[:2]] == [8, 10])
        newest, other = rows()[:2]
        assert list(newest) == ["engine", *(name for name, _ in REQUEST_COUNTERS)]
        assert (newest["verified_tokens"], newest["accepted_tokens"]) == (10, 5)
        assert sum(other.values()) == 10 + 25 + other["engine"]
        after = histograms(client.get(f"{gateway.url}/metrics").text)
    new = {name: after[name] - before[name] for name in after}
    assert new["specedge_request_acceptance_ratio_count"] == 1
    assert new["specedge_request_acceptance_ratio_sum"] == pytest.approx(0.5)
    assert new["specedge_request_tokens_per_step_count"] == 2
    assert new["specedge_request_tokens_per_step_sum"] == pytest.approx(4.5)


def histograms(page: str) -> dict[str, float]:
    """Counts and sums of finished requests in /metrics."""
    families = text_string_to_metric_families(page)
    samples = [sample for family in families if family.type == "histogram" for sample in family.samples]
    return {sample.name: sample.value for sample in samples if sample.name.endswith(("_count", "_sum"))}


def test_the_example_client_of_the_protocol_document(gateway: Running, engine: Engine) -> None:
    script = Path(__file__).parents[2] / "examples" / "raw_client.py"
    command = [sys.executable, str(script), "--requests", "1", gateway.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as raw:
        try:
            engine.wait(lambda: engine.driver.num_edges == 1)
            assert engine.generate("raw", 30) >= 15
            engine.wait(lambda: engine.driver.num_edges == 0)
            assert raw.communicate(timeout=DEADLINE_S)[0]
        finally:
            raw.kill()
    assert raw.returncode == 0


@pytest.mark.parametrize("largest", [0, 255, 256, 65535, 65536, 2**24 - 1, 2**24, MAX_UINT32])
def test_the_example_client_packs_token_ids_as_the_gateway_does(largest: int) -> None:
    for tokens in ((largest,), (1, largest, 0), (largest,) * MAX_TOKENS_PER_FRAME):
        packed = pack(list(tokens))
        assert packed == pack_tokens(tokens)
        assert unpack(packed) == list(tokens)
    assert pack([]) == pack_tokens(()) == b""
    assert unpack(b"") == []


@pytest.mark.parametrize("data", [b"\0", b"\0\1", b"\1", b"\2\1", b"\2\1\0", b"\2\0\1\0", b"\5\1\0\0\0\1"])
def test_the_example_client_refuses_token_ids_that_the_gateway_refuses(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack_tokens(data)
    with pytest.raises(ValueError, match=r"must not be zero|not packed as the protocol requires"):
        unpack(data)


def test_tokens_and_tls(tmp_path: Path) -> None:
    tls_options = write_certificate(tmp_path, trustme.CA())
    tokens = TokenFile(tmp_path / "tokens.json")
    pool, private = tokens.issue("pool", "pool"), tokens.issue("private", "private")
    expired = tokens.issue("expired", "pool", expires_s=1.0)
    arguments = [*tls_options, "--tokens-file", str(tmp_path / "tokens.json")]
    ca = str(tmp_path / "ca.pem")
    with running_gateway(tmp_path, *arguments, verify=ca) as gateway:
        engine = Engine(gateway.endpoint)
        try:
            with edge_in_thread(EdgeClient(Gateway(gateway.url, pool, ca), NgramDrafter(), "edge")):
                assert engine.generate("over TLS", 20) > 0
            assert "does not allow the role 'pool'" in str(refused(gateway.url, hello(), private, ca))
            assert "asks for a token" in str(refused(gateway.url, hello(), "", ca))
            for wrong in ("se-wrong", expired):
                assert "refused this token" in str(refused(gateway.url, hello(), wrong, ca))
            assert "certificate" in str(refused(gateway.url, hello(), pool)).lower()
            # As documented: figures are public, like /metrics and /healthz.
            with httpx.Client(trust_env=False, verify=ssl.create_default_context(cafile=ca)) as client:
                assert client.get(f"{gateway.url}/requests").status_code == 200
                assert client.get(f"{gateway.url}/edge/v1/down").status_code == 401
                assert "specedge_gateway_unauthorized_total 4.0" in client.get(f"{gateway.url}/metrics").text
        finally:
            engine.link.stop()
        log = gateway.process.log.read_text()
    assert pool not in log
    assert private not in log


EC_PARAMETERS = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
"""Parameters of P-256, which `openssl ecparam -genkey` writes before the key."""


@pytest.mark.parametrize(
    ("kind", "form", "before"),
    [
        (trustme.KeyType.RSA, PrivateFormat.PKCS8, b""),
        (trustme.KeyType.RSA, PrivateFormat.TraditionalOpenSSL, b""),
        (trustme.KeyType.ECDSA, PrivateFormat.TraditionalOpenSSL, b""),
        (trustme.KeyType.ECDSA, PrivateFormat.TraditionalOpenSSL, EC_PARAMETERS),
    ],
    ids=["RSA in PKCS#8", "PKCS#1", "SEC1", "SEC1 behind its parameters"],
)
def test_a_key_in_any_common_form_serves_tls(
    tmp_path: Path, kind: trustme.KeyType, form: PrivateFormat, before: bytes
) -> None:
    options = write_certificate(tmp_path, trustme.CA(key_type=kind), key_type=kind, key_format=form)
    (tmp_path / "key.pem").write_bytes(before + (tmp_path / "key.pem").read_bytes())
    ca = str(tmp_path / "ca.pem")
    with (
        running_gateway(tmp_path, *options, verify=ca) as gateway,
        httpx.Client(trust_env=False, verify=ssl.create_default_context(cafile=ca)) as client,
    ):
        assert client.get(f"{gateway.url}/livez").status_code == 200


def test_a_key_with_a_passphrase_is_one_sentence_and_not_asked_for(tmp_path: Path) -> None:
    options = write_certificate(tmp_path, trustme.CA())
    key = load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "key.pem").write_bytes(locked)
    assert "without a passphrase" in failing(
        "vllm-specedge", "gateway", *options, "--listen", f"127.0.0.1:{free_port()}"
    )


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_log_is_json_where_that_is_asked_for(tmp_path: Path, how: str) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    token = tokens.issue("one", "pool")
    arguments = ["--log-format", "json"] if how == "option" else []
    env = {"SPECEDGE_LOG_FORMAT": "json"} if how == "environment" else {}
    with running_gateway(tmp_path, "--tokens-file", str(tokens.path), *arguments, env=env) as gateway:
        engine = Engine(gateway.endpoint)
        try:
            wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
            name = 'a "name"\nof two lines'
            with edge_in_thread(EdgeClient(Gateway(gateway.url, token), NgramDrafter(), name)):
                assert engine.generate("in JSON", 20) > 0
            assert "refused this token" in str(refused(gateway.url, hello(), "se-wrong"))
        finally:
            engine.link.stop()
    log = gateway.process.log.read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert all(line.keys() == {"time", "level", "logger", "message"} for line in lines)
    joined = next(line for line in lines if "joined" in line["message"])
    assert (joined["level"], joined["logger"]) == ("info", "vllm_specedge.gateway.connections")
    assert datetime.fromisoformat(joined["time"]).utcoffset() == timedelta(0)
    assert token not in log


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Running, TokenFile, str]]:
    """A gateway with an engine, its tokens, and one for a single edge."""
    tokens = TokenFile(tmp_path / "tokens.json")
    token = tokens.issue("one", "pool", max_edges=1)
    with running_gateway(tmp_path, "--tokens-file", str(tokens.path)) as gateway:
        engine = Engine(gateway.endpoint)
        wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
        yield gateway, tokens, token
        engine.link.stop()


def test_a_token_serves_so_many_edges_at_once(guarded: tuple[Running, TokenFile, str]) -> None:
    gateway, _, token = guarded
    with edge_in_thread(EdgeClient(Gateway(gateway.url, token), NgramDrafter(), "edge")):
        error = refused(gateway.url, hello(), token)
        assert isinstance(error, LinkError)  # it may reconnect
        assert "429" in str(error)
        assert "specedge_gateway_turned_away_total 1.0" in httpx.get(f"{gateway.url}/metrics", trust_env=False).text
    with edge_in_thread(EdgeClient(Gateway(gateway.url, token), NgramDrafter(), "edge")):
        pass


def test_a_revoked_token_ends_the_edge_that_uses_it(guarded: tuple[Running, TokenFile, str]) -> None:
    gateway, tokens, token = guarded
    client = EdgeClient(Gateway(gateway.url, token), NgramDrafter(), "edge")
    client.on_change = lambda: tokens.revoke("one") if client.state == "connected" else None

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await client.run(DEADLINE_S)

    with pytest.raises(UserError, match="refused this token"):
        asyncio.run(run())
    assert tokens.records() == []


def test_whoever_sends_too_many_bytes_is_closed(gateway: Running, engine: Engine) -> None:
    del engine
    is_welcome = asyncio.Event()
    link = Link(Gateway(gateway.url), hello(), lambda frame: is_welcome.set() if isinstance(frame, Welcome) else None)

    async def flood() -> None:
        """Send continuously: the link's queue is bounded too, and the limit is per second."""
        await is_welcome.wait()
        while True:
            for _ in range(100):
                link.send(Propose(0, 0, (MAX_UINT32,) * 1000))
            await asyncio.sleep(0.01)

    async def run() -> None:
        flooding = asyncio.create_task(flood())
        try:
            await until_closed(link)
        finally:
            flooding.cancel()

    with pytest.raises(UserError, match="KiB per second"):
        asyncio.run(run())


def test_a_new_certificate_is_taken_up_and_everybody_comes_back(tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    tls_options = write_certificate(tmp_path, old)
    trusted = tmp_path / "both.pem"
    trusted.write_bytes(old.cert_pem.bytes() + new.cert_pem.bytes())
    with running_gateway(tmp_path, *tls_options, verify=str(trusted)) as gateway:
        engine = Engine(gateway.endpoint)
        try:
            with edge_in_thread(EdgeClient(Gateway(gateway.url, ca_file=str(trusted)), NgramDrafter(), "edge")):
                assert engine.generate("before", 20) > 0
                write_certificate(tmp_path, new)
                engine.wait(lambda: engine.driver.num_edges == 0)
                assert engine.generate("after", 20) > 0
            (tmp_path / "old.pem").write_bytes(old.cert_pem.bytes())
            assert "certificate" in str(refused(gateway.url, hello(), ca_file=str(tmp_path / "old.pem"))).lower()
            assert gateway.process.popen.poll() is None
        finally:
            engine.link.stop()


def test_a_gateway_may_ask_for_the_edge_s_certificate(tmp_path: Path) -> None:
    tls_options = write_certificate(tmp_path, trustme.CA())
    clients = trustme.CA()
    clients.cert_pem.write_to_path(tmp_path / "clients.pem")
    for name, authority in (("mine", clients), ("other", trustme.CA())):
        authority.issue_cert("laptop").private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
    arguments = [*tls_options, "--tls-client-ca", str(tmp_path / "clients.pem")]
    ca = str(tmp_path / "ca.pem")
    with running_gateway(tmp_path, *arguments, verify=ca) as gateway:
        engine = Engine(gateway.endpoint)
        try:
            mine = Gateway(gateway.url, ca_file=ca, cert_file=str(tmp_path / "mine.pem"))
            with edge_in_thread(EdgeClient(mine, NgramDrafter(), "edge")):
                assert engine.generate("known", 20) > 0
            for cert_file in ("", str(tmp_path / "other.pem")):
                link = Link(Gateway(gateway.url, ca_file=ca, cert_file=cert_file), hello(), lambda _: None)
                with pytest.raises(LinkError):
                    asyncio.run(until_closed(link))
            engine.wait(lambda: engine.driver.num_edges == 0)
        finally:
            engine.link.stop()
    with pytest.raises(UserError, match="cannot be used"):
        Gateway("https://localhost", cert_file=str(tmp_path / "none.pem")).client()


def test_an_edge_without_an_engine_may_come_back(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        error = refused(gateway.url, hello())
        assert isinstance(error, LinkError)
        assert "No vLLM engine" in str(error)


def test_a_stopping_gateway_says_bye(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        engine = Engine(gateway.endpoint)
        wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)

        def stop(frame: Frame) -> None:
            if isinstance(frame, Welcome):
                gateway.process.popen.send_signal(signal.SIGTERM)

        with pytest.raises(LinkError, match="the gateway is stopping"):
            asyncio.run(until_closed(Link(Gateway(gateway.url), hello(), stop)))
        engine.link.stop()
        assert gateway.process.popen.wait(DEADLINE_S) == 0


def test_a_killed_gateway_is_started_again_and_everybody_comes_back(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/engines"
    options = GatewayOptions(listen=f"127.0.0.1:{free_port()}")
    supervisor = GatewayProcess(options, endpoint)
    supervisor.start()
    engine = Engine(endpoint)
    try:
        with edge_in_thread(EdgeClient(Gateway(f"http://{options.listen}"), NgramDrafter(), "edge")):
            assert engine.generate("before", 20) > 0
            supervisor._process.kill()
            engine.wait(lambda: engine.driver.num_edges == 0)
            engine.wait(lambda: engine.driver.num_edges == 1)
            assert engine.generate("after", 20) > 0
        assert engine.link.num_welcomes == 2
    finally:
        engine.link.stop()
        supervisor.stop()
    assert supervisor._process.poll() is not None


def test_a_gateway_shares_its_engine_s_session_but_not_its_ctrl_c(tmp_path: Path) -> None:
    """A core is shared between sessions (Linux's autogroup), and Ctrl-C goes to a process group."""
    supervisor = GatewayProcess(GatewayOptions(listen=f"127.0.0.1:{free_port()}"), f"ipc://{tmp_path}/engines")
    supervisor.start()
    try:
        number = supervisor._process.pid
        assert os.getsid(number) == os.getsid(0)
        assert os.getpgid(number) == number
    finally:
        supervisor.stop()


def test_a_gateway_ends_with_the_engine_that_started_it(tmp_path: Path) -> None:
    command = [str(BIN / "vllm-specedge"), "gateway", "--engines", f"ipc://{tmp_path}/engines", "--ends-with-stdin"]
    process = subprocess.Popen([*command, "--listen", f"127.0.0.1:{free_port()}"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(DEADLINE_S) == 0


def test_ctrl_c_ends_an_edge_at_once_and_says_what_it_did(gateway: Running, engine: Engine) -> None:
    command = [str(BIN / "edge-client"), "connect", gateway.url, "--draft", "ngram"]
    edge = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    engine.wait(lambda: engine.driver.num_edges == 1)
    assert engine.generate("interrupted", 20) > 0
    edge.send_signal(signal.SIGINT)
    engine.wait(lambda: engine.driver.num_edges == 0)
    _, said = edge.communicate(timeout=DEADLINE_S)
    assert edge.returncode == 0
    assert "Drafted for 1 requests" in said
    assert "Traceback" not in said


def test_commands_that_cannot_work_say_why(gateway: Running, tmp_path: Path) -> None:
    serve = ("vllm-specedge", "gateway", "--engines", f"ipc://{tmp_path}/engines", "--listen")
    connect = ("edge-client", "connect", "--draft", "ngram")
    missing = str(tmp_path / "none")
    free = f"127.0.0.1:{free_port()}"
    cases = [
        ((*serve, f"127.0.0.1:{gateway.port}"), "cannot listen"),
        ((*serve, "nonsense"), "HOST:PORT"),
        ((*serve, "0.0.0.0:8100"), "tls_cert"),
        ((*serve, free, "--tokens-file", missing), "cannot be read"),
        ((*serve, free, "--tls-cert", missing, "--tls-key", missing), "cannot be used"),
        (("vllm-specedge", "gateway", "--engines", "tcp://0.0.0.0:1"), "neither encrypted nor authenticated"),
        ((*connect, f"http://{free}"), "cannot be used"),
        ((*connect, "localhost:8100"), "http://"),
        ((*connect, gateway.url, "--token-file", missing), "cannot be read"),
    ]
    with ThreadPoolExecutor(4) as executor:
        said = list(executor.map(lambda case: failing(*case[0]), cases))
    for (_, sentence), line in zip(cases, said, strict=True):
        assert sentence in line


def test_a_token_is_not_shown_in_the_clear_to_another_machine() -> None:
    assert "https://" in str(refused("http://192.0.2.1:8100", hello(), token="se-secret"))


def test_bye_codes_from_10_on_are_final() -> None:
    assert all((code >= ByeCode.PROTOCOL) == (code not in range(10)) for code in ByeCode)


def test_a_gateway_asks_for_as_many_open_files_as_it_may_have_edges(tmp_path: Path) -> None:
    command = ["--engines", f"ipc://{tmp_path}/engines", "--listen", f"127.0.0.1:{free_port()}", "--max-edges", "1000"]
    few = ["prlimit", "--nofile=64:4096", str(BIN / "vllm-specedge"), "gateway", *command]
    process = start(few, tmp_path / "gateway.log")
    try:
        wait_for_port(process, int(command[3].rpartition(":")[2]))
        limits = Path(f"/proc/{process.popen.pid}/limits").read_text()
        assert int(next(line for line in limits.splitlines() if "open files" in line).split()[3]) >= 1000
    finally:
        process.stop()
    none = ["prlimit", "--nofile=64:64", str(BIN / "vllm-specedge"), "gateway", *command]
    result = subprocess.run(none, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "'max_edges'" in result.stderr


def test_a_gateway_takes_as_many_edges_as_it_is_told_to(tmp_path: Path) -> None:
    num_edges = 160  # more than the web server's own limit

    async def connect(port: int) -> None:
        loop = asyncio.get_running_loop()
        edges = []
        for number in range(num_edges):
            make = partial(LightEdge, f"edge-{number}", "http", lambda *_: None)
            edges.append((await loop.create_connection(make, "127.0.0.1", port))[1])
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(edge.is_live.wait() for edge in edges))
        is_seen = await asyncio.to_thread(metric, gateway, "specedge_gateway_connections")
        assert is_seen == num_edges
        for edge in edges:
            edge.close()

    with running_gateway(tmp_path, "--max-edges", str(num_edges)) as gateway:
        engine = Engine(gateway.endpoint)
        try:
            wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
            asyncio.run(connect(gateway.port))
            engine.wait(lambda: engine.driver.num_edges == 0)
            engine.wait(lambda: metric(gateway, "specedge_gateway_connections") == 0)
            assert 0 < metric(gateway, "specedge_gateway_tasks") < num_edges
            assert 0 < metric(gateway, "process_open_fds") < num_edges
        finally:
            engine.link.stop()


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")
def test_the_wall_clock_may_jump(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    tokens = TokenFile(tmp_path / "tokens.json")
    token = tokens.issue("edge", "pool", expires_s=time.time() + 7 * 86400)
    options = [*write_certificate(tmp_path, trustme.CA()), "--tokens-file", str(tmp_path / "tokens.json")]
    ca = str(tmp_path / "ca.pem")
    with running_gateway(tmp_path, *options, verify=ca, env=clock.env) as gateway:
        engine = Engine(gateway.endpoint)
        client = EdgeClient(Gateway(gateway.url, token, ca), NgramDrafter(), "edge")
        try:
            with edge_in_thread(client):
                assert engine.generate("before", 40) > 0
                num_connections = len(client.totals)
                for offset in ("+1d", "-2d", "+0"):
                    clock.set(offset)
                    assert engine.generate(f"at {offset}", 40) > 0
                assert len(client.totals) == num_connections, "it had to connect again"
                clock.set("+8d")
                engine.wait(lambda: engine.driver.num_edges == 0)  # now its token has expired
        finally:
            engine.link.stop()


def test_what_an_edge_would_say_after_the_gateway_s_bye_is_dropped() -> None:
    """It was drafting meanwhile. (Found by an expired certificate: the gateway sent Bye, and the edge ended too.)"""
    link = Link(Gateway("http://localhost:1"), hello(), lambda _: None)
    link.session.receive(
        encode(Greet("key", PROTOCOL_VERSION)) + encode(Bye(ByeCode.GOING_AWAY, "the gateway is stopping"))
    )
    assert link.send(Propose(0, 0, (1,))) == 0


def test_a_proposal_costs_what_goes_up_and_one_that_is_dropped_nothing() -> None:
    client, proposal = EdgeClient(Gateway("http://localhost:1"), NgramDrafter(), "edge"), Propose(0, 0, (1, 2, 3))
    client._link.session.state = State.LIVE
    client._send([proposal, proposal, Pong(1)])
    assert client.pace._bytes == 2 * (len(encode(proposal)) + HTTP2_HEADER_BYTES)
    client._link.session.state = State.CLOSED
    client._send([proposal])
    assert client.pace._bytes == 2 * (len(encode(proposal)) + HTTP2_HEADER_BYTES)


@pytest.mark.parametrize(
    ("reader", "is_public", "shown"),
    [
        ("127.0.0.1", False, "my laptop"),
        ("::1", False, "my laptop"),
        ("192.0.2.7", False, ""),
        ("", False, ""),
        ("192.0.2.7", True, "my laptop"),
    ],
)
def test_names_of_edges_are_for_this_machine(tmp_path: Path, reader: str, is_public: bool, shown: str) -> None:
    """Requests to the real app from addresses that this machine may not have."""

    async def names() -> list[str]:
        gateway = EdgeGateway(GatewayOptions(public_names=is_public), f"ipc://{tmp_path}/engines")
        gateway.router.from_engine(b"a", EngineHello(PROTOCOL_VERSION, "toy", FINGERPRINT, VOCAB_SIZE))
        named = Hello(PROTOCOL_VERSION, "test", "my laptop", "pool", FINGERPRINT, 4)
        gateway.router.edge_hello(1, named, "session", frozenset(ROLES))
        transport = httpx.ASGITransport(make_app(gateway), client=(reader, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8100") as client:
            view = (await client.get("/status.json")).json()
        gateway.close()
        return [edge["name"] for edge in view["edges"]]

    assert asyncio.run(names()) == [shown]


@pytest.mark.parametrize(
    ("headers", "version", "is_here"),
    [
        ({"host": "localhost:8100"}, "2", True),
        ({"host": "127.0.0.1"}, "1.1", True),
        ({"host": "[::1]:8100"}, "1.1", True),
        ({"host": "localhost", "user-agent": "curl/8", "x-request-id": "7"}, "1.1", True),
        ({"host": "localhost", "forwarded": "for=192.0.2.7"}, "1.1", False),
        ({"host": "localhost", "x-forwarded-for": "192.0.2.7"}, "1.1", False),
        ({"host": "localhost", "x-forwarded-proto": "https"}, "1.1", False),
        ({"host": "localhost", "x-real-ip": "192.0.2.7"}, "2", False),
        ({"host": "localhost", "via": "1.1 vegur"}, "1.1", False),
        ({"host": "localhost", "cf-connecting-ip": "192.0.2.7"}, "2", False),
        ({"host": "localhost", "true-client-ip": "192.0.2.7"}, "2", False),
        ({"host": "localhost", "x-envoy-external-address": "192.0.2.7"}, "2", False),
        ({"host": "gpu.example.org"}, "1.1", False),
        ({"host": "localhost.example.org"}, "1.1", False),
        ({"host": ""}, "1.1", False),
        ({"host": "[localhost"}, "1.1", False),
        ({"host": "127.0.0.1:8100"}, "1.0", False),
        ({"host": "127.0.0.1:8100"}, "1", False),
        ({}, "2", False),
    ],
)
def test_what_a_proxy_on_this_machine_asks_is_not_from_here(
    headers: dict[str, str], version: str, is_here: bool
) -> None:
    """Its clients are elsewhere. A proxy without forwarding headers keeps the host's name, or uses HTTP/1.0."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "client": ("127.0.0.1", 1234), "http_version": version, "headers": pairs}
    assert is_from_here(scope) == is_here


def test_edges_are_asked_how_far_away_they_are_but_not_all_at_a_time(tmp_path: Path) -> None:
    async def asked() -> list[list[int]]:
        gateway = EdgeGateway(GatewayOptions(), f"ipc://{tmp_path}/engines")
        connections = [gateway.edges.connect(None) for _ in range(3 * RTT_TICKS)]
        for connection in connections:
            connection.session.state, connection.rtt_s = State.LIVE, 0.01
            connection.outbox.clear()  # its greeting
        looks = []
        for _ in range(RTT_TICKS):
            gateway._watch(connections[0].heard_s)
            looks.append([connection.id for connection in connections if connection.outbox])
            for connection in connections:
                connection.outbox.clear()
        gateway.close()
        return looks

    looks = asyncio.run(asked())
    assert {len(each) for each in looks} == {3}
    assert len({id_ for each in looks for id_ in each}) == 3 * RTT_TICKS


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40)), max_size=60))
def test_what_comes_is_bounded_by_a_rate_and_a_second_s_worth_at_once(events: list[tuple[float, int]]) -> None:
    bucket, now_s, taken = TokenBucket(30, 0.0), 0.0, list[tuple[float, int]]()
    for after_s, amount in events:
        now_s += after_s
        if bucket.take(amount, now_s):
            taken.append((now_s, amount))
        else:
            recent = sum(amount for at_s, amount in taken if at_s > now_s - 1.0)
            assert amount > 30 or recent > 0, "what keeps to the rate is let through"
    for index, (since_s, _) in enumerate(taken):
        total = 0
        for at_s, amount in taken[index:]:
            total += amount
            assert total <= 30 * (1 + at_s - since_s) + 1e-6


def test_what_was_turned_away_takes_nothing_from_what_comes_next() -> None:
    bucket = TokenBucket(30, 0.0)
    assert [bucket.take(amount, 0.0) for amount in (31, 30, 1)] == [False, True, False]
    assert bucket.take(1, 0.04)
