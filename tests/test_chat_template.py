"""Messages on their way through a chat template: what is not given, what is no text, and what templates say."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateSyntaxError

from gossamer.engine.chat_template import render
from gossamer.errors import InvalidPromptError


class Template:
    """A tokenizer that notes the messages, or raises what a template raised."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seen: list[dict[str, Any]] = []

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, list[int]]:
        if self.error is not None:
            raise self.error
        self.seen = messages
        return {"input_ids": [1, 2]}


def test_fields_that_are_none_are_not_given_and_an_answer_may_be_empty() -> None:
    template = Template()
    answer = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}], "audio": None}
    assert render(template, [{"role": "user", "content": "Hi", "name": None}, answer]) == [1, 2]
    assert template.seen == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]},
    ]


@pytest.mark.parametrize("message", ["hello", {"role": "user"}, {"role": "user", "content": None}])
def test_what_is_no_message_is_refused_by_its_place(message: Any) -> None:
    with pytest.raises(InvalidPromptError, match=r"messages\.1") as caught:
        render(Template(), [{"role": "user", "content": "Hi"}, message])
    assert caught.value.param == "messages"


def test_a_lone_surrogate_is_named_as_what_it_is() -> None:
    for content in ("a\ud83d", [{"type": "text", "text": "\udfff"}]):
        with pytest.raises(InvalidPromptError, match=r"messages\.0\.content.* lone surrogate \(U\+D"):
            render(Template(), [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("cannot read /srv/models/secret/chat.jinja"), "cannot read chat.jinja"),
        (ValueError(r"cannot read C:\models\secret\chat.jinja"), "cannot read chat.jinja"),
        (TypeError('Traceback:\n  File "/srv/models/x.py", line 3'), "Traceback:"),
        (ValueError("roles must alternate user/assistant/user"), "roles must alternate user/assistant/user"),
        (ValueError("see https://example.org/docs/roles"), "see https://example.org/docs/roles"),
        (TemplateSyntaxError("unexpected end", 3, "chat", "/srv/models/secret/chat.jinja"), "unexpected end"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_a_template_says_is_told_without_folders(error: Exception, shown: str) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        render(Template(error), [{"role": "user", "content": "Hi"}])
    assert caught.value.message == f"the chat template refused the messages: {shown}"
