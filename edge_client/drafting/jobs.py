"""Forward passes of a draft model: what to run, and on which contexts. Pure: it only calls the drafter it is given."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from edge_client.drafters import Candidate, DraftSequence, Part


@dataclass(frozen=True, slots=True)
class Job:
    """The part of a pass for `request`, as calls of DraftSequence: `keep`, then `append` or, with parents, `branch`.

    `source`: an ended request from whose entries to start.
    """

    request: int
    keep: int
    moved: tuple[int, ...]
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    width: int
    source: int | None = None


Said: TypeAlias = list[list[Candidate]]
"""The candidates behind each token that a job ran; for a chain, behind the last only."""


class NotFiniteError(Exception):
    """A draft model's probabilities are not finite for some jobs of a pass, so its output for them is unusable."""

    def __init__(self, failed: Sequence[Job], said: list[Said]) -> None:
        super().__init__("its probabilities are not finite, as happens to some models in float16")
        self.failed = failed
        self.said = said
        """The output for all jobs. For the others it is valid, as no context reads another's entries."""


Together: TypeAlias = Callable[[Sequence[Part]], list[Said]]


def one_by_one(parts: Sequence[Part]) -> list[Said]:
    """The output of a shared pass, computed by one pass for each part."""
    return [_run(*part) for part in parts]


def run_pass(jobs: Sequence[Job], sequences: Sequence[DraftSequence], together: Together = one_by_one) -> list[Said]:
    """Run one forward pass for all jobs. Returns each job's candidates.

    If there are several jobs, none may be the first of its context. Raises NotFiniteError, and what the model's code
    raises.
    """
    for job, sequence in zip(jobs, sequences, strict=True):
        sequence.keep(job.keep, job.moved)
    parts = [Part(sequence, job.tokens, job.parents, job.width) for job, sequence in zip(jobs, sequences, strict=True)]
    said = together(parts) if len(parts) > 1 else one_by_one(parts)
    failed = [job for job, of_job in zip(jobs, said, strict=True) if not _are_numbers(of_job)]
    if failed:
        raise NotFiniteError(failed, said)
    return said


def _are_numbers(said: Said) -> bool:
    return all(math.isfinite(each.probability) for row in said for each in row)


def _run(sequence: DraftSequence, tokens: Sequence[int], parents: Sequence[int], width: int) -> Said:
    return sequence.branch(tokens, parents, width) if parents else [sequence.append(tokens, width)]


@dataclass(slots=True)
class Sequences:
    """The contexts that a drafter holds, by request."""

    open: Callable[[], DraftSequence]
    needs: Callable[[int], bool]
    """Whether a job of that request, or one that starts from it, may still come (`Speculation.needs`)."""
    by_request: dict[int, DraftSequence] = field(default_factory=dict)

    def of(self, jobs: Sequence[Job]) -> list[DraftSequence]:
        """The context that each job continues. Contexts that no job can continue any more are dropped."""
        return [self._of(job) for job in jobs]

    def _of(self, job: Job) -> DraftSequence:
        if job.source is not None:
            self.by_request[job.request] = self.by_request.pop(job.source)
        for number in [number for number in self.by_request if not self.needs(number)]:
            del self.by_request[number]
        if job.request not in self.by_request:
            self.by_request[job.request] = self.open()
        return self.by_request[job.request]
