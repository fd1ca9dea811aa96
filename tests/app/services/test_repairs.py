"""A repair through the closed loop: what is activated with it is in force, told, and survives the worker."""

from typing import Any

import pytest
from sqlalchemy import select

from app.db.models import DecisionRow, Job, JobEvent, WebhookEvent
from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.decisions import Diagnosis
from app.domain.messages import Repaired
from app.domain.policy import Policy
from app.domain.strategies import StrategyConfig
from app.services.monitoring import record_evaluation, replay_decision
from app.services.progress import record_repair
from tests.histories import evaluated, save_checkpoint, start_job


def start(session, *strategies: StrategyConfig, **policy: Any) -> tuple[Job, list[Any]]:
    """A running job with these strategies whose policy allows repairs."""
    job, versions = start_job(session, policy=Policy.model_validate(policy))
    job.spec = job.spec | {"strategies": [each.model_dump(mode="json") for each in strategies]}
    session.flush()
    return job, versions


def test_a_repair_activates_what_is_armed_and_the_trainer_is_told_both(session) -> None:
    job, versions = start(session, EwcConfig(armed=True))
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=80))
    assert (reply.action, reply.repair, reply.finish) == ("repair", True, False)
    assert reply.state.strengths == {"ewc": 100.0}
    assert job.controller_state is not None
    assert job.controller_state["strengths"] == {"ewc": 100.0}
    row = session.scalars(select(DecisionRow)).one()
    assert row.evidence["state"]["strengths"] == {"ewc": 0.0}
    assert row.evidence["look"]["repair_possible"]
    assert replay_decision(row).model_dump(mode="json") == row.decision
    event = session.scalars(select(JobEvent).order_by(JobEvent.seq.desc())).first()
    assert event.data["decision"]["lever"] == "ewc"
    assert event.data["decision"]["before"]["strengths"] == {"ewc": 0.0}
    assert event.data["decision"]["after"]["strengths"] == {"ewc": 100.0}
    assert "ewc activated at 100" in event.message
    told = session.scalars(select(WebhookEvent.type).order_by(WebhookEvent.seq)).all()
    assert told == ["retention.regression_detected", "retention.repaired"]
    job.attempt = 2  # the worker died before it heard: the next attempt is told the same
    session.flush()
    again = record_evaluation(session, job.id, 2, evaluated(versions, lost=80, message_id=9))
    assert again == reply.model_copy(update={"reply_to": 9})
    save_checkpoint(session, job, 60, attempt=2)
    raised = record_evaluation(session, job.id, 2, evaluated(versions, 60, lost=80))
    assert (raised.action, raised.state.strengths) == ("raise_strength", {"ewc": 200.0})
    save_checkpoint(session, job, 90, attempt=2)
    held = record_evaluation(session, job.id, 2, evaluated(versions, 90))
    assert held.action in {"keep", "lower_strength"}
    assert held.state.strengths["ewc"] >= 100.0


def test_lost_format_is_repaired_by_replay_steps_first(session) -> None:
    job, versions = start(session, EwcConfig(strength=1.0))
    save_checkpoint(session, job, 30)
    found = Diagnosis(
        n_items=400, drop=2.0, share=0.9, lower=0.8, upper=1.0, steps=8, rows=128, rate=3.0
    )
    message = evaluated(versions, lost=80, diagnosis=found)
    reply = record_evaluation(session, job.id, 1, message)
    assert (reply.action, reply.repair, reply.replay_rate) == ("repair", True, 3.0)
    assert "Replay steps for good, then" in reply.reason
    row = session.scalars(select(DecisionRow)).one()
    assert row.decision["details"]["diagnosis"]["kind"] == "format"
    assert replay_decision(row).model_dump(mode="json") == row.decision


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"alpha": 0.4}, "Scaled back to 40% of the way from the base."),
        ({"alpha": 1.0}, "No point between base and tuned holds; the weights stay as they were."),
        (
            {"alpha": 1.0, "replay_steps": 8, "holds": True},
            "8 replay steps brought back what was lost.",
        ),
        (
            {"alpha": 0.4, "replay_steps": 8, "holds": True},
            "8 replay steps did not suffice. Scaled back to 40% of the way from the base.",
        ),
        (
            {"alpha": 1.0, "replay_steps": 8, "holds": False},
            "8 replay steps did not suffice. No point between base and tuned holds.",
        ),
    ],
)
def test_what_a_repair_found_is_told(session, found, told) -> None:
    job, _ = start(session, EwcConfig(strength=1.0))
    message = Repaired(id=1, branch=0, step=30, tried={}, **found)
    record_repair(session, job.id, 1, message)
    event = session.scalars(select(JobEvent).order_by(JobEvent.seq.desc())).first()
    assert event.message == f"Step 30: repair. {told}"
    assert event.data["replay_steps"] == found.get("replay_steps", 0)


@pytest.mark.parametrize(
    ("policy", "strengths"),
    [
        # the anchor in force can still be raised: it comes next, and the armed one waits
        ({"lever": "l2sp"}, {"ewc": 0.0, "l2sp": 0.3}),
        # the armed one is the better lever by rank, so it comes next
        ({}, {"ewc": 100.0, "l2sp": 0.3}),
        # at its cap the lever is passed over
        ({"lever": "l2sp", "ladder": {"strength_cap_factor": 1.0}}, {"ewc": 100.0, "l2sp": 0.3}),
    ],
)
def test_what_a_repair_activates_follows_the_order_of_levers(session, policy, strengths) -> None:
    job, versions = start(session, EwcConfig(armed=True), L2SpConfig(strength=0.3), **policy)
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=80))
    assert (reply.action, reply.state.strengths) == ("repair", strengths)


def test_a_dry_run_proposes_the_repair_and_activates_nothing(session) -> None:
    job, versions = start(session, EwcConfig(armed=True), dry_run=True)
    save_checkpoint(session, job, 30)
    reply = record_evaluation(session, job.id, 1, evaluated(versions, lost=80))
    assert (reply.action, reply.repair, reply.state.strengths) == ("keep", False, {"ewc": 0.0})
    row = session.scalars(select(DecisionRow)).one()
    assert (row.action, row.state) == ("repair", "proposed")
    assert row.decision["state"]["strengths"] == {"ewc": 100.0}
