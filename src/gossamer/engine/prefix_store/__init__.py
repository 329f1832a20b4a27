"""Prefixes on disk: keys and values of the prefix tree that outlive the process.

    a request ends -> PrefixStore.keep -> PrefixWriter (a thread) -> PrefixDirectory
    a prompt comes -> PrefixStore.restore <- PrefixIndex, PrefixFormat <- PrefixDirectory

A file holds the keys and values of the tokens ``start`` to ``end`` of a prefix, and all of its ``end`` tokens. So files
need not follow the nodes of the tree, which are split and joined all the time: a prefix is put together from files that
each begin where another one has already come to.
"""

from gossamer.engine.prefix_store.store import PrefixStore

__all__ = ["PrefixStore"]
