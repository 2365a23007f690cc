"""A GGUF file as the draft model, in llama.cpp. All contexts share one cache; branches are its lanes (see `lanes`)."""

import ctypes
from collections import deque
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_client.drafters import CacheFullError, Candidate, Part
from edge_client.drafters.cores import usable_cores
from edge_client.drafters.llama_cpp_lanes import Cut, Lanes, Row
from vllm_specedge.errors import UserError
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint

MAGIC = b"GGUF"
MAX_CONTEXT_TOKENS = 4096
NUM_CONTEXTS = 2
"""Number of full-length contexts that fit the cache; more if they are shorter."""
NUM_LANES = 256
"""Number of sequences that llama.cpp's cache can tell apart."""
MAX_WIDTH = 8
MAX_SHARED_ROWS = 16
BATCH_TOKENS = 256
"""Maximum tokens of a pass; a longer chain runs in pieces."""
NO_ROOM = 1
"""llama_decode's return value if its cache is full."""
ERROR_LEVEL = 3
AMX = b"AMX_INT8 = 1"
"""Part of llama.cpp's system info if it was built for Intel's AMX. Matrices then have a special layout, whose code
crashes if GCC 12 compiled it (most of the tile configuration is left out), so the plain layout is used in that case."""
ALL_LAYERS = -1

_errors: deque[str] = deque(maxlen=1)
"""The last error that llama.cpp logged; its return values only tell that there was one."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == ERROR_LEVEL:
        _errors.append(text.decode("utf-8", "replace").strip())


class GgufSequence:
    """One request's context: some lanes of its drafter's cache."""

    def __init__(self, drafter: "GgufDrafter") -> None:
        self._drafter = drafter
        self._lanes = Lanes(drafter.free_lanes)

    def __del__(self) -> None:
        # This may run in any thread; the drafting thread frees the cells later.
        self._drafter.abandoned.append(self._lanes)

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        self._drafter.cut(self._lanes.keep(length, moved))

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        self._drafter.reclaim()
        self._drafter.check_room(len(self._lanes) + len(tokens), len(tokens))
        lane, start, _ = self._lanes.append(len(tokens))
        for done in range(0, len(tokens), BATCH_TOKENS):
            piece = tokens[done : done + BATCH_TOKENS]
            rows = [Row(lane, start + done + i, None) for i in range(len(piece))]
            is_last = done + len(piece) == len(tokens)
            self._drafter.run(piece, rows, [len(piece) - 1] if is_last else [])
        return self._drafter.candidates([len(rows) - 1], width)[0]

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        return self._drafter.branch_together([Part(self, tokens, parents, width)])[0]

    def grown(self, part: Part) -> list[Row]:
        """Add the part's entries. Returns their rows, which the caller must run."""
        if part.parents:
            rows = self._lanes.branch(part.parents)
        else:
            lane, start, _ = self._lanes.append(len(part.tokens))
            rows = [Row(lane, start + at, None) for at in range(len(part.tokens))]
        self._drafter.check_room(max(row.position for row in rows) + 1, len(rows))
        return rows


def _open_model(file: Path, **options: object) -> Any:
    """llama.cpp's model handle of a file. Raises UserError."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    _errors.clear()
    parameters = llama_cpp.llama_model_default_params()
    for name, value in options.items():
        setattr(parameters, name, value)
    parameters.use_extra_bufts = AMX not in llama_cpp.llama_print_system_info()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    if not model:
        raise _unusable(file, _errors[-1] if _errors else "no reason given")
    return model


def _tokens(vocab: Any) -> dict[str, int]:
    """The tokens of llama.cpp's vocabulary and their ids, spelled as in a tokenizer.json."""
    ids = range(llama_cpp.llama_vocab_n_tokens(vocab))
    return {llama_cpp.llama_vocab_get_text(vocab, id_).decode("utf-8", "replace"): id_ for id_ in ids}


def gguf_vocabulary(file: Path) -> dict[str, int]:
    """A file's tokens and their ids; the weights are not loaded. Raises UserError."""
    model = _open_model(file, vocab_only=True)
    try:
        return _tokens(llama_cpp.llama_model_get_vocab(model))
    finally:
        llama_cpp.llama_model_free(model)


