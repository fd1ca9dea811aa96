"""Rows F12 to F16: whatever happens to Redis costs time alone."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
import redis
from sqlalchemy import select

from app.broker import build_celery, ring
from app.db.models import Job, OutboxMessage
from app.db.session import transaction
from app.domain.identifiers import parse_id
from app.domain.states import JobState
from tests.faults.conftest import Servers
from tests.faults.fleet import Client, Fleet, allowed, measured
from tests.faults.processes import eventually
from tests.faults.proxy import Proxy

POLL_SECONDS = 1.0


def started_after(fleet: Fleet, job_id: UUID) -> float:
    """Seconds from a job's submission to its first claim."""
    claim = fleet.claimed(job_id, 1)
    return float((claim.created_at - fleet.job(job_id).created_at).total_seconds())


def post_for(client: Client, seconds: float) -> tuple[list[UUID], list[float]]:
    """Submits jobs one after another; their ids, and how long each answer took."""
    ids, latencies = [], []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        began = time.monotonic()
        answer = client.post_job()
        latencies.append(time.monotonic() - began)
        assert answer.status_code == 200, answer.text
        ids.append(parse_id("job", answer.json()["id"]))
        time.sleep(0.2)
    return ids, latencies


def check_latencies(usual: list[float], found: list[float]) -> None:
    """Submissions are as fast as with a broker; on a busy machine, as slow."""
    assert statistics.median(found) < max(0.3, 3 * statistics.median(usual))
    assert max(found) < max(1.0, 5 * max(usual))  # the one that finds Redis gone


@pytest.mark.faults
def test_f12_flushed_broker_starts_every_job_once(fleet: Fleet):
    running = [fleet.submit(steps=120, priority=9) for _ in range(2)]
    fleet.control()
    for number in range(2):
        fleet.worker(
            pace=0.02,
            redis_url=fleet.settings.redis_url,
            scratch=f"w{number}",
            poll_seconds=POLL_SECONDS,
        )
    for job_id in running:
        fleet.reaches(job_id, 1)
    queued = [fleet.submit(steps=2) for _ in range(100)]
    with redis.Redis.from_url(fleet.settings.redis_url or "") as client:
        client.flushall()
    flushed_at = time.monotonic()
    everybody = [*running, *queued]
    eventually(
        lambda: fleet.count(JobState.SUCCEEDED) == len(everybody),
        "all of them end",
        seconds=240,
        tail=fleet.tail,
    )
    took = time.monotonic() - flushed_at
    with transaction(fleet.factory) as session:
        assert session.scalars(select(Job.attempt).distinct()).all() == [1]
    for job_id in everybody:
        fleet.check_history(job_id, attempts=1)
    measured("F12", running=2, queued=100, restarts=0, all_done_after_s=took)


@pytest.mark.slow
def test_f13_dead_broker_neither_slows_the_api_nor_keeps_jobs_waiting(
    fleet: Fleet, own_servers: Servers
):
    client = fleet.api()
    fleet.control()
    fleet.worker(pace=0.01, redis_url=fleet.settings.redis_url, poll_seconds=POLL_SECONDS)
    fleet.ends(fleet.submit(steps=2))
    _, usual = post_for(client, 3)
    own_servers.kill_redis()
    try:
        ids, latencies = post_for(client, 4)
        for job_id in ids[:3]:
            assert started_after(fleet, job_id) < allowed(20)
    finally:
        own_servers.redis.start()
    check_latencies(usual, latencies)
    measured(
        "F13",
        api_median_before_s=statistics.median(usual),
        api_median_s=statistics.median(latencies),
        api_worst_s=max(latencies),
        first_started_after_s=started_after(fleet, ids[0]),
    )


@pytest.mark.slow
def test_f14_stalled_broker_neither_slows_the_api_nor_stops_the_relay(fleet: Fleet):
    with Proxy(fleet.settings.redis_url or "") as proxy:
        client = fleet.api(redis_url=proxy.url)
        fleet.control(redis_url=proxy.url)
        fleet.worker(pace=0.01, redis_url=proxy.url, poll_seconds=POLL_SECONDS)
        fleet.ends(fleet.submit(steps=2))
        _, usual = post_for(client, 3)
        proxy.stall()
        ids, latencies = post_for(client, 4)
        for job_id in ids[:3]:
            assert started_after(fleet, job_id) < allowed(20)
        proxy.resume()
        check_latencies(usual, latencies)
        waiting = fleet.submit(queue="nobody")

        def is_rung() -> bool:
            with transaction(fleet.factory) as session:
                query = select(OutboxMessage.done_at).where(OutboxMessage.job_id == waiting)
                return session.scalar(query) is not None

        eventually(is_rung, "the relay rings again", tail=fleet.tail)
    measured(
        "F14",
        api_median_before_s=statistics.median(usual),
        api_median_s=statistics.median(latencies),
        api_worst_s=max(latencies),
        first_started_after_s=started_after(fleet, ids[0]),
    )


@pytest.mark.slow
def test_f15_bells_rung_ten_times_at_four_workers_start_each_job_once(fleet: Fleet):
    for number in range(4):
        fleet.worker(pace=0.01, redis_url=fleet.settings.redis_url, scratch=f"w{number}")
    jobs = [fleet.submit(steps=10) for _ in range(8)]
    celery = build_celery(fleet.settings.redis_url)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job_id: ring(celery, job_id), jobs * 10))
    for job_id in jobs:
        fleet.ends(job_id)
        fleet.check_history(job_id, attempts=1)
    measured("F15", bells=80, jobs=8, starts=8)


@pytest.mark.slow
def test_f16_cut_broker_connections_restart_no_training_and_bells_are_heard_again(fleet: Fleet):
    job_id = fleet.submit(steps=100)
    fleet.control()
    # It polls once, at its start: later jobs come to it by their bell.
    fleet.worker(pace=0.03, redis_url=fleet.settings.redis_url, poll_seconds=300)
    fleet.reaches(job_id, 5)
    with redis.Redis.from_url(fleet.settings.redis_url or "") as client:
        for _ in range(3):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            time.sleep(0.3)
    fleet.ends(job_id)
    fleet.check_history(job_id, attempts=1)
    later = fleet.submit(steps=2)
    fleet.ends(later)
    measured("F16", attempts=1, next_started_after_s=started_after(fleet, later))
