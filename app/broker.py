"""The doorbell: a Celery message that says "look into the queue"; it may be lost, doubled or late."""

from typing import Any, Final
from uuid import UUID

from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError as BrokerError

from app.errors import Unavailable

QUEUE: Final = "retain.doorbell"
TASK: Final = "retain.doorbell"
EXPIRES_SECONDS: Final = 120


class BellUnreachable(Unavailable):
    """The broker did not take the message."""

    code = "broker_unreachable"


def build_celery(redis_url: str | None, *, num_slots: int = 1) -> Celery:
    """The Celery application of workers and relay.

    Messages are acknowledged early and carry no authority: late acknowledgement on Redis runs jobs twice when a
    connection drops, so what must not be lost is kept in Postgres alone.

    Args:
        redis_url: The broker; None only where nothing will be sent or received.
        num_slots: Jobs a worker process supervises at once.
    """
    app = Celery("retain", broker=redis_url or "memory://")
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_retry_on_worker_lost=False,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_concurrency=num_slots,
        worker_pool="threads",  # supervises; the trainer is an exec'd child
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=0.0,
        worker_max_tasks_per_child=None,
        task_time_limit=None,
        task_soft_time_limit=None,
        task_track_started=False,
        worker_enable_remote_control=False,  # cancel goes through Postgres
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        task_publish_retry=False,  # the relay owns retrying
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=4,
        task_default_queue=QUEUE,
        task_queues=[Queue(QUEUE)],  # type: ignore[no-untyped-call]
        task_create_missing_queues=False,
        broker_transport_options={
            "visibility_timeout": 300,
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "retry_on_timeout": False,
            "global_keyprefix": "retain:",
        },
    )
    return app


def ring(app: Celery, job_id: UUID, *, producer: Any = None) -> None:  # noqa: ANN401 - kombu has no types
    """Rings once; the outbox relay alone calls this.

    Raises:
        BellUnreachable: The broker is away or stalls; at most some seconds pass.
    """
    try:
        app.send_task(
            TASK,
            (str(job_id),),
            queue=QUEUE,
            expires=EXPIRES_SECONDS,
            ignore_result=True,
            retry=False,
            producer=producer,
        )
    except (BrokerError, OSError) as error:
        raise BellUnreachable(f"The broker can't be reached: {error}") from error
