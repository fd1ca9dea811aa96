"""Long polls of a job: answered when its status changes, by whatever way that is learnt."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import text

from app.db.session import SessionFactory, transaction
from app.services.keys import revoke_key
from app.settings import Settings
from tests.following import Followed, followed


@pytest.fixture
def stand(settings: Settings, committed_factory: SessionFactory) -> Iterator[Followed]:
    with followed(settings, committed_factory) as stand:
        yield stand


def poll(
    stand: Followed, wait: float | None = None, prefer: str | None = None
) -> tuple[httpx.Response, float]:
    """A long poll's answer, and how long it took."""
    began = time.monotonic()
    with stand.client() as client:
        query = {} if wait is None else {"wait": wait}
        head = {} if prefer is None else {"prefer": prefer}
        answer = client.get(stand.path, params=query, headers=head)
    return answer, time.monotonic() - began


def change_after(stand: Followed, seconds: float) -> tuple[httpx.Response, float]:
    """A long poll's answer, and how long after the change it came."""
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(poll, stand, 20)
        stand.wait_for_waiters(1)
        time.sleep(seconds)
        stand.say("no change of status")
        time.sleep(0.2)
        assert not waiting.done()
        began = time.monotonic()
        stand.end()
        answer, _ = waiting.result(20)
        return answer, time.monotonic() - began


def listener(stand: Followed, what: str) -> object:
    """Something of the session that listens, once there is one."""
    found = text(
        f"SELECT pid, {what} FROM pg_stat_activity"
        " WHERE application_name = 'retain-ear' AND datname = current_database()"
    )
    ends_at = time.monotonic() + 10
    while time.monotonic() < ends_at:
        with transaction(stand.factory) as session:
            row = session.execute(found).first()
        if row is not None:
            return row[0]
        time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_a_wait_ends_with_the_change_it_waits_for(stand: Followed) -> None:
    answer, seconds = change_after(stand, 0.3)
    assert answer.json()["status"] == "cancelled"
    assert seconds < 0.5
    answer, seconds = poll(stand, 20)  # it has ended: answered at once
    assert answer.json()["status"] == "cancelled"
    assert seconds < 2


def test_a_lost_notification_costs_a_second(stand: Followed) -> None:
    with transaction(stand.factory) as session:
        session.execute(text("DROP TRIGGER tell_of_job_event ON job_events"))
    answer, seconds = change_after(stand, 0.3)
    assert answer.json()["status"] == "cancelled"
    assert seconds < 3


def test_a_broken_listener_listens_again(stand: Followed) -> None:
    killed = listener(stand, "pg_terminate_backend(pid)")
    while listener(stand, "pid") == killed:
        time.sleep(0.05)
    assert change_after(stand, 0.3)[1] < 0.5


def test_an_application_that_nobody_started_looks_for_itself(stand: Followed) -> None:
    listener(stand, "pid")  # started, so that it can be stopped
    stand.room.stop()
    stand.room.is_closing = False
    answer, seconds = change_after(stand, 0.0)
    assert answer.json()["status"] == "cancelled"
    assert seconds < 3


def test_the_preference_is_applied_and_said(
    settings: Settings, committed_factory: SessionFactory
) -> None:
    bounded = settings.model_copy(update={"max_wait_seconds": 1})
    with followed(bounded, committed_factory) as stand:
        for prefer, applied in (
            ("wait=1", "wait=1"),
            ("respond-async, Wait=100", "wait=1"),
            ("wait=0", "wait=0"),
            ("handling=lenient", None),
        ):
            answer, seconds = poll(stand, prefer=prefer)
            assert answer.json()["status"] == "running"
            assert answer.headers.get("preference-applied") == applied
            assert (seconds > 0.9) == (applied == "wait=1")
            assert seconds < 4
        answer, seconds = poll(stand, 0.3)
        assert "preference-applied" not in answer.headers
        assert 0.25 < seconds < 3


def test_a_revoked_key_waits_no_more(stand: Followed) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(poll, stand, 20)
        stand.wait_for_waiters(1)
        with transaction(stand.factory) as session:
            revoke_key(session, stand.key)
        answer, seconds = waiting.result(20)
    assert answer.status_code == 401
    assert seconds < 4


def test_a_client_that_leaves_waits_no_more(stand: Followed) -> None:
    with stand.client() as client, pytest.raises(httpx.ReadTimeout):
        client.get(stand.path, params={"wait": 60}, timeout=0.5)
    stand.wait_for_waiters(0)
