"""What vLLM writes of a request in its logs, without what is nobody's business there: sessions and predicted texts.

Both travel in a request's extra arguments, which vLLM shows with `--enable-log-requests`, and when its engine dies.
"""

import logging
import re
from contextlib import suppress

LOGGERS = ("vllm.entrypoints.serve.utils.request_logger", "vllm.entrypoints.logger", "vllm.logging_utils.dump_input")
"""Of requests, in this release of vLLM and in others, and of what an engine was at when it died."""
HIDDEN = "..."
_QUOTED = r"""'(?:[^'\\]|\\.)*(?:'|\\?\Z)|"(?:[^"\\]|\\.)*(?:"|\\?\Z)"""
_OURS = re.compile(rf"""(?P<name>(['"])specedge(?:_prediction)?\2: ?)(?:{_QUOTED}|\[[^\]]*(?:\]|\Z))""", re.DOTALL)
"""As Python and JSON write it: a text or token ids; the end may be cut off."""


def hidden(text: str) -> str:
    """A line of a log, without the values of our arguments."""
    return _OURS.sub(rf"\g<name>{HIDDEN}", text)


class _HidesOurs(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        # What cannot be formatted is the handler's to report; nothing here may raise into whoever logs.
        with suppress(Exception):
            text = record.getMessage()
            if "specedge" in text:
                record.msg, record.args = hidden(text), None
        return True


def hide_ours() -> None:
    """From now on, in this process; again is harmless."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _HidesOurs) for each in logger.filters):
            logger.addFilter(_HidesOurs())
