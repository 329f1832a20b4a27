"""What people ask whose answers stand somewhere already, with an answer for each that is known to be good.

Everything is made from texts that come with Python (its help topics, the sources of its library, HTTP status codes,
types of files, numbers of errors) and from the harbour example, the same way every time. A reference answer is what a
good model would say; small models do not, so speed on good answers is measured with the reference in the place of what
the model chose.
"""

from __future__ import annotations

import errno
import json
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any

from gossamer.bench.speculate_edits import edits
from gossamer.errors import ConfigurationError
from gossamer.texts import read_text

ITEMS = 8  # requests of a task, unless more are asked for; those about one document
SHORTEST = 64  # tokens of an answer, where there is a choice
FEWEST_PARAGRAPHS = 6
_RECORDS, _STRIDE = 6, 7  # of a document: those that one answer has, and from one answer to the next
_MOST = 256  # requests for records
_PLAIN = "A helpful assistant answers the user."
_Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One request.

    Attributes:
        messages: the conversation up to the answer.
        answer: a good one.
        prediction: what the caller says that the answer will be like.
        schema: a JSON Schema that the answer must be valid under.
    """

    messages: tuple[dict[str, str], ...]
    answer: str
    prediction: str | None = None
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sizes:
    """How long texts may be.

    Attributes:
        count: tokens of a text.
        document: tokens of a document at most.
        answer: tokens of an answer at most.
        harbour: the directory of the example, or ``None``.
    """

    count: Callable[[str], int]
    document: int
    answer: int
    harbour: Path | None = None


def build_task(name: str, sizes: Sizes, most: int = ITEMS) -> list[Item]:
    """The requests of a task.

    Args:
        name: one of :data:`TASKS`.
        most: so many at most; some tasks have fewer.

    Raises:
        ConfigurationError: there is no such task, its texts are not there, or the sizes leave no room for it.

    >>> [item.answer[:9] for item in build_task("json", Sizes(len, 8000, 2000))][:2]
    ['{"records', '{"records']
    """
    if name not in TASKS:
        raise ConfigurationError(f"tasks are among {', '.join(TASKS)}; got {name!r}")
    items = list(islice(TASKS[name](sizes), most))
    if not items:
        raise ConfigurationError(
            f"{name}: a document of {sizes.document} tokens and an answer of {sizes.answer} are too short for it"
        )
    return items


def _topic(name: str, sizes: Sizes) -> list[str]:
    """The first paragraphs of prose of a help topic, as many as fit, each on one line."""
    from pydoc_data import topics  # half a megabyte

    found: list[str] = []
    for block in re.split(r"\n\s*\n", topics.topics.get(name, "")):
        paragraph = " ".join(block.split())
        if not re.fullmatch(r"\*?[A-Z].{40,}\.", paragraph) or any(sign in paragraph for sign in ("::=", ">>>")):
            continue
        if sizes.count("\n\n".join([*found, paragraph])) > sizes.document:
            break
        found.append(paragraph)
    return found


def _asked(document: str, question: str) -> tuple[dict[str, str], ...]:
    """The document comes first, so that all who ask about it share it."""
    return (
        {"role": "system", "content": _PLAIN},
        {"role": "user", "content": f"{document}\n\n{question}"},
    )


# --- documents -----------------------------------------------------------------------------------------------------

_DOCUMENTS = (
    *("import", "naming", "attribute-access", "types", "comparisons", "customization", "formatstrings", "compound"),
    *("assignment", "debugger", "typesmapping", "string-methods", "typesseq", "sequence-types", "calls", "async"),
)
_LEADS = (
    "The text says this about `{}`:",
    "Here is the passage on `{}`:",
    "What it says about `{}` is this:",
    "`{}` comes up in this passage:",
)
_ENDS = (
    "So that is where the text explains it.",
    "Nothing else in the document goes into it that far.",
    "This answers the question.",
    "The other passages take it for granted.",
)


def quotes(sizes: Sizes) -> Iterable[Item]:
    """Questions about one document after the other, answered by quoting it word for word."""
    room = sizes.answer - sizes.count(_LEADS[0] + _ENDS[0]) - 16
    for topic in _DOCUMENTS:
        paragraphs = _topic(topic, sizes)
        document = "\n\n".join(paragraphs)
        common = Counter(re.findall(r"\w+", document))
        passages = _passages(paragraphs, sizes.count, min(SHORTEST, room), room)
        for number, passage in enumerate(passages[:ITEMS]):
            words = [word for word in re.findall(r"\w+", passage) if len(word) > 5]
            subject = min(words, key=lambda word: common[word], default=passage.split()[0])
            question = f"What does the text say about `{subject}`? Quote the passage word for word."
            lead, end = _LEADS[number % 4].format(subject), _ENDS[number // 2 % 4]
            yield Item(_asked(document, question), f"{lead}\n\n> {passage}\n\n{end}")


def _passages(paragraphs: Sequence[str], count: Callable[[str], int], least: int, most: int) -> list[str]:
    """Consecutive paragraphs, as few as reach ``least`` tokens; those above ``most`` are left out.

    >>> _passages(["ab", "cd", "efgh", "toolong"], len, 3, 6)
    ['ab\\n\\ncd', 'efgh']
    """
    found: list[str] = []
    taken: list[str] = []
    for paragraph in paragraphs:
        taken.append(paragraph)
        length = count("\n\n".join(taken))
        if length >= least:
            found += ["\n\n".join(taken)] if length <= most else []
            taken = []
    return found


_NEXT = (
    "It begins with the point that",
    "Then it says that",
    "Another point is that",
    "The author goes on:",
    "After that we learn that",
    "It adds that",
    "Towards the end,",
)


def summary(sizes: Sizes) -> Iterable[Item]:
    """Summaries of parts of one document after the other: what sentences begin with, between words of its own."""
    for topic in _DOCUMENTS[1:] + _DOCUMENTS[:1]:  # another one first than for quotes
        paragraphs = _topic(topic, sizes)
        document = "\n\n".join(paragraphs)
        firsts = [number * (len(paragraphs) - FEWEST_PARAGRAPHS + 1) // ITEMS for number in range(ITEMS)]
        for first in dict.fromkeys(firsts):
            part = paragraphs[max(0, first) :]
            if len(part) < FEWEST_PARAGRAPHS:
                continue
            opening = " ".join(part[0].split()[:6])
            question = f"Summarize the document in one paragraph, from the passage that begins with “{opening}”."
            text = f"The passages from number {first + 1} on are about {_clause(part[0]).split()[-1]}."
            for words, paragraph in zip(_NEXT, part, strict=False):
                longer = f"{text} {words} {_clause(paragraph)}."
                if sizes.count(longer) > sizes.answer:
                    break
                text = longer
            yield Item(_asked(document, question), text)


def _clause(paragraph: str) -> str:
    """The beginning of a paragraph up to where its first thought ends, as it stands in the middle of a sentence.

    >>> _clause("The following constructs (seven) bind names: parameters, and more.")
    'the following constructs bind names'
    """
    plain = re.sub(r"\s*\([^)]*\)", "", paragraph)
    words = re.split(r"[,;:.](?:\s|$)", plain, maxsplit=1)[0].split()[:20]
    text = " ".join(words)
    return text[:1].lower() + text[1:]


# --- code ----------------------------------------------------------------------------------------------------------


def edit(sizes: Sizes) -> Iterable[Item]:
    """Files that come back whole with a change in them."""
    return (replace(item, prediction=None) for item in predicted(sizes))


def predicted(sizes: Sizes) -> Iterable[Item]:
    """The same, and the caller predicts the file as it was."""
    for each in edits(sizes.count, sizes.answer - 8):
        question = f"{each.instruction} Answer with the whole file, and nothing else."
        messages = _asked(f"This is `{each.file}`:\n\n```python\n{each.before}```", question)
        yield Item(messages, each.after, prediction=each.before)


# --- fields --------------------------------------------------------------------------------------------------------


def json_fields(sizes: Sizes) -> Iterable[Item]:
    """Records told in prose, some of which come back as JSON under a schema; three kinds of records in turn."""
    kinds = [(what, key, *_told(records, sizes)) for what, key, records in _KINDS]
    for number in range(_MOST):
        what, key, document, told = kinds[number % len(kinds)]
        first = number // len(kinds) * _STRIDE % max(1, len(told) - _RECORDS + 1)
        wanted = told[first : first + _RECORDS]
        while wanted and sizes.count(_written(wanted)) > sizes.answer - 8:
            wanted.pop()
        if not wanted:
            return
        asked = ", ".join(str(record[key]) for record in wanted)
        question = f"Give the {what} {asked} as JSON: a list `records` with {', '.join(map(repr, wanted[0]))} of each."
        yield Item(_asked(document, question), _written(wanted), schema=_schema(wanted[0]))


def _told(records: Iterable[tuple[str, _Record]], sizes: Sizes) -> tuple[str, list[_Record]]:
    """As many records as fit into a document."""
    document = ""
    told: list[_Record] = []
    for sentence, record in records:
        longer = f"{document} {sentence}".strip()
        if sizes.count(longer) > sizes.document:
            break
        document = longer
        told.append(record)
    return document, told


def _status_codes() -> Iterator[tuple[str, _Record]]:
    for status in HTTPStatus:
        sentence = (
            f"A server that answers with {status.value} says “{status.phrase}”: {status.description or 'no more'}."
        )
        yield (sentence, {"code": status.value, "phrase": status.phrase, "description": status.description})


def _file_types() -> Iterator[tuple[str, _Record]]:
    known = mimetypes.MimeTypes(filenames=()).types_map[True]  # none of this machine's own
    for ending, kind in sorted(known.items()):
        family, _, subtype = kind.partition("/")
        sentence = f"A file that ends in {ending} is of the type {kind}."
        yield (sentence, {"ending": ending, "type": kind, "family": family, "subtype": subtype})


def _error_numbers() -> Iterator[tuple[str, _Record]]:
    for number, name in sorted(errno.errorcode.items()):
        meaning = os.strerror(number)
        sentence = f"Error {number}, which C calls {name}, means: {meaning}."
        yield (sentence, {"number": number, "name": name, "meaning": meaning})


# what they are called, the field that tells them apart, the records
_KINDS = (
    ("status codes", "code", list(_status_codes())),
    ("endings", "ending", list(_file_types())),
    ("errors", "number", list(_error_numbers())),
)


def _written(records: list[_Record]) -> str:
    return json.dumps({"records": records}, ensure_ascii=False)


def _schema(record: _Record) -> dict[str, Any]:
    """That of a list of such records."""
    types = {int: "integer", str: "string"}
    fields = {name: {"type": types[type(value)]} for name, value in record.items()}
    row = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"records": {"type": "array", "items": row}},
        "required": ["records"],
        "additionalProperties": False,
    }


# --- without a text to draft from ----------------------------------------------------------------------------------

_OPEN = {
    "with": "How does the `with` statement of Python work?",
    "class": "What happens when Python defines a class?",
    "function": "What happens when Python defines a function?",
    "identifiers": "Which names can one give to things in Python?",
    "objects": "What is an object in Python?",
    "try": "How does one handle exceptions in Python?",
    "calls": "How does Python hand arguments to a function?",
    "async": "What are coroutines in Python?",
    "raise": "How does one raise an exception in Python?",
    "binary": "What do the arithmetic operators of Python do?",
}


def chat(sizes: Sizes) -> Iterable[Item]:
    """Questions without a text: nothing of the answer stands anywhere."""
    room = Sizes(sizes.count, sizes.answer, sizes.answer)
    from pydoc_data import topics

    named = {name: f"What is there to know about `{name}` in Python?" for name in sorted(topics.topics)}
    for name, question in (_OPEN | {name: each for name, each in named.items() if name not in _OPEN}).items():
        text = "\n\n".join(_topic(name, room))
        if sizes.count(text) >= min(SHORTEST, sizes.answer // 2):
            messages = ({"role": "system", "content": _PLAIN}, {"role": "user", "content": question})
            yield Item(messages, text)


def harbour(sizes: Sizes) -> Iterable[Item]:
    """Questions of the harbour example, answered with the sentence of its handbook that has the answer."""
    if sizes.harbour is None or not (sizes.harbour / "document.md").exists():
        raise ConfigurationError(f"harbour: there is no document.md in {sizes.harbour}; --harbour names its directory")
    questions = json.loads(read_text(sizes.harbour / "questions.json"))
    document = ""
    for section in re.split(r"\n(?=## )", read_text(sizes.harbour / "document.md")):
        if sizes.count(f"{document}\n{section}") > sizes.document:
            break
        document = f"{document}\n{section}".strip()
    sentences = re.split(r"(?<=[.!?])\s+|\n+", document)
    by_topic = [topic["questions"] for topic in questions["topics"]]
    # one of each topic in turn
    for each in (topic[row] for row in range(max(map(len, by_topic))) for topic in by_topic if row < len(topic)):
        found = next((sentence for sentence in sentences if each["answer"].lower() in sentence.lower()), None)
        if found is not None:
            system = {"role": "system", "content": f"{questions['system']}\n\n{document}"}
            yield Item((system, {"role": "user", "content": each["question"]}), found)


TASKS: dict[str, Callable[[Sizes], Iterable[Item]]] = {
    "quotes": quotes,
    "summary": summary,
    "edit": edit,
    "predicted-edit": predicted,
    "json": json_fields,
    "chat": chat,
    "harbour": harbour,
}
