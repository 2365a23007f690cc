"""`make bench-sampling`: how often drafts are right if the target samples, with and without its noise.

    PYTHONPATH=examples python benchmarks/sampling.py [--pair smollm2] [--tokens 64]

The target answers the questions of workload.toml with seeds, with the noise of vLLM's CPU build; the draft model
predicts each position of an answer. Compared: its most probable token (and its first two); the best of its 64 most
probable ones after adding the noise (and the first two of those), with the draft's probabilities as they are and as an
edge weights them; and the upper bound for drafts that are sampled from it (1 - total variation). Tokens per step assume
drafts of DRAFT tokens that are always there. Nothing is timed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import vllm._C  # noqa: F401 - the CPU build's operators
from harness.results import Column, circumstances, output_path, table
from harness.workload import Question, questions
from pairs import CACHE, PAIRS, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_client.drafters.torch_passes import candidates
from edge_client.drafting.noise import NUM_CANDIDATES, SHARPNESS, Noise, SplitMix
from vllm_specedge.wire.sampling import Sampling

FIRST_SEED = 1000
DRAFT = 5
ALL = "all"
MOST_PROBABLE, WITH_NOISE, SHARPER = "most probable", "with noise", "as an edge does"
TWO_MOST_PROBABLE, TWO_SHARPER = "two most probable", "two as an edge does"


@dataclass
class Counts:
    """Positions of answers, and at which of them a draft was right."""

    temperature: float
    kind: str
    num_tokens: int = 0
    right: dict[str, list[list[bool]]] = field(default_factory=dict)
    """By way of drafting, for each answer."""
    optimum: float = 0.0

    def begin(self) -> None:
        """Start an answer."""
        for answers in self.right.values():
            answers.append([])

    def add(self, way: str, is_right: bool) -> None:
        self.right.setdefault(way, [[]])[-1].append(is_right)

    def row(self) -> dict[str, Any]:
        shares = {way: sum(map(sum, answers)) / self.num_tokens for way, answers in self.right.items()}
        steps = {
            f"{way}, tokens a step": self.num_tokens / sum(map(num_steps, self.right[way]))
            for way in self.right
            if way not in (TWO_MOST_PROBABLE, TWO_SHARPER)
        }
        common = {"temperature": self.temperature, "kind": self.kind, "tokens": self.num_tokens}
        return {**common, **shares, "optimum": self.optimum / self.num_tokens, **steps}


def num_steps(right: Sequence[bool]) -> int:
    """Steps of an answer if each verifies DRAFT tokens: it yields the leading right ones and one more."""
    at = steps = 0
    while at < len(right):
        draft = right[at : at + DRAFT]
        at += 1 + (draft.index(False) if False in draft else len(draft))
        steps += 1
    return steps


class Pair:
    """A target and its draft, in float32, on one core."""

    def __init__(self, name: str) -> None:
        pair = PAIRS[name]
        prepare(pair, CACHE)
        self.tokenizer = AutoTokenizer.from_pretrained(pair.target_directory(CACHE))
        self.target, self.draft = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            for directory in (pair.target_directory(CACHE), pair.draft_directory(CACHE))
        )

    def prompt(self, question: Question) -> list[int]:
        asked = self.tokenizer.apply_chat_template(
            question.body["messages"], add_generation_prompt=True, return_dict=True
        )
        ids: list[int] = asked["input_ids"]
        return ids

    @torch.inference_mode()
    def answer(
        self, prompt: list[int], row_seeds: SplitMix, temperature: float, num_tokens: int
    ) -> tuple[list[int], Any]:
        """The target's sampled answer, and its logits by temperature: [tokens, vocabulary]."""
        said, logits, past = list[int](), [], None
        read = torch.tensor([prompt])
        while len(said) < num_tokens:
            output = self.target(read, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits.append(output.logits[0, -1].float() / temperature)
            row_seed = torch.tensor([row_seeds.row_seed(len(prompt) + len(said))])
            said.append(int(torch.ops._C.fused_gumbel_argmax(logits[-1][None], row_seed)))
            if said[-1] == self.tokenizer.eos_token_id:
                break
            read = torch.tensor([[said[-1]]])
        return said, torch.stack(logits)

    @torch.inference_mode()
    def drafted(self, prompt: list[int], answer: list[int]) -> Any:
        """The draft's logits at each position of an answer: [tokens, vocabulary]."""
        logits = self.draft(torch.tensor([prompt + answer])).logits[0].float()
        return logits[len(prompt) - 1 : -1]


def count(
    counts: Counts,
    models: Pair,
    prompt: list[int],
    sampling: Sampling,
    num_tokens: int,
    factors: Sequence[float],
) -> None:
    """Add an answer to the counts. `factors`: further factors on the draft's log probabilities to count."""
    noise = Noise(sampling)
    answer, target_logits = models.answer(prompt, SplitMix(sampling), counts.temperature, num_tokens)
    logits = models.drafted(prompt, answer)
    size = min(logits.shape[1], target_logits.shape[1])  # the heads may be padded to different sizes
    target, draft = target_logits[:, :size].softmax(-1), (logits[:, :size] / counts.temperature).softmax(-1)
    counts.optimum += float(torch.minimum(target, draft).sum())
    counts.num_tokens += len(answer)
    counts.begin()
    for index, (token, likely) in enumerate(zip(answer, candidates(logits, NUM_CANDIDATES, None), strict=True)):
        position = len(prompt) + index
        sharper = noise.chosen(likely, position, 2, SHARPNESS)
        counts.add(MOST_PROBABLE, likely[0].token == token)
        counts.add(WITH_NOISE, noise.chosen(likely, position, 1, 1.0)[0].token == token)
        counts.add(SHARPER, sharper[0].token == token)
        counts.add(TWO_MOST_PROBABLE, token in [each.token for each in likely[:2]])
        counts.add(TWO_SHARPER, token in [each.token for each in sharper])
        for factor in factors:
            counts.add(f"factor {factor:g}", noise.chosen(likely, position, 1, factor)[0].token == token)


def together(of_kinds: Sequence[Counts]) -> Counts:
    """All kinds together; each token has the same weight."""
    right = {way: [answer for counts in of_kinds for answer in counts.right[way]] for way in of_kinds[0].right}
    num_tokens, optimum = sum(each.num_tokens for each in of_kinds), sum(each.optimum for each in of_kinds)
    return Counts(of_kinds[0].temperature, ALL, num_tokens, right, optimum)


def main(
    pair: Annotated[str, typer.Option(help="smollm2 or qwen.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    each: Annotated[int, typer.Option(help="Questions of each kind.", min=1)] = 5,
    temperature: Annotated[list[float], typer.Option(help="Temperatures; repeatable.")] = [0.7, 1.0],  # noqa: B006
    factor: Annotated[
        list[float], typer.Option(help="Further factors on the draft's log probabilities; repeatable.")
    ] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/sampling-drafts-PAIR.json.")] = None,
) -> None:
    """Count how often drafts are right if the target samples, with and without its noise."""
    torch.set_num_threads(1)
    models, rows = Pair(pair), list[dict[str, Any]]()
    for of_target in temperature:
        of_kinds = []
        for kind, asked in questions().items():
            of_kinds.append(counts := Counts(of_target, kind))
            for number, question in enumerate(asked[:each]):
                prompt = models.prompt(question)
                sampling = Sampling(of_target, 0, 1.0, FIRST_SEED + number, len(prompt))
                count(counts, models, prompt, sampling, tokens, factor)
        rows += [counts.row() for counts in (*of_kinds, together(of_kinds))]
    forms = {"temperature": "", "kind": "", "tokens": ""}
    print(table([Column(name, name, forms.get(name, ".3f")) for name in rows[0]], rows))
    path = output_path(f"sampling-drafts-{pair}.json", output)
    path.write_text(json.dumps({**circumstances(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
