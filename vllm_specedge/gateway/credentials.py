"""Bearer tokens and the roles they allow. Only hashes are stored; a token is shown once, when it is issued."""

import hashlib
import hmac
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from vllm_specedge.errors import UserError
from vllm_specedge.gateway.known import PRIVATE, ROLES

MAX_DAYS = 36_500
MAX_NAME = 64
_DAY_S = 86_400.0
_PREFIX = "se-"


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One issued token. The `role` pool also allows private."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: str
    role: Annotated[str, Field(pattern=f"^({'|'.join(ROLES)})$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]*$")]
    expires_s: float
    """Unix time; 0: never. An earlier release accepted any number, also nan, for which the token is never valid."""
    max_edges: Annotated[int, Field(ge=0)] = 0
    """Maximum connections that use it at once; 0: the gateway's limit."""

    def is_valid(self, now_s: float) -> bool:
        """Whether the token is valid at unix time `now_s`."""
        return not self.expires_s or now_s < self.expires_s

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({self.role, PRIVATE})


def _hash(token: str) -> str:
    # A token has 256 random bits, so a plain hash cannot be reversed by search: it needs no salt or stretching.
    return hashlib.sha256(token.encode()).hexdigest()


_RECORDS = TypeAdapter(list[TokenRecord])


def expiry_s(days: float, now_s: float) -> float:
    """The unix time at which a token of this many days expires; 0 for 0 days: never. Raises UserError."""
    if not 0 <= days <= MAX_DAYS:  # also false for nan
        raise UserError(f"--days takes 0 to {MAX_DAYS} (0: for ever), not {days:g}.")
    return now_s + days * _DAY_S if days else 0.0


class TokenFile:
    """The tokens of one gateway, in a JSON file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[TokenRecord]:
        """All tokens ever issued and not revoked. Raises UserError if the file cannot be read."""
        try:
            text = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"The tokens file {self.path} cannot be read ({error.strerror}): "
                "make one with 'vllm-specedge token issue'."
            ) from None
        try:
            return _RECORDS.validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"The tokens file {self.path} cannot be read ({_damage(text, error)}): fix it, or move it away and "
                "make another with 'vllm-specedge token issue'."
            ) from None

    def issue(self, name: str, role: str, expires_s: float = 0.0, max_edges: int = 0) -> str:
        """Add a token and return it. Raises UserError if the name is taken or the role unknown."""
        if role not in ROLES:
            raise UserError(f"There is no role '{role}': choose {' or '.join(ROLES)}.")
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
            raise UserError(f"A token's name has 1 to {MAX_NAME} letters, without line breaks or spaces around them.")
        token = _PREFIX + secrets.token_urlsafe(32)
        with self._changing():
            records = self.records() if self.path.exists() else []
            if any(record.name == name for record in records):
                raise UserError(f"There is a token named '{name}' already: revoke it first or choose another name.")
            self._write([*records, TokenRecord(name, role, _hash(token), expires_s, max_edges)])
        return token

    def revoke(self, name: str) -> None:
        """Remove a token by its name. Raises UserError if there is none."""
        self.records()  # fails before a folder or a lock is made if there is no file
        with self._changing():
            records = self.records()
            left = [record for record in records if record.name != name]
            if len(left) == len(records):
                raise UserError(f"There is no token named '{name}': 'vllm-specedge token list' shows all.")
            self._write(left)

    def find(self, token: str, now_s: float) -> TokenRecord | None:
        """The record of `token`; None if it is unknown or has expired at unix time `now_s`."""
        digest, found = _hash(token), None
        for record in self.records():
            if hmac.compare_digest(record.sha256, digest):
                found = record
        return found if found is not None and found.is_valid(now_s) else None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock of all processes that change the file. Raises UserError.

        The lock is a separate file, since the tokens file is replaced. It is released when its process ends, for any
        reason.
        """
        if sys.platform == "win32":
            raise UserError("Tokens are issued on the gateway's machine, which cannot be Windows.")
        import fcntl  # noqa: PLC0415 - there is none on Windows

        target = self.path.resolve()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(target.with_name(target.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise UserError(
                f"The tokens file {self.path} cannot be written ({error.strerror}): name another with --tokens-file."
            ) from None

    def _write(self, records: list[TokenRecord]) -> None:
        """Replace the file's records atomically: if anything fails, the file keeps the old ones."""
        target = self.path.resolve()  # a link stays a link
        descriptor, unfinished = tempfile.mkstemp(prefix=target.name, suffix=".unfinished", dir=target.parent)
        try:
            with open(descriptor, "w") as file:
                json.dump([asdict(record) for record in records], file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            os.unlink(unfinished)
            raise


def _damage(text: bytes, error: ValidationError) -> str:
    """The fault and its place: the entry's number, name and field, or the line and column."""
    first = error.errors(include_url=False, include_input=False)[0]
    place: list[str] = []
    match first["loc"]:
        case (int(index), *inside):
            entry = json.loads(text)[index]
            name = entry.get("name") if isinstance(entry, dict) else None
            names = [f"{name!r:.{MAX_NAME + 2}}"] if isinstance(name, str) else []
            place = [f"entry {index + 1}", *names, *map(str, inside)]
    return ": ".join([", ".join(place), first["msg"]] if place else [first["msg"]])
