"""`make play`: the demo's server and an edge that stay, for looking at the status page and for chatting.

python examples/play.py [--port 8000] [--gateway-port 8100]
"""

import json
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from stack import MODEL_NAME, StackError, edge_client, vllm_server

CACHE = Path(__file__).parent.parent / ".cache"
DRAFT = CACHE / "smollm2-draft"
console = Console(highlight=False, soft_wrap=True)


def main(
    port: Annotated[int, typer.Option(help="Of the server's OpenAI endpoint.")] = 8000,
    gateway_port: Annotated[int, typer.Option(help="Of its gateway, and the status page.")] = 8100,
) -> None:
    """Serve until Ctrl-C."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    config = {"method": "edge", "num_speculative_tokens": 2, "listen": f"127.0.0.1:{gateway_port}"}
    arguments = ("--speculative-config", json.dumps(config), "--max-model-len", "2048")
    gateway, endpoint = f"http://127.0.0.1:{gateway_port}", f"http://127.0.0.1:{port}/v1"
    with ExitStack() as stack:
        with console.status("Starting vllm serve on one core (up to a minute) ..."):
            stack.enter_context(
                vllm_server(CACHE / MODEL_NAME, CACHE / "play-server.log", port, *arguments, gateway_port=gateway_port)
            )
            stack.enter_context(edge_client(gateway, str(DRAFT), CACHE / "play-edge.log"))
        console.print(f"Status page: {gateway}/")
        command = Path(sys.executable).parent / "edge-client"
        console.print(f"Chat, in another terminal: {command} chat {gateway} --server {endpoint} --draft {DRAFT}")
        console.print("Ctrl-C ends both.")
        over.wait()
        with console.status("Stopping ..."):
            stack.close()


if __name__ == "__main__":
    try:
        typer.run(main)
    except StackError as error:
        sys.exit(f"play: {error}")
