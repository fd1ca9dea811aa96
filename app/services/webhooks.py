"""Webhooks: endpoints with their secrets, and events written in the transaction in which they happen."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from cryptography.fernet import MultiFernet
from sqlalchemy import update
from sqlalchemy.orm import Session

from app.db.models import Job, WebhookEndpoint, WebhookEvent
from app.db.repositories.webhook_deliveries import WebhookDeliveryRepository
from app.db.repositories.webhooks import WebhookEndpointRepository
from app.domain.addresses import is_public_host
from app.domain.identifiers import public_id
from app.domain.states import JobKind
from app.errors import BadRequest, Conflict
from app.services.webhook_signing import make_secret

#: Every transition of a job and every decision that changes something, plus what befalls an endpoint.
EVENT_TYPES: Final = (
    "fine_tuning.job.queued",
    "fine_tuning.job.running",
    "fine_tuning.job.pausing",
    "fine_tuning.job.paused",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "retention.regression_detected",
    "retention.strength_raised",
    "retention.strength_lowered",
    "retention.learning_rate_lowered",
    "retention.repaired",
    "retention.rolled_back",
    "retention.stopped",
    "retention.proposed",
    "retention.overridden",
    "registered_model.alias_moved",
    "monitor.regression_detected",
    "monitor.stale",
    "monitor.compensation_failed",
    "webhook_endpoint.disabled",
)
MAX_ENDPOINTS: Final = 50  # per project
ROTATION_OVERLAP: Final = timedelta(hours=24)
_PORTS = frozenset({443, 8443})


class CreatedEndpoint(NamedTuple):
    """An endpoint's row, and the secret that only its maker ever sees."""

    row: WebhookEndpoint
    secret: str


def create_endpoint(
    session: Session,
    cipher: MultiFernet,
    *,
    project_id: UUID,
    name: str,
    url: str,
    event_types: Sequence[str],
    allow_private: bool = False,
) -> CreatedEndpoint:
    """Registers a receiver; the secret is shown here alone and kept encrypted.

    Raises:
        BadRequest: A field cannot be taken as it is; `param` names it.
        Conflict: The project has too many endpoints.
    """
    repository = WebhookEndpointRepository(session)
    check_url(url, allow_private=allow_private)
    if repository.count(project_id) >= MAX_ENDPOINTS:
        raise Conflict(f"A project has at most {MAX_ENDPOINTS} webhook endpoints.")
    secret = make_secret()
    row = WebhookEndpoint(
        project_id=project_id,
        name=_checked_name(name),
        url=url,
        event_types=_checked_types(event_types),
        secret_encrypted=cipher.encrypt(secret.encode()),
        secret_hint=secret[-4:],
    )
    repository.add(row)
    return CreatedEndpoint(row, secret)


def update_endpoint(
    session: Session,
    *,
    project_id: UUID,
    endpoint_id: UUID,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[str] | None = None,
    allow_private: bool = False,
) -> WebhookEndpoint:
    """Changes what is given; what changes nothing does not count as a change.

    Raises:
        NotFound: The project has no such endpoint.
        BadRequest: A field cannot be taken as it is.
    """
    row = WebhookEndpointRepository(session).get(project_id, endpoint_id, for_update=True)
    before = (row.name, row.url, row.event_types)
    if name is not None:
        row.name = _checked_name(name)
    if url is not None:
        check_url(url, allow_private=allow_private)
        row.url = url
    if event_types is not None:
        row.event_types = _checked_types(event_types)
    if before != (row.name, row.url, row.event_types):
        row.updated_at = datetime.now(UTC)
    session.flush()
    return row


def delete_endpoint(session: Session, *, project_id: UUID, endpoint_id: UUID) -> None:
    """Removes a receiver; what was on its way to it ends.

    Raises:
        NotFound: The project has no such endpoint.
    """
    row = WebhookEndpointRepository(session).get(project_id, endpoint_id, for_update=True)
    row.deleted_at = datetime.now(UTC)
    session.flush()
    WebhookDeliveryRepository(session).bury_orphans()


def get_endpoint(session: Session, *, project_id: UUID, endpoint_id: UUID) -> WebhookEndpoint:
    """One receiver.

    Raises:
        NotFound: The project has no such endpoint.
    """
    return WebhookEndpointRepository(session).get(project_id, endpoint_id)


def list_endpoints(
    session: Session, *, project_id: UUID, after: UUID | None = None, limit: int = 20
) -> tuple[list[WebhookEndpoint], bool]:
    """A page of receivers, newest first, and whether there are more.

    Raises:
        NotFound: `after` is not an endpoint of the project.
    """
    repository = WebhookEndpointRepository(session)
    last = None if after is None else repository.get(project_id, after)
    found = repository.list_page(project_id, after=last, limit=limit + 1)
    return found[:limit], len(found) > limit


