"""An engine without a model, for tests of what surrounds the engine. One token is one character.

It answers deterministically: the answer is a function of the prompt and the completion's index. A step brings every
request one token further. `FAKE_LLM_DELAY` (seconds per step) makes a run slow enough to be interrupted.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from types import SimpleNamespace

from gossamer.errors import ConfigurationError, EngineError, InvalidPromptError, PromptTooLongError
from gossamer.outputs import CompletionOutput, Logprob, RequestOutput

CONTEXT = 400


def expected_answer(prompt: str, index: int = 0) -> str:
    return f"{hashlib.sha256(f'{index} {prompt}'.encode()).hexdigest()[:8]} says the model"


def _logprobs(token: int, count: int) -> dict[int, Logprob]:
    """The chosen token has rank 2; the most probable one is the next character of the alphabet."""
    ranked = {token + 1: Logprob(-0.5, 1, chr(token + 1)), token: Logprob(-1.0, 2, chr(token))}
    return {t: logprob for t, logprob in ranked.items() if t == token or logprob.rank <= count}


@dataclass
class _Request:
    output: RequestOutput
    answers: list[str]
    params: object
    stream: bool
    length: int = 0


class FakeEngine:
    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._requests: dict[str, _Request] = {}
        self.peak = 0
        self.steps = 0
        self.aborted: list[str] = []
        self.prompts: list[str] = []

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._requests)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def add_request(self, request_id, prompt, params, *, stream=False) -> None:
        assert request_id not in self._requests
        if isinstance(prompt, dict) and "prompt_token_ids" not in prompt:
            prompt = prompt["prompt"]
        ids = [ord(c) for c in prompt] if isinstance(prompt, str) else prompt["prompt_token_ids"]
        text = "".join(map(chr, ids))
        if not ids:
            raise InvalidPromptError("the prompt is empty", request_id=request_id, param="prompt")
        if len(ids) >= CONTEXT:
            raise PromptTooLongError(
                f"This model's maximum context length is {CONTEXT} tokens. However, the prompt has {len(ids)} tokens",
                request_id=request_id,
                param="prompt",
            )
        self.prompts.append(text)
        output = RequestOutput(request_id, prompt if isinstance(prompt, str) else None, ids, num_cached_tokens=1)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *(_logprobs(token, params.prompt_logprobs) for token in ids[1:])]
        answers = [expected_answer(text, index)[: params.max_tokens] for index in range(params.n)]
        self._requests[request_id] = _Request(output, answers, params, stream)
        self.peak = max(self.peak, len(self._requests))

    def abort(self, request_id: str) -> None:
        # As in the real engine: a request that has just finished can be aborted; nothing is left to do.
        if self._requests.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    @property
    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(steps=self.steps)

    def step_apart(self) -> list[RequestOutput]:
        """A step for each request alone, as the real engine does it: those whose step raises end with the error."""
        requests, ended = self._requests, []
        for request_id, request in list(requests.items()):
            self._requests = {request_id: request}
            try:
                ended += self.step()
            except Exception as error:  # what the tests raise, of any kind
                request.output.error = EngineError(f"the engine failed on this request: {error!r}")
                request.output.finished = True
                self._requests = {}
                ended.append(request.output)
            requests = {k: v for k, v in requests.items() if k != request_id} | self._requests
        self._requests = requests
        return ended

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        time.sleep(self._delay)
        changed = []
        for request_id, request in list(self._requests.items()):
            request.length += 1
            output = request.output
            if "FAIL" in "".join(map(chr, output.prompt_token_ids)):
                output.error = InvalidPromptError("the model cannot answer this", request_id=request_id)
            else:
                output.outputs = [self._completion(request, index) for index in range(len(request.answers))]
            output.finished = output.error is not None or request.length >= max(map(len, request.answers))
            if output.finished:
                del self._requests[request_id]
            if output.finished or request.stream:
                changed.append(output)
        return changed

    @staticmethod
    def _completion(request: _Request, index: int) -> CompletionOutput:
        text = request.answers[index][: request.length]
        completion = CompletionOutput(index, text, [ord(c) for c in text])
        if text == request.answers[index]:
            completion.finish_reason = "length" if len(text) == request.params.max_tokens else "stop"
        if request.params.logprobs is not None:
            completion.logprobs = [_logprobs(token, request.params.logprobs) for token in completion.token_ids]
        return completion


class FakeLLM:
    def __init__(self, model: str = "fake", *, lora: dict[str, str] | None = None, **arguments: object) -> None:
        self.sampling_defaults: dict[str, float] = {}
        self.chat_format = None
        self.fingerprint = "fp_fake"
        self.adapters = dict.fromkeys(lora or {})
        self.generates = True
        self.stored_weights = None
        self.weights, self.weights_note = "float32", ""
        self.model_name = model
        self.runner_note = ""
        self.arguments = arguments
        self.engine = FakeEngine(float(os.environ.get("FAKE_LLM_DELAY", 0)))
        self.tokenizer = SimpleNamespace(
            chat_template=None if model == "base" else "{{ messages }}",
            decode=lambda ids, **options: "".join(map(chr, ids)),
        )

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        assert not self.engine.has_unfinished_requests()

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(to_dict=lambda: {"requests": len(self.engine.prompts), "seconds": 1.0})

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ConfigurationError(f"{self.model_name} has no chat template")
        if messages[-1]["role"] == "assistant":
            raise InvalidPromptError("the chat template refused the messages", param="messages")
        return [ord(c) for c in chat_prompt(messages)]


def chat_prompt(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"
