"""``/``: a page to try the model with."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import HTMLResponse

router = APIRouter()
# Everything is in the one file; it may load nothing and call nobody but its own server.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/", include_in_schema=False)
async def playground() -> HTMLResponse:
    page = resources.files("gossamer.server").joinpath("playground/index.html").read_text("utf-8")
    return HTMLResponse(page, headers={"content-security-policy": _POLICY, "cache-control": "no-cache"})
