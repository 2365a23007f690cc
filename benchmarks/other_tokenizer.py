"""`make bench-other-tokenizer`: a translated draft with another tokenizer: how often it is right, and its cost.

    PYTHONPATH=examples python benchmarks/other_tokenizer.py [--target smollm2] [--draft qwen] [--tokens 64]

The target answers the demo's questions greedily, in the int8 runtime, and a draft reads the answers token by token.
Prints the share of tokens that were the draft's most probable one, and that were among its first three, for the draft
of the target's own pair and for the other pair's; and the microseconds of translating, by itself, and between the
passes of the model, which leave no cache warm.
"""

import time
from itertools import chain
from types import SimpleNamespace
from typing import Annotated, cast

import torch
import typer
from harness.results import Column, table
from pairs import CACHE, PAIRS, prepare
from questions import QUESTIONS
from transformers import AutoTokenizer

from edge_client.drafters import Candidate, Drafter, DrafterOptions, DraftSequence
from edge_client.drafters.choose import load_drafter
from edge_client.drafters.hf.tokenizers import tokenizer_vocabulary
from edge_client.drafters.retokenized import Retokenization, RetokenizedDrafter, retokenization


def answers(name: str, num_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and the answers of a pair's target."""
    directory = str(PAIRS[name].target_directory(CACHE))
    tokenizer, target = AutoTokenizer.from_pretrained(directory), load_drafter(DrafterOptions(directory, "cpu", 1))
    found = []
    for question in chain(*QUESTIONS.values()):
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        sequence, said = target.open(), list[int]()
        token = sequence.append(prompt, 1)[0].token
        while len(said) < num_tokens and token != tokenizer.eos_token_id:
            said.append(token)
            token = sequence.append([token], 1)[0].token
        found.append((list(prompt), said))
    return found


class Timed:
    """A drafter that records the seconds of its passes."""

    def __init__(self, drafter: Drafter) -> None:
        self.fingerprint, self.description = drafter.fingerprint, drafter.description
        self.max_context_tokens, self.max_width = drafter.max_context_tokens, 1
        self.took_s = 0.0
        self._drafter = drafter

    def open(self) -> DraftSequence:
        return _TimedSequence(self, self._drafter.open())


class _TimedSequence:
    def __init__(self, drafter: Timed, sequence: DraftSequence) -> None:
        self.keep, self.branch = sequence.keep, sequence.branch
        self._drafter, self._sequence = drafter, sequence

    def append(self, tokens: list[int], width: int) -> list[Candidate]:
        started_s = time.perf_counter()
        said = self._sequence.append(tokens, width)
        self._drafter.took_s += time.perf_counter() - started_s
        return said


def shares(drafter: Drafter, inner: Timed, texts: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    first = third = number = 0
    started_s, before_s = time.perf_counter(), inner.took_s
    for prompt, said in texts:
        sequence = drafter.open()
        likely = sequence.append(prompt, 3)
        for token in said:
            guessed = [each.token for each in likely]
            first, third, number = first + (guessed[:1] == [token]), third + (token in guessed), number + 1
            likely = sequence.append([token], 3)
    beside_s = time.perf_counter() - started_s - (inner.took_s - before_s)
    return {"first": first / number, "of three": third / number, "us": 1e6 * beside_s / number}


class Nothing:
    """A draft's context that takes no time."""

    def keep(self, length: int, moved: tuple[int, ...] = ()) -> None:
        pass

    def append(self, tokens: list[int], width: int) -> list[Candidate]:
        return [Candidate(101 * number, 0.1) for number in range(width)]

    def branch(self, tokens: list[int], parents: list[int], width: int) -> list[list[Candidate]]:
        return [self.append([], width) for _ in tokens]


def commit_us(pieces: Retokenization, drafter: Drafter, texts: list[tuple[list[int], list[int]]]) -> float:
    """Time of a commit at the length of these texts: truncate the draft, append a token, draft four and four."""
    silent = SimpleNamespace(
        **{name: getattr(drafter, name) for name in ("max_context_tokens", "max_width", "description")}
    )
    silent.open = Nothing
    sequence, number, took_s = RetokenizedDrafter(cast(Drafter, silent), pieces, "other").open(), 0, 0.0
    for prompt, said in texts:
        sequence.keep(0)
        sequence.append(prompt, 3)
        length = len(prompt)
        for token in said:
            started_s = time.perf_counter()
            sequence.keep(length)
            sequence.append([token], 3)
            sequence.branch([token] * 4, [length] * 4, 3)
            sequence.branch([token] * 4, [length + 1] * 4, 3)
            took_s += time.perf_counter() - started_s
            number, length = number + 1, length + 1
    return 1e6 * took_s / number


def main(
    target: Annotated[str, typer.Option(help="The pair whose target is drafted for.")] = "smollm2",
    draft: Annotated[str, typer.Option(help="The pair whose draft drafts.")] = "qwen",
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
) -> None:
    torch.set_num_threads(1)
    for name in {target, draft}:
        prepare(PAIRS[name], CACHE)
    texts, rows = answers(target, tokens), []
    for name in dict.fromkeys((target, draft)):
        directory = str(PAIRS[name].draft_directory(CACHE))
        inner = Timed(load_drafter(DrafterOptions(directory, "cpu", 1)))
        drafter: Drafter = inner
        if name != target:
            started_s = time.perf_counter()
            own = tokenizer_vocabulary(directory)
            there = tokenizer_vocabulary(str(PAIRS[target].target_directory(CACHE)))
            pieces = retokenization(there, own)
            took_s = time.perf_counter() - started_s
            print(f"{pieces.coverage:.0%} of the target's tokens are one token of the draft; {took_s:.1f} s")
            drafter = RetokenizedDrafter(inner, pieces, "other")
            print(f"A commit and the draft after it: {commit_us(pieces, inner, texts):.0f} us of translating alone.")
        rows.append({"draft": name, **shares(drafter, inner, texts)})
    columns = (Column("draft", "draft"), Column("right", "first", ".3f"), Column("of three", "of three", ".3f"))
    print(table((*columns, Column("us per token besides passes", "us", ".0f")), rows))


if __name__ == "__main__":
    typer.run(main)
