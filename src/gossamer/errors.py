"""Every error Gossamer raises on purpose.

All of them derive from :class:`GossamerError`, say what was wrong, where, and what to do about it. Errors that concern
one request of many derive from :class:`RequestError` and carry ``request_id``: the other requests finish regardless.

>>> str(PromptTooLongError("the prompt is too long", request_id="request-7"))
'request-7: the prompt is too long'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.outputs import BeamSearchOutput, RequestOutput, ScoreOutput


class GossamerError(Exception):
    """Base class of all errors raised on purpose."""


class ConfigurationError(GossamerError, ValueError):
    """An argument of the engine, of a command or of an operator is out of its range."""


class ModelNotFoundError(GossamerError, FileNotFoundError):
    """The model argument names nothing that can be found here."""

    # FileNotFoundError formats itself from errno; ours is a plain message.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(GossamerError, ValueError):
    """The model exists, but its architecture or a setting of it cannot be run exactly."""


class AdapterError(GossamerError, ValueError):
    """An adapter does not fit the model, or has a setting that cannot be computed exactly."""


class DownloadError(GossamerError):
    """A model package could not be fetched."""


class CheckpointError(GossamerError):
    """A checkpoint or download on disk is damaged or incomplete."""


class OutputError(GossamerError):
    """What was made cannot be written: the disk is full or gone, or the file grew beyond what is allowed."""


class PeerError(GossamerError):
    """Another project that was to be measured beside Gossamer cannot be asked, or gives no usable answer.

    Attributes:
        peer: its name.
        stderr: the last lines it wrote there.
    """

    def __init__(self, message: str, *, peer: str, stderr: list[str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.peer = peer
        self.stderr = stderr or []

    def __str__(self) -> str:
        return "\n    ".join([f"{self.peer} {self.message}", *self.stderr])


class RequestError(GossamerError, ValueError):
    """Something is wrong with one request.

    Attributes:
        request_id: the request, or ``None`` when the value was checked before it belonged to a request.
        param: the field that is wrong, where one can be named.
        outputs: filled by the methods of :class:`gossamer.LLM`: the outputs of the whole call, finished ones included.
    """

    def __init__(self, message: str, *, request_id: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.param = param
        self.outputs: list[RequestOutput] | list[ScoreOutput] | list[BeamSearchOutput] = []

    def __str__(self) -> str:
        return f"{self.request_id}: {self.message}" if self.request_id else self.message


class ResponseNotFoundError(RequestError):
    """A request goes on from a response that the server does not have."""


class InvalidPromptError(RequestError):
    """The prompt is empty, of the wrong type, or holds token ids outside the vocabulary."""


class PromptTooLongError(InvalidPromptError):
    """The prompt does not fit into the model's context."""


class InvalidSamplingParamsError(RequestError):
    """A sampling parameter is out of its range."""


class MemoryBudgetError(RequestError):
    """The request's keys and values cannot fit into the memory budget, even alone."""


class EngineError(RequestError):
    """Something went wrong inside the engine while it computed the request; the request itself may be fine."""


class ShuttingDownError(EngineError):
    """The server ends before the request has."""


class ServerBusyError(RequestError):
    """The server cannot take the request now.

    Attributes:
        retry_after: seconds after which it is worth another try.
    """

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
