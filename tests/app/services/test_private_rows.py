"""`privacy: no_rows_kept`: nothing of a run's rows lies on a worker's disk outside of its attempt."""

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app.db.models import File, Job
from app.domain.policy import Retention
from app.domain.runplan import RunPlan
from app.domain.states import JobState
from app.services.runs import Prepared, build_run_plan
from app.services.scratch import Scratch
from app.settings import Settings
from tests.factories import make_file, make_job, make_project, make_spec


@pytest.fixture
def job(session: Session) -> Job:
    project = make_project(session)
    return make_job(
        session,
        project,
        state=JobState.RUNNING,
        training_file_id=make_file(session, project, sha256="a" * 64).id,
        validation_file_id=make_file(session, project, sha256="b" * 64).id,
    )


def plan(
    session: Session, settings: Settings, job: Job, scratch: Scratch, retention: Retention | None
) -> Prepared:
    spec = make_spec()
    request = spec.request.model_copy(update={"retention": retention})
    job.spec = spec.model_copy(update={"request": request}).model_dump(mode="json")
    return build_run_plan(session, job, settings, scratch)


def test_files_and_caches_of_a_private_job_lie_in_its_attempts_directory(
    session: Session, settings: Settings, tmp_path: Path, job: Job
) -> None:
    scratch = Scratch(tmp_path, job.id, 1)
    prepared = plan(session, settings, job, scratch, Retention(privacy="no_rows_kept"))
    assert isinstance(prepared.plan, RunPlan)
    files = [item.local for item in prepared.inputs if not item.is_directory]
    assert len(files) == 2
    assert all(path.is_relative_to(scratch.directory) for path in files)
    assert Path(prepared.plan.cache_directory).is_relative_to(scratch.directory)
    models = [item.local for item in prepared.inputs if item.is_directory]
    assert models
    assert all(path.parent == tmp_path / "inputs" for path in models)  # no rows in them


@pytest.mark.parametrize("retention", [None, Retention()], ids=["off", "any"])
def test_other_jobs_share_what_was_brought_and_computed(
    session: Session, settings: Settings, tmp_path: Path, job: Job, retention: Retention | None
) -> None:
    prepared = plan(session, settings, job, Scratch(tmp_path, job.id, 1), retention)
    assert isinstance(prepared.plan, RunPlan)
    assert {item.local.parent for item in prepared.inputs} == {tmp_path / "inputs"}
    assert prepared.plan.cache_directory == str(tmp_path / "cache")
    assert session.get_one(File, job.training_file_id).sha256 == "a" * 64
