"""How to use a draft model that was refused: compare its vocabulary with those of the gateway's engines."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple, TypeAlias

import httpx2 as httpx

from edge_client.drafters.retokenized import Retokenization, retokenization
from edge_client.drafters.translated import Translation
from edge_client.gateway_link import Gateway, OtherVocabularyError
from vllm_specedge.errors import RemoteProtocolError, UserError
from vllm_specedge.wire.fingerprint import without_fillers
from vllm_specedge.wire.vocabulary import MAX_PACKED_BYTES, Difference, differences, unpack_vocabulary

PATH = "/edge/v1/vocabularies"
MAX_LIST_BYTES = 64 << 10
MAX_FETCHED = 8
"""Maximum vocabularies to fetch: a gateway has few, and this machine has little time."""
FETCHING_S = 60.0
LIST_PAUSES_S = (0.0, 0.5, 1.0)
NUM_NAMED = 3
MAX_MISSING_PART = 0.01
"""Share of the target's tokens that a draft may lack and still be harmless. Fine-tunes and releases of one family
differ in some dozens of tokens, different families in a quarter or more."""
MIN_COVERAGE = 0.1
"""Minimum share of the target's tokens that are each one token of the draft. Below it, the spelling is unknown."""
SPACES = ("Ġ", "▁", " ")
"""Spellings of a token that every model knows well: a space."""
MAX_SHOWN = 24
"""Maximum characters shown of a name that the other side chose."""

OwnVocabulary: TypeAlias = Callable[[], Mapping[str, int]]


class Mismatch(NamedTuple):
    """How a draft's vocabulary differs from a target's."""

    model: str
    found: Sequence[Difference]
    num_tokens: int
    """Tokens that at least one side has."""
    fingerprint: str = ""
    """The target's fingerprint."""
    is_retokenized: bool = False
    """The draft has another tokenizer; its tokens are converted to the target's by their bytes."""

    @property
    def is_harmless(self) -> bool:
        """Whether the draft has almost all of the target's tokens, under any ids, so that it drafts well anyway.

        Where it lacks a token its draft is wrong. That costs only this draft: the target decides every token.
        """
        num_of_draft = sum(each.target_id is None for each in self.found)
        num_missing = sum(each.draft_id is None for each in self.found)
        return num_missing <= MAX_MISSING_PART * (self.num_tokens - num_of_draft)

    def __str__(self) -> str:
        nearly, end = ("", "choose a draft of the same family, or draft with 'ngram'")
        if self.is_harmless:
            nearly, end = "quite ", "it drafts anyway, and is wrong where the target generates a token that it lacks"
        elif self.is_retokenized:
            end = "its tokens are translated, and fewer are accepted than with a draft of the same family"
        verb = "differs" if len(self.found) == 1 else "differ"
        such = "such as" if len(self.found) > NUM_NAMED else "namely"
        named = ", ".join(map(_named, self.found[:NUM_NAMED]))
        return (
            f"The draft's vocabulary is not {nearly}that of {_shown(self.model)}: {len(self.found):,} of "
            f"{self.num_tokens:,} tokens {verb}, {such} {named}: {end}."
        )


