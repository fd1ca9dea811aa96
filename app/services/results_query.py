"""Benchmark results as they are read back: filtered, paged, and item by item."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Evaluation, Job
from app.db.repositories.benchmarks import BenchmarkRepository
from app.db.repositories.catalog import CatalogRepository
from app.db.repositories.external_runs import ExternalRunRepository
from app.db.repositories.posted_results import PlainRow
from app.db.repositories.project_jobs import ProjectJobRepository
from app.db.repositories.registry import RegistryRepository
from app.db.repositories.results import BASE_MODEL, Points, ResultFilter, ResultRepository, Window
from app.domain.benchmarks import Subjects, item_id, unpack_array
from app.domain.identifiers import PREFIXES, parse_id, public_id
from app.errors import BadRequest
from app.services.evaluations import unpack_bytes
from app.services.storage import Storage

ResultRow = Evaluation | PlainRow


@dataclass(frozen=True, slots=True)
class WantedResults:
    """What a list of results is narrowed to; None leaves open."""

    subject_id: str | None = None  # a job's id, a version's name, or a base model's (its baselines)
    benchmark: str | None = None  # `name`, or `name@3`
    purpose: str | None = None  # `baseline`, `gate`, `report` or `monitor`
    is_latest: bool = False  # of each benchmark only the newest


@dataclass(frozen=True, slots=True)
class ShownResult:
    """An evaluation with its subject's public id, and its items where they were asked for."""

    row: ResultRow
    subject_id: str
    items: list[dict[str, Any]] | None = None
    subjects: list[dict[str, Any]] | None = None


def list_results(
    session: Session,
    project_id: UUID,
    wanted: WantedResults,
    window: Window,
    *,
    with_scores: bool = True,
) -> tuple[list[Evaluation], bool]:
    """A page of results, and whether there are more.

    Args:
        session: Reads.
        project_id: Whose key it is.
        wanted: What the list is narrowed to.
        window: The part of the list.
        with_scores: The items' scores will be shown.

    Raises:
        BadRequest: The newest of each benchmark were asked for, and no subject named.
        NotFound: No such subject, or no result `after`.
    """
    if wanted.is_latest and wanted.subject_id is None:
        raise BadRequest("subject_id: say whose latest results you want.", "subject_id")
    found = ResultRepository(session).list_page(
        project_id,
        _narrow(session, project_id, wanted),
        replace(window, limit=window.limit + 1),
        is_latest=wanted.is_latest,
        with_scores=with_scores,
    )
    return found[: window.limit], len(found) > window.limit


def list_points(
    session: Session, project_id: UUID, wanted: WantedResults, window: Window
) -> Points:
    """The results of one benchmark as points.

    Raises:
        BadRequest: No benchmark was named, or only its newest results were asked for.
        NotFound: No such subject, or no result `after`.
    """
    if wanted.benchmark is None:
        raise BadRequest("benchmark: say which benchmark's points you want.", "benchmark")
    if wanted.is_latest:
        raise BadRequest("latest: points are a history.", "latest")
    narrowed = _narrow(session, project_id, wanted)
    return ResultRepository(session).list_points(project_id, narrowed, window)


def show_results(
    session: Session,
    storage: Storage,
    rows: Sequence[ResultRow],
    *,
    with_items: bool,
    with_subjects: bool = False,
) -> list[ShownResult]:
    """Results with their subjects' public ids, and when asked for with the scores of items and of their subjects."""
    bases: dict[str, str] = {}
    if any(row.subject_type == BASE_MODEL for row in rows):
        bases = {base.sha256: base.name for base in CatalogRepository(session).list_models()}
    ids: dict[UUID, list[str]] = {}
    subjects: dict[UUID, Subjects] = {}
    versions = {row.benchmark_version_id for row in rows if row.benchmark_version_id}
    if with_subjects:
        subjects = BenchmarkRepository(session).list_subjects(versions)
    if with_items:
        files = ResultRepository(session).item_files(versions)
        ids = {key: _read_ids(storage, path) for key, path in files.items()}
    return [
        ShownResult(
            row,
            _subject_id(row, bases),
            _items(row, ids.get(row.benchmark_version_id)) if row.benchmark_version_id else None,
            _break_down(row, subjects.get(row.benchmark_version_id))
            if row.benchmark_version_id
            else None,
        )
        for row in rows
    ]


def _narrow(session: Session, project_id: UUID, wanted: WantedResults) -> ResultFilter:
    if wanted.subject_id is None:
        return ResultFilter(None, None, wanted.benchmark, wanted.purpose)
    kind, keys = _find_subject(session, project_id, wanted.subject_id)
    return ResultFilter(kind, keys, wanted.benchmark, wanted.purpose)


def _find_subject(
    session: Session, project_id: UUID, subject_id: str
) -> tuple[str, tuple[str, ...]]:
    if subject_id.startswith(PREFIXES["job"]):
        key = parse_id("job", subject_id, param="subject_id")
        job: Job = ProjectJobRepository(session).get(project_id, key)
        return "fine_tuning.job", (str(job.id),)
    if subject_id.startswith(PREFIXES["run"]):
        run = ExternalRunRepository(session).get(
            project_id, parse_id("run", subject_id, param="subject_id")
        )
        return "external_run", (f"run/{run.id}",)
    base: BaseModel | None = CatalogRepository(session).find_model(subject_id)
    if base is not None:
        return BASE_MODEL, (f"{base.sha256}/own", f"{base.sha256}/plain")
    version = RegistryRepository(session).get(project_id, subject_id)
    return "model", (version.name,)


def _subject_id(row: ResultRow, bases: dict[str, str]) -> str:
    if row.subject_type == "fine_tuning.job":
        return public_id("job", UUID(row.subject_key))
    if row.subject_type == "external_run":
        return public_id("run", UUID(row.subject_key.removeprefix("run/")))
    if row.subject_type == BASE_MODEL:
        sha256 = row.subject_key.partition("/")[0]
        return bases.get(sha256, sha256)
    return row.subject_key


def _read_ids(storage: Storage, path: str) -> list[str]:
    with storage.open(path) as file:
        return [item_id(json.loads(line)) for line in file if line.strip()]


def _items(row: ResultRow, ids: list[str] | None) -> list[dict[str, Any]] | None:
    """Each scored item's id and score; of `nll` with its number of tokens."""
    if ids is None or row.scores is None:
        return None
    scores = unpack_bytes(row.scores)
    tokens = None if row.tokens is None else unpack_bytes(row.tokens)
    items = []
    for place in np.flatnonzero(~np.isnan(scores)):
        item: dict[str, Any] = {"id": ids[place], "score": float(scores[place])}
        if tokens is not None:
            item["tokens"] = int(tokens[place])
        items.append(item)
    return items


def _break_down(row: ResultRow, subjects: Subjects | None) -> list[dict[str, Any]] | None:
    """Each subject's number of scored items and mean score; of `nll` in nats per token."""
    if subjects is None or row.scores is None:
        return None
    scores = unpack_bytes(row.scores).astype(np.float64)
    codes = unpack_array(subjects.codes).astype(np.int64)
    tokens = None if row.tokens is None else unpack_bytes(row.tokens).astype(np.float64)
    found = []
    for place, name in enumerate(subjects.names):
        chosen = (codes == place) & np.isfinite(scores)
        if not chosen.any():
            continue
        size = float(chosen.sum() if tokens is None else max(tokens[chosen].sum(), 1.0))
        found.append(
            {
                "subject": name,
                "n_items": int(chosen.sum()),
                "value": float(scores[chosen].sum()) / size,
            }
        )
    return found
