"""The prefix tree as a state machine: whatever is inserted, split, unlocked or evicted, tokens keep their keys."""

from __future__ import annotations

import zlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gossamer.engine.memory import KVLayout, LayerShape, MemoryBudget
from gossamer.engine.tree import Node, PrefixTree

LAYOUT = KVLayout((LayerShape(2, 2, 3), LayerShape(1, 4, 1)), torch.float32, torch.device("cpu"))
Path = tuple[int, ...]
texts = st.lists(st.integers(0, 2), max_size=12).map(tuple)


def code(path: Path) -> int:
    """A number that tells a token and all tokens before it."""
    return zlib.crc32(bytes(path)) % (1 << 20)


def path_of(node: Node) -> Path:
    return tuple(token for each in node.path() for token in each.tokens)


def compute(node: Node, count: int) -> None:
    """Write keys and values of the next ``count`` tokens, as the runner would."""
    assert node.keys is not None and node.values is not None
    path = path_of(node)
    for at in range(node.computed, node.computed + count):
        for layer, (keys, values) in enumerate(zip(node.keys, node.values, strict=True)):
            keys[:, at] = code(path[: node.start + at + 1]) + layer
            values[:, at] = -code(path[: node.start + at + 1]) - layer
    node.computed += count


def computed_paths(tree: PrefixTree) -> set[Path]:
    return {path_of(node)[: node.start + i + 1] for node in tree for i in range(node.computed)}


def holds_its_content(node: Node) -> bool:
    path = path_of(node)
    expected = torch.tensor([float(code(path[: node.start + i + 1])) for i in range(node.computed)])
    return all(
        torch.equal(keys[:, : node.computed], (expected + layer)[None, :, None].expand_as(keys[:, : node.computed]))
        and torch.equal(
            values[:, : node.computed], (-expected - layer)[None, :, None].expand_as(values[:, : node.computed])
        )
        for layer, (keys, values) in enumerate(zip(node.keys or [], node.values or [], strict=True))
    )


def new_tree(tokens: int) -> PrefixTree:
    return PrefixTree(LAYOUT, MemoryBudget(tokens * LAYOUT.bytes_per_token))


def fill(tree: PrefixTree, tokens: Path) -> Node:
    """Insert, lock and compute."""
    node = tree.insert(tokens)
    tree.lock(node)
    for each in node.path():
        assert tree.allocate(each)
        compute(each, len(each) - each.computed)
    return node


