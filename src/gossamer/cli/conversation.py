"""A conversation with a model: its turns, and an answer that arrives piece by piece. No terminal here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigurationError, MemoryBudgetError, PromptTooLongError, RequestError
from gossamer.outputs import RequestOutput
from gossamer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from gossamer import LLM


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, as far as it went."""

    user: str
    assistant: str


class Conversation:
    """Turns that the model sees again with each question.

    A model without a chat template knows no turns: it continues each text by itself, as a plain completion.

    Args:
        llm: the model; its engine must be idle.
        params: how to sample; one completion per question.
        system: instructions before the first turn.

    Attributes:
        turns: what was said, oldest first.
        adapter: the adapter that answers; ``None`` for the model itself.
        finish_reason: why the last answer ended: ``"stop"``, ``"length"``, or ``None`` if it was stopped from outside.

    Raises:
        ConfigurationError: ``system`` was given, but the model has no chat template to put it into.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._ids = (f"chat-{number}" for number in itertools.count())
        self.has_template = llm.tokenizer.chat_template is not None
        self.turns: list[Turn] = []
        self.adapter: str | None = None
        self.finish_reason: str | None = None
        if system is not None and not self.has_template:
            raise ConfigurationError(f"{llm.model_name} has no chat template and so no place for a system prompt")

    def answer(self, text: str, on_dropped: Callable[[Turn, RequestError], None]) -> Generator[str]:
        """Ask, and yield the answer in pieces; a piece is empty when a step of the engine brought no text.

        Closing the generator stops the answer. The turn is remembered with the text that was generated until then.

        Args:
            text: the question.
            on_dropped: called for each turn, the oldest first, that had to be forgotten for the prompt to fit.

        Raises:
            RequestError: the question does not fit even alone (PromptTooLongError, MemoryBudgetError), or was refused.
        """
        self.finish_reason = None
        request_id = next(self._ids)
        self._submit(request_id, text, on_dropped)
        answer, finished = "", False
        try:
            while not finished:
                known = len(answer)
                for output in self._llm.engine.step():
                    assert isinstance(output, RequestOutput)  # we ask for no scores
                    finished = output.finished
                    if output.error is not None:
                        raise output.error
                    completion = output.outputs[0]
                    self.finish_reason = completion.finish_reason
                    answer = completion.text
                yield answer[known:]
        finally:
            if not finished:
                self._llm.engine.abort(request_id)
            if answer and self.has_template:
                self.turns.append(Turn(text, answer))

    def _submit(self, request_id: str, text: str, on_dropped: Callable[[Turn, RequestError], None]) -> None:
        while True:
            try:
                self._llm.engine.add_request(request_id, self._prompt(text), self._params, stream=True)
                return
            except (PromptTooLongError, MemoryBudgetError) as error:
                if not self.turns:
                    raise
                on_dropped(self.turns.pop(0), error)

    def _prompt(self, text: str) -> dict[str, Any]:
        if not self.has_template:
            return {"prompt": text, "adapter": self.adapter}
        messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        messages.append({"role": "user", "content": text})
        return {"prompt_token_ids": self._llm.apply_chat_template(messages), "adapter": self.adapter}
