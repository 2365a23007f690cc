"""Predicted outputs on their way to the scheduler: text becomes token ids on a thread of its own; no step waits."""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.specedge.predictions")

MAX_TEXT_CHARS = 1 << 20
MAX_WAITING = 64
"""Predictions that are being read at a time; more are left out, and their requests go on without."""


class Predictions:
    """What users predicted of their requests' answers, as text or token ids."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """`tokenizer`: None if the server has none; then only token ids can be predicted."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._thread = ThreadPoolExecutor(1, "specedge-prediction")
        self._num_waiting = threading.Semaphore(MAX_WAITING)
        self.read: deque[tuple[str, Sequence[int]]] = deque()
        """By request; an empty one could not be used."""

    def submit(self, request_id: str, said: object) -> None:
        """What came under KEY, whatever it is."""
        if self._num_waiting.acquire(blocking=False):
            self._thread.submit(self._read, request_id, said)
        else:
            self.read.append((request_id, ()))

    def _read(self, request_id: str, said: object) -> None:
        try:
            self.read.append((request_id, self._tokens(said)))
        except Exception:  # the outermost edge of this task
            logger.exception("A predicted output could not be read; its request goes on without")
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
