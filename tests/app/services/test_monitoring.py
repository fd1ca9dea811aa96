"""The closed loop on real Postgres: baselines, evaluation points, rollbacks and what is told."""

import base64
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from sqlalchemy import func, select

from app.db.models import (
    DecisionRow,
    Evaluation,
    Job,
    JobEvent,
    WebhookEvent,
)
from app.db.session import transaction
from app.domain.benchmarks import BenchmarkScores, Scorer, pack_array
from app.domain.decisions import Action, Verdict
from app.domain.messages import Finished
from app.domain.policy import Ladder, Policy
from app.domain.runplan import BasePlan
from app.domain.states import JobState
from app.errors import BadRequest, Conflict, Fenced
from app.services.evaluations import baseline_key, find_baseline, row_id
from app.services.monitoring import (
    final_verdict,
    judge_scores,
    record_baseline,
    record_evaluation,
    replay_decision,
)
from tests.histories import (
    CARRY,
    ITEMS,
    evaluated,
    make_running_job,
    make_scores,
    save_checkpoint,
    start_job,
)


def count(session, model, *where) -> int:
    return session.scalar(select(func.count()).select_from(model).where(*where)) or 0


def list_webhooks(session, job) -> list[str]:
    rows = session.scalars(
        select(WebhookEvent).where(WebhookEvent.job_id == job.id).order_by(WebhookEvent.seq)
    )
    return [row.type for row in rows]


def test_a_baseline_is_kept_per_item_and_told_as_power(session) -> None:
    job, (version,) = start_job(session)
    base = BasePlan.model_validate(job.run_plan["base"])
    row = session.scalars(
        select(Evaluation).where(Evaluation.subject_key == baseline_key(base))
    ).one()
    assert (row.value, row.n_samples, row.purpose) == (0.6, ITEMS, "baseline")
    found = find_baseline(session, base, version.id)
    assert found is not None
    assert found.scores == make_scores(version).scores
    event = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id)).one()
    assert event.data["code"] == "sensor_power"
    assert "an undamaged model passes with" in event.message
    wanted = job.power["recommended"]
    assert wanted["items"] == wanted["items_for_regress"] > wanted["items_for_pass"]
    assert f"Recommended are {wanted['items']} gate items a benchmark" in event.message
    assert "2 points above the limit are called with 90 %" in event.message
    assert job.power["mean"]["n_items"] == ITEMS // 2
    assert job.power["from_baseline"]


def test_power_is_told_once_all_baselines_are_there(session) -> None:
    job, versions = make_running_job(session, scorers=(Scorer.MULTIPLE_CHOICE, Scorer.NLL))
    told = select(func.count()).select_from(JobEvent).where(JobEvent.job_id == job.id)
    record_baseline(session, job, [make_scores(versions[0])])
    assert session.scalar(told) == 0
    assert job.power["mean"] is not None
    record_baseline(session, job, [make_scores(versions[1])])
    assert session.scalar(told) == 1


def test_new_items_join_a_baseline_and_known_ones_stay(session) -> None:
    job, (version,) = make_running_job(session)
    record_baseline(session, job, [make_scores(version, scored=slice(0, 1000))])
    record_baseline(session, job, [make_scores(version, lost=600)])
    base = BasePlan.model_validate(job.run_plan["base"])
    row = session.scalars(
        select(Evaluation).where(Evaluation.subject_key == baseline_key(base))
    ).one()
    assert row.scores is not None
    values = np.frombuffer(zlib.decompress(row.scores), dtype="<f4")
    assert values[:1000].sum() == 1000  # of the first message
    assert row.n_samples == ITEMS
    assert row.value == 0.6


def test_a_benchmark_at_floor_is_warned_of(session) -> None:
    job, (version,) = make_running_job(session)
    record_baseline(session, job, [make_scores(version, right=510)])
    event = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id)).one()
    assert event.level == "warn"
    assert "At floor" in event.message
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated([version], lost=500))
    assert reply.action == Action.KEEP
    row = session.scalars(select(DecisionRow)).one()
    assert row.code == Verdict.AT_FLOOR


