"""Small random models of transformers that draft trees: every entry predicts what its chain predicts alone."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, Gemma2Config, Gemma3TextConfig, GPT2Config, Qwen3Config

from edge_client.drafters import CacheFullError, Candidate, Part, slots
from edge_client.drafters.entries import Entries
from edge_client.drafters.hf import passes
from edge_client.drafters.hf.chains import HfDrafter
from edge_client.drafters.hf.drafter import number_format
from edge_client.drafters.hf.passes import RECORDED_ROWS, HfPasses, Pass
from edge_client.drafters.hf.trees import SlotDrafter, with_trees
from edge_client.drafters.slot_contexts import CHUNK
from edge_client.drafters.slots import LEAST_SLOTS, SlotEntries, Slots
from tests.tree_walk import WIDTH, TreeWalk

from .test_hf_rollbacks import CONFIGS, TINY, fresh_pass, model_of

PLAIN = Qwen3Config(**TINY, num_hidden_layers=2, head_dim=8)
WINDOWED = CONFIGS["window and all"]
TREES = {
    "plain": PLAIN,
    "learned positions": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "window": CONFIGS["window"],
    "window and all": WINDOWED,
}
CHAINS = {
    "distances in the mask": BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    "capped scores": Gemma2Config(**TINY, num_hidden_layers=2, head_dim=8),
    "convolution": CONFIGS["convolution"],
}


def chains_of(config: Any) -> HfDrafter:
    return HfDrafter(model_of(config), "f", "tiny", None)


def trees_of(config: Any) -> SlotDrafter:
    drafter = with_trees(chains_of(config))
    assert isinstance(drafter, SlotDrafter)
    return drafter


@pytest.mark.parametrize("name", TREES)
def test_branches_say_what_their_chains_say_alone(name: str) -> None:
    """Over several windows, and after the cache has grown."""
    chance, model = random.Random(1), model_of(TREES[name])
    drafter = trees_of(TREES[name])
    walk = TreeWalk(drafter.open(), lambda tokens: fresh_pass(model, tokens), range(3, 99), chance)
    walk.append(chance.choices(range(3, 99), k=60))
    for _ in range(6):
        walk.grow_branches(3)
        walk.decide(with_rest=chance.random() < 0.5)
    walk.run(num_rounds=2)
    assert walk.num_checked > 60


@pytest.mark.parametrize("name", CHAINS)
def test_models_that_cannot_branch_draft_chains(name: str) -> None:
    model = model_of(CHAINS[name])
    drafter = with_trees(chains_of(CHAINS[name]))
    assert drafter.max_width == 1
    sequence = drafter.open()
    sequence.append([5, 6, 7, 8], 1)
    sequence.keep(2)
    said, alone = sequence.append([9], 1)[0], fresh_pass(model, [5, 6, 9])[0]
    assert (said.token, said.probability) == (alone.token, pytest.approx(alone.probability, abs=1e-3))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("position", lambda entries, entry: entry),
        ("seen", lambda entries, entry: [True] * (len(entries) - entries.trunk)),
    ],
)
def test_a_model_that_overlooks_positions_or_masks_is_found_out(
    name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Entries, name, fault)
    assert isinstance(with_trees(chains_of(PLAIN)), HfDrafter)


def test_a_long_context_is_read_in_pieces_beside_others() -> None:
    chance, model, drafter = random.Random(2), model_of(PLAIN), trees_of(PLAIN)
    short, long = drafter.open(), drafter.open()
    few, many = [5, 6, 7], chance.choices(range(3, 99), k=2 * CHUNK + 20)
    short.append(few, WIDTH)
    assert long.append(many, WIDTH)[0].token == fresh_pass(model, many)[0].token
    assert short.append([8], WIDTH)[0].probability == pytest.approx(
        fresh_pass(model, [*few, 8])[0].probability, abs=1e-3
    )


def test_numbers_that_are_none_stay_with_their_context() -> None:
    """A hidden slot has no effect, whatever was written to it."""
    drafter = trees_of(PLAIN)
    model = drafter._passes._model
    sound, ill = drafter.open(), drafter.open()
    sound.append([5, 6], WIDTH)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        before = weight[9].clone()
        weight[9] = float("nan")
        said = drafter.branch_together([Part(ill, [9], [], WIDTH), Part(sound, [7], [1], WIDTH)])
        assert said[0][0][0].probability != said[0][0][0].probability
        weight[9] = before
    alone = fresh_pass(model_of(PLAIN), [5, 6, 7])[0]
    for each in (said[1][0][0], drafter.open().append([5, 6, 7], WIDTH)[0]):
        assert each.probability == pytest.approx(alone.probability, abs=1e-3)


def test_passes_that_are_filled_up_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that CUDA records have spare rows; here they run without recording."""
    shapes = set()

    def replayed(self: HfPasses, given: Pass) -> torch.Tensor:
        shapes.add(len(given.slots))
        return self._forward(given)

    monkeypatch.setattr(HfPasses, "_replayed", replayed)
    chance, model, drafter = random.Random(1), model_of(WINDOWED), trees_of(WINDOWED)
    drafter._passes._is_recording = True
    walk = TreeWalk(drafter.open(), lambda tokens: fresh_pass(model, tokens), range(3, 99), chance)
    walk.run(num_rounds=3)
    assert shapes <= set(RECORDED_ROWS)
    assert len(shapes) > 1


