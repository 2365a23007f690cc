"""Every error that this project raises on purpose."""

from enum import IntEnum

USER_ERROR_STATUS = 2
"""Exit status of a command if its user must change something: a retry would not help."""


class ByeCode(IntEnum):
    """Why a connection ends. Below 10 the edge may reconnect; from 10 on a retry cannot help (docs/protocol.md)."""

    GOING_AWAY = 0
    NO_ENGINE = 1
    TOO_SLOW = 2
    SILENT = 3
    FULL = 4
    PROTOCOL = 10
    VERSION = 11
    TOKENIZER = 12
    TOKEN_ID = 13
    ROLE = 14


class UserError(Exception):
    """An error that the user can fix: the message is one sentence that says what to change."""


class ProtocolError(Exception):
    """A violation of docs/protocol.md."""


class LocalProtocolError(ProtocolError):
    """A violation by this side: our bug."""


class RemoteProtocolError(ProtocolError):
    """A violation by the peer: close its connection with `code` and `text`."""

    def __init__(self, text: str, code: ByeCode = ByeCode.PROTOCOL) -> None:
        super().__init__(text)
        self.code = code
