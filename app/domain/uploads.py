"""Uploads in parts: their states, their limits and what requests say."""

from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Annotated, Final, Literal
from uuid import UUID

from pydantic import Field

from app.domain.frozen import Frozen
from app.domain.identifiers import parse_id
from app.errors import BadRequest, NotFound

KEPT_SECONDS: Final = 3600
#: A request that began before the expiry may still be reading parts.
GRACE_SECONDS: Final = 1800
MAX_PART_BYTES: Final = 64 * 2**20
MAX_PARTS: Final = 10_000
MIN_EXPIRY_SECONDS: Final = 3600
MAX_EXPIRY_SECONDS: Final = 2_592_000


class UploadStatus(StrEnum):
    """Where an upload stands; only a pending one takes parts."""

    PENDING = "pending"
    COMPLETED = "completed"  # its file exists
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # an hour passed before it was completed


class ExpiresAfter(Frozen):
    """When the file goes by itself."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS)


class CreateUpload(Frozen):
    """`POST /v1/uploads`: announces a file that will come in parts."""

    bytes: int = Field(ge=1, strict=True)
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(min_length=1, max_length=255)  # recorded; contents say what a file is
    purpose: str = Field(
        min_length=1, max_length=64, json_schema_extra={"enum": ["fine-tune", "evals"]}
    )
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Frozen):
    """`POST /v1/uploads/{id}/complete`: which parts make the file, in order."""

    part_ids: tuple[Annotated[str, Field(max_length=128)], ...] = Field(
        min_length=1, max_length=MAX_PARTS
    )
    md5: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{32}$")  # of the whole, in hex


def order_parts(named: Sequence[str], sizes: dict[UUID, int], total_bytes: int) -> list[UUID]:
    """The parts that make a file, in order.

    Args:
        named: Their ids as the request has them.
        sizes: Bytes of each part that the upload has.
        total_bytes: What they have to add up to.

    Raises:
        NotFound: The upload has no such part.
        BadRequest: A part is named twice, or the bytes don't add up.
    """
    keys = [_part_key(text, f"part_ids.{place}", sizes) for place, text in enumerate(named)]
    if len(set(keys)) < len(keys):
        raise BadRequest("part_ids: a part is named twice.", "part_ids")
    sent = sum(sizes[key] for key in keys)
    if sent != total_bytes:
        raise BadRequest(
            f"part_ids: these parts have {sent:,} bytes, and {total_bytes:,} were announced.",
            "part_ids",
            "upload_size_mismatch",
        )
    return keys


def _part_key(text: str, path: str, known: Collection[UUID]) -> UUID:
    try:
        key = parse_id("upload_part", text, param=path)
    except NotFound:
        key = None
    if key is None or key not in known:
        raise NotFound(f"{path}: the upload has no such part.", path, "part_not_found")
    return key
