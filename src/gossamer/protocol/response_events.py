"""The events of a streamed response: each has its number, and those of an item its place and its id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.chat import ChatFormat, Part
from gossamer.chat.answer_reader import new_call_id
from gossamer.outputs import RequestOutput
from gossamer.protocol.custom_tools import InputReader
from gossamer.protocol.response_items import new_id, output_text, status_of
from gossamer.protocol.responses import Json
from gossamer.protocol.translated import PartEvents

if TYPE_CHECKING:
    from gossamer.protocol.model_responses import ResponsesRequest


class ResponseEvents(PartEvents):
    """``response.created``, then each item from ``added`` over its deltas to ``done``, then the whole response."""

    def __init__(self, body: ResponsesRequest, head: Json, chat: ChatFormat | None) -> None:
        super().__init__(head, body.chat.reader(chat))
        self._body = body
        self._write = body.writer()
        self._number = 0
        self._items: list[Json] = []  # those that are complete
        self._open: Json | None = None  # the one that is being told, and its text
        self._text = ""
        self._input: InputReader | None = None  # of the one, if it is a call of a custom tool

    def begin(self, output: RequestOutput) -> Iterator[bytes]:
        started = self._body.response(self._head, [])
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)

    def close(self) -> Iterator[bytes]:
        if not self._items and self._open is None:
            yield from self._begin_item("message", "")
        yield from self._close_item(last=True)

    def end(self, outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        response = self._body.response(self._head, self._items, self._last, outputs)
        self._body.keep(response)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: Json, status: int) -> Iterator[bytes]:
        told = {"code": error["error"]["code"], "message": error["error"]["message"]}
        yield self._event("response.failed", response=self._body.response(self._head, self._items, error=told))

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._number += 1
        return self._named(name, sequence_number=self._number - 1, **fields)

    def _of_item(self, name: str, /, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(name, item_id=self._open["id"], output_index=len(self._items), **fields)

    def tell(self, part: Part) -> Iterator[bytes]:
        kind = {"content": "message", "reasoning": "reasoning"}.get(part.kind, "call")
        open_kind = None if self._open is None else self._open["type"]
        if part.kind == "call" or (kind != "call" and kind != open_kind):
            yield from self._close_item()
            yield from self._begin_item(kind, part.text)
        if part.kind == "call":
            return
        self._text += part.text
        if part.kind == "content":
            yield self._of_item("response.output_text.delta", content_index=0, delta=part.text, logprobs=[])
        elif part.kind == "reasoning":
            yield self._of_item("response.reasoning_text.delta", content_index=0, delta=part.text)
        elif self._input is None:
            yield self._of_item("response.function_call_arguments.delta", delta=part.text)
        elif text := self._input.push(part.text):
            yield self._of_item("response.custom_tool_call_input.delta", delta=text)

    def _begin_item(self, kind: str, name: str) -> Iterator[bytes]:
        self._text, self._input = "", None
        if kind == "message":
            self._open = self._write.message(new_id("msg", self._body.tag), "", [], "in_progress") | {"content": []}
        elif kind == "reasoning":
            self._open = self._write.reasoning(new_id("rs", self._body.tag), "") | {"content": []}
        else:
            self._open = self._write.call(new_id("fc", self._body.tag), new_call_id(), name, "", "in_progress")
            self._input = InputReader() if name in self._write.custom else None
        yield self._event("response.output_item.added", output_index=len(self._items), item=self._open)
        if kind == "message":
            yield self._of_item("response.content_part.added", content_index=0, part=output_text("", []))

    def _close_item(self, *, last: bool = False) -> Iterator[bytes]:
        if self._open is None:
            return
        item, text = self._open, self._text
        if item["type"] == "message":
            logprobs = self._body.logprobs(self._last) if self._last is not None else []
            yield self._of_item("response.output_text.done", content_index=0, text=text, logprobs=logprobs)
            yield self._of_item("response.content_part.done", content_index=0, part=output_text(text, logprobs))
            done = self._write.message(item["id"], text, logprobs)
        elif item["type"] == "reasoning":
            yield self._of_item("response.reasoning_text.done", content_index=0, text=text)
            done = self._write.reasoning(item["id"], text)
        else:
            done = self._write.call(item["id"], item["call_id"], item["name"], text)
            if self._input is None:
                yield self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
            else:
                yield self._of_item("response.custom_tool_call_input.done", input=done["input"])
        done |= status_of(self._last) if last else {}
        yield self._event("response.output_item.done", output_index=len(self._items), item=done)
        self._items.append(done)
        self._open = None
