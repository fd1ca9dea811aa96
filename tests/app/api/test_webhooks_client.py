"""Webhooks as the openai client has them, against a live server; and what Retain adds to them."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from app.db.models import WebhookDelivery, WebhookEndpoint
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import parse_id
from app.domain.states import DeliveryState
from app.main import create_app
from app.services.webhooks import EVENT_TYPES, emit_event
from app.settings import Settings
from tests.app.control.receivers import receiving, status
from tests.app.control.test_webhook_sender import CIPHER, deliveries, sending, wait_for_state
from tests.factories import make_job
from tests.serving import make_caller, serving_app

TYPE: Any = "fine_tuning.job.succeeded"  # the client's types are a closed list, ours are more
RAISED: Any = "retention.strength_raised"


class Server(NamedTuple):
    """A server, a client of it, and its database."""

    client: OpenAI
    factory: SessionFactory
    project_id: UUID


@pytest.fixture
def server(settings: Settings, committed_factory: SessionFactory) -> Iterator[Server]:
    ours = settings.model_copy(update={"webhook_allow_private": True})
    project, key = make_caller(committed_factory, ours)
    app = create_app(ours, committed_factory, cipher=CIPHER)
    with (
        serving_app(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
    ):
        yield Server(client, committed_factory, project.id)


def emit(server: Server, count: int = 1) -> None:
    with transaction(server.factory) as session:
        for number in range(count):
            data = {"id": f"ftjob-{number}"}
            emit_event(session, project_id=server.project_id, type=TYPE, data=data)


def ask(server: Server, method: str, path: str, **body: Any) -> dict[str, Any]:
    """What the client lacks a method for."""
    call = getattr(server.client, method)
    answer: dict[str, Any] = call(path, cast_to=object, **({"body": body} if body else {}))
    return answer


def test_the_clients_methods_do_what_they_say(server: Server) -> None:
    hooks = server.client.webhooks
    made = hooks.create(name="first", url="http://127.0.0.1:9/a", event_types=[TYPE, RAISED])
    assert (made.object, made.name, made.event_types) == (
        "webhook_endpoint",
        "first",
        [TYPE, RAISED],
    )
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == made.signing_secret[-4:]
    found = hooks.retrieve(made.id)
    assert (found.id, found.url) == (made.id, "http://127.0.0.1:9/a")
    assert "signing_secret" not in (found.model_extra or {})
    unchanged = hooks.update(made.id, name="first")
    assert unchanged.updated_at == made.updated_at
    changed = hooks.update(made.id, event_types=[TYPE], url="http://127.0.0.1:9/b")
    assert (changed.event_types, changed.url, changed.name) == (
        [TYPE],
        "http://127.0.0.1:9/b",
        "first",
    )
    others = [
        hooks.create(name=f"n{n}", url="http://127.0.0.1:9/", event_types=[TYPE]) for n in range(3)
    ]
    listed = [each.id for each in hooks.list(limit=2)]
    assert listed == [*(each.id for each in reversed(others)), made.id]
    page = hooks.list(limit=2)
    assert (page.model_extra or {})["first_id"] == others[2].id
    assert hooks.list(after=others[0].id).data[0].id == made.id
    gone = hooks.delete(others[0].id)
    assert (gone.deleted, gone.object, gone.id) == (True, "webhook_endpoint.deleted", others[0].id)
    with pytest.raises(openai.NotFoundError):
        hooks.retrieve(others[0].id)
    types = hooks.event_types.list()
    assert (types.object, types.data) == ("list", list(EVENT_TYPES))


def test_a_rotation_ends_the_old_secret_unless_it_is_asked_to_stay(server: Server) -> None:
    hooks = server.client.webhooks
    with receiving() as receiver:
        made = hooks.create(name="n", url=receiver.url, event_types=[TYPE])
        second = hooks.rotate_secret(made.id)
        third = hooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        for keep in (True, False):
            with pytest.raises(openai.ConflictError) as caught:
                hooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=keep)
            assert caught.value.param == "force"
        emit(server)
        with sending(server.factory):
            wait_for_state(server.factory, DeliveryState.DELIVERED)
        fourth = hooks.rotate_secret(made.id, extra_body={"force": True})
    assert len({each.signing_secret for each in (made, second, third, fourth)}) == 4
    [(headers, body)] = receiver.requests
    for secret in (second.signing_secret, third.signing_secret):
        event: Any = hooks.unwrap(body, headers, secret=secret)
        assert (event.type, event.data.id) == (TYPE, "ftjob-0")
        hooks.verify_signature(body, headers, secret=secret)
    for secret in (made.signing_secret, fourth.signing_secret):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            hooks.unwrap(body, headers, secret=secret)


def test_a_sample_reaches_the_receiver_and_its_answer_the_caller(server: Server) -> None:
    hooks = server.client.webhooks
    with receiving(status(204, b""), status(500)) as receiver:
        made = hooks.create(name="n", url=receiver.url, event_types=[TYPE])
        tested = hooks.test(made.id, event_type=TYPE)
        again = hooks.test(made.id, event_type=RAISED)
    assert tested.model_dump() == {
        "object": "webhook_endpoint.test",
        "event_type": TYPE,
        "status_code": 204,
        "success": True,
        "webhook_endpoint_id": made.id,
    }
    assert (again.status_code, again.success) == (500, True)
    headers, body = receiver.requests[0]
    event: Any = hooks.unwrap(body, headers, secret=made.signing_secret)
    assert (event.type, event.data.test, event.data.state) == (TYPE, True, "succeeded")
    assert deliveries(server.factory) == []
    with pytest.raises(openai.BadRequestError) as unreachable:
        hooks.test(made.id, event_type=TYPE)
    assert unreachable.value.code == "webhook_endpoint_unreachable"
    unknown: Any = "moon.landed"
    with pytest.raises(openai.BadRequestError) as refused:
        hooks.test(made.id, event_type=unknown)
    assert refused.value.param == "event_type"


def test_a_sample_with_a_key_is_sent_once(server: Server) -> None:
    with receiving() as receiver:
        made = server.client.webhooks.create(name="n", url=receiver.url, event_types=[TYPE])
        for _ in range(2):
            server.client.webhooks.test(
                made.id, event_type=TYPE, extra_headers={"idempotency-key": "k"}
            )
    assert len(receiver.requests) == 1


def test_private_receivers_get_no_samples(
    settings: Settings, committed_factory: SessionFactory
) -> None:
    _, key = make_caller(committed_factory, settings)
    with receiving() as receiver:
        app = create_app(settings, committed_factory, cipher=CIPHER)
        with serving_app(app) as url, OpenAI(base_url=f"{url}/v1", api_key=key) as client:
            made = client.webhooks.create(name="n", url="https://example.org/", event_types=[TYPE])
            with transaction(committed_factory) as session:  # as it was taken under other settings
                session.execute(update(WebhookEndpoint).values(url=receiver.url))
            with pytest.raises(openai.BadRequestError) as refused:
                client.webhooks.test(made.id, event_type=TYPE)
    assert refused.value.param == "url"
    assert receiver.requests == []


def test_deliveries_are_listed_by_state_and_sent_again(server: Server) -> None:
    before = int((datetime.now(UTC) - timedelta(seconds=2)).timestamp())
    with receiving() as receiver:
        made = server.client.webhooks.create(name="n", url=receiver.url, event_types=[TYPE])
        place = f"/webhook_endpoints/{made.id}/deliveries"
        emit(server, 5)
        with sending(server.factory):
            wait_for_state(server.factory, DeliveryState.DELIVERED)
        with transaction(server.factory) as session:
            dead = deliveries(server.factory)[:3]
            session.execute(
                update(WebhookDelivery)
                .where(WebhookDelivery.id.in_([row.id for row in dead]))
                .values(state=DeliveryState.DEAD, tries=10)
            )
        page = ask(server, "get", f"{place}?state=dead&limit=2")
        assert (len(page["data"]), page["has_more"]) == (2, True)
        rest = ask(server, "get", f"{place}?state=dead&limit=2&after={page['last_id']}")
        assert (len(rest["data"]), rest["has_more"]) == (1, False)
        assert {each["state"] for each in page["data"] + rest["data"]} == {"dead"}
        assert len(ask(server, "get", f"{place}?state=delivered")["data"]) == 2
        with pytest.raises(openai.BadRequestError):
            ask(server, "get", f"{place}?state=lost")
        later = int((datetime.now(UTC) + timedelta(hours=1)).timestamp())
        assert ask(server, "post", f"{place}/retry", since=later)["num_deliveries"] == 0
        one = ask(server, "post", f"{place}/{rest['data'][0]['id']}/retry")
        assert (one["state"], one["tries"]) == ("pending", 0)
        assert ask(server, "post", f"{place}/retry", since=before) == {
            "object": "webhook_endpoint.retry",
            "webhook_endpoint_id": made.id,
            "num_deliveries": 2,
        }
        with sending(server.factory):
            wait_for_state(server.factory, DeliveryState.DELIVERED)
    assert sorted(receiver.ids().count(key) for key in set(receiver.ids())) == [1, 1, 2, 2, 2]


def test_a_disabled_endpoint_is_enabled_by_a_ping_that_it_answers(server: Server) -> None:
    with receiving(status(410), status(500), status(200)) as receiver:
        made = server.client.webhooks.create(name="n", url=receiver.url, event_types=[TYPE])
        path = f"/webhook_endpoints/{made.id}"
        emit(server)
        with sending(server.factory):
            wait_for_state(server.factory, DeliveryState.DEAD)
        off: Any = server.client.webhooks.retrieve(made.id)
        assert off.disabled_at is not None
        assert off.disabled_reason == "It answered 410 Gone."
        with pytest.raises(openai.ConflictError) as disabled:
            ask(server, "post", f"{path}/deliveries/retry", since=0)
        assert disabled.value.code == "endpoint_disabled"
        with pytest.raises(openai.ConflictError) as failed:
            ask(server, "post", f"{path}/enable")
        assert failed.value.code == "ping_failed"
        assert "500" in failed.value.message
        on = ask(server, "post", f"{path}/enable")
        assert (on["disabled_at"], on["disabled_reason"]) == (None, None)
        assert ask(server, "post", f"{path}/deliveries/retry", since=0)["num_deliveries"] == 1
        with sending(server.factory):
            wait_for_state(server.factory, DeliveryState.DELIVERED)
    ping: Any = server.client.webhooks.unwrap(
        receiver.requests[2][1], receiver.requests[2][0], secret=made.signing_secret
    )
    assert (ping.type, ping.data.test) == ("webhook_endpoint.ping", True)
    row = deliveries(server.factory)[0]
    assert receiver.ids().count(f"evt_{row.event_id.hex}") == 2


def test_the_events_of_a_job_are_numbered_without_a_gap(server: Server) -> None:
    """Each receiver of everything can tell what it lacks; the highest number has the newest state."""
    with receiving() as receiver:
        server.client.webhooks.create(name="n", url=receiver.url, event_types=[TYPE, RAISED])
        with transaction(server.factory) as session:
            job = make_job(session, project_id=server.project_id)
            for kind in (RAISED, RAISED, TYPE):
                emit_event(session, project_id=server.project_id, type=kind, data={"a": 1}, job=job)
        with sending(server.factory):
            wait_for_state(server.factory, DeliveryState.DELIVERED)
        listed = ask(server, "get", "/webhook_endpoints")["data"][0]["id"]
        assert parse_id("webhook_endpoint", listed)
        payloads = [
            each["payload"]
            for each in ask(server, "get", f"/webhook_endpoints/{listed}/deliveries")["data"]
        ]
    told = sorted(payload["data"]["sequence"] for payload in payloads)
    assert told == [1, 2, 3]
    for payload in payloads:
        data = payload["data"]
        assert data["job_id"] == data["id"] == f"ftjob-{job.id.hex}"
        assert data["state"] == job.state.value
        assert datetime.fromisoformat(data["occurred_at"]).utcoffset() == timedelta(0)
