"""A job's log as a follower reads it: from where it stopped, forwards, to the end of the job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.orm import Session

from app.db.repositories.following import FollowingRepository
from app.services.jobs import get_job

LINES_AT_ONCE: Final = 200


@dataclass(frozen=True, slots=True)
class Chapter:
    """The next lines of a log.

    Attributes:
        lines: In order, without a gap.
        is_full: There may be more.
        is_last: The job has ended and nothing comes after them.
    """

    lines: Sequence[Row[*tuple[Any, ...]]]
    is_full: bool
    is_last: bool


def find_start(session: Session, project_id: UUID, job_id: UUID, last: UUID | None) -> int | None:
    """The number of the line that a follower saw last; 0 where it saw none, None where the job has no such line.

    Raises:
        NotFound: The project has no such job.
    """
    job = get_job(session, project_id, job_id)
    return 0 if last is None else FollowingRepository(session).find_place(job.id, last)


def read_chapter(session: Session, job_id: UUID, *, after: int) -> Chapter:
    """The lines of a job's log after a number."""
    repository = FollowingRepository(session)
    state, count = repository.get_state(job_id)
    # Its last line is written in the transaction that ends a job: who has read up to it has read all.
    lines = repository.list_lines(job_id, after=after, limit=LINES_AT_ONCE)
    reached = lines[-1].sequence if lines else after
    is_full = len(lines) == LINES_AT_ONCE
    return Chapter(lines, is_full=is_full, is_last=state.is_terminal and reached >= count)
