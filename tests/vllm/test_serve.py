"""`edge-client serve`: an OpenAI endpoint on this machine, used by OpenAI's own client."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from stack import BIN, EDGE_CORE, MODEL_NAME, Process, Server, start, wait_for

from tests.ports import free_port

from .conftest import DEADLINE_S, Target, counting, until

PORT, ANOTHER_PORT = free_port(), free_port()
REPEATING = "Repeat this line: I like rivers. I like rivers. I like rivers. I like"
QUESTION = [{"role": "user", "content": "Name three colours."}]


@dataclass
class Endpoint:
    """A running `edge-client serve`."""

    process: Process
    url: str
    client: openai.OpenAI
    direct: openai.OpenAI
    """The server itself."""
    target: Target


@pytest.fixture(scope="module")
def endpoint(edge_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    server = edge_target.server
    command = [str(BIN / "edge-client"), "serve", server.gateway_url, "--server", f"{server.url}/v1"]
    log = tmp_path_factory.mktemp("serve") / "edge.log"
    process = start([*command, "--port", str(PORT), "--allow-origin", "https://chat.example.org"], log, core=EDGE_CORE)
    url = f"http://127.0.0.1:{PORT}/v1"
    try:
        wait_for(process, f"{server.gateway_url}/healthz", "edges", 1)
        with (
            openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as direct,
        ):
            yield Endpoint(process, url, client, direct, edge_target)
    finally:
        process.stop()
    assert "OpenAI endpoint: " in log.read_text()
    assert "Traceback" not in log.read_text()


def completion(client: openai.OpenAI, num_tokens: int = 48) -> str:
    body = {"model": MODEL_NAME, "prompt": REPEATING, "max_tokens": num_tokens, "temperature": 0}
    return client.completions.create(**body).choices[0].text


def test_the_models_are_the_server_s(endpoint: Endpoint) -> None:
    assert [model.id for model in endpoint.client.models.list()] == [MODEL_NAME]


def test_answers_are_the_same_and_drafted_for_here(endpoint: Endpoint) -> None:
    with counting(endpoint.target) as counted:
        expected = completion(endpoint.direct)
        assert completion(endpoint.client) == expected
        counted.settle(2 * 48)
        assert counted["accepted_tokens"] > 0


def test_what_does_not_come_this_way_is_not_drafted_for_here(endpoint: Endpoint) -> None:
    def num_assigned() -> float:
        return endpoint.target.server.metrics()["specedge_gateway_assigned"]

    before = num_assigned()
    completion(endpoint.direct)
    completion(endpoint.client)
    until(lambda: num_assigned() > before, "nothing was drafted for here")
    completion(endpoint.direct)
    assert num_assigned() == before + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("responses", {"input": REPEATING, "max_output_tokens": 32}),
        ("messages", {"messages": QUESTION, "max_tokens": 32}),
        ("chat/completions/batch", {"messages": [QUESTION], "max_tokens": 32}),
        ("chat/completions/", {"messages": QUESTION, "max_tokens": 32}),
    ],
)
def test_whatever_generates_is_drafted_for_here_and_by_no_pool_edge(
    endpoint: Endpoint, tmp_path: Path, path: str, body: dict[str, object]
) -> None:
    server = endpoint.target.server
    command = [str(BIN / "edge-client"), "connect", server.gateway_url, "--draft", "ngram"]
    pool = start(command, tmp_path / "pool.log")
    try:
        wait_for(pool, f"{server.gateway_url}/healthz", "edges", 2)
        before = server.metrics()["specedge_gateway_assigned"]
        asked = {"model": MODEL_NAME, "temperature": 0, **body}
        answer = httpx.post(f"{endpoint.url}/{path}", json=asked, timeout=DEADLINE_S, follow_redirects=True)
        assert answer.status_code == 200, answer.text
        until(lambda: server.metrics()["specedge_gateway_assigned"] == before + 1, "nobody drafts for it")
    finally:
        pool.stop()
    assert "Drafted for 0 requests" in (tmp_path / "pool.log").read_text()


def test_a_whole_answer_that_nobody_waits_for_is_not_computed_to_its_end(endpoint: Endpoint) -> None:
    server = endpoint.target.server
    before = vllm_metric(server, "generation_tokens_total")
    body = {"model": MODEL_NAME, "prompt": REPEATING, "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    with socket.create_connection(("127.0.0.1", PORT), timeout=DEADLINE_S) as program:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        program.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        until(lambda: vllm_metric(server, "num_requests_running") == 1, "it did not come")
    until(lambda: vllm_metric(server, "num_requests_running") == 0, "the server goes on")
    assert vllm_metric(server, "generation_tokens_total") - before < 1500


def test_a_chat_as_a_whole_and_as_a_stream(endpoint: Endpoint) -> None:
    body = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": 32, "temperature": 0}
    whole = endpoint.client.chat.completions.create(**body)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 32
    chunks = list(endpoint.client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 32


def test_an_answer_may_be_predicted(endpoint: Endpoint) -> None:
    body = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": 32, "temperature": 0}
    answer = endpoint.direct.chat.completions.create(**body).choices[0].message.content
    prediction = {"type": "content", "content": answer}
    with counting(endpoint.target) as counted:
        got = endpoint.client.chat.completions.create(**body, prediction=prediction)
        assert got.choices[0].message.content == answer
        counted.settle(got.usage.completion_tokens)
        assert counted["prediction_accepted_tokens"] + counted["accepted_tokens"] > 0
    assert got.usage.completion_tokens_details.accepted_prediction_tokens > 0


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "another"}, openai.NotFoundError),
        ({"model": MODEL_NAME, "temperature": -1}, openai.BadRequestError),
        ({"model": MODEL_NAME, "max_tokens": 10**9}, openai.BadRequestError),
    ],
)
def test_errors_are_the_server_s_own(
    endpoint: Endpoint, body: dict[str, object], error: type[openai.APIStatusError]
) -> None:
    found = []
    for client in (endpoint.direct, endpoint.client):
        with pytest.raises(error) as raised:
            client.chat.completions.create(messages=QUESTION, **body)  # type: ignore[call-overload]
        found.append((raised.value.status_code, raised.value.body))
    assert found[0] == found[1]


def test_what_is_no_json_is_refused_by_the_server(endpoint: Endpoint) -> None:
    answers = [
        httpx.post(f"{url}/chat/completions", content=b"{", headers={"content-type": "application/json"})
        for url in (endpoint.url, f"{endpoint.target.server.url}/v1")
    ]
    assert answers[0].status_code == answers[1].status_code >= 400
    assert answers[0].json() == answers[1].json()


def test_a_program_that_hangs_up_stops_the_server_s_work(endpoint: Endpoint) -> None:
    body = {"model": MODEL_NAME, "prompt": REPEATING, "max_tokens": 1500, "temperature": 0, "stream": True}
    server = endpoint.target.server
    before = vllm_metric(server, "generation_tokens_total")
    with httpx.stream("POST", f"{endpoint.url}/completions", json=body, timeout=DEADLINE_S) as answer:
        chunks = answer.iter_bytes()  # hangs up when the iterator is garbage-collected
        next(chunks)
        until(lambda: vllm_metric(server, "num_requests_running") == 1, "it came at once")
    until(lambda: vllm_metric(server, "num_requests_running") == 0, "the server goes on")
    assert 0 < vllm_metric(server, "generation_tokens_total") - before < 1500


def vllm_metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=DEADLINE_S).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://chat.example.org"])
def test_pages_of_this_machine_and_those_that_are_allowed_may_use_it(endpoint: Endpoint, origin: str) -> None:
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    answer = httpx.options(f"{endpoint.url}/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert httpx.get(f"{endpoint.url}/models", headers={"origin": origin}).status_code == 200


def test_other_pages_may_not_even_ask(endpoint: Endpoint) -> None:
    headers = {"origin": "https://evil.example.org", "content-type": "text/plain"}
    body = json.dumps({"model": MODEL_NAME, "prompt": "x", "max_tokens": 1})
    answer = httpx.post(f"{endpoint.url}/completions", headers=headers, content=body)
    assert answer.status_code == 403
    assert "--allow-origin" in answer.json()["error"]["message"]
    assert httpx.get(f"{endpoint.url}/models", headers={"host": "evil.example.org"}).status_code == 400


def test_a_server_that_is_away_is_said_as_openai_says_errors(
    endpoint: Endpoint, edge_target: Target, tmp_path: Path
) -> None:
    command = [str(BIN / "edge-client"), "serve", edge_target.server.gateway_url, "--server", "http://127.0.0.1:9/v1"]
    process = start([*command, "--port", str(ANOTHER_PORT)], tmp_path / "edge.log")
    try:
        wait_for(process, f"{edge_target.server.gateway_url}/healthz", "edges", 2)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{ANOTHER_PORT}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="cannot be reached") as raised, client:
            client.models.list()
        assert raised.value.status_code == 502
    finally:
        process.stop()


def test_a_port_that_is_taken_is_one_sentence(endpoint: Endpoint) -> None:
    server = endpoint.target.server
    command = [str(BIN / "edge-client"), "serve", server.gateway_url, "--server", f"{server.url}/v1"]
    result = subprocess.run([*command, "--port", str(PORT)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "choose another --port" in result.stderr


GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
REPEAT = "Write a poem that repeats the line 'I like rivers' ten times."


def chat(target: Target, *arguments: str, stdin: str | None = None, colours: bool = False) -> str:
    """Output of `edge-client chat`."""
    server = target.server
    command = [str(BIN / "edge-client"), "chat", server.gateway_url, "--server", f"{server.url}/v1", *arguments]
    env = {**os.environ, **({"FORCE_COLOR": "1", "TERM": "xterm"} if colours else {})}
    done = subprocess.run(
        [*command, "--max-tokens", "80", "--temperature", "0"],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_chat_shows_which_tokens_were_drafts(endpoint: Endpoint) -> None:
    said = chat(endpoint.target, "--ask", REPEAT, colours=True)
    drafted = "".join(re.findall(re.escape(GREEN) + "(.*?)" + re.escape(PLAIN), said, re.DOTALL))
    assert len(drafted) > 20, said
    part = int(re.search(r"(\d+)% of them accepted drafts", said)[1])  # type: ignore[index]
    assert part > 20
    assert re.sub(r"\x1b\[[\d;]*m", "", said).startswith(f"> {REPEAT}\n")
    assert "<|im_end|>" not in said


def test_a_conversation_is_typed_and_compared(endpoint: Endpoint) -> None:
    said = chat(endpoint.target, stdin=f"{REPEAT}\n/alone\n/again\n/what\n/with\n/quit\n")
    assert said.count("tokens without this machine,") == 1
    assert said.count("tokens with this machine,") == 1
    assert re.search(r"With this machine \d+\.\d\d times as fast as without\.", said)
    assert said.count("/quit") == 2, "help is printed at first and for what is no command"


def test_a_server_that_is_none_is_one_sentence(endpoint: Endpoint) -> None:
    gateway = endpoint.target.server.gateway_url
    command = [str(BIN / "edge-client"), "chat", gateway, "--server", f"{gateway}/v1", "--ask", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "does not answer as an OpenAI endpoint" in done.stderr
    assert "Traceback" not in done.stderr
