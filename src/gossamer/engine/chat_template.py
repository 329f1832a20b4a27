"""A conversation as token ids: messages are checked, and written with the chat template of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from jinja2 import TemplateSyntaxError

from gossamer.errors import ConfigurationError, InvalidPromptError
from gossamer.surrogates import find_lone_surrogate

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
# A path of at least two names, not part of a URL or of a closing tag.
_PATH = re.compile(r"(?<![\w:/<.])(?:[A-Za-z]:)?(?:[/\\][\w.@+~ -]*[\w.@+~-])+[/\\][\w.@+~-]+")


def render(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
) -> list[int]:
    """The token ids of a conversation.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: fields that are ``None`` count as not given; an assistant's message without content is empty.
        add_generation_prompt: go on to where the assistant's answer begins; otherwise end with the last message.
        variables: more that the template knows, such as ``tools``.

    Raises:
        InvalidPromptError: a message is none, has no content or holds a lone surrogate, or the template refuses them.

    >>> from types import SimpleNamespace
    >>> write = lambda messages, **options: {"input_ids": [len(message["content"]) for message in messages]}
    >>> render(SimpleNamespace(apply_chat_template=write), [{"role": "assistant", "content": None}])
    [0]
    """
    encoded = _applied(tokenizer, messages, add_generation_prompt, return_dict=True, **variables)
    return list(encoded["input_ids"])


def render_text(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """The text of a conversation, of which :func:`render` makes the tokens; arguments and errors are the same."""
    return str(_applied(tokenizer, messages, add_generation_prompt, tokenize=False, **variables))


def _applied(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, **options: Any) -> Any:
    given = [_given(message, f"messages.{place}") for place, message in enumerate(messages)]
    try:
        return tokenizer.apply_chat_template(given, add_generation_prompt=add_generation_prompt, **options)
    except Exception as error:  # templates are programs that come with the model and raise what they like
        raise InvalidPromptError(
            f"the chat template refused the messages: {_reason(error)}", param="messages"
        ) from error


def read_chat_template(template: str | None) -> str | None:
    """The template that an option names: in a file; or the text itself, if it holds a ``{``.

    Raises:
        ConfigurationError: there is no such file.
    """
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the chat template {template}: {error}") from None


def use_chat_template(tokenizer: Any, template: str | None) -> None:
    """Give a tokenizer another chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: see :func:`read_chat_template`; ``None`` changes nothing.

    Raises:
        ConfigurationError: there is no such file, or it holds no template.
    """
    if template is None:
        return
    tokenizer.chat_template = read_chat_template(template)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"the chat template is none: line {error.lineno}: {error.message}") from None
    except Exception:  # it is a template; templates raise what they like about messages that they are not made for
        return


def _given(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidPromptError(f"{name} must be a mapping, got {type(message).__name__}", param="messages")
    found = find_lone_surrogate(message, name)
    if found is not None:
        raise InvalidPromptError(found.reason, param="messages")
    fields = {key: value for key, value in message.items() if value is not None}
    if "content" not in fields:
        if fields.get("role") != "assistant":
            raise InvalidPromptError(f"{name} has no content", param="messages")
        fields["content"] = ""
    return fields


def _reason(error: Exception) -> str:
    """What a template says, in one line, and nothing about this machine's folders."""
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    line = next((line for line in str(text).splitlines() if line.strip()), type(error).__name__)
    return _PATH.sub(lambda match: PurePath(match[0].replace("\\", "/")).name, line.strip())[:400]
