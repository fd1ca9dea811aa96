"""Uploads: large files in parts, which a sender that was cut off goes on with."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.api.dependencies import (
    BearerDep,
    FilesReader,
    FilesWriter,
    Resources,
    ResourcesDep,
    SessionDep,
    WriterDep,
    get_caller,
)
from app.api.schemas.uploads import (
    PartedUploadObject,
    PartObject,
    UploadObject,
    show_part,
    show_parted,
    show_upload,
)
from app.api.uploads import Upload, discard_body, receive_upload, remove
from app.db.models import File
from app.db.session import transaction
from app.domain.identifiers import parse_id
from app.domain.scopes import Caller, Scope
from app.domain.uploads import CompleteUpload, CreateUpload
from app.errors import RetainError, TooLarge
from app.services import uploads
from app.services.quotas import check_storage, standard_quotas

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

ID = "upload_id"
#: The body is read by a dependency of its own, so its shape is written out here.
PART_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


class PartFacts(BaseModel):
    """What makes two parts the same."""

    sha256: str


async def get_part(
    upload_id: str, request: Request, resources: ResourcesDep, credentials: BearerDep
) -> AsyncIterator[tuple[Caller, Upload]]:
    """The caller and the part that was sent; key and upload are checked before a byte is kept."""
    try:
        caller = await get_caller(request, resources, credentials)
        caller.require(Scope.FILES_WRITE)
        limit = await run_in_threadpool(_check_takes_parts, resources, caller, upload_id)
    except RetainError:
        await discard_body(request)
        raise
    part = await receive_upload(
        request, _scratch(resources), max_bytes=limit, too_large=_too_large, part="data"
    )
    try:
        yield caller, part
    finally:
        remove(part.path)


PartDep = Annotated[tuple[Caller, Upload], Depends(get_part, scope="function")]


@router.post("", response_model=UploadObject)
def create_upload(
    body: CreateUpload, caller: FilesWriter, resources: ResourcesDep, writer: WriterDep
) -> Response:
    """Announces a file; its parts may come for an hour."""
    limit = resources.settings.max_resumable_bytes
    quotas = standard_quotas(resources.settings)

    def work(session: Session) -> UploadObject:
        check_storage(session, caller.project_id, quotas, added_bytes=body.bytes)
        return show_upload(uploads.create_upload(session, caller.project_id, body, max_bytes=limit))

    return writer.run(caller, body, work)


@router.get("/{upload_id}")
def retrieve_upload(upload_id: str, session: SessionDep, caller: FilesReader) -> PartedUploadObject:
    """An upload with the parts that have come, in their order: where to go on."""
    key = parse_id("upload", upload_id, param=ID)
    upload, parts = uploads.get_upload(session, caller.project_id, key)
    file = None if upload.file_id is None else session.get_one(File, upload.file_id)
    return show_parted(upload, parts, file)


@router.post("/{upload_id}/parts", response_model=PartObject, openapi_extra=PART_FORM)
def add_part(upload_id: str, part: PartDep, resources: ResourcesDep, writer: WriterDep) -> Response:
    """Keeps a part of at most 64 MiB; parts may come at once and in any order."""
    caller, received = part
    key = parse_id("upload", upload_id, param=ID)
    with uploads.store_part(resources.storage, key, received.path) as stored:
        return writer.run(
            caller,
            PartFacts(sha256=stored.stored.sha256),
            lambda session: show_part(uploads.add_part(session, caller.project_id, key, stored)),
        )


@router.post("/{upload_id}/complete", response_model=UploadObject)
def complete_upload(
    upload_id: str,
    body: CompleteUpload,
    caller: FilesWriter,
    resources: ResourcesDep,
    writer: WriterDep,
) -> Response:
    """Puts the parts together and checks the file as a direct upload is checked.

    The same request again gives the same file; a file that is not valid leaves the upload pending.
    """
    key = parse_id("upload", upload_id, param=ID)
    with transaction(resources.session_factory) as session:
        done = uploads.find_completed(session, caller.project_id, key, body)
    if done is not None:
        return writer.run(caller, body, lambda _: show_upload(*done))
    quotas = standard_quotas(resources.settings)
    with uploads.check_assembled(_place(resources), caller.project_id, key, body) as checked:

        def work(session: Session) -> UploadObject:
            added = checked.stored.size_bytes
            check_storage(session, caller.project_id, quotas, added_bytes=added)
            return show_upload(
                *uploads.finish_upload(session, caller.project_id, key, body, checked)
            )

        answer = writer.run(caller, body, work)
    uploads.sweep_uploads(resources.session_factory, resources.storage, upload_id=key)
    return answer


@router.post("/{upload_id}/cancel", response_model=UploadObject)
def cancel_upload(
    upload_id: str, caller: FilesWriter, resources: ResourcesDep, writer: WriterDep
) -> Response:
    """Ends an upload without a file; its parts go."""
    key = parse_id("upload", upload_id, param=ID)
    answer = writer.run(
        caller,
        None,
        lambda session: show_upload(uploads.cancel_upload(session, caller.project_id, key)),
    )
    uploads.sweep_uploads(resources.session_factory, resources.storage, upload_id=key)
    return answer


def _check_takes_parts(resources: Resources, caller: Caller, upload_id: str) -> int:
    key = parse_id("upload", upload_id, param=ID)
    with transaction(resources.session_factory) as session:
        return uploads.check_takes_parts(session, caller.project_id, key)


def _place(resources: Resources) -> uploads.Place:
    return uploads.Place(
        resources.session_factory,
        resources.storage,
        _scratch(resources),
        resources.settings.max_resumable_bytes,
    )


def _scratch(resources: Resources) -> Path:
    return resources.settings.scratch_root / "uploads"


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"data: larger than the limit of {max_bytes:,} bytes a part.", "data")
