"""Train the draft to have the target's hidden state at each answer token.

The loss is the divergence between the token distributions of target and draft, both through the same frozen rows of the
target's head (so the target's side needs only its stored states), plus a small weight of the distance between the
states, which keeps the draft usable under the full head too.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from draft_model import Draft, fast_numbers
from shards import Pair, Taught, read_shard, right_padded
from teach import batches_by_length
from torch import Tensor

HEAD_CHUNK = 256
POOL = 16
RESCAN_EVERY = 20


@dataclass(frozen=True)
class Training:
    tokens: int = 1_500_000
    rate: float = 1.5e-3
    warmup: int = 25
    descent: float = 0.35
    state_weight: float = 0.2
    weight_decay: float = 0.01
    clip: float = 1.0
    save_every: int = 60
    report_every: int = 120


class Feed:
    """Batches of the least used answers, of similar lengths; picks up new files while training runs."""

    def __init__(self, directory: Path, pattern: str, batch: int, seed: int = 0) -> None:
        self._directory, self._pattern, self._batch = directory, pattern, batch
        self._items: dict[str, list[Taught]] = {}
        self.uses: dict[str, list[int]] = {}
        self._rng = random.Random(seed)
        self._queue: list[list[Taught]] = []
        self.rescan()

    def rescan(self) -> None:
        for path in sorted(self._directory.glob(self._pattern)):
            if path.name not in self._items:
                self._items[path.name] = list(read_shard(path))
                self.uses.setdefault(path.name, [0] * len(self._items[path.name]))

    @property
    def distinct(self) -> int:
        """Number of distinct answer tokens in the data."""
        return sum(len(item.answer) for items in self._items.values() for item in items)

    def next(self) -> list[Taught]:
        if not self._queue:
            self._fill()
        return self._queue.pop()

    def _fill(self) -> None:
        """Queue a pool of batches of the least used answers, shuffled."""
        places = [(name, index) for name, items in self._items.items() for index in range(len(items))]
        if not places:
            raise ValueError(f"no training data in {self._directory} yet")
        self._rng.shuffle(places)
        places.sort(key=lambda place: self.uses[place[0]][place[1]])
        chosen = places[: self._batch * POOL]
        for name, index in chosen:
            self.uses[name][index] += 1
        items = sorted((self._items[name][index] for name, index in chosen), key=lambda item: item.length)
        self._queue = [items[at : at + self._batch] for at in range(0, len(items), self._batch)]
        self._rng.shuffle(self._queue)


class HeadDivergence(torch.autograd.Function):
    """Mean KL(target || draft) through a frozen head, with its gradient, in cache-sized chunks of positions.

    Written out because autograd would keep both sides' logits for all positions: hundreds of megabytes of memory
    traffic that cost more than the products do.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, taught: Tensor, head: Tensor) -> Tensor:
        """The mean divergence; saves its gradient for `backward`."""
        gradient = torch.empty_like(states)
        total = 0.0
        ours_in, theirs_in = states.to(head.dtype), taught.to(head.dtype)
        for at in range(0, len(states), HEAD_CHUNK):
            part = slice(at, at + HEAD_CHUNK)
            ours = (ours_in[part] @ head.T).float().log_softmax(-1)
            theirs = (theirs_in[part] @ head.T).float().log_softmax(-1)
            chance = theirs.exp()
            total += float((chance * theirs.sub_(ours)).sum())
            gradient[part] = ours.exp_().sub_(chance).to(head.dtype) @ head
        ctx.save_for_backward(gradient.div_(len(states)))
        return states.new_tensor(total / len(states))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The saved gradient, for the draft's states only."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


@torch.inference_mode()
def measure(draft: Draft, head: Tensor, kept: Tensor, held: Sequence[Pair]) -> float:
    """Teacher-forced agreement on held-out answers: the share of their tokens that the draft would choose."""
    right = count = 0
    for pairs in batches_by_length(held, 8):
        tokens, mask = right_padded(pairs)
        with fast_numbers():
            states = draft(tokens)[mask]
        chosen = torch.cat([kept[(part @ head.T).argmax(-1)] for part in states.to(head.dtype).split(HEAD_CHUNK)])
        said = torch.tensor([token for pair in pairs for token in pair.answer])
        right, count = right + int((chosen == said).sum()), count + len(said)
    return right / max(count, 1)


