"""Queries on benchmarks, their versions and suites, as projects see them."""

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, func, or_, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session, undefer

from app.db.models import Benchmark, BenchmarkVersion, RequiredBenchmark, SuiteEntry
from app.db.repositories.paging import newest_first
from app.domain.benchmarks import Subjects
from app.errors import NotFound


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """A benchmark version with its benchmark's name."""

    name: str
    version: BenchmarkVersion

    @property
    def reference(self) -> str:
        """The name that pins the version: `name@3`."""
        return f"{self.name}@{self.version.version}"


@dataclass(frozen=True, slots=True)
class SuiteBenchmark:
    """A benchmark version in a base model's suite."""

    benchmark: NamedVersion
    weight: float
    is_mandatory: bool


@dataclass(frozen=True, slots=True)
class RequiredVersion:
    """A benchmark version that every job of a project is watched by."""

    benchmark: NamedVersion
    weight: float
    limit: float


class BenchmarkRepository:
    """Benchmarks that a project sees: its own, and the operator's."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def ensure(self, project_id: UUID | None, name: str) -> Benchmark:
        """The owner's benchmark of this name, made when missing, its row locked so that versions are numbered one by one."""
        owner = (
            Benchmark.project_id.is_(None)
            if project_id is None
            else Benchmark.project_id == project_id
        )
        query = select(Benchmark).where(owner, Benchmark.name == name).with_for_update()
        found = self._session.scalar(query)
        if found is None:
            found = Benchmark(project_id=project_id, name=name)
            self._session.add(found)
            self._session.flush()
        return found

    def add_version(self, version: BenchmarkVersion) -> None:
        """Keeps a new version; its number is one more than the highest there is."""
        highest = self._session.scalar(
            select(func.max(BenchmarkVersion.version)).where(
                BenchmarkVersion.benchmark_id == version.benchmark_id
            )
        )
        version.version = (highest or 0) + 1
        self._session.add(version)
        self._session.flush()
        self._session.refresh(version)

    def find_reference(self, project_id: UUID | None, reference: str) -> NamedVersion | None:
        """The version that `name` (latest) or `name@3` names; a project's own goes before the operator's."""
        name, _, number = reference.partition("@")
        if number and not (number.isascii() and number.isdigit() and len(number) < 10):
            return None
        query = (
            select(BenchmarkVersion)
            .join(Benchmark, Benchmark.id == BenchmarkVersion.benchmark_id)
            .where(
                Benchmark.name == name,
                or_(Benchmark.project_id == project_id, Benchmark.project_id.is_(None)),
            )
            .order_by(Benchmark.project_id.is_(None), BenchmarkVersion.version.desc())
            .limit(1)
        )
        if number:
            query = query.where(BenchmarkVersion.version == int(number))
        version = self._session.scalar(query)
        return None if version is None else NamedVersion(name, version)

    def get(self, project_id: UUID, benchmark_id: UUID) -> Benchmark:
        """The benchmark with this id.

        Raises:
            NotFound: The project sees no such benchmark.
        """
        found = self._session.scalar(
            select(Benchmark).where(
                Benchmark.id == benchmark_id,
                or_(Benchmark.project_id == project_id, Benchmark.project_id.is_(None)),
            )
        )
        if found is None:
            raise NotFound("No benchmark has this id.", "benchmark_id", "benchmark_not_found")
        return found

    def list_page(
        self, project_id: UUID, *, after: Benchmark | None, limit: int
    ) -> list[Benchmark]:
        """Benchmarks, newest first."""
        query = select(Benchmark).where(
            or_(Benchmark.project_id == project_id, Benchmark.project_id.is_(None))
        )
        query = newest_first(query, Benchmark, after=after, limit=limit)
        return list(self._session.scalars(query))

    def latest_versions(self, benchmarks: list[Benchmark]) -> dict[UUID, BenchmarkVersion]:
        """The newest version of each benchmark, by the benchmark's id."""
        found = self._session.scalars(
            select(BenchmarkVersion)
            .where(BenchmarkVersion.benchmark_id.in_([b.id for b in benchmarks]))
            .options(undefer(BenchmarkVersion.subjects))
            .ext(distinct_on(BenchmarkVersion.benchmark_id))
            .order_by(BenchmarkVersion.benchmark_id, BenchmarkVersion.version.desc())
        )
        return {version.benchmark_id: version for version in found}

    def list_suite(self, base_model_id: UUID) -> list[SuiteBenchmark]:
        """A base model's suite, in the order in which its benchmark versions were made."""
        rows = self._session.execute(
            select(Benchmark.name, BenchmarkVersion, SuiteEntry.weight, SuiteEntry.is_mandatory)
            .join(BenchmarkVersion, BenchmarkVersion.id == SuiteEntry.benchmark_version_id)
            .join(Benchmark, Benchmark.id == BenchmarkVersion.benchmark_id)
            .where(SuiteEntry.base_model_id == base_model_id)
            .order_by(BenchmarkVersion.seq)
        )
        return [
            SuiteBenchmark(NamedVersion(name, version), weight, is_mandatory)
            for name, version, weight, is_mandatory in rows
        ]

    def list_required(self, project_id: UUID) -> list[RequiredVersion]:
        """What a project requires, in the order in which the versions were made."""
        rows = self._session.execute(
            select(
                Benchmark.name, BenchmarkVersion, RequiredBenchmark.weight, RequiredBenchmark.limit
            )
            .join(BenchmarkVersion, BenchmarkVersion.id == RequiredBenchmark.benchmark_version_id)
            .join(Benchmark, Benchmark.id == BenchmarkVersion.benchmark_id)
            .where(RequiredBenchmark.project_id == project_id)
            .order_by(BenchmarkVersion.seq)
        )
        return [
            RequiredVersion(NamedVersion(name, version), weight, limit)
            for name, version, weight, limit in rows
        ]

    def drop_required(self, project_id: UUID, benchmark_id: UUID) -> int:
        """Takes every version of a benchmark out of what a project requires, and says how many there were."""
        versions = select(BenchmarkVersion.id).where(BenchmarkVersion.benchmark_id == benchmark_id)
        found = self._session.scalars(
            delete(RequiredBenchmark)
            .where(
                RequiredBenchmark.project_id == project_id,
                RequiredBenchmark.benchmark_version_id.in_(versions),
            )
            .returning(RequiredBenchmark.benchmark_version_id)
        )
        return len(found.all())

    def add_required(self, required: RequiredBenchmark) -> None:
        """Makes a project require a benchmark version."""
        self._session.add(required)
        self._session.flush()

    def list_subjects(self, version_ids: Iterable[UUID]) -> dict[UUID, Subjects]:
        """The subjects of those versions whose items have some."""
        rows = self._session.execute(
            select(BenchmarkVersion.id, BenchmarkVersion.subjects).where(
                BenchmarkVersion.id.in_(list(version_ids)), BenchmarkVersion.subjects.is_not(None)
            )
        )
        return {version_id: Subjects.model_validate(subjects) for version_id, subjects in rows}

    def list_versions(self, benchmark: Benchmark) -> list[BenchmarkVersion]:
        """Every version of a benchmark, newest first."""
        return list(
            self._session.scalars(
                select(BenchmarkVersion)
                .where(BenchmarkVersion.benchmark_id == benchmark.id)
                .options(undefer(BenchmarkVersion.subjects))
                .order_by(BenchmarkVersion.version.desc())
            )
        )
