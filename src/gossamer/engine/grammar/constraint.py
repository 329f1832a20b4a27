"""Where one completion stands in its grammar."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import numpy as np

from gossamer.engine.grammar import program
from gossamer.errors import InvalidSamplingParamsError

if TYPE_CHECKING:
    from gossamer.engine.grammar.compiler import Grammar, GrammarCompiler

PATIENCE = 0.02  # seconds that a step waits for a mask
_numbers = itertools.count()


class Constraint:
    """One completion's way through a grammar. The mask of what may come next is asked for, and comes later.

    Attributes:
        error: why the grammar cannot be followed any further; otherwise empty.
        complete: nothing but the end can come now.
        ready: whether the mask has come, or never will.
        grammar: its process, once the first mask is asked for.
        slow: the last mask took longer than a step waits.
    """

    def __init__(self, compiler: GrammarCompiler, form: str) -> None:
        self.number = next(_numbers) % 2**32
        self.error = ""
        self.complete = self.ready = self.slow = False
        self._compiler = compiler
        self._form = form
        self.grammar: Grammar | None = None
        self._mask = b""
        self._asked = 0.0

    def begin(self) -> None:
        """Ask for the first mask, unless that was done."""
        if self.grammar is not None or self.ready:
            return
        try:
            self.grammar = self._compiler.open(self._form, waits=False)
        except InvalidSamplingParamsError as error:  # since it was compiled, it has taken too long for another
            self.answer(program.ERROR, error.message.encode())
        else:
            self._ask(program.BEGIN)

    def accept(self, token: int) -> None:
        """The completion goes on with ``token``: ask for the mask behind it."""
        self.ready = False
        self._ask(token)

    def allowed(self) -> np.ndarray:
        """For each token (V, rounded up to whole words) whether it may come next; nothing may after an error."""
        return np.unpackbits(np.frombuffer(self._mask, np.uint8), bitorder="little").view(bool)

    def close(self) -> None:
        """Nobody asks any more."""
        if self.grammar is not None:
            self._compiler.forget(self, self.grammar)
            self.grammar = None

    def answer(self, status: int, content: bytes) -> None:
        """What the grammar's process says."""
        if status == program.ERROR:
            self.error, content = content.decode(errors="replace") or "it leads nowhere", b""
        self.complete = status == program.COMPLETE
        self._mask = content or bytes(self._compiler.mask_bytes)
        self.slow = time.monotonic() - self._asked > PATIENCE
        self.ready = True

    def _ask(self, token: int) -> None:
        assert self.grammar is not None
        self._asked = time.monotonic()
        self._compiler.ask(self, self.grammar, token)
