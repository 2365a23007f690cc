"""`make demo`: a real vLLM server on one core, a real edge on another, the same questions without and with the edge.

Prints each answer as it streams and ends with one JSON line. Without a draft model of its own the edge drafts by prompt
lookup, so the questions are of the kind where that helps: rewrite, correct or extract from a given text.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from stack import MODEL_NAME, Server, edge_client, vllm_server

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


def main() -> int:
    arguments = ("--speculative-config", "edge", "--spec-tokens", str(SPEC_TOKENS), "--max-model-len", "2048")
    with console.status("Starting vllm serve on one core (up to a minute) ..."):
        server_context = vllm_server(CACHE / MODEL_NAME, CACHE / "demo-server.log", 8000, *arguments)
        server = server_context.__enter__()
    try:
        ask_once = OpenAI(base_url=f"{server.url}/v1", api_key="none").completions.create
        ask_once(model=MODEL_NAME, prompt="Warm up.", max_tokens=8)
        console.rule("without an edge")
        plain = ask(server)
        with edge_client(server.gateway_url, "ngram", CACHE / "demo-edge.log"):
            console.rule("with an edge on another core: edge-client connect ... --draft ngram")
            before = server.metrics()
            edge = ask(server)
            # The engine reports its counters once a second.
            time.sleep(1.5)
            counters = {name: value - before[name] for name, value in server.metrics().items()}
    finally:
        server_context.__exit__(None, None, None)
    result = {
        "tokens_per_s_plain": round(plain.tokens_per_s, 1),
        "tokens_per_s_edge": round(edge.tokens_per_s, 1),
        "speedup": round(edge.tokens_per_s / plain.tokens_per_s, 2),
        "acceptance_rate": round(
            counters["specedge_engine_accepted_tokens"] / counters["specedge_engine_verified_tokens"], 3
        ),
        "tokens_per_step": round(counters["specedge_engine_committed_tokens"] / counters["specedge_engine_steps"], 2),
        "identical": plain.answers == edge.answers,
        "draft": "ngram",
        "num_tokens": edge.num_tokens,
    }
    print(json.dumps(result))
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
