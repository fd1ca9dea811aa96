"""Results from outside: paired by item id, acted on with the scope, and told apart from what can't be compared."""

import json
from uuid import uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import select

from app.db.models import DecisionRow, Evaluation, File, JobOrder, ModelVersion
from app.domain.benchmarks import Scorer
from app.domain.decisions import Verdict
from app.domain.identifiers import public_id
from app.domain.messages import Order
from app.domain.results import PostedResult, PostedResults
from app.domain.scopes import Caller, Scope
from app.domain.states import JobState
from app.errors import BadRequest, Conflict, Forbidden, NotFound
from app.services.evaluations import unpack_bytes
from app.services.monitoring import record_evaluation, replay_decision
from app.services.results import record_results
from app.services.storage import Storage
from tests.histories import ITEMS, evaluated, make_running_job, save_checkpoint, start_job

ACTING = frozenset({Scope.RESULTS_WRITE, Scope.RESULTS_ACT})


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def store_items(session, storage, version) -> None:
    """The benchmark's file, whose ids are what posted items are matched by."""
    file = session.get_one(File, version.file_id)
    lines = (json.dumps({"id": f"i{n}", "question": "?"}) for n in range(ITEMS))
    storage.put_bytes("\n".join(lines).encode(), file.path)


def call(job, scopes=ACTING) -> Caller:
    return Caller(project_id=job.project_id, key_id="k", scopes=scopes)


def subject(job) -> dict[str, str]:
    return {"type": "fine_tuning.job", "id": public_id("job", job.id)}


def items(lost=0, n=ITEMS, prefix="i") -> list[dict[str, object]]:
    """As the baseline (the first 1,200 right), but for the first `lost`."""
    return [{"id": f"{prefix}{k}", "score": float(lost <= k < 1200)} for k in range(n)]


def post(session, storage, job, *results, scopes=ACTING):
    body = PostedResults.model_validate(
        {
            "results": [
                {"subject": subject(job), "benchmark": "multiple_choice", **r} for r in results
            ]
        }
    )
    return record_results(session, storage, call(job, scopes), body)


def test_items_are_paired_with_the_baseline_and_a_drop_raises_the_strength(
    session, storage
) -> None:
    job, (version,) = start_job(session)
    store_items(session, storage, version)
    job.step = 40
    (look,) = post(
        session, storage, job, {"items": items(lost=80), "suite_sha256": version.items_sha256}
    )
    (row,) = look.evaluations
    assert (row.is_paired, row.n_samples, row.source, row.purpose) == (
        True,
        ITEMS,
        "external",
        "monitor",
    )
    assert row.value == pytest.approx(1120 / ITEMS)
    assert unpack_bytes(row.scores).sum() == 1120
    assert look.reading is not None
    assert look.reading.verdict is Verdict.REGRESS
    assert look.reading.benchmarks[0].paired
    decision = look.decision
    assert decision is not None
    assert (decision.action, decision.origin, decision.step) == (
        "raise_strength",
        f"external:{row.id}",
        40,
    )
    assert replay_decision(decision).model_dump(mode="json") == decision.decision
    order = Order.model_validate(session.scalars(select(JobOrder)).one().order)
    assert (order.version, order.branch, order.stop, order.roll_back) == (1, 0, False, None)
    assert order.state.strengths == {"ewc": 2.0}
    assert job.controller_state["strengths"] == {"ewc": 2.0}
    assert job.order_version == 1


def test_an_outside_look_counts_and_the_next_evaluation_goes_on_from_it(session, storage) -> None:
    job, versions = start_job(session)
    store_items(session, storage, versions[0])
    post(session, storage, job, {"items": items(lost=80)})
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=80))
    assert reply.state.strengths == {"ewc": 4.0}
    looks = session.scalars(select(DecisionRow.look).order_by(DecisionRow.seq)).all()
    assert looks == [1, 2]


