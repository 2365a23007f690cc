"""Where a host is, by its name or address."""

import ipaddress


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine, by its name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
