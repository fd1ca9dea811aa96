"""What people order against decisions, and proposals they accept: decisions of their own, with who and why."""

from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import DecisionRow, Job
from app.db.repositories.external_runs import ExternalRunRepository
from app.db.repositories.history import HistoryRepository
from app.db.repositories.project_jobs import ProjectJobRepository
from app.domain.controller import decide
from app.domain.decisions import Action, CheckpointFact, ControllerState, Look
from app.domain.identifiers import PREFIXES, parse_id, public_id
from app.domain.overrides import Accept, Override, OverrideEvidence, RollBackOverride, override
from app.domain.policy import Policy
from app.domain.replay import RULES
from app.domain.scopes import Caller
from app.domain.states import JobKind, JobState
from app.errors import Conflict, NotFound
from app.services.decisions import (
    ACCEPT,
    OVERRIDE,
    build_evidence,
    controls_of,
    list_facts,
    write_decision,
)
from app.services.external_scores import run_facts
from app.services.orders import give_order


def get_decision(session: Session, project_id: UUID, decision_id: UUID) -> tuple[DecisionRow, Job]:
    """A decision of the project with its job, whatever kind that is.

    Raises:
        NotFound: The project has no such decision.
    """
    row = ExternalRunRepository(session).find_decision(project_id, decision_id)
    if row is None:
        raise NotFound("No decision has this id.", "decision_id")
    return row, session.get_one(Job, row.job_id)


def override_decision(
    session: Session,
    caller: Caller,
    job_id: UUID,
    decision_id: UUID,
    asked: Override,
    *,
    kind: JobKind,
) -> DecisionRow:
    """Orders something else than was decided; it takes effect before the trainer's next step.

    The order is a decision of its own, with the decision it was given on, who gave it and why; that decision
    stays as it was recorded.

    Raises:
        NotFound: The project has no such job, or the job no such decision.
        Conflict: The job isn't running, or the order can't be carried out any more.
        BadRequest: What is to be turned can't be.
    """
    job, row = _lock(session, caller.project_id, job_id, decision_id, kind)
    policy = Policy.model_validate(row.evidence["policy"])
    levers, before, look = controls_of(job, policy, _look_now(session, job, row))
    evidence = OverrideEvidence(
        asked=_internal(asked),
        reason=asked.reason,
        by=caller.key_id,
        decision_id=public_id("decision", row.id),
        before=row.evidence["state"],
        # A proposal that nobody accepted changed nothing.
        after=row.evidence["state"] if row.state == "proposed" else row.decision["state"],
        action=Action.KEEP.value if row.state == "proposed" else row.action,
    )
    ordered = write_decision(
        session,
        job,
        override(policy, levers, before, look, evidence),
        origin=_origin(OVERRIDE, caller, job),
        evidence=build_evidence(policy, levers, before, look)
        | {"override": evidence.model_dump(mode="json")},
    )
    if row.state == "applied":
        row.state = "overridden"
    give_order(session, job, ordered)
    return ordered


def accept_proposal(
    session: Session,
    caller: Caller,
    job_id: UUID,
    decision_id: UUID,
    body: Accept,
    *,
    kind: JobKind,
) -> DecisionRow:
    """Has a proposal carried out, as the decision that it would have been.

    Raises:
        NotFound: The project has no such job, or the job no such decision.
        Conflict: It is no open proposal, the job isn't running, or what it rested on has changed.
    """
    job, row = _lock(session, caller.project_id, job_id, decision_id, kind)
    if row.state != "proposed":
        raise Conflict(
            f"The decision is {row.state}, no open proposal.", "decision_id", "not_proposed"
        )
    evidence: dict[str, Any] = row.evidence | {
        "rules": RULES,
        "policy": row.evidence["policy"] | {"dry_run": False},
        "accepted": {
            "by": caller.key_id,
            "reason": body.reason,
            "decision_id": public_id("decision", row.id),
        },
    }
    policy = Policy.model_validate(evidence["policy"])
    look = Look.model_validate(evidence["look"])
    levers, now, _ = controls_of(job, policy, look)
    before = ControllerState.model_validate(evidence["state"])
    _check_unchanged(job, look, before, now)
    decision = decide(policy, levers, before, look)
    if decision.action is Action.REPAIR:
        raise Conflict(
            "A repair is searched at its evaluation alone.", "decision_id", "not_applicable"
        )
    target = decision.target_checkpoint_id
    if target is not None and target not in {f.checkpoint_id for f in _facts(session, job)}:
        raise Conflict(
            "The saved state that it goes back to is no longer valid.",
            "decision_id",
            "not_applicable",
        )
    carried = write_decision(
        session, job, decision, origin=_origin(ACCEPT, caller, job), evidence=evidence
    )
    row.state = "accepted"
    give_order(session, job, carried)
    return carried


def _lock(
    session: Session, project_id: UUID, job_id: UUID, decision_id: UUID, kind: JobKind
) -> tuple[Job, DecisionRow]:
    """The running job, its row locked, and its decision."""
    job = (
        ExternalRunRepository(session).get(project_id, job_id, for_update=True)
        if kind is JobKind.EXTERNAL
        else ProjectJobRepository(session).get(project_id, job_id, for_update=True)
    )
    row = session.get(DecisionRow, decision_id)
    if row is None or row.job_id != job.id:
        raise NotFound("The job has no decision with this id.", "decision_id")
    session.refresh(row)
    if job.state is not JobState.RUNNING:
        raise Conflict(
            f"The job is {job.state.value}; only what runs takes orders.", "status", "not_running"
        )
    return job, row


def _check_unchanged(job: Job, look: Look, before: ControllerState, now: ControllerState) -> None:
    """Refuses a proposal once the branch or a coefficient is another than the one it was made for."""
    if look.branch != job.branch:
        raise Conflict(
            "The job was rolled back since the proposal.", "decision_id", "not_applicable"
        )
    if (before.strengths, before.learning_rate_scale) != (now.strengths, now.learning_rate_scale):
        raise Conflict(
            "A coefficient has been changed since the proposal.", "decision_id", "not_applicable"
        )


def _look_now(session: Session, job: Job, row: DecisionRow) -> Look:
    """The decision's evidence, placed where the job is now and with what it can go back to now."""
    look = Look.model_validate(row.evidence["look"])
    return look.model_copy(
        update={
            "branch": job.branch,
            "step": _step_now(job),
            "is_last": False,
            "checkpoints": _facts(session, job),
        }
    )


def _step_now(job: Job) -> int:
    """The row's own step moves at checkpoints; what its trainer last told may be further."""
    told = job.progress or {}
    if told.get("branch") == job.branch and isinstance(told.get("step"), int):
        return max(job.step, int(told["step"]))
    return job.step


def _facts(session: Session, job: Job) -> tuple[CheckpointFact, ...]:
    if job.kind is JobKind.EXTERNAL:
        return run_facts(session, job)
    return list_facts(HistoryRepository(session), job)


def _internal(asked: Override) -> Override:
    """The order with a checkpoint's public id as evidence names it."""
    if not isinstance(asked, RollBackOverride) or asked.checkpoint is None:
        return asked
    if not asked.checkpoint.startswith(PREFIXES["checkpoint"]):
        return asked  # `start`, or an external run's own name
    key = parse_id("checkpoint", asked.checkpoint, param="checkpoint")
    return asked.model_copy(update={"checkpoint": str(key)})


def _origin(prefix: str, caller: Caller, job: Job) -> str:
    return f"{prefix}{caller.key_id}:{job.order_version + 1}"
