"""What routes ask for: a session, the caller with a scope, the process's resources, a way to write once."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from cryptography.fernet import MultiFernet
from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.api.uploads import Upload, discard_body, receive_upload, remove
from app.db.session import SessionFactory, transaction
from app.domain.scopes import Caller, Scope
from app.errors import RetainError, Unauthorized
from app.services.files import too_large
from app.services.idempotency import Attempt, hash_body, parse_key, run_once
from app.services.keys import authenticate
from app.services.storage import Storage
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process makes once."""

    settings: Settings
    session_factory: SessionFactory
    storage: Storage
    cipher: MultiFernet


def get_resources(request: Request) -> Resources:
    """The process's resources."""
    resources: Resources = request.app.state.resources
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]


def get_session(resources: ResourcesDep) -> Iterator[Session]:
    """One transaction; it is committed before the answer goes out."""
    with transaction(resources.session_factory) as session:
        yield session


# With the default scope the code after `yield` would run when the answer is already out.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]

bearer = HTTPBearer(auto_error=False, description="An API key: `rt_live_...`")
BearerDep = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def identify(resources: Resources, credentials: HTTPAuthorizationCredentials | None) -> Caller:
    """Whom the request's key speaks for.

    Raises:
        Unauthorized: There is no key, or a wrong one.
    """
    if credentials is None:
        raise Unauthorized("Send an API key: `Authorization: Bearer rt_live_...`.")
    with transaction(resources.session_factory) as session:
        return authenticate(session, credentials.credentials)


def allow(scope: Scope) -> Callable[..., Caller]:
    """A dependency: the caller, whose key must have a scope."""

    def get_caller(resources: ResourcesDep, credentials: BearerDep) -> Caller:
        caller = identify(resources, credentials)
        caller.require(scope)
        return caller

    return get_caller


async def get_upload(
    request: Request, resources: ResourcesDep, credentials: BearerDep
) -> AsyncIterator[tuple[Caller, Upload]]:
    """The caller and the file that was sent; the key is checked before a byte is kept."""
    try:
        caller = await run_in_threadpool(identify, resources, credentials)
        caller.require(Scope.FILES_WRITE)
    except RetainError:
        await discard_body(request)
        raise
    upload = await receive_upload(
        request,
        resources.settings.scratch_root / "uploads",
        max_bytes=resources.settings.max_upload_bytes,
        too_large=too_large,
    )
    try:
        yield caller, upload
    finally:
        remove(upload.path)


UploadDep = Annotated[tuple[Caller, Upload], Depends(get_upload, scope="function")]


class Writer:
    """Runs a route's work in one transaction, once per Idempotency-Key, and answers when it is committed."""

    def __init__(self, request: Request, resources: Resources, key: str | None) -> None:
        self._route = f"{request.method} {request.url.path}"
        self._resources = resources
        self._key = key

    def run(
        self,
        caller: Caller,
        body: BaseModel | None,
        work: Callable[[Session], BaseModel],
        *,
        hidden: str | None = None,
    ) -> JSONResponse:
        """Does the work and answers 200 with what it returns.

        Args:
            caller: Whose key it is.
            body: What was asked for; the same key with another body is refused.
            work: Reads and writes in the session it gets.
            hidden: A field of the answer that is not kept for replays.
        """

        def answer(session: Session) -> dict[str, Any]:
            return work(session).model_dump(mode="json")

        if self._key is None:
            with transaction(self._resources.session_factory) as session:
                content = answer(session)
            return JSONResponse(content)
        sent = None if body is None else body.model_dump(mode="json")
        attempt = Attempt(caller.project_id, self._key, self._route, hash_body(sent))
        done = run_once(self._resources.session_factory, attempt, answer, hidden=hidden)
        return JSONResponse(
            done.body, headers={"idempotent-replayed": "true"} if done.is_replay else None
        )


def get_writer(
    request: Request,
    resources: ResourcesDep,
    idempotency_key: Annotated[str | None, Header(max_length=512)] = None,
) -> Writer:
    """The request's writer."""
    return Writer(request, resources, parse_key(idempotency_key))


WriterDep = Annotated[Writer, Depends(get_writer)]
JobsReader = Annotated[Caller, Depends(allow(Scope.JOBS_READ))]
JobsWriter = Annotated[Caller, Depends(allow(Scope.JOBS_WRITE))]
FilesReader = Annotated[Caller, Depends(allow(Scope.FILES_READ))]
FilesWriter = Annotated[Caller, Depends(allow(Scope.FILES_WRITE))]
ModelsReader = Annotated[Caller, Depends(allow(Scope.MODELS_READ))]
ModelsWriter = Annotated[Caller, Depends(allow(Scope.MODELS_WRITE))]
BenchmarksReader = Annotated[Caller, Depends(allow(Scope.BENCHMARKS_READ))]
BenchmarksWriter = Annotated[Caller, Depends(allow(Scope.BENCHMARKS_WRITE))]
ResultsReader = Annotated[Caller, Depends(allow(Scope.RESULTS_READ))]
ResultsWriter = Annotated[Caller, Depends(allow(Scope.RESULTS_WRITE))]
ResultsActor = Annotated[Caller, Depends(allow(Scope.RESULTS_ACT))]
WebhooksAdmin = Annotated[Caller, Depends(allow(Scope.WEBHOOKS_ADMIN))]
