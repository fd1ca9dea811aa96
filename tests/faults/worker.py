"""A real worker process whose trainer is the scripted one: `python -m tests.faults.worker SCENARIO`."""

import argparse
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from app.settings import load_settings
from workers import tasks
from workers.celery_app import main as run_celery
from workers.supervisor import Node
from workers.supervisor.slots import Slot, Slots

SCRIPT = Path(__file__).parents[1] / "workers" / "scripted_trainer.py"


def main() -> None:
    """Works until SIGTERM: under Celery, or by looking for jobs alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario")
    parser.add_argument("--pace", default="0", help="seconds of a step")
    parser.add_argument("--lock", type=Path, help="lock file of the one slot, as a GPU has one")
    parser.add_argument("--max-file-bytes", type=int, default=-1)
    parser.add_argument(
        "--skew", type=float, default=0.0, help="seconds the wall clock is wrong by"
    )
    parser.add_argument("--celery", action="store_true")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_FSIZE, (options.max_file_bytes, -1))
    if options.skew:
        right = time.time
        time.time = lambda: right() + options.skew
    device = None if options.lock is None else "0"
    slots = Slots([Slot(0, device, options.lock)], "cpu")
    command = [sys.executable, str(SCRIPT), options.scenario, "--pace", options.pace]
    node = Node(load_settings(), slots, command=command)
    tasks._node = node
    if options.celery:
        run_celery()
        return
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    node.start()
    stop.wait()
    node.stop()


if __name__ == "__main__":
    main()
