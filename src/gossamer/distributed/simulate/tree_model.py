"""The engine's prefix tree and its slots, counted in tokens instead of stored.

The rules are those of :mod:`gossamer.engine.tree`, :mod:`gossamer.engine.slots` and
:mod:`gossamer.engine.output_cache`, which say why; ``tests/test_simulate.py`` runs both on the same requests. Salts and
adapters need no trees of their own here, because their prompts have other hashes from the first block on.
"""

from __future__ import annotations

import heapq

from gossamer.distributed.simulate.texts import Text

SMALLEST_SLOT = 64


def capacity_for(length: int) -> int:
    """As :func:`gossamer.engine.slots.capacity_for`."""
    step = max(SMALLEST_SLOT, 1 << max((length - 1).bit_length() - 4, 0))
    return -(-length // step) * step


class Budget:
    """Tokens of keys and values that one replica can hold."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.peak = 0

    @property
    def free(self) -> int:
        return self.total - self.used

    def take(self, tokens: int) -> None:
        self.used += tokens
        self.peak = max(self.peak, self.used)


class Node:
    """Tokens ``start`` to ``end`` of a text. The root holds none."""

    __slots__ = (
        "children",
        "computed",
        "end",
        "last_used",
        "owner",
        "parent",
        "refs",
        "serial",
        "start",
        "stored",
        "text",
    )

    def __init__(self, text: Text, start: int, end: int, parent: Node | None, serial: int) -> None:
        self.text, self.start, self.end, self.parent, self.serial = text, start, end, parent, serial
        self.children: dict[object, Node] = {}
        self.refs = self.computed = self.last_used = 0
        self.owner = -1
        self.stored = False

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def complete(self) -> bool:
        return self.computed == self.end - self.start

    @property
    def evictable(self) -> bool:
        return self.parent is not None and not self.children and self.refs == 0

    def path(self) -> list[Node]:
        """From below the root down to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Tree:
    """See :class:`gossamer.engine.tree.PrefixTree`."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.root = Node(Text((), 1, 0), 0, 0, None, 0)
        self.clock = 0
        self.idle = 0  # stored tokens that nobody uses
        self.evicted_tokens = 0
        self._serial = 0
        self._leaves: list[tuple[int, int, Node]] = []  # what could be evicted when it was pushed; checked when popped

    def _node(self, text: Text, start: int, end: int, parent: Node) -> Node:
        self._serial += 1
        node = parent.children[text.key(start)] = Node(text, start, end, parent, self._serial)
        return node

    def match(self, text: Text, length: int) -> int:
        """How many leading tokens of ``text`` are in the tree, computed."""
        node, matched = self.root, 0
        while matched < length:
            child = node.children.get(text.key(matched))
            if child is None:
                break
            common = child.text.agrees(text, matched, min(child.end, length, child.start + child.computed))
            matched = max(matched, common)
            if common < child.end:
                break
            node = child
        return matched

    def insert(self, text: Text, length: int) -> Node:
        """The node that ends at the end of the first ``length`` tokens."""
        node = self.root
        while node.end < length:
            child = node.children.get(text.key(node.end))
            if child is None:
                return self._node(text, node.end, length, node)
            self._join_idle(child)
            common = child.text.agrees(text, child.start, min(child.end, length))
            node = child if common == child.end else self._split(child, common)
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Cut before token ``at`` of the text; the object stays the lower part."""
        assert node.parent is not None
        upper = self._node(node.text, node.start, at, node.parent)
        upper.refs, upper.last_used, upper.owner, upper.stored = node.refs, node.last_used, node.owner, node.stored
        upper.computed, node.computed = min(node.computed, len(upper)), max(node.computed - len(upper), 0)
        node.start, node.parent = at, upper
        upper.children[node.text.key(at)] = node
        return upper

    def _join_idle(self, node: Node) -> None:
        while (upper := node.parent) is not None and upper.parent is not None:
            alone = len(upper.children) == 1 and upper.complete and node.complete
            if not (alone and upper.refs == node.refs == 0 and 2 * len(node) >= len(upper)):
                return
            node.start, node.parent = upper.start, upper.parent
            node.computed = len(node)
            upper.parent.children[node.text.key(node.start)] = node

    def allocate(self, node: Node) -> bool:
        if node.stored:
            return True
        if not self.reserve(len(node)):
            return False
        node.stored = True
        if node.refs == 0:
            self.idle += len(node)
        return True

    def reserve(self, tokens: int) -> bool:
        if tokens > self.budget.free:
            self.evict(tokens - self.budget.free)
        if tokens > self.budget.free:
            return False
        self.budget.take(tokens)
        return True

    def lock(self, node: Node) -> None:
        self.clock += 1
        while node.parent is not None:
            if node.refs == 0 and node.stored:
                self.idle -= node.end - node.start
            node.refs += 1
            node.last_used = self.clock
            node = node.parent

    def unlock(self, node: Node, until: Node | None = None) -> None:
        self.clock += 1
        for each in reversed(node.path()):
            if each is until:
                break
            each.refs -= 1
            each.last_used = self.clock
            if each.refs == 0:
                if each.stored:
                    self.idle += len(each)
                if not each.complete:
                    self._truncate(each)
                elif not each.children:
                    self._push(each)

    def _push(self, node: Node) -> None:
        heapq.heappush(self._leaves, (node.last_used, node.serial, node))

    def evict(self, wanted: int) -> int:
        """Least recently used leaves first."""
        freed = 0
        while freed < wanted and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if node.evictable and node.last_used == last_used:
                freed += self._remove(node)
        return freed

    def _remove(self, node: Node) -> int:
        parent = node.parent
        assert parent is not None
        del parent.children[node.text.key(node.start)]
        size = 0
        if node.stored:
            size = len(node)
            self.budget.used -= size
            self.idle -= size
            self.evicted_tokens += node.computed
        node.parent, node.stored = None, False
        if parent.evictable and parent.complete:
            self._push(parent)
        return size

    def _truncate(self, node: Node) -> None:
        for child in list(node.children.values()):
            if child.refs == 0:
                self._truncate(child)
        if node.children:
            return
        if node.computed:
            self._split(node, node.start + node.computed)
        self._remove(node)

    def keep_output(self, text: Text, length: int, private_start: int, owner: int) -> None:
        """As :func:`gossamer.engine.output_cache.keep_output`."""
        matched = max(self.match(text, length), private_start)
        if matched == length or length - matched > self.budget.free:
            return
        node = self.insert(text, length)
        if node.start == matched and node.refs == 0 and not node.stored and self.allocate(node):
            node.computed, node.owner = len(node), owner
        self.lock(node)
        self.unlock(node)


class Slot:
    """One sequence's place among those of the same capacity."""

    __slots__ = ("capacity", "index")

    def __init__(self, capacity: int, index: int) -> None:
        self.capacity, self.index = capacity, index


class Slots:
    """See :class:`gossamer.engine.slots.SlotPool`: rows of equal capacity, which grow and shrink together."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._rows: dict[int, int] = {}
        self._used: dict[int, list[Slot]] = {}

    def _grow(self, capacity: int, extra: int) -> bool:
        if not self._tree.reserve(extra * capacity):
            return False
        self._rows[capacity] += extra
        return True

    def _bucket(self, capacity: int) -> list[Slot]:
        if capacity not in self._rows:
            self._rows[capacity], self._used[capacity] = 0, []
        return self._used[capacity]

    def reserve(self, capacity: int, count: int) -> None:
        """Let the rows of a capacity grow once for ``count`` sequences, if there is memory for all."""
        missing = count + len(self._bucket(capacity)) - self._rows[capacity]
        if missing > 0:
            self._grow(capacity, missing)

    def take(self, length: int) -> Slot | None:
        """A slot for ``length`` tokens, or ``None`` if there is no memory for it."""
        capacity = capacity_for(max(length, 1))
        bucket = self._bucket(capacity)
        rows = self._rows[capacity]
        if len(bucket) == rows and not (self._grow(capacity, max(1, rows // 4)) or self._grow(capacity, 1)):
            return None
        bucket.append(Slot(capacity, len(bucket)))
        return bucket[-1]

    def release(self, slot: Slot) -> None:
        """The last slot moves into its place."""
        bucket = self._used[slot.capacity]
        last = bucket.pop()
        if last is not slot:
            last.index = slot.index
            bucket[last.index] = last
        if not bucket:
            self._trim(slot.capacity)

    def _trim(self, capacity: int) -> int:
        spare = self._rows[capacity] - len(self._used[capacity])
        self._rows[capacity] -= spare
        self._tree.budget.used -= spare * capacity
        return spare

    def trim(self) -> bool:
        """Give back rows that no slot uses. Returns whether there were any."""
        return sum([self._trim(capacity) for capacity in self._rows]) > 0