class Replaying:
    """Acts like a CUDA graph: the same work at the same addresses, with their current contents."""

    def __init__(self, run: Callable[[], torch.Tensor], returned: torch.Tensor) -> None:
        self._run, self._returned = run, returned
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self._returned.copy_(self._run())


@pytest.mark.parametrize("name", ["plain", "window and all"])
def test_recorded_passes_say_what_fresh_ones_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another context, while the cache grows."""
    graphs = list[Replaying]()

    def captured(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Replaying, torch.Tensor]:
        returned = run()
        graphs.append(Replaying(run, returned))
        return graphs[-1], returned

    monkeypatch.setattr(passes, "captured", captured)
    chance, model, drafter = random.Random(1), model_of(TREES[name]), trees_of(TREES[name])
    drafter._passes._is_recording = True
    walk = TreeWalk(drafter.open(), lambda tokens: fresh_pass(model, tokens), range(3, 99), chance)
    walk.run(num_rounds=4)
    num_before = len(graphs)
    other = drafter.open()
    other.append(chance.choices(range(3, 99), k=LEAST_SLOTS), WIDTH)
    for _ in range(4):
        walk.grow_branches(3)
        walk.decide(with_rest=False)
    assert sum(graph.num_replays for graph in graphs) > len(graphs) > num_before > 0
    assert drafter._passes._is_recording


def test_a_model_that_cannot_be_recorded_runs_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """As here, without CUDA: reported once, and not tried again."""
    drafter = trees_of(PLAIN)
    drafter._passes._is_recording = True
    sequence = drafter.open()
    sequence.append([5, 6, 7], WIDTH)
    for _ in range(2):
        sequence.branch([8, 9], [2, 2], WIDTH)
    assert len([record for record in caplog.records if "cannot be recorded" in record.message]) == 1
    assert not drafter._passes._is_recording


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), max_size=30), st.randoms(use_true_random=False))
def test_no_slot_is_two_entries(steps: list[tuple[int, int]], chance: random.Random) -> None:
    slots = Slots()
    contexts = [SlotEntries(slots) for _ in range(3)]
    for which, number in steps:
        if which == 3:
            contexts[number % 3] = SlotEntries(slots)  # the previous one is dropped
        elif chance.random() < 0.5:
            contexts[which].append(number)
        else:
            contexts[which].keep(chance.randint(0, len(contexts[which])), [])
        held = [slot for each in contexts for slot in each.slots(0)]
        assert len(set(held)) == len(held)
        assert 0 not in held
        assert max(held, default=0) < slots.extent <= slots.size
    contexts.clear()
    slots.give_back(slots.take(1))
    assert slots.extent == LEAST_SLOTS, "all of them are free again"


def test_there_is_an_end_to_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MAX_SLOTS", 2 * LEAST_SLOTS)
    drafter = trees_of(PLAIN)
    first, second = drafter.open(), drafter.open()
    first.append([5] * 240, 1)
    second.append([5] * 240, 1)
    with pytest.raises(CacheFullError):
        first.append([5] * 40, 1)
    del first
    assert second.append([5] * 40, 1)


def test_a_layer_that_found_no_room_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass fails, and the next one finds the cache too small again."""
    drafter = trees_of(PLAIN)
    sequence = drafter.open()
    sequence.append([5, 6, 7], WIDTH)
    zeros = torch.zeros

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        if len(shape) == 4:
            raise torch.OutOfMemoryError
        return zeros(*shape, **options)

    other = drafter.open()
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError):
        other.append([5] * LEAST_SLOTS, WIDTH)
    monkeypatch.undo()
    tokens = [5] * (LEAST_SLOTS + 40)
    said = drafter.open().append(tokens, WIDTH)[0]
    assert said.probability == pytest.approx(fresh_pass(model_of(PLAIN), tokens)[0].probability, abs=1e-3)


def test_a_draft_in_bfloat16_has_its_trees() -> None:
    """Rounding alone, with several layers and logits of a usual size, changes its probabilities by a fifth."""
    model = model_of(Qwen3Config(**TINY, num_hidden_layers=8, head_dim=8))
    with torch.no_grad():
        model.lm_head.weight *= 24.0 / model(torch.tensor([[5, 6, 7]])).logits.abs().max()
    assert isinstance(with_trees(HfDrafter(model.to(torch.bfloat16), "f", "tiny", None)), SlotDrafter)


def test_weights_are_held_in_what_they_were_trained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma, llama = Gemma3TextConfig(**TINY, dtype=torch.bfloat16), Qwen3Config(**TINY, dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert number_format(gemma, "cpu") == torch.float32
    assert number_format(gemma, "cuda:1") == number_format(gemma, "mps") == torch.bfloat16
    assert number_format(llama, "cuda") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert number_format(gemma, "cuda") == torch.float32, "float16 would overflow"
    assert number_format(Qwen3Config(**TINY, dtype=torch.bfloat16), "cuda") == torch.float16


def test_candidates_are_as_many_as_asked_for() -> None:
    drafter = trees_of(PLAIN)
    one, two = drafter.open(), drafter.open()
    one.append([5], 1)
    said = drafter.branch_together([Part(one, [6, 7], [0, 0], 4), Part(two, [8], [], 1)])
    assert [[len(row) for row in of_part] for of_part in said] == [[4, 4], [1]]
    assert all(isinstance(each, Candidate) for of_part in said for row in of_part for each in row)
