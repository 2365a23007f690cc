"""Lanes against a cache that keeps, for each cell, its entry and its lanes, like llama.cpp's."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.drafters import CacheFullError
from edge_client.drafters.llama_cpp_lanes import Cut, Lanes, Row

NUM_LANES = 12


class Cache:
    """Cells by lane and position; a row sees those of its lane."""

    def __init__(self) -> None:
        self.lanes: dict[int, list[int]] = {lane: [] for lane in range(NUM_LANES)}

    def cut(self, cuts: list[Cut]) -> None:
        for lane, position in cuts:
            del self.lanes[lane][position:]

    def run(self, rows: list[Row], cells: list[int]) -> None:
        for lane, position, source in rows:
            if source is not None:
                assert not self.lanes[lane], "it was not cut before it was used again"
                self.lanes[lane] = self.lanes[source][:position]
        for (lane, position, _), cell in zip(rows, cells, strict=True):
            assert len(self.lanes[lane]) == position, "a lane has no gaps"
            self.lanes[lane].append(cell)


class Walk:
    """One context: each entry's cell, with a unique number, and the cells that lead to it."""

    def __init__(self, cache: Cache, free: list[int]) -> None:
        self.cache, self.lanes = cache, Lanes(free)
        self.paths: list[tuple[int, ...]] = []

    def append(self, cells: list[int]) -> None:
        lane, start, _ = self.lanes.append(len(cells))
        self.cache.run([Row(lane, start + i, None) for i in range(len(cells))], cells)
        for cell in cells:
            self.paths.append((*(self.paths[-1] if self.paths else ()), cell))

    def branch(self, parents: list[int], cells: list[int]) -> None:
        rows = self.lanes.branch(parents)
        self.cache.run(rows, cells)
        self.paths += [(*self.paths[parent], cell) for parent, cell in zip(parents, cells, strict=True)]
        for row, path in zip(rows, self.paths[-len(rows) :], strict=True):
            assert tuple(self.cache.lanes[row.lane]) == path, "a row sees its ancestors and itself"

    def keep(self, length: int, moved: list[int]) -> None:
        self.cache.cut(self.lanes.keep(length, moved))
        self.paths = [self.paths[entry] for entry in (*range(length), *moved)]

    @property
    def leaves(self) -> set[tuple[int, ...]]:
        followed = {path[:-1] for path in self.paths}
        return {path for path in self.paths if path not in followed}

    def check(self) -> None:
        held = [tuple(self.cache.lanes[lane]) for lane in self.lanes.held]
        assert set(held) == self.leaves
        assert len(held) == len(self.leaves)
        assert len(self.lanes) == len(self.paths)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_row_sees_its_ancestors_and_nothing_else(data: st.DataObject) -> None:
    cache, free = Cache(), list(range(NUM_LANES))
    walks = [Walk(cache, free), Walk(cache, free)]
    cell = 0
    for _ in range(data.draw(st.integers(1, 14), "steps")):
        walk = data.draw(st.sampled_from(walks), "walk")
        count = data.draw(st.integers(1, 3), "count")
        cells = list(range(cell, cell + count))
        cell += count
        size = len(walk.paths)
        is_chain = len(walk.leaves) <= 1
        what = data.draw(st.sampled_from(["append", "branch", "keep"]), "what")
        if what == "append" and is_chain and (size or free):
            walk.append(cells)
        elif what == "branch" and size:
            parents = data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count), "parents")
            before = (dict(cache.lanes), list(walk.paths))
            try:
                walk.branch(parents, cells)
            except CacheFullError:
                assert (dict(cache.lanes), walk.paths) == before, "nothing is half done where lanes are few"
        elif what == "keep":
            length = data.draw(st.integers(0, size), "length")
            kept, moved = set(walk.paths[:length]), []
            for entry in range(length, size):
                path = walk.paths[entry]
                if (len(path) == 1 or path[:-1] in kept) and data.draw(st.booleans(), "is kept"):
                    kept.add(path)
                    moved.append(entry)
            walk.keep(length, moved)
        for each in walks:
            each.check()
        used = {lane for each in walks for lane in each.lanes.held}
        assert used.isdisjoint(free)
        assert len(used) + len(free) == NUM_LANES, "no lane is lost"
        assert not any(cache.lanes[lane] for lane in free), "what is free is empty"