def test_a_severe_outside_drop_rolls_the_job_back_and_the_trainer_is_sent_there(
    session, storage
) -> None:
    job, versions = start_job(session)
    store_items(session, storage, versions[0])
    good = save_checkpoint(session, job, 30)
    record_evaluation(session, job.id, 1, evaluated(versions))
    job.step = 45
    (look,) = post(session, storage, job, {"items": items(lost=300)})
    assert look.decision is not None
    assert look.decision.action == "roll_back"
    order = Order.model_validate(session.scalars(select(JobOrder)).one().order)
    assert order.roll_back is not None
    assert (order.roll_back.checkpoint_id, order.roll_back.branch) == (str(good.id), 1)
    session.refresh(job)
    assert (job.branch, job.step, job.ckpt_id) == (1, 30, good.id)
    behind = record_evaluation(session, job.id, 1, evaluated(versions, 60))
    assert behind.roll_back == order.roll_back
    assert behind.state == order.state


def test_a_passing_result_is_a_look_without_an_order(session, storage) -> None:
    job, (version,) = start_job(session)
    store_items(session, storage, version)
    (look,) = post(session, storage, job, {"items": items()})
    assert look.decision is not None
    assert look.decision.action == "keep"
    assert session.scalars(select(JobOrder)).all() == []


def test_without_the_scope_results_are_read_but_not_acted_on(session, storage) -> None:
    job, (version,) = start_job(session)
    store_items(session, storage, version)
    scopes = frozenset({Scope.RESULTS_WRITE})
    (look,) = post(session, storage, job, {"items": items(lost=300)}, scopes=scopes)
    assert look.reading is not None
    assert look.reading.severe
    assert look.decision is None
    assert session.scalars(select(DecisionRow)).all() == []
    with pytest.raises(Forbidden):
        post(session, storage, job, {"value": 0.5}, scopes=frozenset({Scope.RESULTS_READ}))


def test_value_and_number_of_samples_are_unpaired(session, storage) -> None:
    job, _ = start_job(session)
    (look,) = post(session, storage, job, {"value": 0.3, "stderr": 0.01, "n_samples": 2000})
    assert look.reading is not None
    assert not look.reading.benchmarks[0].paired
    assert not look.evaluations[0].is_paired
    assert look.decision is not None
    assert look.decision.action == "roll_back"


def test_without_a_number_of_samples_nothing_is_done(session, storage) -> None:
    job, _ = start_job(session)
    (look,) = post(session, storage, job, {"value": 0.1})
    assert look.evaluations[0].value == 0.1
    assert (look.reading, look.decision) == (None, None)


def test_items_of_other_ids_are_unpaired(session, storage) -> None:
    job, (version,) = start_job(session)
    store_items(session, storage, version)
    (look,) = post(session, storage, job, {"items": items(lost=100, prefix="x")})
    assert look.reading is not None
    assert not look.reading.benchmarks[0].paired
    assert look.reading.verdict is Verdict.INCONCLUSIVE
    assert look.evaluations[0].scores is None


def test_items_of_an_nll_benchmark_take_the_baselines_token_counts(session, storage) -> None:
    job, (version,) = start_job(session, scorers=(Scorer.NLL,))
    store_items(session, storage, version)
    nats = [{"id": f"i{k}", "score": 308.0 + (k % 3)} for k in range(ITEMS)]
    (look,) = post(session, storage, job, {"benchmark": "nll", "items": nats})
    assert look.reading is not None
    assert look.reading.verdict is Verdict.REGRESS
    assert look.evaluations[0].value == pytest.approx(3.09, abs=0.001)
    strangers = [{"id": f"x{k}", "score": 308.0} for k in range(9)]
    (other,) = post(session, storage, job, {"benchmark": "nll@1", "items": strangers})
    assert other.reading is None


def test_results_of_one_step_are_one_look_and_others_their_own(session, storage) -> None:
    job, _ = start_job(session, scorers=(Scorer.MULTIPLE_CHOICE, Scorer.EXACT_MATCH))
    one = {"value": 0.6, "n_samples": 500, "step": 10}
    looks = post(
        session,
        storage,
        job,
        one,
        {**one, "benchmark": "exact_match"},
        {**one, "step": 20},
    )
    assert [len(look.evaluations) for look in looks] == [2, 1]
    assert [look.decision is not None and look.decision.look for look in looks] == [1, 2]


