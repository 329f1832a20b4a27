"""Edits of source text whose result is known: the before and after of a request to change a file.

Files are cut from the standard library: consecutive functions and classes of a module, as many as fit. Each edit says
in words what it does, and does it by the places that Python's own parser gives, so that nothing else changes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

MODULES = (
    *("textwrap", "heapq", "argparse", "statistics", "shutil", "bisect", "calendar", "fnmatch", "glob", "copy"),
    *("random", "posixpath", "functools", "csv", "colorsys", "contextlib", "difflib", "gettext", "cmd", "pprint"),
)
FEWEST_USES = 3  # of a name that is worth another one
_FULL = 0.6  # of the most tokens: a file of fewer is left out
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Edit:
    """A file, what is to be done to it, and the whole file afterwards."""

    file: str
    instruction: str
    before: str
    after: str


def edits(count: Callable[[str], int], most: int) -> Iterator[Edit]:
    """Edits of different files, each kind in turn: rename a parameter, log every call, remove docstrings.

    Args:
        count: tokens of a text.
        most: tokens that a file may have, before and after.

    >>> one = next(edits(len, 2000))
    >>> one.before != one.after, compile(one.after, one.file, "exec") is not None
    (True, True)
    """
    kinds = [_rename_parameter, _log_calls, _remove_docstrings]
    done = 0
    for file, source in _files(count, most):
        for turn in range(len(kinds)):
            found = kinds[(done + turn) % len(kinds)](source)
            if found is not None and found[1] != source and count(found[1]) <= most:
                yield Edit(file, found[0], source, found[1])
                done += 1
                break


def _files(count: Callable[[str], int], most: int) -> Iterator[tuple[str, str]]:
    """Names and texts of files: the first of every module, then the second of every one, and so on."""
    waiting = [(name, _pieces(name, count, most)) for name in MODULES]
    number = 0
    while waiting:
        number += 1
        left = []
        for name, pieces in waiting:
            if (piece := next(pieces, None)) is not None:
                yield f"{name}_{number}.py", piece
                left.append((name, pieces))
        waiting = left


def _pieces(module: str, count: Callable[[str], int], most: int) -> Iterator[str]:
    """Consecutive definitions of a module, each group as large as fits."""
    taken: list[str] = []
    for text in _definitions(module):
        if taken and count(_joined([*taken, text])) > most:
            if count(_joined(taken)) >= most * _FULL:
                yield _joined(taken)
            taken = []
        taken.append(text)
    if taken and most * _FULL <= count(_joined(taken)) <= most:
        yield _joined(taken)


@cache
def _definitions(module: str) -> tuple[str, ...]:
    """The functions and classes of a module, as they are written."""
    try:
        source = inspect.getsource(importlib.import_module(module))
    except OSError:  # a Python without the sources of its library
        return ()
    lines = source.splitlines(keepends=True)
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, _Function | ast.ClassDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found.append("".join(lines[first - 1 : node.end_lineno]))
    return tuple(found)


def _joined(definitions: list[str]) -> str:
    return "\n\n".join(definitions)


def _functions(source: str) -> list[_Function]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, _Function)]


def _rename_parameter(source: str) -> tuple[str, str] | None:
    """Another name for the parameter that is used most, wherever it is used."""
    nodes = list(ast.walk(ast.parse(source)))
    places: dict[str, list[tuple[int, int]]] = {}
    for node in nodes:
        if isinstance(node, ast.arg | ast.Name):
            name = node.arg if isinstance(node, ast.arg) else node.id
            places.setdefault(name, []).append((node.lineno, node.col_offset))
    # a name that a call spells as a keyword, or that is one of a scope, would have to change there too
    kept = {node.arg for node in nodes if isinstance(node, ast.keyword)} | {"self", "cls"}
    kept |= {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
    uses = Counter({node.arg: len(places[node.arg]) for node in nodes if isinstance(node, ast.arg)})
    known = [(count, name) for name, count in uses.items() if name not in kept and count >= FEWEST_USES]
    if not known:
        return None
    name = max(known)[1]
    other = f"{name}_value"
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # the parser counts bytes
    for number, column in sorted(places[name], reverse=True):
        line = lines[number - 1]
        lines[number - 1] = line[:column] + other.encode() + line[column + len(name.encode()) :]
    return f"Rename `{name}` to `{other}` everywhere.", b"".join(lines).decode()


def _log_calls(source: str) -> tuple[str, str] | None:
    """A line at the beginning of every function."""
    lines = source.splitlines(keepends=True)
    for function in sorted(_functions(source), key=lambda node: -node.lineno):
        first, *rest = function.body
        if _is_docstring(first):
            if not rest:
                continue
            first = rest[0]
        # a decorated definition begins with its decorators
        above = min([first.lineno, *(each.lineno for each in getattr(first, "decorator_list", []))])
        if above == function.lineno:
            continue  # all of it on one line
        lines.insert(above - 1, f'{" " * first.col_offset}logger.debug("{function.name} is called")\n')
    return "Let every function begin with a line that logs its name with `logger.debug`.", "".join(lines)


def _remove_docstrings(source: str) -> tuple[str, str] | None:
    """The file without what its functions say about themselves."""
    lines = source.splitlines(keepends=True)
    found = [node for node in _functions(source) if _is_docstring(node.body[0]) and len(node.body) > 1]
    for function in sorted(found, key=lambda node: -node.lineno):
        docstring = function.body[0]
        assert docstring.end_lineno is not None  # only trees made by hand have none
        if docstring.lineno == function.lineno or function.body[1].lineno == docstring.end_lineno:
            continue  # something else on its line
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    return ("Remove the docstrings of all functions.", "".join(lines)) if found else None


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
