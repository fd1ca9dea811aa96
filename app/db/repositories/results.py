"""Queries on evaluations as clients read them.

A page is merged from a few short scans, each along one index in the order of the list: a single query over
`OR`s and joins would read a benchmark's whole history to show its newest twenty results.
"""

from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Select,
    Subquery,
    Uuid,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by, distinct_on
from sqlalchemy.orm import InstrumentedAttribute, Session, defer

from app.db.models import Benchmark, BenchmarkVersion, Evaluation, File
from app.errors import NotFound

MAX_DIGITS = 10  # of a version's number
BASE_MODEL = "base_model"  # the one type of subject whose rows belong to no project
NOT_JSON = (float("nan"), float("inf"), float("-inf"))

Condition = ColumnElement[bool]
Column = ColumnElement[Any] | InstrumentedAttribute[Any]
Columns = tuple[InstrumentedAttribute[Any], ...]


@dataclass(frozen=True, slots=True)
class ResultFilter:
    """What a list of results is narrowed to; None leaves open."""

    subject_type: str | None = None
    subject_keys: tuple[str, ...] | None = None
    benchmark: str | None = None  # `name`, or `name@3`
    purpose: str | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a list that is wanted, in the order in which results were recorded or newest first."""

    after: UUID | None = None
    limit: int = 20
    is_newest_first: bool = True


@dataclass(frozen=True, slots=True)
class Points:
    """What a curve is drawn from: columns of equal length."""

    steps: list[int | None]
    values: list[float | None]  # None: no number
    measured_at: list[int]  # whole seconds since 1970
    ids: tuple[UUID, ...]  # of the first and the last one
    has_more: bool


class ResultRepository:
    """Evaluations that a project sees: its own, and the base models' on benchmarks it sees."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list_page(
        self,
        project_id: UUID,
        wanted: ResultFilter,
        window: Window,
        *,
        is_latest: bool = False,
        with_scores: bool = True,
    ) -> list[Evaluation]:
        """Evaluations of a window.

        Args:
            project_id: Who asks.
            wanted: What they ask for; with `is_latest` it names the subject.
            window: The part of the list.
            is_latest: Of each benchmark only the newest.
            with_scores: Without, the items' scores are left in the database.

        Raises:
            NotFound: The project sees no evaluation `after`.
        """
        bound = self._bound(project_id, window)
        found = (
            self._latest(project_id, wanted)
            if is_latest
            else self._merged(project_id, wanted, window, bound, (Evaluation.seq,))
        )
        query = select(Evaluation).where(
            Evaluation.seq.in_(select(found.c.seq)), *_beyond(bound, window)
        )
        query = query.order_by(_order(Evaluation.seq, window)).limit(window.limit)
        if not with_scores:
            query = query.options(defer(Evaluation.scores), defer(Evaluation.tokens))
        return list(self._session.scalars(query))

    def list_points(self, project_id: UUID, wanted: ResultFilter, window: Window) -> Points:
        """The same results as points of a curve, put together by the database.

        Raises:
            NotFound: The project sees no evaluation `after`.
        """
        bound = self._bound(project_id, window)
        wider = replace(window, limit=window.limit + 1)
        shown = (Evaluation.seq, Evaluation.step, Evaluation.value, Evaluation.measured_at)
        found = self._merged(project_id, wanted, wider, bound, shown)
        rows = (
            select(*found.c)
            .ext(distinct_on(found.c.seq))
            .order_by(_order(found.c.seq, window))
            .limit(wider.limit)
            .subquery()
        )
        order = _order(rows.c.seq, window)
        value = case((rows.c.value.in_(NOT_JSON), None), else_=rows.c.value)
        second = cast(func.floor(func.extract("epoch", rows.c.measured_at)), BigInteger)
        columns = (rows.c.seq, rows.c.step, value, second)
        lists = [func.json_agg(aggregate_order_by(column, order)) for column in columns]
        found_lists = [column or [] for column in self._session.execute(select(*lists)).one()]
        has_more = len(found_lists[0]) > window.limit
        seqs, steps, values, measured_at = (column[: window.limit] for column in found_lists)
        ends = [] if not seqs else [seqs[0], seqs[-1]]
        ids = dict(
            self._session.execute(
                select(Evaluation.seq, Evaluation.id).where(Evaluation.seq.in_(ends))
            ).all()
        )
        return Points(steps, values, measured_at, tuple(ids[seq] for seq in ends), has_more)

    def item_files(self, version_ids: set[UUID]) -> dict[UUID, str]:
        """Where the items of benchmark versions lie in the store, by the version's id."""
        query = (
            select(BenchmarkVersion.id, File.path)
            .join(File, File.id == BenchmarkVersion.file_id)
            .where(BenchmarkVersion.id.in_(version_ids))
        )
        return dict(self._session.execute(query).all())

    def _bound(self, project_id: UUID, window: Window) -> int | None:
        """The place of the row that the window comes after."""
        if window.after is None:
            return None
        seen = or_(*_owners(project_id, None))
        query = select(Evaluation.seq).where(Evaluation.id == window.after, seen)
        place = self._session.scalar(query)
        if place is None:
            raise NotFound("after: no result of the project has this id.", "after")
        return place

    def _merged(
        self,
        project_id: UUID,
        wanted: ResultFilter,
        window: Window,
        bound: int | None,
        columns: Columns,
    ) -> Subquery:
        """What may be in the window: the nearest rows along every index that leads to some; a row may come twice."""
        scans = []
        for owner in _owners(project_id, wanted.subject_type):
            narrowed = [owner, *_beyond(bound, window), *_of_subject(wanted)]
            if wanted.benchmark is None:
                scans.append(_scan(columns, narrowed, window))
                continue
            is_named = Evaluation.benchmark == wanted.benchmark
            scans.append(_scan(columns, [*narrowed, is_named], window))
            versions = self._versions(project_id, wanted.benchmark)
            if versions:
                scans.append(_scan_each(columns, versions, narrowed, window))
        return union_all(*scans).subquery()

    def _latest(self, project_id: UUID, wanted: ResultFilter) -> Subquery:
        """The newest row of each benchmark of a subject: the index is asked for one name after the other."""
        narrowed = [or_(*_owners(project_id, wanted.subject_type))]
        if wanted.purpose is not None:
            narrowed.append(Evaluation.purpose == wanted.purpose)
        if wanted.benchmark is not None:
            versions = self._versions(project_id, wanted.benchmark)
            narrowed.append(
                or_(
                    Evaluation.benchmark == wanted.benchmark,
                    Evaluation.benchmark_version_id.in_(versions),
                )
            )
        parts = []
        for place, key in enumerate(wanted.subject_keys or ()):
            mine = (
                Evaluation.subject_type == wanted.subject_type,
                Evaluation.subject_key == key,
            )
            first = select(func.min(Evaluation.benchmark).label("benchmark")).where(*mine)
            names = first.cte(f"names_{place}", recursive=True)
            following = select(func.min(Evaluation.benchmark)).where(
                *mine, Evaluation.benchmark > names.c.benchmark
            )
            names = names.union_all(
                select(following.scalar_subquery()).where(names.c.benchmark.is_not(None))
            )
            newest = (
                select(Evaluation.seq)
                .where(*mine, Evaluation.benchmark == names.c.benchmark, *narrowed)
                .order_by(Evaluation.seq.desc())
                .limit(1)
                .lateral()
            )
            parts.append(select(newest.c.seq).select_from(names.join(newest, true())))
        return union_all(*parts).subquery()

    def _versions(self, project_id: UUID, reference: str) -> list[UUID]:
        """Versions that the project sees under `name`, or the one under `name@3`."""
        name, _, number = reference.partition("@")
        query = _visible_versions(project_id).where(Benchmark.name == name)
        if number.isascii() and number.isdigit() and len(number) < MAX_DIGITS:
            query = query.where(BenchmarkVersion.version == int(number))
        return list(self._session.scalars(query))


