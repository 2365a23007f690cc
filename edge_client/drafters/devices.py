"""The device that a draft model runs on, and why. Pure: the available devices are an argument."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_specedge.errors import UserError

NAMES = {"cuda": "CUDA", "mps": "MPS"}


class Choice(NamedTuple):
    """A device, and why it was chosen."""

    device: str
    why: str


def choose_device(wanted: str, there: Sequence[str]) -> Choice:
    """Choose a device among `there`, those that a runtime can use here, best first. `auto` takes the first.

    A device may have a number, as in `cuda:1`. Raises UserError for a device that is not available.
    """
    if wanted != "auto":
        if wanted.partition(":")[0] not in there:
            raise UserError(f"There is no device '{wanted}' here: choose {', '.join(there)}.")
        return Choice(wanted, "set by --device")
    best = there[0]
    missing = " and ".join(f"no {name}" for device, name in NAMES.items() if device not in there)
    return Choice(best, f"{missing} here" if best == "cpu" and missing else "the fastest there is here")
