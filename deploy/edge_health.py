"""Check that an edge is connected: python deploy/edge_health.py GATEWAY_URL CA_FILE NAME; exit status 0 or 1."""

import ssl
import sys

import httpx2 as httpx

TIMEOUT_S = 5


def main(url: str, ca_file: str, name: str) -> int:
    """0 if an edge of this name is connected to the gateway, else 1."""
    trusted = ssl.create_default_context(cafile=ca_file)
    try:
        status = httpx.get(f"{url}/status.json", verify=trusted, timeout=TIMEOUT_S, trust_env=False).json()
    except (httpx.HTTPError, ValueError) as error:
        sys.stderr.write(f"{url} does not list the connected edges: {error}\n")
        return 1
    return 0 if any(edge["name"] == name for edge in status["edges"]) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
