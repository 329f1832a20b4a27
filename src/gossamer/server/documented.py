"""What the OpenAPI document says about bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or unknown.",
    403: "A web page of another origin asks, or the server is called by a name that is not its own.",
    404: "What the request names does not exist.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not of a type that can be read.",
    429: "Too many requests are waiting; Retry-After says when to come again.",
    500: "The engine failed on this request.",
    503: "The server is loading its model, or shutting down.",
    504: "The answer took too long.",
    507: "The server's disk is full.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may answer with these."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in (401, 403, 503, *statuses)}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route that reads a body of this model."""
    schema = _inline(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without references, which would point into a document of their own."""
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rpartition("/")[2]])
            return {key: resolve(each) for key, each in value.items()}
        return [resolve(each) for each in value] if isinstance(value, list) else value

    resolved: dict[str, Any] = resolve(schema)
    return resolved
