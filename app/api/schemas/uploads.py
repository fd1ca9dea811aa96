"""The upload object and its parts."""

from collections.abc import Sequence
from typing import Literal

from app.api.schemas.base import Identified, unix
from app.api.schemas.files import FileObject, show_file
from app.db.models import File, Upload, UploadPart
from app.domain.identifiers import public_id
from app.domain.uploads import UploadStatus
from app.services.uploads import show_status


class PartObject(Identified):
    """A part of an upload."""

    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int
    sha256: str


class UploadObject(Identified):
    """A file that comes in parts; `file` is there once it is completed."""

    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    mime_type: str
    purpose: str
    status: UploadStatus
    file: FileObject | None


class PartedUploadObject(UploadObject):
    """An upload with the parts that have come."""

    parts: list[PartObject]


def show_part(part: UploadPart) -> PartObject:
    """A part as clients see it."""
    return PartObject(
        id=public_id("upload_part", part.id),
        created_at=unix(part.created_at),
        upload_id=public_id("upload", part.upload_id),
        bytes=part.size_bytes,
        sha256=part.sha256,
    )


def show_upload(upload: Upload, file: File | None = None) -> UploadObject:
    """An upload as clients see it."""
    return UploadObject(
        id=public_id("upload", upload.id),
        bytes=upload.size_bytes,
        created_at=unix(upload.created_at),
        expires_at=unix(upload.expires_at),
        filename=upload.filename,
        mime_type=upload.mime_type,
        purpose=upload.purpose,
        status=show_status(upload),
        file=None if file is None else show_file(file),
    )


def show_parted(
    upload: Upload, parts: Sequence[UploadPart], file: File | None
) -> PartedUploadObject:
    """An upload with its parts as clients see it."""
    shown = show_upload(upload, file)
    return PartedUploadObject(**dict(shown), parts=[show_part(part) for part in parts])
