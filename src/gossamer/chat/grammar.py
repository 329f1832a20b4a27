"""The grammar of an answer that may hold calls of functions, in llguidance's Lark.

    start: thoughts? (text | text? calls)        where calls are possible
    start: thoughts? calls                       where they are required

A call is spelled as the chat template will render it in the next turn, to the blank: its tokens stay those of the
prefix cache. JSON Schemas are rules of their own, in versions of falling strictness: `StructuredOutputsParams.rules`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gossamer.chat.answer_reader import Marks
from gossamer.chat.call_formats import WILD, CallFormat, Tags
from gossamer.chat.tools import Tool, ToolUse
from gossamer.errors import RequestError
from gossamer.sampling_params import StructuredOutputsParams

# What `json.dumps`, and with it transformers' `tojson`, writes.
_SPELLING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_ANY = r"(.|\n)*"


def answer_grammar(
    format: CallFormat,
    use: ToolUse,
    special: Mapping[str, int],
    *,
    marks: Marks | None = None,
    opened: bool = False,
    schema: Mapping[str, Any] | None = None,
) -> StructuredOutputsParams:
    """The form of an answer that may call tools.

    Args:
        format: how a call is spelled.
        use: what may be called.
        special: tokens that no text holds, by their spelling.
        marks: the answer may begin with thoughts between these.
        opened: it goes on with thoughts that the prompt has begun.
        schema: what the text of an answer without a call is valid under.
    """
    literal = _Literals(special)
    rules: dict[str, list[Any]] = {}
    lines = []
    calls = []
    for number, tool in enumerate(use.callable):
        name, arguments = f"call_{number}", f"arguments_{number}"
        lines.append(
            f"{name}: {literal(format.opening + tool.name + format.middle)} {arguments} {literal(format.closing)}"
        )
        if format.tags is None:
            rules[arguments] = _schemas(tool)
        else:
            lines += _parameters(arguments, tool, format.tags, literal, rules)
        calls.append(name)
    several = use.parallel and format.several
    more = f" ({literal(format.repeat)} call)*" if several else ""
    some = f"{literal(format.begin)} call{more} {literal(format.end)}".strip()
    lines.append(f"call: {' | '.join(calls)}")
    lines.append(f"calls: {literal(format.marker)} {some}")

    if schema is not None:
        rules["text"] = [_spelled(schema)]
        text = "text"
    elif format.anchored:
        text = "TEXT"
        lines.append(f"TEXT: /{_ANY}/ & ~/{_escaped(format.marker)}{_ANY}/")
    else:
        text = "TEXT"
        within = "" if format.marker in special else f" & ~/{_ANY}{_escaped(format.marker)}{_ANY}/"
        lines.append(f"TEXT: /{_ANY}/{within}")
    if use.required or format.anchored or schema is not None:
        body = "calls" if use.required else f"{text} | calls"
    elif format.marker in special:
        body = "TEXT | TEXT calls"
    else:
        lines.append(f"first[lazy]: /{_ANY}{_escaped(format.marker)}/")
        body = f"TEXT | first {some}"
    lines.append(f"body: {body}")
    lines += _thoughts(literal, marks, opened=opened)
    # What alone can come is spelled in the tokens that the tokenizer will make of it in the next turn; but not where
    # that may be a special token, which would be no text.
    texts = json.dumps([[tool.parameters for tool in use.callable], schema], ensure_ascii=False)
    if not any(token in texts for token in special):
        lines.insert(0, "%llguidance {}")
    return StructuredOutputsParams(grammar="\n".join(lines) + "\n", rules=rules)


def _thoughts(literal: _Literals, marks: Marks | None, *, opened: bool) -> list[str]:
    if marks is None:
        return ["start: body"]
    if marks.end in literal.special:
        lines = [f"ANYTHING: /{_ANY}/", f"thoughts: ANYTHING {literal(marks.end)}"]
    else:
        lines = [f"thoughts[lazy]: /{_ANY}{_escaped(marks.end)}/"]
    lines.append(r"BLANKS: /[ \n]{0,4}/")
    begin = "thoughts BLANKS" if opened else f"({literal(marks.begin)} thoughts BLANKS)?"
    return [*lines, f"start: {begin} body"]


def thoughtful(
    text: StructuredOutputsParams, special: Mapping[str, int], marks: Marks, *, opened: bool
) -> StructuredOutputsParams:
    """A form that thoughts may stand in front of."""
    literal = _Literals(special)
    rules: dict[str, list[Any]] = {}
    if text.regex is not None:
        pattern = re.sub(r"(?<!\\)/", r"\/", text.regex).replace("\n", r"\n")
        lines = [f"body: /{pattern}/"]
    elif text.choice is not None:
        lines = [f"body: {' | '.join(map(_quoted, text.choice))}"]
    else:
        schema = json.loads(text.json) if isinstance(text.json, str) else text.json
        rules["body"] = [_spelled(schema if schema is not None else {"type": "object"})]
        lines = []
    lines += _thoughts(literal, marks, opened=opened)
    return StructuredOutputsParams(grammar="\n".join(lines) + "\n", rules=rules)


class _Literals:
    """Texts as terms of the grammar: special tokens by their number, wild characters, the rest in quotes."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = special
        names = sorted(special, key=len, reverse=True)
        self._split = re.compile("|".join([*map(re.escape, names), f"{WILD}+"]))

    def __call__(self, text: str) -> str:
        terms, end = [], 0
        for found in self._split.finditer(text):
            wild = f"/[A-Za-z0-9]{{{len(found[0])}}}/"
            term = wild if found[0][0] == WILD else f"<[{self.special[found[0]]}]>"
            terms += [_quoted(text[end : found.start()]), term]
            end = found.end()
        return " ".join(term for term in [*terms, _quoted(text[end:])] if term)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    return re.sub(r"([\\/.^$*+?()\[\]{}|])", r"\\\1", text).replace("\n", r"\n")


