"""The file object."""

from typing import Any, Literal

from app.api.schemas.base import Identified, unix, unix_or_none
from app.db.models import File
from app.domain.benchmarks import Subjects
from app.domain.identifiers import public_id


class FileObject(Identified):
    """An uploaded or produced file; `report` is what the line check found."""

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
    )


def _show_report(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """The check's findings, subjects as their numbers of items."""
    if report is None or report.get("subjects") is None:
        return report
    return report | {"subjects": Subjects.model_validate(report["subjects"]).counts()}
