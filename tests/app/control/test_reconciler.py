"""The reconciler's sweeps on a database of their own, two at a time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import select, text

from app.control.reconciler import clear_orphans, run, sweep
from app.db.models import BaseModel, Job, JobEvent, OutboxMessage, Worker
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.domain.states import JobState
from app.services.checkpoints import checkpoint_path
from app.services.storage import Storage
from app.settings import Settings
from tests.factories import lease, make_checkpoint, make_file, make_job, make_project, make_spec


def quick(settings: Settings) -> Settings:
    return settings.model_copy(update={"lease_ttl_seconds": 0.3, "reap_seconds": 0.05})


class TestSweep:
    def test_two_reconcilers_reap_each_job_once(
        self, committed_factory: SessionFactory, settings: Settings
    ):
        with transaction(committed_factory) as session:
            project = make_project(session)
            jobs = [
                make_job(session, project, state=JobState.RUNNING, lease_expires_at=lease(-9))
                for _ in range(12)
            ]
            session.execute(text("SELECT pg_sleep(0.4)"))
        start = threading.Barrier(4)

        def work(_: int) -> None:
            start.wait()
            sweep(committed_factory, quick(settings))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        with transaction(committed_factory) as session:
            assert session.scalars(select(Job.crashes_without_progress)).all() == [1] * 12
            rung = session.scalars(select(OutboxMessage.job_id)).all()
            assert sorted(rung) == sorted(job.id for job in jobs)
            assert len(session.scalars(select(JobEvent)).all()) == 12

    def test_a_job_goes_on_once_its_files_are_checked(
        self, committed_factory: SessionFactory, settings: Settings
    ):
        with transaction(committed_factory) as session:
            project = make_project(session)
            file = make_file(session, project, status="uploaded", report=None)
            job = make_job(session, project, training_file_id=file.id)
            name = session.get_one(BaseModel, job.base_model_id).name
            job.spec = make_spec(model=name, training_file=public_id("file", file.id)).model_dump(
                mode="json"
            )
            session.flush()
            session.execute(text("UPDATE jobs SET state = 'validating_files'"))
        sweep(committed_factory, quick(settings))
        with transaction(committed_factory) as session:
            assert session.get_one(Job, job.id).state is JobState.VALIDATING_FILES
            session.execute(
                text("UPDATE files SET status = 'processed', report = '{\"num_rows\": 3}'")
            )
        sweep(committed_factory, quick(settings))
        with transaction(committed_factory) as session:
            assert session.get_one(Job, job.id).state is JobState.QUEUED
            assert session.scalars(select(OutboxMessage.job_id)).all() == [job.id]

    def test_the_loop_rings_lost_bells_again_and_stops_when_told(
        self, committed_factory: SessionFactory, settings: Settings
    ):
        with transaction(committed_factory) as session:
            job = make_job(session, created_at=lease(-300))
            session.add(Worker(id="w", host="h", num_slots=1, num_free=1, device="cpu"))
        stop = threading.Event()
        thread = threading.Thread(target=run, args=(committed_factory, quick(settings), stop))
        thread.start()
        deadline = time.monotonic() + 20
        found: list[object] = []
        while not found and time.monotonic() < deadline:
            with transaction(committed_factory) as session:
                found = list(session.scalars(select(OutboxMessage.job_id)))
        stop.set()
        thread.join()
        assert found == [job.id]


def test_stored_checkpoints_of_past_attempts_without_a_row_are_removed(
    committed_factory: SessionFactory, settings: Settings, tmp_path: Path
):
    storage = Storage(settings.storage_root)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "manifest.json").write_text("{}")
    with transaction(committed_factory) as session:
        job = make_job(session, state=JobState.RUNNING, attempt=3)
        points = {
            (1, 10): checkpoint_path(job.id, 1, 0, 10),
            (2, 20): checkpoint_path(job.id, 2, 0, 20),
            (3, 30): checkpoint_path(job.id, 3, 0, 30),  # under way: its row may still come
        }
        for path in points.values():
            storage.put_directory(tmp_path / "saved", path)
        make_checkpoint(session, job, attempt=1, step=10, path=points[1, 10])
    assert clear_orphans(committed_factory, storage) == [points[2, 20]]
    assert storage.exists(points[1, 10])
    assert storage.exists(points[3, 30])
