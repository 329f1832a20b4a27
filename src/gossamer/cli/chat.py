"""``gossamer chat``: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from gossamer.cli.conversation import Conversation, Turn
from gossamer.cli.engine_options import Lora, Model, Threads, adapters_of, load_llm, takes_options
from gossamer.cli.terminal import notice, print_error
from gossamer.errors import ConfigurationError, GossamerError, RequestError
from gossamer.options import Task
from gossamer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from gossamer import LLM

_HELP = """\
/help   this list
/reset  forget the conversation
/adapter NAME  let this adapter answer; without a name, the model itself
/stats  what the engine has done so far
/exit   leave, as Ctrl-D does
Ctrl-C stops an answer; what was said until then is remembered."""

_TEMPERATURE = 0.7  # for models whose authors say nothing


@takes_options(max_num_seqs=1)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="Instructions before the first message.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 always takes the most probable token.", show_default="what the model's authors advise, or 0.7"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Choose among the most probable tokens up to this sum.",
            show_default="what the model's authors advise, or 1.0",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes the answers reproducible.")] = None,
    lora: Lora = None,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    threads: Threads = None,
) -> None:
    """Talk to a model. With text piped into it, answer that text as one message and leave.

    With `--lora` the first adapter answers; `/adapter` changes to another, or to the model itself.
    """
    asked: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    given = {name: value for name, value in asked.items() if value is not None}
    SamplingParams(**given)  # refused before the weights are read
    adapters = adapters_of(lora, model)
    _check_generates(model, options.get("task", "auto"))
    piped = None if sys.stdin.isatty() else _read_piped_message()
    # Without a seed no two conversations draw alike: the engine's own default would make every first answer the same.
    with load_llm(model, options | {"seed": secrets.randbits(32)}, threads, adapters) as llm:
        sampling = {"temperature": _TEMPERATURE} | llm.sampling_defaults | given
        conversation = Conversation(llm, SamplingParams(**sampling), system)
        conversation.adapter = next(iter(adapters), None)
        if not conversation.has_template:
            notice(
                f"{llm.model_name} has no chat template: it continues each text by itself, without the earlier ones.",
                "yellow",
            )
        if piped is None:
            _converse(llm, conversation)
        else:
            for piece in conversation.answer(piped, _tell_dropped):
                _write(piece)
            _write("\n")


def _check_generates(model: str, task: Task) -> None:
    """Whether one can talk to the model, which is known before it is loaded.

    Raises:
        UnsupportedModelError: it makes something else than text, and what.
    """
    from gossamer.pooling.loading import find_task
    from gossamer.pooling.refusals import generates_no_text

    found = find_task(model, task)
    if found != "generate":
        raise generates_no_text(model, found)


def _read_piped_message() -> str:
    try:
        message = sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the text piped into chat is not UTF-8: byte {error.start} is wrong") from None
    if not message:
        raise ConfigurationError("nothing was piped into chat; run it in a terminal to type messages")
    return message


def _converse(llm: LLM, conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() line editing and history
    _write(f"{llm.model_name}. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.\n")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            _write("\n")
            return
        except KeyboardInterrupt:
            _write("\nCtrl-D or /exit leaves.\n")
            continue
        if line == "/exit":
            return
        if line.startswith("/"):
            _run_command(line, llm, conversation)
        elif line:
            _answer(line, conversation)


def _run_command(line: str, llm: LLM, conversation: Conversation) -> None:
    command, _, name = line.partition(" ")
    match command:
        case "/help":
            _write(_HELP + "\n")
        case "/reset":
            conversation.turns.clear()
            _write("The conversation starts again.\n")
        case "/adapter":
            _change_adapter(name.strip() or None, llm, conversation)
        case "/stats":
            for name, value in llm.stats().to_dict().items():
                _write(f"{name}: {value:.2f}\n" if isinstance(value, float) else f"{name}: {value}\n")
        case _:
            _write(f"There is no command {command}; /help lists them.\n")


def _change_adapter(name: str | None, llm: LLM, conversation: Conversation) -> None:
    if name is not None and name not in llm.adapters:
        _write(f"There is no adapter {name}; there is {', '.join(llm.adapters) or 'none'}.\n")
        return
    conversation.adapter = name
    _write(f"From now on {name or llm.model_name} answers.\n")


def _answer(text: str, conversation: Conversation) -> None:
    try:
        with _InterruptFlag() as interrupt, contextlib.closing(conversation.answer(text, _tell_dropped)) as pieces:
            for piece in pieces:
                _write(piece)
                if interrupt.raised:
                    break
    except GossamerError as error:
        print_error(error)
        return
    _write("\n")
    if conversation.finish_reason == "length":
        notice("(cut: --max-tokens or the end of the context was reached)", "dim")


def _tell_dropped(turn: Turn, error: RequestError) -> None:
    beginning = turn.user if len(turn.user) <= 60 else turn.user[:60] + "…"
    notice(f"{error.message}: dropped the oldest turn, “{beginning}” and its answer", "yellow")


def _write(text: str) -> None:
    # Not through rich: it would read markup into what the model says.
    sys.stdout.write(text)
    sys.stdout.flush()


class _InterruptFlag:
    """Turns Ctrl-C into a flag, so that it stops the answer between two steps of the engine and not inside of one.

    A second Ctrl-C, from somebody who does not want to wait for the step to end, raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.raised = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
