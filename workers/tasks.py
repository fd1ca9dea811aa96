"""The doorbell: a message that says to look into the queue; what is worked on comes from Postgres."""

import threading
from typing import Any

import structlog
from celery import bootsteps, signals

from app.broker import TASK
from app.settings import load_settings
from workers.celery_app import celery
from workers.supervisor import Node, build_node

log = structlog.get_logger()
_node: Node | None = None
_making = threading.Lock()


def get_node() -> Node:
    """The node of this worker process, made on first use."""
    global _node  # noqa: PLW0603 - Celery gives a process's state no other home
    with _making:
        if _node is None:
            _node = build_node(load_settings())
    return _node


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts the node once SIGTERM means drain, and before the wait for a broker that may be away."""

    requires = ("celery.worker.components:Pool",)

    def start(self, parent: Any) -> None:  # noqa: ANN401, ARG002 - the interface of a step
        """Begins to look for jobs."""
        get_node().start()


celery.steps["worker"].add(NodeStep)


@celery.task(name=TASK)
def doorbell(job_id: str) -> int:
    """Works on the best queued jobs until none is left, whichever job rang; how many there were."""
    log.info("worker.bell", job=job_id)
    return get_node().serve()


@signals.celeryd_init.connect
def _size_pool(conf: Any, **_: Any) -> None:  # noqa: ANN401 - Celery has no types
    conf.worker_concurrency = max(get_node().slots.count, 1)


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:  # noqa: ANN401
    get_node().drain()


@signals.worker_shutdown.connect
def _end(**_: Any) -> None:  # noqa: ANN401
    get_node().stop()
