"""The long poll of a run's decisions, over a real port: woken by what is decided, held by nothing."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from app.db.session import SessionFactory, build_session_factory
from app.settings import Settings
from tests.external import point, registration, scores
from tests.serving import make_caller, serving


@dataclass
class Served:
    """A run on a server, and a client of it."""

    client: httpx.Client
    run: str

    def evaluate(self, step: int, lost: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.client.post(
            f"{self.run}/evaluations", json=point(step, lost)
        ).json()
        return found

    def wait(self, seconds: float, after: str | None = None) -> tuple[list[Any], float]:
        """What a long poll brings, and how long it took."""
        began = time.monotonic()
        query = {"wait": seconds} | ({} if after is None else {"after": after})
        answer = self.client.get(f"{self.run}/decisions", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"], time.monotonic() - began


@pytest.fixture
def served(settings: Settings, committed_factory: SessionFactory) -> Iterator[Served]:
    _, key = make_caller(committed_factory, settings)
    with serving(settings, committed_factory) as url:
        head = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"{url}/v1", headers=head, timeout=30) as client:
            made = client.post("/runs", json=registration()).json()
            client.post(f"/runs/{made['id']}/baseline", json={"scores": [scores()]})
            yield Served(client, f"/runs/{made['id']}")


def test_a_waiting_trainer_is_answered_when_something_is_decided(served: Served) -> None:
    first = served.evaluate(10)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(served.wait, 20, first["id"])
        time.sleep(0.7)
        assert not waiting.done()
        second = served.evaluate(20, 42)
        rows, seconds = waiting.result(timeout=20)
    assert [row["id"] for row in rows] == [second["id"]]
    assert rows[0]["instructions"][0]["type"] == "set_strength"
    assert 0.6 < seconds < 10


def test_a_persons_order_reaches_a_waiting_trainer(served: Served) -> None:
    first = served.evaluate(10)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(served.wait, 20, first["id"])
        time.sleep(0.3)
        body = {"action": "set_strength", "strategy": "kl", "strength": 3, "reason": "careful"}
        path = f"{served.run}/decisions/{first['id']}/override"
        assert served.client.post(path, json=body).status_code == 200
        rows, _ = waiting.result(timeout=20)
    assert rows[0]["instructions"] == [{"type": "set_strength", "strategy": "kl", "strength": 3.0}]
    assert rows[0]["ordered"]["reason"] == "careful"


def test_the_wait_ends_with_its_seconds_or_with_the_run(served: Served) -> None:
    rows, seconds = served.wait(1.2)
    assert rows == []
    assert 1.1 < seconds < 5
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(served.wait, 20)
        time.sleep(0.3)
        served.client.post(f"{served.run}/finish", json={})
        rows, seconds = waiting.result(timeout=20)
    assert rows == []
    assert seconds < 10


def test_many_waiting_trainers_hold_no_session(served: Served, committed_engine: Engine) -> None:
    """More wait than there are connections and threads; requests are answered beside them."""
    count = 60
    open_transactions = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND state = 'idle in transaction'"
    )
    with ThreadPoolExecutor(count) as pool:
        started = threading.Barrier(count + 1)

        def wait() -> list[Any]:
            started.wait()
            return served.wait(6)[0]

        waiting = [pool.submit(wait) for _ in range(count)]
        started.wait()
        time.sleep(1.5)
        began = time.monotonic()
        made = served.evaluate(10)
        assert time.monotonic() - began < 4
        with committed_engine.connect() as connection:
            held = connection.scalar(text(open_transactions))
        answers = [one.result(timeout=30) for one in waiting]
    assert held is not None
    assert held < 10
    assert all([row["id"] for row in rows] == [made["id"]] for rows in answers)


def test_two_posts_of_one_point_at_once_are_one_look(
    served: Served, committed_engine: Engine
) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: served.evaluate(10, 42), range(8)))
    assert len({one["id"] for one in made}) == 1
    with build_session_factory(committed_engine)() as session:
        assert session.scalar(text("SELECT count(*) FROM decisions")) == 1
        assert session.scalar(text("SELECT count(*) FROM job_orders")) == 1
