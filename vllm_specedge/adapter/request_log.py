"""Redaction of sessions and predicted texts in vLLM's logs.

Both are in a request's extra arguments, which vLLM logs with `--enable-log-requests`, and when its engine dies.
"""

import logging
import re
from contextlib import suppress

LOGGERS = ("vllm.entrypoints.serve.utils.request_logger", "vllm.entrypoints.logger", "vllm.logging_utils.dump_input")
"""Loggers of requests, in this release of vLLM and in others, and of an engine's last input when it died."""
HIDDEN = "..."
_QUOTED = r"""'(?:[^'\\]|\\.)*(?:'|\\?\Z)|"(?:[^"\\]|\\.)*(?:"|\\?\Z)"""
_OURS = re.compile(rf"""(?P<name>(['"])specedge(?:_prediction)?\2: ?)(?:{_QUOTED}|\[[^\]]*(?:\]|\Z))""", re.DOTALL)
"""Our arguments as Python and JSON write them: a text or token ids; the end may be cut off."""


def hidden(text: str) -> str:
    """A line of a log, without the values of our arguments."""
    return _OURS.sub(rf"\g<name>{HIDDEN}", text)


class _HidesOurs(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        # The handler reports records that cannot be formatted; nothing here may raise into the logging code.
        with suppress(Exception):
            text = record.getMessage()
            if "specedge" in text:
                record.msg, record.args = hidden(text), None
        return True


def hide_ours() -> None:
    """Redact logs of this process from now on; calling it again is harmless."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _HidesOurs) for each in logger.filters):
            logger.addFilter(_HidesOurs())
