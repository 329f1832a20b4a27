"""JSON from outside: whatever is wrong with it is a ``ValueError`` of ours that says what."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class InvalidJsonError(ValueError):
    """Bytes that are no usable JSON.

    Attributes:
        code: ``"invalid_utf8"`` or ``"invalid_json"``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def decode_json(raw: bytes, what: str) -> Any:
    """The value that ``raw`` holds; messages call it ``what``.

    Raises:
        InvalidJsonError: it is no UTF-8, no JSON (``NaN`` is none), or nested too deeply.

    >>> decode_json(b'{"top_p": NaN}', "the line")
    Traceback (most recent call last):
    ...
    gossamer.protocol.decoding.InvalidJsonError: the line is not JSON: NaN is no JSON number
    """
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        message = f"{what} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}"
        raise InvalidJsonError("invalid_utf8", message) from None
    except RecursionError:
        raise InvalidJsonError("invalid_json", f"{what} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise InvalidJsonError("invalid_json", f"{what} is not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