def _visible_versions(project_id: UUID) -> Select[UUID]:
    return (
        select(BenchmarkVersion.id)
        .join(Benchmark, Benchmark.id == BenchmarkVersion.benchmark_id)
        .where(or_(Benchmark.project_id.is_(None), Benchmark.project_id == project_id))
    )


def _owners(project_id: UUID, subject_type: str | None) -> list[Condition]:
    """Whose rows a project sees: its own, and those of nobody, which only base models have."""
    own = Evaluation.project_id == project_id
    if subject_type not in {None, BASE_MODEL}:
        return [own]
    version = Evaluation.benchmark_version_id
    is_visible = or_(version.is_(None), version.in_(_visible_versions(project_id)))
    return [own, Evaluation.project_id.is_(None) & is_visible]


def _of_subject(wanted: ResultFilter) -> list[Condition]:
    found: list[Condition] = []
    if wanted.subject_type is not None:
        found.append(Evaluation.subject_type == wanted.subject_type)
    if wanted.subject_keys is not None:
        found.append(Evaluation.subject_key.in_(wanted.subject_keys))
    if wanted.purpose is not None:
        found.append(Evaluation.purpose == wanted.purpose)
    return found


def _beyond(bound: int | None, window: Window) -> list[Condition]:
    if bound is None:
        return []
    return [Evaluation.seq < bound if window.is_newest_first else Evaluation.seq > bound]


def _order(seq: Column, window: Window) -> ColumnElement[int]:
    return seq.desc() if window.is_newest_first else seq.asc()


def _scan(columns: Columns, conditions: list[Condition], window: Window) -> Select[Any]:
    order = _order(Evaluation.seq, window)
    return select(*columns).where(*conditions).order_by(order).limit(window.limit)


def _scan_each(
    columns: Columns, versions: list[UUID], conditions: list[Condition], window: Window
) -> Select[Any]:
    """One scan for each version: over all of them together an index has no order."""
    ids = func.unnest(cast(literal(versions, ARRAY(Uuid)), ARRAY(Uuid)))
    version = ids.table_valued("id").render_derived()
    is_of = Evaluation.benchmark_version_id == version.c.id
    scan = _scan(columns, [*conditions, is_of], window).lateral()
    return select(*scan.c).select_from(version.join(scan, true()))
