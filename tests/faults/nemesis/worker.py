"""A worker process of the fleet: under Celery as in production; on demand a mutant that forgets the fence."""

import argparse
import sys
from typing import Any
from uuid import UUID

from sqlalchemy import select, update

from app.db.models import Job
from app.db.repositories import jobs
from app.domain.states import LEASED
from app.settings import load_settings
from workers import tasks
from workers.celery_app import main as run_celery
from workers.supervisor import Node
from workers.supervisor.slots import Slot, Slots


class Unfenced(jobs.JobRepository):
    """The statements of the fence with the attempt, and whose lease it is, left out."""

    def lock_leased(self, job_id: UUID, attempt: int) -> Job | None:
        return self._session.scalar(
            select(Job)
            .where(Job.id == job_id, Job.state.in_(LEASED))
            .with_for_update(key_share=True)
            .execution_options(populate_existing=True)
        )

    def beat(
        self, job_id: UUID, attempt: int, worker_id: str, *, ttl: float, values: dict[str, Any]
    ) -> jobs.BeatRow | None:
        row = self._session.execute(
            update(Job)
            .where(Job.id == job_id, Job.state.in_(LEASED))
            .values(lease_expires_at=jobs.from_now(ttl), **values)
            .returning(Job.state, Job.stop_requested, Job.order_version, Job.branch)
            .execution_options(synchronize_session=False)
        ).one_or_none()
        return None if row is None else jobs.BeatRow(*row)


def main() -> None:
    """Works until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pace", required=True, help="seconds of a step")
    parser.add_argument("--unfenced", action="store_true")
    options = parser.parse_args()
    if options.unfenced:
        for name in ("lock_leased", "beat"):
            setattr(jobs.JobRepository, name, vars(Unfenced)[name])
    command = [sys.executable, "-m", "tests.faults.nemesis.trainer", "--pace", options.pace]
    tasks._node = Node(load_settings(), Slots([Slot(0, None, None)], "cpu"), command=command)
    run_celery()


if __name__ == "__main__":
    main()
