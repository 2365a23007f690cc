"""How much of its time a machine may draft so that it stays as cool as its user wants. Pure: who reads is not here."""

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
