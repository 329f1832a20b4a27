"""Runs a batch file through the engine: read ahead a little, step, write each answer the moment it is complete."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gossamer.batch.input_file import BatchLine, InvalidLine, count_lines, read_lines
from gossamer.batch.output_file import NoOutput, OutputFile
from gossamer.batch.records import answer_record, invalid_record, read_body, refusal_record
from gossamer.engine.detokenizer import decode
from gossamer.engine.stepping import PatientSteps
from gossamer.errors import ConfigurationError, GossamerError, OutputError, RequestError
from gossamer.outputs import RequestOutput
from gossamer.pooling.refusals import generates_no_text, makes_no_embeddings
from gossamer.protocol import GeneratingBody, PoolingBody, shortened
from gossamer.protocol.field_names import naming, rename
from gossamer.protocol.pooling import PoolingWork
from gossamer.protocol.responses import usage
from gossamer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from gossamer import LLM

Prompt = dict[str, Any]

logger = logging.getLogger("gossamer.batch")
_FAILURES_KEPT = 5


@dataclass
class BatchSummary:
    """Where a batch stands; at the end, what it did.

    Attributes:
        total: lines of the input that are not blank.
        completed: answered by this run.
        failed: lines that got an error; a later ``resume`` tries them again.
        skipped: answered by an earlier run.
        seconds: wall time of the run, without loading the model.
        prompt_tokens: tokens of the answered prompts, each prompt counted once.
        completion_tokens: tokens generated for them.
        tokens_saved: prompt tokens that were not computed because another request had computed them.
        first_failures: the first few errors, for a person to read; all of them are in the output.
    """

    total: int = 0
    completed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_saved: int = 0
    first_failures: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Lines that need no more work."""
        return self.completed + self.failed + self.skipped


@dataclass(slots=True, eq=False)
class _Job:
    """One input line on its way through the engine; a body with several prompts is several engine requests."""

    line: BatchLine
    body: GeneratingBody
    outputs: list[RequestOutput | None]
    failed: bool = False


class Answers(AbstractContextManager[Any], Protocol):
    """Where answers go: an :class:`OutputFile`, or what does the same.

    Attributes:
        answered: custom ids that need no answer any more.
    """

    answered: set[str]

    def append(self, record: dict[str, Any]) -> None:
        """Keep a line of the output."""


