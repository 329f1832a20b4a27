"""The program that follows grammars, apart from the engine: started once for a tokenizer, it forks a child for each.

A grammar comes from whoever sends a request, and no limit of the parser bounds the time that it takes. A thread could
not be ended; a child is. It has so many seconds of the processor for the grammar, and for each mask of tokens, after
which the system ends it. Its parent ends it as well once nobody waits for it.

The file is run by its path and imports nothing of the package: a child has little memory of its own.

    python program.py CONTROL TOKENIZER < nothing

CONTROL is a socket: "f" with another socket (a child that speaks on it) or "k" (end the child of this process id).
TOKENIZER is a file of JSON, see `Setup`. A child says its process id, reads its form, answers with what is wrong with
it, and then each question (`QUESTION`) with masks (`ANSWER`): one for the next token, and one behind each drafted token
that may come.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CONTROL = struct.Struct("<cI")
QUESTION = struct.Struct("<IhH")  # a completion, the number of its next tokens or one of these, of drafted ones; both
BEGIN, FORGET = -1, -2
ANSWER = struct.Struct("<IbBH")  # the completion, one of these, whether the grammar drafted, tokens; these and masks
MASKS, COMPLETE, ERROR = 0, 1, 2  # ... or a reason
MOST_DRAFTED = 16
DRAFT_SECONDS = 0.004  # of the processor, after which no further mask is computed for drafted tokens
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
        completion, tokens, drafted = read_question(connection.recv_bytes())
        if tokens == FORGET:
            completions.pop(completion, None)
            continue
        _allow(setup["mask_seconds"])
        start = time.process_time()
        if isinstance(tokens, int):
            completions[completion], tokens = matcher.deep_copy(), []
        answer = next_masks(completions[completion], tokens, drafted, trie)
        _allow(0)
        connection.send_bytes(answer.packed(completion))
        if time.process_time() - start > SLOW:
            os.nice(NICE)


def question(completion: int, tokens: Sequence[int] | int, drafted: Sequence[int] = ()) -> bytes:
    """What is asked: `tokens` are those that a completion goes on with, or BEGIN or FORGET."""
    drafted = drafted[:MOST_DRAFTED]
    if isinstance(tokens, int):
        return QUESTION.pack(completion, tokens, 0)
    return QUESTION.pack(completion, len(tokens), len(drafted)) + array("i", [*tokens, *drafted]).tobytes()


def read_question(message: bytes) -> tuple[int, list[int] | int, list[int]]:
    """What `question` was given."""
    completion, count, _ = QUESTION.unpack_from(message)
    if count < 0:
        return completion, count, []
    tokens = array("i", message[QUESTION.size :]).tolist()
    return completion, tokens[:count], tokens[count:]


class Answer(NamedTuple):
    """One bit for each token that may come next, for the next token and behind each drafted one; or why none may."""

    status: int
    masks: bytes = b""
    drafted: list[int] = []  # noqa: RUF012 -- of a tuple, which nobody changes
    forced: bool = False  # nothing else could be spelled, so the grammar drafted it itself
    reason: str = ""

    def packed(self, completion: int) -> bytes:
        """As it is sent."""
        head = ANSWER.pack(completion, self.status, self.forced, len(self.drafted))
        return head + array("i", self.drafted).tobytes() + self.masks + self.reason.encode()


def read_answer(message: bytes) -> tuple[int, Answer]:
    """The completion, and what was said."""
    completion, status, forced, count = ANSWER.unpack_from(message)
    end = ANSWER.size + 4 * count
    rest, drafted = message[end:], array("i", message[ANSWER.size : end]).tolist()
    if status == ERROR:
        return completion, Answer(status, reason=rest.decode(errors="replace"))
    return completion, Answer(status, rest, drafted, bool(forced))


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


def next_masks(matcher: LLMatcher, tokens: Sequence[int], drafted: list[int], trie: LLTokenizer) -> Answer:
    """Go on with `tokens`; what may come then, and behind as many of the drafted tokens as may."""
    for token in tokens:
        matcher.consume_token(token)
    if tokens and not matcher.is_error() and matcher.is_stopped():
        return Answer(COMPLETE)
    mask = b"" if matcher.is_error() else _mask(matcher, trie)
    if matcher.is_error():
        return Answer(ERROR, reason=matcher.get_error())
    forced = forced_tokens(matcher, trie)
    forces = drafted[: len(forced)] != forced
    masks, taken = [mask], list[int]()
    ahead, start = matcher.deep_copy(), time.process_time()
    for token in (forced if forces else drafted)[:MOST_DRAFTED]:
        if not mask[token >> 3] >> (token & 7) & 1 or time.process_time() - start > DRAFT_SECONDS:
            break
        ahead.consume_token(token)
        if ahead.is_error() or ahead.is_stopped():  # nothing can come behind it
            break
        mask = _mask(ahead, trie)
        if ahead.is_error():
            break
        masks.append(mask)
        taken.append(token)
    return Answer(MASKS, b"".join(masks), taken, forces)


def _mask(matcher: LLMatcher, trie: LLTokenizer) -> bytes:
    """What may come next, in whole words; the library's own may have a word more than the vocabulary needs."""
    return matcher.compute_bitmask()[: mask_bytes(trie.vocab_size)]


def mask_bytes(vocab_size: int) -> int:
    """Bytes of a mask."""
    return (vocab_size + 31) // 32 * 4


def forced_tokens(matcher: LLMatcher, trie: LLTokenizer) -> list[int]:
    """Tokens of the text that alone can come, without the last, which may be spelled together with what follows."""
    text = matcher.compute_ff_bytes()
    return trie.tokenize_bytes(text)[:-1] if text else []


if __name__ == "__main__":
    main()
