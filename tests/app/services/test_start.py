"""Where jobs start: names, what is kept for them, how it is planned, and the lineage of what they make."""

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import Alias, Job, RegisteredModel, RegisteredVersion
from app.db.repositories.checkpoints import CheckpointRepository
from app.db.repositories.registry import RegistryRepository
from app.domain.compensation import plan_compensation
from app.domain.identifiers import checkpoint_name, model_version_name
from app.domain.runplan import RunPlan
from app.domain.spec import JobSpec
from app.domain.states import CheckpointStatus, JobState
from app.errors import BadRequest, NotFound, TrainingFailed
from app.services.runs import build_run_plan
from app.services.scratch import Scratch
from app.services.start import find_start, start_of
from app.services.submission import settle_validation
from app.settings import Settings
from tests.app.domain.test_compensation import SETTINGS
from tests.app.services.test_jobs import Stand
from tests.factories import (
    lease,
    make_checkpoint,
    make_job,
    make_model_version,
    make_project,
    make_spec,
    make_training,
)


@pytest.fixture
def stand(session: Session) -> Stand:
    return Stand(session)


def finished(stand: Stand, **overrides: object) -> Job:
    spec = make_spec(training=make_training(type=overrides.pop("type", "lora")))
    return make_job(
        stand.session,
        stand.project,
        state=JobState.SUCCEEDED,
        base_model_id=stand.base.id,
        spec=spec.model_dump(mode="json"),
        **overrides,
    )


def test_a_job_starts_from_a_version_and_its_child_knows_the_parent(stand: Stand) -> None:
    version = make_model_version(stand.session, finished(stand))
    job = stand.submit(model=version.name)
    assert (job.base_model_id, job.start_version_id) == (stand.base.id, version.id)
    assert JobSpec.model_validate(job.spec).start == version.name
    assert start_of(stand.session, job).version is version
    assert RegistryRepository(stand.session).is_started_from(version)
    job.move_to(JobState.CANCELLED)
    job.finished_at = job.created_at
    stand.session.flush()
    assert not RegistryRepository(stand.session).is_started_from(version)


def test_an_alias_means_what_it_meant_when_the_job_was_submitted(stand: Stand) -> None:
    job = finished(stand)
    first, second = (make_model_version(stand.session, job) for _ in range(2))
    registered = RegisteredModel(project_id=stand.project.id, name="bot", gate="held")
    stand.session.add(registered)
    stand.session.flush()
    rows = [
        RegisteredVersion(
            registered_model_id=registered.id, version=place + 1, model_version_id=version.id
        )
        for place, version in enumerate((first, second))
    ]
    stand.session.add_all(rows)
    stand.session.flush()
    alias = Alias(
        registered_model_id=registered.id, name="production", version_id=rows[0].id, revision=1
    )
    stand.session.add(alias)
    stand.session.flush()
    submitted = stand.submit(model="bot@production")
    alias.version_id = rows[1].id
    stand.session.flush()
    spec = JobSpec.model_validate(submitted.spec)
    assert (spec.request.model, spec.start) == ("bot@production", first.name)
    assert plan_compensation(spec, {}, SETTINGS).request.model == first.name
    assert stand.submit(model="bot@production").start_version_id == second.id
    assert stand.submit(model="bot@1").start_version_id == first.id


def test_a_job_that_waited_for_its_file_still_knows_its_start(stand: Stand) -> None:
    version = make_model_version(stand.session, finished(stand))
    stand.file.status, stand.file.report = "uploaded", None
    job = stand.submit(model=version.name)
    stand.file.status, stand.file.report = "processed", {"format": "chat", "num_rows": 12}
    stand.session.flush()
    assert settle_validation(stand.session, job)
    assert (job.state, job.spec["start"]) == (JobState.QUEUED, version.name)


def test_a_checkpoint_over_something_that_is_gone_is_refused_at_submit(stand: Stand) -> None:
    below = make_checkpoint(stand.session, finished(stand), manifest_sha256="3" * 64)
    job = finished(stand, start_checkpoint_id=below.id)
    saved = make_checkpoint(stand.session, job)
    name = model_version_name(stand.base.name, stand.project.name, job.suffix, job.id)
    below.corrupt = True
    stand.session.flush()
    with pytest.raises(NotFound, match="gone") as told:
        stand.submit(model=checkpoint_name(name, saved.step), retention=None)
    assert told.value.param == "model"


