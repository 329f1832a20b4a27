"""OpenAI's request and response bodies, as far as Gossamer can honour them.

`requests` reads a body and refuses, by name, whatever would otherwise be ignored; `responses` builds what goes back.
Nothing here knows whether the body came from a batch file or over HTTP.
"""

from gossamer.protocol.requests import ChatCompletionRequest, CompletionRequest
from gossamer.protocol.responses import chat_completion_response, completion_response, error_body
from gossamer.protocol.streaming import StreamedAnswer

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "StreamedAnswer",
    "chat_completion_response",
    "completion_response",
    "error_body",
]
