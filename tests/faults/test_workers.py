"""Rows F1 to F4, F18 and F22 to F25: what becomes of a job when its trainer, worker or machine fails."""

import os
import shutil
import signal
import time
from pathlib import Path
from uuid import UUID

import pytest

from app.control.reconciler import clear_orphans
from app.db.models import Checkpoint, JobEvent
from app.domain.states import JobState
from app.services.storage import Storage
from tests.faults.fleet import Fleet, allowed, measured, signal_group, wait_dead
from tests.faults.processes import eventually, find_trainers

SAVED_EVERY = 5  # steps between the scripted trainer's checkpoints


def trainer_of(fleet: Fleet, job_id: UUID) -> int:
    [pid] = eventually(lambda: find_trainers(job_id.hex), "its trainer")
    return int(pid)


def since(event: JobEvent, moment: float) -> float:
    """Seconds from a moment of this process's wall clock to an event; one machine, so one clock."""
    return float(event.created_at.timestamp() - moment)


def test_f01_trainer_killed_mid_step_is_reported_and_goes_on_from_its_last_checkpoint(
    fleet: Fleet,
):
    job_id = fleet.submit(steps=30)
    fleet.worker()
    fleet.reaches(job_id, 12)
    killed_at = time.time()
    os.kill(trainer_of(fleet, job_id), signal.SIGKILL)
    [crash] = eventually(lambda: fleet.events(job_id, "crashed"), "the report")
    job = fleet.ends(job_id)
    assert crash.data is not None
    assert crash.data["crashes_without_progress"] == 1
    assert since(crash, killed_at) < allowed(5)
    assert job.run_plan is not None
    resumed_at = job.run_plan["resume"]["step"]
    assert resumed_at == max(c.step for c in fleet.rows(Checkpoint, job_id) if c.attempt == 1)
    fleet.check_history(job_id, attempts=2)
    measured("F1", reported_after_s=since(crash, killed_at), resumed_at=resumed_at)


def two_workers(fleet: Fleet) -> UUID:
    """A job that one of two workers has begun; each has a disk of its own."""
    fleet.control()
    for name in ("a", "b"):
        fleet.worker(scratch=name, name=name)
    fleet.wait_for_workers(2)
    job_id = fleet.submit(steps=60)
    fleet.reaches(job_id, 7)
    return job_id


@pytest.mark.slow
def test_f02_worker_killed_takes_its_trainer_along_and_another_goes_on(fleet: Fleet):
    job_id = two_workers(fleet)
    trainer, first = trainer_of(fleet, job_id), fleet.holder(job_id)
    killed_at = time.time()
    first.kill()
    gone_after = wait_dead([trainer], seconds=30)
    assert gone_after < allowed(1)
    claim = fleet.claimed(job_id, 2)
    taken_after = since(claim, killed_at)
    assert taken_after < fleet.takeover_seconds
    fleet.ends(job_id)
    fleet.check_history(job_id, attempts=2)
    measured("F2", trainer_gone_after_s=gone_after, taken_over_after_s=taken_after)


@pytest.mark.faults
def test_f03_whole_machine_gone_and_another_goes_on_from_the_store_alone(fleet: Fleet):
    job_id = two_workers(fleet)
    trainer, first = trainer_of(fleet, job_id), fleet.holder(job_id)
    [name] = [name for name in ("a", "b") if fleet.processes[name] is first]
    killed_at = time.time()
    os.kill(trainer, signal.SIGKILL)
    signal_group(first, signal.SIGKILL)
    first.wait()
    shutil.rmtree(fleet.settings.data_dir / name)
    claim = fleet.claimed(job_id, 2)
    taken_after = since(claim, killed_at)
    assert taken_after < fleet.takeover_seconds
    job = fleet.ends(job_id)
    assert job.run_plan is not None
    assert job.run_plan["resume"]["step"] >= SAVED_EVERY
    fleet.check_history(job_id, attempts=2)
    measured("F3", taken_over_after_s=taken_after)


@pytest.mark.slow
def test_f04_zombie_worker_comes_back_to_a_lost_job_and_writes_nothing(
    fleet: Fleet, tmp_path: Path
):
    job_id = fleet.submit(steps=400)
    zombie = fleet.worker("paced", "--lock", str(tmp_path / "gpu-a"), scratch="a", name="zombie")
    fleet.reaches(job_id, 12)
    trainer = trainer_of(fleet, job_id)
    fleet.control()
    signal_group(zombie, signal.SIGSTOP)
    fleet.worker("paced", "--lock", str(tmp_path / "gpu-b"), scratch="b", name="heir")
    fleet.claimed(job_id, 2)
    fleet.reaches(job_id, 20)
    saved = [c.step for c in fleet.rows(Checkpoint, job_id) if c.attempt == 1]
    woken_at = time.monotonic()
    signal_group(zombie, signal.SIGCONT)
    wait_dead([trainer], seconds=30)
    stopped_after = time.monotonic() - woken_at
    assert stopped_after < allowed(fleet.settings.beat_seconds + 2)
    eventually(
        lambda: not (fleet.settings.data_dir / "a" / "jobs" / job_id.hex / "a1").exists(),
        "its scratch directory is removed",
    )
    fleet.reaches(job_id, 60)
    assert [c.step for c in fleet.rows(Checkpoint, job_id) if c.attempt == 1] == saved
    assert zombie.poll() is None  # it serves on, with other jobs
    fleet.check_history(job_id, attempts=2)
    storage = Storage(fleet.settings.storage_root)
    orphans = clear_orphans(fleet.factory, storage)  # what it stored and could not register
    assert all("/a1/" in path for path in orphans)
    measured("F4", trainer_gone_after_s=stopped_after, orphans_cleared=len(orphans))


