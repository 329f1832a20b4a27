"""How long the engine's steps take on a machine: six coefficients, fitted to measured steps.

    seconds(step) = a + b prefill + c rows + d private pairs + e segment keys + f segment pairs

with the numbers of :class:`StepCounts`. A file of speeds names the model and the version it was measured with, so that
it is not used for another.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigurationError

FORMAT = "gossamer-speeds-1"
TERMS = ("step", "prefill_token", "row", "private_pair", "segment_key", "segment_pair")
SEGMENT_TERMS = ("call", "per_reader", "per_key", "per_pair", "per_private_pair")
MAX_FOLDED = 128  # as in gossamer.engine.cost


class StepCounts(NamedTuple):
    """What one step does.

    Attributes:
        prefill: tokens in chunks of more than one.
        rows: sequences with one token.
        private_pairs: pairs of a token and a key that only its own sequence has, its own included.
        segment_keys: keys of nodes that stand above any of the tokens.
        segment_pairs: pairs of a token and such a key.
    """

    prefill: int
    rows: int
    private_pairs: int
    segment_keys: int
    segment_pairs: int


@dataclass(frozen=True)
class Speeds:
    """Seconds per unit, none of them negative.

    Attributes:
        step, prefill_token, row, private_pair, segment_key, segment_pair: the coefficients a to f.
        segments: of :class:`gossamer.engine.cost.CostModel`, which decides what becomes a segment.
        kv_bytes_per_token: of keys and values.
        model, version, machine, threads: what was measured, by which version of Gossamer, and on what.
        residuals: how well the coefficients describe the measured steps, see :func:`fit`.

    >>> speeds = Speeds(step=0.01, prefill_token=0.001, row=0.002)
    >>> round(speeds.seconds(StepCounts(100, 2, 0, 0, 0)), 6), round(speeds.prefill_speed(1000), 1)
    (0.114, 990.1)
    """

    step: float
    prefill_token: float
    row: float
    private_pair: float = 0.0
    segment_key: float = 0.0
    segment_pair: float = 0.0
    segments: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SEGMENT_TERMS, 0.0))
    kv_bytes_per_token: int = 0
    model: str = ""
    version: str = ""
    machine: str = ""
    threads: int = 0
    residuals: dict[str, float] = field(default_factory=dict)

    def seconds(self, counts: StepCounts) -> float:
        """Of one step."""
        return (
            self.step
            + self.prefill_token * counts.prefill
            + self.row * counts.rows
            + self.private_pair * counts.private_pairs
            + self.segment_key * counts.segment_keys
            + self.segment_pair * counts.segment_pairs
        )

    def prefill_speed(self, tokens: int) -> float:
        """Prompt tokens per second, of a prompt of so many tokens in one step: what a replica tells routers."""
        return tokens / self.seconds(StepCounts(tokens, 0, tokens * (tokens + 1) // 2, 0, 0))

    def worth_segment(self, readers: int, keys: int) -> bool:
        """As :meth:`gossamer.engine.cost.CostModel.worth_segment`."""
        if keys > MAX_FOLDED:
            return True
        cost = self.segments
        segment = cost["call"] + cost["per_reader"] * readers + (cost["per_key"] + cost["per_pair"] * readers) * keys
        return segment < cost["per_private_pair"] * readers * keys

    def write(self, path: Path) -> None:
        """As JSON.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None


def read_speeds(path: Path, *, model: str | None = None, version: str | None = None) -> Speeds:
    """A file that :meth:`Speeds.write` has written.

    Args:
        path: the file.
        model: that it must be of; ``None`` accepts any.
        version: of Gossamer that it must have been measured with; ``None`` accepts any.

    Raises:
        ConfigurationError: it cannot be read, is no such file, or is of another model or version.
    """
    again = f"measure again: gossamer simulate --measure MODEL -o {path}"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read speeds from {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigurationError(f"{path} is no JSON file of speeds; {again}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ConfigurationError(f"{path} is no file of speeds (format {FORMAT}); {again}")
    names = {each.name for each in dataclasses.fields(Speeds)}
    if unknown := sorted(values.keys() - names):
        raise ConfigurationError(f"{path}: unknown field {unknown[0]!r}; {again}")
    if missing := sorted(names - values.keys()):
        raise ConfigurationError(f"{path}: {missing[0]!r} is missing; {again}")
    costs = values["segments"] if isinstance(values["segments"], dict) else {}
    for name, value in [
        *((term, values[term]) for term in TERMS),
        *((term, costs.get(term)) for term in SEGMENT_TERMS),
    ]:
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ConfigurationError(f"{path}: {name} must be a number of seconds >= 0, got {value!r}; {again}")
    if values["step"] + values["prefill_token"] == 0 or values["step"] + values["row"] == 0:
        raise ConfigurationError(f"{path}: steps take no time; {again}")
    size = values["kv_bytes_per_token"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigurationError(f"{path}: kv_bytes_per_token must be a number of bytes, got {size!r}; {again}")
    speeds = Speeds(**values)
    if model is not None and speeds.model != model:
        raise ConfigurationError(f"{path} was measured with {speeds.model}, and this is of {model}; {again}")
    if version is not None and speeds.version != version:
        raise ConfigurationError(f"{path} was measured by Gossamer {speeds.version}, this is {version}; {again}")
    return speeds


def fit(counts: list[StepCounts], seconds: list[float]) -> tuple[dict[str, float], dict[str, float]]:
    """The coefficients that describe measured steps best, and how well they do.

    Least squares of relative errors under coefficients >= 0, so that short steps count as much as long ones. With six
    coefficients every subset that may be positive is tried, which is exact.

    Returns:
        The coefficients by name; and ``steps`` (how many there were), ``median`` and ``p90`` of the relative errors,
        ``bias``: the sum of what is predicted over the sum of what was measured, minus 1.

    Raises:
        ConfigurationError: there are fewer than 12 steps, or some took no time.
    """
    if len(counts) < 2 * len(TERMS):
        raise ConfigurationError(f"{len(counts)} steps are too few to fit {len(TERMS)} coefficients; measure more")
    measured = np.array(seconds, dtype=np.float64)
    if not (np.isfinite(measured).all() and (measured > 0).all()):
        raise ConfigurationError("some of the measured steps took no time; measure again")
    features = np.array([(1, *each) for each in counts], dtype=np.float64)
    coefficients = _non_negative_least_squares(features / measured[:, None], np.ones(len(measured)))
    predicted = features @ coefficients
    errors = np.abs(predicted / measured - 1)
    residuals = {
        "steps": float(len(measured)),
        "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)),
        "bias": float(predicted.sum() / measured.sum() - 1),
    }
    return dict(zip(TERMS, coefficients.tolist(), strict=True)), residuals


def _non_negative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """x >= 0 that minimizes |matrix x - target|. The solution is the least-squares one on the columns it uses."""
    columns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(columns), float(target @ target)
    for count in range(1, columns + 1):
        for used in map(list, itertools.combinations(range(columns), count)):
            part, *_ = np.linalg.lstsq(matrix[:, used] / scale[used], target, rcond=None)
            if (part < 0).any():
                continue
            residual = matrix[:, used] @ (part / scale[used]) - target
            if (error := float(residual @ residual)) < least * (1 - 1e-12):
                best, least = np.zeros(columns), error
                best[used] = part / scale[used]
    return best


def as_report(speeds: Speeds) -> dict[str, Any]:
    """What was fitted, for people: microseconds per unit."""
    return {term: 1e6 * getattr(speeds, term) for term in TERMS} | {
        f"error {name}": value for name, value in speeds.residuals.items()
    }
