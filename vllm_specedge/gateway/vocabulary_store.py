"""The vocabularies of the engines that are connected, for edges to compare theirs with: one copy for each fingerprint.

Pure. They are asked for piece by piece, of one engine each, so an engine can send no more than was asked for; what it
sends is held only up to a bound, and served only if its fingerprint is right.
"""

from collections.abc import Mapping

from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.wire.engine_frames import VocabularyPart, WantVocabulary
from vllm_specedge.wire.vocabulary import PackedReader

MAX_VOCABULARIES = 8
"""Of so many engines of different families at most; the others' are not served."""


class VocabularyStore:
    """`packed` has what may be served, by fingerprint."""

    def __init__(self) -> None:
        self.packed: dict[str, bytes] = {}
        self._arriving: dict[str, tuple[bytes, PackedReader]] = {}
        """By fingerprint, the engine that sends it, and what has come."""
        self._without: set[bytes] = set()
        """Engines that have none, or sent what is not theirs."""

    def ask(self, engine: bytes, fingerprint: str) -> WantVocabulary | None:
        """What an engine is to be asked for, when it says hello and now and then: what is lost is asked for again."""
        if not fingerprint or fingerprint in self.packed or engine in self._without:
            return None
        if fingerprint not in self._arriving:
            if len(self.packed) + len(self._arriving) >= MAX_VOCABULARIES:
                return None
            self._arriving[fingerprint] = engine, PackedReader(fingerprint)
        source, reader = self._arriving[fingerprint]
        return WantVocabulary(len(reader.packed)) if source == engine else None

    def take(self, engine: bytes, fingerprint: str, part: VocabularyPart) -> WantVocabulary | None:
        """What is to be asked for next. Raises RemoteProtocolError, once, for what cannot be used of this engine."""
        source, reader = self._arriving.get(fingerprint) or (b"", None)
        if reader is None or source != engine or part.offset != len(reader.packed):
            return None  # nobody asked for it, or it came before
        try:
            if not part.data:
                raise RemoteProtocolError("there is none, or it ends too soon")
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
        """Drop what is of none of these engines; each has its fingerprint."""
        known = set(engines.values())
        self.packed = {fingerprint: packed for fingerprint, packed in self.packed.items() if fingerprint in known}
        self._arriving = {key: each for key, each in self._arriving.items() if engines.get(each[0]) == key}
        self._without &= engines.keys()
