"""`make play`: the demo's server and an edge, kept running, to look at the status page and to chat.

python examples/play.py [--pair auto|qwen|smollm2] [--port 8000] [--gateway-port 8100]
"""

import json
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from pairs import AUTO, CACHE, PairError, prepare_fitting
from rich.console import Console
from stack import StackError, answering, edge_client, start_server

console = Console(highlight=False, soft_wrap=True)


def main(
    pair: Annotated[str, typer.Option(help="qwen, smollm2, or auto: the first that fits this machine.")] = AUTO,
    port: Annotated[int, typer.Option(help="Port of the server's OpenAI endpoint.")] = 8000,
    gateway_port: Annotated[int, typer.Option(help="Port of its gateway and the status page.")] = 8100,
) -> None:
    """Serve until Ctrl-C."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    choice = prepare_fitting(pair, CACHE, is_from_hub=False)
    model, draft = choice.pair.target_directory(CACHE), choice.pair.draft_directory(CACHE)
    config = {"method": "edge", "listen": f"127.0.0.1:{gateway_port}"}
    arguments = ("--speculative-config", json.dumps(config), "--max-model-len", "2048")
    gateway, endpoint = f"http://127.0.0.1:{gateway_port}", f"http://127.0.0.1:{port}/v1"
    with ExitStack() as stack:
        with console.status("Starting vllm serve on one core (up to a minute) ..."):
            log = CACHE / "play-server.log"
            server = start_server(model, log, port, *arguments, gateway_port=gateway_port, dtype=choice.dtype)
            stack.enter_context(answering(server))
            stack.enter_context(edge_client(gateway, str(draft), CACHE / "play-edge.log"))
        console.print(f"Status page: {gateway}/")
        command = Path(sys.executable).parent / "edge-client"
        console.print(f"Chat, in another terminal: {command} chat {gateway} --server {endpoint} --draft {draft}")
        console.print("Ctrl-C stops both.")
        over.wait()
        with console.status("Stopping ..."):
            stack.close()


if __name__ == "__main__":
    try:
        typer.run(main)
    except (PairError, StackError) as error:
        sys.exit(f"play: {error}")
