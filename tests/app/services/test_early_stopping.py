"""Early stopping on a benchmark, from the scores of a job, of results from outside and of an external run."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from app.db.models import BenchmarkVersion, DecisionRow, File, Job, JobOrder
from app.db.repositories.queue import QueueRepository
from app.domain.benchmarks import BenchmarkKind, Scorer, pack_array
from app.domain.external import CreateRun, PostBaseline, PostEvaluation
from app.domain.identifiers import public_id
from app.domain.messages import DecisionReply, Evaluated, Order
from app.domain.policy import EarlyStopping, Ladder, Policy
from app.domain.results import PostedResults
from app.domain.scopes import Caller, Scope
from app.domain.spec import JobSpec
from app.domain.states import JobState
from app.errors import BadRequest
from app.services.external_runs import register_run
from app.services.external_scores import record_run_baseline, record_run_evaluation
from app.services.monitoring import record_evaluation, replay_decision
from app.services.results import record_results
from app.services.storage import Storage
from tests.app.services.test_jobs import Stand
from tests.external import registration, store_benchmark
from tests.factories import make_benchmark, make_project, make_second_version, make_suite
from tests.histories import ITEMS, evaluated, make_scores, save_checkpoint, start_job

METRIC = "retention.policy.early_stopping.metric"


def stopping_on(metric: str, **rest: Any) -> Policy:
    stopping = EarlyStopping(metric=metric, **{"patience": 3} | rest)
    return Policy(early_stopping=stopping, ladder=Ladder(repair=False))


def message(versions: Sequence[BenchmarkVersion], step: int, losts: Sequence[int]) -> Evaluated:
    """A point at which each benchmark lost so much; below 0 it gained. The validation loss falls at every one."""
    found = tuple(
        make_scores(version, lost=lost if version.scorer is Scorer.NLL else 0, right=1200 - lost)
        if version.scorer is Scorer.NLL or lost < 0
        else make_scores(version, lost=lost)
        for version, lost in zip(versions, losts, strict=True)
    )
    return evaluated([], step, valid_loss=100.0 - step).model_copy(update={"scores": found})


def run(session, job: Job, versions, losts: Sequence[Sequence[int]]) -> list[DecisionReply]:
    """Looks 30 steps apart, until the job is to end."""
    replies: list[DecisionReply] = []
    for number, lost in enumerate(losts, start=1):
        save_checkpoint(session, job, 30 * number, attempt=job.attempt)
        point = message(versions, 30 * number, lost)
        replies.append(record_evaluation(session, job.id, job.attempt, point))
        if replies[-1].finish:
            break
    return replies


@pytest.mark.parametrize(
    ("scorer", "losts", "best"),
    [
        (Scorer.EXACT_MATCH, [0, -20, -10, -20, 0, 0], 0.61),
        (Scorer.NLL, [0, -2, -1, -2, 0, 0], 2.98),
    ],
)
def test_a_stalled_benchmark_stops_the_job_after_patience_looks(
    session, scorer, losts, best
) -> None:
    job, versions = start_job(session, scorers=(scorer,), policy=stopping_on(str(scorer)))
    replies = run(session, job, versions, [[lost] for lost in losts])
    assert [reply.action for reply in replies] == ["keep"] * 4 + ["stop"]
    assert (replies[-1].finish, replies[-1].failure) == (True, None)
    assert replies[-1].publish is not None
    rows = session.scalars(select(DecisionRow).order_by(DecisionRow.seq)).all()
    assert rows[-1].code == "early_stopping"
    assert f"{scorer} has not improved on {best:g} for 3 evaluations" in rows[-1].reason
    assert [row.evidence["look"]["metric"]["value"] for row in rows][1] == pytest.approx(best)
    is_higher = {row.evidence["look"]["metric"]["higher_is_better"] for row in rows}
    assert is_higher == {scorer is not Scorer.NLL}
    for row in rows:
        assert replay_decision(row).model_dump(mode="json") == row.decision


def test_a_benchmark_that_becomes_better_goes_on_and_a_missing_one_does_not_count(session) -> None:
    job, versions = start_job(session, policy=stopping_on("multiple_choice", patience=1))
    rising = run(session, job, versions, [[-number] for number in range(8)])
    assert {reply.action for reply in rising} == {"keep"}
    bare, _ = start_job(session, policy=stopping_on("multiple_choice", patience=1))
    assert {reply.action for reply in run(session, bare, [], [[]] * 5)} == {"keep"}


def test_a_domain_benchmark_counts_though_no_verdict_rests_on_it(session) -> None:
    scorers = (Scorer.MULTIPLE_CHOICE, Scorer.EXACT_MATCH)
    job, versions = start_job(session, scorers=scorers, policy=stopping_on("exact_match"))
    plan: dict[str, Any] = job.run_plan
    learned = plan["benchmarks"][1] | {"kind": BenchmarkKind.DOMAIN.value}
    job.run_plan = plan | {"benchmarks": [plan["benchmarks"][0], learned]}
    session.flush()
    losts = [[0, -300], [-1, -500], [-2, -500], [-3, -499], [-4, -400]]
    replies = run(session, job, versions, losts)
    assert [reply.action for reply in replies] == ["keep"] * 4 + ["stop"]
    reading = session.scalars(select(DecisionRow)).first().evidence["look"]["reading"]
    assert [found["name"] for found in reading["benchmarks"]] == ["multiple_choice"]


def test_an_item_without_a_finite_score_gives_no_value(session) -> None:
    job, versions = start_job(session, policy=stopping_on("multiple_choice"))
    broken = np.ones(ITEMS, dtype=np.float32)
    broken[7] = np.inf
    point = message(versions, 30, [0])
    found = point.scores[0].model_copy(update={"scores": pack_array(broken)})
    save_checkpoint(session, job, 30)
    record_evaluation(session, job.id, 1, point.model_copy(update={"scores": (found,)}))
    assert session.scalars(select(DecisionRow)).one().evidence["look"]["metric"] is None


def lose_worker(session, job: Job) -> None:
    """The worker dies; the job goes back to the queue, and another worker claims it."""
    job.worker_id = job.lease_expires_at = None
    job.move_to(JobState.QUEUED)
    session.flush()
    session.expire_all()
    claimed = QueueRepository(session).claim(
        worker_id="other", free_slots=1, queues=["default"], ttl=60
    )
    assert claimed is not None
    assert claimed.id == job.id
    session.refresh(job)


@pytest.mark.parametrize("kills", [{2}, {3}, {4}, {1, 2, 3, 4}])
def test_a_kill_between_looks_changes_nothing(session, kills: set[int]) -> None:
    losts = [0, -20, -10, -20, 0, 0]
    policy = stopping_on("exact_match")
    whole, versions = start_job(session, scorers=(Scorer.EXACT_MATCH,), policy=policy)
    expected = run(session, whole, versions, [[lost] for lost in losts])
    job, versions = start_job(session, scorers=(Scorer.EXACT_MATCH,), policy=policy)
    replies: list[DecisionReply] = []
    for number, lost in enumerate(losts[: len(expected)], start=1):
        point = message(versions, 30 * number, [lost])
        save_checkpoint(session, job, 30 * number, attempt=job.attempt)
        replies.append(record_evaluation(session, job.id, job.attempt, point))
        if number in kills:  # the answer was lost: the next attempt asks again, which is no look
            lose_worker(session, job)
            again = record_evaluation(session, job.id, job.attempt, point)
            assert again == replies[-1]
    assert job.attempt == 1 + len(kills)
    assert [reply.action for reply in replies] == [reply.action for reply in expected]
    assert [reply.state for reply in replies] == [reply.state for reply in expected]
    assert replies[-1].state.best_scores == ((30, 0.6), (60, 0.61))
    assert replies[-1].state.evals_without_improvement == 3


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def store_items(session, storage: Storage, version: BenchmarkVersion) -> None:
    lines = (json.dumps({"id": f"i{n}", "question": "?"}) for n in range(ITEMS))
    path = session.get_one(File, version.file_id).path
    storage.put_bytes("\n".join(lines).encode(), path)


def post(session, storage: Storage, job: Job, step: int, **result: Any) -> DecisionRow:
    subject = {"type": "fine_tuning.job", "id": public_id("job", job.id)}
    fields = {"subject": subject, "benchmark": "exact_match", "step": step}
    scopes = frozenset({Scope.RESULTS_WRITE, Scope.RESULTS_ACT})
    (look,) = record_results(
        session,
        storage,
        Caller(project_id=job.project_id, key_id="k", scopes=scopes),
        PostedResults.model_validate({"results": [fields | result]}),
    )
    assert look.decision is not None
    return look.decision


def items(right: int, n: int = ITEMS) -> list[dict[str, Any]]:
    return [{"id": f"i{k}", "score": float(k < right)} for k in range(n)]


def test_results_from_outside_count_and_stop_a_running_job(session, storage) -> None:
    job, versions = start_job(
        session, scorers=(Scorer.EXACT_MATCH,), policy=stopping_on("exact_match")
    )
    store_items(session, storage, versions[0])
    save_checkpoint(session, job, 30)
    record_evaluation(session, job.id, 1, message(versions, 30, [-20]))
    made = [post(session, storage, job, step, items=items(1215)) for step in (40, 50, 60)]
    assert [row.action for row in made] == ["keep", "keep", "stop"]
    assert made[-1].code == "early_stopping"
    assert "exact_match has not improved on 0.61 for 3 evaluations" in made[-1].reason
    order = Order.model_validate(session.scalars(select(JobOrder)).one().order)
    assert (order.stop, order.roll_back) == (True, None)
    assert replay_decision(made[-1]).model_dump(mode="json") == made[-1].decision


def test_results_on_other_items_than_the_jobs_own_do_not_count(session, storage) -> None:
    job, versions = start_job(
        session, scorers=(Scorer.EXACT_MATCH,), policy=stopping_on("exact_match", patience=1)
    )
    store_items(session, storage, versions[0])
    early = post(session, storage, job, 10, items=items(1200))
    assert early.evidence["look"]["metric"] is None  # nothing of its own to compare with yet
    half = make_scores(versions[0], scored=slice(0, 1600))
    save_checkpoint(session, job, 30)
    own = evaluated([], 30).model_copy(update={"scores": (half,)})
    assert record_evaluation(session, job.id, 1, own).state.best_scores == ((30, 0.75),)
    uncounted: list[dict[str, Any]] = [
        {"value": 0.61, "n_samples": 2000},
        {"items": items(1200, 1500)},
        {"items": [{"id": f"x{k}", "score": 1.0} for k in range(900)]},
    ]
    for step, result in enumerate(uncounted, start=40):
        row = post(session, storage, job, step, **result)
        assert (row.action, row.evidence["look"]["metric"]) == ("keep", None)
    same = post(session, storage, job, 50, items=items(1200))  # all 2,000; 1,600 of them compare
    assert same.evidence["look"]["metric"]["value"] == 0.75
    assert (same.action, same.code) == ("stop", "early_stopping")


def posted(benchmark: str, lost: int, scorer: Scorer) -> dict[str, Any]:
    if scorer is Scorer.NLL:
        made = [{"id": f"i{n}", "score": 300.0 + lost, "tokens": 100} for n in range(1000)]
    else:
        made = [{"id": f"i{n}", "score": float(n < 600 - lost)} for n in range(1000)]
    return {"benchmark": benchmark, "items": made}


@pytest.mark.parametrize("scorer", [Scorer.MULTIPLE_CHOICE, Scorer.NLL])
def test_a_stalled_benchmark_stops_an_external_run(session, storage, scorer) -> None:
    project = make_project(session)
    store_benchmark(session, storage, project, "skill", scorer=scorer)
    policy = {
        "benchmarks": [{"name": "skill"}],
        "early_stopping": {"metric": "skill", "patience": 2},
    }
    made = register_run(session, project.id, CreateRun.model_validate(registration(policy=policy)))
    assert made.spec["policy"]["early_stopping"]["metric"] == "skill@1"
    baseline = PostBaseline.model_validate({"scores": [posted("skill", 0, scorer)]})
    record_run_baseline(session, storage, project.id, made.id, baseline)
    rows = []
    for number, lost in enumerate([0, -4, -3, -4], start=1):
        point = PostEvaluation.model_validate(
            {
                "step": 10 * number,
                "scores": [posted("skill", lost, scorer)],
                "valid_loss": 9 - number,
            }
        )
        rows.append(record_run_evaluation(session, storage, project.id, made.id, point))
    assert [row.action for row in rows] == ["keep", "keep", "keep", "stop"]
    best = 2.96 if scorer is Scorer.NLL else 0.604
    assert f"skill@1 has not improved on {best:g} for 2 evaluations" in rows[-1].reason
    order = Order.model_validate(session.scalars(select(JobOrder)).one().order)
    assert order.stop
    for row in rows:
        assert replay_decision(row).model_dump(mode="json") == row.decision


@pytest.fixture
def stand(session) -> Stand:
    return Stand(session)


def metric_of_job(job: Job) -> str | None:
    policy = JobSpec.model_validate(job.spec).policy
    return None if policy is None else policy.early_stopping.metric


def test_the_metric_is_pinned_to_the_version_that_is_watched(stand: Stand) -> None:
    make_suite(stand.session, stand.base, [make_benchmark(stand.session, name="math")])
    make_benchmark(stand.session, name="skill", kind=BenchmarkKind.DOMAIN)
    for metric in ("math", "math@1"):
        body = {"retention": {"policy": {"early_stopping": {"metric": metric}}}}
        assert metric_of_job(stand.submit(**body)) == "math@1"
    only = {"early_stopping": {"metric": "skill"}, "benchmarks": [{"name": "skill"}]}
    assert metric_of_job(stand.submit(retention={"policy": only})) == "skill@1"
    assert metric_of_job(stand.submit()) == "valid_loss"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("metric", ["physics", "math@2", "valid-loss", "physics@1"])
def test_a_metric_that_is_not_watched_is_refused(stand: Stand, metric: str, enabled: bool) -> None:
    make_suite(stand.session, stand.base, [make_benchmark(stand.session, name="math")])
    make_benchmark(stand.session, name="physics")
    policy = {"early_stopping": {"metric": metric, "enabled": enabled}}
    with pytest.raises(BadRequest, match="nor a benchmark that the job watches") as error:
        stand.submit(retention={"policy": policy})
    assert (error.value.param, error.value.code) == (METRIC, "unknown_metric")
    wish = registration(policy=policy | {"benchmarks": [{"name": "math"}]}, levers=[])
    body = CreateRun.model_validate(wish)
    with pytest.raises(BadRequest) as error:
        register_run(stand.session, stand.project.id, body)
    assert error.value.param == "policy.early_stopping.metric"
    assert str(error.value).startswith("policy.early_stopping.metric: ")


def test_a_name_of_two_watched_versions_asks_for_one(stand: Stand) -> None:
    make_second_version(stand.session, make_benchmark(stand.session, name="math"))
    watched = [{"name": "math@1"}, {"name": "math@2"}]
    with pytest.raises(BadRequest, match="several versions") as error:
        stand.submit(
            retention={"policy": {"benchmarks": watched, "early_stopping": {"metric": "math"}}}
        )
    assert error.value.param == METRIC
    policy = {"benchmarks": watched, "early_stopping": {"metric": "math@2"}}
    assert metric_of_job(stand.submit(retention={"policy": policy})) == "math@2"


def test_a_projects_default_falls_back_where_a_job_watches_something_else(stand: Stand) -> None:
    make_suite(stand.session, stand.base, [make_benchmark(stand.session, name="math")])
    default = Policy(early_stopping=EarlyStopping(metric="physics", patience=2))
    stand.project.default_policy = default.model_dump(mode="json")
    stand.session.flush()
    assert metric_of_job(stand.submit()) == "valid_loss"
    default = default.model_copy(update={"early_stopping": EarlyStopping(metric="math")})
    stand.project.default_policy = default.model_dump(mode="json")
    stand.session.flush()
    assert metric_of_job(stand.submit()) == "math@1"