def test_a_pass_makes_the_checkpoint_good_and_is_written_with_its_evidence(session) -> None:
    job, versions = start_job(session, scorers=(Scorer.MULTIPLE_CHOICE, Scorer.NLL))
    checkpoint = save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, valid_loss=0.7))
    assert (reply.reply_to, reply.action, reply.finish, reply.roll_back) == (7, "keep", False, None)
    session.refresh(checkpoint)
    assert (checkpoint.status, checkpoint.is_evaluated, checkpoint.valid_loss) == (
        "good",
        True,
        0.7,
    )
    assert checkpoint.metrics["full_valid_mean_token_accuracy"] == 0.5
    row = session.scalars(select(DecisionRow)).one()
    assert (row.look, row.origin, row.code, row.state) == (1, "run", "within_limit", "applied")
    assert replay_decision(row).model_dump(mode="json") == row.decision
    kept = session.scalars(select(Evaluation).where(Evaluation.purpose == "gate")).all()
    assert {(e.step, e.branch, e.checkpoint_id) for e in kept} == {(30, 0, checkpoint.id)}
    nll = next(e for e in kept if e.metric == "nll")
    assert nll.value == 3.0
    assert nll.tokens is not None
    assert list_webhooks(session, job) == []


def test_only_the_items_that_were_scored_are_paired(session) -> None:
    job, (version,) = start_job(session)
    save_checkpoint(session, job, 30)
    message = evaluated([]).model_copy(
        update={"scores": (make_scores(version, scored=slice(600, 1600)),)}
    )
    record_evaluation(session, job.id, 1, message)
    reading = session.scalars(select(DecisionRow)).one().evidence["look"]["reading"]
    assert reading["benchmarks"][0]["n_items"] == 1000
    assert reading["benchmarks"][0]["baseline"] == 0.6


def test_reporting_a_point_again_returns_the_recorded_decision_and_is_no_new_look(session) -> None:
    job, versions = start_job(session)
    save_checkpoint(session, job, 30)
    first = record_evaluation(session, job.id, 1, evaluated(versions, lost=60))
    job.attempt = 2
    session.flush()
    again = record_evaluation(session, job.id, 2, evaluated(versions, message_id=99, lost=500))
    assert again == first.model_copy(update={"reply_to": 99})
    assert count(session, DecisionRow) == 1
    assert count(session, Evaluation, Evaluation.purpose == "gate") == 1
    save_checkpoint(session, job, 60)
    record_evaluation(session, job.id, 2, evaluated(versions, 60))
    looks = session.scalars(select(DecisionRow.look).order_by(DecisionRow.seq)).all()
    assert looks == [1, 2]


@pytest.mark.parametrize("case", ["attempt", "state", "branch", "unknown"])
def test_a_stale_writer_is_fenced_and_writes_nothing(session, case) -> None:
    job, versions = start_job(session)
    if case == "state":
        job.worker_id = job.lease_expires_at = None
        job.move_to(JobState.QUEUED)
        session.flush()
    message = evaluated(versions, branch=1 if case == "branch" else 0)
    with pytest.raises(Fenced):
        record_evaluation(
            session,
            uuid4() if case == "unknown" else job.id,
            0 if case == "attempt" else 1,
            message,
        )
    assert count(session, DecisionRow) == 0
    assert count(session, Evaluation, Evaluation.purpose == "gate") == 0


def test_a_confirmed_drop_raises_the_strength_and_says_so(session) -> None:
    job, versions = start_job(session)
    checkpoint = save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=80))
    assert reply.action == "raise_strength"
    assert reply.state.strengths == {"ewc": 2.0}
    session.refresh(checkpoint)
    assert checkpoint.status == "bad"
    assert job.controller_state["strengths"] == {"ewc": 2.0}
    assert list_webhooks(session, job) == [
        "retention.regression_detected",
        "retention.strength_raised",
    ]
    event = session.scalars(select(JobEvent).order_by(JobEvent.seq.desc())).first()
    assert event.level == "warn"
    assert event.data["decision"]["before"]["strengths"] == {"ewc": 1.0}
    assert event.data["decision"]["after"]["strengths"] == {"ewc": 2.0}
    assert "limit 3.00%" in event.message


