"""The vocabularies of the connected engines, for edges to compare theirs with: one copy per fingerprint. Pure.

Each is requested part by part from one engine, so an engine can send no more than was requested. The received parts are
held only up to a bound, and served only if the fingerprint is right.
"""

from collections.abc import Mapping

from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.wire.engine_frames import VocabularyPart, WantVocabulary
from vllm_specedge.wire.vocabulary import PackedReader

MAX_VOCABULARIES = 8
"""Maximum vocabularies, of engines of different families; further ones are not served."""


class VocabularyStore:
    """The store. `packed`: the vocabularies that may be served, by fingerprint."""

    def __init__(self) -> None:
        self.packed: dict[str, bytes] = {}
        self._arriving: dict[str, tuple[bytes, PackedReader]] = {}
        """By fingerprint, the engine that sends it, and the parts received so far."""
        self._without: set[bytes] = set()
        """Engines that have no vocabulary, or sent a wrong one."""

    def ask(self, engine: bytes, fingerprint: str) -> WantVocabulary | None:
        """The request to send to an engine, if any. Called at its hello and at each Ping, so lost parts are requested
        again."""
        if not fingerprint or fingerprint in self.packed or engine in self._without:
            return None
        if fingerprint not in self._arriving:
            if len(self.packed) + len(self._arriving) >= MAX_VOCABULARIES:
                return None
            self._arriving[fingerprint] = engine, PackedReader(fingerprint)
        source, reader = self._arriving[fingerprint]
        return WantVocabulary(len(reader.packed)) if source == engine else None

    def take(self, engine: bytes, fingerprint: str, part: VocabularyPart) -> WantVocabulary | None:
        """Store a part. Returns the next request, if any. Raises RemoteProtocolError, once, if the engine's vocabulary
        cannot be used."""
        source, reader = self._arriving.get(fingerprint) or (b"", None)
        if reader is None or source != engine or part.offset != len(reader.packed):
            return None  # not requested, or received before
        try:
            if not part.data:
                raise RemoteProtocolError("the engine has none, or it ends too soon")
            reader.feed(part.data)
        except RemoteProtocolError:
            del self._arriving[fingerprint]
            self._without.add(engine)
            raise
        if not reader.is_whole:
            return WantVocabulary(len(reader.packed))
        self.packed[fingerprint] = bytes(reader.packed)
        del self._arriving[fingerprint]
        return None

    def keep(self, engines: Mapping[bytes, str]) -> None:
        """Drop the vocabularies of all but these engines, given with their fingerprints."""
        known = set(engines.values())
        self.packed = {fingerprint: packed for fingerprint, packed in self.packed.items() if fingerprint in known}
        self._arriving = {key: each for key, each in self._arriving.items() if engines.get(each[0]) == key}
        self._without &= engines.keys()
