"""F29 and F32: receivers that are away for hours or days, and a sender that is killed in the middle of its work."""

import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import pytest
from sqlalchemy import func, select, text, update

from app.control.webhook_results import GAPS_SECONDS, JITTER_RATIO
from app.db.models import WebhookDelivery
from app.db.session import SessionFactory, transaction
from app.domain.states import DeliveryState
from app.services.webhook_deliveries import list_deliveries, redeliver_since
from tests.app.control.receivers import Handler, receiving, status
from tests.app.control.test_webhook_sender import (
    KEY,
    SENDER,
    deliveries,
    emit,
    endpoint,
    sending,
    subscribe,
    wait_for,
    wait_for_state,
)
from tests.factories import make_project

HOUR = 3600.0
DAY = 24 * HOUR
SHIFT_DELIVERIES = text(
    "UPDATE webhook_deliveries SET next_try_at = next_try_at - :by, scheduled_at = scheduled_at - :by,"
    " not_before = not_before - :by, created_at = created_at - :by"
)
SHIFT_ENDPOINTS = text("UPDATE webhook_endpoints SET failing_since = failing_since - :by")


@pytest.fixture
def factory(committed_factory: SessionFactory) -> SessionFactory:
    return committed_factory


@pytest.fixture
def project_id(factory: SessionFactory) -> UUID:
    with transaction(factory) as session:
        return make_project(session).id


def free_port() -> int:
    """A port that refuses connections for now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Calendar:
    """Time that passes by moving the rows' times instead of waiting."""

    def __init__(self, factory: SessionFactory) -> None:
        self._factory = factory
        self.seconds = 0.0

    def until_next_try(self) -> float:
        """Seconds until the next try of what is pending; infinite when nothing is."""
        with transaction(self._factory) as session:
            next_try_at: datetime | None = session.scalar(
                select(func.min(WebhookDelivery.next_try_at)).where(
                    WebhookDelivery.state == DeliveryState.PENDING
                )
            )
        if next_try_at is None:
            return float("inf")
        return max((next_try_at - datetime.now(UTC)).total_seconds(), 0.0)

    def skip(self, seconds: float) -> None:
        """Lets so much time pass at once."""
        self.seconds += seconds
        with transaction(self._factory) as session:
            for shift in (SHIFT_DELIVERIES, SHIFT_ENDPOINTS):
                session.execute(shift, {"by": timedelta(seconds=seconds)})

    def settle(self) -> None:
        """Waits until nothing is due or being tried."""

        def is_calm() -> bool:
            with transaction(self._factory) as session:
                busy = session.scalar(
                    select(func.count()).where(
                        WebhookDelivery.state == DeliveryState.PENDING,
                        (WebhookDelivery.next_try_at <= func.clock_timestamp())
                        | WebhookDelivery.claimed_until.is_not(None),
                    )
                )
            return busy == 0

        wait_for(is_calm, 20)

    def pass_until(self, seconds: float) -> None:
        """Goes from try to try until a time has come or nothing is left to try."""
        self.settle()
        while (wait := self.until_next_try()) < seconds - self.seconds:
            self.skip(wait)
            self.settle()


@pytest.mark.parametrize(
    "hours",
    [
        1,
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(55, marks=[pytest.mark.slow, pytest.mark.faults]),
    ],
)
def test_f29_after_an_outage_everything_arrives_within_the_hour(
    factory: SessionFactory, project_id: UUID, hours: int
) -> None:
    """Without a new event that would show that the receiver is back."""
    port, calendar = free_port(), Calendar(factory)
    subscribe(factory, project_id, f"http://127.0.0.1:{port}/hook")
    emit(factory, project_id, 12)
    with sending(factory, scale=1):
        calendar.pass_until(hours * HOUR)
        assert {row.state for row in deliveries(factory)} == {DeliveryState.PENDING}
        calendar.skip(hours * HOUR - calendar.seconds)
        with receiving(port=port) as receiver:
            wait = calendar.until_next_try()
            assert wait <= HOUR
            calendar.skip(wait)
            wait_for_state(factory, DeliveryState.DELIVERED)
            late = calendar.seconds - hours * HOUR
    print(f"outage {hours} h: all 12 delivered {late / 60:.0f} min after the return")
    assert late <= HOUR
    assert len(set(receiver.ids())) == len(receiver.ids()) == 12
    assert max(row.tries for row in deliveries(factory)) <= len(GAPS_SECONDS) + 1


