"""What becomes of each field of a request: the table of ``docs/reference/fields.md``, made of the bodies themselves.

python -m gossamer.protocol.field_table
"""

from __future__ import annotations

from typing import Literal

from gossamer.protocol.fields import REFUSED
from gossamer.protocol.requests import BODIES

Fate = Literal["followed", "no effect", "told", "refused", ""]
MEANINGS: dict[Fate, str] = {
    "followed": "it does what its name says",
    "no effect": "taken; it changes no answer anywhere, or what it asks for is always so",
    "told": "taken without an effect, and named in the header `x-gossamer-ignored`; refused with `--strict`",
    "refused": "refused by name, with status 400: the answer would not be what was asked for",
    "": "not a field of the endpoint; refused like any other name that is not known",
}


def fate(url: str, field: str) -> Fate:
    """What becomes of a field in the bodies of an endpoint.

    >>> fate("/v1/completions", "prompt"), fate("/v1/completions", "store"), fate("/v1/messages", "cache_control")
    ('followed', 'told', 'no effect')
    """
    kind = BODIES[url]
    names = {info.alias or name for name, info in kind.model_fields.items()} | set(kind.first_names)
    if field in kind.refuses:
        return "refused"
    if field in names:
        return "told" if field in kind.advisory else "no effect" if field in kind.neutral else "followed"
    return "refused" if field in REFUSED else ""


def rows() -> dict[str, list[Fate]]:
    """For every field that some endpoint knows, or that is refused with advice, its fate in each of them."""
    known = {info.alias or name for kind in BODIES.values() for name, info in kind.model_fields.items()}
    known |= {name for kind in BODIES.values() for name in kind.first_names}
    return {name: [fate(url, name) for url in BODIES] for name in sorted(known | REFUSED.keys())}


def markdown() -> str:
    """The table, and what its words mean."""
    lines = [f"| field | {' | '.join(f'`{url}`' for url in BODIES)} | |", "|---" * (len(BODIES) + 2) + "|"]
    lines += [f"| `{name}` | {' | '.join(fates)} | {REFUSED.get(name, '')} |" for name, fates in rows().items()]
    meanings = [f"| {name or '(empty)'} | {text} |" for name, text in MEANINGS.items()]
    return "\n".join([*lines, "", "| | |", "|---|---|", *meanings]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
