"""Where one completion stands in its grammar."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
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
        drafted: tokens that may come one after the other, behind each of which the mask is known too.
        forced: nothing else than those can be spelled: it is the grammar that drafted them.
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
        self.drafted: list[int] = []
        self.forced = False
        self._masks = b""
        self._asked = 0.0

    def begin(self) -> None:
        """Ask for the first mask, unless that was done."""
        if self.grammar is not None or self.ready:
            return
        try:
            self.grammar = self._compiler.open(self._form, waits=False)
        except InvalidSamplingParamsError as error:  # since it was compiled, it has taken too long for another
            self.answer(program.Answer(program.ERROR, reason=error.message))
        else:
            self._ask(program.BEGIN)

    def accept(self, tokens: Sequence[int], drafted: Sequence[int] = ()) -> None:
        """The completion goes on with ``tokens``: ask for the mask behind them, and for those behind drafted ones."""
        self.ready, self.drafted = False, []
        self._ask(tokens, drafted)

    def excluded(self, ahead: int = 0) -> np.ndarray:
        """For each token (V, rounded up to whole words) whether it may not come behind so many drafted tokens."""
        size = self._compiler.mask_bytes
        mask = np.frombuffer(self._masks, np.uint8, size, ahead * size)
        return np.unpackbits(~mask, bitorder="little").view(bool)

    def close(self) -> None:
        """Nobody asks any more."""
        if self.grammar is not None:
            self._compiler.forget(self, self.grammar)
            self.grammar = None

    def answer(self, answer: program.Answer) -> None:
        """What the grammar's process says."""
        if answer.status == program.ERROR:
            self.error = answer.reason or "it leads nowhere"
        self.complete = answer.status == program.COMPLETE
        self._masks = answer.masks or bytes(self._compiler.mask_bytes)
        self.drafted, self.forced = answer.drafted, answer.forced
        self.slow = time.monotonic() - self._asked > PATIENCE
        self.ready = True

    def _ask(self, tokens: Sequence[int] | int, drafted: Sequence[int] = ()) -> None:
        assert self.grammar is not None
        self._asked = time.monotonic()
        self._compiler.ask(self, self.grammar, program.question(self.number, tokens, drafted))
