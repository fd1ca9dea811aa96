"""Files: checked line by line before anything is kept, stored, listed and deleted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from app.db.models import File
from app.db.repositories.files import FileRepository
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import Scorer
from app.domain.jsonlines import number_lines, parse_object, read_lines
from app.domain.rows import check_items, check_rows
from app.errors import BadRequest, Conflict, TooLarge
from app.services.audit import sign
from app.services.ingest import ingest
from app.services.storage import Storage, Stored

FINE_TUNE: Final = "fine-tune"  # training rows
EVALS: Final = "evals"  # items of a benchmark
RESULTS: Final = "fine-tune-results"  # made by the server
UPLOAD_PURPOSES: Final = (FINE_TUNE, EVALS)
PROCESSED: Final = "processed"
CONVERSION: Final = "conversion"  # the part of a report that says what was done to a file
MAX_FILENAME: Final = 255
SWEPT_AT_ONCE: Final = 20  # in one transaction


@dataclass(frozen=True, slots=True)
class NewFile:
    """What is to be kept as a file: a local path, and what its sender said of it."""

    source: Path
    filename: str
    purpose: str
    expires_seconds: int | None = None


@dataclass(slots=True)
class CheckedFile:
    """A file that was checked and lies in the store; it goes again unless a row is added for it."""

    new: NewFile
    stored: Stored
    report: dict[str, Any]
    is_added: bool = False


@contextmanager
def store_checked(
    storage: Storage, new: NewFile, *, max_bytes: int, scratch: Path | None = None
) -> Iterator[CheckedFile]:
    """Checks a file and stores it for the length of a `with` block; whatever fails, nothing of it stays.

    Gzip is taken apart, and arrays, tables and rows of other tools become JSON lines: those are what is kept.
    No transaction is open while the file is read: add its row by `add_file` inside the block.

    Args:
        storage: Where it is kept.
        new: The file.
        max_bytes: As it came, and as it is kept.
        scratch: Where temporary files are made; None: the system's place.

    Raises:
        BadRequest: A bad purpose, name or line; the message names line and field.
        TooLarge: The file is over the limit.
    """
    check_purpose(new.purpose)
    if not 1 <= len(new.filename) <= MAX_FILENAME or "\0" in new.filename:
        raise BadRequest(f"file: its name must have 1 to {MAX_FILENAME} characters.", "file")
    if new.source.stat().st_size > max_bytes:
        raise too_large(max_bytes)
    converts = new.purpose == FINE_TUNE
    with ingest(new.source, max_bytes=max_bytes, converts=converts, scratch=scratch) as found:
        report = check_contents(found.path, new.purpose)
        if found.conversion is not None:
            report[CONVERSION] = found.conversion.model_dump(mode="json")
        stored = storage.put_file(found.path, f"files/{uuid4().hex}")
    checked = CheckedFile(new, stored, report)
    try:
        yield checked
    except BaseException:
        storage.delete(checked.stored.path)
        raise
    if not checked.is_added:  # the answer was that of an earlier request
        storage.delete(checked.stored.path)


def add_file(session: Session, project_id: UUID | None, checked: CheckedFile) -> File:
    """Adds the row of a checked file, in the caller's transaction: the operator's when there is no project."""
    file = File(
        project_id=project_id,
        filename=checked.new.filename,
        purpose=checked.new.purpose,
        size_bytes=checked.stored.size_bytes,
        sha256=checked.stored.sha256,
        path=checked.stored.path,
        status=PROCESSED,
        report=checked.report,
    )
    if checked.new.expires_seconds is not None:
        file.expires_at = datetime.now(UTC) + timedelta(seconds=checked.new.expires_seconds)
    FileRepository(session).add(file)
    checked.is_added = True
    return file


def check_purpose(purpose: str) -> None:
    """Refuses a purpose that clients may not upload for.

    Raises:
        BadRequest: It is none of them.
    """
    if purpose not in UPLOAD_PURPOSES:
        raise BadRequest(
            f"purpose: '{purpose[:80]}' is not one of {', '.join(UPLOAD_PURPOSES)}.", "purpose"
        )


def check_contents(source: Path, purpose: str) -> dict[str, Any]:
    """Reads a file of training rows or of benchmark items line by line and says what it holds.

    Returns:
        `format` (of rows, or the scorer of items) and `num_rows`, with whatever else the check found.

    Raises:
        BadRequest: The first bad line.
    """
    with source.open("rb") as file:
        if purpose == FINE_TUNE:
            rows = check_rows(read_lines(file), param="file")
            return rows.model_dump(mode="json")
        scorer = _guess_scorer(file)
        file.seek(0)
        items = check_items(read_lines(file), scorer, param="file")
        return items.model_dump(mode="json") | {
            "format": items.scorer.value,
            "num_rows": items.num_items,
        }


def too_large(max_bytes: int) -> TooLarge:
    """The error of a file over the limit."""
    return TooLarge(f"file: larger than the limit of {max_bytes:,} bytes.", "file")


def get_file(session: Session, project_id: UUID, file_id: UUID) -> File:
    """One file.

    Raises:
        NotFound: The project has no such file.
    """
    return FileRepository(session).get(project_id, file_id)


def list_files(
    session: Session,
    project_id: UUID,
    *,
    purpose: str | None = None,
    after: UUID | None = None,
    limit: int = 10_000,
    is_newest_first: bool = True,
) -> tuple[list[File], bool]:
    """A page of files, and whether there are more.

    Raises:
        NotFound: `after` is not a file of the project.
    """
    repository = FileRepository(session)
    last = None if after is None else repository.get(project_id, after, param="after")
    found = repository.list_page(
        project_id,
        purpose=purpose,
        after=last,
        limit=limit + 1,
        is_newest_first=is_newest_first,
    )
    return found[:limit], len(found) > limit


def delete_file(factory: SessionFactory, storage: Storage, project_id: UUID, file_id: UUID) -> None:
    """Deletes a file; its contents go once the deletion is committed.

    Raises:
        NotFound: The project has no such file.
        Conflict: A job that has not ended, a benchmark or a base model still needs it.
    """
    with transaction(factory) as session:
        repository = FileRepository(session)
        file = repository.get(project_id, file_id, for_update=True)
        use = repository.find_use(file)
        if use is not None:
            raise Conflict(f"The file is in use by {use}.", "file_id", "file_in_use")
        repository.mark_deleted(file)
        sign(session)
    storage.delete(file.path)


def sweep_expired(factory: SessionFactory, storage: Storage) -> int:
    """Deletes files whose time is over, unless something still needs them; how many.

    The contents go before the row is marked: a sweep that breaks off is made good by the next one.
    """
    deleted = last = 0
    while True:
        with transaction(factory) as session:
            repository = FileRepository(session)
            found = repository.lock_expired(after_seq=last, limit=SWEPT_AT_ONCE)
            for file in found:
                if repository.find_use(file) is None:
                    storage.delete(file.path)
                    repository.mark_deleted(file)
                    deleted += 1
                last = file.seq
        if not found:
            return deleted


def _guess_scorer(file: BinaryIO) -> Scorer:
    """The scorer that a benchmark file's first item is written for."""
    for number, line in number_lines(read_lines(file), param="file"):
        item = parse_object(line, line_number=number, param="file")
        if "choices" in item:
            return Scorer.MULTIPLE_CHOICE
        return Scorer.EXACT_MATCH if "question" in item else Scorer.NLL
    raise BadRequest("file: the file has no items", "file", "invalid_row")
