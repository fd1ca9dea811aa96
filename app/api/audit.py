"""The layer that gives every call that may change something its trail, and notes those that were refused."""

from typing import Any, Final

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db.session import SessionFactory, transaction
from app.services.audit import Trail, find_trail, following, sign

log = structlog.get_logger()

READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
FAILED: Final = 500


class AuditTrail:
    """Opens a trail for each call that is no read, and sees to it that there is an entry before the answer.

    Routes sign in the transaction of their change. What is left is written here, in a transaction of its own and
    before the answer's first byte: refused calls, and replays of an earlier answer. A call whose key is not known,
    or that is over its rate, leaves none: who it is, is not proven, and its number is not bounded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or scope["method"] in READS:
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        trail = Trail(
            method=scope["method"],
            route=scope["path"],
            request_id=scope.get("state", {}).get("request_id"),
            address=client[0] if client else None,
        )

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                await _note_rest(scope, trail, message["status"])
            await send(message)

        with following(trail):
            try:
                await self._app(scope, receive, send_noted)
            except Exception:
                await _note_rest(scope, trail, FAILED)
                raise


def name_place(scope: Any) -> None:  # noqa: ANN401 - a request's scope
    """Puts the route that was found, and the ids in its path, on the trail of the call that runs here."""
    trail = find_trail()
    if trail is not None and "route" in scope:
        trail.route = scope["route"].path
        trail.object_ids = [str(value) for value in scope.get("path_params", {}).values()]


async def _note_rest(scope: Scope, trail: Trail, status: int) -> None:
    is_done = trail.is_signed and status < 400  # an error took the signed transaction back
    if trail.actor is None or is_done:
        return
    factory: SessionFactory = scope["app"].state.resources.session_factory
    try:
        await run_in_threadpool(_write, factory, status)
    except SQLAlchemyError:
        # The database is away: the answer says so itself, most often; the log has the rest.
        log.exception("audit.not_recorded", actor=trail.actor, route=trail.route, status=status)
    trail.is_signed = True


def _write(factory: SessionFactory, status: int) -> None:
    with transaction(factory) as session:
        sign(session, status=status)
