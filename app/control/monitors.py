"""The monitor scheduler: evaluations that are due, and monitors that hear nothing; two at once do no harm."""

import threading

import structlog

from app.db.session import SessionFactory, transaction
from app.services.monitors import start_due_evaluations, tell_silent
from app.settings import Settings

SWEEP_SECONDS = 5.0

log = structlog.get_logger()


def run(factory: SessionFactory, _settings: Settings, stop: threading.Event) -> None:
    """Sweeps until `stop` is set."""
    while not stop.is_set():
        sweep(factory)
        stop.wait(SWEEP_SECONDS)


def sweep(factory: SessionFactory) -> None:
    """Queues what is due, and tells of silence; each in its own transaction."""
    with transaction(factory) as session:
        jobs = start_due_evaluations(session)
    with transaction(factory) as session:
        silent = tell_silent(session)
    if jobs or silent:
        log.info("monitors.swept", evaluations=len(jobs), silent=silent)
