"""The gateway process of an engine: started with it, restarted when it dies, and ended with it."""

import logging
import subprocess
import sys
import threading
import time

from vllm_specedge.backoff import MAX_PAUSE_S, Backoff
from vllm_specedge.config import GatewayOptions
from vllm_specedge.errors import USER_ERROR_STATUS

logger = logging.getLogger("vllm_specedge.engine.gateway_process")

_GRACE_S = 3.0


class GatewayProcess(threading.Thread):
    """One `vllm-specedge gateway`, kept running until `stop`. It also ends by itself when this process is gone."""

    def __init__(self, options: GatewayOptions, engine_endpoint: str) -> None:
        super().__init__(name="specedge-supervisor", daemon=True)
        self._command = gateway_command(options, engine_endpoint)
        self._stopped = threading.Event()
        self._process = self._popen()

    def _popen(self) -> "subprocess.Popen[bytes]":
        # Standard input stays open as long as this process lives: its end tells the gateway to stop.
        # A process group of its own: the engine handles Ctrl-C in a terminal. The same session: Linux shares a core
        # between sessions, and on a busy one left a gateway in a session of its own without a turn for many seconds.
        # -P keeps the working directory's modules out.
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, process_group=0)

    def run(self) -> None:
        backoff = Backoff(first_s=0.25, lasting_s=MAX_PAUSE_S)
        while True:
            started_s = time.monotonic()
            status = self._process.wait()
            self._close_stdin()
            if self._stopped.is_set():
                return
            if status == USER_ERROR_STATUS:
                logger.error("The gateway cannot start (see its message above): serving without drafts")
                return
            pause_s = backoff.ended(time.monotonic() - started_s)
            logger.warning("The gateway ended with status %s: starting it again in %.1f s", status, pause_s)
            if self._stopped.wait(pause_s):
                return
            self._process = self._popen()
            if self._stopped.is_set():
                self._process.terminate()

    def _close_stdin(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def stop(self) -> None:
        self._stopped.set()
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_stdin()


def gateway_command(options: GatewayOptions, engine_endpoint: str) -> list[str]:
    """The command line of a gateway with these options. It holds no secrets: tokens and keys are named by file."""
    command = [sys.executable, "-P", "-m", "vllm_specedge.cli", "gateway"]
    command += ["--engines", engine_endpoint, "--ends-with-stdin"]
    for name, value in options.model_dump(exclude_defaults=True).items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    return command
