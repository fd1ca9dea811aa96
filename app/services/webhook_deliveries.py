"""What was sent to webhook endpoints or is on its way; sending it again; samples that show whether a receiver works."""

from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid4

from cryptography.fernet import MultiFernet
from sqlalchemy.orm import Session

from app.db.models import WebhookDelivery, WebhookEndpoint, WebhookEvent
from app.db.repositories.webhook_deliveries import WebhookDeliveryRepository
from app.db.repositories.webhooks import WebhookEndpointRepository
from app.domain.identifiers import public_id
from app.domain.states import DeliveryState
from app.errors import BadRequest, Conflict
from app.services.webhook_signing import SignedRequest, decrypt_secret, sign_request
from app.services.webhooks import EVENT_TYPES, check_url

#: What an endpoint is sent when it is to be enabled again.
PING: Final = "webhook_endpoint.ping"


def list_deliveries(
    session: Session,
    *,
    project_id: UUID,
    endpoint_id: UUID,
    state: DeliveryState | None = None,
    after: UUID | None = None,
    limit: int = 20,
) -> tuple[list[tuple[WebhookDelivery, WebhookEvent]], bool]:
    """A page of an endpoint's deliveries with their events, newest first, and whether there are more.

    Raises:
        NotFound: The project has no such endpoint, or the endpoint no delivery `after`.
    """
    endpoint = WebhookEndpointRepository(session).get(project_id, endpoint_id)
    repository = WebhookDeliveryRepository(session)
    last = None if after is None else repository.get(endpoint.id, after)
    found = repository.list_page(endpoint.id, state=state, after=last, limit=limit + 1)
    return found[:limit], len(found) > limit


def redeliver(
    session: Session, *, project_id: UUID, endpoint_id: UUID, delivery_id: UUID
) -> WebhookDelivery:
    """Sends an event to an endpoint once more, with the schedule started over and the same webhook-id.

    Raises:
        NotFound: The project has no such endpoint or delivery.
        Conflict: The endpoint is disabled.
    """
    endpoint = _get_enabled(session, project_id, endpoint_id)
    repository = WebhookDeliveryRepository(session)
    delivery = repository.get(endpoint.id, delivery_id)
    repository.redeliver(delivery)
    return delivery


def redeliver_since(
    session: Session,
    *,
    project_id: UUID,
    endpoint_id: UUID,
    since: datetime,
    state: DeliveryState = DeliveryState.DEAD,
) -> int:
    """Sends again what an endpoint was to get since a time; the number of deliveries.

    Args:
        session: The transaction.
        project_id: Whose endpoint it is.
        endpoint_id: The endpoint.
        since: Events from then on.
        state: Only the deliveries in this state.

    Raises:
        NotFound: The project has no such endpoint.
        Conflict: The endpoint is disabled.
    """
    endpoint = _get_enabled(session, project_id, endpoint_id)
    return WebhookDeliveryRepository(session).redeliver_since(endpoint.id, since, state)


def build_sample(
    session: Session,
    cipher: MultiFernet,
    *,
    project_id: UUID,
    endpoint_id: UUID,
    event_type: str,
    allow_private: bool,
) -> tuple[str, SignedRequest]:
    """An endpoint's URL, and a signed event of a type that tells of nothing: its data says `test`.

    Raises:
        NotFound: The project has no such endpoint.
        BadRequest: There is no such type, or the URL must not be called.
    """
    endpoint = WebhookEndpointRepository(session).get(project_id, endpoint_id)
    if event_type not in (*EVENT_TYPES, PING):
        raise BadRequest(
            f"event_type: no event has the type '{event_type[:80]}'; there are"
            f" {', '.join(EVENT_TYPES)}",
            "event_type",
        )
    check_url(endpoint.url, allow_private=allow_private)
    secrets = [decrypt_secret(cipher, item) for item in _secrets_in_force(endpoint)]
    return endpoint.url, sign_request(secrets, _sample(endpoint, event_type))


def enable_endpoint(session: Session, *, project_id: UUID, endpoint_id: UUID) -> WebhookEndpoint:
    """Lets an endpoint that has just answered a ping have events again.

    Raises:
        NotFound: The project has no such endpoint.
    """
    row = WebhookEndpointRepository(session).get(project_id, endpoint_id, for_update=True)
    row.disabled_at = row.disabled_reason = row.failing_since = None
    row.failures_in_a_row = 0
    row.updated_at = datetime.now(UTC)
    session.flush()
    return row


def _get_enabled(session: Session, project_id: UUID, endpoint_id: UUID) -> WebhookEndpoint:
    endpoint = WebhookEndpointRepository(session).get(project_id, endpoint_id)
    if endpoint.disabled_at is not None:
        raise Conflict(
            f"The endpoint is disabled: {endpoint.disabled_reason} Enable it first.",
            code="endpoint_disabled",
        )
    return endpoint


def _secrets_in_force(endpoint: WebhookEndpoint) -> list[bytes]:
    until, previous = endpoint.previous_secret_until, endpoint.previous_secret_encrypted
    is_old_in_force = until is not None and until > datetime.now(UTC)
    found = [endpoint.secret_encrypted]
    return [*found, previous] if is_old_in_force and previous is not None else found


def _sample(endpoint: WebhookEndpoint, event_type: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    data: dict[str, Any] = {
        "id": public_id("webhook_endpoint", endpoint.id),
        "occurred_at": now.isoformat(timespec="milliseconds"),
        "test": True,
    }
    if event_type.startswith("fine_tuning.job."):
        state = event_type.rpartition(".")[2]
        key = public_id("job", UUID(int=0))
        data |= {"id": key, "job_id": key, "sequence": 0, "state": state, "status": state}
    return {
        "id": public_id("webhook_event", uuid4()),
        "object": "event",
        "created_at": int(now.timestamp()),
        "type": event_type,
        "data": data,
    }
