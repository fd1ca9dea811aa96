"""Queries on uploads and their parts."""

from uuid import UUID

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from app.db.models import Upload, UploadPart
from app.domain.uploads import UploadStatus
from app.errors import NotFound

ENDED = (UploadStatus.COMPLETED, UploadStatus.CANCELLED, UploadStatus.EXPIRED)


class UploadRepository:
    """Uploads of a project."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, upload: Upload) -> None:
        """Keeps a new upload's row."""
        self._session.add(upload)
        self._session.flush()
        self._session.refresh(upload)

    def get(self, project_id: UUID, upload_id: UUID, *, for_update: bool = False) -> Upload:
        """The upload with this id.

        Raises:
            NotFound: The project has no such upload.
        """
        query = select(Upload).where(Upload.project_id == project_id, Upload.id == upload_id)
        if for_update:
            query = query.with_for_update().execution_options(populate_existing=True)
        upload = self._session.scalar(query)
        if upload is None:
            raise NotFound("upload_id: no upload of the project has this id.", "upload_id")
        return upload

    def add_part(self, part: UploadPart) -> None:
        """Keeps a new part's row."""
        self._session.add(part)
        self._session.flush()
        self._session.refresh(part)

    def list_parts(self, upload_id: UUID) -> list[UploadPart]:
        """The parts in the order in which they came."""
        query = select(UploadPart).where(UploadPart.upload_id == upload_id)
        return list(self._session.scalars(query.order_by(UploadPart.seq)))

    def count_parts(self, upload_id: UUID) -> tuple[int, int]:
        """How many parts there are, and their bytes."""
        query = select(func.count(), func.coalesce(func.sum(UploadPart.size_bytes), 0))
        num, size = self._session.execute(query.where(UploadPart.upload_id == upload_id)).one()
        return int(num), int(size)

    def lock_ended(
        self, *, grace_seconds: float, upload_id: UUID | None = None, limit: int = 20
    ) -> list[Upload]:
        """Uploads that have ended, or ran out so long ago, and whose parts are still there.

        Args:
            grace_seconds: After the expiry.
            upload_id: This one alone.
            limit: So many at most.
        """
        ran_out = Upload.expires_at < func.clock_timestamp() - func.make_interval(
            0, 0, 0, 0, 0, 0, grace_seconds
        )
        query = select(Upload).where(
            Upload.cleared_at.is_(None), or_(Upload.status.in_(ENDED), ran_out)
        )
        if upload_id is not None:
            query = query.where(Upload.id == upload_id)
        query = query.order_by(Upload.expires_at).limit(limit).with_for_update(skip_locked=True)
        return list(self._session.scalars(query.execution_options(populate_existing=True)))

    def forget_parts(self, upload: Upload) -> None:
        """Removes the rows of an upload's parts; a pending upload has expired by that."""
        self._session.execute(delete(UploadPart).where(UploadPart.upload_id == upload.id))
        if upload.status is UploadStatus.PENDING:
            upload.status = UploadStatus.EXPIRED
        upload.cleared_at = func.clock_timestamp()
        self._session.flush()
