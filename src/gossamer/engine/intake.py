"""Checks what a user asks for before it becomes work: every refusal here names the request and touches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.engine.detokenizer import decode
from gossamer.engine.endings import EndingEncoder, is_token_list
from gossamer.engine.tree import TreeSalt, tree_salt
from gossamer.errors import InvalidPromptError, InvalidSamplingParamsError, MemoryBudgetError, PromptTooLongError
from gossamer.sampling_params import SamplingParams
from gossamer.surrogates import find_lone_surrogate

# Text, {"prompt": text} or {"prompt_token_ids": [...]}; a mapping may have a "cache_salt" and an "adapter".
Prompt = str | Mapping[str, Any]
_FORMS = 'a prompt is a string, {"prompt": "..."} or {"prompt_token_ids": [...]}'


class Intake:
    """Turns prompts into token ids and refuses what cannot be served."""

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_model_len: int,
        max_cached_tokens: int,
        adapters: Sequence[str] = (),
        *,
        grammars: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_cached_tokens = max_cached_tokens  # what the whole memory budget holds
        self.adapters = tuple(adapters)  # that prompts may name
        self.grammars = grammars  # whether answers may have to follow one

    def encode(
        self, prompt: Prompt, request_id: str, *, add_special_tokens: bool = True
    ) -> tuple[str | None, list[int]]:
        """The prompt's text, if it has one, and its token ids.

        Raises:
            InvalidPromptError: empty, of the wrong type, or with token ids that the model does not have.
        """
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), self.check_ids(prompt["prompt_token_ids"], request_id)
            prompt = prompt.get("prompt", prompt)
        if not isinstance(prompt, str):
            raise InvalidPromptError(f"{_FORMS}, got {type(prompt).__name__}", request_id=request_id, param="prompt")
        ids = self._tokenize(prompt, request_id, "prompt", add_special_tokens=add_special_tokens)
        if not prompt or not ids:
            raise InvalidPromptError(
                "the prompt is empty; give at least one token", request_id=request_id, param="prompt"
            )
        return prompt, ids

    def cache_salt(self, prompt: Prompt, request_id: str) -> str | None:
        """The salt that a prompt comes with: its keys and values are shared only among prompts of the same salt.

        Raises:
            InvalidPromptError: it is no string, or empty.
        """
        salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
        if salt is not None and not (isinstance(salt, str) and salt):
            raise InvalidPromptError("cache_salt must be a non-empty string", request_id=request_id, param="cache_salt")
        return salt

    def adapter(self, prompt: Prompt, request_id: str) -> str | None:
        """The adapter that a prompt is to be computed with.

        Raises:
            InvalidPromptError: there is none of that name.
        """
        name = prompt.get("adapter") if isinstance(prompt, Mapping) else None
        if name is not None and name not in self.adapters:
            there = f"there is {', '.join(self.adapters)}" if self.adapters else "none is loaded"
            raise InvalidPromptError(
                f"there is no adapter {str(name)[:80]!r}; {there}", request_id=request_id, param="adapter"
            )
        return name

    def tree_salt(self, prompt: Prompt, request_id: str) -> TreeSalt:
        """What keeps a prompt's keys and values apart.

        Raises:
            InvalidPromptError: as :meth:`cache_salt` and :meth:`adapter`.
        """
        return tree_salt(self.cache_salt(prompt, request_id), self.adapter(prompt, request_id))

    def encode_endings(
        self, endings: Any, prompt: Prompt, request_id: str, *, delimiter: str = ""
    ) -> list[tuple[str | None, list[int]]]:
        """Each ending of a prompt: its text, if it is one, and its token ids.

        Args:
            endings: texts, or token ids.
            prompt: the tokens of a text depend on what it goes on after.
            delimiter: stands between the prompt and each text.

        Raises:
            InvalidPromptError: not a list of endings, or one is empty.
        """
        if not isinstance(endings, Sequence) or isinstance(endings, (str, bytes)):
            raise InvalidPromptError(
                f"continuations must be a list of strings or lists of token ids, got {type(endings).__name__}",
                request_id=request_id,
                param="continuations",
            )
        encoder: EndingEncoder | None = None
        encoded: list[tuple[str | None, list[int]]] = []
        for place, ending in enumerate(endings):
            param = f"continuations[{place}]"
            if isinstance(ending, str):
                self._check_unicode(ending, request_id, param)
                encoder = encoder or EndingEncoder(self.tokenizer, self._text_of(prompt, request_id))
                encoded.append((ending, encoder.encode(delimiter + ending)))
            elif is_token_list(ending):
                encoded.append((None, self.check_ids(ending, request_id, param)))
            else:
                raise InvalidPromptError(
                    f"{param} must be a string or a list of token ids, got {type(ending).__name__}",
                    request_id=request_id,
                    param=param,
                )
        return encoded

    def _text_of(self, prompt: Prompt, request_id: str) -> str:
        text, ids = self.encode(prompt, request_id)
        return text if text is not None else decode(self.tokenizer, ids)

    def _tokenize(self, text: str, request_id: str, param: str, **options: bool) -> list[int]:
        self._check_unicode(text, request_id, param)
        return list(self.tokenizer.encode(text, **options))

    def _check_unicode(self, text: str, request_id: str, param: str) -> None:
        found = find_lone_surrogate(text, param)
        if found is not None:
            raise InvalidPromptError(found.reason, request_id=request_id, param=param)

    def prediction(self, given: str | Sequence[int], request_id: str) -> list[int]:
        """The tokens of what a completion is expected to be.

        Raises:
            InvalidSamplingParamsError: it is longer than the context, no text, or has tokens that the model has not.
        """
        try:
            if isinstance(given, str):
                self._check_unicode(given, request_id, "prediction")
                ids = EndingEncoder(self.tokenizer, "\n").encode(given) if given else []
            else:
                ids = self.check_ids(given, request_id, "prediction") if given else []
        except InvalidPromptError as error:
            raise InvalidSamplingParamsError(error.message, request_id=request_id, param="prediction") from None
        if len(ids) > self.max_model_len:
            raise InvalidSamplingParamsError(
                f"prediction has {len(ids)} tokens, and the context {self.max_model_len}; shorten it",
                request_id=request_id,
                param="prediction",
            )
        return ids

    def check_ids(self, ids: Any, request_id: str, param: str = "prompt_token_ids") -> list[int]:
        """``ids`` as a list of token ids of this model, at least one."""
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
            raise InvalidPromptError(f"{param} must be a list of integers", request_id=request_id, param=param)
        if not ids:
            raise InvalidPromptError(f"{param} is empty; give at least one token", request_id=request_id, param=param)
        for place, token in enumerate(ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise InvalidPromptError(
                    f"{param}[{place}] is {token!r}; token ids are integers from 0 to {self.vocab_size - 1}",
                    request_id=request_id,
                    param=param,
                )
        return list(ids)

    def check_length(self, num_tokens: int, new_tokens: int, request_id: str) -> None:
        """Whether the context and the memory budget can hold a prompt and at least ``new_tokens`` more.

        Raises:
            PromptTooLongError, MemoryBudgetError
        """
        if num_tokens + new_tokens > self.max_model_len:
            left = f", and at least {new_tokens} must be left to generate" if new_tokens else ""
            raise PromptTooLongError(
                # OpenAI's and vLLM's words, by which clients know that they have to shorten a prompt.
                f"This model's maximum context length is {self.max_model_len} tokens. However, the prompt has "
                f"{num_tokens} tokens{left}",
                request_id=request_id,
                param="prompt",
            )
        if num_tokens > self.max_cached_tokens:
            raise MemoryBudgetError(
                f"the prompt has {num_tokens} tokens; the memory budget holds the keys and values of "
                f"{self.max_cached_tokens}; raise `memory` or shorten the prompt",
                request_id=request_id,
                param="prompt",
            )

    def check_params(self, params: SamplingParams, request_id: str) -> None:
        """What :class:`SamplingParams` cannot check by itself, because it needs the model.

        Raises:
            InvalidSamplingParamsError
        """
        if not isinstance(params, SamplingParams):
            raise InvalidSamplingParamsError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}", request_id=request_id
            )
        if params.structured_outputs is not None and not self.grammars:
            raise InvalidSamplingParamsError(
                "structured_outputs cannot be used with tensor_parallel: which tokens a grammar allows is known after "
                "another time in each process",
                request_id=request_id,
                param="structured_outputs",
            )
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids or ())):
            outside = [token for token in ids if token >= self.vocab_size]
            if outside:
                raise InvalidSamplingParamsError(
                    f"{name} holds {outside[0]}; token ids of this model are below {self.vocab_size}",
                    request_id=request_id,
                    param=name,
                )
        form = params.structured_outputs
        for name, texts in (("stop", params.stop), ("structured_outputs", None if form is None else form.to_dict())):
            found = find_lone_surrogate(texts, name)
            if found is not None:
                raise InvalidSamplingParamsError(found.reason, request_id=request_id, param=name)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self.vocab_size:
                raise InvalidSamplingParamsError(
                    f"{name} is {value}; the vocabulary has {self.vocab_size} tokens", request_id=request_id, param=name
                )
