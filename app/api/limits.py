"""Pure ASGI layers under the routes: request ids and headers, limits of bodies, strict JSON."""

import json
import re
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import anyio.to_thread
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import answer_error, envelope
from app.domain.jsonlines import MAX_DEPTH
from app.errors import BadRequest, TooLarge

if TYPE_CHECKING:
    from app.services.rate_limits import Allowance

log = structlog.get_logger()

REQUEST_ID: Final = "x-request-id"
SECURITY_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
STRICT_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
#: They count their bodies themselves, as they come.
UPLOAD_PATHS: Final = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
#: A refused body is read on and thrown away up to so much: a sender that is reset does not see the answer.
DRAIN_BYTES: Final = 2**30
DRAIN_SECONDS: Final = 120.0
MAX_KEYS: Final = 1_000  # of one object: each unknown one becomes an error that is put into words
SMALL_BYTES: Final = 2**16  # bodies up to this are parsed at once, larger ones in a thread

#: A client's own id is taken over when it cannot do harm in a header or a log.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class RequestFrame:
    """The outermost layer: a request id, headers of limits and security, the envelope of what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else f"req_{uuid4().hex}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        has_started = False

        async def send_framed(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                allowance: Allowance | None = state.get("allowance")
                if allowance is not None and allowance.limit:
                    headers["x-ratelimit-limit-requests"] = str(allowance.limit)
                    headers["x-ratelimit-remaining-requests"] = str(allowance.remaining)
                    headers["x-ratelimit-reset-requests"] = f"{allowance.reset_seconds}s"
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("content-security-policy", STRICT_POLICY)
            await send(message)

        try:
            await self._app(scope, receive, send_framed)
        except Exception:
            # The one top-level handler: the client gets the id, the log the rest.
            log.exception("api.request_failed", request_id=request_id, path=scope["path"])
            if has_started:
                raise
            answer = envelope(
                500, f"The server failed; its log has it under {request_id}.", code="server_error"
            )
            await answer(scope, receive, send_framed)


class BodyLimits:
    """Reads a JSON body whole, counting what really comes, and refuses it before a route sees it.

    Args:
        app: The layer below.
        max_bytes: Of a JSON body.
        larger: Other limits by path, in which a `*` stands for an id.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, larger: Mapping[str, int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if (
            scope["type"] != "http"
            or scope["method"] in _BODILESS
            or (scope["method"] == "POST" and UPLOAD_PATHS.fullmatch(scope["path"]))
        ):
            await self._app(scope, receive, send)
            return
        limit = next(
            (size for path, size in self._larger.items() if fnmatchcase(scope["path"], path)),
            self._max_bytes,
        )
        try:
            body = await read_body(receive, limit)
            if body and "json" in Headers(scope=scope).get("content-type", ""):
                if len(body) <= SMALL_BYTES:
                    check_json(body)
                else:
                    await anyio.to_thread.run_sync(check_json, body)
        except (BadRequest, TooLarge) as error:
            await answer_error(error)(scope, receive, send)
            return
        is_given = False

        async def receive_again() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_again, send)


async def read_body(receive: Receive, limit: int) -> bytes:
    """A whole body.

    Raises:
        TooLarge: It is over the limit; what there was of it has been read and thrown away.
    """
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break  # the client is gone; nobody reads the answer
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            body.clear()
            if more:
                await drain(receive)
            raise TooLarge(f"The body is larger than the limit of {limit:,} bytes.")
    return bytes(body)


async def drain(receive: Receive) -> None:
    """Reads a body on and throws it away, within bounds of size and time."""
    left, ends_at = DRAIN_BYTES, time.monotonic() + DRAIN_SECONDS
    while left > 0 and time.monotonic() < ends_at:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def check_json(body: bytes) -> None:
    """Refuses JSON that readers could take differently, or that Postgres cannot hold.

    Raises:
        BadRequest: Not JSON, a key given twice, NaN or Infinity, nesting deeper than 32, a NUL character or
            half a surrogate pair.
    """
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise _invalid(f"it is nested deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError:
        raise _invalid("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _invalid(str(error)) from None
    _check_value(value)


def _check_value(value: object) -> None:
    stack: list[tuple[object, int]] = [(value, 0)]
    while stack:
        at, depth = stack.pop()
        if isinstance(at, str):
            _check_text(at)
            continue
        if not isinstance(at, dict | list):
            continue
        if depth >= MAX_DEPTH:
            raise _invalid(f"it is nested deeper than {MAX_DEPTH}")
        if isinstance(at, dict):
            for key in at:
                _check_text(key)
        inner = at.values() if isinstance(at, dict) else at
        stack.extend((item, depth + 1) for item in inner)


def _check_text(text: str) -> None:
    if text.isascii() and "\0" not in text:
        return
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _invalid("it holds a NUL character or half a surrogate pair")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise _invalid(f"an object has more than {MAX_KEYS:,} keys")
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _invalid(f"the key {json.dumps(key[:80])} occurs twice")
            seen.add(key)
    return value


def _refuse_constant(name: str) -> float:
    raise _invalid(f"{name} is not a JSON number")


def _invalid(problem: str) -> BadRequest:
    return BadRequest(f"The body is not acceptable JSON: {problem}.", None, "invalid_json")
