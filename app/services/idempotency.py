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
    """A request with a key, which means something within its project and route alone."""

    project_id: UUID
    key: str
    route: str  # method and path
    body_sha256: str

    @property
    def place(self) -> tuple[UUID, str, str]:
        """What its row is found by."""
        return self.project_id, self.route, self.key


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, and whether it was given before."""

    body: dict[str, Any]
    is_replay: bool
    status_code: int = 200


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


def find_answer(factory: SessionFactory, attempt: Attempt) -> Answer | None:
    """The answer to an earlier request with this key, for routes that prepare much before their work.

    Raises:
        UnprocessableKey: The key was used for another body.
        RequestRunning: The first request has not ended.
    """
    with transaction(factory) as session:
        repository = IdempotencyRepository(session)
        repository.forget(*attempt.place, answered=KEPT, running=LONGEST)
        return None if repository.find(*attempt.place) is None else _recorded(repository, attempt)


def run_once(
    factory: SessionFactory,
    attempt: Attempt,
    work: Callable[[Session], dict[str, Any]],
    *,
    hidden: str | None = None,
    status_code: int = 200,
) -> Answer:
    """Does the work of the first request with a key, and gives later ones its answer.

    Work and answer are committed together: a crash in between leaves neither. A request that fails gives the
    key back.

    Args:
        factory: Opens the transactions.
        attempt: The request.
        work: Makes the answer, in the session it gets.
        hidden: A field of the answer that later requests don't get: a secret is not kept.
        status_code: Of the answer.

    Raises:
        UnprocessableKey: The key was used for another body.
        RequestRunning: The first request has not ended.
    """
    with transaction(factory) as session:
        repository = IdempotencyRepository(session)
        repository.forget(*attempt.place, answered=KEPT, running=LONGEST)
        if not repository.claim(*attempt.place, body_sha256=attempt.body_sha256):
            return _recorded(repository, attempt)
    try:
        with transaction(factory) as session:
            body = work(session)
            kept = {name: value for name, value in body.items() if name != hidden}
            IdempotencyRepository(session).answer(
                *attempt.place, status_code=status_code, response=kept
            )
    except BaseException:
        with transaction(factory) as session:
            IdempotencyRepository(session).release(*attempt.place)
        raise
    return Answer(body, is_replay=False, status_code=status_code)


def _recorded(repository: IdempotencyRepository, attempt: Attempt) -> Answer:
    row = repository.find(*attempt.place)
    if row is not None and row.body_sha256 != attempt.body_sha256:
        raise UnprocessableKey(
            f"{HEADER}: the key was used for another body; take a new one.", HEADER
        )
    if row is None or row.response is None:
        raise RequestRunning(
            f"{HEADER}: the first request with this key is still running; try again.", HEADER
        )
    return Answer(row.response, is_replay=True, status_code=row.status_code or 200)
