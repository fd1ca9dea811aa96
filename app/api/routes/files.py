"""Files: uploaded, listed, read and deleted."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.api.dependencies import (
    FilesReader,
    FilesWriter,
    ResourcesDep,
    SessionDep,
    UploadDep,
    WriterDep,
)
from app.api.paging import After, parse_after
from app.api.schemas.base import Deleted, Page, build_page
from app.api.schemas.files import FileObject, show_file
from app.domain.identifiers import parse_id, public_id
from app.errors import BadRequest
from app.services import files
from app.services.quotas import check_storage, standard_quotas

router = APIRouter(prefix="/v1/files", tags=["files"])

MIN_EXPIRY_SECONDS = 3600
MAX_EXPIRY_SECONDS = 2_592_000

#: The body is read by a dependency of its own, so its shape is written out here.
UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.UPLOAD_PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": MIN_EXPIRY_SECONDS,
                            "maximum": MAX_EXPIRY_SECONDS,
                        },
                    },
                }
            }
        },
    }
}


class UploadFacts(BaseModel):
    """What makes two uploads the same."""

    sha256: str
    filename: str
    purpose: str
    expires_seconds: int | None


@router.post("", response_model=FileObject, openapi_extra=UPLOAD_FORM)
def upload_file(upload: UploadDep, resources: ResourcesDep, writer: WriterDep) -> Response:
    """Checks a file line by line and keeps it as JSON lines; an error names line and field.

    Taken are JSON lines, one JSON array, and Parquet (`messages`, `prompt` with `completion`, or `text`), each
    also as gzip, and the layouts of ShareGPT and Alpaca; `conversion` says what was done and which rows were
    dropped.
    """
    caller, received = upload
    new = files.NewFile(
        source=received.path,
        filename=received.filename,
        purpose=_purpose(received.fields),
        expires_seconds=_expiry(received.fields),
    )
    limit = resources.settings.max_upload_bytes
    scratch = resources.settings.scratch_root / "uploads"
    with files.store_checked(resources.storage, new, max_bytes=limit, scratch=scratch) as checked:
        facts = UploadFacts(
            sha256=checked.stored.sha256,
            filename=new.filename,
            purpose=new.purpose,
            expires_seconds=new.expires_seconds,
        )

        def work(session: Session) -> FileObject:
            added, quotas = checked.stored.size_bytes, standard_quotas(resources.settings)
            check_storage(session, caller.project_id, quotas, added_bytes=added)
            return show_file(files.add_file(session, caller.project_id, checked))

        return writer.run(caller, facts, work)


@router.get("")
def list_files(
    session: SessionDep,
    caller: FilesReader,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The project's files."""
    found, has_more = files.list_files(
        session,
        caller.project_id,
        purpose=purpose,
        after=parse_after("file", after),
        limit=limit,
        is_newest_first=order == "desc",
    )
    return build_page([show_file(file) for file in found], has_more=has_more)


@router.get("/{file_id}")
def retrieve_file(file_id: str, session: SessionDep, caller: FilesReader) -> FileObject:
    """One file."""
    key = parse_id("file", file_id, param="file_id")
    return show_file(files.get_file(session, caller.project_id, key))


@router.get("/{file_id}/content", response_class=StreamingResponse)
def read_file(
    file_id: str, session: SessionDep, caller: FilesReader, resources: ResourcesDep
) -> StreamingResponse:
    """A file's bytes."""
    key = parse_id("file", file_id, param="file_id")
    file = files.get_file(session, caller.project_id, key)
    return StreamingResponse(
        resources.storage.iter_chunks(file.path),
        media_type="application/octet-stream",
        headers={"content-length": str(file.size_bytes)},
    )


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: FilesWriter, resources: ResourcesDep) -> Deleted:
    """Deletes a file that nothing needs any more."""
    key = parse_id("file", file_id, param="file_id")
    files.delete_file(resources.session_factory, resources.storage, caller.project_id, key)
    return Deleted(id=public_id("file", key), object="file")


def _purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose is None:
        raise BadRequest("purpose: the form has no field of this name.", "purpose")
    return purpose


def _expiry(fields: dict[str, str]) -> int | None:
    text = fields.get("expires_after[seconds]")
    if text is None:
        return None
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise BadRequest(
            "expires_after.anchor: only 'created_at' is known.", "expires_after.anchor"
        )
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not is_number or not MIN_EXPIRY_SECONDS <= int(text) <= MAX_EXPIRY_SECONDS:
        raise BadRequest(
            f"expires_after.seconds: give {MIN_EXPIRY_SECONDS} to {MAX_EXPIRY_SECONDS}.",
            "expires_after.seconds",
        )
    return int(text)
