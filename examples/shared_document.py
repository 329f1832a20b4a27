"""64 questions about one document, with the shared text computed once and, for comparison, again for every question.

    make run        or        .venv/bin/python examples/shared_document.py --help

The prompts share text on two levels: all of them begin with the document, and the eight questions of a topic also share
the topic's examples. Nothing says so to the engine: it gets 64 strings.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gossamer import LLM, RequestOutput, SamplingParams
from gossamer.engine.stats import EngineStats
from gossamer.options import SharingMode

HERE = Path(__file__).parent / "harbour"
LEVELS = {1: "document", 2: "topic examples"}


@dataclass
class Question:
    prompt: str
    text: str
    answer: str  # words of the document that answer it


@dataclass
class Run:
    """One pass over some of the questions, from a cold cache."""

    sharing: str
    questions: list[Question]
    outputs: list[RequestOutput]
    seconds: float
    stats: EngineStats

    @property
    def hits(self) -> int:
        texts = (output.outputs[0].text.lower() for output in self.outputs)
        return sum(q.answer.lower() in text for q, text in zip(self.questions, texts, strict=True))


def load_questions() -> list[Question]:
    document = (HERE / "document.md").read_text()
    questions = []
    for topic in json.loads((HERE / "questions.json").read_text())["topics"]:
        examples = "".join(f"Question: {e['question']}\nAnswer: {e['answer']}\n\n" for e in topic["examples"])
        for item in topic["questions"]:
            prompt = f"{document}\n\n{examples}Question: {item['question']}\nAnswer:"
            questions.append(Question(prompt, item["question"], item["answer"]))
    return questions


def answer(llm: LLM, questions: list[Question], sharing: str) -> Run:
    params = SamplingParams(temperature=0, max_tokens=32, stop="\n")
    start = time.perf_counter()
    outputs = llm.generate([q.prompt for q in questions], params)
    return Run(sharing, questions, outputs, time.perf_counter() - start, llm.stats())


def run_once(model: str, questions: list[Question], sharing: SharingMode) -> Run:
    with LLM(model, sharing=sharing) as llm:
        return answer(llm, questions, sharing)


def print_runs(console: Console, runs: list[Run]) -> None:
    table = Table(title="The same questions, with the shared text computed once and every time")
    table.add_column("sharing", no_wrap=True)
    for name in (
        "asked",
        "right",
        "prompt\ntokens",
        "of them\ncomputed",
        "seconds",
        "s per\nanswer",
        "tokens/s",
        "K/V MB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        stats, count = run.stats, len(run.questions)
        table.add_row(
            run.sharing,
            str(count),
            str(run.hits),
            f"{stats.prompt_tokens:,}",
            f"{stats.prompt_tokens - stats.saved_tokens:,}",
            f"{run.seconds:.1f}",
            f"{run.seconds / count:.2f}",
            f"{stats.generated_tokens / run.seconds:.1f}",
            f"{stats.kv_bytes_peak / 1e6:,.0f}",
        )
    console.print(table)


def print_savings(console: Console, run: Run, unshared: Run) -> None:
    stats = run.stats
    table = Table(title=f"Prompt tokens that {len(run.questions)} questions did not compute again")
    table.add_column("level")
    table.add_column("tokens saved", justify="right")
    for level, tokens in sorted(stats.saved_by_level.items()):
        table.add_row(f"{level}: {LEVELS.get(level, 'words that questions have in common')}", f"{tokens:,}")
    table.add_row("all", f"{stats.saved_tokens:,} of {stats.prompt_tokens:,}")
    console.print(table)
    each = unshared.stats.kv_bytes_peak / len(unshared.questions)
    texts = {output.prompt: output.outputs[0].text for output in run.outputs}
    same = sum(texts[output.prompt] == output.outputs[0].text for output in unshared.outputs)
    console.print(f"Answers that are the same with and without sharing: {same} of {len(unshared.outputs)}.")
    console.print(
        f"K/V for {len(run.questions)} questions at once: {stats.kv_bytes_peak / 1e6:,.0f} MB with sharing, "
        f"{each * len(run.questions) / 1e6:,.0f} MB without ({each / 1e6:,.0f} MB for each, as measured)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--compare", type=int, default=8, help="questions to answer without sharing as well; 0 for none"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.width = max(console.width, 96)  # a narrow terminal may wrap the table; columns cut short help nobody
    questions = load_questions()

    console.print(f"{len(questions)} questions about one document, {arguments.model}, prefixes shared:")
    shared = run_once(arguments.model, questions, "attention")
    for question, output in list(zip(questions, shared.outputs, strict=True))[::8]:
        console.print(f"  [bold]{question.text}[/bold]\n   {output.outputs[0].text.strip()}", soft_wrap=True)
    runs = [shared]
    if arguments.compare:
        # one of each topic in turn, so that the sample has the same mixture as the whole
        sample = [questions[i % 8 * 8 + i // 8] for i in range(min(arguments.compare, len(questions)))]
        console.print(
            f"\nThe same for {len(sample)} of them without sharing; every question computes the document anew ..."
        )
        runs += [run_once(arguments.model, sample, "attention"), run_once(arguments.model, sample, "off")]
    print_runs(console, runs)
    if arguments.compare:
        print_savings(console, shared, runs[-1])


if __name__ == "__main__":
    main()
