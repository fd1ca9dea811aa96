"""What a running attempt tells: progress, metrics, its plan's choices, repairs and orders carried out."""

import math
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Job
from app.db.repositories.history import HistoryRepository
from app.db.repositories.jobs import JobRepository
from app.domain.messages import (
    DecisionReply,
    Evaluated,
    Order,
    OrderApplied,
    Planned,
    Progress,
    Repaired,
    StepMetrics,
)
from app.services.decisions import RUN
from app.services.engine import Beat, beat, hold
from app.services.events import add_job_event
from app.services.monitoring import record_evaluation, refresh_power

METRIC_EVENTS: Final = 200  # a job and branch, beside evaluations; the result file has every step


def save_progress(
    session: Session, job_id: UUID, attempt: int, message: Progress, *, worker_id: str, ttl: float
) -> Beat:
    """Keeps where the run is, a sample of its metrics as events, and renews the lease.

    Raises:
        Fenced: The attempt no longer holds the job.
    """
    answer = beat(
        session,
        job_id=job_id,
        attempt=attempt,
        worker_id=worker_id,
        ttl=ttl,
        at=(message.branch, message.step),
    )
    job = hold(session, job_id, attempt)
    job.total_steps = message.total_steps
    job.progress = {
        "branch": message.branch,
        "step": message.step,
        "total_steps": message.total_steps,
        "phase": message.phase,
        "finish_at": _finish_at(session, message.seconds_remaining),
        "trained_tokens": message.trained_tokens,
    }
    session.flush()
    for metrics in sample_metrics(message.metrics, message.total_steps):
        _add_metrics(session, job, metrics, message.total_steps)
    return answer


def _finish_at(session: Session, seconds: float | None) -> float | None:
    """When so many seconds will be over, on the database's clock: readers and workers may have others."""
    return None if seconds is None else round(JobRepository(session).read_clock() + seconds, 1)


def sample_metrics(metrics: Sequence[StepMetrics], total_steps: int) -> list[StepMetrics]:
    """The steps that become events: evenly spaced ones, and the last."""
    every = max(math.ceil(total_steps / METRIC_EVENTS), 1)
    return [row for row in metrics if row.step % every == 0 or row.step == total_steps]


def record_point(session: Session, job_id: UUID, attempt: int, message: Evaluated) -> DecisionReply:
    """Records an evaluation point with its metrics and gets its decision; see `record_evaluation`.

    Raises:
        Fenced: The attempt no longer holds the job.
    """
    job = hold(session, job_id, attempt)
    is_new = (
        HistoryRepository(session).find_decision(job_id, message.branch, message.step, RUN) is None
    )
    if is_new and message.branch == job.branch:
        data: dict[str, Any] = {
            "step": message.step,
            "branch": message.branch,
            "total_steps": job.total_steps,
            "train_loss": message.train_loss,
            "valid_loss": message.valid_loss,
            "valid_mean_token_accuracy": message.valid_mean_token_accuracy,
            **message.values,
        }
        losses = ", ".join(
            f"{word} loss={value:.4f}"
            for word, value in (
                ("training", message.train_loss),
                ("validation", message.valid_loss),
            )
            if value is not None
        )
        add_job_event(
            session,
            job,
            level="info",
            type="metrics",
            message=f"Step {message.step}: evaluated" + (f", {losses}" if losses else ""),
            data=data,
        )
    return record_evaluation(session, job_id, attempt, message)


def store_plan(session: Session, job_id: UUID, attempt: int, message: Planned) -> None:
    """Keeps the evaluation budget's choice in the run plan; a choice made earlier stays."""
    job = hold(session, job_id, attempt)
    plan = dict(job.run_plan or {})
    if plan.get("eval_interval") is not None and plan.get("gate_items") is not None:
        return
    job.run_plan = plan | {"eval_interval": message.eval_interval, "gate_items": message.gate_items}
    session.flush()
    add_job_event(
        session,
        job,
        level="info",
        message=f"Evaluating every {message.eval_interval} steps on at most"
        f" {message.gate_items} items a benchmark.",
        data={"code": "evaluations_planned"} | message.model_dump(exclude={"type", "id"}),
    )
    refresh_power(session, job)


def record_repair(session: Session, job_id: UUID, attempt: int, message: Repaired) -> None:
    """Tells what a repair found."""
    text = f"Scaled back to {message.alpha:.0%} of the way from the base."
    if message.alpha == 1 and message.holds:
        text = f"{message.replay_steps} replay steps brought back what was lost."
    elif message.alpha == 1:
        text = "No point between base and tuned holds; the weights stay as they were."
    if message.replay_steps and not (message.alpha == 1 and message.holds):
        text = f"{message.replay_steps} replay steps did not suffice. {text.partition(';')[0].rstrip('.')}."
    add_job_event(
        session,
        hold(session, job_id, attempt),
        level="info",
        message=f"Step {message.step}: repair. {text}",
        data={"code": "repaired"} | message.model_dump(exclude={"type", "id"}),
    )


def record_order_applied(
    session: Session, job_id: UUID, attempt: int, message: OrderApplied
) -> None:
    """Keeps the step at which an outside order took effect; the first report stays."""
    job = hold(session, job_id, attempt)
    order = JobRepository(session).find_order(job_id, message.version)
    if order is None or order.effective_step is not None:
        return
    order.effective_step = message.step
    order.order = order.order | {"effective_step": message.step}
    session.flush()
    add_job_event(
        session,
        job,
        level="info",
        message=f"The order of version {message.version} took effect before step {message.step}.",
        data={"code": "order_applied", "version": message.version, "step": message.step},
    )


def list_new_orders(session: Session, job_id: UUID, branch: int, *, after: int) -> list[Order]:
    """Orders from outside that the trainer has not been sent."""
    rows = JobRepository(session).list_orders(job_id, branch, after=after)
    return [
        Order.model_validate(row.order | {"effective_step": row.effective_step}) for row in rows
    ]


def _add_metrics(session: Session, job: Job, metrics: StepMetrics, total_steps: int) -> None:
    loss = "not finite" if metrics.train_loss is None else f"{metrics.train_loss:.4f}"
    add_job_event(
        session,
        job,
        level="info",
        type="metrics",
        message=f"Step {metrics.step}/{total_steps}: training loss={loss}",
        data={
            "step": metrics.step,
            "branch": metrics.branch,
            "total_steps": total_steps,
            "train_loss": metrics.train_loss,
            "train_mean_token_accuracy": metrics.train_mean_token_accuracy,
            "learning_rate": metrics.learning_rate,
            "values": metrics.values,
        },
    )
