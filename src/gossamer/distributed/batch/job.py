"""``gossamer batch --ray``, from its arguments to its output."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import gossamer
from gossamer.batch.runner import BatchSummary, check_limits
from gossamer.distributed.batch.job_directory import JobDirectory, complete_lines, read_json
from gossamer.distributed.batch.merge import merge
from gossamer.distributed.batch.ownership import Run
from gossamer.distributed.batch.part_runner import ActorTask, PartRunner, answered
from gossamer.distributed.batch.plan import Plan, answer_options, check_same, make_plan, read_plan, refusals, row_places
from gossamer.distributed.batch.ray_job import answer_parts
from gossamer.distributed.batch.source import Source
from gossamer.distributed.batch.tally import Tally
from gossamer.distributed.batch.workers import choose_workers
from gossamer.distributed.cluster import cluster_at, local_cluster
from gossamer.distributed.extra import check_ray
from gossamer.distributed.nodes import from_the_root
from gossamer.distributed.quiet import muted, quiet_ray
from gossamer.errors import ConfigurationError, OutputError
from gossamer.options import Options

_PROMPTS_PER_SEQUENCE = 4  # in the engine at a time, so that it sees which of them share a prefix


@dataclass(frozen=True)
class RayBatch:
    """A batch over a Ray cluster.

    Args:
        model, lora, options: as :class:`gossamer.LLM` takes them.
        input: a JSONL or Parquet file, or a directory of such files.
        output: a file, or a directory that gets ``answers.jsonl`` or ``answers.parquet``.
        address: ``local``, ``auto`` or ``HOST:PORT``.
        actors, threads: how many models, and what each computes with; chosen by what the cluster has if not given.
        format: of the output, ``jsonl`` or ``parquet``; by default the output's name decides, then the input's.
        resume, overwrite: go on with what is there, or without it.
        default_max_tokens: limit for bodies that give none.
        insecure: take a cluster that lets in whoever reaches it.
        runner: what an actor is.

    Raises:
        ConfigurationError: a path cannot be used, or Ray is not installed. Nothing has been written.
    """

    model: str
    input: Path
    output: Path
    address: str
    lora: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    actors: int | None = None
    threads: int | None = None
    format: str | None = None
    resume: bool = False
    overwrite: bool = False
    default_max_tokens: int | None = None
    insecure: bool = False
    runner: type[PartRunner] = PartRunner

    def __post_init__(self) -> None:
        check_ray()
        check_limits(self.default_max_tokens, 1)
        if self.format not in (None, "jsonl", "parquet"):
            raise ConfigurationError(f"--format takes jsonl or parquet, got {self.format!r}")
        if self.resume and self.overwrite:
            raise ConfigurationError(
                "--resume keeps the answers in the output, --overwrite drops them: give one of them"
            )
        _ = Options.of(self.options), self.source
        self._check_output()

    @property
    def source(self) -> Source:
        return Source(self.input)

    @property
    def output_format(self) -> str:
        named = {".jsonl": "jsonl", ".parquet": "parquet"}.get(self.output.suffix.lower())
        return self.format or named or self.source.format

    @property
    def output_file(self) -> Path:
        """Where answers go."""
        directory = self.output.is_dir() or not self.output.suffix
        file = self.output / f"answers.{self.output_format}" if directory else self.output
        return file.resolve()

    @property
    def directory(self) -> JobDirectory:
        """Where the job is, until all is answered and longer."""
        return JobDirectory(self.output_file.with_name(self.output_file.name + ".parts"))

    def _check_output(self) -> None:
        file, job = self.output_file, self.directory
        if not file.parent.is_dir() and not file.parent.parent.is_dir():
            raise ConfigurationError(f"{file.parent.parent} does not exist; create it or choose another output")
        if any(file.exists() and file.samefile(each) for each in self.source.files):
            raise ConfigurationError(f"{file} is both input and output; choose another output")
        if job.path.exists() and not job.path.is_dir():
            raise ConfigurationError(f"{job.path} is a file, and the job needs a directory there; move it away")
        known = not job.path.exists() or (job.path / "run.1").exists() or not any(job.path.iterdir())
        if not known:
            raise ConfigurationError(f"{job.path} is not the directory of a batch; move it away")
        if (file.exists() or job.plan.exists()) and not (self.resume or self.overwrite):
            what = file if file.exists() else job.path
            raise ConfigurationError(f"{what} exists; add --resume to go on from it, or --overwrite to start again")
        if self.resume and file.exists() and not job.plan.exists():
            raise ConfigurationError(
                f"{file} exists, but not {job.path}, where the job was: there is nothing to go on from. Choose another "
                "output, or --overwrite to start again"
            )

    def run(self, progress: Callable[[BatchSummary], None]) -> BatchSummary:
        """Answer what has no answer yet, and write the output.

        Args:
            progress: called now and then with how far it is.

        Raises:
            ConfigurationError: the cluster, its machines or an unfinished job do not fit what is asked for.
            OutputError: the disk is full or gone.
            KeyboardInterrupt: answers are kept; ``resume`` goes on.
        """
        directory = self.directory
        started = time.perf_counter()
        with quiet_ray(), ExitStack() as stack:
            with muted():
                stack.enter_context(self._cluster())
            _make(directory)
            with Run(directory.path) as run:
                if self.overwrite:
                    _empty(directory, run)
                summary = self._run(run, directory, progress, started)
        return summary

    def _cluster(self) -> AbstractContextManager[Any]:
        if self.address == "local":
            return local_cluster()
        return cluster_at(self.address, insecure=self.insecure)

    def _run(
        self, run: Run, directory: JobDirectory, progress: Callable[[BatchSummary], None], started: float
    ) -> BatchSummary:
        engine = Options.of(self.options).engine
        model, lora, options = from_the_root(self.model, self.lora, self.options)
        workers = choose_workers(
            model,
            lora,
            directory.path / f"run.{run.number}",
            actors=self.actors,
            threads=self.threads,
            cache_bytes=engine.memory_bytes,
        )
        answers = answer_options(
            options,
            model=workers.model,
            version=gossamer.__version__,
            max_tokens=self.default_max_tokens,
            adapters=workers.adapters,
        )
        digest = self.source.digest()
        plan = read_plan(directory)
        if plan is None:
            plan = make_plan(
                directory,
                self.source,
                answers,
                digest=digest,
                actors=workers.actors,
                max_num_seqs=engine.max_num_seqs,
            )
        else:
            check_same(plan, digest=digest, answers=answers, source=self.input)
        before, opened = _standing(directory, plan)

        refused = [(int(each["line"]), each["error"]["message"]) for each in islice(refusals(directory), 5)]
        before[1].failures[:] = refused

        def show(done: Tally) -> None:
            progress(_summary(plan, before, before[1].plus(done), started))

        show(Tally())
        if opened:
            task = ActorTask(
                str(directory.path),
                run.number,
                model,
                self.model,
                lora,
                options,
                workers.threads,
                self.default_max_tokens,
                _PROMPTS_PER_SEQUENCE * engine.max_num_seqs,
            )
            try:
                answer_parts(opened, task, workers, run, show, runner=self.runner)
            except KeyboardInterrupt:
                show(reduce(Tally.plus, (_written(directory, part) for part in opened)))
                raise
        run.check()
        merge(directory, plan, self.output_file, self.output_format)
        total = Tally(failures=refused)
        for part in range(len(plan.parts)):
            total = total.plus(Tally(**read_json(directory.done(part))))
        summary = _summary(plan, before, total, started)
        progress(summary)
        return summary


def _make(directory: JobDirectory) -> None:
    try:
        directory.path.parent.mkdir(exist_ok=True)
        directory.path.mkdir(exist_ok=True)
        directory.running.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {directory.path}: {error.strerror}") from error


def _empty(directory: JobDirectory, run: Run) -> None:
    """Remove what an earlier job has left; the files of runs stay, as they tell old processes that they are over."""
    for path in directory.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("run."):
            path.unlink()
    run.check()
    directory.running.mkdir(exist_ok=True)


def _standing(directory: JobDirectory, plan: Plan) -> tuple[tuple[Tally, Tally], list[int]]:
    """Where a job stands: what was answered in all parts, what in those that are done, and the parts to be answered.

    Parts with errors are opened again: what they were due to may have changed.
    """
    everything, closed, opened = Tally(), Tally(), []
    for part, rows in enumerate(plan.parts):
        done = read_json(directory.done(part))
        if done is not None and Tally(**done).answered == rows:
            closed = closed.plus(Tally(**done))
            continue
        opened.append(part)
        directory.done(part).unlink(missing_ok=True)
        directory.progress(part).unlink(missing_ok=True)
        everything = everything.plus(_written(directory, part))
    return (everything.plus(closed), closed), opened


def _written(directory: JobDirectory, part: int) -> Tally:
    """What was answered in a part that is not done."""
    tally, left = Tally(), row_places(directory.rows(part))
    for path in directory.answer_files(part):
        for line in complete_lines(path):
            record = json.loads(line)
            if answered(record) and left.pop(record["custom_id"], None) is not None:
                tally.add(record)
    return tally


def _summary(plan: Plan, before: tuple[Tally, Tally], total: Tally, started: float) -> BatchSummary:
    """What this run did: all there is without what there was before."""
    ours = total.plus(before[0], -1)
    return BatchSummary(
        total=plan.lines,
        completed=max(ours.answered, 0),
        failed=total.failed + plan.refused,
        skipped=before[0].answered,
        seconds=time.perf_counter() - started,
        prompt_tokens=max(ours.prompt_tokens, 0),
        completion_tokens=max(ours.completion_tokens, 0),
        tokens_saved=max(ours.tokens_saved, 0),
        first_failures=[f"line {number}: {message}" for number, message in total.failures],
    )
