"""The endpoints that generate text: a new one is a body class here, and a page in the documentation."""

from __future__ import annotations

from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.chat import ChatCompletionRequest
from gossamer.protocol.completions import CompletionRequest
from gossamer.protocol.messages import MessagesRequest
from gossamer.protocol.model_responses import ResponsesRequest

#: By url. The server makes its routes from this; batch files may name these urls.
BODIES: dict[str, type[GeneratingBody]] = {
    body.url: body for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest, MessagesRequest)
}
