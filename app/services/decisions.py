"""Carrying a decision out in the database: row, coefficients, rollback, event and webhooks."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Checkpoint, DecisionRow, Job
from app.db.repositories.history import HistoryRepository
from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Decision,
    LeverState,
    Look,
    Reading,
    StageFact,
    Verdict,
)
from app.domain.external import RunSpec, run_levers, run_state, target_step
from app.domain.identifiers import public_id
from app.domain.levers import build_levers, initial_state
from app.domain.messages import PublishTarget, RollBack
from app.domain.policy import Policy
from app.domain.proposals import carried_out
from app.domain.publishing import choose_checkpoint
from app.domain.replay import RULES
from app.domain.spec import JobSpec
from app.domain.staging import stage_facts, stage_strategies, trained_stage
from app.domain.states import JobKind
from app.domain.stopping import EARLY_STOPPING
from app.services.events import add_job_event
from app.services.webhooks import emit_event

START = "start"  # the checkpoint id of step 0 where none was saved: the base as the job got it
RUN = "run"  # origin of decisions on the trainer's own evaluations
OVERRIDE, ACCEPT = "override:", "accept:"  # begin the origins of what people ordered
BY_PEOPLE = (OVERRIDE, ACCEPT)
WEBHOOKS = {
    Action.RAISE_STRENGTH: "retention.strength_raised",
    Action.LOWER_STRENGTH: "retention.strength_lowered",
    Action.LOWER_LEARNING_RATE: "retention.learning_rate_lowered",
    Action.REPAIR: "retention.repaired",
    Action.ROLL_BACK: "retention.rolled_back",
    Action.STOP: "retention.stopped",
}
CALM = frozenset({Action.KEEP, Action.LOWER_STRENGTH})


def apply_decision(
    session: Session, job: Job, policy: Policy, look: Look, *, origin: str
) -> DecisionRow:
    """Decides on a look and writes all that follows from it: row, coefficients, rollback, event and webhooks.

    Args:
        session: The caller's transaction, which holds the job's row lock.
        job: The job.
        policy: Its policy.
        look: The evidence.
        origin: `run`, or `external:<evaluation id>`.
    """
    levers, before, look = controls_of(job, policy, look)
    return write_decision(
        session,
        job,
        decide(policy, levers, before, look),
        origin=origin,
        evidence=build_evidence(policy, levers, before, look),
    )


def controls_of(
    job: Job, policy: Policy, look: Look
) -> tuple[tuple[LeverState, ...], ControllerState, Look]:
    """What can be turned at this point, the coefficients in force, and the look with the job's stages."""
    if job.kind is JobKind.EXTERNAL:
        asked = RunSpec.model_validate(job.spec).request.levers
        levers, start = run_levers(asked, policy), run_state(asked)
    else:
        spec = JobSpec.model_validate(job.spec)
        look = look.model_copy(update={"stages": _stages(spec)})
        levers, start = _controls(spec, policy, look)
    if job.controller_state is None:
        return levers, start, look
    return levers, ControllerState.model_validate(job.controller_state), look


def build_evidence(
    policy: Policy, levers: Sequence[LeverState], before: ControllerState, look: Look
) -> dict[str, Any]:
    """All that a decision rests on, as it is recorded and replayed."""
    return {
        "policy": policy.model_dump(mode="json"),
        "levers": [lever.model_dump(mode="json") for lever in levers],
        "state": before.model_dump(mode="json"),
        "look": look.model_dump(mode="json"),
        "rules": RULES,
    }


def write_decision(
    session: Session,
    job: Job,
    decision: Decision,
    *,
    origin: str,
    evidence: dict[str, Any],
) -> DecisionRow:
    """Writes a decision and all that follows from it: coefficients, rollback, event and webhooks."""
    look = Look.model_validate(evidence["look"])
    row = DecisionRow(
        project_id=job.project_id,
        job_id=job.id,
        branch=look.branch,
        step=look.step,
        origin=origin,
        look=look.reading.look,
        action=decision.action.value,
        code=decision.code,
        reason=decision.reason,
        state="proposed" if decision.is_proposal else "applied",
        evidence=evidence,
        decision=decision.model_dump(mode="json"),
        reply={},
    )
    done = in_force(row)
    job.controller_state = done.state.model_dump(mode="json")
    if done.action is Action.ROLL_BACK:
        row.target_checkpoint_id = _rewind(session, job, done)
    session.add(row)
    session.flush()
    _tell(session, job, row, look.reading, decision)
    return row


def in_force(row: DecisionRow) -> Decision:
    """What is carried out: the decision, but of a mere proposal nothing."""
    return carried_out(
        Policy.model_validate(row.evidence["policy"]),
        Decision.model_validate(row.decision),
        ControllerState.model_validate(row.evidence["state"]),
        Look.model_validate(row.evidence["look"]),
    )


