"""Several contexts in one forward pass predict what each predicts alone, regardless of the others."""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.drafters import Candidate, DraftSequence, Part, SharingDrafter
from edge_client.drafters.gguf import GgufDrafter
from edge_client.drafters.llama.drafter import FastLlama
from edge_client.drafters.llama.weights import load_llama
from edge_client.drafters.mlx.drafter import load_mlx_drafter
from edge_client.drafters.retokenized import Retokenization, retokenization, retokenized
from edge_client.drafters.translated import Translation, translated

from .test_gguf_drafter import GGUF
from .test_hf_trees import PLAIN, WINDOWED, trees_of
from .test_llama_family import FAMILIES, SHAPE, make
from .test_mlx_drafter import saved

WIDTH = 3
NUM_ROUNDS = 12
Alone = Callable[[list[int]], list[Candidate]]


class _Shared:
    """A FastLlama with the client's interface."""

    def __init__(self, model: FastLlama) -> None:
        self.open, self.branch_together = model.open, model.branch_together
        self.fingerprint, self.description, self.max_context_tokens = "f", "fast", model.context
        self.max_width, self.max_shared_rows = 8, 16


@pytest.fixture(scope="module", params=[*FAMILIES, "gguf", "mlx", "transformers", "transformers, a window"])
def drafter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharingDrafter]:
    if request.param == "gguf":
        yield GgufDrafter(GGUF, "cpu", threads=1)
        return
    torch.set_num_threads(1)
    config = deepcopy(WINDOWED if "window" in request.param else PLAIN)
    config.vocab_size = SHAPE["vocab_size"]
    if request.param.startswith("transformers"):
        yield trees_of(config)
        return
    directory: Path = tmp_path_factory.mktemp("shared")
    if request.param == "mlx":
        saved(config, directory)
        yield load_mlx_drafter(str(directory), None, "f")
        return
    make(request.param, directory)
    yield _Shared(FastLlama(load_llama(directory), "float32"))


class Context:
    """A tree of entries, with the tokens that lead to each."""

    def __init__(self, sequence: DraftSequence, prompt: list[int]) -> None:
        self.sequence, self.trunk = sequence, list(prompt)
        self.paths: list[list[int]] = []
        sequence.append(prompt, WIDTH)

    def part(self, chance: random.Random) -> Part:
        """Some more entries, after any of the last ones."""
        number, size = chance.randint(1, 4), len(self.trunk) + len(self.paths)
        parents = [chance.randrange(len(self.trunk) - 1, size) for _ in range(number)]
        tokens = [chance.randrange(SHAPE["vocab_size"]) for _ in range(number)]
        self.paths += [[*self.path(parent), token] for parent, token in zip(parents, tokens, strict=True)]
        return Part(self.sequence, tokens, parents, WIDTH)

    def path(self, entry: int) -> list[int]:
        return self.trunk if entry < len(self.trunk) else self.paths[entry - len(self.trunk)]

    def cut(self, chance: random.Random) -> None:
        """Truncate to the trunk, or a part of it."""
        self.trunk = self.trunk[: chance.randint(len(self.trunk) - 2, len(self.trunk))]
        self.paths = []
        self.sequence.keep(len(self.trunk))


def assert_alike(drafter: SharingDrafter, said: list[Candidate], alone: list[Candidate]) -> None:
    """With tolerance: llama.cpp rounds the inputs of its quantized products differently with other rows in the pass."""
    tolerance = {"rel": 0.35, "abs": 0.02} if isinstance(drafter, GgufDrafter) else {"rel": 1e-3, "abs": 1e-5}
    assert said[0].token == alone[0].token
    assert said[0].probability == pytest.approx(alone[0].probability, **tolerance)


def test_what_is_said_together_is_what_is_said_alone(drafter: SharingDrafter) -> None:
    chance = random.Random(3)
    prompts = [[chance.randrange(SHAPE["vocab_size"]) for _ in range(length)] for length in (5, 23, 40, 11)]
    contexts = [Context(drafter.open(), prompt) for prompt in prompts]
    for number in range(NUM_ROUNDS):
        at_work = chance.sample(contexts, chance.randint(2, 4))
        before = [len(context.paths) for context in at_work]
        said = drafter.branch_together([context.part(chance) for context in at_work])
        for context, start, rows in zip(at_work, before, said, strict=True):
            for path, row in zip(context.paths[start:], rows, strict=True):
                assert_alike(drafter, row, drafter.open().append(path, WIDTH))
        if number % 3 == 2:
            for context in contexts:
                context.cut(chance)


