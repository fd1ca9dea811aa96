"""Benchmarks and their versions."""

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from app.api.dependencies import (
    BenchmarksReader,
    BenchmarksWriter,
    ResourcesDep,
    SessionDep,
    WriterDep,
)
from app.api.paging import After, Limit, parse_after
from app.api.schemas.base import Page, build_page
from app.api.schemas.benchmarks import (
    BenchmarkObject,
    BenchmarkVersionObject,
    show_benchmark,
    show_version,
)
from app.domain.requests import CreateBenchmark
from app.services import benchmarks

router = APIRouter(prefix="/v1/benchmarks", tags=["benchmarks"])


@router.post("", response_model=BenchmarkObject)
def create_benchmark(
    body: CreateBenchmark, caller: BenchmarksWriter, writer: WriterDep, resources: ResourcesDep
) -> Response:
    """Makes version n+1 of the benchmark of this name from an uploaded file of items, or from a part of it."""
    again = writer.replay(caller, body)
    if again is not None:
        return again
    factory, storage = resources.session_factory, resources.storage
    with benchmarks.store_drawn(factory, storage, caller.project_id, body) as drawn:

        def work(session: Session) -> BenchmarkObject:
            made = benchmarks.create_benchmark(session, caller.project_id, body, drawn)
            return show_benchmark(*made)

        return writer.run(caller, body, work)


@router.get("")
def list_benchmarks(
    session: SessionDep, caller: BenchmarksReader, after: After = None, limit: Limit = 20
) -> Page[BenchmarkObject]:
    """The project's benchmarks and the operator's, newest first, each with its newest version."""
    found, has_more = benchmarks.list_benchmarks(
        session, caller.project_id, after=parse_after("benchmark", after), limit=limit
    )
    return build_page([show_benchmark(*pair) for pair in found], has_more=has_more)


@router.get("/{benchmark}")
def retrieve_benchmark(
    benchmark: str, session: SessionDep, caller: BenchmarksReader
) -> BenchmarkObject:
    """A benchmark by its id, by `name` (newest version) or by `name@3`."""
    return show_benchmark(*benchmarks.get_benchmark(session, caller.project_id, benchmark))


@router.get("/{benchmark}/versions")
def list_versions(
    benchmark: str, session: SessionDep, caller: BenchmarksReader
) -> Page[BenchmarkVersionObject]:
    """Every version of a benchmark, newest first."""
    row, versions = benchmarks.list_versions(session, caller.project_id, benchmark)
    is_own = row.project_id is not None
    shown = [show_version(row.name, version, is_own=is_own) for version in versions]
    return build_page(shown, has_more=False)
