"""Webhook endpoints, their deliveries, and the types of events."""

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from app.api.dependencies import ResourcesDep, SessionDep, WebhooksAdmin, WriterDep
from app.api.paging import After, Limit, parse_after
from app.api.schemas.base import Deleted, Page, build_page
from app.api.schemas.webhooks import (
    CreatedEndpointObject,
    DeliveryObject,
    EndpointObject,
    EventTypes,
    show_created,
    show_delivery,
    show_endpoint,
)
from app.db.models import WebhookEvent
from app.domain.identifiers import parse_id
from app.domain.requests import CreateWebhookEndpoint, RotateSecret, UpdateWebhookEndpoint
from app.services import webhooks

router = APIRouter(prefix="/v1", tags=["webhooks"])

ID = "webhook_endpoint_id"
HIDDEN = "signing_secret"  # never kept in plain text, so a replayed answer comes without it


@router.get("/webhook_event_types")
def list_event_types(_caller: WebhooksAdmin) -> EventTypes:
    """Every type that an endpoint can ask for."""
    return EventTypes(data=list(webhooks.EVENT_TYPES))


@router.post("/webhook_endpoints", response_model=CreatedEndpointObject)
def create_endpoint(
    body: CreateWebhookEndpoint,
    caller: WebhooksAdmin,
    writer: WriterDep,
    resources: ResourcesDep,
) -> Response:
    """Registers a receiver; the answer alone holds its signing secret."""

    def work(session: Session) -> CreatedEndpointObject:
        made = webhooks.create_endpoint(
            session,
            resources.cipher,
            project_id=caller.project_id,
            name=body.name,
            url=body.url,
            event_types=body.event_types,
            allow_private=resources.settings.webhook_allow_private,
        )
        return show_created(made.row, made.secret)

    return writer.run(caller, body, work, hidden=HIDDEN)


@router.get("/webhook_endpoints")
def list_endpoints(
    session: SessionDep, caller: WebhooksAdmin, after: After = None, limit: Limit = 20
) -> Page[EndpointObject]:
    """The project's receivers, newest first."""
    found, has_more = webhooks.list_endpoints(
        session,
        project_id=caller.project_id,
        after=parse_after("webhook_endpoint", after),
        limit=limit,
    )
    return build_page([show_endpoint(row) for row in found], has_more=has_more)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
def retrieve_endpoint(
    webhook_endpoint_id: str, session: SessionDep, caller: WebhooksAdmin
) -> EndpointObject:
    """One receiver."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    row = webhooks.get_endpoint(session, project_id=caller.project_id, endpoint_id=key)
    return show_endpoint(row)


@router.post("/webhook_endpoints/{webhook_endpoint_id}", response_model=EndpointObject)
def update_endpoint(
    webhook_endpoint_id: str,
    body: UpdateWebhookEndpoint,
    caller: WebhooksAdmin,
    writer: WriterDep,
    resources: ResourcesDep,
) -> Response:
    """Changes what is given."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)

    def work(session: Session) -> EndpointObject:
        row = webhooks.update_endpoint(
            session,
            project_id=caller.project_id,
            endpoint_id=key,
            name=body.name,
            url=body.url,
            event_types=body.event_types,
            allow_private=resources.settings.webhook_allow_private,
        )
        return show_endpoint(row)

    return writer.run(caller, body, work)


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
def delete_endpoint(
    webhook_endpoint_id: str, session: SessionDep, caller: WebhooksAdmin
) -> Deleted:
    """Removes a receiver; what was on its way to it ends."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    webhooks.delete_endpoint(session, project_id=caller.project_id, endpoint_id=key)
    return Deleted(id=webhook_endpoint_id, object="webhook_endpoint.deleted")


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/rotate_secret", response_model=CreatedEndpointObject
)
def rotate_secret(
    webhook_endpoint_id: str,
    caller: WebhooksAdmin,
    writer: WriterDep,
    resources: ResourcesDep,
    body: RotateSecret | None = None,
) -> Response:
    """Gives an endpoint a new secret; the old one signs too for 24 hours, unless it is dropped."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    wish = body or RotateSecret()

    def work(session: Session) -> CreatedEndpointObject:
        made = webhooks.rotate_secret(
            session,
            resources.cipher,
            project_id=caller.project_id,
            endpoint_id=key,
            keep_old=wish.keep_old_secret_active_for_24_hours,
        )
        return show_created(made.row, made.secret)

    return writer.run(caller, wish, work, hidden=HIDDEN)


@router.get("/webhook_endpoints/{webhook_endpoint_id}/deliveries")
def list_deliveries(
    webhook_endpoint_id: str,
    session: SessionDep,
    caller: WebhooksAdmin,
    after: After = None,
    limit: Limit = 20,
) -> Page[DeliveryObject]:
    """What was sent to a receiver or is on its way, newest first."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    found, has_more = webhooks.list_deliveries(
        session,
        project_id=caller.project_id,
        endpoint_id=key,
        after=parse_after("webhook_delivery", after),
        limit=limit,
    )
    return build_page([show_delivery(*pair) for pair in found], has_more=has_more)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/deliveries/{delivery_id}/retry",
    response_model=DeliveryObject,
)
def retry_delivery(
    webhook_endpoint_id: str, delivery_id: str, caller: WebhooksAdmin, writer: WriterDep
) -> Response:
    """Sends an event to a receiver once more, under the same webhook-id."""
    endpoint = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    delivery = parse_id("webhook_delivery", delivery_id, param="delivery_id")

    def work(session: Session) -> DeliveryObject:
        row = webhooks.redeliver(
            session,
            project_id=caller.project_id,
            endpoint_id=endpoint,
            delivery_id=delivery,
        )
        session.refresh(row)
        return show_delivery(row, session.get_one(WebhookEvent, row.event_id))

    return writer.run(caller, None, work)
