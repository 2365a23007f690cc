"""Forward passes of a draft model: what is to be run, and on which context. Pure: it calls what a drafter gives it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_client.drafters import Candidate, DraftSequence


@dataclass(frozen=True, slots=True)
class Job:
    """One forward pass for `request`, in the terms of DraftSequence: `keep`, then `append` or, with parents, `branch`.

    `source`: start from the entries of that request, which is over.
    """

    request: int
    keep: int
    moved: tuple[int, ...]
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    width: int
    source: int | None = None


class NotFiniteError(Exception):
    """A draft model's probabilities are no numbers: nothing can be made of what it says."""


def run_pass(sequence: DraftSequence, job: Job) -> list[list[Candidate]]:
    """One forward pass. Raises NotFiniteError, and what the draft model's code raises."""
    sequence.keep(job.keep, job.moved)
    if job.parents:
        said = sequence.branch(job.tokens, job.parents, job.width)
    else:
        said = [sequence.append(job.tokens, job.width)]
    if not all(math.isfinite(each.probability) for candidates in said for each in candidates):
        raise NotFiniteError("its probabilities are no numbers, as float16 makes of some models")
    return said


@dataclass(slots=True)
class Sequences:
    """The contexts that a drafter holds, by request."""

    open: Callable[[], DraftSequence]
    needs: Callable[[int], bool]
    """Whether a job of that request, or one that starts from it, may still come (`Speculation.needs`)."""
    by_request: dict[int, DraftSequence] = field(default_factory=dict)

    def of(self, job: Job) -> DraftSequence:
        """The context that a job goes on from. Those that nothing goes on from any more are dropped."""
        if job.source is not None:
            self.by_request[job.request] = self.by_request.pop(job.source)
        for number in [number for number in self.by_request if not self.needs(number)]:
            del self.by_request[number]
        if job.request not in self.by_request:
            self.by_request[job.request] = self.open()
        return self.by_request[job.request]
