"""Idempotency keys: the second request with a key gets the first one's answer."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.repositories.idempotency import IdempotencyRepository
from app.db.session import SessionFactory, transaction
from app.errors import BadRequest, Conflict, UnprocessableKey

KEPT: Final = timedelta(hours=24)
#: No request that holds a key runs longer: the database ends a transaction after a minute.
LONGEST: Final = timedelta(minutes=2)
MAX_KEY: Final = 255
HEADER: Final = "Idempotency-Key"


class RequestRunning(Conflict):
    """The first request with this key has not ended; the one conflict worth trying again."""

    code = "idempotency_request_running"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request with a key."""

    project_id: UUID
    key: str
    route: str  # method and path
    body_sha256: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A response body, and whether it was given before."""

    body: dict[str, Any]
    is_replay: bool


def parse_key(header: str | None) -> str | None:
    """The key of a header, which may be quoted as the IETF draft has it.

    Raises:
        BadRequest: It is empty, too long or not printable.
    """
    if header is None:
        return None
    key = header.strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable() or not key.isascii():
        raise BadRequest(f"{HEADER}: give 1 to {MAX_KEY} printable characters.", HEADER)
    return key


def hash_body(body: object) -> str:
    """SHA-256 over canonical JSON, so that the order of keys does not matter."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def run_once(
    factory: SessionFactory,
    attempt: Attempt,
    work: Callable[[Session], dict[str, Any]],
    *,
    hidden: str | None = None,
) -> Answer:
    """Does the work of the first request with a key, and gives later ones its answer.

    Work and answer are committed together: a crash in between leaves neither. A request that fails gives the
    key back.

    Args:
        factory: Opens the transactions.
        attempt: The request.
        work: Makes the answer, in the session it gets.
        hidden: A field of the answer that later requests don't get: a secret is not kept.

    Raises:
        UnprocessableKey: The key was used for another request.
        RequestRunning: The first request has not ended.
    """
    with transaction(factory) as session:
        repository = IdempotencyRepository(session)
        repository.forget(attempt.project_id, attempt.key, answered=KEPT, running=LONGEST)
        is_first = repository.claim(
            attempt.project_id,
            attempt.key,
            route=attempt.route,
            body_sha256=attempt.body_sha256,
        )
        if not is_first:
            return Answer(_recorded(repository, attempt), is_replay=True)
    try:
        with transaction(factory) as session:
            body = work(session)
            kept = {name: value for name, value in body.items() if name != hidden}
            IdempotencyRepository(session).answer(
                attempt.project_id, attempt.key, status_code=200, response=kept
            )
    except BaseException:
        with transaction(factory) as session:
            IdempotencyRepository(session).release(attempt.project_id, attempt.key)
        raise
    return Answer(body, is_replay=False)


def _recorded(repository: IdempotencyRepository, attempt: Attempt) -> dict[str, Any]:
    row = repository.find(attempt.project_id, attempt.key)
    if row is not None and (row.route, row.body_sha256) != (attempt.route, attempt.body_sha256):
        raise UnprocessableKey(
            f"{HEADER}: the key was used for another request; take a new one.", HEADER
        )
    if row is None or row.response is None:
        raise RequestRunning(
            f"{HEADER}: the first request with this key is still running; try again.", HEADER
        )
    return row.response
