"""Webhook endpoints and events."""

import base64
import json
import stat
import time
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.fernet import Fernet, MultiFernet
from openai import OpenAI
from pydantic import SecretStr
from sqlalchemy import select
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from app.db.models import WebhookDelivery
from app.domain.decisions import Action
from app.domain.identifiers import public_id
from app.domain.states import DeliveryState, JobState
from app.errors import BadRequest, Conflict, NotFound, Unavailable
from app.services import webhook_deliveries, webhook_signing, webhooks
from app.services.ciphers import load_cipher
from app.services.decisions import WEBHOOKS
from app.services.events import TOLD
from app.settings import Settings
from tests.factories import make_job, make_project

CIPHER = MultiFernet([Fernet(Fernet.generate_key())])
TYPES = ["fine_tuning.job.succeeded", "retention.rolled_back"]


def make_endpoint(session: Session, project_id: UUID, **overrides: Any) -> webhooks.CreatedEndpoint:
    fields: dict[str, Any] = {
        "name": "hook",
        "url": "https://example.org/hook",
        "event_types": TYPES,
    } | overrides
    return webhooks.create_endpoint(session, CIPHER, project_id=project_id, **fields)


def test_the_secret_is_shown_once_and_kept_encrypted(session: Session) -> None:
    created = make_endpoint(session, make_project(session).id)
    assert created.secret.startswith("whsec_")
    assert len(base64.b64decode(created.secret.removeprefix("whsec_"), validate=True)) == 32
    assert created.secret.encode() not in created.row.secret_encrypted
    assert webhook_signing.decrypt_secret(CIPHER, created.row.secret_encrypted) == created.secret
    assert created.secret.endswith(created.row.secret_hint)
    other = MultiFernet([Fernet(Fernet.generate_key())])
    with pytest.raises(Unavailable, match="RETAIN_SECRET_KEY"):
        webhook_signing.decrypt_secret(other, created.row.secret_encrypted)


def test_signatures_are_what_the_standard_and_the_openai_client_expect(session: Session) -> None:
    secret = make_endpoint(session, make_project(session).id).secret
    body = json.dumps(
        {"id": "evt_1", "type": "fine_tuning.job.succeeded", "data": {"id": "ftjob-1"}}
    )
    timestamp = int(time.time())
    old = "whsec_" + base64.b64encode(b"o" * 32).decode()
    headers = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(timestamp),
        "webhook-signature": webhook_signing.sign(
            [old, secret], message_id="evt_1", timestamp=timestamp, body=body.encode()
        ),
    }
    for each in (old, secret):
        assert Webhook(each).verify(body, headers)["id"] == "evt_1"
        with OpenAI(api_key="x", webhook_secret=each) as client:
            event: Any = client.webhooks.unwrap(body, headers)
            assert event.data.id == "ftjob-1"


def test_signatures_match_the_published_vector() -> None:
    # From the Standard Webhooks reference libraries' tests.
    signature = webhook_signing.sign(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        message_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        timestamp=1614265330,
        body=b'{"test": 2432232314}',
    )
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "ftp://example.org/",
        "https://example.org:8080/",
        "https://user:pass@example.org/",
        "https://example.org/#part",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://169.254.169.254/latest",
        "https://[64:ff9b::a9fe:a9fe]/",
        "https:///path",
        "https://example.org/\n",
        "https://ex ample.org/",
        "https://example.org:99999/",
        "",
        "https://example.org/" + "x" * 2048,
    ],
)
def test_urls_that_must_not_be_called_are_refused(url: str) -> None:
    with pytest.raises(BadRequest) as caught:
        webhooks.check_url(url, allow_private=False)
    assert caught.value.param == "url"


