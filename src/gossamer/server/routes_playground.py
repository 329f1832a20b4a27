"""``/``: a page to talk with the model, and the files that it consists of."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# The page loads nothing but its own files, and calls nobody but its own server. No script of it may write markup:
# what a model says is never read as HTML.
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_FILES = {
    "/" if file.name == "index.html" else f"/playground/{file.name}": file
    for file in resources.files("gossamer.server").joinpath("playground").iterdir()
    if file.name.rpartition(".")[2] in _MEDIA_TYPES
}
PATHS = frozenset(_FILES)  # they say nothing of anybody


def _add_route(path: str) -> None:
    file = _FILES[path]

    async def read() -> Response:
        headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
        media_type = _MEDIA_TYPES[file.name.rpartition(".")[2]]
        return Response(file.read_bytes(), media_type=media_type, headers=headers)

    router.add_api_route(path, read, methods=["GET"], include_in_schema=False)


for _path in sorted(PATHS):
    _add_route(_path)
