"""What was sent to a webhook endpoint or is on its way, and sending it again."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from app.api.dependencies import SessionDep, WebhooksAdmin, WriterDep
from app.api.paging import After, Limit, parse_after
from app.api.schemas.base import Page, build_page
from app.api.schemas.webhooks import DeliveryObject, RetriedDeliveries, show_delivery
from app.db.models import WebhookEvent
from app.domain.identifiers import parse_id
from app.domain.requests import RetryDeliveries
from app.domain.states import DeliveryState
from app.services import webhook_deliveries

router = APIRouter(
    prefix="/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries", tags=["webhooks"]
)

ID = "webhook_endpoint_id"
State = Annotated[
    DeliveryState | None, Query(description="Only deliveries that are pending, delivered or dead.")
]


@router.get("")
def list_deliveries(
    webhook_endpoint_id: str,
    session: SessionDep,
    caller: WebhooksAdmin,
    state: State = None,
    after: After = None,
    limit: Limit = 20,
) -> Page[DeliveryObject]:
    """What was sent to a receiver or is on its way, newest first; kept for 30 days."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    found, has_more = webhook_deliveries.list_deliveries(
        session,
        project_id=caller.project_id,
        endpoint_id=key,
        state=state,
        after=parse_after("webhook_delivery", after),
        limit=limit,
    )
    return build_page([show_delivery(*pair) for pair in found], has_more=has_more)


@router.post("/retry", response_model=RetriedDeliveries)
def retry_deliveries(
    webhook_endpoint_id: str, body: RetryDeliveries, caller: WebhooksAdmin, writer: WriterDep
) -> Response:
    """Sends every dead delivery since a time once more, each under its own webhook-id."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)

    def work(session: Session) -> RetriedDeliveries:
        count = webhook_deliveries.redeliver_since(
            session,
            project_id=caller.project_id,
            endpoint_id=key,
            since=datetime.fromtimestamp(body.since, UTC),
            state=body.state,
        )
        return RetriedDeliveries(webhook_endpoint_id=webhook_endpoint_id, num_deliveries=count)

    return writer.run(caller, body, work)


@router.post("/{delivery_id}/retry", response_model=DeliveryObject)
def retry_delivery(
    webhook_endpoint_id: str, delivery_id: str, caller: WebhooksAdmin, writer: WriterDep
) -> Response:
    """Sends an event to a receiver once more, under the same webhook-id."""
    endpoint = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    delivery = parse_id("webhook_delivery", delivery_id, param="delivery_id")

    def work(session: Session) -> DeliveryObject:
        row = webhook_deliveries.redeliver(
            session,
            project_id=caller.project_id,
            endpoint_id=endpoint,
            delivery_id=delivery,
        )
        return show_delivery(row, session.get_one(WebhookEvent, row.event_id))

    return writer.run(caller, None, work)