class LineRunner:
    """Answers every request among lines.

    Args:
        lines: read one at a time, as the engine has room for their prompts.
        output: one complete line per request.
        total: lines there are, for the summary.
        default_max_tokens: limit for bodies that give none; ``None`` is OpenAI's: 16, or for chat the whole context.
        max_in_flight: prompts given to the engine at a time; this, not the length of the file, bounds the memory.
        progress: called with the summary whenever it has changed.

    Raises:
        ConfigurationError: a limit is less than 1.
    """

    def __init__(
        self,
        lines: Iterable[BatchLine | InvalidLine],
        output: Answers,
        *,
        total: int,
        default_max_tokens: int | None = None,
        max_in_flight: int = 1024,
        progress: Callable[[BatchSummary], None] | None = None,
    ) -> None:
        check_limits(default_max_tokens, max_in_flight)
        self.summary = BatchSummary(total=total)
        self._source = lines
        self._output = output
        self._default_max_tokens = default_max_tokens
        self._max_in_flight = max_in_flight
        self._progress = progress
        self._in_flight: dict[str, tuple[_Job, int]] = {}
        self._started = 0.0

    @property
    def answered(self) -> set[str]:
        """Custom ids that need no answer any more."""
        return self._output.answered

    def run(self, llm: LLM) -> BatchSummary:
        """Answer what has no answer yet. The engine must be idle; it is idle again afterwards, whatever happens.

        Raises:
            KeyboardInterrupt: Ctrl-C; the answers so far are in the output, ``summary`` says how many.
            OutputError: the output cannot be written any more.
        """
        self._started = time.perf_counter()
        try:
            with self._output:
                if llm.generates:
                    self._run(llm)
                else:
                    self._run_pooling(llm)
        finally:
            for request_id in self._in_flight:
                llm.engine.abort(request_id)
            self._in_flight.clear()
            self._report()
        return self.summary

    def _run(self, llm: LLM) -> None:
        prompts = self._prompts(llm)
        steps = PatientSteps(llm.engine)
        more = True
        while more or self._in_flight:
            while more and len(self._in_flight) < self._max_in_flight:
                prompt = next(prompts, None)
                if prompt is None:
                    more = False
                else:
                    self._submit(llm, *prompt)
            if self._in_flight:
                for output in steps.step():
                    assert isinstance(output, RequestOutput)  # we ask for no scores
                    self._collect(llm, output)
            self._report()

    def _lines(self) -> Iterator[BatchLine]:
        """Lines that are requests, and have no answer yet."""
        for line in self._source:
            if isinstance(line, InvalidLine):
                self._write_invalid(line)
            elif line.custom_id in self._output.answered:
                self.summary.skipped += 1
            else:
                yield line

    def _run_pooling(self, llm: LLM) -> None:
        """As :meth:`_run`, for a model of embeddings or scores: so many inputs at a time, and then their lines."""
        gathered: list[tuple[BatchLine, PoolingWork]] = []
        for line in self._lines():
            try:
                body = read_body(line)
                if isinstance(body, GeneratingBody):
                    raise generates_no_text(llm.model_name, llm.task)
                gathered.append((line, body.work(llm.pooling, llm.pooling.texts)))
            except Exception as error:  # of the tokenizer, too: it is the line's, and the others go on
                self._write_refused(line, error)
            if sum(len(work.inputs) for _, work in gathered) >= self._max_in_flight:
                self._answer_pooling(llm, gathered)
                gathered = []
            self._report()
        self._answer_pooling(llm, gathered)

    def _answer_pooling(self, llm: LLM, gathered: list[tuple[BatchLine, PoolingWork]]) -> None:
        try:
            rows = llm.pooling.compute([each for _, work in gathered for each in work.inputs])
        except Exception as error:  # of PyTorch, such as too little memory: these lines fail, and the others go on
            for line, _ in gathered:
                self._write_refused(line, error)
            return
        for (line, work), own in zip(gathered, rows.split([len(work.inputs) for _, work in gathered]), strict=True):
            answer = work.answer(own, llm.model_name)
            self._output.append(answer_record(line, answer))
            self.summary.completed += 1
            self.summary.prompt_tokens += answer["usage"]["prompt_tokens"]
        self._report()

    def _prompts(self, llm: LLM) -> Iterator[tuple[_Job, int, Prompt, SamplingParams]]:
        """Prompts in the order of the file. Lazy, so that a body with very many prompts is bounded as well."""
        for line in self._lines():
            try:
                body = read_body(line)
                if isinstance(body, PoolingBody):
                    raise makes_no_embeddings(llm.model_name)
                body.answered_by(llm.fingerprint)
                with naming(body.field_names):
                    params = body.to_sampling_params(self._default_max_tokens, llm.sampling_defaults, llm.chat_format)
                    adapter = {"adapter": body.adapter_among(llm.adapters)}
                    prompts = [_engine_prompt(llm, prompt) | adapter for prompt in body.engine_prompts()]
            except Exception as error:  # of templates, tokenizers ...: it is the line's, and the others go on
                self._write_refused(line, error)
                continue
            job = _Job(line, body, [None] * len(prompts))
            for index, prompt in enumerate(prompts):
                if not job.failed:
                    yield job, index, prompt, params

    def _submit(self, llm: LLM, job: _Job, index: int, prompt: Prompt, params: SamplingParams) -> None:
        request_id = f"line-{job.line.number}-prompt-{index}"
        try:
            draw: dict[str, Any] = {} if job.line.draw is None else {"draw": job.line.draw + index}
            llm.engine.add_request(request_id, prompt, params, **draw)
        except Exception as error:  # whatever it is, it belongs to this line alone
            self._fail(llm, job, error)
        else:
            self._in_flight[request_id] = (job, index)

    def _collect(self, llm: LLM, output: RequestOutput) -> None:
        if output.request_id not in self._in_flight:
            return  # it finished in the same step in which another prompt of its body failed
        job, index = self._in_flight.pop(output.request_id)
        if output.error is not None:
            self._fail(llm, job, output.error)
            return
        job.outputs[index] = output
        outputs = [done for done in job.outputs if done is not None]
        if len(outputs) == len(job.outputs):
            self._write_answer(llm, job, outputs)

    def _fail(self, llm: LLM, job: _Job, error: Exception) -> None:
        """One prompt of a body failed, so the body has no answer: stop its other prompts."""
        job.failed = True
        if isinstance(error, RequestError):
            rename(error, job.body.field_names)
        for request_id in [request_id for request_id, (other, _) in self._in_flight.items() if other is job]:
            llm.engine.abort(request_id)
            del self._in_flight[request_id]
        self._write_refused(job.line, error)

    def _write_answer(self, llm: LLM, job: _Job, outputs: list[RequestOutput]) -> None:
        try:
            decoded = partial(decode, llm.tokenizer, unfinished=True)
            model = job.body.adapter_among(llm.adapters) or llm.model_name
            answer = job.body.answer(outputs, model=model, decode=decoded, chat=llm.chat_format)
            self._output.append(answer_record(job.line, answer))
        except OutputError:
            raise
        except Exception as error:  # of the tokenizer, or a number that JSON cannot hold: the line's
            self._write_refused(job.line, error)
            return
        counted = usage(outputs)
        self.summary.completed += 1
        self.summary.prompt_tokens += counted["prompt_tokens"]
        self.summary.completion_tokens += counted["completion_tokens"]
        self.summary.tokens_saved += counted["prompt_tokens_details"]["cached_tokens"]

    def _write_refused(self, line: BatchLine, error: Exception) -> None:
        if not isinstance(error, GossamerError):
            logger.error("line %d cannot be answered", line.number, exc_info=error)
        record = refusal_record(line, error)
        self._output.append(record)
        self._count_failure(line.number, record["response"]["body"]["error"]["message"])

    def _write_invalid(self, line: InvalidLine) -> None:
        self._output.append(invalid_record(line))
        self._count_failure(line.number, shortened(line.message))

    def _count_failure(self, number: int, message: str) -> None:
        self.summary.failed += 1
        if len(self.summary.first_failures) < _FAILURES_KEPT:
            self.summary.first_failures.append(f"line {number}: {message}")

    def _report(self) -> None:
        self.summary.seconds = time.perf_counter() - self._started
        if self._progress is not None:
            self._progress(self.summary)