class Fit(NamedTuple):
    """The result of a comparison with a target, and the translation that makes the draft fit it."""

    mismatch: Mismatch
    translation: Translation | Retokenization


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
    """The text, shortened, with characters that a terminal could interpret replaced."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_SHOWN])
    return f"{shown}..." if len(text) > MAX_SHOWN else shown


async def fitted(refusal: OtherVocabularyError, gateway: Gateway, own: OwnVocabulary) -> Fit:
    """How a refused draft can draft anyway, for the model with the most similar vocabulary.

    Raises UserError: with the differences, or the refusal itself if they cannot be determined.
    """
    fit = await _closest(gateway, own)
    if fit is None:
        raise refusal
    if not fit.mismatch.is_harmless and not fit.mismatch.is_retokenized:
        raise UserError(str(fit.mismatch))
    return fit


async def _closest(gateway: Gateway, own: OwnVocabulary) -> Fit | None:
    try:
        async with asyncio.timeout(FETCHING_S):
            targets = await _fetched(gateway)
        draft = await asyncio.to_thread(lambda: without_fillers(own()))
        fits = [await asyncio.to_thread(_compared, *target, draft) for target in targets] if draft else []
        return min(fits, key=lambda each: len(each.mismatch.found), default=None)
    except Exception:  # noqa: BLE001 - the refusal stands if explaining it fails
        return None


def _compared(model: str, fingerprint: str, packed: bytes, draft: Mapping[str, int]) -> Fit:
    target = unpack_vocabulary(packed, fingerprint)
    found = _without_respelled(differences(target, draft))
    mismatch = Mismatch(model, found, len(target.keys() | draft.keys()), fingerprint)
    if mismatch.is_harmless:
        return Fit(mismatch, _translation(found, set(target.values()), draft))
    tokens = retokenization(target, draft)
    return Fit(mismatch._replace(is_retokenized=tokens.coverage >= MIN_COVERAGE), tokens)


def _without_respelled(found: Sequence[Difference]) -> list[Difference]:
    """The differences, without those where one side writes spaces for `▁`, as GGUF files do in some Gemma tokens."""

    def written(each: Difference) -> tuple[int | None, str]:
        return each.draft_id if each.target_id is None else each.target_id, each.token.replace("▁", " ")

    there = {written(each) for each in found if each.draft_id is None}
    same = there & {written(each) for each in found if each.target_id is None}
    is_moved = [None not in (each.target_id, each.draft_id) for each in found]
    return [each for each, is_kept in zip(found, is_moved, strict=True) if is_kept or written(each) not in same]


def _translation(found: Sequence[Difference], target_ids: Set[int], draft: Mapping[str, int]) -> Translation:
    """A translation between the two vocabularies.

    If a token is missing on one side and that side has another token with its id, the id is kept: it may be the same
    token under another name. If it has none, a token of the target is read as a space, and one of the draft is not
    proposed.
    """
    draft_ids = set(draft.values())
    space = next((draft[token] for token in SPACES if token in draft), 0)
    to_draft: dict[int, int] = {}
    to_target: dict[int, int | None] = {}
    for _, there, here in found:
        if there is not None and here is not None:
            to_draft[there], to_target[here] = here, there
    for _, there, here in found:
        if here is None and there is not None and there not in draft_ids:
            to_draft.setdefault(there, space)
        elif there is None and here is not None and here not in target_ids:
            to_target.setdefault(here, None)
    return Translation(to_draft, to_target)


async def _fetched(gateway: Gateway) -> list[tuple[str, str, bytes]]:
    """The model name, fingerprint and packed vocabulary of each model that the gateway serves."""
    found = []
    async with gateway.client() as client:
        listed: list[_Listed] = []
        for pause_s in LIST_PAUSES_S:  # an engine that has just connected may still be sending its own
            await asyncio.sleep(pause_s)
            if listed := _listed(await _get(client, PATH, MAX_LIST_BYTES))[:MAX_FETCHED]:
                break
        for each in listed:
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
    """A gateway's list of vocabularies. Raises RemoteProtocolError."""
    try:
        entries = json.loads(data)["vocabularies"]
        listed = [_Listed(", ".join(each["models"]), each["fingerprint"], each["bytes"]) for each in entries]
        if all(each.is_valid for each in listed):
            return listed
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise RemoteProtocolError("the list of vocabularies is not valid")


async def _get(client: httpx.AsyncClient, path: str, limit_bytes: int) -> bytes:
    """The body, without content encoding. Raises RemoteProtocolError if it is too long, and httpx's errors."""
    async with client.stream("GET", path, headers={"accept-encoding": "identity"}) as answer:
        answer.raise_for_status()
        body = bytearray()
        async for chunk in answer.aiter_raw():
            body += chunk
            if len(body) > limit_bytes:
                raise RemoteProtocolError(f"{path} has more than {limit_bytes} bytes")
        return bytes(body)
