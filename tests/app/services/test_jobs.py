"""Submitting a job: what is resolved, what is written, and what is said of it."""

import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import (
    BaseModel,
    Evaluation,
    File,
    JobEvent,
    OutboxMessage,
    Project,
    WebhookEvent,
)
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.identifiers import public_id
from app.domain.spec import CreateJob, JobSpec
from app.domain.states import JobState
from app.errors import QuotaExceeded
from app.services.evaluations import pack_bytes
from app.services.submission import settle_validation, submit_job
from tests.factories import make_base_model, make_benchmark, make_file, make_project, make_suite


class Stand:
    """A project with a base model and a training file."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.project: Project = make_project(session)
        self.base: BaseModel = make_base_model(session)
        self.file: File = make_file(session, self.project)

    def request(self, **fields: object) -> CreateJob:
        return CreateJob.model_validate(
            {"model": self.base.name, "training_file": public_id("file", self.file.id)} | fields
        )

    def submit(self, **fields: object):
        return submit_job(self.session, self.project.id, self.request(**fields))

    def codes(self, job) -> list[str]:
        events = self.session.scalars(select(JobEvent).where(JobEvent.job_id == job.id))
        return [event.data["code"] for event in events if event.data and "code" in event.data]


@pytest.fixture
def stand(session: Session) -> Stand:
    return Stand(session)


def test_job_event_webhook_and_doorbell_are_written_together(stand: Stand) -> None:
    job = stand.submit()
    assert job.state is JobState.QUEUED
    bells = stand.session.scalars(select(OutboxMessage).where(OutboxMessage.job_id == job.id)).all()
    assert len(bells) == 1
    told = stand.session.scalars(select(WebhookEvent).where(WebhookEvent.job_id == job.id)).all()
    assert [event.type for event in told] == ["fine_tuning.job.queued"]
    assert job.event_count >= 1


def test_a_base_without_a_suite_is_warned_of_and_still_gets_strategies(stand: Stand) -> None:
    job = stand.submit()
    spec = JobSpec.model_validate(job.spec)
    assert spec.policy is None
    assert [strategy.type for strategy in spec.strategies] == ["l2sp"]
    assert spec.strategies_why is not None
    assert stand.codes(job) == ["strategies_chosen", "retention_unwatched"]
    assert job.power is None


def test_retention_null_trains_plainly(stand: Stand) -> None:
    make_suite(stand.session, stand.base, [make_benchmark(stand.session)])
    spec = JobSpec.model_validate(stand.submit(retention=None).spec)
    assert (spec.strategies, spec.policy, spec.strategies_why) == ((), None, None)


def test_the_suite_is_watched_with_its_versions_pinned(stand: Stand) -> None:
    versions = [
        make_benchmark(stand.session, name="mc"),
        make_benchmark(stand.session, name="gen", scorer=Scorer.EXACT_MATCH),
    ]
    make_suite(stand.session, stand.base, versions, weight=2.0)
    job = stand.submit()
    policy = JobSpec.model_validate(job.spec).policy
    assert policy is not None
    assert policy.benchmarks is not None
    assert [(b.name, b.weight) for b in policy.benchmarks] == [("mc@1", 2.0), ("gen@1", 2.0)]
    assert job.power is not None
    assert job.power["from_baseline"] is False
    assert set(job.power["benchmarks"]) == {"mc@1", "gen@1"}
    assert job.power["mean"]["n_items"] == 50
    assert job.power["mean"]["regress_at_80"] > 0.03


def test_named_benchmarks_replace_the_suite_but_for_mandatory_ones(stand: Stand) -> None:
    kept = make_benchmark(stand.session, name="kept")
    make_suite(stand.session, stand.base, [make_benchmark(stand.session, name="dropped")])
    make_suite(stand.session, stand.base, [kept], is_mandatory=True)
    make_benchmark(stand.session, stand.project, name="own", kind=BenchmarkKind.DOMAIN)
    job = stand.submit(retention={"policy": {"benchmarks": [{"name": "own"}]}})
    policy = JobSpec.model_validate(job.spec).policy
    assert policy is not None
    assert policy.benchmarks is not None
    assert [b.name for b in policy.benchmarks] == ["own@1", "kept@1"]


def test_domain_benchmarks_alone_watch_nothing(stand: Stand) -> None:
    make_benchmark(stand.session, stand.project, name="own", kind=BenchmarkKind.DOMAIN)
    job = stand.submit(retention={"policy": {"benchmarks": [{"name": "own"}]}})
    assert JobSpec.model_validate(job.spec).policy is None
    assert "retention_unwatched" in stand.codes(job)


def test_a_projects_own_benchmark_goes_before_the_operators(stand: Stand) -> None:
    make_benchmark(stand.session, name="same", num_items=1000)
    make_benchmark(stand.session, stand.project, name="same", num_items=40)
    job = stand.submit(retention={"policy": {"benchmarks": [{"name": "same"}]}})
    assert job.power is not None
    assert job.power["benchmarks"]["same@1"]["n_items"] == 20


def test_a_job_that_says_nothing_gets_the_projects_policy(stand: Stand) -> None:
    make_suite(stand.session, stand.base, [make_benchmark(stand.session)])
    stand.project.default_policy = {"max_drop": 0.1, "lever": "ewc"}
    policy = JobSpec.model_validate(stand.submit().spec).policy
    assert policy is not None
    assert (policy.max_drop, policy.lever) == (0.1, None)  # the job has no ewc to turn
    own = JobSpec.model_validate(stand.submit(retention={"policy": {"max_drop": 0.2}}).spec).policy
    assert own is not None
    assert own.max_drop == 0.2


def test_a_cached_baseline_at_floor_is_warned_of(stand: Stand) -> None:
    version = make_benchmark(stand.session, name="hard", num_items=400)
    make_suite(stand.session, stand.base, [version])
    scores = np.zeros(400, dtype=np.float32)
    scores[::4] = 1  # a quarter right of four choices: chance
    stand.session.add(
        Evaluation(
            subject_type="base_model",
            subject_key=f"{stand.base.sha256}/own",
            benchmark_version_id=version.id,
            benchmark="hard",
            metric="multiple_choice",
            purpose="baseline",
            source="run",
            value=0.25,
            scores=pack_bytes(scores),
        )
    )
    stand.session.flush()
    job = stand.submit()
    assert [w["code"] for w in job.warnings] == ["at_floor"]
    assert "hard@1" in job.warnings[0]["message"]
    assert "at_floor" in stand.codes(job)
    assert job.power is not None
    assert job.power["from_baseline"] is True


@pytest.mark.parametrize(
    ("kind", "strategies"), [("lora", ["replay", "distillation"]), ("full", ["ewc", "replay"])]
)
def test_auto_uses_general_data_where_there_is_any(
    stand: Stand, kind: str, strategies: list[str]
) -> None:
    stand.base.general_file_id = make_file(stand.session).id
    job = stand.submit(training={"type": kind})
    assert [s.type for s in JobSpec.model_validate(job.spec).strategies] == strategies
    assert job.general_file_id == stand.base.general_file_id


def test_a_large_model_marks_defaults_as_extrapolated(stand: Stand) -> None:
    stand.base.details = dict(stand.base.details, num_parameters=7_000_000_000)
    assert "extrapolated" in [w["code"] for w in stand.submit().warnings]
    named = stand.submit(retention={"strategies": [{"type": "l2sp"}]})
    assert "extrapolated" not in [w["code"] for w in named.warnings]


def test_a_job_waits_for_its_file_and_then_goes_on(stand: Stand) -> None:
    stand.file.status, stand.file.report = "uploaded", None
    job = stand.submit()
    assert (job.state, job.total_steps) == (JobState.VALIDATING_FILES, None)
    assert not settle_validation(stand.session, job)
    stand.file.status, stand.file.report = "processed", {"format": "chat", "num_rows": 120}
    stand.session.flush()
    assert settle_validation(stand.session, job)
    assert job.state is JobState.QUEUED
    assert job.total_steps == JobSpec.model_validate(job.spec).training.total_steps == 3 * 30
    assert stand.session.scalars(select(OutboxMessage).where(OutboxMessage.job_id == job.id)).all()


def test_a_job_whose_file_turns_out_bad_fails_with_its_field(stand: Stand) -> None:
    stand.file.status, stand.file.report = "uploaded", None
    job = stand.submit()
    stand.file.status, stand.file.status_details = "error", "line 2: no"
    stand.session.flush()
    assert settle_validation(stand.session, job)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error["param"], job.error["code"]) == ("training_file", "invalid_file")


def test_waiting_jobs_are_limited_by_project(stand: Stand) -> None:
    stand.submit()
    with pytest.raises(QuotaExceeded):
        submit_job(stand.session, stand.project.id, stand.request(), max_queued=1)
    other = Stand(stand.session)
    assert submit_job(stand.session, other.project.id, other.request(), max_queued=1).id
