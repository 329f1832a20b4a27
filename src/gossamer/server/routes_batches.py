"""``/v1/files`` and ``/v1/batches``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse

from gossamer.errors import RequestError
from gossamer.protocol import all_bodies
from gossamer.protocol.fields import Fields
from gossamer.server.documented import errors, json_body
from gossamer.server.http import parse_body, read_body, read_form
from gossamer.server.service import Service

router = APIRouter(tags=["batches"])
PART_BYTES = 1 << 20
Limit = Annotated[int, Query(ge=1, le=10_000)]
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


class BatchRequest(Fields):
    """A batch over an uploaded file."""

    input_file_id: str
    endpoint: Literal[tuple(all_bodies())]  # type: ignore[valid-type]  # known when the module is read
    completion_window: Literal["24h"]
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = None


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _page(objects: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Up to ``limit`` objects, those behind the one of id ``after``."""
    ids = [each["id"] for each in objects]
    if after is not None and after not in ids:
        raise RequestError(f"there is no {after!r} in the list", param="after")
    objects = objects[ids.index(after) + 1 if after is not None else 0 :]
    more, objects = len(objects) > limit, objects[:limit]
    ends = {"first_id": objects[0]["id"] if objects else None, "last_id": objects[-1]["id"] if objects else None}
    return {"object": "list", "data": objects, "has_more": more} | ends


@router.post("/v1/files", responses=errors(400, 408, 413, 415, 507), openapi_extra=_UPLOAD)
async def upload(request: Request) -> JSONResponse:
    """Upload the input of a batch: one request per line."""
    files = _service(request).ready.files
    form = await read_form(request)
    try:
        file, purpose = form.get("file"), form.get("purpose")
        unknown = [name for name in form if name not in ("file", "purpose")]
        if unknown:
            raise RequestError(f"{unknown[0]} is not supported", param=unknown[0])
        if not isinstance(file, UploadFile):
            raise RequestError("file is missing", param="file")
        if purpose != "batch":
            raise RequestError(f"purpose must be batch, got {purpose!r}", param="purpose")
        stored = await files.save(_parts(file), file.filename or "upload.jsonl", "batch")
    finally:
        await form.close()
    return JSONResponse(stored.to_dict())


async def _parts(file: UploadFile) -> AsyncIterator[bytes]:
    while part := await file.read(PART_BYTES):
        yield part


@router.get("/v1/files", responses=errors(400))
async def list_files(
    request: Request,
    after: str | None = None,
    limit: Limit = 10_000,
    purpose: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """All files, the newest first; with ``order`` ``asc`` the oldest."""
    files = _service(request).ready.files.all(oldest_first=order == "asc")
    return _page([each.to_dict() for each in files if purpose in (None, each.purpose)], after, limit)


@router.get("/v1/files/{file_id}", responses=errors(404))
async def get_file(request: Request, file_id: str) -> dict[str, Any]:
    """What is known of a file."""
    return _service(request).ready.files.get(file_id).to_dict()


@router.get("/v1/files/{file_id}/content", responses={200: {"content": {"application/jsonl": {}}}, **errors(404)})
async def file_content(request: Request, file_id: str) -> FileResponse:
    """What is in a file."""
    files = _service(request).ready.files
    files.get(file_id)
    return FileResponse(files.path(file_id), media_type="application/jsonl")


@router.delete("/v1/files/{file_id}", responses=errors(404))
async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Remove a file."""
    _service(request).ready.files.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.post("/v1/batches", responses=errors(400, 404, 408, 413, 415, 507), openapi_extra=json_body(BatchRequest))
async def create_batch(request: Request) -> JSONResponse:
    """Answer a file of requests, beside those of other clients."""
    batches = _service(request).ready.batches
    body = await read_body(request, partial(parse_body, BatchRequest))
    batch = batches.create(
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        metadata=body.metadata,
    )
    return JSONResponse(batch.to_dict())


@router.get("/v1/batches", responses=errors(400))
async def list_batches(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """All batches, the newest first."""
    return _page([each.to_dict() for each in _service(request).ready.batches.all()], after, limit)


@router.get("/v1/batches/{batch_id}", responses=errors(404))
async def get_batch(request: Request, batch_id: str) -> dict[str, Any]:
    """Where a batch stands."""
    return _service(request).ready.batches.get(batch_id).to_dict()


@router.post("/v1/batches/{batch_id}/cancel", responses=errors(400, 404))
async def cancel_batch(request: Request, batch_id: str) -> dict[str, Any]:
    """End a batch; answers that are complete are kept."""
    return _service(request).ready.batches.cancel(batch_id).to_dict()
