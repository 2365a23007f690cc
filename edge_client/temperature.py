"""How hot this machine is, and what share of the time it may draft to stay below the user's limit."""

import asyncio
from dataclasses import dataclass

import psutil

from edge_client.drafting.pacing import Pace
from vllm_specedge.errors import UserError

READ_S = 2.0
MARGIN_C = 3.0
"""Degrees below the cap at which the share grows again."""
SLOWER, FASTER = 0.7, 1.15
"""Factors by which a reading changes the share: a machine heats up faster than it cools down."""
MIN_SHARE = 0.02
"""Drafting never stops entirely, which shows whether drafting is what heats the machine."""


def cooler_share(temperature_c: float, cap_c: float, share: float) -> float:
    """The share of the time (0 to 1) to draft from now on, if it was `share` until this reading; 1: all the time."""
    if temperature_c > cap_c:
        return max(MIN_SHARE, share * SLOWER)
    return share if temperature_c > cap_c - MARGIN_C else min(1.0, share * FASTER)


def hottest_c() -> float:
    """The temperature of the hottest sensor, in degrees Celsius. Raises UserError if there is no sensor."""
    read = getattr(psutil, "sensors_temperatures", dict)  # psutil has it on some systems only
    found = [each.current for sensors in read().values() for each in sensors]
    if not found:
        text = "This machine has no temperature sensor to read: use --max-tokens-per-s instead of --max-temperature-c."
        raise UserError(text)
    return float(max(found))


@dataclass(slots=True)
class Cooler:
    """Keeps a machine below a temperature by drafting less of the time."""

    cap_c: float
    """0: no cap."""
    temperature_c: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError if there is a cap and no sensor."""
        self.temperature_c = hottest_c() if self.cap_c else None

    async def run(self, pace: Pace) -> None:
        """Adjust `pace.share` every READ_S, for ever; return at once without a cap."""
        while self.cap_c:
            self.temperature_c = await asyncio.to_thread(hottest_c)
            pace.share = cooler_share(self.temperature_c, self.cap_c, pace.share)
            await asyncio.sleep(READ_S)
