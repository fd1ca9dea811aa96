"""Files that come in parts: announced, sent piece by piece in any order, put together and checked."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from app.db.models import File, Upload, UploadPart
from app.db.repositories.uploads import UploadRepository
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.domain.uploads import (
    GRACE_SECONDS,
    KEPT_SECONDS,
    MAX_PART_BYTES,
    MAX_PARTS,
    CompleteUpload,
    CreateUpload,
    UploadStatus,
    order_parts,
)
from app.errors import BadRequest, Conflict, NotFound, TooLarge
from app.services.files import CheckedFile, NewFile, add_file, check_purpose, store_checked
from app.services.storage import Storage, Stored

ID: Final = "upload_id"


@dataclass(frozen=True, slots=True)
class Place:
    """Where uploads are kept, and how large they may be."""

    factory: SessionFactory
    storage: Storage
    scratch: Path
    max_bytes: int


@dataclass(slots=True)
class StoredPart:
    """A part that lies in the store."""

    stored: Stored
    is_added: bool = False


def create_upload(
    session: Session, project_id: UUID, body: CreateUpload, *, max_bytes: int
) -> Upload:
    """Announces a file; its parts may come for an hour.

    Raises:
        BadRequest: A purpose or name that no file may have.
        TooLarge: It is over the limit.
    """
    check_purpose(body.purpose)
    if body.bytes > max_bytes:
        raise TooLarge(f"bytes: larger than the limit of {max_bytes:,} bytes.", "bytes")
    expires = body.expires_after
    upload = Upload(
        project_id=project_id,
        filename=body.filename,
        purpose=body.purpose,
        mime_type=body.mime_type,
        size_bytes=body.bytes,
        file_expires_seconds=None if expires is None else expires.seconds,
        status=UploadStatus.PENDING,
        expires_at=datetime.now(UTC) + timedelta(seconds=KEPT_SECONDS),
    )
    UploadRepository(session).add(upload)
    return upload


def show_status(upload: Upload) -> UploadStatus:
    """Where an upload stands; one whose hour has passed is expired, whether or not it was swept."""
    is_late = upload.expires_at <= datetime.now(UTC)
    return UploadStatus.EXPIRED if _is_pending(upload) and is_late else upload.status


def get_upload(
    session: Session, project_id: UUID, upload_id: UUID
) -> tuple[Upload, list[UploadPart]]:
    """An upload with the parts it has: what a sender that was cut off goes on from.

    Raises:
        NotFound: The project has no such upload.
    """
    repository = UploadRepository(session)
    upload = repository.get(project_id, upload_id)
    return upload, repository.list_parts(upload_id)


def check_takes_parts(session: Session, project_id: UUID, upload_id: UUID) -> int:
    """How many bytes one part may have, before any of them is read.

    Raises:
        NotFound: The project has no such upload.
        Conflict: It takes no more parts.
    """
    upload = UploadRepository(session).get(project_id, upload_id)
    _require_open(upload)
    return min(MAX_PART_BYTES, upload.size_bytes)


@contextmanager
def store_part(storage: Storage, upload_id: UUID, source: Path) -> Iterator[StoredPart]:
    """Stores a part for the length of a `with` block; unless `add_part` gives it a row, it goes again.

    Raises:
        BadRequest: The part is empty.
    """
    if not source.stat().st_size:
        raise BadRequest("data: the part is empty.", "data")
    part = StoredPart(storage.put_file(source, f"{_directory(upload_id)}/{uuid4().hex}"))
    try:
        yield part
    except BaseException:
        storage.delete(part.stored.path)
        raise
    if not part.is_added:  # the answer was that of an earlier request
        storage.delete(part.stored.path)


def add_part(session: Session, project_id: UUID, upload_id: UUID, part: StoredPart) -> UploadPart:
    """Adds a stored part; a sender that did not see the answer may send it again, and name one of the two.

    Raises:
        NotFound: The project has no such upload.
        Conflict: The upload takes no more parts.
        BadRequest: There are too many.
    """
    repository = UploadRepository(session)
    upload = repository.get(project_id, upload_id, for_update=True)
    _require_open(upload)
    num, size = repository.count_parts(upload_id)
    # Room for every part once more: what was sent again because its answer was lost.
    if num >= MAX_PARTS or size + part.stored.size_bytes > 2 * upload.size_bytes:
        raise BadRequest(
            f"data: the upload has {num:,} parts with {size:,} bytes already, and"
            f" {upload.size_bytes:,} were announced.",
            "data",
            "upload_size_mismatch",
        )
    row = UploadPart(
        upload_id=upload_id,
        size_bytes=part.stored.size_bytes,
        sha256=part.stored.sha256,
        path=part.stored.path,
    )
    repository.add_part(row)
    part.is_added = True
    return row


def find_completed(
    session: Session, project_id: UUID, upload_id: UUID, body: CompleteUpload
) -> tuple[Upload, File] | None:
    """An upload that was completed with the very same parts; None while it is pending.

    Raises:
        NotFound: The project has no such upload.
        Conflict: It was cancelled, has expired, or was completed with other parts.
    """
    upload = UploadRepository(session).get(project_id, upload_id)
    if upload.file_id is not None and upload.part_ids == list(body.part_ids):
        return upload, session.get_one(File, upload.file_id)
    _require_open(upload)
    return None


@contextmanager
def check_assembled(
    place: Place, project_id: UUID, upload_id: UUID, body: CompleteUpload
) -> Iterator[CheckedFile]:
    """Puts the parts together, checks the file and stores it for the length of a `with` block.

    No transaction is open meanwhile: add the file by `finish_upload` inside the block.

    Raises:
        NotFound: No such upload or part.
        Conflict: The upload is not pending.
        BadRequest: Bytes or digest differ from what was said, or the file is not valid.
    """
    with transaction(place.factory) as session:
        repository = UploadRepository(session)
        upload = repository.get(project_id, upload_id)
        _require_open(upload)
        parts = {part.id: part for part in repository.list_parts(upload_id)}
    sizes = {key: part.size_bytes for key, part in parts.items()}
    keys = order_parts(body.part_ids, sizes, upload.size_bytes)
    place.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.scratch, prefix="assembled-") as name:
        path = Path(name) / "file"
        try:
            md5 = _put_together(place.storage, [parts[key] for key in keys], path)
        except NotFound:  # swept, or cancelled, between the look and the read
            raise Conflict("The upload's parts are gone.", ID, "upload_not_pending") from None
        if body.md5 is not None and md5 != body.md5.lower():
            raise BadRequest(
                "md5: the parts in this order have another digest.", "md5", "md5_mismatch"
            )
        new = NewFile(path, upload.filename, upload.purpose, upload.file_expires_seconds)
        with store_checked(
            place.storage, new, max_bytes=place.max_bytes, scratch=place.scratch
        ) as checked:
            yield checked


def finish_upload(
    session: Session,
    project_id: UUID,
    upload_id: UUID,
    body: CompleteUpload,
    checked: CheckedFile,
) -> tuple[Upload, File]:
    """Makes the file of a pending upload; whoever comes second with the same parts gets the first one's.

    Raises:
        Conflict: The upload was cancelled or swept meanwhile, or completed with other parts.
    """
    upload = UploadRepository(session).get(project_id, upload_id, for_update=True)
    if upload.file_id is not None and upload.part_ids == list(body.part_ids):
        return upload, session.get_one(File, upload.file_id)
    if not _is_pending(upload):
        raise _refuse(upload)
    file = add_file(session, project_id, checked)
    upload.status = UploadStatus.COMPLETED
    upload.part_ids = list(body.part_ids)
    upload.file_id = file.id
    session.flush()
    return upload, file


def cancel_upload(session: Session, project_id: UUID, upload_id: UUID) -> Upload:
    """Ends an upload without a file; cancelling again changes nothing.

    Raises:
        NotFound: The project has no such upload.
        Conflict: It is completed or has expired.
    """
    upload = UploadRepository(session).get(project_id, upload_id, for_update=True)
    if upload.status is not UploadStatus.CANCELLED:
        _require_open(upload)
        upload.status = UploadStatus.CANCELLED
        session.flush()
    return upload


def sweep_uploads(
    factory: SessionFactory, storage: Storage, *, upload_id: UUID | None = None
) -> int:
    """Removes the parts of uploads that have ended or ran out; how many uploads.

    The contents go before the rows: a sweep that breaks off is made good by the next one.
    """
    cleared = 0
    while True:
        with transaction(factory) as session:
            repository = UploadRepository(session)
            found = repository.lock_ended(grace_seconds=GRACE_SECONDS, upload_id=upload_id)
            for upload in found:
                storage.delete(_directory(upload.id))
                repository.forget_parts(upload)
        cleared += len(found)
        if not found or upload_id is not None:
            return cleared


def _put_together(storage: Storage, parts: Sequence[UploadPart], target: Path) -> str:
    """Writes the parts one after the other; the MD5 of the whole."""
    digest = hashlib.md5(usedforsecurity=False)
    with target.open("wb") as file:
        for part in parts:
            for chunk in storage.iter_chunks(part.path):
                digest.update(chunk)
                file.write(chunk)
    return digest.hexdigest()


def _directory(upload_id: UUID) -> str:
    return f"uploads/{upload_id.hex}"


def _is_pending(upload: Upload) -> bool:
    return upload.status is UploadStatus.PENDING


def _require_open(upload: Upload) -> None:
    if show_status(upload) is not UploadStatus.PENDING:
        raise _refuse(upload)


def _refuse(upload: Upload) -> Conflict:
    status = show_status(upload)
    name = public_id("upload", upload.id)
    return Conflict(f"upload_id: {name} is {status}.", ID, "upload_not_pending")
