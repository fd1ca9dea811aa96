"""Rows F8 and F17: what the API acknowledged is there, and what it did not is there once or not at all."""

import threading
import time
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import func, select, update

from app.db.models import IdempotencyKey, Job
from app.db.session import transaction
from app.domain.identifiers import parse_id
from app.services.idempotency import LONGEST
from tests.faults.conftest import FAST, Servers
from tests.faults.fleet import Client, Fleet, allowed, measured
from tests.faults.processes import eventually
from tests.faults.proxy import Proxy


class Callers:
    """Submits jobs all the time from several threads, until they are told to stop."""

    def __init__(self, client: Client, number: int) -> None:
        self._client = client
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(number)]
        self.answers: list[tuple[float, int, str]] = []  # when, status, id

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.accepted, "jobs are accepted")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def accepted(self) -> list[str]:
        return [found for _, status, found in self.answers if status == 200]

    @property
    def refusing_seconds(self) -> float:
        """From the first answer that was none to the last."""
        times = [at for at, status, _ in self.answers if status != 200]
        return max(times) - min(times) if times else 0.0

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = self._client.post_job()
            name = answer.json()["id"] if answer.status_code == 200 else answer.text
            self.answers.append((time.monotonic(), answer.status_code, name))
            time.sleep(0.05)


@pytest.mark.slow
def test_f08_restarted_database_is_a_503_for_moments_and_nothing_is_lost(
    fleet: Fleet, own_servers: Servers
):
    client = fleet.api()
    fleet.control()
    job_id = fleet.submit(steps=150, priority=9)
    fleet.worker()
    fleet.reaches(job_id, 7)
    with Callers(client, 3) as callers:
        own_servers.stop_postgres(FAST)
        own_servers.start_postgres()
        known = len(callers.accepted)
        eventually(lambda: len(callers.accepted) > known + 5, "jobs are accepted again")
    statuses = {status for _, status, _ in callers.answers}
    assert statuses <= {200, 503}, [a for a in callers.answers if a[1] not in {200, 503}][:3]
    assert callers.refusing_seconds < allowed(5)
    with transaction(fleet.factory) as session:
        stored = set(session.scalars(select(Job.id)))
    assert {parse_id("job", name) for name in callers.accepted} <= stored
    fleet.ends(job_id)
    fleet.check_history(job_id, attempts=1)
    measured(
        "F8",
        refused_for_s=callers.refusing_seconds,
        acknowledged=len(callers.accepted),
        acknowledged_lost=0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_f17_api_killed_at_the_commit_of_a_submission_leaves_one_job(fleet: Fleet, moment):
    """Before the commit there is none, and a repeated call makes it; after it, the same one is answered."""
    key = uuid4().hex
    with Proxy(fleet.settings.database_url or "") as proxy:
        client = fleet.api(database_url=proxy.url)
        process = fleet.processes["api"]
        proxy.at_commit(b"INSERT INTO jobs", moment, process.kill)
        with pytest.raises(httpx.TransportError):
            client.post_job(key)
        process.wait(10)
        between = count_jobs(fleet)
        client = fleet.api(database_url=proxy.url)
        if (
            moment == "before"
        ):  # nobody can know that the first call is dead, until it has had its time
            assert client.post_job(key).status_code == 409
            age_keys(fleet)
        answers = [client.post_job(key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert count_jobs(fleet) == 1
    assert between == (moment == "after")
    measured("F17", killed=f"{moment} the commit", jobs=1)


def age_keys(fleet: Fleet) -> None:
    """As if the longest time that a request may take had passed."""
    past = IdempotencyKey.created_at - LONGEST
    with transaction(fleet.factory) as session:
        session.execute(update(IdempotencyKey).values(created_at=past))


def count_jobs(fleet: Fleet) -> int:
    with transaction(fleet.factory) as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0
