"""The prefix tree: which tokens are shared by whom, and where their keys and values are.

A radix tree over token ids. A node holds a run of tokens and owns their keys and values, contiguous per layer, so that
all sequences below it attend to it with one pair of GEMMs. Prompts enter the tree *before* they are computed: prompts
that arrive together find their common parts, at every depth, and each part is computed once.

Prompts with a salt have a tree of their own below a root of its own: nothing is shared between salts, so that nobody
can find out, by what is cached or how long it takes, what others have asked. An adapter is a salt as well, since keys
and values computed with it are other ones.

Invariants (tested as properties):
  * children of a node start with different tokens, and no node is empty but the root;
  * ``refs`` counts the sequences that use a node; a node's refs are at least those of any child;
  * only unreferenced, unpinned leaves are evicted, least recently used first;
  * the budget holds exactly the bytes of the nodes that have storage.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.memory import KVLayout, MemoryBudget
from gossamer.engine.states import State
from gossamer.errors import ConfigurationError

_serial = itertools.count()
TreeSalt = str | tuple[str, str | None] | None  # a request's own, or its adapter and its own


def tree_salt(cache_salt: str | None, adapter: str | None) -> TreeSalt:
    """What keeps the keys and values of a request apart: its own salt, within its adapter.

    >>> tree_salt(None, None), tree_salt("team", None), tree_salt("team", "sql")
    (None, 'team', ('sql', 'team'))
    """
    return cache_salt if adapter is None else (adapter, cache_salt)


class Node:
    """A run of tokens with one parent. ``keys[layer]`` and ``values[layer]`` are (Hkv, len(tokens), dim).

    Attributes:
        start: position of the first token in every sequence that contains the node.
        computed: how many of the tokens have their keys and values; a node is shared only when all have.
        owner: which sequence computed it, by its order, for the statistics of tokens saved.
        uses: requests that began with it and ended well.
        salt: of a root, whose prompts are below it; ``None`` for all other nodes.
        states: what recurrent layers keep of a text behind so many of its tokens; see :mod:`gossamer.engine.states`.
        room: how many states the budget has been asked for.
        chains: the places of its tokens, for drafts; whoever reads them sees whether they are still right.
        addresses, means: of the tensors, as a runner notes them; :meth:`hold`, which alone replaces tensors, forgets
            them.
    """

    __slots__ = (
        "addresses",
        "chains",
        "children",
        "computed",
        "keys",
        "last_used",
        "means",
        "owner",
        "parent",
        "pins",
        "refs",
        "room",
        "salt",
        "serial",
        "start",
        "states",
        "tokens",
        "uses",
        "values",
    )

    def __init__(self, tokens: list[int], parent: Node | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.start: int = parent.end if parent else 0
        self.children: dict[int, Node] = {}
        self.hold(None, None)
        self.computed = 0
        self.refs = 0
        self.pins = 0
        self.last_used = 0
        self.uses = 0
        self.owner: object = None
        self.salt: TreeSalt = None
        self.chains: Any = None
        self.states: dict[int, State] = {}
        self.room = 0
        self.serial = next(_serial)

    def hold(self, keys: list[Tensor] | None, values: list[Tensor] | None) -> None:
        """These are its keys and values now."""
        self.keys, self.values = keys, values
        self.addresses: Any = None
        self.means: Any = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def complete(self) -> bool:
        return self.computed == len(self.tokens)

    @property
    def last_state(self) -> int:
        """Behind how many of its computed tokens the last state is known; 0 if behind none."""
        return max((place for place in self.states if place <= self.computed), default=0)

    def state_before(self, offset: int) -> State | None:
        """The state in front of its token ``offset``, which must be known; ``None`` where a text begins."""
        if offset:
            return self.states[offset]
        above = self.parent
        return None if above is None or above.parent is None else above.states[len(above)]

    def path(self) -> list[Node]:
        """The nodes from below the root down to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """See the module's documentation. All methods are called between steps, never during one."""

    def __init__(self, layout: KVLayout, budget: MemoryBudget) -> None:
        self.layout = layout
        self.budget = budget
        self.root = Node([], None)
        self.roots: dict[TreeSalt, Node] = {None: self.root}  # by salt; without nodes, a salt has none
        self.clock = 0
        self.version = 0  # changes when a node is split or moved, so that plans made before are not used again
        self.evicted_tokens = 0
        self.pinned: Counter[tuple[TreeSalt, tuple[int, ...]]] = Counter()
        budget.evict = self.evict

    def __iter__(self) -> Iterator[Node]:
        """Every node below the roots, parents first."""
        stack = [child for root in self.roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    @property
    def num_bytes(self) -> int:
        return sum(self._size(node) for node in self if node.keys is not None)

    def _size(self, node: Node) -> int:
        return len(node) * self.layout.bytes_per_token + node.room * self.layout.state_bytes

    def match(self, tokens: Sequence[int], salt: TreeSalt = None) -> int:
        """How many leading ``tokens`` are in the tree, computed."""
        node, matched = self.roots.get(salt), 0
        while node is not None and matched < len(tokens):
            child = node.children.get(tokens[matched])
            if child is None:
                break
            common = min(_common_length(child.tokens, tokens, matched), child.computed)
            matched += common
            if common < len(child):
                break
            node = child
        return matched

    def computed_path(self, tokens: Sequence[int], salt: TreeSalt = None) -> list[Node]:
        """The nodes from the root down that hold nothing but leading ``tokens``, all of them computed."""
        node, path = self.roots.get(salt), []
        while node is not None and node.end < len(tokens):
            node = node.children.get(tokens[node.end])
            if node is None or not node.complete or node.tokens != list(tokens[node.start : node.end]):
                break
            path.append(node)
        return path

    def insert(self, tokens: Sequence[int], salt: TreeSalt = None) -> Node:
        """The node that ends exactly at the end of ``tokens``; splits and appends as needed, computes nothing."""
        if not tokens:
            return self.root
        if salt not in self.roots:
            self.roots[salt] = Node([], None)
            self.roots[salt].salt = salt
        node, matched = self.roots[salt], 0
        while matched < len(tokens):
            child = node.children.get(tokens[matched])
            if child is None:
                child = Node(list(tokens[matched:]), node)
                node.children[child.tokens[0]] = child
                return child
            self._join_idle(child)
            common = _common_length(child.tokens, tokens, child.start)
            matched = child.start + common
            node = child if common == len(child) else self._split(child, common)
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Cut ``node`` before its token ``at``. The object stays the lower part, so that references to it keep their
        meaning; the upper part is new. Storage is copied apart, group by group, so that each part owns its bytes."""
        parent = node.parent
        assert parent is not None
        upper = Node(node.tokens[:at], parent)
        parent.children[upper.tokens[0]] = upper
        upper.refs, upper.pins, upper.last_used, upper.owner = node.refs, node.pins, node.last_used, node.owner
        upper.uses = node.uses
        upper.computed, node.computed = min(node.computed, at), max(node.computed - at, 0)
        node.tokens, node.parent, node.start = node.tokens[at:], upper, upper.end
        upper.children[node.tokens[0]] = node
        if node.keys is not None and node.values is not None:
            above, below = (list(node.keys), list(node.values)), (node.keys, node.values)
            for layers in self.layout.groups(length=len(upper) + len(node)):
                for part, length, tokens in ((above, len(upper), slice(at)), (below, len(node), slice(at, None))):
                    made = self.layout.allocate(length=length, layers=layers)
                    for own, new in zip(part, made, strict=True):
                        for layer, tensor in zip(layers, new, strict=True):
                            own[layer] = tensor.copy_(own[layer][:, tokens])
            upper.hold(*above)
            node.hold(*below)
        upper.states = {place: state for place, state in node.states.items() if place <= at}
        node.states = {place - at: state for place, state in node.states.items() if place > at}
        upper.room = min(node.room, len(upper.states))
        node.room -= upper.room
        self.version += 1
        return upper

    def _join_idle(self, node: Node) -> None:
        """Make one node of a chain that nobody uses, so that it is attended to as one segment.

        Conversations grow such chains, turn by turn. A parent joins a child at least half as long, so that each token
        is copied a logarithmic number of times at most. The object that stays is the lower one, as in a split.
        """
        while (upper := node.parent) is not None and upper.parent is not None:
            alone = len(upper.children) == 1 and upper.complete and node.complete
            idle = upper.refs == node.refs == 0 and upper.pins == node.pins == 0
            if not (alone and idle and 2 * len(node) >= len(upper)):
                return
            assert upper.keys is not None and upper.values is not None
            assert node.keys is not None and node.values is not None
            for layers in self.layout.groups(length=len(upper) + len(node)):
                made = self.layout.allocate(length=len(upper) + len(node), layers=layers)
                for own, above, new in zip((node.keys, node.values), (upper.keys, upper.values), made, strict=True):
                    for layer, tensor in zip(layers, new, strict=True):
                        own[layer] = torch.cat([above[layer], own[layer]], dim=1, out=tensor)
                        above[layer] = tensor[:, :0]
            node.hold(node.keys, node.values)
            node.tokens, node.start, node.parent = upper.tokens + node.tokens, upper.start, upper.parent
            node.computed, node.uses = len(node.tokens), max(node.uses, upper.uses)
            node.states = upper.states | {len(upper) + place: state for place, state in node.states.items()}
            node.room += upper.room
            upper.parent.children[node.tokens[0]] = node
            self.version += 1

    def allocate(self, node: Node) -> bool:
        """Give ``node`` storage. False if the budget has no room even after eviction."""
        if node.keys is not None:
            return not self.layout.state_bytes or node.room > 0 or self.make_room_for_state(node)
        if not self.budget.reserve(self.layout.size(len(node))):
            return False
        node.hold(*self.layout.allocate(length=len(node)))
        node.room = 1 if self.layout.state_bytes else 0
        return True

    def make_room_for_state(self, node: Node) -> bool:
        """See that ``node`` can hold a state more. False if the budget has no room even after eviction."""
        if node.room > len(node.states):
            return True
        if not self.budget.reserve(self.layout.state_bytes):
            return False
        node.room += 1
        return True

    def keep_state(self, node: Node, place: int, state: State, *, apart: int) -> None:
        """The state of a text behind ``place`` tokens of ``node``, which are computed.

        That behind its last token is what its children go on from. One on the way there gives way to the next, unless
        it is the first for ``apart`` tokens and there is memory for it: then a prompt that parts from the node later
        need not go through all of it again.
        """
        before = max((each for each in node.states if each < place), default=None)
        if before is not None and not self._may_stay(node, before, apart):
            del node.states[before]
        if (
            place not in node.states
            and not self.make_room_for_state(node)
            and (before is None or node.states.pop(before, None) is None)
        ):
            return
        node.states[place] = state.apart()

    def _may_stay(self, node: Node, place: int, apart: int) -> bool:
        earlier = [each for each in node.states if each < place]
        far = place - max(earlier, default=0) >= apart
        free = self.budget.free >= self.layout.state_bytes or node.room > len(node.states)
        return far and free

    def drop_states(self, node: Node) -> int:
        """Forget all states but the last, which is at the end of ``node``, or on the way there. Returns bytes freed."""
        last = max(node.states, default=0)
        node.states = {place: state for place, state in node.states.items() if place == last}
        freed = max(node.room - 1, 0) * self.layout.state_bytes
        node.room = min(node.room, 1)
        self.budget.release(freed)
        return freed

    def lock(self, node: Node) -> None:
        """A sequence uses ``node`` and everything above it."""
        self.clock += 1
        for each in node.path():
            each.refs += 1
            each.last_used = self.clock

    def unlock(self, node: Node, until: Node | None = None) -> None:
        """The sequence uses it no more (nodes above and including ``until`` stay locked).

        What was never computed is dropped; what was stays, as a cache.
        """
        self.clock += 1
        for each in reversed(node.path()):
            if each is until:
                break
            each.refs -= 1
            each.last_used = self.clock
            if each.refs == 0 and each.pins == 0 and not each.complete:
                self._truncate(each)

    def pin(self, tokens: Sequence[int], salt: TreeSalt = None) -> Node:
        """Keep ``tokens`` from being evicted. It takes effect as they are computed. Undo by :meth:`unpin`."""
        node = self.insert(tokens, salt)
        for each in node.path():
            each.pins += 1
        self.pinned[salt, tuple(tokens)] += 1
        return node

    def unpin(self, tokens: Sequence[int], salt: TreeSalt = None) -> None:
        """Undo one :meth:`pin` of the same tokens.

        Raises:
            ConfigurationError: they are not pinned.
        """
        if not self.pinned[salt, tuple(tokens)]:
            raise ConfigurationError(f"these {len(tokens)} tokens are not pinned; unpin exactly what was pinned")
        self.pinned[salt, tuple(tokens)] -= 1
        self.pinned += Counter()  # drops what has come down to zero
        node = self.insert(tokens, salt)
        for each in reversed(node.path()):
            each.pins -= 1
            if each.refs == 0 and each.pins == 0 and not each.complete:
                self._truncate(each)

    def forget(self, tokens: Sequence[int], salt: TreeSalt = None) -> None:
        """Remove what the tree holds of ``tokens``, from the end, as far as nobody else uses it."""
        node = self.roots.get(salt)
        if node is None:
            return
        while node.end < len(tokens) and tokens[node.end] in node.children:
            child = node.children[tokens[node.end]]
            if child.tokens != list(tokens[child.start : child.end]):
                break  # it holds other tokens too
            node = child
        while self._evictable(node):
            parent = node.parent
            assert parent is not None
            self._remove(node)
            node = parent

    def evict(self, wanted: int) -> int:
        """Free at least ``wanted`` bytes of what nobody uses, least recently used leaves first. Returns bytes freed."""
        freed = 0
        if self.layout.state_bytes:
            for node in sorted(self, key=lambda node: node.last_used):
                if freed < wanted:
                    freed += self.drop_states(node)
        leaves = [(node.last_used, node.serial, node) for node in self if self._evictable(node)]
        heapq.heapify(leaves)
        while leaves and freed < wanted:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            freed += self._remove(node)
            if parent is not None and self._evictable(parent):
                heapq.heappush(leaves, (parent.last_used, parent.serial, parent))
        return freed

    @property
    def evictable_bytes(self) -> int:
        """Bytes that eviction could free: nodes below which nothing is used or pinned."""
        states = self.layout.state_bytes
        return sum(
            self._size(n) if n.refs == 0 and n.pins == 0 and n.keys is not None else max(n.room - 1, 0) * states
            for n in self
        )

    def _evictable(self, node: Node) -> bool:
        return node.parent is not None and not node.children and node.refs == 0 and node.pins == 0

    def _remove(self, node: Node) -> int:
        """Take a leaf out. Returns the bytes it held."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens[0]]
        size = 0
        if node.keys is not None:
            size = self._size(node)
            self.budget.release(size)
            self.evicted_tokens += node.computed
        root = node.parent
        if root.parent is None and root is not self.root and not root.children:
            del self.roots[root.salt]
        node.parent = None
        node.hold(None, None)
        node.states, node.room = {}, 0
        return size

    def _truncate(self, node: Node) -> None:
        """Drop what is not computed of an unused node. Its children, if any, are not computed at all and unused too."""
        for child in list(node.children.values()):
            if child.refs == 0 and child.pins == 0:
                self._truncate(child)
        if node.children:
            return
        if node.computed == 0:
            self._remove(node)
            return
        self._split(node, node.computed)
        self._remove(node)


def _common_length(node_tokens: list[int], tokens: Sequence[int], offset: int) -> int:
    """Length of the common prefix of ``node_tokens`` and ``tokens[offset:]``."""
    limit = min(len(node_tokens), len(tokens) - offset)
    # Slices compare at C speed; only a mismatch is searched for token by token.
    if node_tokens[:limit] == list(tokens[offset : offset + limit]):
        return limit
    return next(i for i in range(limit) if node_tokens[i] != tokens[offset + i])
