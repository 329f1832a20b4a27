"""The first linear layer of a feed-forward block, ``dim -> 4 dim``, in int8 and otherwise (arXiv 2208.07339, table 5).

**Interleaved.** In every round each contestant computes one product, so that whatever else the machine does meets all
of them. Medians are over rounds; ratios are medians of the ratios within a round.

**Weights come from memory**, as in a model, which reads all its other layers before it is back at the same one.
Otherwise a product of few rows would find a small weight in the cache, and a larger share of it in int8 than in fp32.
So every contestant has its own copy of the weight, and every round begins with reading 256 MB of something else.

**Activations look like real ones**: normal numbers, in which 6 dimensions are 16 times as large as the mean magnitude
in three of four rows (the paper finds 6 or 7 such dimensions in models of any size from 6.7B), and one entry of 16,000
is 7 times as large. By the relative criterion 3 to 4 % of the columns then have an outlier among 512 rows, about as in
the inputs of SmolLM2-135M's ``gate_proj``; by the absolute one only the 6 dimensions do.

**The floor** is the time in which this machine could multiply the int8 codes or read the int8 weight, whichever takes
longer. Its ceilings, a large product of codes and those 256 MB, are measured in every round too.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer.bench.linear_contestants import (
    OWN,
    PEER_NAMES,
    PEERS,
    Contestant,
    Product,
    package_version,
    with_instruction_set,
)
from gossamer.bench.machine import Int8Limits, describe, seconds
from gossamer.errors import ConfigurationError
from gossamer.kernels.library import compared
from gossamer.ops.int8 import quantize_rowwise

DIMS = (768, 1024, 1536, 2048, 2560, 4096, 5120)
ROWS = (1, 8, 64, 512)
STORE_SHARE = 0.01  # columns whose 16-bit weights are kept
WARM_UP_ROUNDS = 2
MINIMUM_DIM = 64

_OUTLIER_DIMS = 6

Ceilings = tuple[float | None, float]  # GOP/s of products of codes, GB/s of memory


@dataclass
class LinearResult:
    """One contestant at one shape: x (rows, dim), W (4 dim, dim).

    Attributes:
        activations: number format of x.
        ms: median time of a product; ``ms_range`` the fastest and the slowest.
        gops: billions of multiplications and additions per second; a product is 2 rows dim (4 dim) of them.
        over_fp32: median, over the rounds, of the time of torch-fp32 over the own; ``over_bf16`` likewise.
        floor_ms: see the module's text; ``floor_share`` is the floor over the own time, median over the rounds.
        relative_error: ``|y - x W^T| / |x W^T|`` with the product in fp32. Empty where the result is not that product.
        error: why there is no result.
    """

    contestant: str
    dim: int
    rows: int
    activations: str
    ms: float | None = None
    ms_range: tuple[float, float] | None = None
    gops: float | None = None
    over_fp32: float | None = None
    over_bf16: float | None = None
    floor_ms: float | None = None
    floor_share: float | None = None
    relative_error: float | None = None
    error: str | None = None


@dataclass
class _Entry:
    """A contestant at one shape, and its times, one for every round."""

    result: LinearResult
    x: Tensor
    product: Product | None = None
    seconds: list[float] = field(default_factory=list)


def bench_linear(
    *,
    dims: tuple[int, ...] = DIMS,
    rows: tuple[int, ...] = ROWS,
    peers: tuple[str, ...] = PEER_NAMES,
    isas: tuple[str, ...] = (),
    repeats: int = 15,
    progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Measure every shape with every contestant.

    Args:
        dims: inner dimensions K; N is 4 K.
        rows: of x.
        peers: among :data:`~gossamer.bench.linear_contestants.PEER_NAMES`; our own three are always measured.
        isas: instruction sets that compute ours in turn, or ``("all",)``; the one in use by default.
        repeats: rounds that count.
        progress: told what is being measured.

    Returns:
        ``{"machine": {...}, "peers": {name: version or None}, "results": [...]}``, see :class:`LinearResult`.

    Raises:
        ConfigurationError: an unknown peer or instruction set, or sizes out of range.
    """
    unknown = [name for name in peers if name not in PEER_NAMES]
    if unknown:
        raise ConfigurationError(f"peers must be among {', '.join(PEER_NAMES)}, got {unknown[0]!r}")
    if min(dims, default=0) < MINIMUM_DIM or min(rows, default=0) < 1 or repeats < 1:
        raise ConfigurationError(f"dims must be at least {MINIMUM_DIM}, rows and repeats at least 1")
    own = [with_instruction_set(isa) for isa in compared(isas)] or OWN
    contestants = [*own, *(peer for peer in PEERS if peer.name in peers)]
    versions = {c.package: package_version(c.package) for c in contestants if c.package}
    installed = [c for c in contestants if c.package is None or versions[c.package]]
    limits = Int8Limits()
    ceilings: list[Ceilings] = []
    results: list[LinearResult] = []
    with torch.inference_mode(), _quiet():
        for dim in dims:
            for count in rows:
                progress(f"{dim} x {4 * dim}, {count} rows")
                entries = _prepare(installed, dim, count)
                reached = _race(entries, limits, repeats)
                results += _evaluate(entries, reached)
                ceilings += reached
                del entries
                gc.collect()  # the next shape needs the memory
    multiply, read = zip(*ceilings, strict=True)
    machine = describe() | {
        "int8_gops": None if None in multiply else statistics.median(multiply),
        "read_gb_per_s": statistics.median(read),
    }
    return {"machine": machine, "peers": versions, "results": [asdict(result) for result in results]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Peers warn about parts of theirs that are not used here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def random_activations(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Numbers (rows, dim) fp32 with outliers, see the module's text. The first dimensions are the large ones."""
    x = torch.randn(rows, dim, generator=generator)
    mean = math.sqrt(2 / math.pi)  # of the magnitude of a normal number
    stray = torch.rand(rows, dim, generator=generator) < 1 / 16_000
    x = torch.where(stray, 7 * mean * x.sign(), x)
    large = torch.rand(rows, _OUTLIER_DIMS, generator=generator) < 0.75
    x[:, :_OUTLIER_DIMS] = torch.where(large, 16 * mean + x[:, :_OUTLIER_DIMS], x[:, :_OUTLIER_DIMS])
    return x


def _prepare(contestants: list[Contestant], dim: int, rows: int) -> list[_Entry]:
    """The contestants at one shape, each with its copy of the same weight, and their first products."""
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(4 * dim, dim, generator=generator) / math.sqrt(dim)
    columns = torch.arange(max(_OUTLIER_DIMS, math.ceil(STORE_SHARE * dim)))
    x = random_activations(rows, dim, generator)
    exact = linear(x, weight)
    # Compiled code is kept per function, a few versions of it at most; further shapes would run uncompiled.
    torch.compiler.reset()
    entries = []
    for contestant in contestants:
        result = LinearResult(contestant.name, dim, rows, str(contestant.dtype).removeprefix("torch."))
        codes = contestant.dtype == torch.int8
        entry = _Entry(result, quantize_rowwise(x)[0] if codes else x.to(contestant.dtype))
        entries.append(entry)
        try:
            product = contestant.make(weight, columns)
            y = product(entry.x)
        except Exception as error:  # a peer may fail with anything; the others' figures must not be lost with it
            result.error = str(error).strip().split("\n")[0] or type(error).__name__
            continue
        entry.product = product
        if not codes:
            result.relative_error = float((y.float() - exact).norm() / exact.norm())
    return entries


def _race(entries: list[_Entry], limits: Int8Limits, repeats: int) -> list[Ceilings]:
    """Rounds of one product each; returns what the machine's ceilings were in each round."""
    ceilings, orders = [], random.Random(0)
    for number in range(WARM_UP_ROUNDS + repeats):
        ceiling = limits.measure()
        # whoever comes first, or after somebody who lets the threads fall asleep, has to wake them up
        order = orders.sample(entries, len(entries))
        times = [(entry, seconds(partial(entry.product, entry.x))) for entry in order if entry.product]
        if number >= WARM_UP_ROUNDS:
            ceilings.append(ceiling)
            for entry, time in times:
                entry.seconds.append(time)
    return ceilings


def _evaluate(entries: list[_Entry], ceilings: list[Ceilings]) -> list[LinearResult]:
    times = {entry.result.contestant: entry.seconds for entry in entries}
    for entry in entries:
        own, result = entry.seconds, entry.result
        if not own:
            continue
        weights = 4 * result.dim**2
        operations = 2 * result.rows * weights
        result.ms = statistics.median(own) * 1e3
        result.ms_range = (min(own) * 1e3, max(own) * 1e3)
        result.gops = operations / statistics.median(own) / 1e9
        result.over_fp32 = _median_ratio(times.get("torch-fp32"), own)
        result.over_bf16 = _median_ratio(times.get("torch-bf16"), own)
        floors = [max(operations / multiply, weights / read) / 1e9 for multiply, read in ceilings if multiply]
        if floors:
            result.floor_ms = statistics.median(floors) * 1e3
            result.floor_share = _median_ratio(floors, own)
    return [entry.result for entry in entries]


def _median_ratio(theirs: list[float] | None, own: list[float]) -> float | None:
    return statistics.median(a / b for a, b in zip(theirs, own, strict=True)) if theirs else None
