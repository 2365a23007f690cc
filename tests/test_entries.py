"""The bookkeeping of branches against objects that know their parents."""

from dataclasses import dataclass
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.drafters.entries import Entries


@dataclass(eq=False)
class Node:
    """An entry, independent of its number."""

    parent: Self | None

    def line(self) -> list[Self]:
        """The entry and its ancestors, the entry first."""
        return [self, *(self.parent.line() if self.parent else [])]


def grow(data: st.DataObject, entries: Entries, nodes: list[Node]) -> None:
    """Add a chain if that is allowed, or branches, mostly near the end."""
    if entries.is_chain and (not nodes or data.draw(st.booleans(), "chain")):
        count = data.draw(st.integers(1, 3), "count")
        entries.append(count)
        for _ in range(count):
            nodes.append(Node(nodes[-1] if nodes else None))
        return
    places = st.integers(max(0, len(nodes) - 5), len(nodes) - 1) | st.integers(0, len(nodes) - 1)
    parents = data.draw(st.lists(places, min_size=1, max_size=4), "parents")
    entries.branch(parents)
    nodes += [Node(nodes[parent]) for parent in parents]


def cut(data: st.DataObject, entries: Entries, nodes: list[Node]) -> list[Node]:
    """Keep some first entries, and of the others any whose parents stay."""
    length = data.draw(st.integers(0, len(nodes)), "length")
    kept, moved = nodes[:length], list[int]()
    for number, node in enumerate(nodes[length:], length):
        if (node.parent is None or node.parent in kept) and data.draw(st.booleans(), "is moved"):
            moved.append(number)
            kept.append(node)
    assert entries.keep(length, moved) == (moved != list(range(length, length + len(moved))))
    return kept


def check(entries: Entries, nodes: list[Node]) -> None:
    numbers = {node: number for number, node in enumerate(nodes)}
    lines = [{numbers[above] for above in node.line()} for node in nodes]
    assert len(entries) == len(nodes)
    assert entries.is_chain == all(line == set(range(number + 1)) for number, line in enumerate(lines))
    trunk = max(
        count
        for count in range(len(nodes) + 1)
        if all(set(range(min(count, number + 1))) <= line for number, line in enumerate(lines))
    )
    assert entries.trunk == trunk
    for number, line in enumerate(lines):
        assert entries.position(number) == len(line) - 1
        seen = [trunk + index for index, is_seen in enumerate(entries.seen(number)) if is_seen]
        assert {*seen, *range(min(trunk, number + 1))} == line


@settings(max_examples=150)
@given(st.data())
def test_positions_and_what_is_seen_are_those_of_a_tree_of_objects(data: st.DataObject) -> None:
    entries, nodes = Entries(), list[Node]()
    for _ in range(data.draw(st.integers(1, 8), "rounds")):
        for _ in range(data.draw(st.integers(1, 3), "growths")):
            grow(data, entries, nodes)
            check(entries, nodes)
        nodes = cut(data, entries, nodes)
        check(entries, nodes)


def tree() -> Entries:
    """0 1 2, after 1: 3, after 2: 4 5, after 3: 6."""
    entries = Entries()
    entries.append(3)
    entries.branch([1, 2, 2])
    entries.branch([3])
    return entries


def test_a_branch_that_turned_out_right_becomes_a_chain() -> None:
    entries = tree()
    assert (entries.trunk, entries.position(6)) == (2, 3)
    assert entries.seen(6) == [False, True, False, False, True]
    assert entries.keep(2, [3, 6])
    assert entries.is_chain
    assert len(entries) == 4
    entries.append(1)
    assert entries.position(4) == 4


def test_what_stays_in_place_is_not_to_be_moved() -> None:
    entries = tree()
    assert not entries.keep(2, [2, 3, 4])
    assert not entries.keep(3, [3])
    assert not entries.keep(1, [])


@pytest.mark.parametrize(
    ("length", "moved"),
    [(8, []), (-1, []), (2, [6]), (2, [6, 3]), (2, [3, 3]), (2, [0]), (2, [1]), (7, [7]), (0, [-1])],
)
def test_what_cannot_be_kept(length: int, moved: list[int]) -> None:
    entries = tree()
    with pytest.raises(ValueError, match="kept"):
        entries.keep(length, moved)
    assert len(entries) == 7


def test_what_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="a chain can only be appended to a chain"):
        tree().append(1)
    for parent in (-1, 7):
        with pytest.raises(ValueError, match="of 7"):
            tree().branch([parent])
