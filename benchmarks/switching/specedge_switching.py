"""A vLLM plugin for switched.py: in every other period nothing is verified and no request is held; all else continues.

PYTHONPATH=benchmarks/switching SPECEDGE_PERIOD_S=3 vllm serve MODEL --speculative-config edge
"""

import os
import time
from typing import Any

VARIABLE = "SPECEDGE_PERIOD_S"


def is_active(period: int) -> bool:
    """Whether drafts count in a period, counted on the monotonic clock, which all processes of a machine share."""
    return period % 2 == 0


def register() -> None:
    """Called by vLLM in each of its processes."""
    if VARIABLE not in os.environ:
        return
    from vllm_specedge.adapter.drafting import Drafting  # noqa: PLC0415 - where vLLM is there

    period_s, plan = float(os.environ[VARIABLE]), Drafting._plan

    def switched(self: Drafting) -> Any:
        planned = plan(self)
        return planned if is_active(int(time.monotonic() / period_s)) else planned.undrafted()

    Drafting._plan = switched  # type: ignore[method-assign]