class GgufDrafter:
    """A GGUF file on llama.cpp's accelerator or the CPU: llama.cpp's handles of the weights and the cache.

    Used from one thread, except for `abandoned`.
    """

    max_width = MAX_WIDTH
    max_shared_rows = MAX_SHARED_ROWS

    def __init__(self, file: Path, device: str, threads: int) -> None:
        """Raises UserError."""
        self._model = _open_model(file, n_gpu_layers=ALL_LAYERS if device != "cpu" else 0)
        if llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model):
            raise _unusable(file, "its states cannot be rolled back")
        if llama_cpp.llama_model_has_encoder(self._model):
            raise _unusable(file, "it is not a decoder")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocab))
        self.fingerprint = vocabulary_fingerprint(_tokens(vocab))
        self.max_context_tokens = min(int(llama_cpp.llama_model_n_ctx_train(self._model)), MAX_CONTEXT_TOKENS)
        self._context = self._make_context(file, threads)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.free_lanes = list(range(NUM_LANES))
        self.abandoned: deque[Lanes] = deque()
        """Lanes of dropped contexts, to be freed."""
        text = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self._model, text, len(text))
        self.description = f"{file.name} on {device}, llama.cpp, {text.value.decode('utf-8', 'replace')}"

    def open(self) -> GgufSequence:
        return GgufSequence(self)

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        """Run all contexts' rows in one batch; llama.cpp only sees lanes, not contexts."""
        self.reclaim()
        grown = [part.sequence.grown(part) for part in parts if isinstance(part.sequence, GgufSequence)]
        rows = [row for of_part in grown for row in of_part]
        ends = list(accumulate(map(len, grown)))
        # For a chain, only candidates behind its last token are needed.
        said = [
            range(end - (len(own) if part.parents else 1), end)
            for part, own, end in zip(parts, grown, ends, strict=True)
        ]
        self.run([token for part in parts for token in part.tokens], rows, {row for of_part in said for row in of_part})
        return [self.candidates(of_part, part.width) for part, of_part in zip(parts, said, strict=True)]

    def _make_context(self, file: Path, threads: int) -> Any:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = NUM_CONTEXTS * self.max_context_tokens
        options.n_batch = options.n_ubatch = BATCH_TOKENS
        options.n_seq_max = NUM_LANES
        options.kv_unified = True  # lanes share cells
        options.swa_full = True  # a sliding window that forgets entries could not be rolled back
        options.no_perf = True
        options.n_threads = options.n_threads_batch = threads or usable_cores()
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise _unusable(file, _errors[-1] if _errors else "there is no room for its cache")
        return context

    def check_room(self, end: int, num_tokens: int) -> None:
        """Raises ValueError if a context would become too long, or if there is nothing to run."""
        if not num_tokens:
            raise ValueError("a context must grow by at least one token")
        if end > self.max_context_tokens:
            raise ValueError(f"{end} tokens do not fit a context of {self.max_context_tokens}")

    def reclaim(self) -> None:
        """Free the lanes and cells of dropped contexts."""
        while self.abandoned:
            self.cut(self.abandoned.popleft().keep(0, ()))

    def cut(self, cuts: Sequence[Cut]) -> None:
        for lane, position in cuts:
            llama_cpp.llama_memory_seq_rm(self._memory, lane, position, -1)

    def run(self, tokens: Sequence[int], rows: Sequence[Row], said: Collection[int]) -> None:
        """Run one forward pass, with logits for the rows in `said`. Raises CacheFullError, else RuntimeError."""
        if len(rows) > BATCH_TOKENS:
            raise RuntimeError(f"{len(rows)} rows in a pass of {BATCH_TOKENS}")
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, (lane, position, source)) in enumerate(zip(tokens, rows, strict=True)):
            if source is not None:
                llama_cpp.llama_memory_seq_cp(self._memory, source, lane, 0, position)
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, lane
            batch.logits[i] = i in said
        status = llama_cpp.llama_decode(self._context, batch)
        if status == NO_ROOM:
            raise CacheFullError(f"no room for {len(rows)} tokens in llama.cpp's cache")
        if status:
            raise RuntimeError(f"llama.cpp failed (status {status})")

    def candidates(self, rows: Sequence[int], width: int) -> list[list[Candidate]]:
        """The `width` most probable next tokens for each of these rows of the last pass. Overwrites their logits."""
        pointers = (llama_cpp.llama_get_logits_ith(self._context, row) for row in rows)
        return [_best(np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)), width) for pointer in pointers]


def _best(logits: NDArray[np.float32], width: int) -> list[Candidate]:
    width = min(width, len(logits))
    ids = np.argpartition(logits, -width)[-width:]
    ids = ids[np.argsort(-logits[ids])]
    peak = logits[ids[0]]
    probabilities = np.exp(logits[ids] - peak) / np.exp(logits - peak).sum()
    return [Candidate(*pair) for pair in zip(ids.tolist(), probabilities.tolist(), strict=True)]


def _unusable(file: Path, reason: str) -> UserError:
    return UserError(f"{file} cannot be used as a draft ({reason:.160}): name another GGUF file, or 'ngram'.")


def devices_of_llama_cpp() -> list[str]:
    """The devices that the installed llama.cpp can use, best first."""
    info = llama_cpp.llama_print_system_info().decode()
    named = {"cuda": "CUDA", "mps": "MTL"}
    found = [device for device, name in named.items() if name in info or (device == "mps" and "Metal" in info)]
    if not found and llama_cpp.llama_supports_gpu_offload():
        found = ["gpu"]  # Vulkan, ROCm and others
    return [*found, "cpu"]


def check_gguf(file: Path) -> None:
    """Raises UserError if this is not a GGUF file."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"The draft {file} cannot be read: {error.strerror}.") from None
    if magic != MAGIC:
        raise UserError(f"{file} is not a GGUF file: name one, or a model directory without the ending .gguf.")