class Tree(RuleBasedStateMachine):
    """Against a model made of sets of paths: what is computed, in use, pinned, and when it was used last."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = new_tree(24)
        self.held: list[tuple[Node, Path]] = []  # a lock covers a path down to a node
        self.pinned: list[Path] = []
        self.known: set[Path] = set()
        self.used_at: dict[Path, int] = {}
        self.clock = 0

    def touch(self, paths: list[Path]) -> None:
        self.clock += 1
        self.used_at.update(dict.fromkeys(paths, self.clock))

    def kept(self, path: Path) -> bool:
        """Whether somebody uses or has pinned this token."""
        return any(text[: len(path)] == path for text in [*(t for _, t in self.held), *self.pinned])

    def only_unused_are_gone(self) -> set[Path]:
        """After an eviction: the tokens it took."""
        gone = self.known - computed_paths(self.tree)
        assert not any(self.kept(path) for path in gone)
        self.known -= gone
        return gone

    def evictable(self) -> list[Node]:
        return [n for n in self.tree if not n.children and not self.kept(path_of(n))]

    @rule(text=texts)
    def insert_and_lock(self, text: Path) -> None:
        node = self.tree.insert(text)
        assert path_of(node) == text and node.end == len(text)
        self.tree.lock(node)
        self.held.append((node, text))
        self.touch([text[: i + 1] for i in range(len(text))])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 12))
    def compute_next(self, data: st.DataObject, count: int) -> None:
        node, _ = data.draw(st.sampled_from(self.held))
        todo = next((each for each in node.path() if not each.complete), None)
        if todo is None:
            return
        if not self.tree.allocate(todo):
            assert todo.keys is None and todo.computed == 0
            assert len(todo) * LAYOUT.bytes_per_token > self.tree.budget.free
            self.only_unused_are_gone()
            assert not self.evictable()
            return
        self.only_unused_are_gone()
        count = min(count, len(todo) - todo.computed)
        path, first = path_of(todo), todo.start + todo.computed
        compute(todo, count)
        self.known |= {path[: first + i + 1] for i in range(count)}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, text = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.tree.unlock(node)
        self.touch([text[: i + 1] for i in range(len(text))])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unlock_the_lower_part(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.held) - 1))
        node, text = self.held[place]
        until = data.draw(st.sampled_from([self.tree.root, *node.path()]))
        self.held[place] = (until, text[: until.end])
        self.tree.unlock(node, until=until)
        self.touch([text[: i + 1] for i in range(until.end, len(text))])

    @rule(text=texts)
    def pin(self, text: Path) -> None:
        assert path_of(self.tree.pin(text)) == text
        self.pinned.append(text)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.tree.unpin(self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1))))

    @rule(tokens=st.integers(1, 24))
    def evict(self, tokens: int) -> None:
        wanted, before = tokens * LAYOUT.bytes_per_token, self.tree.budget.used
        promised = self.tree.evictable_bytes
        freed = self.tree.evict(wanted)
        assert before - self.tree.budget.used == freed
        assert freed >= wanted or (not self.evictable() and freed == promised)
        self.only_unused_are_gone()

    @rule()
    def evict_one(self) -> None:
        leaves = [path_of(node) for node in self.evictable()]
        self.tree.evict(1)
        gone = self.only_unused_are_gone()
        assert bool(gone) == bool(leaves)
        if gone:
            (leaf,) = [path for path in leaves if path in gone]  # one leaf, and what stood in its node
            assert self.used_at[leaf] == min(self.used_at[path] for path in leaves)

    @rule(text=texts)
    def match(self, text: Path) -> None:
        expected = next((n for n in range(len(text)) if text[: n + 1] not in self.known), len(text))
        assert self.tree.match(text) == expected

    @invariant()
    def computed_tokens_are_those_of_the_model(self) -> None:
        assert computed_paths(self.tree) == self.known
        assert all(holds_its_content(node) for node in self.tree)

    @invariant()
    def it_is_a_radix_tree(self) -> None:
        for node in (self.tree.root, *self.tree):
            assert all(child.tokens[0] == first for first, child in node.children.items())
            assert all(child.parent is node and child.start == node.end for child in node.children.values())
            assert node is self.tree.root or node.tokens
            if not node.complete:  # nothing is computed before what comes before it
                assert all(child.computed == 0 for child in node.children.values())

    @invariant()
    def references_are_counted(self) -> None:
        refs: Counter[Node] = Counter()
        for node, text in self.held:
            assert path_of(node) == text
            refs.update(node.path())
        for node in self.tree:
            path = path_of(node)
            assert node.refs == refs[node] >= max((child.refs for child in node.children.values()), default=0)
            assert node.pins == sum(text[: len(path)] == path for text in self.pinned)

    @invariant()
    def what_nobody_uses_is_complete(self) -> None:
        for node in self.tree:
            assert node.complete or node.refs or node.pins

    @invariant()
    def budget_is_exact(self) -> None:
        tree = self.tree
        assert tree.budget.used == tree.num_bytes <= tree.budget.total
        stored = [x.untyped_storage() for node in tree for x in (*(node.keys or ()), *(node.values or ()))]
        assert sum({x.data_ptr(): x.nbytes() for x in stored}.values()) == tree.budget.used
        for node in tree:
            assert node.keys is not None or node.computed == 0
            assert all(x.shape[1] == len(node) for x in (*(node.keys or ()), *(node.values or ())))

    @invariant()
    def matching_changes_nothing(self) -> None:
        assert self.tree.match(()) == 0
        assert all(self.tree.match(path) == len(path) for path in self.known)

    def teardown(self) -> None:
        for node, _ in self.held:
            self.tree.unlock(node)
        for text in self.pinned:
            self.tree.unpin(text)
        assert all(node.refs == node.pins == 0 and node.complete for node in self.tree)
        self.tree.evict(self.tree.budget.used)
        assert self.tree.budget.used == 0 and not self.tree.root.children


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(st.lists(texts, max_size=8), st.randoms())
def test_the_shape_of_the_tree_does_not_depend_on_the_order_of_arrival(prompts: list[Path], random: object) -> None:
    def shape(order: list[Path]) -> set[tuple[Path, int]]:
        tree = new_tree(1000)
        for prompt in order:
            fill(tree, prompt)
        return {(path_of(node), node.refs) for node in tree}

    shuffled = list(prompts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert shape(prompts) == shape(shuffled)


@pytest.mark.parametrize("done", range(7))
@pytest.mark.parametrize("cut", range(1, 6))
def test_splitting_keeps_what_is_computed_on_both_sides(done: int, cut: int) -> None:
    tree = new_tree(100)
    node = tree.insert((0, 1, 2, 0, 1, 2))
    tree.lock(node)
    tree.allocate(node)
    compute(node, done)
    upper = tree.insert((0, 1, 2, 0, 1, 2)[:cut])
    assert node.parent is upper and path_of(node) == (0, 1, 2, 0, 1, 2)
    assert (upper.computed, node.computed) == (min(done, cut), max(done - cut, 0))
    assert holds_its_content(upper) and holds_its_content(node)
    assert upper.refs == node.refs == 1


def test_the_least_recently_used_leaf_goes_first_and_then_its_parent() -> None:
    tree = new_tree(100)
    nodes = [fill(tree, text) for text in ((0, 0, 0), (0, 0, 1), (1, 1))]
    for node in (nodes[2], nodes[0], nodes[1]):
        tree.unlock(node)
    gone = []
    while tree.budget.used:
        before = computed_paths(tree)
        tree.evict(1)
        gone.append(max(before - computed_paths(tree)))
    assert gone == [(1, 1), (0, 0, 0), (0, 0, 1), (0, 0)]


def test_an_unfinished_node_is_cut_to_what_is_computed() -> None:
    tree = new_tree(100)
    node = tree.insert((0, 1, 2, 0))
    tree.lock(node)
    tree.allocate(node)
    compute(node, 3)
    tree.unlock(node)
    assert [path_of(each) for each in tree] == [(0, 1, 2)]
    assert tree.budget.used == 3 * LAYOUT.bytes_per_token
    assert tree.match((0, 1, 2, 0)) == 3


def test_a_pinned_prefix_survives_any_need() -> None:
    tree = new_tree(10)
    tree.pin((0, 1, 2))
    tree.unlock(fill(tree, (0, 1, 2, 2, 2)))
    assert not tree.allocate(tree.insert((1,) * 8))
    assert tree.match((0, 1, 2)) == 3
    tree.unpin((0, 1, 2))
    tree.evict(tree.budget.used)
    assert tree.match((0, 1, 2)) == 0


def test_bookkeeping_costs_no_more_memory_than_the_budget() -> None:
    tree = new_tree(6)
    tree.unlock(fill(tree, (0, 1, 2, 0)))
    fill(tree, (1, 1, 1, 1))
    assert tree.budget.peak <= tree.budget.total
    assert tree.evicted_tokens == 4
