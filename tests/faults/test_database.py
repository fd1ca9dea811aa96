"""Rows F5 to F11 and F26: the database stalls, restarts, crashes, stays away, or loses its replies."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from app.db.models import Checkpoint, Job, JobEvent, ModelVersion
from app.db.session import transaction
from app.domain.states import JobState
from tests.faults.conftest import CRASH, IMMEDIATE, Servers
from tests.faults.fleet import ROOT, Fleet, allowed, measured, wait_dead
from tests.faults.processes import eventually, find_trainers
from tests.faults.proxy import Proxy

PATIENT: dict[str, Any] = {"lease_ttl_seconds": 6.0, "beat_seconds": 1.0}


def behind(fleet: Fleet) -> Proxy:
    return Proxy(fleet.settings.database_url or "")


@pytest.mark.slow
def test_f05_short_partition_costs_neither_an_attempt_nor_a_step(fleet: Fleet):
    job_id = fleet.submit(steps=250)
    with behind(fleet) as proxy:
        fleet.control(**PATIENT)
        fleet.worker(database_url=proxy.url, **PATIENT)
        fleet.reaches(job_id, 12)
        fleet.worker(scratch="spare", **PATIENT)  # would take the job, could it
        fleet.wait_for_workers(2)
        proxy.stall()
        time.sleep(3.5)  # of a lease of 6
        proxy.resume()
        fleet.ends(job_id)
        fleet.check_history(job_id, attempts=1)
    saved = [c.step for c in fleet.rows(Checkpoint, job_id)]
    assert saved == list(range(0, 251, 5))
    measured("F5", stalled_s=3.5, lease_s=6.0, attempts=1, checkpoints_missing=0)


@pytest.mark.slow
def test_f06_long_partition_another_worker_goes_on_and_the_first_stops_within_its_grace(
    fleet: Fleet, tmp_path
):
    job_id = fleet.submit(steps=400)
    with behind(fleet) as proxy:
        fleet.worker(
            *("paced", "--lock", str(tmp_path / "gpu-a")),
            scratch="a",
            database_url=proxy.url,
            partition_grace_seconds=4.0,
        )
        fleet.reaches(job_id, 12)
        trainers = find_trainers(job_id.hex)
        fleet.control()
        fleet.worker("paced", "--lock", str(tmp_path / "gpu-b"), scratch="b")
        fleet.wait_for_workers(2)
        stalled_at = time.time()
        proxy.stall()
        wait_dead(trainers, seconds=30)
        stopped_after = time.time() - stalled_at
        assert stopped_after < allowed(4.0 + 2.0)  # the grace, and one look
        claim = fleet.claimed(job_id, 2)
        taken_after = claim.created_at.timestamp() - stalled_at
        # A write that was cut off in its middle holds its row until the server ends it: ten seconds,
        # which are a sixth of a lease of a minute and more than the one of this test.
        assert taken_after < fleet.takeover_seconds + allowed(10)
        saved = len([c for c in fleet.rows(Checkpoint, job_id) if c.attempt == 1])
        proxy.resume()
        fleet.reaches(job_id, 60)
        fleet.check_history(job_id, attempts=2)
        assert len([c for c in fleet.rows(Checkpoint, job_id) if c.attempt == 1]) == saved
    measured("F6", taken_over_after_s=taken_after, first_stopped_after_s=stopped_after, grace_s=4.0)


@pytest.mark.slow
def test_f07_heartbeat_on_a_hung_socket_is_cut_and_the_lease_never_runs_out(fleet: Fleet):
    job_id = fleet.submit(steps=200)
    with behind(fleet) as proxy:
        fleet.control(**PATIENT)
        fleet.worker(database_url=proxy.url, **PATIENT)
        fleet.reaches(job_id, 12)
        assert proxy.stall_live(b"retain-beat") == 1
        least = 60.0
        deadline = time.monotonic() + 8
        with fleet.factory() as session:
            left = func.extract("epoch", Job.lease_expires_at - func.clock_timestamp())
            while time.monotonic() < deadline:
                found = session.scalar(select(left).where(Job.id == job_id))
                session.rollback()
                assert found is not None, "the lease is gone"
                least = min(least, float(found))
                time.sleep(0.1)
        assert least > 0
        assert fleet.job(job_id).attempt == 1
        assert "worker.beat_failed" in fleet.log.read_text()  # it was cut, and made anew
    measured("F7", least_left_of_the_lease_s=least, lease_s=6.0)


class Ledger:
    """Writes jobs all the time, and remembers which of them were acknowledged."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.acknowledged: list[UUID] = []
        self.times: list[float] = []

    def __enter__(self) -> "Ledger":
        self._thread.start()
        eventually(lambda: len(self.acknowledged) > 5, "it writes")
        return self

    def __exit__(self, *_: object) -> None:
        written = len(self.acknowledged)
        eventually(lambda: len(self.acknowledged) > written + 5, "it writes again")
        self._stop.set()
        self._thread.join()

    @property
    def longest_gap(self) -> float:
        pairs = zip(self.times, self.times[1:], strict=False)
        return max(later - earlier for earlier, later in pairs)

    def lost(self) -> set[UUID]:
        with transaction(self._fleet.factory) as session:
            return set(self.acknowledged) - set(session.scalars(select(Job.id)))

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(DBAPIError):
                self.acknowledged.append(self._fleet.submit(queue="nobody"))
                self.times.append(time.monotonic())