def test_a_rollback_rewinds_the_job_and_supersedes_what_came_after(session) -> None:
    job, versions = start_job(session)
    good = save_checkpoint(session, job, 30)
    record_evaluation(session, job.id, 1, evaluated(versions))
    between = save_checkpoint(session, job, 45)
    bad = save_checkpoint(session, job, 60)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, 60, lost=300))
    assert reply.roll_back is not None
    assert reply.roll_back.checkpoint_id == str(good.id)
    assert reply.roll_back.checkpoint_directory == good.path
    assert (reply.roll_back.step, reply.roll_back.branch) == (30, 1)
    assert not reply.finish
    session.refresh(job)
    assert (job.branch, job.step, job.ckpt_id) == (1, 30, good.id)
    for row, superseded in ((good, False), (between, True), (bad, True)):
        session.refresh(row)
        assert row.superseded is superseded
    decision = session.scalars(select(DecisionRow).where(DecisionRow.step == 60)).one()
    assert decision.carry == CARRY.model_dump(mode="json")
    assert decision.target_checkpoint_id == good.id
    assert replay_decision(decision).model_dump(mode="json") == decision.decision
    assert list_webhooks(session, job) == ["retention.regression_detected", "retention.rolled_back"]
    # the new branch walks over the same step again and is another look
    save_checkpoint(session, job, 60, branch=1)
    again = record_evaluation(session, job.id, 1, evaluated(versions, 60, branch=1))
    assert again.action in {"keep", "lower_strength"}
    assert again.state.strengths["ewc"] == 4.0
    assert session.scalar(select(func.max(DecisionRow.look))) == 3


def test_without_any_good_checkpoint_the_rollback_goes_to_the_start(session) -> None:
    job, versions = start_job(session)
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=300))
    assert reply.roll_back is not None
    assert (reply.roll_back.checkpoint_id, reply.roll_back.step) == ("start", 0)
    session.refresh(job)
    assert (job.branch, job.step, job.ckpt_id) == (1, 0, None)


def test_a_saved_start_is_the_target_where_there_is_one(session) -> None:
    job, versions = start_job(session)
    first = save_checkpoint(session, job, 0)
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=300))
    assert reply.roll_back is not None
    assert reply.roll_back.checkpoint_id == str(first.id)
    assert job.ckpt_id == first.id


def test_the_reply_to_a_rolled_back_point_is_given_again(session) -> None:
    job, versions = start_job(session)
    save_checkpoint(session, job, 30)
    first = record_evaluation(session, job.id, 1, evaluated(versions, lost=300))
    again = record_evaluation(session, job.id, 1, evaluated(versions, lost=300, message_id=8))
    assert again.roll_back == first.roll_back
    behind = record_evaluation(session, job.id, 1, evaluated(versions, 45, message_id=9))
    assert behind.roll_back == first.roll_back
    assert count(session, DecisionRow) == 1


@pytest.mark.parametrize("losses_finite", [True, False])
def test_numbers_that_are_not_finite_roll_back(session, losses_finite) -> None:
    job, (version,) = start_job(session)
    checkpoint = save_checkpoint(session, job, 30)
    message = evaluated([version], losses_finite=losses_finite)
    if losses_finite:  # every score of the model is NaN
        empty = make_scores(version, scored=slice(0, 0))
        message = message.model_copy(update={"scores": (empty,)})
    reply = record_evaluation(session, job.id, 1, message)
    assert reply.action == "roll_back"
    row = session.scalars(select(DecisionRow)).one()
    assert row.code == "not_finite"
    session.refresh(checkpoint)
    assert checkpoint.status == "bad"


def test_the_last_point_publishes_the_best_good_checkpoint(session) -> None:
    job, versions = start_job(session)
    for step, loss in ((30, 0.9), (60, 0.6), (90, 0.8)):
        save_checkpoint(session, job, step)
        record_evaluation(session, job.id, 1, evaluated(versions, step, valid_loss=loss))
    save_checkpoint(session, job, 120)
    reply = record_evaluation(
        session, job.id, 1, evaluated(versions, 120, valid_loss=0.5, lost=38, is_last=True)
    )
    assert reply.finish
    assert reply.failure is None
    assert reply.publish is not None
    assert (reply.publish.step, reply.publish.status) == (60, "good")


def test_a_job_with_nothing_to_publish_fails_by_the_rule(session) -> None:
    refuse = Policy(on_inconclusive="refuse")
    job, versions = start_job(session, policy=refuse)
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=38, is_last=True))
    assert (reply.finish, reply.publish, reply.failure) == (True, None, "retention_not_met")


def test_a_job_without_a_policy_trains_on_and_publishes_its_last_checkpoint(session) -> None:
    job, _ = make_running_job(session, policy=None, retention=None, scorers=())
    for step in range(10, 120, 10):
        save_checkpoint(session, job, step)
        reply = record_evaluation(session, job.id, 1, evaluated([], step, valid_loss=1.0))
        assert (reply.action, reply.finish) == ("keep", False)
    save_checkpoint(session, job, 120)
    last = record_evaluation(session, job.id, 1, evaluated([], 120, valid_loss=None, is_last=True))
    assert last.finish
    assert last.publish is not None


