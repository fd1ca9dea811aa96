"""The file object."""

from typing import Any, Literal

from app.api.schemas.base import Identified, unix, unix_or_none
from app.db.models import File
from app.domain.benchmarks import Subjects
from app.domain.identifiers import public_id
from app.domain.preview import Conversion
from app.services.files import CONVERSION


class FileObject(Identified):
    """An uploaded or produced file.

    `report` is what the line check found. `conversion` says what was done to a file that came as gzip, as an
    array or a table, or in another tool's layout: which rows were dropped and why, and the first rows as they
    became; null for JSON lines that were kept as they came.
    """

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None
    sha256: str
    report: dict[str, Any] | None
    conversion: Conversion | None


def show_file(file: File) -> FileObject:
    """A file as clients see it."""
    return FileObject(
        id=public_id("file", file.id),
        bytes=file.size_bytes,
        created_at=unix(file.created_at),
        expires_at=unix_or_none(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
        status_details=file.status_details,
        sha256=file.sha256,
        report=_show_report(file.report),
        conversion=None if file.report is None else file.report.get(CONVERSION),
    )


def _show_report(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """The check's findings, subjects as their numbers of items."""
    if report is None:
        return None
    report = {key: value for key, value in report.items() if key != CONVERSION}
    if report.get("subjects") is None:
        return report
    return report | {"subjects": Subjects.model_validate(report["subjects"]).counts()}
