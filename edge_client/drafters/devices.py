"""Where a draft model runs, and why. Pure: what there is, is an argument."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_specedge.errors import UserError

NAMES = {"cuda": "CUDA", "mps": "MPS"}


class Choice(NamedTuple):
    """A device, and why it is that one."""

    device: str
    why: str


def choose_device(wanted: str, there: Sequence[str]) -> Choice:
    """`there`: what a runtime can use here, best first. `auto` takes the first. Raises UserError for what is not there.

    A device may have a number, as in `cuda:1`.
    """
    if wanted != "auto":
        if wanted.partition(":")[0] not in there:
            raise UserError(f"There is no device '{wanted}' here: choose {', '.join(there)}.")
        return Choice(wanted, "as --device says")
    best = there[0]
    missing = " and ".join(f"no {name}" for device, name in NAMES.items() if device not in there)
    return Choice(best, f"{missing} here" if best == "cpu" and missing else "the fastest there is here")