class Trainer:
    """The draft, its optimizers and its position in the data; all of it survives a restart."""

    def __init__(
        self, draft: Draft, layers: list[int], kept: Tensor, feed: Feed, training: Training, state: Path
    ) -> None:
        self.draft, self.layers, self.kept, self.feed, self.training = draft, layers, kept, feed, training
        self._state = state
        self.head = draft.embed_out[kept].to(torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32)
        matrices = [p for p in draft.parameters() if p.ndim == 2]
        norms = [p for p in draft.parameters() if p.ndim == 1]
        muon = torch.optim.Muon(
            matrices, lr=training.rate, weight_decay=training.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW(norms, lr=training.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self._optimizers: list[torch.optim.Optimizer] = [muon, adam]
        self.seen = 0
        self.step = 0
        self.seconds = 0.0
        self.loss = math.nan
        if state.exists():
            self._resume()

    def run(self, progress: Callable[[Trainer], None], report: Callable[[Trainer], None]) -> None:
        """Train until the budget is used up, saving and reporting periodically."""
        saved = reported = self.seconds
        while self.seen < self.training.tokens:
            began = time.process_time()
            self._learn(self.feed.next())
            self.seconds += time.process_time() - began
            if self.step % RESCAN_EVERY == 0:
                self.feed.rescan()
            progress(self)
            if self.seconds - saved > self.training.save_every:
                saved = self.seconds
                self.save()
            if self.seconds - reported > self.training.report_every:
                reported = self.seconds
                report(self)
        self.save()

    def agreement(self, held: Sequence[Pair]) -> float:
        """The current draft's agreement with held-out answers."""
        return measure(self.draft, self.head, self.kept, held)

    def _rate(self) -> float:
        """Current share of the full learning rate: a short warm-up, constant, and at the end linear decay to zero."""
        left = 1 - min(self.seen / self.training.tokens, 1.0)
        return min(1.0, (self.step + 1) / self.training.warmup, left / self.training.descent)

    def _learn(self, items: Sequence[Taught]) -> None:
        tokens, mask = right_padded(items)
        taught = torch.cat([item.states for item in items]).float()
        with fast_numbers():
            hidden = self.draft(tokens)
        states = hidden.float()[mask]
        divergence: Tensor = HeadDivergence.apply(states, taught, self.head)  # type: ignore[no-untyped-call]
        distance = (states - taught).square().mean() / taught.square().mean()
        (divergence + self.training.state_weight * distance).backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.training.clip)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.training.rate * self._rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss = float(divergence.detach())
        self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
        self.seen += len(taught)
        self.step += 1

    def save(self) -> None:
        """Write everything that a restart needs, atomically."""
        self._state.parent.mkdir(parents=True, exist_ok=True)
        aside = self._state.with_suffix(".part")
        content = {
            "layers": self.layers,
            "kept": self.kept,
            "draft": self.draft.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "seen": self.seen,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "uses": self.feed.uses,
            "distinct": self.feed.distinct,
            "training": asdict(self.training),
        }
        torch.save(content, aside)
        aside.rename(self._state)

    def _resume(self) -> None:
        """Resume from a saved state; the data may have grown since, and the budget may have changed."""
        saved = torch.load(self._state, weights_only=True)
        if saved["layers"] != self.layers or not torch.equal(saved["kept"], self.kept):
            raise ValueError(f"{self._state} belongs to another draft: move it away to start from scratch")
        self.draft.load_state_dict(saved["draft"])
        for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.seen, self.step, self.seconds, self.loss = saved["seen"], saved["step"], saved["seconds"], saved["loss"]
        for name, uses in saved["uses"].items():
            self.feed.uses[name] = uses
