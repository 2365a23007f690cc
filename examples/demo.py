"""`make demo`: plain vLLM on one core, then the same with an edge on the other core, and the speedup.

    python examples/demo.py [--pair auto|qwen|smollm2] [--dtype bfloat16] [--draft ngram] [--hub]

Both answer the same questions: chat, code, editing. Answers stream to the screen, accepted draft tokens in green. A
table by kind of question follows; the last line is JSON.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from demo_screen import Answer, Row, Screen, first_difference, table, tokens_per_s
from openai import OpenAI
from pairs import AUTO, CACHE, QWEN, SMOLLM2, Choice, PairError, console, prepare_fitting
from questions import QUESTIONS
from stack import LARGE_PAGES, Server, StackError, answering, edge_client, start_server
from tokenizers import Tokenizer

MAX_TOKENS = 80
NUM_QUESTIONS = {QWEN.name: 1, SMOLLM2.name: 2}
"""Questions of each kind: a token of the large pair takes a core between a fifth of a second and a second."""
PORT = 8000
SERVER_OPTIONS = ("--max-model-len", "2048", "--max-num-seqs", "8")
RESULTS = CACHE / "demo.json"
"""A copy of the last line, for `make picture`."""
INSTALL_SECONDS = Path(sys.prefix) / ".install-seconds"
"""Duration of deploy/install, if it made this environment."""
EXACT = "float32"
"""The number format in which a token does not depend on the batch size (docs/design.md, Numerics)."""


@dataclass
class Clock:
    """Seconds spent on each part of the demo."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = round(self.seconds.get(what, 0.0) + time.monotonic() - started_s, 1)


@dataclass
class Asking:
    """A server, and a client that sends it questions."""

    server: Server
    tokenizer: Tokenizer
    num_questions: int
    """Questions of each kind."""
    client: OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = OpenAI(base_url=f"{self.server.url}/v1", api_key="none")

    def ask(self, answer: Answer, max_tokens: int = MAX_TOKENS) -> Answer:
        """Stream the greedy answer to a question into `answer`."""
        stream = self.client.chat.completions.create(
            model=self.server.model,
            messages=[{"role": "user", "content": answer.question}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        for chunk in stream:
            choice = chunk.choices[0]
            if token_ids := (choice.model_extra or {}).get("token_ids"):
                answer.take(choice.delta.content or "", token_ids, time.monotonic(), self._decode)
        return answer

    def warm_up(self) -> None:
        """Send a short request: the first pass of a process is slower than all others."""
        self.ask(Answer("", "Say hello."), 8)

    def stream(self, screen: Screen, kind: str, plain: Sequence[Answer]) -> list[Answer]:
        """Ask all questions of a kind, one after the other, and show the answers."""
        answers = [Answer(kind, question) for question in QUESTIONS[kind][: self.num_questions]]
        for answer in answers:
            with screen.stream(answer, plain):
                self.ask(answer)
        return answers

    def ask_together(self, answers: Sequence[Answer]) -> list[Answer]:
        """Ask the same questions again, all at once."""
        again = [Answer(answer.kind, answer.question) for answer in answers]
        with ThreadPoolExecutor(len(again)) as executor:
            return list(executor.map(self.ask, again))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids)))


