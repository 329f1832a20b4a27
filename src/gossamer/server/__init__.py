"""The HTTP server: OpenAI's API over one engine.

    socket -> http_protocol -> middleware -> routes -> Answering -> EngineLoop -> Engine

`create_app` makes the ASGI application of one model, `create_front` that of several, each in a process of its own;
`serve` runs it until it is told to stop. docs/explanation/server.md follows
one request through these files.
"""

from gossamer.server.app import create_app
from gossamer.server.front import create_front
from gossamer.server.model_pool import ModelSpec
from gossamer.server.options import ServerOptions
from gossamer.server.run import serve

__all__ = ["ModelSpec", "ServerOptions", "create_app", "create_front", "serve"]