class BatchRunner(LineRunner):
    """Answers every request of a batch file.

    Args:
        input_path: requests, in OpenAI's batch format.
        output_path: answers, in OpenAI's batch output format; one complete line per request. ``None`` in a process that
            computes with another one, which writes them.
        resume: keep the answers of an earlier run in ``output_path`` and skip their requests, by ``custom_id``.
        overwrite: replace an existing ``output_path``.
        default_max_tokens, max_in_flight, progress: as :class:`LineRunner` has them.

    Raises:
        ConfigurationError: a path cannot be used. Nothing has been written and no model is needed to find out.

    Example::

        with LLM("smollm2-135m") as llm:
            summary = BatchRunner("requests.jsonl", "answers.jsonl").run(llm)
    """

    def __init__(
        self,
        input_path: str | Path,
        output_path: str | Path | None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        default_max_tokens: int | None = None,
        max_in_flight: int = 1024,
        progress: Callable[[BatchSummary], None] | None = None,
    ) -> None:
        source = Path(input_path)
        both = output_path is not None and source.exists() and Path(output_path).exists()
        if both and source.samefile(output_path):  # type: ignore[arg-type]  # there is one
            raise ConfigurationError(f"{output_path} is both input and output; choose another output")
        check_limits(default_max_tokens, max_in_flight)
        total = count_lines(source)
        super().__init__(
            read_lines(source),
            NoOutput() if output_path is None else OutputFile(Path(output_path), resume=resume, overwrite=overwrite),
            total=total,
            default_max_tokens=default_max_tokens,
            max_in_flight=max_in_flight,
            progress=progress,
        )


def check_limits(default_max_tokens: int | None, max_in_flight: int) -> None:
    """Raises: ConfigurationError: one of the limits is less than 1."""
    for name, value in (("max_tokens", default_max_tokens), ("max_in_flight", max_in_flight)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}")


def _engine_prompt(llm: LLM, prompt: Prompt) -> Prompt:
    most, special = prompt.get("truncate_prompt_tokens"), prompt.get("add_special_tokens", True)
    if "messages" in prompt:
        ids = llm.apply_chat_template(
            prompt["messages"],
            tools=prompt.get("tools", ()),
            template_kwargs=prompt.get("template_kwargs"),
            add_generation_prompt=prompt.get("add_generation_prompt", True),
            continue_final_message=prompt.get("continue_final_message", False),
        )
    elif most is None and special:
        return {key: prompt[key] for key in ("prompt", "prompt_token_ids", "cache_salt") if key in prompt}
    else:
        _, ids = llm.engine.intake.encode(prompt, "", add_special_tokens=special)
    return {"prompt_token_ids": ids if most is None else ids[-most:], "cache_salt": prompt["cache_salt"]}
