"""The reconciler: mends what crashes, lost bells and dead workers left; harmless when two run at once."""

import threading
import time

import structlog

from app.db.repositories.checkpoints import CheckpointRepository
from app.db.session import SessionFactory, transaction
from app.services.checkpoints import attempt_path
from app.services.engine import CrashRules
from app.services.files import sweep_expired
from app.services.reaping import clear_rows, reap, ring_again, sweep_validating
from app.services.storage import Storage
from app.services.uploads import sweep_uploads
from app.settings import Settings

CLEAR_SECONDS = 600.0
KEPT_DAYS = 7  # jobs that ended longer ago are not looked at again

log = structlog.get_logger()


def run(factory: SessionFactory, settings: Settings, stop: threading.Event) -> None:
    """Sweeps every `reap_seconds` until `stop` is set."""
    cleared_at = 0.0
    while not stop.is_set():
        sweep(factory, settings)
        if time.monotonic() - cleared_at > CLEAR_SECONDS or cleared_at == 0.0:
            clear(factory, settings)
            cleared_at = time.monotonic()
        stop.wait(settings.reap_seconds)


def sweep(factory: SessionFactory, settings: Settings) -> None:
    """Leases, unanswered bells and jobs whose files are checked; each in its own transaction."""
    rules = CrashRules(settings.max_crashes, settings.lease_ttl_seconds)
    with transaction(factory) as session:
        found = reap(session, rules=rules)
    for job_id, attempt, state in found.reaped:
        log.warning("reconciler.reaped", job=str(job_id), attempt=attempt, state=state.value)
    if found.held_back:
        log.error("reconciler.many_leases_expired", held_back=found.held_back)
    with transaction(factory) as session:
        moved = sweep_validating(session)
    with transaction(factory) as session:
        rung = ring_again(session)
    if moved or rung:
        log.info("reconciler.moved_on", validated=moved, rung_again=rung)


def clear(factory: SessionFactory, settings: Settings) -> None:
    """Removes old rows, expired files, parts of uploads, and checkpoint directories that no row names."""
    with transaction(factory) as session:
        rows = clear_rows(session)
    storage = Storage(settings.storage_root)
    found = {
        "expired_files": sweep_expired(factory, storage),
        "uploads": sweep_uploads(factory, storage),
        "orphan_checkpoints": len(clear_orphans(factory, storage)),
    }
    if any(rows) or any(found.values()):
        log.info("reconciler.cleared", **rows._asdict(), **found)


def clear_orphans(factory: SessionFactory, storage: Storage) -> list[str]:
    """Deletes stored checkpoints that no row names: of attempts that were fenced before they could register.

    Only attempts before a job's present one are looked at. They can register nothing any more, so that nothing
    is taken from under anybody, and their rows were there before the present attempt began.
    """
    with transaction(factory) as session:
        repository = CheckpointRepository(session)
        jobs = repository.list_retried_jobs(days=KEPT_DAYS)
        known = repository.list_paths([job_id for job_id, _ in jobs])
    deleted = []
    for job_id, attempt in jobs:
        for number in range(1, attempt):
            root = attempt_path(job_id, number)
            for branch in storage.list_names(root):
                for name in storage.list_names(f"{root}/{branch}"):
                    path = f"{root}/{branch}/{name}"
                    if path not in known:
                        storage.delete(path)
                        deleted.append(path)
    return deleted
