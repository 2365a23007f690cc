"""Whether an edge is connected: python deploy/edge_health.py GATEWAY_URL CA_FILE NAME; exit status 0 or 1."""

import ssl
import sys

import httpx2 as httpx

TIMEOUT_S = 5


def main(url: str, ca_file: str, name: str) -> int:
    """0 if the gateway has an edge of this name."""
    trusted = ssl.create_default_context(cafile=ca_file)
    try:
        status = httpx.get(f"{url}/status.json", verify=trusted, timeout=TIMEOUT_S, trust_env=False).json()
    except (httpx.HTTPError, ValueError) as error:
        sys.stderr.write(f"{url} does not say who is connected: {error}\n")
        return 1
    return 0 if any(edge["name"] == name for edge in status["edges"]) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