def finished(checkpoint, versions, *, lost, alpha=1.0, shrunk=0) -> Finished:
    return Finished(
        id=1,
        checkpoint_id=str(checkpoint.id),
        artifact_directory="/out",
        artifact_kind="full",
        alpha=alpha,
        report=tuple(
            make_scores(v, lost=shrunk if alpha < 1 else lost, item_set="report") for v in versions
        ),
        tuned_report=tuple(make_scores(v, lost=lost, item_set="report") for v in versions),
        valid_loss=0.5,
        frontier=(),
        result_csv="metrics.csv",
        trained_tokens=10,
        seconds={},
    )


@pytest.mark.parametrize(
    ("lost", "alpha", "shrunk", "retention", "failure"),
    [
        (0, 1.0, 0, "held", None),
        (38, 1.0, 0, "unproven", None),
        (300, 0.6, 0, "held", None),
        (300, 0.6, 200, None, "retention_not_met"),
        (300, 0.0, 0, None, "retention_not_met"),
    ],
)
def test_the_report_set_gives_the_final_verdict(
    session, lost, alpha, shrunk, retention, failure
) -> None:
    job, versions = start_job(session)
    checkpoint = save_checkpoint(session, job, 60)
    message = finished(checkpoint, versions, lost=lost, alpha=alpha, shrunk=shrunk)
    verdict = final_verdict(session, job, message)
    assert (verdict.publication.retention, verdict.publication.failure) == (retention, failure)
    assert final_verdict(session, job, message) == verdict  # a later attempt may say it again
    row = session.scalars(select(Evaluation).where(Evaluation.purpose == "report")).one()
    assert (row.step, row.checkpoint_id) == (60, checkpoint.id)
    assert verdict.tuned is not None
    assert verdict.tuned.alpha == 0.05


def test_adapters_merged_into_the_whole_base_are_judged_beside_it(session) -> None:
    job, versions = start_job(session)
    job.run_plan = job.run_plan | {"base": job.run_plan["base"] | {"quantization": "nf4"}}
    session.flush()
    record_baseline(session, job, [make_scores(v, lost=0, item_set="all") for v in versions])
    checkpoint = save_checkpoint(session, job, 60)
    fine = finished(checkpoint, versions, lost=0)
    whole = tuple(make_scores(v, lost=0, item_set="report") for v in versions)
    lost = tuple(make_scores(v, lost=300, item_set="report") for v in versions)
    merged = fine.model_copy(update={"report": lost, "merged_baseline": whole})
    verdict = final_verdict(session, job, merged)
    assert verdict.tuned is not None
    assert verdict.published is not None
    assert (verdict.tuned.verdict, verdict.published.verdict) == ("pass", "regress")
    assert verdict.publication.failure == "retention_not_met"
    rows = session.scalars(select(Evaluation).where(Evaluation.purpose == "baseline")).all()
    keys = {row.subject_key for row in rows}
    assert {key.endswith("/nf4") for key in keys} == {True, False}
    reading = judge_scores(session, job, lost, whole)
    assert reading is not None
    assert reading.verdict == "regress"


def test_retention_off_is_told_apart_from_nothing_to_watch(session) -> None:
    off, _ = make_running_job(session, policy=None, retention=None, scorers=())
    unwatched, _ = make_running_job(session, policy=None, scorers=())
    for job, word in ((off, "off"), (unwatched, "unwatched")):
        checkpoint = save_checkpoint(session, job, 60)
        verdict = final_verdict(session, job, finished(checkpoint, [], lost=0))
        assert verdict.publication.retention == word
        assert judge_scores(session, job, []) is None


def test_scores_of_the_wrong_length_or_without_tokens_are_refused(session) -> None:
    job, (version,) = make_running_job(session, scorers=(Scorer.NLL,))
    short = BenchmarkScores(
        benchmark_version_id=str(version.id),
        item_set="gate",
        scores=pack_array(np.ones(3, dtype=np.float32)),
    )
    with pytest.raises(BadRequest, match="3 values"):
        record_baseline(session, job, [short])
    bare = make_scores(version).model_copy(update={"tokens": None})
    with pytest.raises(BadRequest, match="token counts"):
        record_baseline(session, job, [bare])


def test_a_job_that_was_never_planned_has_no_baseline(session) -> None:
    job, _ = make_running_job(session)
    job.run_plan = None
    with pytest.raises(Conflict):
        record_baseline(session, job, [])


