"""``/v1/batches``: files of requests, answered beside those of clients.

A batch is a small JSON file beside its input. Answers go to an output file, line by line, as `gossamer batch` writes
them; a server that is started again on the same directory goes on behind the last complete line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gossamer.batch.input_file import BatchLine, InvalidLine, count_lines, read_lines
from gossamer.batch.output_file import OutputFile
from gossamer.batch.records import answer_record, invalid_record, read_body, refusal_record
from gossamer.errors import GossamerError, RequestError, ServerBusyError
from gossamer.protocol import GeneratingBody
from gossamer.server.answering import Answering
from gossamer.server.errors import HttpError, not_found
from gossamer.server.files import FileStore, StoredFile, new_id, private_directory, private_file, write_json

logger = logging.getLogger("gossamer.batches")
_ID = re.compile(r"batch-[0-9a-f]{32}")
_ENDED = ("completed", "failed", "cancelled")
RETRY_SECONDS = 0.1  # until a line is tried again that found no place


@dataclass(slots=True)
class Batch:
    """One batch, in OpenAI's terms. Times are seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: str = "validating"
    metadata: dict[str, str] | None = None
    in_progress_at: int | None = None
    ended_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    error: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The object that clients get."""
        errors = None
        if self.error is not None:
            data = [{"code": "invalid_input", "message": self.error, "param": None, "line": None}]
            errors = {"object": "list", "data": data}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            **{f"{name}_at": self.ended_at if self.status == name else None for name in _ENDED},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }


class Batches:
    """Runs batches, one after the other.

    Args:
        answering: answers the lines.
        max_in_flight: lines that are answered at a time.
    """

    def __init__(self, directory: Path, files: FileStore, answering: Answering, *, max_in_flight: int) -> None:
        self._directory = directory
        self._files = files
        self._answering = answering
        self._max_in_flight = max_in_flight
        private_directory(directory)
        self._batches = {batch.id: batch for batch in map(_read, directory.glob("batch-*.json")) if batch is not None}
        self._waiting: asyncio.Queue[Batch] = asyncio.Queue()
        for batch in sorted(self._batches.values(), key=lambda each: each.created_at):
            if batch.status not in _ENDED:
                self._waiting.put_nowait(batch)
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop between two lines; what is written stays, and the next server goes on from there."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)

    def create(
        self, *, input_file_id: str, endpoint: str, completion_window: str, metadata: dict[str, str] | None
    ) -> Batch:
        """Queue a batch over an uploaded file.

        Raises:
            HttpError: there is no such file.
        """
        self._files.get(input_file_id)
        batch = Batch(new_id("batch"), endpoint, input_file_id, completion_window, int(time.time()), metadata=metadata)
        self._batches[batch.id] = batch
        self._save(batch)
        self._waiting.put_nowait(batch)
        return batch

    def get(self, batch_id: str) -> Batch:
        """One batch.

        Raises:
            HttpError: there is none of this id.
        """
        if batch_id not in self._batches:
            raise not_found(f"there is no batch {batch_id!r}", "batch_id")
        return self._batches[batch_id]

    def all(self) -> list[Batch]:
        """Every batch, the newest first."""
        return sorted(self._batches.values(), key=lambda each: (each.created_at, each.id), reverse=True)

    def cancel(self, batch_id: str) -> Batch:
        """End a batch; answers that are complete are kept.

        Raises:
            HttpError: there is none of this id, or it has ended.
        """
        batch = self.get(batch_id)
        if batch.status in _ENDED:
            raise HttpError(400, f"the batch has ended: it is {batch.status}", code="invalid_state", param="batch_id")
        batch.status = "cancelling"
        self._save(batch)
        return batch

    # --- the worker --------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            batch = await self._waiting.get()
            try:
                await self._run(batch)
            except Exception as error:  # one batch must not take those behind it along
                logger.exception("a batch failed", extra={"batch_id": batch.id})
                reason = "its lines cannot be read or written" if _is_ours(error) else "internal error"
                with contextlib.suppress(OSError):  # nothing can be written, and others are waiting
                    self._end(batch, "failed", reason)

    async def _run(self, batch: Batch) -> None:
        path = self._files.path(batch.input_file_id)
        batch.total = await asyncio.to_thread(count_lines, path)
        batch.completed = batch.failed = 0
        if batch.status == "validating":
            batch.status, batch.in_progress_at = "in_progress", int(time.time())
        self._save(batch)
        answers = OutputFile(private_file(self._part(batch, "answers")), resume=True)
        failures = OutputFile(private_file(self._part(batch, "errors")), overwrite=True)  # failed lines are tried again
        batch.completed = len(answers.answered)
        lines = read_lines(path)
        with answers, failures:
            async with asyncio.TaskGroup() as group:
                room = asyncio.Semaphore(self._max_in_flight)
                while batch.status == "in_progress":
                    line = await asyncio.to_thread(next, lines, None)  # it may be long, and far from the one before
                    if line is None:
                        break
                    if isinstance(line, InvalidLine):
                        batch.failed += 1
                        failures.append(invalid_record(line))
                    elif line.custom_id not in answers.answered:
                        await room.acquire()
                        while not self._answering.engine_loop.has_free_places:  # clients go first
                            await asyncio.sleep(RETRY_SECONDS)
                        task = group.create_task(self._answer(batch, line, answers, failures))
                        task.add_done_callback(lambda _: room.release())
        batch.output_file_id = self._adopt(batch, "answers")
        batch.error_file_id = self._adopt(batch, "errors")
        self._end(batch, "completed" if batch.status == "in_progress" else "cancelled")

    async def _answer(self, batch: Batch, line: BatchLine, answers: OutputFile, failures: OutputFile) -> None:
        try:
            if line.url != batch.endpoint:
                raise RequestError(f"url is {line.url}; this batch is for {batch.endpoint}", param="url")
            body = await asyncio.to_thread(read_body, line)
            answer = await self._patiently(body)
        except GossamerError as error:
            if self._answering.engine_loop.failure is not None:
                await asyncio.Future()  # the line is not to blame; the next server answers it
            batch.failed += 1
            failures.append(refusal_record(line, error))
        else:
            batch.completed += 1
            answers.append(answer_record(line, answer))

    async def _patiently(self, body: GeneratingBody) -> dict[str, Any]:
        """The answer, however often clients have filled the queue before."""
        while True:
            try:
                return await self._answering.complete(body)
            except ServerBusyError:
                await asyncio.sleep(RETRY_SECONDS)

    def _part(self, batch: Batch, kind: str) -> Path:
        return self._directory / f"{batch.id}.{kind}.jsonl"

    def _adopt(self, batch: Batch, kind: str) -> str | None:
        """Make a file of a batch's lines one that clients can read; none if there are no lines."""
        path = self._part(batch, kind)
        size = path.stat().st_size
        if size == 0:
            path.unlink()
            return None
        stored = StoredFile(new_id("file"), f"{batch.id}_{kind}.jsonl", "batch_output", size, int(time.time()))
        return self._files.adopt(path, stored).id

    def _end(self, batch: Batch, status: str, error: str | None = None) -> None:
        batch.status, batch.error, batch.ended_at = status, error, int(time.time())
        self._save(batch)

    def _save(self, batch: Batch) -> None:
        write_json(self._directory / f"{batch.id}.json", asdict(batch))


def _is_ours(error: BaseException) -> bool:
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
    return all(isinstance(part, GossamerError) for part in parts)


def _read(path: Path) -> Batch | None:
    if not _ID.fullmatch(path.stem):
        return None
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Batch(**json.loads(path.read_text("utf-8")))
    logger.warning("%s cannot be read and is left alone", path)
    return None
