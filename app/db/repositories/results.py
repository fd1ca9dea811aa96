"""Queries on evaluations as clients read them."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import Session

from app.db.models import Benchmark, BenchmarkVersion, Evaluation, File
from app.errors import NotFound

MAX_DIGITS = 10  # of a version's number


@dataclass(frozen=True, slots=True)
class ResultFilter:
    """What a list of results is narrowed to; None leaves open."""

    subject_type: str | None = None
    subject_keys: tuple[str, ...] | None = None
    benchmark: str | None = None  # `name`, or `name@3`
    purpose: str | None = None


class ResultRepository:
    """Evaluations that a project sees: its own, and the base models' on benchmarks it sees."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list_page(
        self,
        project_id: UUID,
        wanted: ResultFilter,
        *,
        after: UUID | None,
        limit: int,
        is_newest_first: bool,
    ) -> list[Evaluation]:
        """Evaluations in the order in which they were recorded, or newest first.

        Raises:
            NotFound: The project sees no evaluation `after`.
        """
        query = _visible(project_id)
        if wanted.subject_type is not None:
            query = query.where(Evaluation.subject_type == wanted.subject_type)
        if wanted.subject_keys is not None:
            query = query.where(Evaluation.subject_key.in_(wanted.subject_keys))
        if wanted.purpose is not None:
            query = query.where(Evaluation.purpose == wanted.purpose)
        if wanted.benchmark is not None:
            query = query.where(_is_of(wanted.benchmark))
        if after is not None:
            place = self._session.scalar(
                _visible(project_id).with_only_columns(Evaluation.seq).where(Evaluation.id == after)
            )
            if place is None:
                raise NotFound("after: no result of the project has this id.", "after")
            query = query.where(
                Evaluation.seq < place if is_newest_first else Evaluation.seq > place
            )
        order = Evaluation.seq.desc() if is_newest_first else Evaluation.seq
        return list(self._session.scalars(query.order_by(order).limit(limit)))

    def item_files(self, version_ids: set[UUID]) -> dict[UUID, str]:
        """Where the items of benchmark versions lie in the store, by the version's id."""
        query = (
            select(BenchmarkVersion.id, File.path)
            .join(File, File.id == BenchmarkVersion.file_id)
            .where(BenchmarkVersion.id.in_(version_ids))
        )
        return dict(self._session.execute(query).all())


def _visible(project_id: UUID) -> Select[Evaluation]:
    is_shared = Evaluation.project_id.is_(None) & or_(
        Benchmark.project_id.is_(None), Benchmark.project_id == project_id
    )
    return (
        select(Evaluation)
        .outerjoin(BenchmarkVersion, BenchmarkVersion.id == Evaluation.benchmark_version_id)
        .outerjoin(Benchmark, Benchmark.id == BenchmarkVersion.benchmark_id)
        .where(or_(Evaluation.project_id == project_id, is_shared))
    )


def _is_of(reference: str) -> ColumnElement[bool]:
    """Rows of a benchmark: posted under this very name, or of a version that the reference names."""
    name, _, number = reference.partition("@")
    is_named = Benchmark.name == name
    if number.isascii() and number.isdigit() and len(number) < MAX_DIGITS:
        is_named = is_named & (BenchmarkVersion.version == int(number))
    return or_(Evaluation.benchmark == reference, is_named)