def list_facts(history: HistoryRepository, job: Job) -> tuple[CheckpointFact, ...]:
    """The valid checkpoints as `decide` sees them: evaluated ones, and the start always."""
    facts = [
        CheckpointFact(
            checkpoint_id=str(found.id),
            branch=found.branch,
            step=found.step,
            status=found.status.value,
            valid_loss=found.valid_loss,
        )
        for found in history.list_valid_checkpoints(job.id)
        if found.is_evaluated or found.step == 0
    ]
    if not any(fact.step == 0 for fact in facts):
        start = CheckpointFact(
            checkpoint_id=START, branch=0, step=0, status="good", valid_loss=None
        )
        facts.insert(0, start)
    return tuple(facts)


def roll_back_of(history: HistoryRepository, job: Job) -> RollBack:
    """The rollback to where the job stands now; the directory is the path under the storage root."""
    found = next((c for c in history.list_valid_checkpoints(job.id) if c.id == job.ckpt_id), None)
    return RollBack(
        checkpoint_id=START if found is None else str(found.id),
        checkpoint_directory="" if found is None else found.path,
        step=job.step,
        branch=job.branch,
    )


def find_publish_target(
    history: HistoryRepository, job: Job, policy: Policy | None
) -> PublishTarget | None:
    """The checkpoint to publish; None when the policy allows none. The directory is the path under the storage root."""
    chosen = choose_checkpoint(list_facts(history, job), policy)
    if chosen is None:
        return None
    found = next(
        c for c in history.list_valid_checkpoints(job.id) if str(c.id) == chosen.checkpoint_id
    )
    return PublishTarget(
        checkpoint_id=chosen.checkpoint_id,
        checkpoint_directory=found.path,
        branch=chosen.branch,
        step=chosen.step,
        status="good" if chosen.status == "good" else "unproven",
    )


def _stages(spec: JobSpec) -> tuple[StageFact, ...]:
    return stage_facts(spec.stages, spec.strategies, lora=spec.training.type == "lora")


def _controls(
    spec: JobSpec, policy: Policy, look: Look
) -> tuple[tuple[LeverState, ...], ControllerState]:
    """The levers of the stage being trained, and the coefficients at which it starts."""
    is_lora = spec.training.type == "lora"
    strategies = spec.strategies
    if spec.stages:
        stage = spec.stages[trained_stage(look.stages, look.step)]
        strategies = stage_strategies(strategies, stage.strengths)
    levers = build_levers(strategies, policy, lora=is_lora)
    return levers, initial_state(strategies, lora=is_lora)


def _rewind(session: Session, job: Job, decision: Decision) -> UUID | None:
    """Moves the job to a rollback's target on a new branch; the checkpoints after it are superseded."""
    if job.kind is JobKind.EXTERNAL:  # its checkpoints are its trainer's own
        job.branch, job.step = decision.state.branch, target_step(decision)
        return None
    target_id = decision.target_checkpoint_id
    target = None
    if target_id is not None and target_id != START:
        target = session.get_one(Checkpoint, UUID(target_id))
    job.branch = decision.state.branch
    job.step = 0 if target is None else target.step
    job.ckpt_id = None if target is None else target.id
    HistoryRepository(session).supersede_after(job.id, job.step)
    return job.ckpt_id


def _tell(
    session: Session, job: Job, row: DecisionRow, reading: Reading, decision: Decision
) -> None:
    """The job event of a decision, and webhooks for what the project's platforms act on."""
    data: dict[str, Any] = {
        "code": "decision",
        "decision": {
            "id": public_id("decision", row.id),
            "branch": row.branch,
            "step": row.step,
            "look": row.look,
            "origin": row.origin,
            "verdict": reading.verdict.value,
            "drop": reading.drop,
            "lower": reading.lower,
            "upper": reading.upper,
            "max_drop": reading.limit,
            "action": row.action,
            "state": row.state,
            "code": row.code,
            "reason": row.reason,
            "lever": decision.lever,
            "before": row.evidence["state"],
            "after": decision.state.model_dump(mode="json"),
            "alternatives": list(decision.alternatives),
            "diagnosis": decision.details.get("diagnosis"),
        },
    }
    proposed = "proposed " if decision.is_proposal else ""
    calm = decision.action in CALM or decision.code == EARLY_STOPPING
    add_job_event(
        session,
        job,
        level="info" if calm else "warn",
        message=f"Step {row.step}: {proposed}{row.action}. {row.reason}",
        data=data,
    )
    is_ordered = row.origin.startswith(BY_PEOPLE)
    is_found = reading.verdict is Verdict.REGRESS and not is_ordered
    types = ["retention.regression_detected"] if is_found else []
    types += ["retention.overridden"] if row.origin.startswith(OVERRIDE) else []
    if decision.is_proposal:
        types.append("retention.proposed")
    elif decision.action in WEBHOOKS:
        types.append(WEBHOOKS[decision.action])
    for kind in types:
        about = {"decision": data["decision"]}
        emit_event(session, project_id=job.project_id, type=kind, data=about, job=job)
