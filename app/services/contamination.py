"""Training files that repeat a benchmark's items, found at submit: such rows would teach the test."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import File, Project
from app.db.repositories.catalog import CatalogRepository
from app.db.repositories.files import FileRepository
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import Scorer
from app.domain.identifiers import parse_id
from app.domain.jsonlines import read_lines
from app.domain.overlap import NGRAM_WORDS, KnownTexts, find_overlaps, item_texts
from app.domain.policy import Policy
from app.domain.rows import Row, iter_items, iter_rows
from app.domain.spec import CreateJob
from app.domain.staging import stage_files
from app.errors import BadRequest, NotFound
from app.services.files import FINE_TUNE
from app.services.storage import Storage
from app.services.submit_warnings import Warnings, warning
from app.services.watched import resolve_watched

#: What is read of a file at most: about a second, and about as much for each benchmark.
MAX_CHECKED_BYTES: Final = 4_000_000
MAX_LISTED_LINES: Final = 20
OVERLAPS_BENCHMARK: Final = "overlaps_benchmark"


@dataclass(frozen=True, slots=True)
class StoredText:
    """A stored file whose text is compared; equal ones are compared once."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredItems:
    """A benchmark version's items in the store."""

    name: str
    file: StoredText
    scorer: Scorer


@dataclass(frozen=True, slots=True)
class Compared:
    """A file held against benchmarks: the lines that overlap, by benchmark, and how far it was read."""

    lines: dict[str, list[int]]
    rows_checked: int
    is_whole: bool


def find_contamination(
    factory: SessionFactory,
    storage: Storage,
    project_id: UUID,
    body: CreateJob,
    *,
    max_bytes: int = MAX_CHECKED_BYTES,
) -> Warnings:
    """A warning for each file of a job and each benchmark it watches that have text in common.

    No transaction is open while files are read. What is wrong with the request itself is for the submit to say.

    Args:
        factory: Of the short transaction that finds the files.
        storage: Where they lie.
        project_id: Whose job it is.
        body: The request.
        max_bytes: Read of each file at most; a warning says when that was not all of it.
    """
    with transaction(factory) as session:
        files = _find_files(session, project_id, body)
        benchmarks = _find_benchmarks(session, project_id, body)
    if not benchmarks:
        return []
    found: Warnings = []
    for param, file in files:
        compared = _compare(storage, file, benchmarks, max_bytes)
        found += [_tell(param, name, lines, compared) for name, lines in compared.lines.items()]
    return found


def _find_files(
    session: Session, project_id: UUID, body: CreateJob
) -> list[tuple[str, StoredText]]:
    named = [("training_file", body.training_file), *stage_files(body)]
    if body.validation_file is not None:
        named.append(("validation_file", body.validation_file))
    found = []
    for param, text in named:
        try:
            file = FileRepository(session).get(
                project_id, parse_id("file", text, param=param), param=param
            )
        except NotFound:
            continue  # the submit refuses it
        if file.purpose == FINE_TUNE:
            found.append((param, StoredText(file.path, file.sha256)))
    return found


def _find_benchmarks(
    session: Session, project_id: UUID, body: CreateJob
) -> tuple[StoredItems, ...]:
    base = CatalogRepository(session).find_model(body.model)
    if base is None:
        return ()
    try:
        watched = resolve_watched(
            session,
            project_id,
            base,
            _wanted(session, project_id, body).benchmarks,
            is_off=body.retention is None,
        )
    except (BadRequest, NotFound):
        return ()  # the submit refuses it
    found = []
    for each in watched:
        version = each.benchmark.version
        file = session.get_one(File, version.file_id)
        text = StoredText(file.path, file.sha256)
        found.append(StoredItems(each.benchmark.reference, text, version.scorer))
    return tuple(found)


def _wanted(session: Session, project_id: UUID, body: CreateJob) -> Policy:
    default = session.get_one(Project, project_id).default_policy
    if body.retention is not None and (
        default is None or "policy" in body.retention.model_fields_set
    ):
        return body.retention.policy
    return Policy() if default is None else Policy.model_validate(default)


@lru_cache(maxsize=256)
def _compare(
    storage: Storage, file: StoredText, benchmarks: tuple[StoredItems, ...], max_bytes: int
) -> Compared:
    """Kept by the files' digests: the jobs of a sweep compare the same ones again and again."""
    known = {each.name: _know(storage, each.file, each.scorer, max_bytes) for each in benchmarks}
    if not storage.exists(file.path):
        return Compared({}, 0, is_whole=False)
    with storage.open(file.path) as source:
        lines = _Bounded(read_lines(source), max_bytes)
        rows = list(_good_rows(lines))
    return Compared(find_overlaps(rows, known), len(rows), is_whole=not lines.is_cut)


@lru_cache(maxsize=32)
def _know(storage: Storage, file: StoredText, scorer: Scorer, max_bytes: int) -> KnownTexts:
    known = KnownTexts()
    if not storage.exists(file.path):
        return known
    with storage.open(file.path) as source:
        for _, item in iter_items(_Bounded(read_lines(source), max_bytes), scorer):
            for text in item_texts(item):
                known.add(text)
    return known


class _Bounded:
    """Lines of a file until so many bytes were given."""

    def __init__(self, lines: Iterator[bytes], max_bytes: int) -> None:
        self._lines = lines
        self._left = max_bytes
        self.is_cut = False

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            if self._left <= 0:
                self.is_cut = True
                return
            self._left -= len(line)
            yield line


def _good_rows(lines: _Bounded) -> Iterator[tuple[int, Row]]:
    """Rows up to the first bad line, which the check of a file that is not yet checked will name."""
    with contextlib.suppress(BadRequest):
        yield from iter_rows(lines)


def _tell(param: str, name: str, lines: list[int], compared: Compared) -> dict[str, object]:
    count = len(lines)
    listed = ", ".join(str(line) for line in lines[:MAX_LISTED_LINES])
    more = "" if count <= MAX_LISTED_LINES else f" and {count - MAX_LISTED_LINES} more"
    row = "1 row shares" if count == 1 else f"{count:,} rows share"
    text = (
        f"{param}: {row} text with items of {name} ({NGRAM_WORDS} words in a row, or a whole text):"
        f" lines {listed}{more}. What it measures may be learned by heart."
    )
    if not compared.is_whole:
        text += f" Only the first {compared.rows_checked:,} rows were compared."
    return warning(
        OVERLAPS_BENCHMARK,
        text,
        param,
        benchmark=name,
        count=count,
        lines=lines[:MAX_LISTED_LINES],
        rows_checked=compared.rows_checked,
        is_whole=compared.is_whole,
    )
