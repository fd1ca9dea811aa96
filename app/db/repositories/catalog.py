"""Queries on base models, benchmarks and suites, as the operator sees them."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Benchmark, BenchmarkVersion, SuiteEntry
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.errors import BadRequest


class CatalogRepository:
    """What jobs can name."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find_model(self, name: str) -> BaseModel | None:
        """The base model of this name."""
        return self._session.scalar(select(BaseModel).where(BaseModel.name == name))

    def list_models(self) -> list[BaseModel]:
        """Every base model, oldest first."""
        return list(self._session.scalars(select(BaseModel).order_by(BaseModel.seq)))

    def add_model(self, model: BaseModel, suite: list[tuple[BenchmarkVersion, float]]) -> None:
        """Keeps a model with the benchmark versions it is watched by and their weights."""
        self._session.add(model)
        self._session.flush()
        self._session.add_all(
            SuiteEntry(base_model_id=model.id, benchmark_version_id=version.id, weight=weight)
            for version, weight in suite
        )
        self._session.flush()

    def get_benchmark(self, name: str) -> BenchmarkVersion:
        """The newest version of the operator's benchmark of this name, else of the only project's.

        Raises:
            BadRequest: There is none, or several projects have one.
        """
        rows = self._session.execute(
            select(Benchmark, BenchmarkVersion)
            .join(BenchmarkVersion, BenchmarkVersion.benchmark_id == Benchmark.id)
            .where(Benchmark.name == name)
            .order_by(BenchmarkVersion.version.desc())
        ).all()
        own = [version for benchmark, version in rows if benchmark.project_id is None]
        if own:
            return own[0]
        if len({benchmark.id for benchmark, _ in rows}) > 1:
            raise BadRequest(f"Several projects have a benchmark '{name}'.", "benchmark")
        if not rows:
            raise BadRequest(f"No benchmark is called '{name}'.", "benchmark")
        version: BenchmarkVersion = rows[0][1]
        return version

    def find_version(
        self, name: str, items_sha256: str, *, kind: BenchmarkKind, scorer: Scorer
    ) -> BenchmarkVersion | None:
        """The operator's version of this benchmark that holds these very items."""
        return self._session.scalar(
            select(BenchmarkVersion)
            .join(Benchmark, Benchmark.id == BenchmarkVersion.benchmark_id)
            .where(
                Benchmark.name == name,
                Benchmark.project_id.is_(None),
                BenchmarkVersion.items_sha256 == items_sha256,
                BenchmarkVersion.kind == kind,
                BenchmarkVersion.scorer == scorer,
            )
            .order_by(BenchmarkVersion.version.desc())
            .limit(1)
        )