@pytest.mark.slow
def test_f18_drained_worker_saves_leaves_and_loses_nothing(fleet: Fleet):
    job_id = fleet.submit(steps=60)
    first = fleet.worker()
    fleet.reaches(job_id, 12)
    told_at = time.time()
    first.terminate()
    assert first.wait(60) == 0
    gone_after = time.time() - told_at
    job = fleet.job(job_id)
    assert (job.state, job.crashes_without_progress) == (JobState.QUEUED, 0)
    [saved] = [c for c in fleet.rows(Checkpoint, job_id) if c.id == job.ckpt_id]
    assert saved.step == job.step >= 12  # not one step was lost
    assert gone_after < allowed(fleet.settings.stop_grace_seconds)
    fleet.worker(scratch="elsewhere")
    claim = fleet.claimed(job_id, 2)
    assert since(claim, told_at) < allowed(30)
    fleet.ends(job_id)
    fleet.check_history(job_id, attempts=2)
    measured("F18", worker_gone_after_s=gone_after, steps_lost=0)


@pytest.mark.slow
@pytest.mark.parametrize("hours", [1, -1])
def test_f22_wrong_clock_of_a_worker_has_no_effect_on_leases(fleet: Fleet, hours: int):
    """The wall clock of the worker is an hour off; libfaketime would do it for its C code too."""
    job_id = fleet.submit(steps=120)
    fleet.control()
    fleet.worker("paced", "--skew", str(hours * 3600))
    fleet.ends(job_id)  # some leases long
    fleet.check_history(job_id, attempts=1)
    measured("F22", skew_hours=hours, attempts=1)


@pytest.mark.slow
def test_f22_wrong_clock_of_every_library_has_no_effect_on_leases(fleet: Fleet):
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    if not found:
        pytest.skip("libfaketime is not installed (Debian: apt-get install faketime)")
    job_id = fleet.submit(steps=120)
    fleet.control()
    line = ["-m", "tests.faults.worker", "paced", "--pace", "0.05"]
    variables = {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME": "+1h",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fleet.start("worker", line, {})
    fleet.ends(job_id)
    fleet.check_history(job_id, attempts=1)


@pytest.mark.slow
def test_f23_poison_job_fails_after_three_crashes_and_its_worker_serves_others(fleet: Fleet):
    poison = fleet.submit(steps=13)  # which the scenario takes as its sign
    began = time.monotonic()
    worker = fleet.worker("poisons")
    job = fleet.ends(poison, JobState.FAILED)
    took = time.monotonic() - began
    assert job.error is not None
    assert (job.error["code"], job.attempt) == ("too_many_crashes", 3)
    fleet.check_history(poison, attempts=3)
    assert took < allowed(
        600 * fleet.settings.lease_ttl_seconds / 60
    )  # ten minutes at the default lease
    fleet.ends(fleet.submit(steps=8))
    assert worker.poll() is None
    measured("F23", attempts=job.attempt, failed_after_s=took)


@pytest.mark.slow
def test_f24_device_that_fails_twice_gets_no_more_jobs_and_another_machine_takes_them(
    fleet: Fleet, tmp_path: Path
):
    job_id = fleet.submit(steps=20)
    fleet.worker("needs_another_device", "--lock", str(tmp_path / "gpu-a"), name="broken")
    fleet.claimed(job_id, 2)
    eventually(lambda: fleet.job(job_id).state is JobState.QUEUED, "its second crash")
    time.sleep(4 * fleet.settings.poll_seconds)  # the first wait is over, and nobody comes
    assert fleet.job(job_id).attempt == 2
    assert "worker.device_suspect" in fleet.log.read_text()
    fleet.worker(scratch="b", name="healthy")
    fleet.ends(job_id)
    fleet.check_history(job_id, attempts=3)
    measured("F24", attempts_on_the_broken_device=2)


@pytest.mark.slow
def test_f25_hung_trainer_is_ended_and_its_job_goes_on(fleet: Fleet):
    job_id = fleet.submit(steps=20)
    fleet.worker("freezes_once", stall_seconds=1.0)
    [crash] = eventually(lambda: fleet.events(job_id, "crashed"), "the watchdog")
    assert "silent for 1 s" in crash.message
    frozen = find_trainers(job_id.hex)
    fleet.ends(job_id)
    fleet.check_history(job_id, attempts=2)
    assert len(frozen) <= 1  # the old one is gone before a new one begins
    [claim, _] = fleet.events(job_id, "claimed")
    measured("F25", ended_after_s=since(crash, claim.created_at.timestamp()))
