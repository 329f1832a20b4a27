"""The endpoints: a new one is a body class here, and a page in the documentation."""

from __future__ import annotations

from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.chat import ChatCompletionRequest
from gossamer.protocol.completions import CompletionRequest
from gossamer.protocol.messages import MessagesRequest
from gossamer.protocol.model_responses import ResponsesRequest
from gossamer.protocol.pooling import EmbeddingsRequest, PoolingBody, RerankRequest, ScoreRequest

#: Those that generate text, by url. The server makes its routes from this; batch files may name these urls.
BODIES: dict[str, type[GeneratingBody]] = {
    body.url: body for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest, MessagesRequest)
}

#: Those that answer with vectors or scores, by url; batch files may name these as well.
POOLING_BODIES: dict[str, type[PoolingBody]] = {
    body.url: body for body in (EmbeddingsRequest, RerankRequest, ScoreRequest)
}


def all_bodies() -> dict[str, type[GeneratingBody] | type[PoolingBody]]:
    """Every body class by url."""
    return {**BODIES, **POOLING_BODIES}
