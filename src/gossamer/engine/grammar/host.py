"""The process that forks a process for each grammar, seen from the engine's side."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gossamer.engine.grammar import program
from gossamer.errors import UnsupportedModelError


class GrammarHost:
    """Starts the program for one tokenizer when the first child is wanted. Callers see to it that one calls at a time.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: of the model's logits.
        eos_token_ids: tokens that end a text.
        compile_seconds: of the processor, for a grammar.
        mask_seconds: of the processor, for each mask.
        file: the program.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        compile_seconds: float,
        mask_seconds: float,
        file: Path = Path(program.__file__),
    ) -> None:
        self._tokenizer = tokenizer
        self._setup: dict[str, Any] = {
            "vocab_size": vocab_size,
            "eos_token_ids": sorted(eos_token_ids) or None,
            "compile_seconds": compile_seconds,
            "mask_seconds": mask_seconds,
        }
        self._file = file
        self._control: socket.socket | None = None

    def fork(self) -> Connection:
        """A new child, to be told its form.

        Raises:
            UnsupportedModelError: the tokenizer cannot be walked through, or this system cannot fork.
            OSError: there are too many processes or files.
        """
        if self._control is None:
            self._control = self._start()
        ours, theirs = socket.socketpair()
        try:
            self._send(b"f", 0, [theirs.fileno()])
        except OSError:  # it was killed, as systems do that are out of memory
            self._control = self._start()
            self._send(b"f", 0, [theirs.fileno()])
        finally:
            theirs.close()
        return Connection(ours.detach())

    def kill(self, pid: int) -> None:
        """End a child, whatever it is doing."""
        try:
            self._send(b"k", pid, [])
        except OSError:
            self._control = None  # it is gone; the next one is started when it is needed

    def _send(self, command: bytes, number: int, files: list[int]) -> None:
        if self._control is None:
            raise OSError("there is no such process")
        socket.send_fds(self._control, [program.CONTROL.pack(command, number)], files)

    def _start(self) -> socket.socket:
        if not hasattr(os, "fork"):
            raise UnsupportedModelError("structured outputs need a system that can fork processes")
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError("this model's tokenizer cannot follow a grammar: it is no fast tokenizer")
        setup = self._setup | {"tokenizer": _spelled(backend)}
        if setup["eos_token_ids"] is None and self._tokenizer.eos_token_id is not None:
            setup["eos_token_ids"] = [self._tokenizer.eos_token_id]
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            json.dump(setup, file)
            file.seek(0)
            files = theirs.fileno(), file.fileno()
            process = subprocess.Popen(
                [sys.executable, "-P", str(self._file), *map(str, files)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=files,
            )
        weakref.finalize(self, _end, ours, process)
        return ours


def _spelled(backend: Any) -> str:
    """The tokenizer as JSON, without what a caller has set for batches."""
    fields = json.loads(backend.to_str())
    return json.dumps(fields | {"truncation": None, "padding": None}, ensure_ascii=False)


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()  # then it ends its children and itself
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:  # it has not even read the vocabulary
        process.kill()
        process.wait()
