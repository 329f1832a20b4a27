"""Requests in an order in which common prefixes are neighbours, and where to cut it.

A part is answered by one engine, which computes a prefix once for all its requests. So a cut between two requests costs
what they have in common, once more; parts are cut where neighbours share least.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from gossamer.batch.input_file import BatchLine
from gossamer.batch.records import read_body
from gossamer.distributed.routing.rendered import rendered, scope
from gossamer.errors import GossamerError
from gossamer.protocol import GeneratingBody

#: Bytes of a prompt that order it as they are; behind them, each block of as many is ordered by its hash.
HEAD = 256
_HASH = 8
_MOST_BLOCKS = 256
_PARTS_PER_ACTOR = 4


def sort_key(line: BatchLine) -> bytes:
    """What a request is ordered by: equal prefixes of two keys stand for equal prefixes of two prompts.

    The first :data:`HEAD` bytes of the prompt as they are, and then 8 bytes of BLAKE2b for each whole block of as many,
    so that a million long prompts can be ordered in memory. Requests that cannot be read come first.
    """
    prompt = prompt_bytes(line)
    blocks = range(HEAD, min(len(prompt) - HEAD, HEAD * _MOST_BLOCKS) + 1, HEAD)
    hashes = (hashlib.blake2b(prompt[start : start + HEAD], digest_size=_HASH).digest() for start in blocks)
    return prompt[:HEAD] + b"".join(hashes)


def prompt_bytes(line: BatchLine) -> bytes:
    r"""The prompt as bytes that begin alike where token sequences do; no tokenizer and no template are needed for it.

    >>> def chat(*said):
    ...     messages = [{"role": "user", "content": each} for each in said]
    ...     return prompt_bytes(BatchLine(1, "a", "/v1/chat/completions", {"messages": messages}))
    >>> chat("Hello", "one").startswith(chat("Hello")), chat("Hello")
    (True, b'\x00\x00[][{},true][{"content":"Hello","role":"user"}')
    """
    try:
        body = read_body(line)
        if not isinstance(body, GeneratingBody):
            return b""
        prompt = body.engine_prompts()[0]
    except (GossamerError, ValueError, RecursionError, IndexError):  # refused by who answers it, with the reason
        return b""
    apart = "\0".join((*scope(prompt, body.model or ""), ""))  # another adapter or salt shares nothing
    return apart.encode("utf-8", "surrogatepass") + rendered(prompt)


def common(one: bytes, other: bytes) -> int:
    """How many bytes of their prompts two keys have in common, as far as they tell.

    >>> common(b"one", b"only"), common(b"x" * HEAD + b"12345678", b"x" * HEAD + b"12345678")
    (2, 512)
    """
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        same = length
    else:
        low, high = 0, length  # the first `low` bytes are equal, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
        same = low
    return same if same < HEAD else HEAD + (same - HEAD) // _HASH * HEAD


def bounds(rows: int, actors: int, max_num_seqs: int) -> tuple[int, int]:
    """Fewest and most rows of a part.

    A part has 4 x ``max_num_seqs`` rows, so that the engine is full most of the time, and up to twice as many where
    that saves a cut, but no more than 1/(4N) of all, so that N actors end together and a prefix that most requests
    have is not left to one of them. Where that leaves actors without a part, parts are an N-th of all, or nearly.

    >>> bounds(100_000, 4, 256), bounds(128, 2, 256)
    ((1024, 2048), (56, 72))
    """
    least = 4 * max_num_seqs
    fair = -(-rows // actors)
    if fair < least * 9 // 8:
        return max(fair - fair // 8, 1), fair + fair // 8
    return least, max(min(2 * least, rows // (_PARTS_PER_ACTOR * actors)), least + least // 8)


def cuts(keys: Sequence[bytes], least: int, most: int) -> list[range]:
    """Where sorted requests are cut: parts of ``least`` to ``most`` rows, the last one of as many as are left.

    Of the places that the limits allow, the one between the two neighbours with least in common is taken, and of
    several the last.

    >>> cuts([b"a1", b"a2", b"a3", b"b1", b"b2", b"b3"], 2, 4)
    [range(0, 3), range(3, 6)]
    """
    parts, start = [], 0
    while len(keys) - start > most:
        # What is left must not be less than the least either.
        ends = range(start + least, max(min(start + most, len(keys) - least), start + least) + 1)
        end = min(reversed(ends), key=lambda place: common(keys[place - 1], keys[place]))
        parts.append(range(start, end))
        start = end
    return [*parts, range(start, len(keys))] if start < len(keys) else parts