def test_a_checkpoint_goes_by_both_names_of_its_job(stand: Stand) -> None:
    job = finished(stand)
    parent = make_model_version(stand.session, finished(stand))
    job.start_version_id = parent.id
    old = make_checkpoint(stand.session, job, branch=0, superseded=True)
    saved = make_checkpoint(stand.session, job, branch=1)
    early = model_version_name(stand.base.name, stand.project.name, job.suffix, job.id)
    version = make_model_version(stand.session, job)
    job.model_version_id = version.id
    stand.session.flush()
    for name in (early, version.name):
        start = find_start(stand.session, stand.project.id, checkpoint_name(name, saved.step))
        assert start.checkpoint is saved is not old
        assert start.version is parent
    started = stand.submit(model=checkpoint_name(version.name, saved.step))
    assert started.start_checkpoint_id == saved.id
    assert saved.id in CheckpointRepository(stand.session).list_pinned(job.id)


def test_nothing_is_found_of_other_projects_or_of_what_is_gone(stand: Stand) -> None:
    job = finished(stand)
    version = make_model_version(stand.session, job)
    saved = make_checkpoint(stand.session, job)
    other = make_project(stand.session)
    early = model_version_name(stand.base.name, stand.project.name, job.suffix, job.id)
    names = [version.name, checkpoint_name(early, saved.step)]
    for name in names:
        assert find_start(stand.session, stand.project.id, name).name == name
        with pytest.raises(NotFound) as told:
            find_start(stand.session, other.id, name)
        assert (told.value.param, told.value.code) == ("model", "model_not_found")
    version.deleted_at = version.created_at
    saved.status, saved.corrupt = CheckpointStatus.BAD, True
    stand.session.flush()
    for name in (*names, "ft:x:y::z", "ft:x:y::z:ckpt-step-3", "no@body", "nobody"):
        with pytest.raises(NotFound):
            find_start(stand.session, stand.project.id, name)


def test_what_cannot_be_started_from_is_told(stand: Stand) -> None:
    pending = make_model_version(stand.session, finished(stand), status="pending", path=None)
    with pytest.raises(BadRequest, match="is pending") as told:
        stand.submit(model=pending.name)
    assert told.value.param == "model"
    version = make_model_version(stand.session, finished(stand))
    with pytest.raises(BadRequest, match="domain_adapters puts its adapters on a base model"):
        stand.submit(model=version.name, retention={"strategies": [{"type": "domain_adapters"}]})


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_plan_names_the_parts_of_the_start(stand: Stand, kind: str, settings: Settings) -> None:
    version = make_model_version(stand.session, finished(stand), kind=kind, sha256="5" * 64)
    plan, inputs, starts = _planned(stand, version.name, settings)
    assert starts == ()
    assert plan.base.registered_sha256 == stand.base.sha256
    assert plan.base.takes_adapters is (kind == "adapter")
    paths = [item.path for item in inputs if item.is_directory]
    if kind == "adapter":
        assert paths == [stand.base.path, version.path]
        assert plan.base.sha256 not in {stand.base.sha256, version.sha256}
        (layer,) = plan.base.layers
        assert layer.directory.endswith("5" * 64)
    else:
        assert paths == [version.path]
        assert (plan.base.sha256, plan.base.layers) == (version.sha256, ())


def test_checkpoints_of_jobs_that_started_from_checkpoints_lie_over_one_another(
    stand: Stand, settings: Settings
) -> None:
    first = finished(stand)
    below = make_checkpoint(stand.session, first, manifest_sha256="3" * 64)
    second = finished(stand, start_checkpoint_id=below.id)
    saved = make_checkpoint(stand.session, second, manifest_sha256="4" * 64)
    early = model_version_name(stand.base.name, stand.project.name, second.suffix, second.id)
    plan, _, starts = _planned(stand, checkpoint_name(early, saved.step), settings)
    assert [state.checkpoint_id for state in starts] == [below.id, saved.id]
    assert [layer.kind for layer in plan.base.layers] == ["checkpoint", "checkpoint"]
    job = stand.session.scalars(select(Job).where(Job.start_checkpoint_id == saved.id)).one()
    saved.corrupt = True
    stand.session.flush()
    with pytest.raises(TrainingFailed, match="gone") as told:
        _replanned(stand, job, settings)
    assert told.value.param == "model"


def _planned(stand: Stand, name: str, settings: Settings):
    job = stand.submit(model=name)
    job.move_to(JobState.RUNNING)
    job.worker_id, job.lease_expires_at, job.attempt = "worker", lease(60), 1
    stand.session.flush()
    return _replanned(stand, job, settings)


def _replanned(stand: Stand, job: Job, settings: Settings):
    scratch = Scratch(settings.scratch_root, job.id, 1)
    prepared = build_run_plan(stand.session, job, settings, scratch)
    assert isinstance(prepared.plan, RunPlan)
    return prepared.plan, prepared.inputs, prepared.starts
