"""Files that expire go by the control process's sweep, and never while a job needs them."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.orm import Session

from app.control.reconciler import clear
from app.db.models import File, Project
from app.db.session import SessionFactory
from app.domain.identifiers import public_id
from app.domain.states import JobState
from app.errors import Conflict
from app.services.files import delete_file, sweep_expired
from app.services.storage import Storage
from app.settings import Settings
from tests.factories import make_benchmark, make_file, make_job, make_project


@pytest.fixture
def project(session: Session) -> Project:
    return make_project(session)


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.storage_root)


def expired(session: Session, storage: Storage, project: Project) -> File:
    ago = datetime.now(UTC) - timedelta(seconds=1)
    file = make_file(session, project, expires_at=ago)
    storage.put_bytes(b"x", file.path)
    return file


def test_the_control_process_deletes_what_has_expired(
    session_factory: SessionFactory, session: Session, settings: Settings, storage: Storage
) -> None:
    project = make_project(session)
    gone = [expired(session, storage, project) for _ in range(45)]
    stays = make_file(session, project, expires_at=datetime.now(UTC) + timedelta(hours=1))
    storage.put_bytes(b"x", stays.path)
    session.commit()
    clear(session_factory, settings)
    assert not any(storage.exists(file.path) for file in gone)
    assert storage.exists(stays.path)
    for file in gone:
        session.refresh(file)
        assert file.deleted_at is not None
    assert sweep_expired(session_factory, storage) == 0


def test_a_job_keeps_its_expired_file_until_it_has_ended(
    session_factory: SessionFactory, session: Session, storage: Storage, project: Project
) -> None:
    files = [expired(session, storage, project) for _ in range(4)]
    stages = {"stages": [{"training_file": public_id("file", files[3].id)}]}
    jobs = [
        make_job(session, project, training_file_id=files[0].id),
        make_job(session, project, validation_file_id=files[1].id),
        make_job(session, project, general_file_id=files[2].id),
        make_job(session, project, spec=stages),
    ]
    session.commit()
    assert sweep_expired(session_factory, storage) == 0
    assert all(storage.exists(file.path) for file in files)
    for job in jobs:
        job.move_to(JobState.CANCELLED)
        job.finished_at = job.created_at
    session.commit()
    assert sweep_expired(session_factory, storage) == 4
    assert not any(storage.exists(file.path) for file in files)


def test_a_benchmark_keeps_its_expired_file(
    session_factory: SessionFactory, session: Session, storage: Storage, project: Project
) -> None:
    file = expired(session, storage, project)
    make_benchmark(session, project, file_id=file.id, items_sha256=file.sha256)
    session.commit()
    assert sweep_expired(session_factory, storage) == 0
    assert storage.exists(file.path)


def test_who_deletes_a_file_in_use_is_told_by_which_jobs(
    session_factory: SessionFactory, session: Session, storage: Storage, project: Project
) -> None:
    file = make_file(session, project)
    first = make_job(session, project, training_file_id=file.id)
    session.commit()
    with pytest.raises(Conflict) as refused:
        delete_file(session_factory, storage, project.id, file.id)
    assert (refused.value.code, refused.value.param) == ("file_in_use", "file_id")
    assert refused.value.message.endswith(f"not ended: {public_id('job', first.id)}.")
    for _ in range(6):
        make_job(session, project, validation_file_id=file.id)
    session.commit()
    with pytest.raises(Conflict, match="and others") as refused:
        delete_file(session_factory, storage, project.id, file.id)
    assert refused.value.message.count("ftjob-") == 5
