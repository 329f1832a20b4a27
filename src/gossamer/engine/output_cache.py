"""The tokens that a finished sequence leaves behind, in the prefix tree, for a conversation's next turn."""

from __future__ import annotations

from gossamer.engine.sequence import Sequence
from gossamer.engine.tree import PrefixTree


def keep_output(sequence: Sequence, tree: PrefixTree) -> None:
    """Copy a sequence's slot into the tree, if there is free memory; nothing is evicted for it."""
    slot = sequence.slot
    assert slot is not None
    tokens = sequence.tokens[: sequence.num_computed]
    matched = max(tree.match(tokens, sequence.request.tree_salt), sequence.private_start)
    if slot.state is not None and not slot.state.finite:
        return
    if matched == len(tokens) or tree.layout.size(len(tokens) - matched) > tree.budget.free:
        return
    node = tree.insert(tokens, sequence.request.tree_salt)
    # Only if all that is missing is one new leaf: what others are computing right now is left to them.
    if node.start == matched and node.refs == 0 and node.keys is None and tree.allocate(node):
        assert node.keys is not None and node.values is not None
        first = matched - sequence.private_start
        for own, stored in ((node.keys, slot.bucket.keys), (node.values, slot.bucket.values)):
            for target, source in zip(own, stored, strict=True):
                target.copy_(source[slot.index, :, first : first + len(node)])
        node.computed, node.owner = len(node), sequence.order
        if slot.state is not None:
            node.states[len(node)] = slot.state.apart()
    tree.lock(node)  # unlocking counts as a use, and drops what could not be stored
    tree.unlock(node)
