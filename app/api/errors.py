"""Every error as OpenAI's envelope, and the one table from errors to HTTP status."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.errors import (
    BadRequest,
    Conflict,
    Fenced,
    Forbidden,
    NotFound,
    PreconditionFailed,
    QuotaExceeded,
    RetainError,
    TooLarge,
    TrainingFailed,
    Unauthorized,
    Unavailable,
    UnprocessableKey,
)
from app.services.idempotency import RequestRunning
from app.services.rate_limits import Allowance, RateLimited

log = structlog.get_logger()

#: A subclass that is not named here has its parent's status.
STATUS_BY_ERROR: Final[Mapping[type[RetainError], int]] = MappingProxyType(
    {
        BadRequest: 400,
        Unauthorized: 401,
        Forbidden: 403,
        NotFound: 404,
        Conflict: 409,
        PreconditionFailed: 412,
        TooLarge: 413,
        UnprocessableKey: 422,
        QuotaExceeded: 429,
        Unavailable: 503,
        # A bug when they reach a client: both belong to workers.
        Fenced: 500,
        TrainingFailed: 500,
        RetainError: 500,
    }
)

TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        409: "conflict_error",
        422: "idempotency_error",
        429: "rate_limit_error",
    }
)
CODES: Final[Mapping[int, str]] = MappingProxyType(
    {404: "route_not_found", 405: "method_not_allowed", 413: "request_too_large"}
)

#: So many faults of one request are looked at: comparing each with each, a body of 90,000 wrong fields took minutes.
MAX_ERRORS: Final = 100
#: Answers that the client would send again by itself although nothing would change.
FINAL: Final = frozenset({409, 429})


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorDetail


def status_of(error: RetainError) -> int:
    """The HTTP status of an error: its own class's, else its nearest parent's."""
    return next(STATUS_BY_ERROR[kind] for kind in type(error).mro() if kind in STATUS_BY_ERROR)


def envelope(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error's response."""
    content = _content(status, message, param, code)
    all_headers = dict(headers or {})
    if status in FINAL:
        all_headers.setdefault("x-should-retry", "false")
    if status == HTTPStatus.UNAUTHORIZED:
        all_headers.setdefault("www-authenticate", "Bearer")
    return JSONResponse(content.model_dump(), status_code=status, headers=all_headers)


def envelope_example(
    status: int, message: str, *, param: str | None, code: str | None
) -> dict[str, Any]:
    """An error's body, as documents show it."""
    return _content(status, message, param, code).model_dump()


def error_content(error: RetainError) -> ErrorBody:
    """The envelope of an error that comes after its answer has begun."""
    return _content(status_of(error), str(error), error.param, error.code)


def _content(status: int, message: str, param: str | None, code: str | None) -> ErrorBody:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def answer_error(error: RetainError, *, retry_after: int = 1) -> JSONResponse:
    """The response to an error that Retain raised on purpose.

    Args:
        error: What was raised.
        retry_after: Seconds after which sending a limited request again makes sense.
    """
    status = status_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("api.unexpected_error", code=error.code, message=error.message)
        return envelope(status, "The server failed.", code="server_error")
    headers = {"retry-after": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    if isinstance(error, RequestRunning):
        headers = {"retry-after": "1", "x-should-retry": "true"}
    if isinstance(error, RateLimited):
        headers = {"retry-after": str(retry_after), "x-should-retry": "true"}
    return envelope(status, str(error), param=error.param, code=error.code, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Puts the envelope on every error, FastAPI's own included."""
    app.add_exception_handler(RetainError, _on_retain_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(DataError, _on_data_error)
    app.add_exception_handler(OperationalError, _on_database_away)
    app.add_exception_handler(PoolTimeout, _on_database_away)


def describe_invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:  # noqa: ANN401
    """What is wrong with a request, as text and as the field's path.

    Of a union's branches only the ones that got furthest speak; names of branches are left out of the path.

    Args:
        errors: As pydantic lists them.
        body: What was sent.
    """
    found = [
        (_path(error, body), str(error["msg"]), str(error["type"])) for error in errors[:MAX_ERRORS]
    ]
    deepest: dict[tuple[str, ...], list[str]] = {}
    for path, message, _ in found:
        if any(len(other) > len(path) and other[: len(path)] == path for other, _, _ in found):
            continue
        text = message.removeprefix("Value error, ")
        messages = deepest.setdefault(path, [])
        if text not in messages:
            messages.append(text)
    path, messages = next(iter(deepest.items()))
    param = ".".join(path) or None
    said = " or ".join(messages)
    more = f" ({len(deepest) - 1} more)" if len(deepest) > 1 else ""
    return (f"{param}: {said}{more}" if param else f"{said}{more}"), param


def _path(error: Mapping[str, Any], body: Any) -> tuple[str, ...]:  # noqa: ANN401
    """The field's path without the names that pydantic gives to a union's branches."""
    location = list(error["loc"])
    if location and location[0] != "body":
        return tuple(str(part) for part in location[1:])
    if location == ["body"] and str(error["type"]).startswith("union_tag"):
        # A body that is a union itself: the field that tells its branches apart is what is wrong.
        return (str(error.get("ctx", {}).get("discriminator", "")).strip("'"),)
    at, path = body, []
    is_absent = error["type"] in {"missing", "union_tag_not_found"}
    for place, part in enumerate(location[1:], start=1):
        is_last = place == len(location) - 1
        is_item = isinstance(part, int) and isinstance(at, list) and part < len(at)
        if is_item or (isinstance(part, str) and isinstance(at, dict) and part in at):
            at = at[part]
        elif not (is_last and is_absent and isinstance(at, dict)):
            continue
        path.append(str(part))
    return tuple(path)


async def _on_retain_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RetainError)
    allowance: Allowance | None = getattr(request.state, "allowance", None)
    return answer_error(error, retry_after=1 if allowance is None else allowance.reset_seconds)


async def _on_invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        reason = errors[0].get("ctx", {}).get("error", "")
        return envelope(400, f"The body is not JSON: {reason}.", code="invalid_json")
    message, param = describe_invalid(errors, error.body)
    return envelope(400, message, param=param, code="invalid_request")


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = str(error.detail)
    if status in {404, 405}:
        message = f"No route answers {request.method} {request.url.path[:200]}."
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["allow"] = ", ".join(_methods_of(request))  # of all routes, not of the first alone
    return envelope(status, message, code=CODES.get(status), headers=headers)


def _methods_of(request: Request) -> list[str]:
    """The methods that some route answers at the request's path."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(
            route.matches(dict(request.scope) | {"method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


async def _on_data_error(_request: Request, _error: Exception) -> JSONResponse:
    # Text that Postgres cannot hold: a NUL character in a path or query.
    return envelope(400, "A value cannot be stored: it holds a character that is not allowed.")


async def _on_database_away(_request: Request, error: Exception) -> JSONResponse:
    log.warning("api.database_away", error=str(error).splitlines()[0])
    return envelope(
        503,
        "The database cannot be reached; try again.",
        code="service_unavailable",
        headers={"retry-after": "1"},
    )
