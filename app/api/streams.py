"""A job's log as server-sent events."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

from fastapi.responses import StreamingResponse
from sqlalchemy import Row
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.api.dependencies import Resources
from app.api.errors import error_content
from app.api.schemas.base import unix
from app.db.session import transaction
from app.domain.identifiers import parse_id, public_id
from app.domain.scopes import Caller
from app.errors import BadRequest, NotFound, Unauthorized, Unavailable
from app.services.following import Chapter, find_start, read_chapter

RETRY_MILLISECONDS: Final = 2000
HEADERS: Final = {"x-accel-buffering": "no"}  # nginx would keep events back
DONE: Final = b"data: [DONE]\n\n"
#: Without an empty line after it: the openai client takes one for the end of an event, of no data.
PING: Final = b": ping\n"

#: What the OpenAPI document says of a route that can stream.
STREAMED: Final[Mapping[int | str, dict[str, Any]]] = {
    200: {
        "description": "A page of events; with `stream=true` all of them as server-sent events, as they happen.",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": "id: ftevent-...\n"
                'data: {"id": "ftevent-...", "object": "fine_tuning.job.event", ...}\n\n'
                "data: [DONE]\n\n",
            }
        },
    }
}


async def open_stream(
    resources: Resources,
    caller: Caller,
    job_id: UUID,
    *,
    after: UUID | None,
    last_event_id: str | None,
) -> StreamingResponse:
    """The events of a job after the last that the client saw, until the job has ended.

    Args:
        resources: The process's.
        caller: Whose job it has to be.
        job_id: The job.
        after: An event; those that came later are sent.
        last_event_id: The same as a reconnecting client says it; it wins.

    Raises:
        NotFound: The project has no such job, or the job no event `after`.
        BadRequest: The job has no event of `last_event_id`.
    """
    last = after if last_event_id is None else _parse_last(last_event_id)

    def find() -> int | None:
        with transaction(resources.session_factory) as session:
            return find_start(session, caller.project_id, job_id, last)

    start = await resources.room.look(find)
    if start is None and last_event_id is not None:
        raise _unknown(last_event_id)
    if start is None:
        raise NotFound("after: the job has no event with this id.", "after")
    return StreamingResponse(
        follow(resources, caller, job_id, start), media_type="text/event-stream", headers=HEADERS
    )


async def follow(
    resources: Resources, caller: Caller, job_id: UUID, start: int
) -> AsyncIterator[bytes]:
    """The stream's bytes; leaving it frees everything it held."""
    room = resources.room
    ends_at = time.monotonic() + resources.settings.max_stream_seconds
    ping_seconds = resources.settings.stream_ping_seconds
    quiet_until = time.monotonic() + ping_seconds
    yield b"retry: %d\n" % RETRY_MILLISECONDS
    try:
        with room.watch(job_id, caller, seen=start) as watch:
            while True:
                chapter = await room.look(partial(_read, resources, job_id, watch.seen))
                if chapter.lines:
                    watch.seen = chapter.lines[-1].sequence
                    yield b"".join(map(show_line, chapter.lines))
                if chapter.is_last:
                    yield DONE
                    return
                now = time.monotonic()
                if chapter.lines:
                    quiet_until = now + ping_seconds
                if chapter.is_full:
                    continue
                if room.is_closing or now >= ends_at:
                    yield show_error(Unavailable("The stream ends; go on after its last event."))
                    return
                if now >= quiet_until:
                    quiet_until = now + ping_seconds
                    yield PING
                await room.wait(watch, min(quiet_until, ends_at) - now)
    except (Unauthorized, Unavailable) as error:
        yield show_error(error)
    except (OperationalError, PoolTimeout):
        yield show_error(Unavailable("The database cannot be reached; try again."))


def show_line(line: Row[*tuple[Any, ...]]) -> bytes:
    """An event with its id, as `EventObject` shows it."""
    key, created_at, level, message, kind, data, sequence = line
    assert isinstance(created_at, datetime)
    event_id = public_id("event", key)
    shown = {
        "id": event_id,
        "object": "fine_tuning.job.event",
        "created_at": unix(created_at),
        "level": level,
        "message": message,
        "type": kind,
        "data": data,
        "sequence": sequence,
    }
    return f"id: {event_id}\ndata: {json.dumps(shown)}\n\n".encode()


def show_error(error: Unauthorized | Unavailable) -> bytes:
    """An error in a stream that has begun; the openai client raises it."""
    return f"data: {error_content(error).model_dump_json()}\n\n".encode()


def _read(resources: Resources, job_id: UUID, after: int) -> Chapter:
    with transaction(resources.session_factory) as session:
        return read_chapter(session, job_id, after=after)


def _parse_last(text: str) -> UUID:
    try:
        return parse_id("event", text)
    except NotFound:
        raise _unknown(text) from None


def _unknown(text: str) -> BadRequest:
    return BadRequest(
        f"Last-Event-ID: the job has no event '{text[:80]}'.", "Last-Event-ID", "unknown_event_id"
    )
