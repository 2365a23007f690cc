"""`make evidence`: the gain from edges with a real pair of models, over several starts of the servers.

    PYTHONPATH=examples python benchmarks/evidence.py --pair smollm2 [--starts 5] [--places 'edge, 20 ms']

A start is a new process of every server, in random order; then every place gets every load, in random order: plain
vLLM, its own methods, the paper's waiting, and ours with edges of several kinds. The load is vLLM's own benchmark
(`vllm bench serve`, as a library) with the questions of workload.toml: the same prompts and the same seeds in each
place. A place is compared with plain vLLM in the same start, and judged by an interval over starts
(evidence_figures.py). Servers have one core, edges and load the other. Every run is saved when it is done, and a later
call adds its `--starts` to those in the file.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import typer
from evidence_figures import PLAIN, as_table, summarise
from harness import results
from harness.edges import CONNECT, REPLAY, Edges, drafting, flags
from harness.recorded_draft import DraftReader
from harness.replay import Recording, write_recordings
from harness.results import Kept, output_path
from harness.runs import Run, Slot, digest, latencies
from harness.servers import Target, edge, launch, metered, stand_aside, story, waiting
from harness.vllm_bench import asked_by_vllm
from harness.workload import MIXED, SPREAD, Question, chosen, questions, varied
from pairs import CACHE, PAIRS, Pair, PairError, prepare
from vllm.benchmarks.datasets import SampleRequest

from edge_client.drafters import DrafterOptions
from edge_client.drafters.choose import load_drafter
from edge_client.drafting.noise import NUM_CANDIDATES
from edge_client.drafting.speculation import MAX_CANDIDATES

LOGS = results.LOGS / "evidence"
RECORDINGS = LOGS / "recordings.json"
WARM_UP_TOKENS = 8
MAX_SEQS = 32
GOOD, POOR, STALLING, DEAD, REAL = "good", "poor", "stalling", "dead", "real"
RECORDED = "recorded draft"
"""Edges that replay the pair's draft, which has read plain vLLM's answers: as on a machine of their own."""
REPLAYED = {
    GOOD: {"first": 0.75, "second": 0.6, "pass_ms": 6.0},
    DEAD: {"first": 0.75, "second": 0.6, "pass_ms": 6.0},
    POOR: {"first": 0.3, "second": 0.3, "pass_ms": 6.0},
    STALLING: {"first": 0.75, "second": 0.6, "pass_ms": 6.0, "stall_s": 2.0, "stall_every_s": 5.0},
}
"""Kinds of edges that replay plain vLLM's greedy answers with an accuracy, and their options."""
MAX_CONNECTIONS = 8
MAX_RECORDED = 4
"""Questions that plain vLLM answers at once for recordings."""


class Place(NamedTuple):
    """A server and the edges connected to it."""

    server: str
    rtt_ms: float | None = None
    """Round trip to the edges; None: no edges."""
    edge: str | None = None


NGRAM, DRAFT_MODEL, WAITING, EDGE = "ngram", "draft_model", "waiting", "edge"
PLACES = {
    PLAIN: Place(PLAIN),
    NGRAM: Place(NGRAM),
    DRAFT_MODEL: Place(DRAFT_MODEL),
    "waiting, 20 ms": Place(WAITING, 20.0, REAL),
    "no edges": Place(EDGE),
    **{f"edge, {rtt_ms:g} ms": Place(EDGE, rtt_ms, REAL) for rtt_ms in (5.0, 20.0, 80.0)},
    **{f"edge elsewhere, {rtt_ms:g} ms": Place(EDGE, rtt_ms, RECORDED) for rtt_ms in (5.0, 20.0, 80.0)},
    **{f"{kind} edges, 20 ms": Place(EDGE, 20.0, kind) for kind in REPLAYED},
}
DEFAULT = (PLAIN, NGRAM, "no edges", "edge, 20 ms")
DTYPES = {"smollm2": "float32", "qwen": "bfloat16"}
GREEDY, OWN = "greedy", "own"
"""How answers are sampled: greedily, or with the model's own defaults and a seed for each question."""


