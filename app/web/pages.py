"""The dashboard, the page of the API's operations and their assets, with the headers that keep foreign code out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Final

from fastapi import APIRouter, Request, Response

from app.errors import NotFound

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MEDIA_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        # Asked again each time and answered 304: a new release shows at once.
        "cache-control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True)
class Document:
    """A packaged file as it goes out."""

    content: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """The file, or 304 where the browser has it already."""
        headers = {**HEADERS, "etag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def build_router(*, with_docs: bool = True) -> APIRouter:
    """The routes `/`, `/docs` and `/assets/{name}`; the files are read once, here.

    The pages hold no data: they ask the API, under `/v1` with the key that the reader pastes.

    Args:
        with_docs: Whether there is a page of the API's operations.
    """
    package = files("app.web")
    page = _load(package / "templates" / "dashboard.html")
    assets = {entry.name: _load(entry) for entry in (package / "assets").iterdir()}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    def dashboard(request: Request) -> Response:
        return page.answer(request)

    if with_docs:
        docs = _load(package / "templates" / "docs.html")

        @router.api_route("/docs", methods=["GET", "HEAD"])
        def describe(request: Request) -> Response:
            return docs.answer(request)

    @router.api_route("/assets/{name}", methods=["GET", "HEAD"])
    def asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise NotFound(f"The dashboard has no asset '{name[:80]}'.")
        return assets[name].answer(request)

    return router


def _load(entry: Traversable) -> Document:
    content = entry.read_bytes()
    suffix = entry.name[entry.name.rindex(".") :]
    digest = hashlib.sha256(content).hexdigest()
    return Document(content, MEDIA_TYPES[suffix], f'"{digest[:32]}"')