@pytest.mark.parametrize(
    "extra", [{"benchmark": "unheard_of"}, {"metric": "brier"}, {"benchmark": "multiple_choice@9"}]
)
def test_what_cannot_be_compared_is_recorded_alone(session, storage, extra) -> None:
    job, _ = start_job(session)
    (look,) = post(session, storage, job, {"value": 0.1, "n_samples": 5000, **extra})
    assert look.reading is None
    assert look.evaluations[0].value == 0.1


def test_a_suite_hash_unlike_the_baselines_is_a_conflict(session, storage) -> None:
    job, _ = start_job(session)
    with pytest.raises(Conflict) as caught:
        post(session, storage, job, {"value": 0.5, "n_samples": 10, "suite_sha256": "0" * 64})
    assert caught.value.param == "suite_sha256"


@pytest.mark.parametrize(
    "result", [{"value": 61.2, "n_samples": 9}, {"items": [{"id": "i1", "score": -1}]}]
)
def test_an_accuracy_outside_0_to_1_is_refused(session, storage, result) -> None:
    job, _ = start_job(session)
    with pytest.raises(BadRequest, match="between 0 and 1"):
        post(session, storage, job, result)


@pytest.mark.parametrize(
    "result",
    [{}, {"items": [{"id": "a", "score": 1}, {"id": "a", "score": 0}]}, {"value": float("nan")}],
)
def test_malformed_results_are_refused_by_their_type(result) -> None:
    with pytest.raises(ValidationError):
        PostedResult.model_validate(
            {"subject": {"type": "model", "id": "m"}, "benchmark": "b", **result}
        )


def test_jobs_of_other_projects_and_unknown_ones_are_not_found(session, storage) -> None:
    job, _ = start_job(session)
    body = PostedResults.model_validate(
        {"results": [{"subject": subject(job), "benchmark": "multiple_choice", "value": 0.5}]}
    )
    stranger = Caller(project_id=uuid4(), key_id="k", scopes=ACTING)
    with pytest.raises(NotFound):
        record_results(session, storage, stranger, body)
    nobody = PostedResults.model_validate(
        {"results": [{"subject": {"type": "model", "id": "ft:x"}, "benchmark": "b", "value": 0.5}]}
    )
    with pytest.raises(NotFound):
        record_results(session, storage, call(job), nobody)


def test_a_job_that_has_not_started_or_has_ended_is_recorded_alone(session, storage) -> None:
    waiting, _ = make_running_job(session)
    waiting.run_plan = None
    session.flush()
    (look,) = post(session, storage, waiting, {"value": 0.5, "n_samples": 100})
    assert (look.reading, look.decision) == (None, None)
    paused, _ = start_job(session)
    paused.move_to(JobState.PAUSING)
    session.flush()
    (look,) = post(session, storage, paused, {"value": 0.1, "n_samples": 1000})
    assert look.reading is not None
    assert look.decision is None


def test_a_model_is_read_against_the_baseline_of_its_base_with_its_own_budget(
    session, storage
) -> None:
    job, (version,) = start_job(session)
    store_items(session, storage, version)
    model = ModelVersion(
        project_id=job.project_id,
        name=f"ft:tiny:{uuid4().hex}",
        base_model_id=job.base_model_id,
        job_id=job.id,
        status="ready",
        kind="full",
        alpha=1.0,
        retention="held",
    )
    session.add(model)
    session.flush()
    body = PostedResults.model_validate(
        {
            "results": [
                {
                    "subject": {"type": "model", "id": model.name},
                    "benchmark": "multiple_choice",
                    "items": items(lost=300),
                }
            ]
        }
    )
    looks = [record_results(session, storage, call(job), body)[0] for _ in range(3)]
    assert [look.reading is not None and look.reading.look for look in looks] == [1, 2, 3]
    assert all(look.reading is not None and look.reading.severe for look in looks)
    assert all(look.decision is None for look in looks)
    (row,) = session.scalars(
        select(Evaluation).where(Evaluation.model_version_id == model.id).limit(1)
    )
    assert row.benchmark == "multiple_choice"
