"""`make bench-sampler`: cost of sampling in a step that verifies drafts, by equality and vLLM's own way.

    python benchmarks/sampler_cost.py [--rounds 40]

vLLM's rejection sampler on random logits, in this process on one core; drafts are right with a given probability. Three
ways in turn: a plain step of the same number of requests; vLLM's verification; this plugin's. Times are median
milliseconds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from statistics import median
from typing import Annotated, Any

import torch
import typer
from harness.results import Column, table
from vllm.platforms import current_platform

from vllm_specedge.adapter.worker import coupling, cpu_kernels
from vllm_specedge.adapter.worker.sampling import shorten

# As in vLLM's workers, before the import of modules that use the kernels.
current_platform.import_kernels()
if hasattr(current_platform, "register_triton_kernel_overrides"):
    current_platform.register_triton_kernel_overrides()
cpu_kernels.mend()
shorten()

from vllm.v1.sample import rejection_sampler  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessors  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.rejection_sampler import RejectionSampler  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata  # noqa: E402

NUM_DRAFT_TOKENS = 3
ACCEPTANCE = 0.6
PEAK = 12.0
"""Distance of the likeliest token's logit above the others, which are normal with standard deviation 2."""
VOCABULARIES = {"SmolLM2": 49_152, "Qwen2.5": 151_936}
LIMITS: dict[str, dict[str, float]] = {"no limits": {}, "top-k 20, top-p 0.8": {"top_k": 20, "top_p": 0.8}}
Way = Callable[[], object]


class Batch:
    """Requests that each verify a draft."""

    def __init__(self, num_requests: int, vocab_size: int, limits: dict[str, float]) -> None:
        num_rows = num_requests * (1 + NUM_DRAFT_TOKENS)
        self.logits = 2 * torch.randn(num_rows, vocab_size)
        likely = torch.randint(vocab_size, (num_rows,))
        self.logits[torch.arange(num_rows), likely] = PEAK
        is_right = torch.rand(num_rows) < ACCEPTANCE
        drafts = torch.where(is_right, likely, (likely + 1) % vocab_size).view(num_requests, -1)[:, :-1]
        self.drafts = SpecDecodeMetadata.make_dummy(drafts.tolist(), torch.device("cpu"))
        rows = torch.arange(num_rows, dtype=torch.int32).view(num_requests, -1)
        self.drafts.target_logits_indices = rows[:, :-1].flatten()
        self.drafts.bonus_logits_indices = rows[:, -1].contiguous()
        none = torch.zeros(num_requests)
        of_rows = {name: torch.full((num_requests,), value) for name, value in limits.items()}
        self.made = SamplingMetadata(
            temperature=torch.ones(num_requests),
            all_greedy=False,
            all_random=True,
            top_p=of_rows.get("top_p"),
            top_k=of_rows.get("top_k"),
            generators={row: torch.Generator().manual_seed(row) for row in range(num_requests)},
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=none,
            presence_penalties=none,
            repetition_penalties=torch.ones(num_requests),
            output_token_ids=[[] for _ in range(num_requests)],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(),
        )

    def plain(self) -> None:
        """Sample one token per request, without drafts."""
        Sampler()(logits=self.logits[self.drafts.bonus_logits_indices], sampling_metadata=self.made)

    def verify(self) -> None:
        RejectionSampler(Sampler())(self.drafts, None, self.logits.clone(), self.made)

    def copy(self) -> None:
        """The copying in `verify`, which lets each way change its logits."""
        self.logits.clone()


@contextmanager
def vllms_own(originals: tuple[Any, Any]) -> Iterator[None]:
    """Restore vLLM's verification while the block runs."""
    ours = RejectionSampler.forward, rejection_sampler.rejection_sample
    RejectionSampler.forward, rejection_sampler.rejection_sample = originals
    try:
        yield
    finally:
        RejectionSampler.forward, rejection_sampler.rejection_sample = ours


def timed_ms(act: Way) -> float:
    start_s = time.perf_counter()
    act()
    return 1000 * (time.perf_counter() - start_s)


def measured(batch: Batch, originals: tuple[Any, Any], rounds: int) -> dict[str, float]:
    """Milliseconds by way."""
    times: dict[str, list[float]] = {"plain": [], "vllm": [], "ours": [], "copy": []}
    for _ in range(rounds + 2):
        times["plain"].append(timed_ms(batch.plain))
        with vllms_own(originals):
            times["vllm"].append(timed_ms(batch.verify))
        times["ours"].append(timed_ms(batch.verify))
        times["copy"].append(timed_ms(batch.copy))
    found = {way: median(each[2:]) for way, each in times.items()}
    copy = found.pop("copy")
    return {**found, "vllm": found["vllm"] - copy, "ours": found["ours"] - copy}


COLUMNS = (
    Column("model", "model"),
    Column("limits", "limits"),
    Column("requests", "requests"),
    Column("plain step", "plain", ".2f"),
    Column("vLLM's verification", "vllm", ".2f"),
    Column("by equality", "ours", ".2f"),
    Column("over vLLM's", lambda row: row["ours"] / row["vllm"], ".2f"),
)


def main(rounds: Annotated[int, typer.Option(help="Rounds of each way.", min=1)] = 40) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    originals = RejectionSampler.forward, rejection_sampler.rejection_sample
    coupling.couple_v1()
    rows = []
    for (model, size), (name, limits), number in product(VOCABULARIES.items(), LIMITS.items(), (1, 8, 32)):
        batch = Batch(number, size, limits)
        rows.append({"model": model, "limits": name, "requests": number, **measured(batch, originals, rounds)})
    print(table(COLUMNS, rows))


if __name__ == "__main__":
    typer.run(main)
