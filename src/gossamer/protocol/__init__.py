"""OpenAI's request and response bodies, as far as Gossamer can honour them.

A body class refuses, by name, whatever would otherwise be ignored; it says what the engine is asked, and builds what
goes back. `BODIES` and `POOLING_BODIES` list these classes. Nothing here knows whether a body came from a batch file or
over HTTP.
"""

from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.errors import error_body, shortened
from gossamer.protocol.pooling import PoolingBody
from gossamer.protocol.requests import (
    BODIES,
    POOLING_BODIES,
    ChatCompletionRequest,
    CompletionRequest,
    all_bodies,
)
from gossamer.protocol.responses import chat_completion_response, completion_response
from gossamer.protocol.streaming import StreamedAnswer

__all__ = [
    "BODIES",
    "POOLING_BODIES",
    "ChatCompletionRequest",
    "CompletionRequest",
    "GeneratingBody",
    "PoolingBody",
    "StreamedAnswer",
    "all_bodies",
    "chat_completion_response",
    "completion_response",
    "error_body",
    "shortened",
]
