"""``/v1/batches``: files of requests, answered beside those of clients.

A batch is a small JSON file beside its input. Answers go to an output file, line by line, as `gossamer batch` writes
them; a server that is started again on the same directory goes on behind the last complete line. At the end the output
becomes a file that clients can read, under an id that was written down before: whatever interrupts that, the next
server does it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gossamer.batch.input_file import BatchLine, InvalidLine, count_lines, read_lines
from gossamer.batch.output_file import OutputFile, cut_torn_line
from gossamer.batch.records import Record, answer_record, invalid_record, read_body, refusal_record
from gossamer.errors import GossamerError, OutputError, RequestError, ServerBusyError, ShuttingDownError
from gossamer.protocol import GeneratingBody, PoolingBody
from gossamer.server.answering import Answering
from gossamer.server.errors import HttpError, not_found
from gossamer.server.files import FileStore, StoredFile, new_id, private_directory, private_file, write_json
from gossamer.server.pooling import PoolingAnswering

logger = logging.getLogger("gossamer.batches")
_ID = re.compile(r"batch-[0-9a-f]{32}")
_ENDED = ("completed", "failed", "cancelled")
_KINDS = ("answers", "errors")
RETRY_SECONDS = 0.1  # until a line is tried again that found no place
DISK_SECONDS = 1.0  # until something is written again that the disk did not take
T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """One batch, in OpenAI's terms. Times are seconds since 1970.

    Beyond them: ``outcome`` is the status that the batch will have once its files are where clients can read them, and
    ``hindrance`` says why nothing is written at the moment.
    """

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
    outcome: str | None = None
    error: str | None = None
    hindrance: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The object that clients get."""
        found = (("invalid_input", self.error), ("insufficient_storage", self.hindrance))
        data = [{"code": code, "message": text, "param": None, "line": None} for code, text in found if text]
        errors = {"object": "list", "data": data} if data else None
        ended = self.status in _ENDED
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id if ended else None,  # until then it may not be there
            "error_file_id": self.error_file_id if ended else None,
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

    def __init__(
        self, directory: Path, files: FileStore, answering: Answering | PoolingAnswering, *, max_in_flight: int
    ) -> None:
        self._directory = directory
        self._files = files
        self._answering = answering
        self._max_in_flight = max_in_flight
        self._draining = False
        private_directory(directory)
        self._batches = {batch.id: batch for batch in map(_read, directory.glob("batch-*.json")) if batch is not None}
        for draft in (*directory.glob("*.tmp"), *directory.glob(".*.resumed")):
            draft.unlink()  # of a server that was killed
        self._waiting: asyncio.Queue[Batch] = asyncio.Queue()
        for batch in sorted(self._batches.values(), key=lambda each: each.created_at):
            if batch.status not in _ENDED:
                self._waiting.put_nowait(batch)
        self._worker = asyncio.create_task(self._work())

    @property
    def expected_files(self) -> set[str]:
        """Ids of the files that unfinished batches will have."""
        unfinished = [batch for batch in self._batches.values() if batch.status not in _ENDED]
        ids = {each for batch in unfinished for each in (batch.output_file_id, batch.error_file_id)}
        return {each for each in ids if each is not None}

    def drain(self) -> None:
        """Begin no more lines; those that are being answered are written when they are complete."""
        self._draining = True

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
        self._save(batch)
        self._batches[batch.id] = batch
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
        if batch.status in _ENDED or batch.outcome is not None:
            raise HttpError(400, f"the batch has ended: it is {batch.status}", code="invalid_state", param="batch_id")
        batch.status = "cancelling"
        with contextlib.suppress(OSError):  # it ends all the same, and then this is written until it is written
            self._save(batch)
        return batch

    # --- the worker --------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            batch = await self._waiting.get()
            try:
                await self._run(batch)
            except Exception:  # one batch must not take those behind it along
                logger.exception("a batch cannot be ended", extra={"batch_id": batch.id})

    async def _run(self, batch: Batch) -> None:
        outcome, error = batch.outcome, batch.error
        try:
            if outcome is None and batch.status != "cancelling":
                await self._answer_lines(batch)
        except Exception as reason:  # what was answered until then can be read all the same
            logger.exception("a batch failed", extra={"batch_id": batch.id})
            outcome, error = "failed", "its lines cannot be read" if _is_ours(reason) else "internal error"
        await self._finish(batch, outcome or ("cancelled" if batch.status == "cancelling" else "completed"), error)

    async def _answer_lines(self, batch: Batch) -> None:
        path = self._files.path(batch.input_file_id)
        batch.total = await asyncio.to_thread(count_lines, path)
        if batch.status == "validating":
            batch.status, batch.in_progress_at = "in_progress", int(time.time())
        await self._once_written(batch, lambda: self._save(batch))
        answers, failures, parts = await self._once_written(batch, lambda: self._open_parts(batch), in_thread=True)
        with parts:
            batch.completed, batch.failed = len(answers.answered), 0
            lines = read_lines(path)
            async with asyncio.TaskGroup() as group:
                room = asyncio.Semaphore(self._max_in_flight)
                while batch.status == "in_progress":
                    if self._draining:
                        await asyncio.Future()  # until the end, for which lines in flight need not wait
                    if (line := await asyncio.to_thread(next, lines, None)) is None:
                        break
                    if isinstance(line, InvalidLine):
                        await self._write_failure(batch, failures, invalid_record(line))
                    elif line.custom_id not in answers.answered:
                        await room.acquire()
                        while not self._answering.has_free_places:  # clients go first
                            await asyncio.sleep(RETRY_SECONDS)
                        task = group.create_task(self._answer(batch, line, answers, failures))
                        task.add_done_callback(lambda _: room.release())

    async def _answer(self, batch: Batch, line: BatchLine, answers: OutputFile, failures: OutputFile) -> None:
        try:
            if line.url != batch.endpoint:
                raise RequestError(f"url is {line.url}; this batch is for {batch.endpoint}", param="url")
            body = await asyncio.to_thread(read_body, line)
            record = answer_record(line, await self._patiently(body))
            await self._once_written(batch, lambda: answers.append(record))
            batch.completed += 1
        except Exception as error:  # whatever it is, it belongs to this line alone
            if self._answering.failure is not None or isinstance(error, ShuttingDownError):
                await asyncio.Future()  # the line is not to blame; the next server answers it
            if not isinstance(error, GossamerError):
                logger.exception("line %d cannot be answered", line.number, extra={"batch_id": batch.id})
            await self._write_failure(batch, failures, refusal_record(line, error))

    async def _write_failure(self, batch: Batch, failures: OutputFile, record: Record) -> None:
        await self._once_written(batch, lambda: failures.append(record))
        batch.failed += 1

    async def _patiently(self, body: GeneratingBody | PoolingBody) -> dict[str, Any]:
        """The answer, however often clients have filled the queue before."""
        while True:
            try:
                return await self._answering.complete(body)
            except ServerBusyError:
                await asyncio.sleep(RETRY_SECONDS)

    async def _once_written(self, batch: Batch, write: Callable[[], T], *, in_thread: bool = False) -> T:
        """What ``write`` returns. While the disk is full or gone, this waits: nothing that was computed is given up."""
        while True:
            try:
                result = await asyncio.to_thread(write) if in_thread else write()
                batch.hindrance = None
                return result
            except (OutputError, OSError) as error:
                if batch.hindrance is None:
                    logger.warning("a batch waits until it can be written: %s", error, extra={"batch_id": batch.id})
                batch.hindrance = "the server's disk does not take what is answered; it is tried again and again"
            await asyncio.sleep(DISK_SECONDS)

    # --- files -------------------------------------------------------------------------------------------------

    async def _finish(self, batch: Batch, outcome: str, error: str | None) -> None:
        """Put a batch's lines where clients can read them, and end it. After a crash, the same call completes it."""
        batch.outcome, batch.error = outcome, error
        batch.status = "cancelling" if outcome == "cancelled" else "finalizing"
        batch.output_file_id = batch.output_file_id or new_id("file")
        batch.error_file_id = batch.error_file_id or new_id("file")
        await self._once_written(batch, lambda: self._save(batch))
        found = await self._once_written(batch, lambda: self._adopt_parts(batch), in_thread=True)
        (output_file_id, completed), (error_file_id, failed) = found
        end: dict[str, Any] = {"output_file_id": output_file_id, "error_file_id": error_file_id}
        end |= {"completed": completed, "failed": failed, "status": outcome, "ended_at": int(time.time())}
        await self._once_written(batch, lambda: self._save(replace(batch, **end)))
        for name, value in end.items():  # which nobody is told before it is written
            setattr(batch, name, value)

    def _part(self, batch: Batch, kind: str) -> Path:
        return self._directory / f"{batch.id}.{kind}.jsonl"

    def _open_parts(self, batch: Batch) -> tuple[OutputFile, OutputFile, ExitStack]:
        """Where answers and failures go, and what closes both."""
        with ExitStack() as stack:
            answers = stack.enter_context(OutputFile(private_file(self._part(batch, "answers")), resume=True))
            # failed lines are tried again
            failures = stack.enter_context(OutputFile(private_file(self._part(batch, "errors")), overwrite=True))
            return answers, failures, stack.pop_all()

    def _adopt_parts(self, batch: Batch) -> list[tuple[str | None, int]]:
        """Make files of the batch's lines, as far as that is not done: the id of each that has lines, and how many."""
        assert batch.output_file_id is not None and batch.error_file_id is not None
        ids = (batch.output_file_id, batch.error_file_id)
        return [self._adopt(self._part(batch, kind), file_id) for kind, file_id in zip(_KINDS, ids, strict=True)]

    def _adopt(self, part: Path, file_id: str) -> tuple[str | None, int]:
        content = self._files.path(file_id)
        path = part if part.exists() else content
        if not path.exists():  # without a line
            return None, 0
        lines = cut_torn_line(path)
        if lines == 0:
            path.unlink()
            return None, 0
        name, size = part.name.replace(".", "_", 1), path.stat().st_size
        stored = StoredFile(file_id, name, "batch_output", size, int(time.time()))
        return self._files.adopt(part, stored).id, lines

    def _save(self, batch: Batch) -> None:
        write_json(self._directory / f"{batch.id}.json", asdict(batch) | {"hindrance": None})


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
