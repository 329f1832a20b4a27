"""A prompt as a chain of hashes, each of which stands for everything up to it.

Two prompts whose chains agree in their first ``n`` hashes have the same first ``n`` blocks, so that a router finds
common prefixes without keeping a text. Bytes of the rendered prompt are hashed, because the place that routes has no
tokenizer. The hash is keyed: who sees chains, in a log or in memory, can neither guess texts nor prepare collisions.
"""

from __future__ import annotations

import hashlib

from gossamer.errors import ConfigurationError

BLOCK_BYTES = 256
HASH_BYTES = 8


class ChainHasher:
    """Keyed BLAKE2b-64 over blocks of 256 bytes.

    Args:
        key: 16 to 64 bytes, secret, random, and the same wherever chains are to agree.

    Raises:
        ConfigurationError: the key is shorter or longer.

    >>> hasher = ChainHasher(bytes(range(32)))
    >>> first = hasher.chain(b"x" * 600, scope=("SmolLM2-135M", "", ""))
    >>> second = hasher.chain(b"x" * 512 + b"y" * 88, scope=("SmolLM2-135M", "", ""))
    >>> len(first), first == second, first == hasher.chain(b"x" * 600, scope=("SmolLM2-135M", "", "team"))
    (2, True, False)
    """

    def __init__(self, key: bytes) -> None:
        if not 16 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
            raise ConfigurationError(
                f"the key of the prompts' hashes has {len(key)} bytes; give 16 to 64, such as secrets.token_bytes(32)"
            )
        self._key = bytes(key)

    def chain(self, data: bytes, *, scope: tuple[str, ...] = ()) -> tuple[int, ...]:
        """The hashes of ``data``, each in [0, 2^64).

        Args:
            data: the rendered prompt.
            scope: what keeps equal texts apart: the model, the adapter, the ``cache_salt``.

        Returns:
            One hash per whole block of 256 bytes, of all bytes up to the block's end. What is behind the last whole
            block is left out, except in a prompt shorter than a block: its one hash is of what there is.
        """
        state = hashlib.blake2b(key=self._key, digest_size=HASH_BYTES)
        for part in scope:  # with their lengths, so that ("ab", "c") is not ("a", "bc")
            encoded = part.encode("utf-8", "surrogatepass")
            state.update(len(encoded).to_bytes(8, "little") + encoded)
        state.update(len(scope).to_bytes(8, "little"))
        view, chain = memoryview(data), []
        for start in range(0, max(len(view) - BLOCK_BYTES, 0) + 1, BLOCK_BYTES):
            state.update(view[start : start + BLOCK_BYTES])
            chain.append(int.from_bytes(state.copy().digest(), "little"))
        return tuple(chain)
