"""What a decision from outside a run's own evaluations tells its trainer, numbered so that it can be confirmed."""

from sqlalchemy.orm import Session

from app.db.models import DecisionRow, Job, JobOrder
from app.db.repositories.history import HistoryRepository
from app.domain.decisions import Action, ControllerState, Decision
from app.domain.external import Instruction, instructions, point_id, target_step
from app.domain.messages import Order, RollBack
from app.domain.states import JobKind
from app.services.decisions import in_force, roll_back_of


def told_by(row: DecisionRow) -> tuple[Instruction, ...]:
    """What a recorded decision tells an external run's trainer."""
    return instructions(ControllerState.model_validate(row.evidence["state"]), in_force(row))


def give_order(session: Session, job: Job, row: DecisionRow) -> None:
    """Keeps a decision as the job's next order; it takes effect before the trainer's next step.

    Args:
        session: The caller's transaction, which holds the job's row lock.
        job: The job, already moved by a rollback.
        row: Its newest decision.
    """
    decision = in_force(row)
    job.order_version += 1
    order = Order(
        version=job.order_version,
        branch=row.branch,
        state=decision.state,
        roll_back=_roll_back(session, job, decision),
        stop=decision.action is Action.STOP,
        reason=decision.reason,
    )
    row.reply = order.model_dump(mode="json")
    session.add(JobOrder(job_id=job.id, version=order.version, branch=row.branch, order=row.reply))
    session.flush()


def _roll_back(session: Session, job: Job, decision: Decision) -> RollBack | None:
    if decision.action is not Action.ROLL_BACK:
        return None
    if job.kind is not JobKind.EXTERNAL:
        return roll_back_of(HistoryRepository(session), job)
    step = target_step(decision)
    return RollBack(
        checkpoint_id=decision.target_checkpoint_id or point_id(0, step),
        checkpoint_directory="",  # its trainer knows where
        step=step,
        branch=decision.state.branch,
    )
