"""Deployed models on a real database: who may act, what a regression leads to, and that it happens once."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from app.db.models import (
    Alias,
    AliasChange,
    Compensation,
    Evaluation,
    File,
    Job,
    JobEvent,
    Monitor,
    MonitorLook,
    OutboxMessage,
    WebhookEvent,
)
from app.domain.aliases import CreateRegisteredModel, Promote, RegisterVersion
from app.domain.decisions import Verdict
from app.domain.identifiers import public_id
from app.domain.monitors import CreateMonitor, UpdateMonitor
from app.domain.results import PostedResults
from app.domain.scopes import Scope
from app.domain.spec import JobSpec
from app.domain.states import JobKind, JobState
from app.domain.statistics import alpha_spent
from app.errors import Conflict, NotFound
from app.services.aliases import promote
from app.services.aliases_query import get_alias, list_history
from app.services.monitors import (
    create_monitor,
    delete_monitor,
    get_monitor,
    start_due_evaluations,
    tell_silent,
    update_monitor,
)
from app.services.posting import post_results
from app.services.registered_models import create_registered_model, register_version
from app.services.storage import Storage
from tests.deployed import ALIAS, NAME, Deployed, items, make_deployed, store_items

SOURCE = "watchdog"  # the name of the caller's key


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def watch(session, deployed: Deployed, **fields: Any) -> Monitor:
    body = {
        "model": f"{NAME}@{ALIAS}",
        "benchmarks": [{"name": deployed.benchmark_name}],
        "sources": [SOURCE],
    }
    row = create_monitor(session, deployed.project.id, CreateMonitor.model_validate(body | fields))
    return row.monitor


def post(session, storage, deployed: Deployed, *, subject: str = f"{NAME}@{ALIAS}", **result: Any):
    body = {
        "subject": {"type": "model", "id": subject},
        "benchmark": deployed.benchmark_name,
    }
    posted = PostedResults.model_validate({"results": [body | result]})
    (look,) = post_results(session, storage, deployed.caller, posted)
    return look


def version_of(session, deployed: Deployed) -> int:
    return get_alias(session, deployed.project.id, NAME, ALIAS).version.row.version


def events(session, kind: str) -> list[dict[str, Any]]:
    rows = session.scalars(
        select(WebhookEvent).where(WebhookEvent.type == kind).order_by(WebhookEvent.seq)
    )
    return [row.payload["data"] for row in rows]


def count(session, table: type[Any]) -> int:
    return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_confirmed_regression_moves_the_alias_and_queues_its_compensation(
    session, storage
) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    monitor = watch(session, deployed)
    look = post(session, storage, deployed, items=items(lost=120))
    assert look.reading is not None
    assert look.reading.verdict is Verdict.REGRESS
    (outcome,) = look.monitored
    assert (outcome.acted, outcome.look, outcome.rolled_back_to) == (True, 1, 1)
    assert version_of(session, deployed) == 1
    change = list_history(session, deployed.project.id, NAME, ALIAS, after=None, limit=1)[0][0]
    assert (change.row.action, change.from_version, change.to_version) == (
        "regression_rollback",
        2,
        1,
    )
    assert change.row.actor == public_id("monitor", monitor.id)
    assert change.row.reason is not None
    assert "10.00%" in change.row.reason
    job = session.scalars(select(Job).where(Job.id == change.row.compensation_job_id)).one()
    assert (job.state, job.kind) == (JobState.QUEUED, JobKind.FINE_TUNING)
    spec = JobSpec.model_validate(job.spec)
    assert [(s.type, s.strength) for s in spec.strategies] == [("ewc", 4.0)]
    source = JobSpec.model_validate(deployed.job.spec)
    assert spec.request.model == source.request.model
    assert job.training_file_id == deployed.job.training_file_id
    assert spec.policy is not None
    assert spec.policy.benchmarks is not None
    assert f"{deployed.benchmark_name}@1" in {b.name for b in spec.policy.benchmarks}
    assert session.scalars(select(OutboxMessage).where(OutboxMessage.job_id == job.id)).one()
    codes = session.scalars(select(JobEvent.data["code"].astext).where(JobEvent.job_id == job.id))
    assert "compensation" in codes.all()
    (told,) = events(session, "monitor.regression_detected")
    assert told["drop"] == pytest.approx(0.1)
    assert (told["rolled_back_to"], told["model"]) == (1, deployed.models[1].name)
    assert told["compensation_job_id"] == public_id("job", job.id)
    moved = events(session, "registered_model.alias_moved")[-1]
    assert moved["compensation_job_id"] == public_id("job", job.id)


def test_the_same_results_again_are_no_new_look(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    watch(session, deployed)
    name = deployed.models[1].name
    first = post(session, storage, deployed, subject=name, items=items(lost=120))
    before = {
        t: count(session, t) for t in (Evaluation, MonitorLook, AliasChange, Job, WebhookEvent)
    }
    again = post(session, storage, deployed, subject=name, items=items(lost=120))
    assert {t: count(session, t) for t in before} == before
    assert again.monitored[0].is_replay
    assert again.monitored[0].compensation_job_id == first.monitored[0].compensation_job_id
    assert [row.id for row in again.evaluations] == [row.id for row in first.evaluations]
    assert version_of(session, deployed) == 1


def test_one_regression_is_never_made_up_for_twice(session, storage) -> None:
    deployed = make_deployed(session, num_versions=1)
    store_items(session, storage, deployed.benchmark)
    watch(session, deployed)
    name = deployed.models[0].name
    # A second name for the same version, watched as well.
    project = deployed.project.id
    create_registered_model(session, project, CreateRegisteredModel(name="twin"))
    register_version(session, project, "twin", RegisterVersion(model=name))
    promote(session, deployed.caller, "twin", "live", Promote(version=1))
    watch(session, deployed, model="twin@live")
    look = post(session, storage, deployed, items=items(lost=120))
    worse = post(session, storage, deployed, items=items(lost=240))
    found = {outcome.compensation_job_id for o in (look, worse) for outcome in o.monitored}
    assert len(look.monitored) == len(worse.monitored) == 2
    assert len(found) == 1
    assert count(session, Compensation) == 1
    assert session.scalar(select(func.count()).where(Job.id != deployed.job.id)) == 1
    # There is nowhere to go back to, which is said and not passed over.
    assert look.monitored[0].rolled_back_to is None
    assert look.monitored[0].why == "there is no good version to go back to"
    assert version_of(session, deployed) == 1
    assert len(events(session, "monitor.regression_detected")) == 4


def test_a_regressed_version_is_no_place_to_go_back_to(session, storage) -> None:
    deployed = make_deployed(session, num_versions=3)
    store_items(session, storage, deployed.benchmark)
    watch(session, deployed)
    post(session, storage, deployed, items=items(lost=120))
    assert version_of(session, deployed) == 2
    post(session, storage, deployed, items=items(lost=121))
    assert version_of(session, deployed) == 1
    with pytest.raises(Conflict) as caught:
        promote(session, deployed.caller, NAME, ALIAS, Promote(version=3))
    assert caught.value.code == "regressed_when_deployed"
    post(session, storage, deployed, items=items(lost=122))
    assert version_of(session, deployed) == 1
    assert count(session, Compensation) == 3


def test_a_pass_changes_nothing_but_the_status(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    monitor = watch(session, deployed)
    look = post(session, storage, deployed, items=items())
    assert look.monitored[0].verdict == "pass"
    assert version_of(session, deployed) == 2
    shown = get_monitor(session, deployed.project.id, monitor.id)
    assert shown.look is not None
    assert shown.look.verdict == "pass"
    assert monitor.last_result_at is not None
    assert events(session, "monitor.regression_detected") == []


@pytest.mark.parametrize(
    ("scopes", "source", "why"),
    [
        ({Scope.RESULTS_WRITE}, None, "results:act"),
        ({Scope.RESULTS_WRITE, Scope.RESULTS_ACT}, "somebody", "no source"),
    ],
)
def test_without_scope_and_source_nothing_moves_and_no_error_is_spent(
    session, storage, scopes, source, why
) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    monitor = watch(session, deployed)
    deployed.caller = replace(deployed.caller, scopes=frozenset(scopes))
    look = post(session, storage, deployed, items=items(lost=300), source=source)
    assert look.reading is not None
    assert look.reading.verdict is Verdict.REGRESS
    (outcome,) = look.monitored
    assert not outcome.acted
    assert outcome.why is not None
    assert why in outcome.why
    assert version_of(session, deployed) == 2
    assert (count(session, MonitorLook), count(session, Evaluation)) == (0, 2)
    assert monitor.last_result_at is None


def test_a_named_source_acts_and_a_monitor_that_is_off_does_not(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    monitor = watch(session, deployed, sources=["ci", "nightly"], enabled=False)
    look = post(session, storage, deployed, items=items(lost=120), source="nightly")
    assert look.monitored[0].why == "the monitor is off"
    update_monitor(session, deployed.project.id, monitor.id, UpdateMonitor(enabled=True))
    look = post(session, storage, deployed, items=items(lost=120), source="nightly")
    assert look.monitored[0].rolled_back_to == 1


def test_what_cannot_be_compared_is_no_data_and_never_a_pass(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    monitor = watch(session, deployed)
    for result in ({"value": 0.6}, {"value": 0.6, "n_samples": 9, "benchmark": "unheard"}):
        look = post(session, storage, deployed, **result)
        assert look.monitored[0].verdict == "no_data"
        assert not look.monitored[0].acted
    assert monitor.last_result_at is None


def test_a_part_of_what_is_watched_can_regress_but_not_pass(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    other = make_deployed(session, name="other", project=deployed.project)
    monitor = watch(
        session,
        deployed,
        benchmarks=[{"name": deployed.benchmark_name}, {"name": other.benchmark_name}],
    )
    look = post(session, storage, deployed, items=items())
    assert look.monitored[0].verdict == "inconclusive"
    look = post(session, storage, deployed, items=items(lost=120))
    assert look.monitored[0].verdict == "regress"
    assert monitor.last_result_at is None  # the alias has moved: nothing was heard of this version


def test_looks_spend_the_aliass_error_over_thirty_days(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    watch(session, deployed)
    looks = [post(session, storage, deployed, items=items(lost=k)).reading for k in range(1, 4)]
    assert [(r.look, r.alpha) for r in looks] == [(k, alpha_spent(k)) for k in (1, 2, 3)]
    session.execute(
        update(MonitorLook).values(created_at=func.clock_timestamp() - text("interval '31 days'"))
    )
    assert post(session, storage, deployed, items=items(lost=4)).reading.look == 1


def test_stale_data_is_an_event_and_no_verdict(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    monitor = watch(session, deployed, stale_after_hours=1)
    old = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
    for lost in (0, 300):
        look = post(session, storage, deployed, items=items(lost=lost), measured_at=old)
        assert look.reading is None
        assert not look.monitored[0].acted
    (told,) = events(session, "monitor.stale")
    assert (told["reason"], told["model"]) == ("stale_data", deployed.models[1].name)
    assert version_of(session, deployed) == 2
    assert is_stale(session, monitor)
    post(session, storage, deployed, items=items(), measured_at=datetime.now(UTC).isoformat())
    assert not is_stale(session, monitor)


def silence(session, hours: float) -> None:
    past = func.clock_timestamp() - text(f"interval '{hours} hours'")
    session.execute(update(Alias).values(moved_at=past))
    session.execute(update(Monitor).values(created_at=past))


def is_stale(session, monitor: Monitor) -> bool:
    session.refresh(monitor)
    return monitor.stale_since is not None


def test_silence_is_told_once_and_ends_with_a_result(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    monitor = watch(session, deployed, stale_after_hours=2)
    assert tell_silent(session) == []
    silence(session, 3)
    assert tell_silent(session) == [public_id("monitor", monitor.id)]
    assert tell_silent(session) == []
    (told,) = events(session, "monitor.stale")
    assert (told["reason"], told["last_result_at"]) == ("silence", None)
    assert is_stale(session, monitor)
    post(session, storage, deployed, items=items())
    assert not is_stale(session, monitor)
    assert tell_silent(session) == []
    # The same numbers again say that the evaluator is alive.
    session.execute(
        update(Monitor).values(last_result_at=func.clock_timestamp() - text("interval '3 hours'"))
    )
    assert post(session, storage, deployed, items=items()).monitored[0].is_replay
    assert tell_silent(session) == []
    session.execute(
        update(Monitor).values(last_result_at=func.clock_timestamp() - text("interval '3 hours'"))
    )
    assert len(tell_silent(session)) == 1
    assert len(events(session, "monitor.stale")) == 2


def test_a_compensation_that_cannot_be_submitted_does_not_hold_the_alias(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    watch(session, deployed)
    session.get_one(File, deployed.job.training_file_id).deleted_at = func.clock_timestamp()
    session.flush()
    look = post(session, storage, deployed, items=items(lost=120))
    assert look.monitored[0].rolled_back_to == 1
    assert look.monitored[0].compensation_job_id is None
    (told,) = events(session, "monitor.compensation_failed")
    assert "training_file" in told["message"]
    assert count(session, Compensation) == 0


def test_a_monitor_may_only_tell(session, storage) -> None:
    deployed = make_deployed(session)
    store_items(session, storage, deployed.benchmark)
    watch(session, deployed, on_regression={"roll_back": False, "compensate": False})
    look = post(session, storage, deployed, items=items(lost=120))
    assert (look.monitored[0].verdict, look.monitored[0].why) == (
        "regress",
        "the monitor asks for none",
    )
    assert version_of(session, deployed) == 2
    assert count(session, Compensation) == 0
    assert len(events(session, "monitor.regression_detected")) == 1
    assert events(session, "monitor.compensation_failed") == []


def test_what_no_alias_points_at_is_recorded_as_before(session, storage) -> None:
    deployed = make_deployed(session)
    watch(session, deployed)
    look = post(session, storage, deployed, subject=deployed.models[0].name, value=0.1, n_samples=9)
    assert look.monitored == ()
    assert look.evaluations[0].subject_key == deployed.models[0].name
    with pytest.raises(NotFound):
        post(session, storage, deployed, subject=f"{NAME}@nobody", value=0.1)
    with pytest.raises(Conflict):
        post(
            session,
            storage,
            deployed,
            value=0.5,
            n_samples=10,
            suite_sha256="0" * 64,
        )


def test_an_alias_has_one_monitor(session) -> None:
    deployed = make_deployed(session)
    monitor = watch(session, deployed)
    with pytest.raises(Conflict) as caught:
        watch(session, deployed)
    assert caught.value.code == "monitor_exists"
    delete_monitor(session, deployed.project.id, monitor.id)
    watch(session, deployed)


def test_due_evaluations_are_queued_one_at_a_time(session) -> None:
    deployed = make_deployed(session)
    monitor = watch(session, deployed, sources=[], schedule={"every_hours": 6})
    (job,) = start_due_evaluations(session)
    assert (job.kind, job.state, job.model_version_id) == (
        JobKind.EVALUATION,
        JobState.QUEUED,
        deployed.models[1].id,
    )
    session.refresh(monitor)
    assert monitor.next_evaluation_at is not None
    left = monitor.next_evaluation_at - datetime.now(UTC)
    assert timedelta(hours=5.9) < left < timedelta(hours=6.1)
    assert start_due_evaluations(session) == []
    monitor.next_evaluation_at = datetime.now(UTC) - timedelta(minutes=1)
    session.flush()
    assert start_due_evaluations(session) == []  # the last one has not ended
    job.move_to(JobState.CANCELLED)
    job.finished_at = datetime.now(UTC)
    session.flush()
    assert len(start_due_evaluations(session)) == 1


@pytest.mark.parametrize(
    ("fields", "hours"),
    [({}, 18.0), ({"stale_after_hours": 2}, 2.0), ({"stale_after_hours": None}, None)],
)
def test_evaluations_that_never_come_are_silence_too(session, fields, hours) -> None:
    deployed = make_deployed(session)
    monitor = watch(session, deployed, sources=[], schedule={"every_hours": 6}, **fields)
    assert monitor.stale_after_hours == hours
    silence(session, 19)
    assert len(tell_silent(session)) == int(hours is not None)
