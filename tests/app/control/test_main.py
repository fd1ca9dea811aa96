"""`python -m app.control` as a process, and what happens when one of its loops breaks."""

import os
import signal
import subprocess
import sys
import threading
import time

from app.control.__main__ import keep_running
from app.db.session import SessionFactory
from app.settings import Settings
from tests.app.control.receivers import receiving
from tests.app.control.test_webhook_sender import KEY, emit, subscribe, wait_for
from tests.factories import make_project


def test_it_delivers_and_stops_within_seconds_of_sigterm(
    database: str, redis_url: str, committed_factory: SessionFactory
) -> None:
    with committed_factory.begin() as session:
        project_id = make_project(session).id
    environment = os.environ | {
        "RETAIN_DATABASE_URL": database,
        "RETAIN_REDIS_URL": redis_url,
        "RETAIN_SECRET_KEY": KEY.decode(),
        "RETAIN_WEBHOOK_ALLOW_PRIVATE": "true",
    }
    with receiving() as receiver:
        subscribe(committed_factory, project_id, receiver.url)
        emit(committed_factory, project_id)
        process = subprocess.Popen([sys.executable, "-m", "app.control"], env=environment)
        try:
            wait_for(lambda: receiver.requests, 60)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert process.wait(15) == 0
            assert time.monotonic() - began < 12
        finally:
            process.kill()


def test_a_broken_loop_is_started_again_until_it_is_told_to_stop(
    committed_factory: SessionFactory, settings: Settings
) -> None:
    stop = threading.Event()
    starts = 0

    def loop(_factory: SessionFactory, _settings: Settings, stop: threading.Event) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            raise RuntimeError("broken once")
        stop.set()

    keep_running("loop", loop, committed_factory, settings, stop)
    assert starts == 2
