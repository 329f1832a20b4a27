"""An actor: a model that is loaded once and answers part after part, each from where it stands."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from gossamer.batch.input_file import BatchLine
from gossamer.batch.output_file import OutputFile
from gossamer.batch.records import refusal_record
from gossamer.batch.runner import BatchSummary, LineRunner
from gossamer.distributed.batch.attempts import Attempts, groups, histories
from gossamer.distributed.batch.job_directory import JobDirectory, complete_lines, write_json
from gossamer.distributed.batch.ownership import Claim, SeenClaim
from gossamer.distributed.batch.plan import read_rows
from gossamer.distributed.batch.tally import Tally
from gossamer.errors import EngineError, GossamerError, OutputError

if TYPE_CHECKING:
    from gossamer import LLM

logger = logging.getLogger("gossamer.batch")
_PROGRESS_SECONDS = 1.0
#: A process in which no step ends for so many seconds hangs; it is ended, and another one goes on.
STUCK_SECONDS = 1800.0


@dataclass(frozen=True)
class ActorTask:
    """What an actor is told.

    Attributes:
        directory: of the job, at the same path on all machines.
        run: number of the run of the command.
        model, lora, options: what :class:`gossamer.LLM` takes, paths from the root on.
        name: of the model in answers.
        threads: that it computes with.
        max_tokens: limit for bodies that give none.
        max_in_flight: prompts given to the engine at a time.
    """

    directory: str
    run: int
    model: str
    name: str
    lora: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    max_tokens: int | None = None
    max_in_flight: int = 1024


class PartOutput:
    """Answers and errors of a part: every line is written by its owner alone, and once.

    What earlier owners wrote is copied first, so that no other process has this file open.

    Args:
        directory: of the job.
        part: its number.
        claim: what says that this process owns it.
        rows: line numbers by ``custom_id``.

    Attributes:
        answered: custom ids that have an answer, or an error of this run.
        tally: of all of them.

    Raises:
        OutputError: the disk is full or gone, or another process owns the part.
    """

    def __init__(self, directory: JobDirectory, part: int, claim: Claim, rows: dict[str, int]) -> None:
        self.answered: set[str] = set()
        self.tally = Tally()
        self._claim = claim
        run = claim.owner["run"]
        before = directory.answer_files(part)
        kept = _kept(before, rows, run if isinstance(run, int) else 0)
        self._file = OutputFile(directory.answers(part, claim.number))
        self._file.__enter__()
        try:
            self._run = run
            for record in kept:
                self._keep(record)
        except BaseException:
            self.close()
            raise
        for path in before:
            path.unlink(missing_ok=True)

    def append(self, record: dict[str, Any]) -> None:
        """Write a line, unless the part has another owner now.

        Raises:
            OwnershipLost, OutputError: nothing was written.
        """
        self._keep(record | {"run": self._run})

    def _keep(self, record: dict[str, Any]) -> None:
        self._claim.check()
        self._file.append(record)
        self.answered.add(record["custom_id"])
        self.tally.add(record)

    def close(self) -> None:
        """Let the file go."""
        self._file.__exit__(None, None, None)

    def __enter__(self) -> Self:  # it stays open from one group of rows to the next
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def _kept(files: list[Any], rows: dict[str, int], run: int) -> list[dict[str, Any]]:
    """Of what earlier owners wrote: answers, and errors of this run, once each; earlier errors are tried again."""
    kept: dict[str, dict[str, Any]] = {}
    for path in files:
        for line in complete_lines(path):
            record = json.loads(line)
            name = record["custom_id"]
            if name in rows and name not in kept and (answered(record) or record.get("run") == run):
                kept[name] = record
    return list(kept.values())


def answered(record: dict[str, Any]) -> bool:
    """Whether a line of an output is an answer, and no error."""
    response = record["response"]
    return record["error"] is None and response is not None and response["status_code"] == 200


class PartRunner:
    """What Ray Data calls with the number of a part; it returns what became of it.

    An error does not leave it as an exception, which Ray Data would end the job for, or try again for ever: it is told
    in what is returned, and the command decides.

    Args:
        task: what to answer, with what.
    """

    def __init__(self, task: ActorTask) -> None:
        self.task = task
        self.directory = JobDirectory(task.directory)
        self.failure: Exception | None = None
        self._beat = float("inf")  # the last step; loading a model may take any time
        try:
            self._note_load("begun")
            self.llm = self.load()
            self._note_load("done")
        except Exception as error:  # told by the first part that is asked for
            self.failure = error
        threading.Thread(target=self._watch, daemon=True, name="gossamer-watch").start()

    def load(self) -> LLM:
        """The model. A process of its own, so the number of threads is set for all of it."""
        import torch

        torch.set_num_threads(self.task.threads)
        from gossamer import LLM

        llm = LLM(self.task.model, lora=self.task.lora or None, **self.task.options)
        llm.model_name = self.task.name
        return llm

    def _note_load(self, what: str) -> None:
        """So that a process that dies while it loads the model, again and again, is noticed."""
        with self.directory.loads.open("a") as file:
            file.write(json.dumps([self.task.run, what]) + "\n")

    def _watch(self) -> None:
        while time.monotonic() - self._beat < STUCK_SECONDS:
            time.sleep(min(STUCK_SECONDS / 4, 30))
        logger.error("no step has ended for %.0f s: this process ends, and another one goes on", STUCK_SECONDS)
        os._exit(70)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        part = int(batch["part"][0])
        report: dict[str, Any] = {"part": part, "error": None}
        try:
            if self.failure is not None:
                raise self.failure
            report |= self.answer(part)
        except GossamerError as error:
            report["error"] = [type(error).__name__, str(error)]
        except Exception as error:  # of the model or our own
            logger.exception("part %d cannot be answered", part)
            report["error"] = [EngineError.__name__, f"part {part} cannot be answered: {error!r}"]
        finally:
            self._beat = float("inf")  # nothing to do is no reason to end
        return {"report": [json.dumps(report)]}

    def answer(self, part: int) -> dict[str, Any]:
        """Answer what has no answer in a part.

        Raises:
            OwnershipLost: another process has taken it over.
            OutputError: the disk is full or gone.
        """
        self._beat = time.monotonic()
        directory, run = self.directory, self.task.run
        claim = Claim(directory.path, f"{directory.name(part)}.owner", above=SeenClaim(directory.path, "run", run))
        lines = list(read_rows(directory.rows(part)))
        output = PartOutput(directory, part, claim, {line.custom_id: line.number for line in lines})
        earlier = [directory.attempts(part, number) for number in range(1, claim.number)]
        left = {line.number for line in lines if line.custom_id not in output.answered}
        records = histories((path for path in earlier if path.exists()), left, run)
        attempts = Attempts(directory.attempts(part, claim.number), run)
        full = False
        try:
            by_number = {line.number: line for line in lines}
            for number in sorted(row for row, record in records.items() if record.given_up):
                error = EngineError(f"the process died {records[number].alone} times while it computed this row alone")
                output.append(refusal_record(by_number[number], error))
            for group in groups((line.number for line in lines if line.number in left), records):
                self._answer_group([by_number[number] for number in group], output, attempts, self._show(part, output))
            report = asdict(output.tally)
            claim.check()
            write_json(directory.done(part), report)
            directory.progress(part).unlink(missing_ok=True)
            return report
        except OutputError:
            full = True
            raise
        finally:
            attempts.close(ended=not full)
            output.close()
            claim.close()

    def _answer_group(
        self,
        lines: list[BatchLine],
        output: PartOutput,
        attempts: Attempts,
        progress: Callable[[BatchSummary], None],
    ) -> None:
        def begun() -> Iterator[BatchLine]:
            for line in lines:
                attempts.begin(line.number)
                yield line

        LineRunner(
            begun(),
            output,
            total=len(lines),
            default_max_tokens=self.task.max_tokens,
            max_in_flight=self.task.max_in_flight,
            progress=progress,
        ).run(self.llm)

    def _show(self, part: int, output: PartOutput) -> Callable[[BatchSummary], None]:
        """Tell now and then how far a part is, and that this process lives."""
        shown = 0.0

        def show(_: BatchSummary) -> None:
            nonlocal shown
            self._beat = now = time.monotonic()
            if now - shown > _PROGRESS_SECONDS:
                shown = now
                write_json(self.directory.progress(part), asdict(output.tally))

        return show