def test_good_urls_are_taken() -> None:
    webhooks.check_url("https://example.org/hook?a=1", allow_private=False)
    webhooks.check_url("https://example.org:8443/", allow_private=False)
    webhooks.check_url("https://93.184.216.34/", allow_private=False)
    webhooks.check_url("http://127.0.0.1:9000/hook", allow_private=True)
    with pytest.raises(BadRequest):
        webhooks.check_url("http://u:p@127.0.0.1/", allow_private=True)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("event_types", [], "event_types"),
        ("event_types", ["fine_tuning.job.succeeded", "moon.landed"], "event_types.1"),
        ("name", "", "name"),
        ("url", "http://example.org", "url"),
    ],
)
def test_bad_fields_are_named(session: Session, field: str, value: object, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        make_endpoint(session, make_project(session).id, **{field: value})
    assert caught.value.param == param


def test_endpoints_of_another_project_do_not_exist(session: Session) -> None:
    mine, theirs = make_project(session).id, make_project(session).id
    row = make_endpoint(session, theirs).row
    for call in (webhooks.get_endpoint, webhooks.delete_endpoint, webhooks.update_endpoint):
        with pytest.raises(NotFound):
            call(session, project_id=mine, endpoint_id=row.id)
    with pytest.raises(NotFound):
        webhooks.rotate_secret(session, CIPHER, project_id=mine, endpoint_id=row.id)
    with pytest.raises(NotFound):
        webhook_deliveries.list_deliveries(session, project_id=mine, endpoint_id=row.id)
    assert webhooks.list_endpoints(session, project_id=mine) == ([], False)


def test_endpoints_are_paged_newest_first(session: Session) -> None:
    project_id = make_project(session).id
    rows = [make_endpoint(session, project_id, name=f"h{n}").row for n in range(3)]
    page, has_more = webhooks.list_endpoints(session, project_id=project_id, limit=2)
    assert ([row.name for row in page], has_more) == (["h2", "h1"], True)
    page, has_more = webhooks.list_endpoints(
        session, project_id=project_id, after=page[-1].id, limit=2
    )
    assert ([row.name for row in page], has_more) == (["h0"], False)
    webhooks.delete_endpoint(session, project_id=project_id, endpoint_id=rows[0].id)
    assert len(webhooks.list_endpoints(session, project_id=project_id)[0]) == 2


def test_a_project_has_a_limited_number_of_endpoints(session: Session) -> None:
    project_id = make_project(session).id
    for _ in range(webhooks.MAX_ENDPOINTS):
        make_endpoint(session, project_id)
    with pytest.raises(Conflict):
        make_endpoint(session, project_id)


def test_a_second_rotation_within_a_day_would_cut_off_receivers(session: Session) -> None:
    project_id = make_project(session).id
    first = make_endpoint(session, project_id)
    second = webhooks.rotate_secret(
        session, CIPHER, project_id=project_id, endpoint_id=first.row.id, keep_old=True
    )
    assert second.secret != first.secret
    assert second.row.previous_secret_encrypted is not None
    kept = webhook_signing.decrypt_secret(CIPHER, second.row.previous_secret_encrypted)
    assert kept == first.secret
    for keep_old in (True, False):
        with pytest.raises(Conflict) as caught:
            webhooks.rotate_secret(
                session,
                CIPHER,
                project_id=project_id,
                endpoint_id=first.row.id,
                keep_old=keep_old,
            )
        assert caught.value.param == "force"
    third = webhooks.rotate_secret(
        session,
        CIPHER,
        project_id=project_id,
        endpoint_id=first.row.id,
        keep_old=True,
        force=True,
    )
    assert third.row.previous_secret_encrypted is not None
    kept = webhook_signing.decrypt_secret(CIPHER, third.row.previous_secret_encrypted)
    assert kept == second.secret
    webhooks.rotate_secret(
        session, CIPHER, project_id=project_id, endpoint_id=first.row.id, force=True
    )
    assert first.row.previous_secret_encrypted is None
    webhooks.rotate_secret(session, CIPHER, project_id=project_id, endpoint_id=first.row.id)


def test_an_event_goes_to_every_live_endpoint_that_wants_it(session: Session) -> None:
    job = make_job(session)
    wanting = make_endpoint(session, job.project_id).row
    make_endpoint(session, job.project_id, event_types=["fine_tuning.job.failed"])
    make_endpoint(session, make_project(session).id)
    gone = make_endpoint(session, job.project_id).row
    webhooks.delete_endpoint(session, project_id=job.project_id, endpoint_id=gone.id)
    job.webhook_count = 6
    event = webhooks.emit_event(
        session,
        project_id=job.project_id,
        type="retention.rolled_back",
        data={
            "reason": "drop",
            "lower": float("nan"),
            "nested": [float("inf"), 1.5],
            "id": "other",
        },
        job=job,
    )
    deliveries = session.scalars(
        select(WebhookDelivery).where(WebhookDelivery.event_id == event.id)
    )
    assert [delivery.endpoint_id for delivery in deliveries] == [wanting.id]
    payload = event.payload
    assert payload["id"] == public_id("webhook_event", event.id)
    assert (payload["object"], payload["type"]) == ("event", "retention.rolled_back")
    data = payload["data"]
    assert data["id"] == public_id("job", job.id)
    assert (data["sequence"], data["status"], data["reason"]) == (7, job.state.value, "drop")
    assert (data["job_id"], data["state"]) == (data["id"], data["status"])
    assert datetime.fromisoformat(data["occurred_at"]).tzinfo is not None
    assert (data["lower"], data["nested"]) == (None, [None, 1.5])
    json.dumps(payload, allow_nan=False)


def test_an_unknown_type_is_a_mistake_of_ours(session: Session) -> None:
    with pytest.raises(ValueError, match=r"moon\.landed"):
        webhooks.emit_event(session, project_id=uuid4(), type="moon.landed", data={})


def test_deleting_an_endpoint_ends_what_was_on_its_way(session: Session) -> None:
    project_id = make_project(session).id
    row = make_endpoint(session, project_id).row
    event = webhooks.emit_event(session, project_id=project_id, type=TYPES[0], data={})
    webhooks.delete_endpoint(session, project_id=project_id, endpoint_id=row.id)
    session.expire_all()
    delivery = session.scalars(
        select(WebhookDelivery).where(WebhookDelivery.event_id == event.id)
    ).one()
    assert delivery.state is DeliveryState.DEAD


def test_a_dead_delivery_starts_over_when_asked_to(session: Session) -> None:
    project_id = make_project(session).id
    row = make_endpoint(session, project_id).row
    webhooks.emit_event(session, project_id=project_id, type=TYPES[0], data={})
    [(delivery, event)], has_more = webhook_deliveries.list_deliveries(
        session, project_id=project_id, endpoint_id=row.id
    )
    assert (event.type, has_more) == (TYPES[0], False)
    delivery.state, delivery.tries = DeliveryState.DEAD, 10
    session.flush()
    again = webhook_deliveries.redeliver(
        session, project_id=project_id, endpoint_id=row.id, delivery_id=delivery.id
    )
    assert (again.state, again.tries) == (DeliveryState.PENDING, 0)
    row.disabled_at, row.disabled_reason = event.created_at, "It answered 410 Gone."
    session.flush()
    with pytest.raises(Conflict, match="410"):
        webhook_deliveries.redeliver(
            session, project_id=project_id, endpoint_id=row.id, delivery_id=delivery.id
        )


def test_fields_of_an_endpoint_can_be_changed(session: Session) -> None:
    project_id = make_project(session).id
    row = make_endpoint(session, project_id).row
    before = row.updated_at
    changed = webhooks.update_endpoint(
        session,
        project_id=project_id,
        endpoint_id=row.id,
        name="new",
        url="https://example.org/2",
        event_types=["fine_tuning.job.failed"],
    )
    assert (changed.name, changed.url) == ("new", "https://example.org/2")
    assert changed.event_types == ["fine_tuning.job.failed"]
    assert changed.updated_at > before
    with pytest.raises(BadRequest):
        webhooks.update_endpoint(
            session, project_id=project_id, endpoint_id=row.id, url="http://example.org"
        )


def test_the_key_file_is_made_once_and_is_private(settings: Settings) -> None:
    token = load_cipher(settings).encrypt(b"x")
    assert load_cipher(settings).decrypt(token) == b"x"
    path = settings.data_dir / "secret.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_new_key_in_front_keeps_what_the_old_one_encrypted(settings: Settings) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    token = load_cipher(settings.model_copy(update={"secret_key": SecretStr(old)})).encrypt(b"x")
    both = load_cipher(settings.model_copy(update={"secret_key": SecretStr(f"{new},{old}")}))
    assert both.decrypt(token) == b"x"
    with pytest.raises(BadRequest, match="Fernet"):
        load_cipher(settings.model_copy(update={"secret_key": SecretStr("short")}))


def test_every_transition_and_every_decision_that_changes_something_has_a_type() -> None:
    told = {f"fine_tuning.job.{state.value}" for state in TOLD}
    assert len(told) == len(JobState) - 1
    assert told <= set(webhooks.EVENT_TYPES)
    assert set(WEBHOOKS) == set(Action) - {Action.KEEP}
    assert set(WEBHOOKS.values()) <= set(webhooks.EVENT_TYPES)
    assert len(webhooks.EVENT_TYPES) == len(set(webhooks.EVENT_TYPES))