def rotate_secret(
    session: Session,
    cipher: MultiFernet,
    *,
    project_id: UUID,
    endpoint_id: UUID,
    keep_old: bool = False,
    force: bool = False,
) -> CreatedEndpoint:
    """Gives an endpoint a new secret; the old one can sign too for 24 hours.

    Raises:
        NotFound: The project has no such endpoint.
        Conflict: The one before still signs, which would end now, and that is not forced.
    """
    row = WebhookEndpointRepository(session).get(project_id, endpoint_id, for_update=True)
    now = datetime.now(UTC)
    is_overlapping = row.previous_secret_until is not None and row.previous_secret_until > now
    if is_overlapping and not force:
        raise Conflict(
            "The secret was rotated less than 24 hours ago and the one before still signs; send"
            " `force: true` to end that one now.",
            "force",
        )
    secret = make_secret()
    row.previous_secret_encrypted = row.secret_encrypted if keep_old else None
    row.previous_secret_until = now + ROTATION_OVERLAP if keep_old else None
    row.secret_encrypted = cipher.encrypt(secret.encode())
    row.secret_hint = secret[-4:]
    row.updated_at = now
    session.flush()
    return CreatedEndpoint(row, secret)


def emit_event(
    session: Session,
    *,
    project_id: UUID,
    type: str,  # noqa: A002 - the field's name in the payload
    data: dict[str, Any],
    job: Job | None = None,
) -> WebhookEvent:
    """Writes an event, and one delivery for each live endpoint that wants it, in the caller's transaction.

    Args:
        session: The transaction in which the thing happens.
        project_id: Whose endpoints hear of it.
        type: One of `EVENT_TYPES`.
        data: Goes into the payload's `data`; numbers that JSON lacks become null.
        job: The job it is about. `data` gets its id (`id` and `job_id`), its state (`state` and `status`)
            and `sequence`, the number of this event among the job's: without a gap, and a receiver that
            keeps the highest has the newest state, in whatever order deliveries come.
    """
    if type not in EVENT_TYPES:
        raise ValueError(f"unknown event type: {type}")
    now = datetime.now(UTC)
    about: dict[str, Any] = {"occurred_at": now.isoformat(timespec="milliseconds")}
    if job is not None:
        key = public_id("run" if job.kind is JobKind.EXTERNAL else "job", job.id)
        about |= {
            "id": key,
            "job_id": key,
            "sequence": _next_number(session, job),
            "state": job.state.value,
            "status": job.state.value,
        }
    event_id = uuid4()
    payload = {
        "id": public_id("webhook_event", event_id),
        "object": "event",
        "created_at": int(now.timestamp()),
        "type": type,
        "data": _finite(data | about),
    }
    event = WebhookEvent(
        id=event_id,
        project_id=project_id,
        type=type,
        job_id=None if job is None else job.id,
        payload=payload,
    )
    endpoint_ids = WebhookEndpointRepository(session).list_subscribed(project_id, type)
    WebhookDeliveryRepository(session).add_event(event, endpoint_ids)
    return event


def _next_number(session: Session, job: Job) -> int:
    """Taken from the job's row, whose lock is held until the transaction ends: so there is no gap."""
    number = session.execute(
        update(Job)
        .where(Job.id == job.id)
        .values(webhook_count=Job.webhook_count + 1)
        .returning(Job.webhook_count)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    session.expire(job, ["webhook_count"])
    return number


def check_url(url: str, *, allow_private: bool) -> None:
    """Refuses a URL that must not be called; names are checked again, resolved, at every delivery.

    Raises:
        BadRequest: Not https on port 443 or 8443 (any http when private receivers are allowed), or with user
            info, a fragment or a private address in it.
    """
    problem = find_url_problem(url, allow_private=allow_private)
    if problem is not None:
        raise BadRequest(f"url: {problem}", "url")


def find_url_problem(url: str, *, allow_private: bool) -> str | None:
    """Why a URL must not be called, if so."""
    if not 1 <= len(url) <= 2048 or not url.isprintable() or not url.isascii() or " " in url:
        return "give 1 to 2048 printable ASCII characters"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "this is not a URL"
    schemes = ("https", "http") if allow_private else ("https",)
    if parts.scheme not in schemes:
        return f"the scheme must be {' or '.join(schemes)}"
    if not host:
        return "the host is missing"
    if "@" in parts.netloc or "#" in url:
        return "user info and fragments are not allowed"
    if allow_private:
        return None
    if port is not None and port not in _PORTS:
        return "the port must be 443 or 8443"
    if not is_public_host(host):
        return "private and reserved addresses are not allowed"
    return None


def _checked_name(name: str) -> str:
    if not 1 <= len(name.strip()) <= 128 or not name.isprintable():
        raise BadRequest("name: give 1 to 128 printable characters", "name")
    return name.strip()


def _checked_types(event_types: Sequence[str]) -> list[str]:
    if not event_types:
        raise BadRequest("event_types: name at least one type of event", "event_types")
    for place, name in enumerate(event_types):
        if name not in EVENT_TYPES:
            raise BadRequest(
                f"event_types.{place}: no event has the type '{name[:80]}'; there are"
                f" {', '.join(EVENT_TYPES)}",
                f"event_types.{place}",
            )
    return list(dict.fromkeys(event_types))


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The value with infinities and NaN, which JSON lacks, as null."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