def _schemas(tool: Tool) -> list[Any]:
    """What arguments are valid under: the schema, where not all of it can be enforced most of it, and any object."""
    strict = _spelled({"type": "object"} | _closed(tool.parameters or {"properties": {}}))
    if tool.strict:
        return [strict]
    return [strict, _spelled(strict, lenient=True), _spelled({"type": "object"})]


def _closed(schema: Any) -> Any:
    """The schema without properties that it has no name for, unless it speaks of them."""
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(key), Mapping):
            closed[key] = {name: _closed(each) for name, each in schema[key].items()}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            closed[key] = [_closed(each) for each in schema[key]]
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    if "properties" in schema and not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref", "patternProperties"}:
        closed.setdefault("additionalProperties", False)
    return closed


def _spelled(schema: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    return {**schema, "x-guidance": _SPELLING | options}


def _parameters(rule: str, tool: Tool, tags: Tags, literal: _Literals, rules: dict[str, list[Any]]) -> Iterator[str]:
    """Rules for arguments of which each has a tag: those required, and others or not, in the order of the schema."""
    schema = tool.parameters or {}
    required = schema.get("required", ())
    shared = {key: _closed({key: schema[key]})[key] for key in ("$defs", "definitions") if key in schema}
    terms = []
    for number, (key, value) in enumerate(schema.get("properties", {}).items()):
        term = f"{rule}_{number}"
        opening, closing = literal(f"{tags.opening}{key}{tags.named}"), literal(tags.closing)
        if isinstance(value, Mapping) and value.get("type") == "string":
            if tool.strict and (unenforced := value.keys() & {"pattern", "format", "minLength", "maxLength"}):
                raise RequestError(
                    f"tools: {min(unenforced)} of {key} cannot be enforced in this model's spelling of calls",
                    param="tools",
                )
            if isinstance(value.get("enum"), list):
                texts = " | ".join(f"{_quoted(str(each))} {closing}" for each in value["enum"])
                yield f"{term}: {opening} ({texts})"
            else:
                first = next((token for token in literal.special if tags.closing.startswith(token)), None)
                if first is None:
                    yield f"{term}_text[lazy]: /{_ANY}{_escaped(tags.closing)}/"
                    yield f"{term}: {opening} {term}_text"
                else:  # no text holds it, so what is in front of it ends there
                    yield f"{term}: {opening} /{_ANY}/ {closing}"
        else:
            full = _spelled({**_closed(value), **shared} if isinstance(value, Mapping) else {})
            rules[f"{term}_json"] = [full] if tool.strict else [full, _spelled(full, lenient=True), _spelled({})]
            yield f"{term}: {opening} {term}_json {closing}"
        terms.append(term if key in required else f"{term}?")
    yield f"{rule}: {' '.join(terms) or _quoted('')}"
