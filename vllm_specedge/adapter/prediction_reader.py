"""Predicted outputs on their way to the scheduler: text is tokenized on a separate thread, so that no step waits."""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.specedge.predictions")

MAX_TEXT_CHARS = 1 << 20
MAX_WAITING = 64
"""Maximum predictions waiting to be tokenized; more are ignored, and their requests run without."""


class Predictions:
    """Users' predicted outputs, given as text or token ids."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """`tokenizer`: None if the server has none; then only token ids can be predicted."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._thread = ThreadPoolExecutor(1, "specedge-prediction")
        self._num_waiting = threading.Semaphore(MAX_WAITING)
        self.read: deque[tuple[str, Sequence[int]]] = deque()
        """Tokens by request; empty if the prediction was not usable."""

    def submit(self, request_id: str, said: object) -> None:
        """Submit the value that came under KEY, of any type."""
        if self._num_waiting.acquire(blocking=False):
            self._thread.submit(self._read, request_id, said)
        else:
            self.read.append((request_id, ()))

    def _read(self, request_id: str, said: object) -> None:
        try:
            self.read.append((request_id, self._tokens(said)))
        except Exception:  # outermost level of this task
            logger.exception("A predicted output could not be read; its request runs without")
            self.read.append((request_id, ()))
        finally:
            self._num_waiting.release()

    def _tokens(self, said: object) -> Sequence[int]:
        if isinstance(said, str):
            if self._tokenizer is None or len(said) > MAX_TEXT_CHARS:
                return ()
            tokens: list[int] = self._tokenizer.encode(said, add_special_tokens=False)
            return tokens[: self._max_tokens]
        if isinstance(said, list) and all(type(token) is int for token in said):
            return said[: self._max_tokens]
        return ()

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
