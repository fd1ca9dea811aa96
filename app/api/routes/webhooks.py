"""Webhook endpoints, and the types of events."""

from uuid import UUID

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from app.api.dependencies import Resources, ResourcesDep, SessionDep, WebhooksAdmin, WriterDep
from app.api.paging import After, Limit, parse_after
from app.api.schemas.base import Deleted, Page, build_page
from app.api.schemas.webhooks import (
    AnsweredSample,
    CreatedEndpointObject,
    EndpointObject,
    EventTypes,
    show_created,
    show_endpoint,
)
from app.control.webhook_http import Reply, WebhookClient
from app.db.session import transaction
from app.domain.identifiers import parse_id
from app.domain.requests import (
    CreateWebhookEndpoint,
    RotateSecret,
    SendSample,
    UpdateWebhookEndpoint,
)
from app.domain.scopes import Caller
from app.errors import BadRequest, Conflict
from app.services import webhook_deliveries, webhooks
from app.services.webhook_signing import SignedRequest

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
    """Gives an endpoint a new secret; the old one ends, or signs too for 24 hours if that is asked for."""
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    wish = body or RotateSecret()

    def work(session: Session) -> CreatedEndpointObject:
        made = webhooks.rotate_secret(
            session,
            resources.cipher,
            project_id=caller.project_id,
            endpoint_id=key,
            keep_old=wish.keep_old_secret_active_for_24_hours,
            force=wish.force,
        )
        return show_created(made.row, made.secret)

    return writer.run(caller, wish, work, hidden=HIDDEN)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test", response_model=AnsweredSample)
async def send_sample(
    webhook_endpoint_id: str,
    body: SendSample,
    caller: WebhooksAdmin,
    writer: WriterDep,
    resources: ResourcesDep,
) -> Response:
    """Sends a signed sample and says what the receiver answered, whatever it answered; without an answer, a 400."""
    again = await run_in_threadpool(writer.replay, caller, body)
    if again is not None:
        return again
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    reply = await _try_out(resources, caller, key, body.event_type)
    if reply.status is None:
        raise BadRequest(
            f"The receiver did not answer: {reply.error}.", code="webhook_endpoint_unreachable"
        )
    tested = AnsweredSample(
        webhook_endpoint_id=webhook_endpoint_id,
        event_type=body.event_type,
        status_code=reply.status,
    )
    return await run_in_threadpool(writer.run, caller, body, lambda _session: tested)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/enable", response_model=EndpointObject)
async def enable_endpoint(
    webhook_endpoint_id: str, caller: WebhooksAdmin, writer: WriterDep, resources: ResourcesDep
) -> Response:
    """Enables a receiver that was switched off, once it answers a ping with success."""
    again = await run_in_threadpool(writer.replay, caller, None)
    if again is not None:
        return again
    key = parse_id("webhook_endpoint", webhook_endpoint_id, param=ID)
    reply = await _try_out(resources, caller, key, webhook_deliveries.PING)
    if reply.error is not None:
        raise Conflict(f"The endpoint failed its ping: {reply.error}.", code="ping_failed")

    def work(session: Session) -> EndpointObject:
        row = webhook_deliveries.enable_endpoint(
            session, project_id=caller.project_id, endpoint_id=key
        )
        return show_endpoint(row)

    return await run_in_threadpool(writer.run, caller, None, work)


async def _try_out(
    resources: Resources, caller: Caller, endpoint_id: UUID, event_type: str
) -> Reply:
    """What a receiver answers to a sample; no session is open meanwhile."""
    allow_private = resources.settings.webhook_allow_private

    def prepare() -> tuple[str, SignedRequest]:
        with transaction(resources.session_factory) as session:
            return webhook_deliveries.build_sample(
                session,
                resources.cipher,
                project_id=caller.project_id,
                endpoint_id=endpoint_id,
                event_type=event_type,
                allow_private=allow_private,
            )

    url, request = await run_in_threadpool(prepare)
    client = await run_in_threadpool(WebhookClient, allow_private=allow_private)
    try:
        return await client.post(url, request.headers, request.body)
    finally:
        await client.aclose()
