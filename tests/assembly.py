"""Innermost loops of compiled kernels, and what they move between vector registers and the stack."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# what multiplies and adds: int8, bf16, fp32, and the pairs of 16-bit products that stand for int8 without VNNI
DOT = re.compile(r"\s(tdpb[su][su]d|tdpbf16ps|vpdpbusd|vdpbf16ps|vfn?m(add|sub)\d+[ps]s|vpmaddwd|vpmaddubsw|pmaddwd)\s")
VECTOR = re.compile(r"%[xyzt]mm\d+")
LABEL = re.compile(r"^(\.L\w+):")
JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
FUNCTION = re.compile(r"^([A-Za-z_][\w.$]*):")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: no other loop is inside it."""

    function: str  # its mangled name
    lines: tuple[str, ...]
    frame: bool  # whether %rbp points into the stack

    @property
    def dots(self) -> int:
        """How many of its instructions multiply vectors and add them up."""
        return sum(bool(DOT.search(line) and VECTOR.search(line)) for line in self.lines)

    @property
    def spills(self) -> list[str]:
        """The instructions that have a vector register and a place on the stack.

        A number of 32 bit, such as by how much to shift, is none: there is no other way into a vector register for it
        once it has been put on the stack.
        """
        place = re.compile(r"\(%(rsp|rbp)" if self.frame else r"\(%rsp")
        found = (line.strip() for line in self.lines if place.search(line) and VECTOR.search(line))
        return [line for line in found if not line.startswith(("vmovd\t", "vmovd "))]


def functions(assembly: str) -> Iterator[tuple[str, list[str]]]:
    """Each function of AT&T assembly, and its lines without directives and comments."""
    name, lines = "", []
    for line in assembly.splitlines():
        line = line.split("#")[0].rstrip()
        if found := FUNCTION.match(line):
            if lines:
                yield name, lines
            name, lines = found[1], []
        elif line and (LABEL.match(line) or not line.lstrip().startswith(".")):
            lines.append(line)
    if lines:
        yield name, lines


def innermost_loops(assembly: str) -> Iterator[Loop]:
    """Every run of instructions that ends in a jump back to its beginning and holds no other such run."""
    for name, lines in functions(assembly):
        at = {found[1]: i for i, line in enumerate(lines) if (found := LABEL.match(line))}
        frame = any(re.match(r"\s+movq\s+%rsp, %rbp", line) for line in lines)
        spans = {
            (at[found[1]], i) for i, line in enumerate(lines) if (found := JUMP.match(line)) and at.get(found[1], i) < i
        }
        ends: dict[int, int] = {}
        for start, end in spans:  # several jumps to one beginning are one loop
            ends[start] = max(end, ends.get(start, end))
        for start, end in sorted(ends.items()):
            if not any(start < other and its_end <= end for other, its_end in ends.items()):
                yield Loop(name, tuple(lines[start : end + 1]), frame)
