"""Why a draft was refused: its vocabulary held against those that the gateway's engines have."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import httpx2 as httpx

from edge_client.link import Gateway, OtherVocabularyError
from vllm_specedge.errors import RemoteProtocolError, UserError
from vllm_specedge.fingerprint import without_fillers
from vllm_specedge.vocabulary import MAX_PACKED_BYTES, Difference, differences, unpack_vocabulary

PATH = "/edge/v1/vocabularies"
MAX_LIST_BYTES = 64 << 10
MAX_FETCHED = 8
"""Vocabularies: a gateway has few, and this machine has little time."""
FETCHING_S = 60.0
NUM_NAMED = 3
MAX_SHOWN = 24
"""Letters of somebody else's name."""

OwnVocabulary: TypeAlias = Callable[[], Mapping[str, int]]


class Mismatch(NamedTuple):
    """How a draft's vocabulary differs from a target's."""

    model: str
    found: Sequence[Difference]
    num_tokens: int
    """That either side has."""

    def __str__(self) -> str:
        verb = "differs" if len(self.found) == 1 else "differ"
        such = "such as" if len(self.found) > NUM_NAMED else "namely"
        named = ", ".join(map(_named, self.found[:NUM_NAMED]))
        return (
            f"The draft's vocabulary is not that of {_shown(self.model)}: {len(self.found):,} of {self.num_tokens:,} "
            f"tokens {verb}, {such} {named}: choose a draft of the same family, or draft with 'ngram'."
        )


def _named(each: Difference) -> str:
    match each:
        case (token, None, here):
            ids = f"none there, id {here} here"
        case (token, there, None):
            ids = f"id {there} there, none here"
        case (token, there, here):
            ids = f"id {there} there, {here} here"
    return f"'{_shown(token)}' ({ids})"


def _shown(text: str) -> str:
    """What it says, and nothing that a terminal would take for more."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_SHOWN])
    return f"{shown}..." if len(text) > MAX_SHOWN else shown


async def explained(refusal: OtherVocabularyError, gateway: Gateway, own: OwnVocabulary) -> UserError:
    """The refusal with what differs, from the model that is most alike; as it was where that cannot be found out."""
    try:
        async with asyncio.timeout(FETCHING_S):
            targets = await _fetched(gateway)
        draft = await asyncio.to_thread(lambda: without_fillers(own()))
        mismatches = [await asyncio.to_thread(_compared, *target, draft) for target in targets]
        closest = min(mismatches, key=lambda each: len(each.found))
        return UserError(str(closest)) if draft and closest.found else refusal
    except Exception:  # noqa: BLE001 - the refusal stands, whatever goes wrong in explaining it
        return refusal


def _compared(model: str, fingerprint: str, packed: bytes, draft: Mapping[str, int]) -> Mismatch:
    target = unpack_vocabulary(packed, fingerprint)
    return Mismatch(model, differences(target, draft), len(target.keys() | draft.keys()))


async def _fetched(gateway: Gateway) -> list[tuple[str, str, bytes]]:
    """The model, fingerprint and packed vocabulary of each that the gateway serves."""
    found = []
    async with gateway.client() as client:
        for each in _listed(await _get(client, PATH, MAX_LIST_BYTES))[:MAX_FETCHED]:
            packed = b""
            while len(packed) < each.num_bytes:
                left_bytes = each.num_bytes - len(packed)
                part = await _get(client, f"{PATH}/{each.fingerprint}?offset={len(packed)}", left_bytes)
                if not part:
                    raise RemoteProtocolError("a vocabulary ends too soon")
                packed += part
            found.append((each.model, each.fingerprint, packed))
    return found


class _Listed(NamedTuple):
    model: str
    fingerprint: str
    num_bytes: int

    @property
    def is_valid(self) -> bool:
        is_size = type(self.num_bytes) is int and self.num_bytes <= MAX_PACKED_BYTES
        return is_size and re.fullmatch("[0-9a-f]{64}", self.fingerprint) is not None


def _listed(data: bytes) -> list[_Listed]:
    """What a gateway lists. Raises RemoteProtocolError."""
    try:
        entries = json.loads(data)["vocabularies"]
        listed = [_Listed(", ".join(each["models"]), each["fingerprint"], each["bytes"]) for each in entries]
        if all(each.is_valid for each in listed):
            return listed
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise RemoteProtocolError("what should be a list of vocabularies is none")


async def _get(client: httpx.AsyncClient, path: str, limit_bytes: int) -> bytes:
    """A body as it comes over the wire. Raises RemoteProtocolError if it is too long, and what httpx raises."""
    async with client.stream("GET", path, headers={"accept-encoding": "identity"}) as answer:
        answer.raise_for_status()
        body = bytearray()
        async for chunk in answer.aiter_raw():
            body += chunk
            if len(body) > limit_bytes:
                raise RemoteProtocolError(f"{path} has more than {limit_bytes} bytes")
        return bytes(body)