def test_f29_while_one_is_away_only_one_of_its_events_is_tried_each_hour(
    factory: SessionFactory, project_id: UUID
) -> None:
    calendar = Calendar(factory)
    with receiving(status(503)) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id, 12)
        with sending(factory, scale=1):
            calendar.pass_until(3 * HOUR)
            calendar.settle()
            by_then = len(receiver.requests)
            calendar.pass_until(6 * HOUR)
    # By the schedule each event has five tries in three hours at the latest, and none in the three after that.
    assert by_then <= 12 * 5 + 4
    assert len(receiver.requests) - by_then <= 12 + 6


@pytest.mark.slow
def test_f29_after_four_days_events_are_dead_and_can_be_sent_again(
    factory: SessionFactory, project_id: UUID
) -> None:
    port, calendar = free_port(), Calendar(factory)
    endpoint_id, _ = subscribe(factory, project_id, f"http://127.0.0.1:{port}/hook")
    emit(factory, project_id, 3)
    began = datetime.now(UTC)
    with sending(factory, scale=1):
        calendar.pass_until(4 * DAY)
        died_after = calendar.seconds
        rows = deliveries(factory)
        assert [(row.state, row.tries) for row in rows] == [(DeliveryState.DEAD, 10)] * 3
        assert (1 - JITTER_RATIO) * sum(GAPS_SECONDS) <= died_after
        assert died_after <= (1 + JITTER_RATIO) * sum(GAPS_SECONDS)
        assert endpoint(factory, endpoint_id).disabled_at is None  # that takes five days
        calendar.skip(4 * DAY - calendar.seconds)
        with receiving(port=port) as receiver:
            with transaction(factory) as session:
                again = partial(
                    redeliver_since, session, project_id=project_id, endpoint_id=endpoint_id
                )
                dead, _ = list_deliveries(
                    session,
                    project_id=project_id,
                    endpoint_id=endpoint_id,
                    state=DeliveryState.DEAD,
                )
                ids = {event.payload["id"] for _, event in dead}
                assert again(since=began) == 0
                assert again(since=began - timedelta(days=4, minutes=1)) == 3
            wait_for_state(factory, DeliveryState.DELIVERED)
    print(f"dead after {died_after / HOUR:.0f} h and 10 tries; sent again: {len(ids)}")
    assert set(receiver.ids()) == ids
    assert len(ids) == 3


@pytest.mark.slow
def test_f29_five_days_of_failures_switch_an_endpoint_off_and_tell_the_others(
    factory: SessionFactory, project_id: UUID
) -> None:
    calendar = Calendar(factory)
    failing_id, _ = subscribe(factory, project_id, f"http://127.0.0.1:{free_port()}/hook")
    with receiving() as other, sending(factory, scale=1):
        emit(factory, project_id, 1)
        subscribe(factory, project_id, other.url)
        for half_days in range(1, 13):
            calendar.pass_until(half_days * DAY / 2)
            calendar.skip(max(half_days * DAY / 2 - calendar.seconds, 0.0))
            if endpoint(factory, failing_id).disabled_at is not None:
                break
            emit(factory, project_id, 1)
        wait_for(lambda: any(b"webhook_endpoint.disabled" in body for _, body in other.requests))
    off = endpoint(factory, failing_id)
    assert off.disabled_reason is not None
    assert "failed for 5 days" in off.disabled_reason
    assert off.failures_in_a_row >= 10
    assert 5 * DAY <= calendar.seconds <= 5.6 * DAY


def test_f29_an_event_that_only_one_receiver_refuses_does_not_speed_up(
    factory: SessionFactory, project_id: UUID
) -> None:
    """Successes in between show that the receiver is there: the refused event keeps its schedule."""

    def picky(handler: Handler) -> None:
        refuses = b'"number":0' in receiver.requests[-1][1]
        status(500 if refuses else 200)(handler)

    with receiving(picky) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id, 1)
        with sending(factory, scale=1):
            wait_for(lambda: deliveries(factory)[0].tries == 1)
            with transaction(factory) as session:
                session.execute(
                    update(WebhookDelivery).values(
                        next_try_at=func.clock_timestamp() + timedelta(hours=2)
                    )
                )
            for _ in range(5):
                emit(factory, project_id, 2)  # its number 0 is refused as well
                wait_for(lambda: all(row.tries for row in deliveries(factory)))
    assert deliveries(factory)[0].tries == 1
    assert deliveries(factory)[0].scheduled_at is None