def test_chains_are_what_append_says(drafter: SharingDrafter) -> None:
    """So committed tokens can share a pass with branches of other contexts."""
    contexts = [drafter.open() for _ in range(3)]
    for context in contexts:
        context.append([5, 6, 7], WIDTH)
    parts = [
        Part(contexts[0], [8], [], WIDTH),
        Part(contexts[1], [9, 10, 11], [], WIDTH),
        Part(contexts[2], [4, 3], [2, 1], 2),
    ]
    one, many, tree = drafter.branch_together(parts)
    assert (len(one), len(many), len(tree)) == (1, 1, 2)
    assert_alike(drafter, one[0], drafter.open().append([5, 6, 7, 8], WIDTH))
    assert_alike(drafter, many[0], drafter.open().append([5, 6, 7, 9, 10, 11], WIDTH))
    assert_alike(drafter, tree[1], drafter.open().append([5, 6, 3], WIDTH))
    assert [len(row) for row in tree] == [2, 2]
    assert_alike(drafter, contexts[1].append([3], WIDTH), drafter.open().append([5, 6, 7, 9, 10, 11, 3], WIDTH))


def test_a_translated_draft_shares_too(drafter: SharingDrafter) -> None:
    other = translated(drafter, Translation({1: 9, 9: 1}, {1: 9, 9: 1}), "other")
    assert isinstance(other, SharingDrafter)
    parts: list[Any] = []
    for _ in range(2):
        sequence = other.open()
        sequence.append([4, 1, 6], WIDTH)
        parts.append(Part(sequence, [1], [2], WIDTH))
    back = {1: 9, 9: 1}
    alone = [
        Candidate(back.get(token, token), probability)
        for token, probability in drafter.open().append([4, 9, 6, 9], WIDTH)
    ]
    for said in other.branch_together(parts):
        assert [each.token for each in said[0]] == [each.token for each in alone]
        assert_alike(drafter, said[0], alone)


def test_a_draft_of_another_tokenizer_shares_too(drafter: SharingDrafter) -> None:
    """One token of the target is two of the draft's: a pass for the first pieces, one for the second ones."""
    draft = {f"t{number}.": number for number in range(SHAPE["vocab_size"])}
    target = {f"t{number}.": number for number in range(SHAPE["vocab_size"]) if number != 9} | {"t9.t4.": 9}
    tokens = retokenization(target, draft)
    assert tokens.to_draft[9] == (9, 4)
    other = retokenized(drafter, tokens, "other")
    assert isinstance(other, SharingDrafter)
    trees, chain = [other.open(), other.open()], other.open()
    for sequence in (*trees, chain):
        sequence.append([5, 9, 6], WIDTH)
    parts = [Part(sequence, [9, 7, 9], [2, 2, 1], WIDTH) for sequence in trees]
    *of_trees, of_chain = other.branch_together([*parts, Part(chain, [8, 9], (), WIDTH)])
    contexts = [[5, 9, 4, 6, 9, 4], [5, 9, 4, 6, 7], [5, 9, 4, 9, 4]]
    for said in of_trees:
        for row, context in zip(said, contexts, strict=True):
            assert_alike(drafter, row, alone(drafter, tokens, context))
    assert_alike(drafter, of_chain[0], alone(drafter, tokens, [5, 9, 4, 6, 8, 9, 4]))
    trees[0].keep(3, [3])
    [again] = other.branch_together([Part(trees[0], [7], (), WIDTH)])
    assert_alike(drafter, again[0], alone(drafter, tokens, [5, 9, 4, 6, 9, 4, 7]))


def test_tokens_of_many_pieces_have_a_pass_of_their_own(drafter: SharingDrafter) -> None:
    """So that a shared pass has no more rows than a drafter supports: llama.cpp's arrays end there."""
    draft = {f"t{number}.": number for number in range(SHAPE["vocab_size"])}
    pieces = [number % 50 for number in range(40)]
    target = {**draft, "".join(f"t{number}." for number in pieces): 9}
    target.pop("t9.")
    tokens = retokenization(target, draft)
    other = retokenized(drafter, tokens, "other")
    assert isinstance(other, SharingDrafter)
    contexts = [other.open() for _ in range(8)]
    for sequence in contexts:
        sequence.append([5, 6], WIDTH)
    for [said] in other.branch_together([Part(sequence, [9], (), WIDTH) for sequence in contexts]):
        assert_alike(drafter, said, alone(drafter, tokens, [5, 6, *pieces]))


def alone(drafter: SharingDrafter, tokens: Retokenization, context: list[int]) -> list[Candidate]:
    said = drafter.open().append(context, 8)
    return [
        Candidate(tokens.to_target[each.token], each.probability) for each in said if each.token in tokens.to_target
    ]
