"""Benchmarks: versions made from uploaded items, whole or in part, and listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from app.db.models import Benchmark, BenchmarkVersion, File
from app.db.repositories.benchmarks import BenchmarkRepository
from app.db.repositories.files import FileRepository
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import ITEM_TYPES, SCORER_MODULES, Scorer
from app.domain.identifiers import parse_id
from app.domain.jsonlines import read_lines
from app.domain.requests import CreateBenchmark
from app.domain.rows import check_items, iter_items
from app.domain.subsets import draw
from app.errors import BadRequest
from app.services.files import EVALS, PROCESSED
from app.services.storage import Storage, Stored


@dataclass(slots=True)
class DrawnItems:
    """A part of a file's items that lies in the store; it goes again unless a version takes it."""

    stored: Stored
    report: dict[str, Any]
    subset: dict[str, Any]  # limit, seed, and the file it was drawn from
    is_taken: bool = False


@contextmanager
def store_drawn(
    factory: SessionFactory, storage: Storage, project_id: UUID, body: CreateBenchmark
) -> Iterator[DrawnItems | None]:
    """Draws and stores the items that a request with `limit` asks for, for the length of a `with` block.

    No transaction is open while the file is read: make its version by `create_benchmark` inside the block.

    Raises:
        NotFound: No such file.
        BadRequest: The file is not one of items for this scorer, or holds fewer than `limit`.
    """
    if body.limit is None:
        if body.seed is not None:
            raise BadRequest("seed: it draws `limit` items; give `limit` as well.", "seed")
        yield None
        return
    with transaction(factory) as session:
        file = _get_items(session, project_id, body)
        path, sha256 = file.path, file.sha256
    seed = body.seed or 0
    with storage.open(path) as source:
        lines = list(read_lines(source))
    items = [item for _, item in iter_items(lines, body.scorer, param="file")]
    if body.limit > len(items):
        raise BadRequest(f"limit: the file holds {len(items):,} items.", "limit")
    chosen = draw(
        [item.id for item in items],
        [item.subject for item in items],
        limit=body.limit,
        seed=seed,
    )
    kept = [lines[place].rstrip(b"\r\n") + b"\n" for place in chosen]
    report = check_items(kept, body.scorer, param="file").model_dump(mode="json")
    drawn = DrawnItems(
        storage.put_bytes(b"".join(kept), f"files/{uuid4().hex}"),
        report | {"format": body.scorer.value, "num_rows": len(kept)},
        {"limit": body.limit, "seed": seed, "of_items": len(items), "of_sha256": sha256},
    )
    try:
        yield drawn
    except BaseException:
        storage.delete(drawn.stored.path)
        raise
    if not drawn.is_taken:  # the answer was that of an earlier request
        storage.delete(drawn.stored.path)


def create_benchmark(
    session: Session,
    project_id: UUID | None,
    body: CreateBenchmark,
    drawn: DrawnItems | None = None,
) -> tuple[Benchmark, BenchmarkVersion]:
    """Makes version n+1 of a benchmark; the operator's when there is no project.

    Args:
        session: The caller's transaction.
        project_id: Whose it is.
        body: What was asked for.
        drawn: The part of its file that `store_drawn` made; None takes the whole file.

    Raises:
        NotFound: No such file.
        BadRequest: The file is not one of items for this scorer, or the scorer's library is missing.
    """
    file = _get_items(session, project_id, body)
    if drawn is not None:
        file = _keep_drawn(session, project_id, body, drawn)
    report = file.report or {}
    repository = BenchmarkRepository(session)
    benchmark = repository.ensure(project_id, body.name)
    version = BenchmarkVersion(
        benchmark_id=benchmark.id,
        kind=body.kind,
        scorer=body.scorer,
        file_id=file.id,
        items_sha256=file.sha256,
        num_items=int(report["num_items"]),
        chance=float(report["chance_level"]),
        source=body.source,
        subset=None if drawn is None else drawn.subset,
        subjects=report.get("subjects"),
    )
    repository.add_version(version)
    return benchmark, version


def _get_items(session: Session, project_id: UUID | None, body: CreateBenchmark) -> File:
    """The file that a request names, checked against its scorer."""
    file = FileRepository(session).get(
        project_id, parse_id("file", body.file, param="file"), param="file", share=True
    )
    if file.purpose != EVALS or file.status != PROCESSED or file.report is None:
        raise BadRequest(
            f"file: its purpose is '{file.purpose}'; upload items for '{EVALS}'.",
            "file",
            "invalid_file_purpose",
        )
    found = Scorer(file.report["scorer"])
    if ITEM_TYPES[found] is not ITEM_TYPES[body.scorer]:
        raise BadRequest(
            f"scorer: the file holds items for '{found.value}', not for '{body.scorer.value}'.",
            "scorer",
        )
    module, package = SCORER_MODULES.get(body.scorer, ("sys", ""))
    if find_spec(module) is None:
        raise BadRequest(
            f"scorer: '{body.scorer.value}' needs {package}, which this server has not installed;"
            " its operator adds the extra `scorers`.",
            "scorer",
            "scorer_not_available",
        )
    return file


def _keep_drawn(
    session: Session, project_id: UUID | None, body: CreateBenchmark, drawn: DrawnItems
) -> File:
    file = File(
        project_id=project_id,
        filename=f"{body.name}-{drawn.subset['limit']}-seed{drawn.subset['seed']}.jsonl",
        purpose=EVALS,
        size_bytes=drawn.stored.size_bytes,
        sha256=drawn.stored.sha256,
        path=drawn.stored.path,
        status=PROCESSED,
        report=drawn.report,
    )
    FileRepository(session).add(file)
    drawn.is_taken = True
    return file


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
