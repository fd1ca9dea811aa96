"""Queries on files."""

from uuid import UUID

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from app.db.models import BaseModel, BenchmarkVersion, File, Job
from app.domain.identifiers import public_id
from app.domain.states import JobState
from app.errors import NotFound

NAMED_JOBS = 5
_ENDED = tuple(state for state in JobState if state.is_terminal)


class FileRepository:
    """Files of a project that are neither deleted nor expired."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, file: File) -> None:
        """Keeps a new file's row."""
        self._session.add(file)
        self._session.flush()
        self._session.refresh(file)

    def get(
        self,
        project_id: UUID | None,
        file_id: UUID,
        *,
        param: str = "file_id",
        share: bool = False,
        for_update: bool = False,
    ) -> File:
        """The file with this id.

        Args:
            project_id: Whose; None: the operator's.
            file_id: Its row's id.
            param: The request field that named it.
            share: Keeps it from being deleted until the transaction ends.
            for_update: Locks it.

        Raises:
            NotFound: The project has no such file.
        """
        query = _live(project_id).where(File.id == file_id)
        if share or for_update:
            query = query.with_for_update(read=not for_update).execution_options(
                populate_existing=True
            )
        file = self._session.scalar(query)
        if file is None:
            raise NotFound(f"{param}: no file of the project has this id.", param, "file_not_found")
        return file

    def list_page(
        self,
        project_id: UUID,
        *,
        purpose: str | None,
        after: File | None,
        limit: int,
        is_newest_first: bool,
    ) -> list[File]:
        """Files in the order in which they came, or newest first."""
        query = _live(project_id)
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        if after is not None:
            query = query.where(File.seq < after.seq if is_newest_first else File.seq > after.seq)
        query = query.order_by(File.seq.desc() if is_newest_first else File.seq).limit(limit)
        return list(self._session.scalars(query))

    def mark_deleted(self, file: File) -> None:
        """Takes a file out of sight; its row stays for the jobs that used it."""
        file.deleted_at = func.clock_timestamp()
        self._session.flush()

    def lock_expired(self, *, after_seq: int, limit: int) -> list[File]:
        """Expired files that were not deleted yet, in the order in which they came."""
        query = (
            select(File)
            .where(
                File.deleted_at.is_(None),
                File.expires_at <= func.clock_timestamp(),
                File.seq > after_seq,
            )
            .order_by(File.seq)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        return list(self._session.scalars(query))

    def find_use(self, file: File) -> str | None:
        """What still needs a file, in words; None when nothing does."""
        jobs = self._session.scalars(
            select(Job.id)
            .where(
                or_(
                    Job.training_file_id == file.id,
                    Job.validation_file_id == file.id,
                    Job.general_file_id == file.id,
                    Job.spec.contains({"stages": [{"training_file": public_id("file", file.id)}]}),
                ),
                Job.state.not_in(_ENDED),
            )
            .order_by(Job.seq)
            .limit(NAMED_JOBS + 1)
        ).all()
        if jobs:
            names = ", ".join(public_id("job", job) for job in jobs[:NAMED_JOBS])
            more = " and others" if len(jobs) > NAMED_JOBS else ""
            return f"jobs that have not ended: {names}{more}"
        if self._session.scalar(
            select(BenchmarkVersion.id).where(BenchmarkVersion.file_id == file.id).limit(1)
        ):
            return "a benchmark"
        if self._session.scalar(
            select(BaseModel.id).where(BaseModel.general_file_id == file.id).limit(1)
        ):
            return "a base model as its general data"
        return None


def _live(project_id: UUID | None) -> Select[File]:
    owner = File.project_id.is_(None) if project_id is None else File.project_id == project_id
    return select(File).where(
        owner,
        File.deleted_at.is_(None),
        or_(File.expires_at.is_(None), File.expires_at > func.clock_timestamp()),
    )
