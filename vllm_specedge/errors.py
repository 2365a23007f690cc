"""Every error that this project raises on purpose."""

from enum import IntEnum

USER_ERROR_STATUS = 2
"""A command's exit status where its user must change something: trying again would not help."""


class ByeCode(IntEnum):
    """Why a connection ends. Below 10 the edge may come back; from 10 on a retry cannot help (docs/protocol.md)."""

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
    """The user can mend this: the message is one sentence that says what to change."""


class ProtocolError(Exception):
    """Somebody broke docs/protocol.md."""


class LocalProtocolError(ProtocolError):
    """This side did: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer did: close it with `code` and say `text`."""

    def __init__(self, text: str, code: ByeCode = ByeCode.PROTOCOL) -> None:
        super().__init__(text)
        self.code = code
