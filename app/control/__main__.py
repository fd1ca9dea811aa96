"""`python -m app.control`: runs the plain loops until SIGTERM or SIGINT."""

import signal
import sys
import threading
from collections.abc import Callable

import structlog

from app.control import monitors, outbox, reconciler, webhook_sender
from app.db.session import SessionFactory, build_engine, build_session_factory
from app.errors import Unavailable
from app.services.logs import configure_logging
from app.settings import Settings, load_settings

Loop = Callable[[SessionFactory, Settings, threading.Event], None]

LOOPS: dict[str, Loop] = {
    "reconciler": reconciler.run,
    "outbox": outbox.run,
    "monitors": monitors.run,
    "webhook_sender": webhook_sender.run,
}
FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0
STOP_SECONDS = 8.0

log = structlog.get_logger()


def main() -> int:
    """Runs every loop in its own thread; 0 when they all stopped when asked to."""
    settings = load_settings()
    configure_logging(settings)
    if settings.database_url is None:
        raise Unavailable(
            "RETAIN_DATABASE_URL is not set; `retain up` starts a database by itself."
        )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    engine = build_engine(settings.database_url, application="retain-control")
    factory = build_session_factory(engine)
    threads = [
        threading.Thread(
            target=keep_running, args=(name, loop, factory, settings, stop), name=name, daemon=True
        )
        for name, loop in LOOPS.items()
    ]
    for thread in threads:
        thread.start()
    stop.wait()
    for thread in threads:
        thread.join(STOP_SECONDS)
    engine.dispose()
    late = [thread.name for thread in threads if thread.is_alive()]
    if late:
        log.warning("control.stopped_late", loops=late)
    return int(bool(late))


def keep_running(
    name: str, loop: Loop, factory: SessionFactory, settings: Settings, stop: threading.Event
) -> None:
    """Runs a loop, and again after a pause when it breaks: one broken loop must not still the others."""
    backoff = FIRST_BACKOFF_SECONDS
    while not stop.is_set():
        try:
            loop(factory, settings, stop)
        except Exception:  # the top of a thread: logged whole, then tried again
            log.exception("control.loop_broke", loop=name, retry_in_seconds=backoff)
            stop.wait(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
