"""`make demo`: a real vLLM server on one core, a real edge on another, the same questions without and with the edge.

Prints each answer as it streams and ends with one JSON line. Without a draft model of its own the edge drafts by prompt
lookup, so the questions are of the kind where that helps: rewrite, correct or extract from a given text.
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

SPEC_TOKENS = 5
MAX_TOKENS = 96
CACHE = Path(__file__).parent.parent / ".cache"

TEXT = (
    "The old lighthouse stands on the northern tip of the island. It was built in 1874 by the engineer Thomas Reed, "
    "and its lamp could be seen from thirty kilometres away. The keeper, Anna Moss, lived there with her two sons and "
    "a grey cat. Every evening she climbed the hundred and twelve steps to light the lamp. In the winter of 1921 a "
    "storm broke the glass of the lamp room, and the sons carried new panes up the stairs by hand."
)
QUESTIONS = (
    f"Repeat the following text word for word.\n\n{TEXT}",
    f"Copy this text, but write 'tower' in place of 'lighthouse'.\n\n{TEXT}",
    f"List the sentences of this text, one on each line, with a number before each.\n\n{TEXT}",
    f"Correct the spelling of this text and write it out in full.\n\n{TEXT.replace('lighthouse', 'lighthuose')}",
)

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


def ask(server: Server) -> Run:
    """Stream every answer to the screen; the clock runs from each answer's first token to its last."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    run = Run([], 0, 0.0)
    for number, question in enumerate(QUESTIONS, 1):
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


def compare(server: Server) -> dict[str, object]:
    """The questions without an edge, then with one."""
    OpenAI(base_url=f"{server.url}/v1", api_key="none").completions.create(model=MODEL_NAME, prompt="Hi", max_tokens=8)
    console.rule("without an edge")
    plain = ask(server)
    with edge_client(server.gateway_url, "ngram", CACHE / "demo-edge.log"):
        console.rule("with an edge on another core: edge-client connect ... --draft ngram")
        before = server.engine_counters()
        edge = ask(server)
        after = server.engine_counters(at_least={"committed_tokens": before["committed_tokens"] + edge.num_tokens})
    counted = {name: value - before[name] for name, value in after.items()}
    return {
        "tokens_per_s_plain": round(plain.tokens_per_s, 1),
        "tokens_per_s_edge": round(edge.tokens_per_s, 1),
        "speedup": round(edge.tokens_per_s / plain.tokens_per_s, 2),
        "acceptance_rate": round(counted["accepted_tokens"] / counted["verified_tokens"], 3),
        "tokens_per_step": round(counted["committed_tokens"] / counted["steps"], 2),
        "identical": plain.answers == edge.answers,
        "draft": "ngram",
        "num_tokens": edge.num_tokens,
    }


def main() -> int:
    arguments = ("--speculative-config", "edge", "--spec-tokens", str(SPEC_TOKENS), "--max-model-len", "2048")
    with ExitStack() as stack:
        with console.status("Starting vllm serve on one core (up to a minute) ..."):
            server = stack.enter_context(vllm_server(CACHE / MODEL_NAME, CACHE / "demo-server.log", 8000, *arguments))
        result = compare(server)
        with console.status("Stopping ..."):
            stack.close()
    print(json.dumps(result))
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    try:
        status = main()
    except StackError as error:
        sys.exit(f"demo: {error}")
    sys.exit(status)
