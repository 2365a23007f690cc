"""How hot this machine is, and how much of its time it may draft so that it stays as cool as its user wants."""

import asyncio
from dataclasses import dataclass

import psutil

from edge_client.drafting.pacing import Pace
from vllm_specedge.errors import UserError

READ_S = 2.0
MARGIN_C = 3.0
"""So far below the cap it goes faster again."""
SLOWER, FASTER = 0.7, 1.15
"""Each reading changes it by one of these: heat comes sooner than it goes."""
MIN_SHARE = 0.02
"""It never stops: what it drafts shows whether that is what heats the machine."""


def cooler_share(temperature_c: float, cap_c: float, share: float) -> float:
    """The part of the time (0 to 1) to draft from now on, where it was `share` until this reading; 1: all the time."""
    if temperature_c > cap_c:
        return max(MIN_SHARE, share * SLOWER)
    return share if temperature_c > cap_c - MARGIN_C else min(1.0, share * FASTER)


def hottest_c() -> float:
    """What the hottest of its sensors says, in degrees Celsius. Raises UserError where there is none."""
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
    """0: none."""
    temperature_c: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError where there is no sensor."""
        self.temperature_c = hottest_c() if self.cap_c else None

    async def run(self, pace: Pace) -> None:
        """Change the share of the time that is drafted in, for ever."""
        while self.cap_c:
            self.temperature_c = await asyncio.to_thread(hottest_c)
            pace.share = cooler_share(self.temperature_c, self.cap_c, pace.share)
            await asyncio.sleep(READ_S)
