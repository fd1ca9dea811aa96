"""Quotas of a project: jobs that wait, jobs that run, bytes that are stored."""

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.repositories.queue import QueueRepository, Quotas
from app.errors import QuotaExceeded
from app.settings import Settings

#: So near to the end requests that come at once are let in one after the other, and the quota is exact.
NEAR: Final = 64
REMEDY: Final = "or have the operator raise it (`retain projects set NAME"


class QueueFull(QuotaExceeded):
    """As many jobs of the project wait as may."""

    code = "queue_full"


class StorageFull(QuotaExceeded):
    """What the project stores has reached its quota."""

    code = "storage_full"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a project uses of its quotas."""

    quotas: Quotas
    queued_jobs: int
    running_jobs: int
    storage_bytes: int


def standard_quotas(settings: Settings) -> Quotas:
    """What a project may use that has no quotas of its own."""
    return Quotas(settings.max_queued_jobs, settings.max_running_jobs, settings.max_storage_bytes)


def check_queue(session: Session, project_id: UUID, max_queued: int) -> None:
    """Refuses one more job where too many wait.

    Args:
        session: The caller's transaction, which goes on to add the job.
        project_id: Whose it is.
        max_queued: Jobs that may wait, of a project without a quota of its own.

    Raises:
        QueueFull: Too many jobs of the project wait.
    """
    repository, standard = QueueRepository(session), Quotas(max_queued, None, None)
    quotas = repository.get_quotas(project_id, standard)
    waiting = repository.count_waiting(project_id)
    if waiting + NEAR >= quotas.queued_jobs:
        repository.get_quotas(project_id, standard, lock=True)
        waiting = repository.count_waiting(project_id)
    if waiting >= quotas.queued_jobs:
        running = repository.count_running(project_id)
        raise QueueFull(
            f"Quota max_queued_jobs: the project has {waiting} of {quotas.queued_jobs} waiting jobs"
            f" ({running} are running). Wait for some to start, cancel some, {REMEDY}"
            " --max-queued-jobs N`)."
        )


def check_storage(
    session: Session, project_id: UUID, standard: Quotas, *, added_bytes: int
) -> None:
    """Refuses bytes over the storage quota; where there is one, its project's requests wait for each other.

    Args:
        session: The caller's transaction, which goes on to add them.
        project_id: Whose they are.
        standard: Quotas of a project that has none of its own.
        added_bytes: At least so many will be added; 0 for none yet, which is refused when the quota is reached.

    Raises:
        StorageFull: They would be over it.
    """
    repository = QueueRepository(session)
    if repository.get_quotas(project_id, standard).storage_bytes is None:
        return
    limit = repository.get_quotas(project_id, standard, lock=True).storage_bytes
    if limit is not None:
        _check_bytes(repository.sum_storage(project_id), added_bytes, limit)


def may_run(session: Session, project_id: UUID, max_running: int | None) -> bool:
    """Whether a project's running jobs, those of this transaction included, are within its quota."""
    repository = QueueRepository(session)
    standard = Quotas(0, max_running, None)
    if repository.get_quotas(project_id, standard).running_jobs is None:
        return True
    limit = repository.get_quotas(project_id, standard, lock=True).running_jobs
    return limit is None or repository.count_running(project_id) <= limit


def show_usage(session: Session, project_id: UUID, standard: Quotas) -> Usage:
    """Quotas beside what is used of them."""
    repository = QueueRepository(session)
    return Usage(
        quotas=repository.get_quotas(project_id, standard),
        queued_jobs=repository.count_waiting(project_id),
        running_jobs=repository.count_running(project_id),
        storage_bytes=repository.sum_storage(project_id),
    )


def _check_bytes(stored: int, added: int, limit: int) -> None:
    if stored + max(added, 1) > limit:
        raise StorageFull(
            f"Quota max_storage_bytes: the project stores {stored:,} of {limit:,} bytes, and this adds"
            f" {f'{added:,}' if added else 'more'}. Delete files or model versions, {REMEDY} --max-storage-bytes N`)."
        )
