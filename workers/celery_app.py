"""The Celery application of a worker; `python -m workers.celery_app` runs one."""

import os
import socket

from app.broker import build_celery
from app.errors import Unavailable
from app.services.logs import configure_logging
from app.settings import load_settings

celery = build_celery(load_settings().redis_url)
celery.conf.include = ["workers.tasks"]  # adds the doorbell and starts the node


def main() -> None:
    """Runs a worker until SIGTERM: then running jobs are saved and given back."""
    settings = load_settings()
    configure_logging(settings)
    if settings.redis_url is None:
        raise Unavailable("RETAIN_REDIS_URL is not set; `retain up` starts a Redis by itself.")
    name = os.environ.get("RETAIN_PROCESS", "worker")
    celery.worker_main(
        [
            *("worker", "--pool", "threads", "--without-gossip", "--without-mingle"),
            *("--loglevel", "INFO", "--hostname", f"{name}-{os.getpid()}@{socket.gethostname()}"),
        ]
    )


if __name__ == "__main__":
    # Under its own name, so that `workers.tasks` gets this application and not a second one.
    from workers.celery_app import main as run

    run()