def test_f29_a_receiver_that_asks_for_a_day_is_left_alone_for_a_day(
    factory: SessionFactory, project_id: UUID
) -> None:
    calendar = Calendar(factory)
    with receiving(status(429, Retry_After="90000"), status(200)) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)
        with sending(factory, scale=1):
            calendar.settle()
            assert 23.9 * HOUR < calendar.until_next_try() <= 24 * HOUR
            calendar.skip(calendar.until_next_try())
            wait_for_state(factory, DeliveryState.DELIVERED)
    assert len(receiver.requests) == 2


@contextmanager
def sender_process(database: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A sender of its own."""
    environment = os.environ | {
        "RETAIN_DATABASE_URL": database,
        "RETAIN_SECRET_KEY": KEY.decode(),
        "RETAIN_WEBHOOK_ALLOW_PRIVATE": "true",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SENDER], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_f32_a_sender_killed_between_post_and_mark_sends_the_same_ids_again(
    database: str, factory: SessionFactory, project_id: UUID
) -> None:
    """40 events; the sender is killed while it waits for an answer, and another one takes over."""
    events, fatal = 40, random.Random(32).randint(8, 24)
    killed: list[subprocess.Popen[bytes]] = []

    def kill_once(handler: Handler) -> None:
        if len(receiver.requests) == fatal and killed[0].poll() is None:
            os.kill(killed[0].pid, signal.SIGKILL)
            killed[0].wait()
            raise ConnectionError
        status(200)(handler)

    with receiving(kill_once) as receiver:
        subscribe(factory, project_id, receiver.url)
        emit(factory, project_id, events)
        with sender_process(database) as first:
            killed.append(first)
            wait_for(lambda: first.poll() is not None, 60)
        answered = len(receiver.requests)
        unmarked = [row for row in deliveries(factory) if row.state is DeliveryState.PENDING]
        assert unmarked
        assert any(row.claimed_until is not None for row in unmarked)
        with transaction(
            factory
        ) as session:  # instead of waiting a minute for the claims to run out
            session.execute(
                update(WebhookDelivery)
                .where(WebhookDelivery.claimed_until.is_not(None))
                .values(claimed_until=func.clock_timestamp())
            )
        with sending(factory, scale=1):
            rows = wait_for_state(factory, DeliveryState.DELIVERED)
    times = Counter(receiver.ids())
    assert len(times) == len(rows) == events  # every event, under one id each
    again = [key for key, count in times.items() if count > 1]
    assert max(times.values()) == 2
    assert 1 <= len(again) <= len(unmarked)
    bodies: dict[str, set[bytes]] = {}
    for headers, body in receiver.requests:
        bodies.setdefault(headers["webhook-id"], set()).add(body)
    assert all(len(variants) == 1 for variants in bodies.values())
    print(f"killed at request {answered} of {events}: {len(again)} came twice, none was lost")


def test_f32_a_result_without_its_claim_changes_nothing(
    factory: SessionFactory, project_id: UUID
) -> None:
    """A sender that slept past its claim must not overrule whoever has the delivery now."""
    with receiving(status(500), status(200)) as receiver:
        endpoint_id, _ = subscribe(factory, project_id, receiver.url)
        emit(factory, project_id)

        def steal(handler: Handler) -> None:
            with transaction(factory) as session:
                later = func.clock_timestamp() + timedelta(seconds=60)
                session.execute(update(WebhookDelivery).values(claimed_until=later))
            status(500)(handler)

        receiver.answers[0] = steal
        with sending(factory, scale=1):
            wait_for(lambda: endpoint(factory, endpoint_id).failures_in_a_row == 1)
    [row] = deliveries(factory)
    assert (row.state, row.tries, row.last_error) == (DeliveryState.PENDING, 0, None)
    assert row.claimed_until is not None
