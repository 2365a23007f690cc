"""How hot this machine is, where its system says so."""

import psutil

from vllm_specedge.errors import UserError


def hottest_c() -> float:
    """What the hottest of its sensors says, in degrees Celsius. Raises UserError where there is none."""
    read = getattr(psutil, "sensors_temperatures", dict)  # psutil has it on some systems only
    found = [each.current for sensors in read().values() for each in sensors]
    if not found:
        text = "This machine does not say how hot it is: do without --max-temperature-c, or use --max-tokens-per-s."
        raise UserError(text)
    return float(max(found))
