"""Grammars by form: which processes there are, who uses them, and when they end."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gossamer.engine.grammar import program
from gossamer.engine.grammar.constraint import PATIENCE, Constraint
from gossamer.engine.grammar.host import GrammarHost
from gossamer.errors import GossamerError, InvalidSamplingParamsError, UnsupportedModelError
from gossamer.sampling_params import StructuredOutputsParams

MAX_GRAMMARS = 64  # processes that are kept, and that requests of a server can have at a time
MAX_COMPILING = 2  # at a time
MAX_REFUSED = 256  # forms that are remembered because they took too long
MAX_FORM = 1 << 20  # characters of a form as JSON
COMPILE_SECONDS = 3.0  # of the processor
MASK_SECONDS = 0.5


class Grammar:
    """A form's process.

    Attributes:
        settled: done once the form is compiled; its exception says what is wrong with the form.
        users: requests and completions that need it.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.settled: Future[None] = Future()
        self.users = 0
        self.connection: Connection | None = None  # none before it is started, and after its end
        self.pid = 0
        self.asked: dict[int, tuple[Constraint, bytes | None]] = {}  # by number; the question, if that waits

    @property
    def computes(self) -> bool:
        """Whether its process has something to do."""
        return self.connection is not None and (bool(self.asked) or not self.settled.done())