@dataclass(frozen=True)
class Settings:
    """Settings that all compared runs share."""

    pair: str
    dtype: str
    tokens: int
    """Most tokens of an answer; their mean with several requests at a time."""
    each: int
    """Questions of each kind at one request at a time."""
    many: int
    """Mean number of questions per concurrent request at several requests at a time."""
    spread: float = SPREAD

    def configs(self, places: Sequence[Place]) -> dict[str, dict[str, object] | None]:
        """The --speculative-config of each server that is needed."""
        draft = str(PAIRS[self.pair].draft_directory(CACHE))
        known: dict[str, dict[str, object] | None] = {
            PLAIN: None,
            NGRAM: {"method": "ngram", "num_speculative_tokens": 5},
            DRAFT_MODEL: {"method": "draft_model", "model": draft, "num_speculative_tokens": 3},
            WAITING: waiting(5, credit_tokens=5),
            EDGE: edge(None),
        }
        return {name: known[name] for name in dict.fromkeys(place.server for place in places)}


# -- the order -----------------------------------------------------------------------------------------------------


def slots_of(places: Sequence[str], loads: Sequence[Slot], start: int) -> list[Slot]:
    """The runs of one start: loads in random order, and for each the places in random order. Loads with a rate come
    last, as the rate is relative to plain vLLM's measured capacity."""
    chance, slots = Random(start), []
    for load in sorted(chance.sample(loads, len(loads)), key=lambda load: load.rate > 0):
        for name in chance.sample(places, len(places)):
            place = PLACES[name]
            if place.edge not in REPLAYED or load.temperature == 0:  # they know nothing of noise
                slots.append(replace(load, arm=name, rtt_ms=place.rtt_ms, edge=place.edge, repeat=start))
    return slots


def loads_of(requests: Sequence[int], rates: Sequence[float], sampling: Sequence[str]) -> list[Slot]:
    """Loads to measure: by kind of question for one request at a time, of all kinds for more."""
    loads = []
    for way in sampling:
        alone = Slot(arm="", temperature=0.0 if way == GREEDY else None)
        loads += [replace(alone, kind=kind) for kind in questions()] if 1 in requests else []
        loads += [replace(alone, kind=MIXED, requests=number) for number in requests if number > 1]
        loads += [replace(alone, kind=MIXED, requests=max(requests), rate=rate) for rate in rates]
    return loads


