"""Benchmark results as they are read back: filtered, paged, and item by item."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Evaluation, Job
from app.db.repositories.benchmarks import BenchmarkRepository
from app.db.repositories.catalog import CatalogRepository
from app.db.repositories.external_runs import ExternalRunRepository
from app.db.repositories.project_jobs import ProjectJobRepository
from app.db.repositories.registry import RegistryRepository
from app.db.repositories.results import ResultFilter, ResultRepository
from app.domain.benchmarks import Subjects, item_id, unpack_array
from app.domain.identifiers import PREFIXES, parse_id, public_id
from app.services.evaluations import unpack_bytes
from app.services.storage import Storage


@dataclass(frozen=True, slots=True)
class WantedResults:
    """What a list of results is narrowed to; None leaves open."""

    subject_id: str | None = None  # a job's id, a version's name, or a base model's (its baselines)
    benchmark: str | None = None  # `name`, or `name@3`
    purpose: str | None = None  # `baseline`, `gate`, `report` or `monitor`


@dataclass(frozen=True, slots=True)
class ShownResult:
    """An evaluation with its subject's public id, and its items where they were asked for."""

    row: Evaluation
    subject_id: str
    items: list[dict[str, Any]] | None = None
    subjects: list[dict[str, Any]] | None = None


def list_results(
    session: Session,
    project_id: UUID,
    wanted: WantedResults,
    *,
    after: UUID | None = None,
    limit: int = 20,
    is_newest_first: bool = True,
) -> tuple[list[Evaluation], bool]:
    """A page of results, and whether there are more.

    Raises:
        NotFound: No such subject, or no result `after`.
    """
    kind, keys = (
        (None, None)
        if wanted.subject_id is None
        else _find_subject(session, project_id, wanted.subject_id)
    )
    narrowed = ResultFilter(kind, keys, wanted.benchmark, wanted.purpose)
    found = ResultRepository(session).list_page(
        project_id, narrowed, after=after, limit=limit + 1, is_newest_first=is_newest_first
    )
    return found[:limit], len(found) > limit


def show_results(
    session: Session,
    storage: Storage,
    rows: Sequence[Evaluation],
    *,
    with_items: bool,
    with_subjects: bool = False,
) -> list[ShownResult]:
    """Results with their subjects' public ids, and when asked for with the scores of items and of their subjects."""
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
        return "base_model", (f"{base.sha256}/own", f"{base.sha256}/plain")
    version = RegistryRepository(session).get(project_id, subject_id)
    return "model", (version.name,)


def _subject_id(row: Evaluation, bases: dict[str, str]) -> str:
    if row.subject_type == "fine_tuning.job":
        return public_id("job", UUID(row.subject_key))
    if row.subject_type == "external_run":
        return public_id("run", UUID(row.subject_key.removeprefix("run/")))
    if row.subject_type == "base_model":
        sha256 = row.subject_key.partition("/")[0]
        return bases.get(sha256, sha256)
    return row.subject_key


def _read_ids(storage: Storage, path: str) -> list[str]:
    with storage.open(path) as file:
        return [item_id(json.loads(line)) for line in file if line.strip()]


def _items(row: Evaluation, ids: list[str] | None) -> list[dict[str, Any]] | None:
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


def _break_down(row: Evaluation, subjects: Subjects | None) -> list[dict[str, Any]] | None:
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