class GrammarCompiler:
    """Makes constraints for one tokenizer. Safe to use from several threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: of the model's logits.
        eos_token_ids: tokens that end a text.
        file: the program that follows grammars.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int], *, file: Path = Path(program.__file__)
    ) -> None:
        self.mask_bytes = program.mask_bytes(vocab_size)
        self._host = GrammarHost(
            tokenizer,
            vocab_size,
            eos_token_ids,
            compile_seconds=COMPILE_SECONDS,
            mask_seconds=MASK_SECONDS,
            file=file,
        )
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()  # those that live, the one used last at the end
        self._refused: OrderedDict[str, str] = OrderedDict()  # forms that took too long, and what was said about them
        self._waiting: deque[Grammar] = deque()
        self._compiling: set[Grammar] = set()
        self._connections: set[Connection] = set()
        weakref.finalize(self, _hang_up_all, self._connections)
        self._lock = threading.RLock()
        self._answered = threading.Condition(self._lock)

    @staticmethod
    def form(params: StructuredOutputsParams) -> str:
        """What tells forms apart: the order of a schema's properties is that of the answer.

        Raises:
            InvalidSamplingParamsError: it is too long.
        """
        form = json.dumps(params.to_dict())
        if len(form) > MAX_FORM:
            raise _refusal(f"the form has {len(form)} characters as JSON; at most {MAX_FORM} are compiled")
        return form

    def check(self, form: str) -> None:
        """Whether a form can be followed. Compiles it if nobody has, which may take :data:`COMPILE_SECONDS`.

        Raises:
            InvalidSamplingParamsError: the schema, pattern or list makes no grammar, or takes too long.
            UnsupportedModelError: the tokenizer cannot be walked through.
        """
        grammar = self.open(form, waits=False)
        try:
            grammar.settled.result()
        finally:
            self.close(grammar)

    def open(self, form: str, *, waits: bool = True) -> Grammar:
        """A form's grammar, perhaps still to be compiled; whoever opens it closes it.

        Args:
            waits: not to be started before others end, if there are :data:`MAX_GRAMMARS`.

        Raises:
            InvalidSamplingParamsError: it took too long before.
        """
        with self._lock:
            if form in self._refused:
                raise _refusal(self._refused[form])
            grammar = self._grammars.get(form)
            if grammar is None:
                grammar = self._grammars[form] = Grammar(form)
                self._waiting.append(grammar) if waits else self._waiting.appendleft(grammar)
            self._grammars.move_to_end(form)
            grammar.users += 1
            if not waits and grammar in self._waiting:
                self._waiting.remove(grammar)
                self._start(grammar)
            self._start_waiting()
            return grammar

    def close(self, grammar: Grammar) -> None:
        """Undo one :meth:`open`. What nobody waits for any more ends at once."""
        with self._lock:
            grammar.users -= 1
            if grammar.users == 0 and (grammar.computes or not grammar.settled.done()):
                self._end(grammar)
            self._start_waiting()

    def ask(self, constraint: Constraint, grammar: Grammar, question: bytes) -> None:
        """Have a constraint told what may come next; see :func:`gossamer.engine.grammar.program.question`."""
        with self._lock:
            if not grammar.settled.done():
                grammar.asked[constraint.number] = constraint, question
            elif grammar.connection is None:
                self._fail(constraint, self._refused.get(grammar.form, "its process has ended"))
            else:
                grammar.asked[constraint.number] = constraint, None
                self._send(grammar, question)

    def forget(self, constraint: Constraint, grammar: Grammar) -> None:
        """A constraint is needed no more."""
        with self._lock:
            if constraint.number in grammar.asked and grammar.users == 1:
                self._end(grammar)  # it computes for nobody
            else:
                grammar.asked.pop(constraint.number, None)
                if grammar.connection is not None and grammar.settled.done():
                    self._send(grammar, program.question(constraint.number, program.FORGET))
            self.close(grammar)

    def wait(self, constraints: Iterable[Constraint], seconds: float = PATIENCE) -> None:
        """Until all are ready, or the time is over. For those that were late before, there is no waiting."""
        pending = [each for each in constraints if not (each.ready or each.slow)]
        if not pending:
            return
        with self._answered:
            self._answered.wait_for(lambda: all(each.ready for each in pending), seconds)

    def wait_any(self, constraints: list[Constraint]) -> None:
        """Until one is ready that was not, or a step's time is over."""
        pending = [each for each in constraints if not each.ready]
        with self._answered:
            self._answered.wait_for(lambda: any(each.ready for each in pending), PATIENCE)

    # --- processes ---------------------------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        while self._waiting and len(self._compiling) < MAX_COMPILING and self._has_place():
            self._start(self._waiting.popleft())

    def _has_place(self) -> bool:
        """Whether another process may be started, once those have ended that nobody uses and that take the place."""
        started = [each for each in self._grammars.values() if each.connection is not None]
        idle = [each for each in started if each.users == 0]
        surplus = max(len(started) + 1 - MAX_GRAMMARS, 0)
        for each in idle[:surplus]:  # the one used last goes last
            self._end(each)
        return surplus <= len(idle)

    def _start(self, grammar: Grammar) -> None:
        self._has_place()
        try:
            grammar.connection = self._host.fork()
            self._connections.add(grammar.connection)
            grammar.connection.send_bytes(grammar.form.encode())
        except (GossamerError, OSError) as error:
            self._settle(grammar, error if isinstance(error, GossamerError) else _refusal(f"not now: {error}"))
            self._end(grammar)
            return
        self._compiling.add(grammar)
        arguments = (weakref.ref(self), grammar, grammar.connection)
        threading.Thread(target=_listen, args=arguments, name="grammar", daemon=True).start()

    def _end(self, grammar: Grammar, reason: str = "its process has ended") -> None:
        """End a grammar's process, and with it whoever still waits for it."""
        if self._grammars.get(grammar.form) is grammar:
            del self._grammars[grammar.form]
        if grammar in self._waiting:
            self._waiting.remove(grammar)
        self._compiling.discard(grammar)
        if grammar.connection is not None:
            if grammar.pid and grammar.computes:
                self._host.kill(grammar.pid)
            _hang_up(grammar.connection)
            self._connections.discard(grammar.connection)
            grammar.connection = None
        self._settle(grammar, _refusal(reason))
        for constraint, _ in grammar.asked.values():
            self._fail(constraint, reason)
        grammar.asked.clear()
        self._answered.notify_all()

    def _settle(self, grammar: Grammar, error: Exception | None) -> None:
        self._compiling.discard(grammar)
        if not grammar.settled.done():
            grammar.settled.set_exception(error) if error else grammar.settled.set_result(None)

    @staticmethod
    def _fail(constraint: Constraint, reason: str) -> None:
        constraint.answer(program.Answer(program.ERROR, reason=reason))

    @staticmethod
    def _send(grammar: Grammar, question: bytes) -> None:
        assert grammar.connection is not None
        with suppress(OSError):  # it has ended; its listener says so
            grammar.connection.send_bytes(question)

    # --- what its process says, in the listener's thread ---------------------------------------------------------

    def compiled(self, grammar: Grammar, reason: str) -> None:
        """The form is compiled, or something is wrong with it."""
        with self._lock:
            if grammar.settled.done():
                return
            self._settle(grammar, _refusal(" ".join(reason.split())[:400]) if reason else None)
            if reason:
                self._end(grammar, reason)
            for number, (constraint, question) in grammar.asked.items():
                assert question is not None
                grammar.asked[number] = constraint, None
                self._send(grammar, question)
            self._start_waiting()

    def answered(self, grammar: Grammar, message: bytes) -> None:
        """A mask has come."""
        number, answer = program.read_answer(message)
        with self._lock:
            constraint, _ = grammar.asked.pop(number, (None, None))
            if constraint is not None:
                constraint.answer(answer)
                self._answered.notify_all()

    def ended(self, grammar: Grammar) -> None:
        """The process is gone. If nobody here ended it, its time was over: the same form is not tried again."""
        with self._lock:
            if grammar.connection is None:
                return
            if not grammar.pid:
                self._settle(grammar, UnsupportedModelError("this model's tokenizer cannot follow a grammar"))
                self._end(grammar)
                return
            if not grammar.computes:  # an accident of its own: it is started again when it is needed
                self._end(grammar)
                return
            if grammar.settled.done():
                reason = f"which tokens may come next takes more than {MASK_SECONDS:g} seconds to find"
            else:
                reason = f"the form takes more than {COMPILE_SECONDS:g} seconds to compile; simplify it"
            self._refused[grammar.form] = reason
            while len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
            self._end(grammar, reason)
            self._start_waiting()


def _listen(compiler: weakref.ref[GrammarCompiler], grammar: Grammar, connection: Connection) -> None:
    """Pass on what a process says. Holds no compiler that nobody else does."""
    try:
        (grammar.pid,) = struct.unpack("<I", connection.recv_bytes())
        reason = connection.recv_bytes().decode(errors="replace")
        if (here := compiler()) is not None:
            here.compiled(grammar, reason)
        while here is not None:
            del here
            message = connection.recv_bytes()
            if (here := compiler()) is not None:
                here.answered(grammar, message)
    except (EOFError, OSError):
        if (here := compiler()) is not None:
            here.ended(grammar)
    finally:
        connection.close()


def _hang_up(connection: Connection) -> None:
    """End a conversation for both sides; the listener closes the connection once it has noticed."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def _hang_up_all(connections: set[Connection]) -> None:
    for connection in list(connections):
        _hang_up(connection)


def _refusal(reason: str) -> InvalidSamplingParamsError:
    return InvalidSamplingParamsError(f"structured_outputs: {reason}", param="structured_outputs")
