"""`make bench-sampling`: how often drafts are right where the target samples, with and without its noise.

    PYTHONPATH=examples python benchmarks/sampling.py [--pair smollm2] [--tokens 64]

The target answers with seeds, by the noise of vLLM's CPU build; at each position of an answer the draft model says what
it thinks most probable. Compared: its most probable token (and its first two); what noise makes of its 64 most probable
ones (and the first two of those); and what drafts that are sampled from it could have at most (1 - total variation).
Nothing is timed.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Annotated, Any

import torch
import typer
import vllm._C  # noqa: F401 - the CPU build's operators
from harness.results import Column, table
from pairs import CACHE, PAIRS, prepare
from questions import QUESTIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_client.drafters.torch_passes import candidates
from edge_client.drafting.belief import FACTORS, Belief
from edge_client.drafting.noise import NUM_CANDIDATES, Noise, SplitMix
from vllm_specedge.wire.sampling import Sampling

TEMPERATURES = (0.7, 1.0)
EVERYDAY = (
    "What is the tallest mountain?",
    "Write a short story about a lost dog.",
    "List five healthy breakfasts.",
    "How do bees make honey?",
    "Give me tips for learning to cook.",
)
"""Questions of kinds that the demo's are not."""
FIRST_SEED = 1000


@dataclass
class Counts:
    """Tokens of answers, and how many of them a draft had."""

    temperature: float
    num_tokens: int = 0
    most_probable: int = 0
    with_noise: int = 0
    noise_as_learnt: int = 0
    two_most_probable: int = 0
    two_with_noise: int = 0
    optimum: float = 0.0
    belief: Belief = field(default_factory=Belief)

    def shares(self) -> dict[str, float]:
        counted = asdict(self)
        del counted["temperature"], counted["num_tokens"], counted["belief"]
        return {name: value / self.num_tokens for name, value in counted.items()}


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

    def prompts(self) -> Iterator[list[int]]:
        for question in chain(*QUESTIONS.values(), EVERYDAY):
            said = [{"role": "user", "content": question}]
            asked = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
            yield asked["input_ids"]

    @torch.inference_mode()
    def answer(
        self, prompt: list[int], row_seeds: SplitMix, temperature: float, num_tokens: int
    ) -> tuple[list[int], Any]:
        """What the target samples, and its logits by temperature: [tokens, vocabulary]."""
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


def count(counts: Counts, models: Pair, prompt: list[int], sampling: Sampling, num_tokens: int) -> None:
    """Add an answer."""
    noise = Noise(sampling)
    answer, target_logits = models.answer(prompt, SplitMix(sampling), counts.temperature, num_tokens)
    logits = models.drafted(prompt, answer)
    size = min(logits.shape[1], target_logits.shape[1])  # of both heads, which may be padded to other sizes
    target, draft = target_logits[:, :size].softmax(-1), (logits[:, :size] / counts.temperature).softmax(-1)
    counts.optimum += float(torch.minimum(target, draft).sum())
    belief = counts.belief.of_request()
    for index, (token, likely) in enumerate(zip(answer, candidates(logits, NUM_CANDIDATES, None), strict=True)):
        scored = noise.scored(likely, len(prompt) + index)
        assert scored is not None
        chosen = scored.best(2, 1.0)
        counts.noise_as_learnt += scored.best(1, belief.factor)[0].token == token
        belief.observe(scored.guesses(FACTORS), token)
        counts.num_tokens += 1
        counts.most_probable += likely[0].token == token
        counts.with_noise += chosen[0].token == token
        counts.two_most_probable += token in [each.token for each in likely[:2]]
        counts.two_with_noise += token in [each.token for each in chosen]


def main(
    pair: Annotated[str, typer.Option(help="smollm2 or qwen.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Of each answer, at most.")] = 64,
) -> None:
    torch.set_num_threads(1)
    models = Pair(pair)
    rows = []
    for temperature in TEMPERATURES:
        counts = Counts(temperature)
        for number, prompt in enumerate(models.prompts()):
            count(counts, models, prompt, Sampling(temperature, 0, 1.0, FIRST_SEED + number, len(prompt)), tokens)
        rows.append({"temperature": temperature, "tokens": counts.num_tokens, **counts.shares()})
    forms = {"temperature": "", "tokens": ""}
    print(table([Column(name.replace("_", " "), name, forms.get(name, ".3f")) for name in rows[0]], rows))


if __name__ == "__main__":
    typer.run(main)
