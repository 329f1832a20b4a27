"""No innermost loop of a product moves vector registers to the stack and back, on whichever processor this runs.

The kernels of each instruction set are compiled to assembly with the flags of the project's own build, and read.
"""

import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from assembly import innermost_loops

ROOT = Path(__file__).parent.parent
COMPILERS = [each for each in ("g++", "clang++") if shutil.which(each)]

# A draw from a distribution and the scale of a row read the last lanes of a vector through memory, and a cap reads one
# of its constants there: there is no product in these.
# The loop over the tokens of a recurrence calls what multiplies, and keeps addresses in vector registers meanwhile.
NO_PRODUCTS = ("sample", "quantize", "3capEPflf", "4passIL")

# Functions whose innermost loops are products, and how many of each must be found: what finds nothing proves nothing.
PRODUCTS = {
    "avx2": {
        "renew": 3,
        "recall": 2,
        "weigh": 1,
        "tileINS_7Int8Dot": 4,
        "tileINS_9SparseDot": 4,
        "tileINS_8FloatDot": 4,
        "row_products": 2,
        "exponentials": 2,
        "strip_products": 50,
    },
    "avx512": {
        "renew": 3,
        "recall": 2,
        "weigh": 1,
        "tileINS_7Int8Dot": 8,
        "tileINS_8FloatDot": 8,
        "exponentials": 2,
        "strip_products": 70,
    },
    "avx512_vnni": {
        "tileINS_7Int8Dot": 8,
        "tileINS_7Bf16Dot": 8,
        "score_few": 2,
        "add_values_few": 16,
        "strip_products": 70,
    },
    "avx512_vbmi2": {
        "tileINS_7Int8Dot": 16,
        "tileINS_7Bf16Dot": 8,
        "score_few": 2,
        "add_values_few": 16,
        "strip_products": 70,
    },
    "avx512_amx": {
        "tileINS_7Int8Dot": 8,  # of sparse weights: the others are multiplied in tiles
        "tileINS_7Bf16Dot": 8,
        "tile_products": 4,
        "strip_products": 70,
    },
}


def built() -> dict[str, str]:
    """What `make setup` has left of its own build, if that was of the sources as they are."""
    folder = ROOT / "build" / "native" / "CMakeFiles"
    found = {file: file.stat().st_mtime for name in PRODUCTS for file in folder.glob(f"kernels_{name}.dir/**/*.s")}
    sources = [ROOT / "CMakeLists.txt", *ROOT.glob("csrc/**/*.*")]
    if len(found) < 2 * len(PRODUCTS) or min(found.values()) < max(file.stat().st_mtime for file in sources):
        return {}
    return joined((instruction_set(str(file.relative_to(folder))), file.read_text()) for file in found)


def instruction_set(path: str) -> str:
    """That of an object file of CMake."""
    return (
        next(part for part in Path(path).parts if part.endswith(".dir")).removesuffix(".dir").removeprefix("kernels_")
    )


def joined(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The texts of each name, one after the other."""
    texts: dict[str, str] = {}
    for name, text in files:
        texts[name] = texts.get(name, "") + text
    return texts


@pytest.fixture(scope="module", params=COMPILERS)
def assembly(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The assembly of every instruction set of this kind of processor."""
    if request.param == "g++" and (found := built()):
        return found
    build = tmp_path_factory.mktemp(request.param)
    tools = Path(sys.executable).parent
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    compiler = [f"-DCMAKE_CXX_COMPILER={request.param}", f"-DPython_EXECUTABLE={sys.executable}"]
    cmake = tools / "cmake" if (tools / "cmake").exists() else "cmake"
    subprocess.run([cmake, "-S", ROOT, "-B", build, *options, *compiler], check=True, capture_output=True)
    commands = {
        (instruction_set(entry["output"]), Path(entry["file"]).stem): shlex.split(entry["command"])
        for entry in json.loads((build / "compile_commands.json").read_text())
        if "csrc/kernels/" in entry["file"]
    }

    def compile_one(item: tuple[tuple[str, str], list[str]]) -> tuple[str, str]:
        (name, file), command = item
        out = build / f"{name}_{file}.s"
        command[command.index("-o") + 1] = str(out)
        command[command.index("-c")] = "-S"
        subprocess.run(command, check=True, cwd=build, capture_output=True)
        return name, out.read_text()

    with ThreadPoolExecutor(2) as pool:
        return joined(pool.map(compile_one, (item for item in commands.items() if item[0][0] in PRODUCTS)))


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_products_stay_in_registers(assembly: dict[str, str]) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 processor")
    assert assembly.keys() == PRODUCTS.keys()
    for name, text in assembly.items():
        loops = [
            loop
            for loop in innermost_loops(text)
            if loop.dots and not any(name in loop.function for name in NO_PRODUCTS)
        ]
        for function, least in PRODUCTS[name].items():
            found = {loop.function for loop in loops if function in loop.function}
            assert len(found) >= least, f"{name}: only {len(found)} functions {function} have a loop with products"
        bad = [f"{loop.function}: {len(loop.spills)}, such as {loop.spills[0]}" for loop in loops if loop.spills]
        assert not bad, f"{name} moves vector registers to or from the stack in " + "\n".join(bad)


LOOP = """
work:
	vmovdqa	{before}(%rsp), %ymm0
.L2:
	vpdpbusd	(%rdi), %zmm1, %zmm2
	{inside}
	cmpq	%rax, %rdi
	jne	.L2
	vmovdqa	%ymm0, 32(%rsp)
	ret
"""


@pytest.mark.parametrize(
    ("inside", "spills"),
    [
        ("addq	$64, %rdi", 0),
        ("movq	8(%rsp), %rax", 0),
        ("vmovdqa64	%zmm2, 64(%rsp)", 1),
        ("vpaddd	64(%rsp), %zmm2, %zmm2", 1),
    ],
)
def test_what_counts_as_a_move_to_the_stack(inside: str, spills: int) -> None:
    (loop,) = innermost_loops(LOOP.format(before=0, inside=inside))
    assert (loop.function, loop.dots, len(loop.spills)) == ("work", 1, spills)