@pytest.mark.slow
def test_f09_database_crashes_lose_no_acknowledged_commit(fleet: Fleet, own_servers: Servers):
    def kill_a_backend() -> None:
        with psycopg.connect(fleet.settings.database_url or "") as connection:
            pid = connection.info.backend_pid
            os.kill(pid, signal.SIGKILL)

    def restart(how: int) -> None:
        own_servers.stop_postgres(how)
        own_servers.start_postgres()

    faults = {
        "immediate": lambda: restart(IMMEDIATE),
        "sigkill": lambda: restart(CRASH),
        "backend": kill_a_backend,
    }
    gaps = {}
    for name, fault in faults.items():
        with Ledger(fleet) as ledger:
            fault()
        assert ledger.lost() == set()
        assert ledger.longest_gap < allowed(10)
        gaps[f"{name}_gap_s"] = ledger.longest_gap
    measured("F9", acknowledged_lost=0, **gaps)


@pytest.mark.slow
def test_f10_database_away_for_longer_than_a_lease_costs_no_live_worker_its_job(
    fleet: Fleet, own_servers: Servers
):
    jobs = [fleet.submit(steps=250) for _ in range(2)]
    fleet.control()
    for number in range(2):
        fleet.worker(scratch=f"w{number}")
    for job_id in jobs:
        fleet.reaches(job_id, 7)
    own_servers.stop_postgres()
    try:
        time.sleep(2.5 * fleet.settings.lease_ttl_seconds)
    finally:
        own_servers.start_postgres()
    for job_id in jobs:
        fleet.ends(job_id)
        fleet.check_history(job_id, attempts=1)
    measured("F10", away_s=2.5 * fleet.settings.lease_ttl_seconds, lease_s=2.0, new_attempts=0)


class TestF11:
    """The server commits and its reply is lost."""

    @pytest.mark.slow
    def test_f11_lost_reply_to_a_claim_is_taken_up_by_the_same_worker(self, fleet: Fleet):
        job_id = fleet.submit()
        with behind(fleet) as proxy:
            lost = threading.Event()
            proxy.at_commit(b"ranked", "after", lost.set)
            fleet.worker(database_url=proxy.url)
            fleet.ends(job_id)
        assert lost.is_set()
        fleet.check_history(job_id, attempts=1)
        measured("F11", lost_reply="claim", attempts=1)

    @pytest.mark.slow
    def test_f11_lost_reply_to_a_checkpoint_or_an_end_writes_it_once(self, fleet: Fleet):
        for needle in (b"INSERT INTO checkpoints", b"INSERT INTO model_versions"):
            job_id = fleet.submit()
            with behind(fleet) as proxy:
                lost = threading.Event()
                proxy.at_commit(needle, "after", lost.set)
                worker = fleet.worker(database_url=proxy.url)
                fleet.ends(job_id)
                worker.terminate()
                worker.wait(30)
            assert lost.is_set(), needle
            fleet.check_history(job_id, attempts=1)
            assert [c.step for c in fleet.rows(Checkpoint, job_id)] == [0, 5, 10, 15, 20]
            assert len(fleet.rows(ModelVersion, job_id)) == 1


ZOMBIE = """
import os, signal, sys
from sqlalchemy import select
from app.db.models import Job
from app.db.session import build_engine, build_session_factory
with build_session_factory(build_engine(sys.argv[1]))() as session:
    session.execute(select(Job.id).where(Job.id == sys.argv[2]).with_for_update())
    print("locked", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
def test_f26_frozen_holder_of_a_row_lock_is_cut_off_and_the_job_reaped(fleet: Fleet):
    job_id = fleet.submit(steps=400)
    worker = fleet.worker()
    fleet.reaches(job_id, 7)
    fleet.control()
    url = fleet.settings.database_url or ""
    line = [sys.executable, "-c", ZOMBIE, url, str(job_id)]
    zombie = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert zombie.stdout is not None
        assert zombie.stdout.readline() == b"locked\n"
        frozen_at = time.time()
        worker.kill()
        [crash] = eventually(lambda: fleet.events(job_id, "crashed"), "it is reaped")
        reaped_after = crash.created_at.timestamp() - frozen_at
        assert reaped_after < allowed(fleet.settings.lease_ttl_seconds + 20)
    finally:
        zombie.kill()
        zombie.communicate()
    assert fleet.job(job_id).state is JobState.QUEUED
    assert [e.sequence for e in fleet.rows(JobEvent, job_id)]
    measured("F26", reaped_after_s=reaped_after)
