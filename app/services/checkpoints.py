"""Checkpoints: registered under the fence, chosen to resume from, and thinned out."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import func
from sqlalchemy.orm import Session

from app.db.models import Checkpoint, Job
from app.db.repositories.checkpoints import CheckpointRepository
from app.db.repositories.history import HistoryRepository
from app.domain.messages import CheckpointSaved
from app.domain.publishing import choose_checkpoint
from app.domain.states import CheckpointStatus
from app.errors import Fenced, TrainingFailed
from app.services.decisions import list_facts
from app.services.engine import hold
from app.services.events import add_job_event

KEEP_LAST = 3


class NoValidCheckpoint(TrainingFailed):
    """Everything that was saved is damaged; starting over in silence would hide it."""

    code = "no_valid_checkpoint"


def attempt_path(job_id: UUID, attempt: int) -> str:
    """Where an attempt's checkpoints lie under the storage root."""
    return f"jobs/{job_id.hex}/checkpoints/a{attempt}"


def checkpoint_path(job_id: UUID, attempt: int, branch: int, step: int) -> str:
    """Where one checkpoint lies under the storage root."""
    return f"{attempt_path(job_id, attempt)}/b{branch}/step-{step}"


def register_checkpoint(
    session: Session, job_id: UUID, attempt: int, message: CheckpointSaved, path: str
) -> Checkpoint:
    """Makes an uploaded checkpoint count: its row is the commit point, and what a next attempt resumes from.

    One of a branch that was left meanwhile by a rollback from outside is kept as superseded. A new point beyond
    the last resets the count of crashes.

    Args:
        session: The caller's transaction.
        job_id: The job.
        attempt: That saved it.
        message: The trainer's.
        path: Under the storage root.

    Raises:
        Fenced: The attempt no longer holds the job, or the branch is unknown.
    """
    job = hold(session, job_id, attempt)
    if message.branch > job.branch:
        raise Fenced(f"branch {message.branch} is not the job's branch {job.branch}")
    is_current = message.branch == job.branch
    repository = CheckpointRepository(session)
    is_new = repository.add(
        Checkpoint(
            id=uuid4(),
            job_id=job_id,
            attempt=attempt,
            branch=message.branch,
            step=message.step,
            status=CheckpointStatus.UNPROVEN,
            is_evaluated=False,
            superseded=not is_current,
            corrupt=False,
            path=path,
            manifest_sha256=message.manifest_sha256,
            size_bytes=message.size_bytes,
            valid_loss=None,
            metrics=message.metrics,
        )
    )
    found = repository.find_at(job_id, attempt, message.branch, message.step)
    assert found is not None
    if is_new and is_current:
        before = None if job.ckpt_id is None else session.get_one(Checkpoint, job.ckpt_id)
        known = (0, 0) if before is None else (before.branch, before.step)
        if (message.branch, message.step) > known:
            job.crashes_without_progress = 0
        job.ckpt_id = found.id
        job.step = message.step
        session.flush()
    return found


def choose_resume(session: Session, job: Job) -> Checkpoint | None:
    """What a fenced job resumes from: `ckpt_id`, else the nearest valid one before it; None at the very start.

    Raises:
        NoValidCheckpoint: The job saved checkpoints, and none of them is left.
    """
    repository = CheckpointRepository(session)
    chosen = None if job.ckpt_id is None else session.get_one(Checkpoint, job.ckpt_id)
    if chosen is not None and not chosen.corrupt and chosen.deleted_at is None:
        return chosen
    if chosen is None:
        if job.branch == 0 and repository.has_any(job.id):
            raise NoValidCheckpoint("The job's checkpoints exist, but none is marked to resume.")
        return None
    for candidate in repository.list_usable(job.id):
        if (candidate.branch, candidate.step) <= (chosen.branch, chosen.step):
            job.ckpt_id = candidate.id
            job.step = candidate.step
            session.flush()
            return candidate
    raise NoValidCheckpoint("Every checkpoint of the job is damaged; none can be resumed from.")


def mark_corrupt(session: Session, job_id: UUID, attempt: int, checkpoint_id: UUID) -> None:
    """Writes down that a checkpoint's files are not what was saved: never resumed, never published."""
    job = hold(session, job_id, attempt)
    checkpoint = session.get_one(Checkpoint, checkpoint_id)
    if checkpoint.job_id != job_id or checkpoint.corrupt:
        return
    checkpoint.corrupt = True
    session.flush()
    add_job_event(
        session,
        job,
        level="warn",
        message=f"The checkpoint of step {checkpoint.step} is damaged; the one before it is used.",
        data={"code": "checkpoint_damaged", "branch": checkpoint.branch, "step": checkpoint.step},
    )


def expire_checkpoints(session: Session, job_id: UUID, attempt: int) -> list[str]:
    """Decides which checkpoints are kept; the paths of the others, whose files are to be removed.

    Kept are the last three, the start, what is resumed from, the last good one, the best of each class and
    what was rolled back to or published.
    """
    job = hold(session, job_id, attempt)
    repository = CheckpointRepository(session)
    keep = _worth_keeping(session, job, HistoryRepository(session).list_valid_checkpoints(job_id))
    keep |= repository.list_pinned(job_id)
    dropped = [found for found in repository.list_kept(job_id) if found.id not in keep]
    for checkpoint in dropped:
        checkpoint.deleted_at = _now()
    session.flush()
    return [checkpoint.path for checkpoint in dropped]


def _worth_keeping(session: Session, job: Job, valid: Sequence[Checkpoint]) -> set[UUID]:
    keep = {found.id for found in valid if found.step == 0}
    newest = sorted(valid, key=lambda found: (found.branch, found.step))
    keep |= {found.id for found in newest[-KEEP_LAST:]}
    if job.ckpt_id is not None:
        keep.add(job.ckpt_id)
    facts = list_facts(HistoryRepository(session), job)
    for status in ("good", "unproven"):
        of_class = [fact for fact in facts if fact.status == status and fact.step > 0]
        best = choose_checkpoint(of_class, None)
        chosen = {fact.checkpoint_id for fact in (best, *of_class[-1:]) if fact is not None}
        keep |= {UUID(checkpoint_id) for checkpoint_id in chosen}
    return keep


def _now() -> Any:  # noqa: ANN401 - an SQL expression
    return func.clock_timestamp()
