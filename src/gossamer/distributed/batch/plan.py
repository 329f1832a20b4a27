"""What is to be done: a job's requests in parts, and what their answers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gossamer.batch.input_file import BatchLine, InvalidLine
from gossamer.batch.records import invalid_record
from gossamer.distributed.batch.grouping import bounds, cuts, sort_key
from gossamer.distributed.batch.job_directory import JobDirectory, read_json, write_json
from gossamer.distributed.batch.source import Source
from gossamer.errors import CheckpointError, ConfigurationError, OutputError
from gossamer.options import EngineOptions, Options

#: Options of the engine that change answers; the others change how fast they come.
_ENGINE = ("max_model_len", "seed")


@dataclass(frozen=True)
class Plan:
    """A job's plan.

    Attributes:
        input: the digest of the input.
        lines: of the input that are not blank.
        refused: of these, lines that are no requests.
        parts: rows of each part.
        answers: what answers depend on, by name: model, version, options.
    """

    input: str
    lines: int
    refused: int
    parts: list[int]
    answers: dict[str, Any]


def answer_options(
    options: dict[str, Any], *, model: str, version: str, max_tokens: int | None, adapters: dict[str, str]
) -> dict[str, Any]:
    """What answers depend on, as it is kept in the plan.

    Args:
        options: of the engine, by name.
        model, adapters: digests.
        version: of Gossamer.

    >>> given = answer_options({"seed": 3, "memory": "1GB"}, model="f00", version="1", max_tokens=None, adapters={})
    >>> given["seed"], given["model"], "memory" in given
    (3, 'f00', False)
    """
    engine = Options.of(options).engine
    told = {name: value for name, value in options.items() if not hasattr(EngineOptions, name) or name in _ENGINE}
    told |= {name: getattr(engine, name) for name in _ENGINE}
    told |= {"model": model, "gossamer": version, "max_tokens": max_tokens, "lora": adapters}
    return dict(json.loads(json.dumps(told, default=str)))


def make_plan(
    directory: JobDirectory, source: Source, answers: dict[str, Any], *, digest: str, actors: int, max_num_seqs: int
) -> Plan:
    """Group the requests of a source, write them in parts, and the plan last: it is complete if it is there.

    Args:
        digest: of the source.
        actors: that the parts are for.
        max_num_seqs: sequences that each computes at a time.

    Raises:
        ConfigurationError: the source cannot be read.
        OutputError: the disk is full or gone.
    """
    keys: list[tuple[bytes, int]] = []
    places: list[tuple[int, int]] = []  # of each request in the draft
    draft = directory.path / "requests.draft"
    refused = 0
    try:
        with draft.open("w+b") as requests, directory.refused.open("wb") as errors:
            for line in source.lines():
                if isinstance(line, InvalidLine):
                    record = {"line": line.number} | invalid_record(line)
                    errors.write(json.dumps(record).encode() + b"\n")
                    refused += 1
                else:
                    row = _write_row(line)
                    keys.append((sort_key(line), len(places)))
                    places.append((requests.tell(), len(row)))
                    requests.write(row)
            keys.sort()
            limits = bounds(len(keys), actors, max_num_seqs)
            parts = cuts([key for key, _ in keys], *limits)
            for number, part in enumerate(parts):
                with directory.rows(number).open("wb") as file:
                    for place in part:
                        start, length = places[keys[place][1]]
                        requests.seek(start)
                        file.write(requests.read(length))
    except OSError as error:
        raise OutputError(f"cannot write {directory.path}: {error.strerror}; make room and start again") from error
    finally:
        draft.unlink(missing_ok=True)
    plan = Plan(digest, len(places) + refused, refused, [len(part) for part in parts], answers)
    write_json(directory.plan, asdict(plan))
    return plan


def read_plan(directory: JobDirectory) -> Plan | None:
    """The plan that was made; ``None`` if there is none, or it was not finished.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        fields = read_json(directory.plan)
        return None if fields is None else Plan(**fields)
    except (ValueError, TypeError):
        raise CheckpointError(f"{directory.plan} is no plan of a batch; start again with --overwrite") from None


def check_same(plan: Plan, *, digest: str, answers: dict[str, Any], source: Path) -> None:
    """Whether a job may go on: the same input, and the same of all that answers depend on.

    Raises:
        ConfigurationError: names what has changed.
    """
    if plan.input != digest:
        raise ConfigurationError(
            f"{source} is not the input that this job was begun with; --resume needs the same, --overwrite starts again"
        )
    for name in sorted(plan.answers.keys() | answers.keys()):
        before, now = plan.answers.get(name), answers.get(name)
        if before != now:
            raise ConfigurationError(
                f"{name} was {before!r} when this job was begun and is {now!r} now, which changes answers; --resume "
                "needs the same, --overwrite starts again"
            )


def _write_row(line: BatchLine) -> bytes:
    return json.dumps([line.number, line.custom_id, line.url, line.body], separators=(",", ":")).encode() + b"\n"


def read_rows(path: Path) -> Iterator[BatchLine]:
    """The requests of a part. What a request without a seed draws depends on its ``custom_id`` alone."""
    with path.open("rb") as file:
        for row in file:
            number, custom_id, url, body = json.loads(row)
            yield BatchLine(number, custom_id, url, body, draw=draw_of(custom_id))


def row_places(path: Path) -> dict[str, int]:
    """Line numbers of a part's requests by ``custom_id``."""
    return {line.custom_id: line.number for line in read_rows(path)}


def draw_of(custom_id: str) -> int:
    """What selects a request's random stream.

    >>> draw_of("request-1") == draw_of("request-1"), draw_of("request-1") == draw_of("request-2")
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def refusals(directory: JobDirectory) -> Iterable[dict[str, Any]]:
    """Records of the lines that are no requests, each with its ``line``."""
    with directory.refused.open("rb") as file:
        yield from map(json.loads, file)
