"""Benchmarks: versions made from uploaded items, listed, and resolved for a job."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Benchmark, BenchmarkVersion
from app.db.repositories.benchmarks import BenchmarkRepository, NamedVersion
from app.db.repositories.files import FileRepository
from app.domain.benchmarks import BenchmarkKind
from app.domain.identifiers import parse_id
from app.domain.policy import WatchedBenchmark
from app.domain.requests import CreateBenchmark
from app.errors import BadRequest, NotFound
from app.services.files import EVALS, PROCESSED


@dataclass(frozen=True, slots=True)
class Watched:
    """A benchmark version that a job watches."""

    benchmark: NamedVersion
    weight: float
    max_drop: float | None

    @property
    def is_general(self) -> bool:
        """Whether it must not drop."""
        return self.benchmark.version.kind is BenchmarkKind.GENERAL


def create_benchmark(
    session: Session, project_id: UUID | None, body: CreateBenchmark
) -> tuple[Benchmark, BenchmarkVersion]:
    """Makes version n+1 of a benchmark; the operator's when there is no project.

    Raises:
        NotFound: No such file.
        BadRequest: The file is not one of items for this scorer.
    """
    file = FileRepository(session).get(
        project_id, parse_id("file", body.file, param="file"), param="file", share=True
    )
    if file.purpose != EVALS or file.status != PROCESSED or file.report is None:
        raise BadRequest(
            f"file: its purpose is '{file.purpose}'; upload items for '{EVALS}'.",
            "file",
            "invalid_file_purpose",
        )
    found = str(file.report["scorer"])
    if found != body.scorer.value:
        raise BadRequest(
            f"scorer: the file holds items for '{found}', not for '{body.scorer.value}'.", "scorer"
        )
    repository = BenchmarkRepository(session)
    benchmark = repository.ensure(project_id, body.name)
    version = BenchmarkVersion(
        benchmark_id=benchmark.id,
        kind=body.kind,
        scorer=body.scorer,
        file_id=file.id,
        items_sha256=file.sha256,
        num_items=int(file.report["num_items"]),
        chance=float(file.report["chance_level"]),
    )
    repository.add_version(version)
    return benchmark, version


def list_benchmarks(
    session: Session, project_id: UUID, *, after: UUID | None = None, limit: int = 20
) -> tuple[list[tuple[Benchmark, BenchmarkVersion]], bool]:
    """A page of benchmarks with their newest versions, newest first, and whether there are more.

    Raises:
        NotFound: `after` is no benchmark that the project sees.
    """
    repository = BenchmarkRepository(session)
    last = None if after is None else repository.get(project_id, after)
    found = repository.list_page(project_id, after=last, limit=limit + 1)
    versions = repository.latest_versions(found[:limit])
    return [(benchmark, versions[benchmark.id]) for benchmark in found[:limit]], len(found) > limit


def get_benchmark(
    session: Session, project_id: UUID, reference: str
) -> tuple[Benchmark, BenchmarkVersion]:
    """A benchmark by its id, by `name` or by `name@3`, with its newest or the named version.

    Raises:
        NotFound: The project sees no such benchmark.
    """
    repository = BenchmarkRepository(session)
    named = repository.find_reference(project_id, reference)
    if named is not None:
        return repository.get(project_id, named.version.benchmark_id), named.version
    benchmark = repository.get(project_id, parse_id("benchmark", reference, param="benchmark_id"))
    return benchmark, repository.latest_versions([benchmark])[benchmark.id]


def list_versions(
    session: Session, project_id: UUID, reference: str
) -> tuple[Benchmark, list[BenchmarkVersion]]:
    """A benchmark with every version of it, newest first.

    Raises:
        NotFound: The project sees no such benchmark.
    """
    benchmark, _ = get_benchmark(session, project_id, reference)
    return benchmark, BenchmarkRepository(session).list_versions(benchmark)


def resolve_watched(
    session: Session,
    project_id: UUID,
    base: BaseModel | None,
    wanted: Sequence[WatchedBenchmark] | None,
) -> tuple[Watched, ...]:
    """What a job on this base watches: the benchmarks it names, else the base's suite; mandatory ones always.

    Without a base, which only a run that is trained elsewhere lacks, there is no suite.

    Raises:
        NotFound: No benchmark has a name that was given.
        BadRequest: A benchmark is named twice.
    """
    suite = [] if base is None else BenchmarkRepository(session).list_suite(base.id)
    if wanted is None:
        return tuple(Watched(entry.benchmark, entry.weight, None) for entry in suite)
    watched = [_resolve(session, project_id, place, wish) for place, wish in enumerate(wanted)]
    seen: set[UUID] = set()
    for place, found in enumerate(watched):
        if found.benchmark.version.id in seen:
            path = f"retention.policy.benchmarks.{place}.name"
            raise BadRequest(f"{path}: '{wanted[place].name}' is named twice.", path)
        seen.add(found.benchmark.version.id)
    watched += [
        Watched(entry.benchmark, entry.weight, None)
        for entry in suite
        if entry.is_mandatory and entry.benchmark.version.id not in seen
    ]
    return tuple(watched)


def _resolve(session: Session, project_id: UUID, place: int, wish: WatchedBenchmark) -> Watched:
    named = BenchmarkRepository(session).find_reference(project_id, wish.name)
    if named is None:
        path = f"retention.policy.benchmarks.{place}.name"
        raise NotFound(
            f"{path}: no benchmark is called '{wish.name}'.", path, "benchmark_not_found"
        )
    return Watched(named, wish.weight, wish.max_drop)
