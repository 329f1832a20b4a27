"""The program that follows grammars, apart from the engine: started once for a tokenizer, it forks a child for each.

A grammar comes from whoever sends a request, and no limit of the parser bounds the time that it takes. A thread could
not be ended; a child is. It has so many seconds of the processor for the grammar, and for each mask of tokens, after
which the system ends it. Its parent ends it as well once nobody waits for it.

The file is run by its path and imports nothing of the package: a child has little memory of its own.

    python program.py CONTROL TOKENIZER < nothing

CONTROL is a socket: "f" with another socket (a child that speaks on it) or "k" (end the child of this process id).
TOKENIZER is a file of JSON, see `Setup`. A child says its process id, reads its form, answers with what is wrong with
it, and then with a mask for each question (`QUESTION`, `ANSWER`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CONTROL = struct.Struct("<cI")
QUESTION = struct.Struct("<Ii")  # a completion, and its next token or one of these
BEGIN, FORGET = -1, -2
ANSWER = struct.Struct("<Ib")  # the completion, and one of these; then a mask, or a reason
MASK, COMPLETE, ERROR = 0, 1, 2
MEMORY = 4 << 30  # bytes of addresses, the vocabulary included
SLOW = 0.1  # seconds of the processor for a mask, after which everybody else goes first
NICE = 19
# Blanks in a row in JSON: enough to indent, and too few for a model that has nothing to write to go on with for ever.
WHITESPACE = r"[\x20\x0A\x09]{0,16}"

# Where only one text can come, llguidance would force the tokens that the tokenizer makes of it. That may be a special
# token, if it is spelled like that text, and that one is no text: the answer could not go on. So all tokens compete.
UNFORCED = '%llguidance {"no_forcing": true}\n'


class Setup(TypedDict):
    """``tokenizer`` is the JSON of the tokenizers library, the seconds are of the processor."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int] | None
    compile_seconds: float
    mask_seconds: float


def main() -> None:
    import resource  # of POSIX, as is all of this; the other side reads this file for its constants

    from llguidance import LLTokenizer

    control = socket.socket(fileno=int(sys.argv[1]))
    with open(int(sys.argv[2]), encoding="utf-8") as file:
        setup: Setup = json.load(file)
    for each in (signal.SIGINT, signal.SIGTERM):  # for the parent, which may go on for a while
        signal.signal(each, signal.SIG_IGN)
    with suppress(ValueError, OSError):  # a smaller limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trie = LLTokenizer(setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=setup["eos_token_ids"])
    children: set[int] = set()
    while (received := _receive(control)) is not None:
        command, number, fds = received
        _reap(children)
        if command == b"f":
            pid = os.fork()
            if pid == 0:
                control.close()
                with suppress(EOFError, OSError):
                    follow(Connection(fds[0]), trie, setup)
                os._exit(0)
            os.close(fds[0])
            children.add(pid)
        elif number in children:  # not reaped, so the number is still its own
            os.kill(number, signal.SIGKILL)
    _reap(children)
    for child in children:  # whoever asked them is gone, and what computes would not notice
        os.kill(child, signal.SIGKILL)


def _receive(control: socket.socket) -> tuple[bytes, int, list[int]] | None:
    data, fds = b"", list[int]()
    while len(data) < CONTROL.size:
        part, more, _, _ = socket.recv_fds(control, CONTROL.size - len(data), 1)
        if not part:
            return None
        data, fds = data + part, fds + list(more)
    command, number = CONTROL.unpack(data)
    return command, number, fds


def _reap(children: set[int]) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)[0]) > 0:
            children.discard(ended)


def follow(connection: Connection, trie: LLTokenizer, setup: Setup) -> None:
    """One grammar: compile it, and answer questions until the other side is gone."""
    connection.send_bytes(struct.pack("<I", os.getpid()))
    form = json.loads(connection.recv_bytes())
    _allow(setup["compile_seconds"])
    matcher, reason = compile_form(form, trie)
    _allow(0)
    connection.send_bytes(reason.encode())
    if matcher is None:
        return
    completions: dict[int, LLMatcher] = {}
    while True:
        completion, token = QUESTION.unpack(connection.recv_bytes())
        if token == FORGET:
            completions.pop(completion, None)
            continue
        _allow(setup["mask_seconds"])
        start = time.process_time()
        if token == BEGIN:
            completions[completion] = matcher.deep_copy()
        status, content = next_mask(completions[completion], token)
        _allow(0)
        connection.send_bytes(ANSWER.pack(completion, status) + content)
        if time.process_time() - start > SLOW:
            os.nice(NICE)


def _allow(seconds: float) -> None:
    """From now on so many seconds of the processor, then the system ends this process; 0 is as many as it takes."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def compile_form(form: dict[str, Any], trie: LLTokenizer) -> tuple[LLMatcher | None, str]:
    """A matcher at its beginning, or what is wrong with the form."""
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(trie, grammar(form), log_level=0)
    except ValueError as error:
        return None, str(error)
    return (None, matcher.get_error()) if matcher.is_error() else (matcher, "")


def grammar(form: dict[str, Any]) -> str:
    """What `gossamer.sampling_params.StructuredOutputsParams.to_dict` holds, in llguidance's terms."""
    from llguidance import LLMatcher

    if "grammar" in form:
        text = form["grammar"] if form["grammar"].startswith("%llguidance") else UNFORCED + form["grammar"]
        rules = form.get("rules", {}).items()
        return "\n".join([text, *(f"{name}: %json {_enforceable(some)}" for name, some in rules)])
    if "regex" in form:
        return _unforced(LLMatcher.grammar_from_regex(form["regex"]))
    if "choice" in form:
        return UNFORCED + "start: " + " | ".join(json.dumps(text) for text in form["choice"])
    schema = form.get("json", {"type": "object"})
    return _unforced(
        LLMatcher.grammar_from_json_schema(
            schema if isinstance(schema, str) else json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE}
        )
    )


def _enforceable(schemas: list[dict[str, Any]]) -> str:
    """The first schema that makes a grammar. Or else one for its error: the first, or that which no text satisfies."""
    from llguidance import LLMatcher

    texts = [json.dumps(schema) for schema in schemas]
    for text in texts:
        error = LLMatcher.validate_grammar(f"start: %json {text}")
        if not error or "Unsatisfiable schema" in error:
            return text
    return texts[0]


def _unforced(grammar: str) -> str:
    (part,) = json.loads(grammar)["grammars"]
    return UNFORCED + (part["lark_grammar"] or "start: %json " + json.dumps(part["json_schema"]))


def next_mask(matcher: LLMatcher, token: int) -> tuple[int, bytes]:
    """Go on with ``token``; one bit for each token that may come then, or why none may."""
    if token != BEGIN:
        matcher.consume_token(token)
        if not matcher.is_error() and matcher.is_stopped():
            return COMPLETE, b""
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    return (ERROR, matcher.get_error().encode()) if matcher.is_error() else (MASK, mask)


if __name__ == "__main__":
    main()
