"""`make demo`: a real vLLM server on one core, a real edge on another, the same questions without and with the edge.

    python examples/demo.py [ngram]

Prints each answer as it streams and ends with one JSON line. The edge drafts with the project's own five-layer draft of
the served model (examples/distill_draft) for ordinary questions; with `ngram`, by prompt lookup for tasks on a text.
"""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from stack import MODEL_NAME, Server, StackError, edge_client, vllm_server

MAX_TOKENS = 128
CACHE = Path(__file__).parent.parent / ".cache"
TEXT = (
    "The old lighthouse stands on the northern tip of the island. It was built in 1874 by the engineer Thomas Reed, "
    "and its lamp could be seen from thirty kilometres away. The keeper, Anna Moss, lived there with her two sons and "
    "a grey cat. Every evening she climbed the hundred and twelve steps to light the lamp. In the winter of 1921 a "
    "storm broke the glass of the lamp room, and the sons carried new panes up the stairs by hand."
)


@dataclass(frozen=True)
class Scene:
    """What the edge drafts with, how many tokens a step verifies, and what is asked."""

    draft: str
    spec_tokens: int
    questions: tuple[str, ...]


SCENES = {
    "smollm2-draft": Scene(
        str(CACHE / "smollm2-draft"),
        2,
        (
            "Explain to a ten-year-old why the sky is blue.",
            "Give me five tips for a job interview.",
            "What is the difference between weather and climate?",
            "Write an e-mail to my landlord: the heating has been broken since Monday.",
            "Write a short story about an old lighthouse and a grey cat.",
            "How do I make a simple vegetable soup?",
        ),
    ),
    "ngram": Scene(
        "ngram",
        5,
        (
            f"Repeat the following text word for word.\n\n{TEXT}",
            f"Copy this text, but write 'tower' in place of 'lighthouse'.\n\n{TEXT}",
            f"List the sentences of this text, one on each line, with a number before each.\n\n{TEXT}",
        ),
    ),
}

console = Console(highlight=False)


@dataclass
class Run:
    """The answers of one pass over the questions, and how long their tokens took."""

    answers: list[str]
    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def ask(server: Server, questions: tuple[str, ...]) -> Run:
    """Stream every answer to the screen; the clock runs from each answer's first token to its last."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    run = Run([], 0, 0.0)
    for number, question in enumerate(questions, 1):
        console.print(f"[bold]{number}. {question.partition(chr(10))[0]}[/]")
        parts: list[str] = []
        first_s = last_s = 0.0
        stream = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                last_s = time.monotonic()
                first_s = first_s or last_s
                parts.append(chunk.choices[0].delta.content)
                console.print(parts[-1], end="", style="dim", markup=False)
            if chunk.usage is not None:
                run.num_tokens += chunk.usage.completion_tokens - 1
        console.print("\n")
        run.answers.append("".join(parts))
        run.seconds += last_s - first_s
    return run


def compare(server: Server, name: str) -> dict[str, object]:
    """The questions without an edge, then with one."""
    scene = SCENES[name]
    OpenAI(base_url=f"{server.url}/v1", api_key="none").completions.create(model=MODEL_NAME, prompt="Hi", max_tokens=8)
    console.rule("without an edge")
    plain = ask(server, scene.questions)
    with edge_client(server.gateway_url, scene.draft, CACHE / "demo-edge.log"):
        console.rule(f"with an edge on another core: edge-client connect ... --draft {name}")
        before = server.engine_counters()
        edge = ask(server, scene.questions)
        after = server.engine_counters(at_least={"committed_tokens": before["committed_tokens"] + edge.num_tokens})
    counted = {name: value - before[name] for name, value in after.items()}
    return {
        "tokens_per_s_plain": round(plain.tokens_per_s, 1),
        "tokens_per_s_edge": round(edge.tokens_per_s, 1),
        "speedup": round(edge.tokens_per_s / plain.tokens_per_s, 2),
        "acceptance_rate": round(counted["accepted_tokens"] / counted["verified_tokens"], 3),
        "tokens_per_step": round(counted["committed_tokens"] / counted["steps"], 2),
        "identical": plain.answers == edge.answers,
        "draft": name,
        "num_tokens": edge.num_tokens,
    }


def main(name: str) -> int:
    num_tokens = str(SCENES[name].spec_tokens)
    arguments = ("--speculative-config", "edge", "--spec-tokens", num_tokens, "--max-model-len", "2048")
    with ExitStack() as stack:
        with console.status("Starting vllm serve on one core (up to a minute) ..."):
            server = stack.enter_context(vllm_server(CACHE / MODEL_NAME, CACHE / "demo-server.log", 8000, *arguments))
        result = compare(server, name)
        with console.status("Stopping ..."):
            stack.close()
    print(json.dumps(result))
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    try:
        status = main(sys.argv[1] if sys.argv[1:] else "smollm2-draft")
    except StackError as error:
        sys.exit(f"demo: {error}")
    sys.exit(status)