def test_rows_are_named_by_uuid_or_public_id() -> None:
    key = uuid4()
    assert row_id(str(key)) == row_id(f"benchv_{key.hex}") == key
    with pytest.raises(BadRequest):
        row_id("benchv_nothing")


def test_packed_scores_are_the_bytes_of_the_row(session) -> None:
    job, (version,) = start_job(session)
    base = BasePlan.model_validate(job.run_plan["base"])
    row = session.scalars(
        select(Evaluation).where(Evaluation.subject_key == baseline_key(base))
    ).one()
    assert base64.b64encode(row.scores).decode() == make_scores(version).scores


def test_two_writers_of_one_point_record_it_once(committed_factory) -> None:
    """The supervisor sends a message again while its first transaction is still open."""
    with transaction(committed_factory) as session:
        job, versions = start_job(session)
        save_checkpoint(session, job, 30)
    message = evaluated(versions, lost=300)

    def write(_) -> Any:
        with transaction(committed_factory) as session:
            return record_evaluation(session, job.id, 1, message)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(write, range(4)))
    assert replies == [replies[0]] * 4
    assert replies[0].roll_back is not None
    with transaction(committed_factory) as session:
        assert count(session, DecisionRow) == 1
        assert count(session, Evaluation, Evaluation.purpose == "gate") == 1
        assert session.get_one(Job, job.id).branch == 1
        assert count(session, WebhookEvent) == 2


def test_two_jobs_that_measure_one_baseline_make_one_row(committed_factory) -> None:
    with transaction(committed_factory) as session:
        job, (version,) = make_running_job(session)

    def write(part: int) -> None:
        with transaction(committed_factory) as session:
            scored = slice(part * 500, part * 500 + 500)
            found = make_scores(version, scored=scored)
            record_baseline(session, session.get_one(Job, job.id), [found])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    with transaction(committed_factory) as session:
        row = session.scalars(select(Evaluation)).one()
        assert (row.n_samples, row.value) == (ITEMS, 0.6)


def test_a_run_under_the_loop_ends_held_with_every_decision_replayable(session) -> None:
    """A plant whose drop falls with the strength (16 %, 6 %, 1 %), under the demo's policy: 1 -> 10 -> 100."""
    policy = Policy(
        ladder=Ladder(repair=False, rollback_strength_factor=10, rollback_learning_rate_factor=1)
    )
    job, versions = start_job(session, policy=policy)
    strength, branch, step, path, reply = 1.0, 0, 15, [1.0], None
    while reply is None or not reply.finish:
        save_checkpoint(session, job, step, branch=branch)
        lost = 190 if strength < 5 else 140 if strength < 50 else 6
        message = evaluated(
            versions,
            step,
            branch=branch,
            lost=lost,
            is_last=step == 120,
            valid_loss=2 - step / 120,
        )
        reply = record_evaluation(session, job.id, 1, message)
        strength = reply.state.strengths["ewc"]
        if reply.roll_back is not None:
            branch, step = reply.roll_back.branch, reply.roll_back.step
            path.append(strength)
        step += 15
    assert path == [1.0, 10.0, 100.0]
    assert 50 < strength < 100  # lowered again while the upper bound leaves room
    assert reply.publish is not None
    assert (reply.publish.step, reply.publish.status) == (120, "good")
    rows = session.scalars(select(DecisionRow).order_by(DecisionRow.seq)).all()
    assert [row.look for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert replay_decision(row).model_dump(mode="json") == row.decision


@pytest.mark.parametrize(("on_no_gain", "failure"), [("publish", None), ("refuse", "no_gain")])
def test_a_domain_benchmark_that_must_rise_is_read_on_the_report_set(
    session, on_no_gain, failure
) -> None:
    job, versions = start_job(session)
    plan = job.run_plan["benchmarks"][0]
    spec = dict(job.spec)
    wish = {"name": plan["name"], "expect": "rise"}
    spec["policy"] = spec["policy"] | {"benchmarks": [wish], "on_no_gain": on_no_gain}
    job.spec = spec
    session.flush()
    checkpoint = save_checkpoint(session, job, 60)
    verdict = final_verdict(session, job, finished(checkpoint, versions, lost=0))
    assert verdict.publication.failure == failure
    assert "was to rise and has not shown it" in verdict.publication.reason
    assert verdict.published is not None
    (gain,) = verdict.published.gains
    assert (gain.name, gain.gain, gain.has_risen) == (plan["name"], 0.0, False)
