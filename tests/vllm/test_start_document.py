"""docs/start.md, step by step, on two machines: with its own commands, a certificate and a token."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from stack import BIN, POLL_S, SERVER_CORE, START_LIMIT_S, Process

from tests.namespaces import Machine, two_machines
from tests.test_documents import of

from .conftest import MODEL, until

DRAFT = MODEL.parent / "smollm2-draft"
TARGET, SIBLING = "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"
NAME = "gpu.example.org"
OF_SERVER = {
    "VLLM_CPU_OMP_THREADS_BIND": str(SERVER_CORE),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
SMALL = ["--served-model-name", TARGET, "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
"""The embedded model is served under the name in the document."""


def step(program: str, *words: str) -> list[str]:
    """The only command of the document that begins with these words, with local models."""
    begin = [program, *words]
    found = [each for each in of(program) if each.document == "docs/start.md" and each.words[: len(begin)] == begin]
    (command,) = found
    names = {TARGET: str(MODEL), SIBLING: str(DRAFT)}
    _, *rest = command.words
    where = BIN / program
    return [str(where) if where.exists() else program, *(names.get(word, word) for word in rest)]


@contextmanager
def stopped(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.stop()


def wait_until(process: Process, machine: Machine, words: list[str], is_there: Callable[[str], bool]) -> None:
    """Run a command repeatedly until its output has what is expected."""
    end_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_s:
        if is_there(machine.run(words).stdout):
            return
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(POLL_S)
            break
    raise process.fail(f"what {' '.join(words)} waits for never came")


def metric(name: str) -> Callable[[str], bool]:
    """Whether this metric of the gateway is above zero."""
    return lambda said: any(float(line.split()[1]) > 0 for line in said.splitlines() if line.startswith(f"{name} "))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path_factory.mktemp("machines"), NAME) as both:
        yield both


@pytest.fixture(scope="module")
def served(machines: tuple[Machine, Machine]) -> Iterator[tuple[Machine, Machine]]:
    """Steps 1 to 4."""
    server, laptop = machines
    assert server.run(step("vllm-specedge", "doctor")).returncode == 0
    assert server.run(step("openssl")).returncode == 0
    issued = server.run(step("vllm-specedge", "token"))
    assert issued.returncode == 0
    (laptop.folder / "token").write_text(issued.stdout)
    (laptop.folder / "token").chmod(0o600)
    shutil.copy(server.folder / "cert.pem", laptop.folder)
    with stopped(server.start([*step("vllm", "serve"), *SMALL], "server.log", OF_SERVER)) as process:
        wait_until(process, laptop, ["curl", "--silent", f"http://{NAME}:8000/v1/models"], lambda said: TARGET in said)
        until(lambda: "Gateway listens" in process.log.read_text(), "the gateway does not listen")
        yield machines


def test_the_laptop_joins_and_its_drafts_are_accepted(served: tuple[Machine, Machine]) -> None:
    """Steps 5 to 7."""
    _, laptop = served
    numbers = ["curl", "--silent", "--cacert", "cert.pem", f"https://{NAME}:8100/metrics"]
    assert laptop.run(step("curl")).returncode == 0
    examined = laptop.run(step("edge-client", "doctor"), {"COLUMNS": "200"})
    assert "the token is accepted" in examined.stdout, examined.stdout + examined.stderr
    assert "FAILED" not in examined.stdout
    assert "This machine would" in examined.stdout
    with stopped(laptop.start([*step("edge-client", "connect"), "--threads", "1"], "edge.log")) as edge:
        wait_until(edge, laptop, numbers, metric("specedge_edges"))

        def is_accepted(numbers_said: str) -> bool:
            """Ask once more unless a draft was accepted: an engine need not verify those for its first request."""
            if metric("specedge_engine_accepted_tokens_total")(numbers_said):
                return True
            assert '"text"' in laptop.run(step("curl")).stdout
            return False

        wait_until(edge, laptop, numbers, is_accepted)


REFUSALS = [
    (f"https://{NAME}:8101", ["--ca-file", "cert.pem"], "nothing listens there"),
    (f"http://{NAME}:8000", [], "it is not an edge gateway"),
    (f"http://{NAME}:8100", [], "it is not an edge gateway"),
    (f"https://{NAME}:8100", [], "its certificate is from an authority that is not trusted here"),
    ("https://192.0.2.7:8100", ["--ca-file", "cert.pem"], "its certificate is for another name"),
    (f"https://{NAME}:8100", ["--ca-file", "cert.pem"], "The gateway asks for a token"),
    (f"https://{NAME}:8100", ["--ca-file", "cert.pem", "--token-file", "wrong"], "The gateway refused this token"),
]


@pytest.mark.parametrize(("url", "options", "said"), REFUSALS, ids=[said for *_, said in REFUSALS])
def test_what_does_not_work_is_said_as_the_page_has_it(
    served: tuple[Machine, Machine], url: str, options: list[str], said: str
) -> None:
    _, laptop = served
    (laptop.folder / "wrong").write_text("a-token")
    done = laptop.run([str(BIN / "edge-client"), "connect", url, "--draft", "ngram", "--quiet", *options])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    page = " ".join((Path(__file__).parents[2] / "docs" / "start.md").read_text().split())
    assert said.removeprefix("The gateway ") in page