# -- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """One start of the servers."""

    settings: Settings
    targets: dict[str, Target]
    kept: Kept
    number: int
    draft: DraftReader | None = None
    """The pair's draft, if it is to be replayed."""
    _recorded: dict[tuple[Question, int, float | None], Recording] = field(default_factory=dict)
    """Plain vLLM's answers by question, seed and temperature."""

    def measure(self, slot: Slot) -> Iterator[Run]:
        target = self.targets[PLACES[slot.arm].server]
        asked = self._asked(slot)
        replayed = self._replayed(asked, slot)
        with drafting_as(slot, target, PAIRS[self.settings.pair], replayed) as edges:
            self._ask(target, asked[: slot.requests], slot, WARM_UP_TOKENS)
            with edges.stopped() if edges and slot.edge == DEAD else nullcontext():
                result, used = metered(
                    target, edges, lambda: self._ask(target, asked, slot, self.settings.tokens, self._per_s(slot))
                )
        yield run_of_result(slot, result, used)

    def _asked(self, slot: Slot) -> list[Question]:
        number = self.settings.each if slot.kind != MIXED else slot.requests * self.settings.many
        return chosen(questions(), slot.kind, number, first=self.number * number)

    def _per_s(self, slot: Slot) -> float | None:
        """Requests per second of a load with a rate, from plain vLLM's throughput at the highest concurrency."""
        if not slot.rate:
            return None
        full = [
            run
            for run in self.kept.runs
            if (run.arm, run.repeat, run.temperature, run.rate) == (PLAIN, self.number, slot.temperature, 0.0)
            and run.requests == slot.requests
        ]
        return slot.rate * full[-1].requests * self.settings.many / full[-1].seconds

    @property
    def _first_seed(self) -> int:
        return 1000 * self.number

    def _known(self, asked: Sequence[Question], slot: Slot) -> list[Recording]:
        """Plain vLLM's answers to these questions, with the seeds and the temperature that `_ask` gives them."""
        keys = [(question, seed, slot.temperature) for seed, question in enumerate(asked, self._first_seed)]
        new = [key for key in keys if key not in self._recorded]
        bodies = [{**question.body, "seed": seed, **_temperature(slot)} for question, seed, _ in new]
        # Few at a time: prompts of seeded requests that are computed in chunks end plain vLLM (docs/upstream.md).
        for first in range(0, len(new), MAX_RECORDED):
            batch = slice(first, first + MAX_RECORDED)
            answers = self.targets[PLAIN].converse(bodies[batch], 2 * self.settings.tokens)
            self._recorded.update(zip(new[batch], [answer.recording for answer in answers], strict=True))
        return [self._recorded[key] for key in keys]

    def _replayed(self, asked: Sequence[Question], slot: Slot) -> Mapping[str, object]:
        """Write what a slot's edges replay to RECORDINGS; returns their options, none if they replay nothing."""
        if slot.edge in REPLAYED:
            write_recordings(RECORDINGS, self._known(asked, slot))
            return REPLAYED[slot.edge]
        if slot.edge != RECORDED:
            return {}
        assert self.draft is not None
        width = MAX_CANDIDATES if slot.temperature == 0 else NUM_CANDIDATES
        write_recordings(RECORDINGS, [self.draft.read(each, width) for each in self._known(asked, slot)])
        return {"pass_ms": 1e3 * self.draft.pass_s, "row_ms": 1e3 * self.draft.row_s}

    def _ask(
        self, target: Target, asked: Sequence[Question], slot: Slot, num_tokens: int, per_s: float | None = None
    ) -> dict[str, Any]:
        samples = [
            SampleRequest(
                prompt="",
                prompt_len=0,
                expected_output_len=varied(num_tokens, number) if slot.kind == MIXED else num_tokens,
                chat_messages=question.body["messages"],
                request_overrides={**question.fields, "seed": number},
            )
            for number, question in enumerate(asked, self._first_seed)
        ]
        load = {"per_s": per_s} if per_s else {"at_once": slot.requests}
        return asked_by_vllm(target, samples, LOGS, "openai-chat", body=_temperature(slot), seed=self.number, **load)


def _temperature(slot: Slot) -> dict[str, float]:
    """The body's field; none for the model's own."""
    return {} if slot.temperature is None else {"temperature": slot.temperature}


