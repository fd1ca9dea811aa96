"""A job's data looked at when it is submitted: lengths, repeated rows, and what validation shares with training."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final
from uuid import UUID

from app.db.models import BaseModel, File
from app.db.repositories.files import FileRepository
from app.db.session import SessionFactory, transaction
from app.domain.data_checks import (
    CheckedData,
    DataChecks,
    DataFinding,
    KnownRows,
    find_in_file,
    measure,
)
from app.domain.identifiers import parse_id, public_id
from app.domain.jsonlines import read_lines
from app.domain.preview import Conversion
from app.domain.row_checks import RowChecks
from app.domain.rows import Row, iter_rows
from app.domain.spec import CreateJob
from app.errors import BadRequest, NotFound
from app.services.estimate_rows import guess_bytes_per_token
from app.services.files import CONVERSION, FINE_TUNE
from app.services.storage import Storage

#: Read of a file at most to compare its rows: well under a second, and kept for the next job.
MAX_COMPARED_BYTES: Final = 4_000_000


def find_leaks(
    factory: SessionFactory, storage: Storage, project_id: UUID, body: CreateJob
) -> tuple[DataFinding, ...]:
    """Rows of the validation file that the training file has too.

    No transaction is open while files are read. What is wrong with the request itself is for the submit to say.
    """
    if body.validation_file is None:
        return ()
    named = (("training_file", body.training_file), ("validation_file", body.validation_file))
    stored = []
    with transaction(factory) as session:
        for param, text in named:
            try:
                key = parse_id("file", text, param=param)
                file = FileRepository(session).get(project_id, key, param=param)
            except NotFound:
                return ()  # the submit refuses it
            if file.purpose != FINE_TUNE:
                return ()
            stored += [file.path, file.sha256]
    return _compare(storage, *stored)


def check_data(
    base: BaseModel,
    files: Mapping[str, File],
    *,
    max_seq_length: int,
    leaks: tuple[DataFinding, ...] = (),
) -> DataChecks:
    """What is known of a job's files, from the check of each when it was uploaded.

    Args:
        base: The model whose tokens are estimated.
        files: By the request field that named each.
        max_seq_length: Tokens of a row at most.
        leaks: What comparing files found.
    """
    shown: list[CheckedData] = []
    findings: list[DataFinding] = []
    for param, file in files.items():
        report = file.report or {}
        if "checks" not in report:
            continue  # it came before there were checks
        checks = RowChecks.model_validate(report["checks"])
        measured = measure(
            checks,
            param=param,
            file=public_id("file", file.id),
            num_rows=int(report["num_rows"]),
            bytes_per_token=guess_bytes_per_token(base.details.get("vocab_size")),
            max_seq_length=max_seq_length,
        )
        told = report.get(CONVERSION)
        conversion = None if told is None else Conversion.model_validate(told)
        shown.append(measured)
        findings += find_in_file(checks, measured, conversion)
    return DataChecks(files=tuple(shown), findings=(*findings, *leaks))


@lru_cache(maxsize=256)
def _compare(
    storage: Storage,
    training_path: str,
    training_sha256: str,  # noqa: ARG001 - the key: equal files are compared once
    validation_path: str,
    validation_sha256: str,  # noqa: ARG001
) -> tuple[DataFinding, ...]:
    known = KnownRows(row for _, row in _read_rows(storage, training_path))
    return tuple(known.find_leaks(_read_rows(storage, validation_path), "validation_file"))


def _read_rows(storage: Storage, path: str) -> Iterator[tuple[int, Row]]:
    """The first rows of a stored file, up to a bad one: those are named elsewhere."""
    with contextlib.suppress(BadRequest, NotFound), storage.open(path) as source:
        yield from iter_rows(_take(read_lines(source)))


def _take(lines: Iterator[bytes]) -> Iterator[bytes]:
    left = MAX_COMPARED_BYTES
    for line in lines:
        if left <= 0:
            return
        left -= len(line)
        yield line