@dataclass
class Demo:
    """A pair of models, and the measurements so far."""

    choice: Choice
    draft: str
    clock: Clock
    screen: Screen
    plain: dict[str, list[Answer]] = field(default_factory=dict)
    edge: dict[str, list[Answer]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    parted_by_itself: int | None = None
    """How many of plain vLLM's answers differ when all are asked at once; None if none can."""

    def run(self) -> dict[str, object]:
        """Run both servers, one after the other; return the contents of the last line."""
        pair = self.choice.pair
        tokenizer = Tokenizer.from_file(str(pair.target_directory(CACHE) / "tokenizer.json"))
        asking = partial(Asking, tokenizer=tokenizer, num_questions=NUM_QUESTIONS[pair.name])
        console.rule(f"1. plain vLLM, on one core: {pair.title}, {self.choice.dtype}")
        with self._serving("demo-plain.log") as server, self.clock("questions"):
            self._ask_plainly(asking(server))
        console.rule("2. the same with --speculative-config edge")
        with self._serving("demo-server.log", "--speculative-config", "edge") as server, self.clock("questions"):
            command = f"edge-client connect {server.gateway_url} --draft {Path(self.draft).name}"
            console.print(f"An edge drafts on the other core: {command}\n")
            with edge_client(server.gateway_url, self.draft, CACHE / "demo-edge.log"):
                self._ask_with_edge(asking(server))
        console.rule("3. comparison")
        return self._results()

    @contextmanager
    def _serving(self, log: str, *arguments: str) -> Iterator[Server]:
        directory = self.choice.pair.target_directory(CACHE)
        options = (*SERVER_OPTIONS, *arguments)
        with ExitStack() as stack:
            with self.clock("servers"), console.status("Starting vllm serve (up to a minute) ..."):
                running = start_server(directory, CACHE / log, PORT, *options, dtype=self.choice.dtype, env=LARGE_PAGES)
                server = stack.enter_context(answering(running))
            yield server
            with self.clock("servers"), console.status("Stopping it ..."):
                stack.close()

    def _ask_plainly(self, asking: Asking) -> None:
        asking.warm_up()
        for kind in QUESTIONS:
            self.plain[kind] = asking.stream(self.screen, kind, ())
        if self.choice.dtype != EXACT:
            with console.status("Asking all of them at once, to see whether plain vLLM gives the same answers ..."):
                every = list(chain.from_iterable(self.plain.values()))
                self.parted_by_itself = len(parted(every, asking.ask_together(every)))

    def _ask_with_edge(self, asking: Asking) -> None:
        asking.warm_up()
        start = before = asking.server.engine_counters()
        for kind in QUESTIONS:
            self.edge[kind] = asking.stream(self.screen, kind, self.plain[kind])
            num_tokens = sum(len(answer.token_ids) for answer in self.edge[kind])
            committed = {"committed_tokens": before["committed_tokens"] + num_tokens - len(self.edge[kind])}
            after = asking.server.engine_counters(at_least=committed)
            self.rows.append(row(kind, self.plain[kind], self.edge[kind], before, after))
            before = after
        plain, edge = (list(chain.from_iterable(answers.values())) for answers in (self.plain, self.edge))
        self.rows.append(row("all", plain, edge, start, before))

    def _results(self) -> dict[str, object]:
        console.print(table(self.rows))
        plain, edge = (list(chain.from_iterable(answers.values())) for answers in (self.plain, self.edge))
        differences = parted(plain, edge)
        console.print(self._verdict(differences, len(plain)))
        if INSTALL_SECONDS.exists():
            self.clock.seconds = {"install": float(INSTALL_SECONDS.read_text()), **self.clock.seconds}
        console.print("Seconds: " + ", ".join(f"{what} {took_s:.0f}" for what, took_s in self.clock.seconds.items()))
        *kinds, overall = self.rows
        return {
            "pair": self.choice.pair.name,
            "dtype": self.choice.dtype,
            "draft": Path(self.draft).name,
            "tokens_per_s_plain": round(overall.plain_tokens_per_s, 1),
            "tokens_per_s_edge": round(overall.edge_tokens_per_s, 1),
            "speedup": round(overall.speedup, 2),
            "by_kind": {each.kind: round(each.speedup, 2) for each in kinds},
            "acceptance_rate": round(overall.acceptance_rate, 3),
            "tokens_per_step": round(overall.tokens_per_step, 2),
            "identical": not differences,
            "num_tokens": sum(len(answer.token_ids) for answer in edge),
            "seconds": self.clock.seconds,
        }

    def _verdict(self, differences: Sequence[int], num_answers: int) -> str:
        if not differences:
            return f"All {num_answers} answers are the same, token by token."
        where = ", ".join(map(str, differences))
        said = f"{len(differences)} of {num_answers} answers differ from plain vLLM's, first at token {where}."
        if self.parted_by_itself is None:
            return said
        return (
            f"{said} In {self.choice.dtype} two words that are almost equally likely may change places with the number "
            f"of tokens in a step: asked all at once, plain vLLM differs from itself in {self.parted_by_itself}."
        )


def parted(ones: Sequence[Answer], others: Sequence[Answer]) -> list[int]:
    """Positions of the first different token, for the answers that differ."""
    pairs = zip(ones, others, strict=True)
    found = (first_difference(one.token_ids, other.token_ids) for one, other in pairs)
    return [at for at in found if at is not None]


def row(
    kind: str, plain: Sequence[Answer], edge: Sequence[Answer], before: dict[str, float], after: dict[str, float]
) -> Row:
    """One row of the table. `before` and `after`: the engine's counters around the answers with an edge."""
    counted = {name: value - before[name] for name, value in after.items()}
    accepted = counted["accepted_tokens"] / max(counted["verified_tokens"], 1)
    return Row(kind, tokens_per_s(plain), tokens_per_s(edge), accepted, counted["committed_tokens"] / counted["steps"])


def main(
    pair: Annotated[str, typer.Option(help="qwen, smollm2, or auto: the first that fits this machine.")] = AUTO,
    draft: Annotated[str, typer.Option(help="What the edge drafts with, in place of the pair's draft.")] = "",
    dtype: Annotated[str, typer.Option(help="Number format to serve in, in place of the one that fits.")] = "",
    hub: Annotated[bool, typer.Option(help="Download the models from the model hub.")] = False,
) -> None:
    """Compare plain vLLM and an edge; exit with status 1 if a token differs in float32."""
    clock = Clock()
    try:
        with clock("models"):
            choice = prepare_fitting(pair, CACHE, hub)
            choice = replace(choice, dtype=dtype or choice.dtype)
        drafting = draft or str(choice.pair.draft_directory(CACHE))
        results = Demo(choice, drafting, clock, Screen(console)).run()
    except (PairError, StackError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; the same command continues from here.")
    last_line = json.dumps(results)
    RESULTS.write_text(last_line + "\n")
    print(last_line)
    sys.exit(0 if results["identical"] or choice.dtype != EXACT else 1)


if __name__ == "__main__":
    typer.run(main)
