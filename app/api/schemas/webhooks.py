"""Webhook endpoints and deliveries."""

from typing import Any, Literal

from app.api.schemas.base import Identified, Schema, unix, unix_or_none
from app.db.models import WebhookDelivery, WebhookEndpoint, WebhookEvent
from app.domain.identifiers import public_id


class EndpointObject(Identified):
    """A receiver; `signing_secret` is there on creation and rotation alone."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    disabled_at: int | None
    disabled_reason: str | None


class CreatedEndpointObject(EndpointObject):
    """A receiver with its secret."""

    signing_secret: str


class DeliveryObject(Identified):
    """One event on its way to one endpoint."""

    object: Literal["webhook_delivery"] = "webhook_delivery"
    created_at: int
    event_id: str
    event_type: str
    state: str
    tries: int
    next_try_at: int | None
    delivered_at: int | None
    last_status: int | None
    last_error: str | None
    last_reply: str | None
    payload: dict[str, Any]


class AnsweredSample(Schema):
    """What a receiver answered to a sample."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True  # the sample got an answer, of which `status_code` is what it was


class RetriedDeliveries(Schema):
    """How many deliveries will be sent again."""

    object: Literal["webhook_endpoint.retry"] = "webhook_endpoint.retry"
    webhook_endpoint_id: str
    num_deliveries: int


class EventTypes(Schema):
    """Every type that an endpoint can ask for."""

    object: Literal["list"] = "list"
    data: list[str]


def show_endpoint(row: WebhookEndpoint) -> EndpointObject:
    """An endpoint as clients see it."""
    return EndpointObject.model_validate(_fields(row))


def show_created(row: WebhookEndpoint, secret: str) -> CreatedEndpointObject:
    """A new endpoint, or one with a new secret: the only time the secret is shown."""
    return CreatedEndpointObject.model_validate(_fields(row) | {"signing_secret": secret})


def show_delivery(delivery: WebhookDelivery, event: WebhookEvent) -> DeliveryObject:
    """A delivery as clients see it."""
    is_waiting = delivery.state.value == "pending"
    return DeliveryObject(
        id=public_id("webhook_delivery", delivery.id),
        created_at=unix(delivery.created_at),
        event_id=public_id("webhook_event", event.id),
        event_type=event.type,
        state=delivery.state.value,
        tries=delivery.tries,
        next_try_at=unix(delivery.next_try_at) if is_waiting else None,
        delivered_at=unix_or_none(delivery.delivered_at),
        last_status=delivery.last_status,
        last_error=delivery.last_error,
        last_reply=delivery.last_reply,
        payload=event.payload,
    )


def _fields(row: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": public_id("webhook_endpoint", row.id),
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "created_at": unix(row.created_at),
        "updated_at": unix(row.updated_at),
        "signing_secret_hint": row.secret_hint,
        "disabled_at": unix_or_none(row.disabled_at),
        "disabled_reason": row.disabled_reason,
    }
