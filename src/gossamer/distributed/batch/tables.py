"""Batches as Parquet: requests read row by row, answers written in order. PyArrow comes with Ray Data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigurationError
from gossamer.protocol.decoding import InvalidJsonError, decode_json

COLUMNS = ("custom_id", "method", "url", "body")
_ROWS_READ, _ROWS_WRITTEN = 256, 1024


def parquet_lines(path: Path) -> Iterator[bytes]:
    """Each row as the line of a batch file. A ``body`` is a struct, whose nulls are fields not given, or JSON as text.

    Raises:
        ConfigurationError: it is no Parquet file, or lacks a column.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                raise ConfigurationError(
                    f"{path} has no column {missing[0]!r}; a batch has {', '.join(COLUMNS)}, this file has "
                    f"{', '.join(names)}"
                )
            for batch in file.iter_batches(batch_size=_ROWS_READ):
                for row in batch.to_pylist():
                    yield _line(row)
    except (arrow.ArrowException, OSError) as error:
        raise ConfigurationError(f"cannot read {path} as Parquet: {error}") from None


def _line(row: dict[str, Any]) -> bytes:
    body = row["body"]
    if isinstance(body, (str, bytes)):
        with suppress(InvalidJsonError):  # then the body stays text, and is refused as one
            body = decode_json(body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body, "body")
    fields = {name: value for name, value in row.items() if value is not None}
    return json.dumps(fields | {"body": _given(body)}, default=str).encode()


def _given(value: Any) -> Any:
    """A struct without its nulls: Arrow gives every row the fields of all. In JSON, null means "not given" as well."""
    if isinstance(value, dict):
        return {name: _given(each) for name, each in value.items() if each is not None}
    return [_given(each) for each in value] if isinstance(value, list) else value


def write_parquet(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write answers: the fields of a batch's output, with ``body`` and ``error`` as JSON text.

    Raises:
        OSError: the disk is full or gone.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    text = arrow.string()
    schema = arrow.schema(
        [
            ("id", text),
            ("custom_id", text),
            ("status_code", arrow.int32()),
            ("request_id", text),
            ("body", text),
            ("error", text),
        ]
    )
    with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        for record in records:
            rows.append(_row(record))
            if len(rows) == _ROWS_WRITTEN:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(arrow.Table.from_pylist(rows, schema))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    response, error = record["response"], record["error"]
    row = {"id": record["id"], "custom_id": _text(record["custom_id"])}
    if response is not None:
        row |= {"status_code": response["status_code"], "request_id": response["request_id"]}
        row["body"] = json.dumps(response["body"])
    return row | {"error": None if error is None else json.dumps(error)}


def _text(text: str | None) -> str | None:
    """Arrow's strings are UTF-8, which has no halves of surrogate pairs."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
