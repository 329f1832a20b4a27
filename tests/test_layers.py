"""Imports point downwards, and there are no circles. The order of the layers is read from CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gossamer

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
BESIDE = {
    "errors",
    "locks",
    "options",
    "outputs",
    "progress",
    "sampling_params",
    "sizes",
    "surrogates",
    "system",
    "timing",
}

Graph = Mapping[str, set[str]]


def layers() -> list[set[str]]:
    """From top to bottom: the names on each line of the table, which three spaces or more part from what they are."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Layers") :].split("```")[1].strip().splitlines()
    return [set(re.split(r"\s{3,}", line)[0].split()) for line in table]


def imported(node: ast.AST) -> Iterator[str]:
    """Modules, and names in modules, that a piece of code imports, unless it is for type checkers only."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def import_graph() -> Graph:
    """Of each module of the package, those of the package that it imports."""
    names = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in SOURCE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}

    def module(name: str) -> str | None:
        package, _, last = name.rpartition(".")
        if package == "gossamer" and last in gossamer._HOMES:  # from gossamer import LLM
            return f"gossamer.{gossamer._HOMES[last]}"
        return name if name in modules else package if package in modules else None

    return {
        name: {found for each in imported(ast.parse(file.read_text())) if (found := module(each))} - {name}
        for name, file in modules.items()
    }


def faults(graph: Graph, order: list[set[str]]) -> list[str]:
    """Imports that do not point downwards, and a circle if there is one."""
    depth = {name: number for number, names in enumerate(order) for name in names}
    depth |= dict.fromkeys(BESIDE, len(order))
    found = []
    for module, others in graph.items():
        for other in others:
            if "." not in module or "." not in other:  # the package itself holds a version and lazy names
                continue
            above, below = module.split(".")[1], other.split(".")[1]
            if above not in depth or below not in depth:
                found.append(f"{above if above not in depth else below} is in no layer")
            elif above != below and depth[above] >= depth[below] and not {above, below} <= BESIDE:
                found.append(f"{module} imports {other}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " -> ".join(error.args[1][::-1]))
    return sorted(found)


def test_imports_point_downwards() -> None:
    order = layers()
    assert {"cli", "engine", "kernels"} <= set().union(*order)
    assert faults(import_graph(), order) == []


@pytest.mark.parametrize(
    ("module", "other", "fault"),
    [
        ("a.x", "b.y", None),
        ("b.y", "a.x", "gossamer.b.y imports gossamer.a.x"),
        ("b.y", "c.z", "gossamer.b.y imports gossamer.c.z"),  # on one line
        ("errors", "b.y", "gossamer.errors imports gossamer.b.y"),
        ("b.y", "errors", None),
        ("b.y", "new", "new is in no layer"),
    ],
)
def test_a_turned_arrow_is_found(module: str, other: str, fault: str | None) -> None:
    graph = {f"gossamer.{module}": {f"gossamer.{other}"}}
    assert faults(graph, [{"a"}, {"b", "c"}]) == ([] if fault is None else [fault])


def test_a_circle_is_found() -> None:
    graph = {"gossamer.a.x": {"gossamer.a.y"}, "gossamer.a.y": {"gossamer.a.x"}}
    (fault,) = faults(graph, [{"a"}])
    assert fault.startswith("circle: gossamer.a.")


def test_what_is_for_type_checkers_does_not_count() -> None:
    code = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    from c import d\n"
    assert list(imported(ast.parse(code))) == ["a", "c.d"]


def test_the_scheduler_needs_no_model() -> None:
    code = "import sys, gossamer.engine.scheduler; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
