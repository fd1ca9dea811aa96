"""The webhook sender against receivers that are slow, endless, lying, gone or merely busy."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from cryptography.fernet import Fernet, MultiFernet
from pydantic import SecretStr
from sqlalchemy import func, select, text, update
from standardwebhooks import Webhook

from app.control.webhook_http import WebhookClient
from app.control.webhook_lanes import PER_ENDPOINT
from app.control.webhook_results import GAPS_SECONDS, parse_retry_after
from app.control.webhook_sender import WebhookSender, run
from app.db.models import WebhookDelivery, WebhookEndpoint
from app.db.session import SessionFactory, transaction
from app.domain.states import DeliveryState
from app.services.webhooks import create_endpoint, emit_event, rotate_secret
from app.settings import Settings
from tests.app.control.receivers import (
    Handler,
    after,
    drip,
    endless,
    endless_continue,
    endless_headers,
    receiving,
    status,
)
from tests.factories import make_project

TYPES = ["fine_tuning.job.succeeded", "webhook_endpoint.disabled"]
KEY = Fernet.generate_key()
CIPHER = MultiFernet([Fernet(KEY)])
FAST = 0.004  # a gap of 5 s becomes 20 ms


@pytest.fixture
def project_id(committed_factory: SessionFactory) -> UUID:
    with transaction(committed_factory) as session:
        return make_project(session).id


@pytest.fixture
def factory(committed_factory: SessionFactory) -> SessionFactory:
    return committed_factory


def subscribe(factory: SessionFactory, project_id: UUID, url: str) -> tuple[UUID, str]:
    with transaction(factory) as session:
        created = create_endpoint(
            session,
            CIPHER,
            project_id=project_id,
            name="hook",
            url=url,
            event_types=TYPES,
            allow_private=True,
        )
        return created.row.id, created.secret


def emit(factory: SessionFactory, project_id: UUID, count: int = 1) -> None:
    with transaction(factory) as session:
        for number in range(count):
            emit_event(session, project_id=project_id, type=TYPES[0], data={"number": number})


@contextmanager
def sending(
    factory: SessionFactory,
    *,
    scale: float = FAST,
    allow_private: bool = True,
    total_seconds: float = 5.0,
) -> Iterator[None]:
    stop = threading.Event()

    async def deliver() -> None:
        client = WebhookClient(allow_private=allow_private, total_seconds=total_seconds)
        sender = WebhookSender(factory, CIPHER, client, schedule_scale=scale, poll_seconds=0.05)
        await sender.run(stop)

    thread = threading.Thread(target=lambda: asyncio.run(deliver()))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def deliveries(factory: SessionFactory) -> list[WebhookDelivery]:
    with transaction(factory) as session:
        return list(session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.seq)))


def endpoint(factory: SessionFactory, endpoint_id: UUID) -> WebhookEndpoint:
    with transaction(factory) as session:
        return session.get_one(WebhookEndpoint, endpoint_id)


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


def wait_for_state(factory: SessionFactory, state: DeliveryState) -> list[WebhookDelivery]:
    def all_there() -> list[WebhookDelivery]:
        rows = deliveries(factory)
        return rows if all(row.state is state for row in rows) else []

    found: list[WebhookDelivery] = wait_for(all_there)
    return found


def tried(factory: SessionFactory) -> WebhookDelivery:
    found: WebhookDelivery = wait_for(
        lambda: next((row for row in deliveries(factory) if row.tries > 0), None)
    )
    return found


def test_an_event_arrives_signed(factory: SessionFactory, project_id: UUID) -> None:
    with receiving(status(200, b"thanks\0")) as receiver:
        _, secret = subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory):
            [row] = wait_for_state(factory, DeliveryState.DELIVERED)
    [(headers, body)] = receiver.requests
    payload = Webhook(secret).verify(body, headers)
    assert (payload["type"], payload["data"]["number"]) == (TYPES[0], 0)
    assert headers["webhook-id"] == payload["id"]
    assert headers["accept-encoding"] == "identity"
    assert (row.tries, row.last_status, row.last_error) == (1, 200, None)
    assert row.last_reply == "thanks\ufffd"
    assert row.delivered_at is not None


def test_both_secrets_sign_while_one_is_being_replaced(
    factory: SessionFactory, project_id: UUID
) -> None:
    with receiving() as receiver:
        endpoint_id, old = subscribe(factory, project_id, receiver.url)
        with transaction(factory) as session:
            new = rotate_secret(
                session, CIPHER, project_id=project_id, endpoint_id=endpoint_id, keep_old=True
            ).secret
        emit(factory, project_id)
        with sending(factory):
            wait_for_state(factory, DeliveryState.DELIVERED)
    [(headers, body)] = receiver.requests
    for secret in (old, new):
        Webhook(secret).verify(body, headers)


def test_a_failed_try_is_repeated_with_the_same_id_and_body(
    factory: SessionFactory, project_id: UUID
) -> None:
    with receiving(status(500), status(302, Location="/x"), status(200)) as receiver:
        endpoint_id, secret = subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory, scale=FAST / 60):
            [row] = wait_for_state(factory, DeliveryState.DELIVERED)
    assert row.tries == 3
    assert len(set(receiver.ids())) == 1
    assert len({body for _, body in receiver.requests}) == 1
    for headers, body in receiver.requests:
        Webhook(secret).verify(body, headers)
    assert endpoint(factory, endpoint_id).failures_in_a_row == 0
    assert endpoint(factory, endpoint_id).failing_since is None


def test_redirects_are_not_followed(factory: SessionFactory, project_id: UUID) -> None:
    with receiving(host="127.0.0.2") as sink, receiving(status(307, Location=sink.url)) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory, scale=1):
            row = tried(factory)
        assert sink.requests == []
    assert (row.state, row.last_error) == (DeliveryState.PENDING, "answered 307")
    wait = row.next_try_at - datetime.now(UTC)
    assert timedelta(seconds=1) < wait < timedelta(seconds=6.1)


def test_gone_disables_the_endpoint_and_tells_the_others(
    factory: SessionFactory, project_id: UUID
) -> None:
    with receiving(status(410)) as gone, receiving() as other:
        gone_id, _ = subscribe(factory, project_id, gone.url)
        emit(factory, project_id, 3)
        subscribe(factory, project_id, other.url)
        with sending(factory):
            wait_for(lambda: other.requests)
            wait_for(lambda: endpoint(factory, gone_id).disabled_at)
            wait_for(
                lambda: all(row.state is not DeliveryState.PENDING for row in deliveries(factory))
            )
    assert [row.state for row in deliveries(factory)].count(DeliveryState.DEAD) == 3
    assert len(gone.requests) <= PER_ENDPOINT
    assert b"webhook_endpoint.disabled" in other.requests[0][1]
    assert endpoint(factory, gone_id).disabled_reason == "It answered 410 Gone."


def test_ten_failed_tries_are_the_end(factory: SessionFactory, project_id: UUID) -> None:
    with receiving(status(500)) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory, scale=1e-7):
            [row] = wait_for_state(factory, DeliveryState.DEAD)
    assert row.tries == len(GAPS_SECONDS) + 1 == len(receiver.requests) == 10


def test_an_endpoint_that_fails_for_five_days_is_switched_off(
    factory: SessionFactory, project_id: UUID
) -> None:
    with receiving(status(500)) as receiver:
        endpoint_id, _ = subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with transaction(factory) as session:
            session.execute(
                update(WebhookEndpoint).values(
                    failures_in_a_row=8, failing_since=func.clock_timestamp() - timedelta(days=6)
                )
            )
        with sending(factory, scale=FAST / 60):
            wait_for(lambda: endpoint(factory, endpoint_id).disabled_at)
            wait_for_state(factory, DeliveryState.DEAD)
    assert len(receiver.requests) == 2  # the ninth failure was not enough, the tenth was


def test_retry_after_is_honoured(factory: SessionFactory, project_id: UUID) -> None:
    with receiving(status(429, Retry_After="3600")) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory):
            row = tried(factory)
    assert row.next_try_at - datetime.now(UTC) > timedelta(seconds=3500)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("120", 120, 120),
        (" 7 ", 7, 7),
        ("9" * 400, 86_400, 86_400),
        ("-5", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Fri, 31 Dec 2999 23:59:59 GMT", 86_400, 86_400),
    ],
)
def test_retry_after_is_read_in_both_forms(text: str, low: float, high: float) -> None:
    assert low <= parse_retry_after(text) <= high


@pytest.mark.parametrize("answer", [drip(0.05), endless_headers, endless_continue])
def test_a_receiver_that_never_ends_is_cut_off_and_others_do_not_wait(
    factory: SessionFactory, project_id: UUID, answer: Callable[[Handler], None]
) -> None:
    with receiving(answer) as bad, receiving() as good:
        bad_id, _ = subscribe(factory, project_id, bad.url)
        subscribe(factory, project_id, good.url)
        emit(factory, project_id, 5)
        began = time.monotonic()
        with sending(factory, total_seconds=2.0):
            wait_for(lambda: len(good.requests) == 5)
            assert time.monotonic() - began < 2.0
            row = tried_of(factory, bad_id)
            assert time.monotonic() - began < 5.0
    assert row.last_error is not None
    assert row.state is DeliveryState.PENDING


def tried_of(factory: SessionFactory, endpoint_id: UUID) -> WebhookDelivery:
    found: WebhookDelivery = wait_for(
        lambda: next(
            (
                row
                for row in deliveries(factory)
                if row.endpoint_id == endpoint_id and row.last_error
            ),
            None,
        )
    )
    return found


def test_an_endless_body_is_read_only_so_far_and_never_decoded(
    factory: SessionFactory, project_id: UUID
) -> None:
    with receiving(endless) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory):
            [row] = wait_for_state(factory, DeliveryState.DELIVERED)
    assert row.last_reply == "y" * 2048


def test_no_more_than_two_tries_at_once_reach_one_receiver(
    factory: SessionFactory, project_id: UUID
) -> None:
    with receiving(after(0.15, status(200))) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id, 8)
        with sending(factory):
            wait_for_state(factory, DeliveryState.DELIVERED)
    assert receiver.most_at_once == PER_ENDPOINT
    assert len(set(receiver.ids())) == len(receiver.ids()) == 8


def test_two_senders_share_the_work(factory: SessionFactory, project_id: UUID) -> None:
    with receiving() as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id, 30)
        with sending(factory), sending(factory):
            wait_for_state(factory, DeliveryState.DELIVERED)
    assert len(receiver.ids()) == len(set(receiver.ids())) == 30


def test_private_addresses_are_not_called(factory: SessionFactory, project_id: UUID) -> None:
    with receiving() as receiver:
        subscribe(factory, project_id, receiver.url.replace("127.0.0.1", "localhost"))
        subscribe(factory, project_id, receiver.url.replace("127.0.0.1", "2130706433"))
        emit(factory, project_id)
        with sending(factory, allow_private=False):
            wait_for(lambda: all(row.tries for row in deliveries(factory)))
    assert receiver.requests == []
    errors = [row.last_error or "" for row in deliveries(factory)]
    assert all(error.startswith("refused: ") for error in errors), errors


def test_a_stopped_sender_gives_back_what_it_was_trying(
    factory: SessionFactory, project_id: UUID
) -> None:
    with receiving(drip(0.05)) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory, total_seconds=60):
            wait_for(lambda: receiver.requests)
    [row] = deliveries(factory)
    assert (row.state, row.tries, row.claimed_until) == (DeliveryState.PENDING, 0, None)


def test_old_deliveries_are_cleared_away(factory: SessionFactory, project_id: UUID) -> None:
    with receiving() as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id, 2)
        with sending(factory):
            first, _ = wait_for_state(factory, DeliveryState.DELIVERED)
        with transaction(factory) as session:
            session.execute(
                update(WebhookDelivery)
                .where(WebhookDelivery.id == first.id)
                .values(created_at=func.clock_timestamp() - timedelta(days=31))
            )
        with sending(factory):
            wait_for(lambda: len(deliveries(factory)) == 1)


SENDER = """
import sys, threading
from app.control.webhook_sender import run
from app.db.session import build_engine, build_session_factory
from app.settings import load_settings
settings = load_settings()
run(build_session_factory(build_engine(settings.database_url)), settings, threading.Event())
"""


def test_a_sender_killed_after_its_post_sends_the_same_event_again(
    database: str, factory: SessionFactory, project_id: UUID, settings: Settings
) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def kill_the_sender(_: Handler) -> None:
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        raise ConnectionError

    with receiving(kill_the_sender, status(200)) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        environment = os.environ | {
            "RETAIN_DATABASE_URL": database,
            "RETAIN_SECRET_KEY": KEY.decode(),
            "RETAIN_WEBHOOK_ALLOW_PRIVATE": "true",
        }
        processes.append(subprocess.Popen([sys.executable, "-c", SENDER], env=environment))
        wait_for(lambda: processes[0].poll() is not None, 30)
        [row] = deliveries(factory)
        assert (row.state, row.tries) == (DeliveryState.PENDING, 0)
        assert row.claimed_until is not None
        with transaction(factory) as session:  # instead of waiting for the claim to run out
            session.execute(update(WebhookDelivery).values(claimed_until=func.clock_timestamp()))
        stop = threading.Event()
        ours = settings.model_copy(
            update={"secret_key": SecretStr(KEY.decode()), "webhook_allow_private": True}
        )
        thread = threading.Thread(target=run, args=(factory, ours, stop))
        thread.start()
        try:
            wait_for_state(factory, DeliveryState.DELIVERED)
        finally:
            stop.set()
            thread.join()
    first, second = receiver.ids()
    assert first == second


def test_an_answer_that_cannot_be_recorded_at_once_is_recorded_later_and_not_asked_for_again(
    factory: SessionFactory, project_id: UUID
) -> None:
    def rename(before: str, after: str) -> None:
        with transaction(factory) as session:
            session.execute(text(f"ALTER TABLE {before} RENAME TO {after}"))

    def lose_the_table(handler: Handler) -> None:
        rename("webhook_deliveries", "elsewhere")
        status(200)(handler)

    with receiving(lose_the_table) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory):
            wait_for(lambda: receiver.requests)
            time.sleep(0.3)
            rename("elsewhere", "webhook_deliveries")
            [row] = wait_for_state(factory, DeliveryState.DELIVERED)
    assert row.tries == len(receiver.requests) == 1