def drafting_as(
    slot: Slot, target: Target, pair: Pair, replayed: Mapping[str, object]
) -> AbstractContextManager[Edges | None]:
    """The edges of a slot: with the pair's draft, or replaying RECORDINGS with these options."""
    if slot.edge is None:
        return nullcontext()
    if slot.edge == REAL:
        options = flags(draft=pair.draft_directory(CACHE), threads=1)
        return drafting(target.server, slot.rtt_ms, CONNECT, options, LOGS / "edge.log")
    connections = min(slot.requests, MAX_CONNECTIONS)
    options = flags(recordings=RECORDINGS, edges=connections, max_requests=-(-slot.requests // connections), **replayed)
    return drafting(target.server, slot.rtt_ms, REPLAY, options, LOGS / "edges.log", connections)


def run_of_result(slot: Slot, result: dict[str, Any], used: dict[str, Any]) -> Run:
    """The result of vLLM's benchmark as a Run."""
    each = [
        [round(first_s, 4), round(first_s + sum(gaps_s), 4), num_tokens]
        for first_s, gaps_s, num_tokens in zip(result["ttfts"], result["itls"], result["output_lens"], strict=True)
    ]
    return Run(
        **asdict(slot),
        **used,
        **latencies(result["ttfts"], [gap_s for gaps_s in result["itls"] for gap_s in gaps_s]),
        each=each,
        num_tokens=result["total_output_tokens"],
        seconds=result["duration"],
        decode_tokens=result["total_output_tokens"] - len(each),
        decode_seconds=sum(map(sum, result["itls"])),
        answers=[digest(text) for text in result["generated_texts"]],
    )


def drafter_options(pair: Pair) -> DrafterOptions:
    """The draft as an edge on one core runs it."""
    return DrafterOptions(str(pair.draft_directory(CACHE)), "cpu", threads=1)


def measure_start(
    settings: Settings, kept: Kept, places: Sequence[str], loads: Sequence[Slot], draft: DraftReader | None
) -> None:
    number = 1 + max((run.repeat for run in kept.runs), default=-1)
    configs = settings.configs([PLACES[name] for name in places])
    names = Random(number).sample(list(configs), len(configs))
    with story("evidence") as stack:
        targets = launch(
            {name: configs[name] for name in names},
            LOGS,
            stack,
            # Places that share a server would find the prompts of the previous one cached, and plain vLLM would not.
            "--no-enable-prefix-caching",
            max_seqs=MAX_SEQS,
            kv_bytes=400 << 20,
            model=PAIRS[settings.pair].target_directory(CACHE),
            dtype=settings.dtype,
        )
        start = Start(settings, targets, kept, number, draft)
        kept.measure_all(
            slots_of(places, loads, number), start.measure, partial(figures, settings.pair), "whole_tokens_per_s"
        )


def figures(pair: str, runs: Sequence[Run]) -> dict[str, object]:
    return {"cells": summarise(runs, pair)}


def main(
    pair: Annotated[str, typer.Option(help=f"One of {', '.join(PAIRS)}.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="Number format of the servers; default: the pair's.")] = "",
    places: Annotated[list[str], typer.Option(help=f"Any of {', '.join(PLACES)}; always plain.")] = list(DEFAULT),  # noqa: B006
    requests: Annotated[list[int], typer.Option(help="Concurrent requests; repeatable.")] = [1, 4, 8],  # noqa: B006
    rates: Annotated[list[float], typer.Option(help="Shares of plain vLLM's capacity (Poisson); repeatable.")] = [],  # noqa: B006
    sampling: Annotated[list[str], typer.Option(help=f"{GREEDY}, {OWN} (the model's defaults).")] = [OWN, GREEDY],  # noqa: B006
    starts: Annotated[int, typer.Option(help="Starts to add.", min=0)] = 5,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=16)] = 64,
    each: Annotated[int, typer.Option(help="Questions of each kind, at one request at a time.", min=1)] = 3,
    many: Annotated[int, typer.Option(help="Questions per request, at several at a time.", min=1)] = 3,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/evidence-PAIR.json.")] = None,
) -> None:
    """Measure the gain from edges with a real pair of models, over several starts of the servers."""
    if pair not in PAIRS or (unknown := set(places) - PLACES.keys()):
        raise typer.BadParameter(f"there is no {pair if pair not in PAIRS else ', '.join(sorted(unknown))}")
    settings = Settings(pair, dtype or DTYPES[pair], tokens, each, many)
    kept = Kept.load(output_path(f"evidence-{pair}.json", output), asdict(settings), is_resumed=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        prepare(PAIRS[pair], CACHE)
    except PairError as error:
        sys.exit(f"evidence: {error}")
    names, loads = list(dict.fromkeys([PLAIN, *places])), loads_of(requests, rates, sampling)
    stand_aside()
    is_replayed = any(PLACES[name].edge == RECORDED for name in names)
    draft = DraftReader(load_drafter(drafter_options(PAIRS[pair]))) if is_replayed else None
    for _ in range(starts):
        measure_start(settings, kept, names, loads, draft)
    print(as_table(summarise(kept.runs, pair)))
    results.console.print(f"All runs are in {kept.path}")


if __name__ == "__main__":
    typer.run(main)
