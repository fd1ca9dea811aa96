"""What routes ask for: a session, the caller with a scope, the process's resources, a way to write once."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from cryptography.fernet import MultiFernet
from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.api.audit import name_place
from app.api.uploads import Upload, discard_body, receive_upload, remove
from app.db.session import SessionFactory, transaction
from app.domain.scopes import Caller, Scope
from app.errors import RetainError, Unauthorized
from app.services.audit import find_trail, sign
from app.services.files import too_large
from app.services.idempotency import (
    Answer,
    Attempt,
    find_answer,
    hash_body,
    parse_key,
    run_once,
)
from app.services.keys import authenticate
from app.services.known_keys import KnownKeys
from app.services.rate_limits import RateLimited, RateLimiter
from app.services.storage import Storage
from app.services.waiting import WaitingRoom
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process makes once."""

    settings: Settings
    session_factory: SessionFactory
    storage: Storage
    cipher: MultiFernet
    limiter: RateLimiter
    known_keys: KnownKeys
    room: WaitingRoom


def get_resources(request: Request) -> Resources:
    """The process's resources."""
    resources: Resources = request.app.state.resources
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]


def get_session(resources: ResourcesDep) -> Iterator[Session]:
    """One transaction; it is committed before the answer goes out, with its entry in the audit log."""
    with transaction(resources.session_factory) as session:
        yield session
        sign(session)


# With the default scope the code after `yield` would run when the answer is already out.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]

bearer = HTTPBearer(auto_error=False, description="An API key: `rt_live_...`")
BearerDep = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def identify(resources: Resources, bearer: str) -> Caller:
    """Whom a key speaks for, by a query; it is known for some seconds then.

    Raises:
        Unauthorized: It is a wrong one.
    """
    known, checked_at = resources.known_keys, resources.known_keys.now()
    with transaction(resources.session_factory) as session:
        caller = authenticate(session, bearer)
    known.keep(bearer, caller, checked_at=checked_at)
    return caller


async def get_caller(request: Request, resources: ResourcesDep, credentials: BearerDep) -> Caller:
    """Whom the request's key speaks for, counted against its limits; mostly without a thread or a query.

    Raises:
        Unauthorized: There is no key, or a wrong one.
        RateLimited: The key or its project sent too many requests in this minute.
    """
    if credentials is None:
        raise Unauthorized("Send an API key: `Authorization: Bearer rt_live_...`.")
    caller = resources.known_keys.find(credentials.credentials)
    if caller is None:
        caller = await run_in_threadpool(identify, resources, credentials.credentials)
    allowance = resources.limiter.take_at_once(caller)
    if allowance is None:
        allowance = await run_in_threadpool(resources.limiter.take, caller)
    request.state.allowance = allowance
    if allowance.is_over:
        raise RateLimited(
            f"The {allowance.scope} has sent its {allowance.limit:,} requests of this minute;"
            f" send again in {allowance.reset_seconds} s."
        )
    trail = find_trail()
    if trail is not None:
        trail.name_caller(caller)
        name_place(request.scope)
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]


def allow(scope: Scope) -> Callable[..., Awaitable[Caller]]:
    """A dependency: the caller, whose key must have a scope."""

    async def get_allowed(caller: CallerDep) -> Caller:
        caller.require(scope)
        return caller

    return get_allowed


async def get_upload(
    request: Request, resources: ResourcesDep, credentials: BearerDep
) -> AsyncIterator[tuple[Caller, Upload]]:
    """The caller and the file that was sent; the key is checked before a byte is kept."""
    try:
        caller = await get_caller(request, resources, credentials)
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

    def replay(self, caller: Caller, body: BaseModel | None) -> JSONResponse | None:
        """The answer that an earlier request with the key got; routes that prepare much ask for it first."""
        attempt = self._attempt(caller, body)
        if attempt is None:
            return None
        done = find_answer(self._resources.session_factory, attempt)
        return None if done is None else _respond(done)

    def run(
        self,
        caller: Caller,
        body: BaseModel | None,
        work: Callable[[Session], BaseModel],
        *,
        hidden: str | None = None,
        status_code: int = 200,
    ) -> JSONResponse:
        """Does the work and answers with what it returns.

        Args:
            caller: Whose key it is.
            body: What was asked for; the same key with another body is refused.
            work: Reads and writes in the session it gets.
            hidden: A field of the answer that is not kept for replays.
            status_code: Of the answer.
        """

        def answer(session: Session) -> dict[str, Any]:
            content = work(session).model_dump(mode="json")
            made = content.get("id")
            sign(session, made if isinstance(made, str) else None, status=status_code)
            return content

        factory, attempt = self._resources.session_factory, self._attempt(caller, body)
        if attempt is None:
            with transaction(factory) as session:
                content = answer(session)
            return JSONResponse(content, status_code=status_code)
        return _respond(run_once(factory, attempt, answer, hidden=hidden, status_code=status_code))

    def _attempt(self, caller: Caller, body: BaseModel | None) -> Attempt | None:
        if self._key is None:
            return None
        sent = None if body is None else body.model_dump(mode="json")
        return Attempt(caller.project_id, self._key, self._route, hash_body(sent))


def _respond(done: Answer) -> JSONResponse:
    headers = {"idempotent-replayed": "true"} if done.is_replay else None
    return JSONResponse(done.body, status_code=done.status_code, headers=headers)


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
KeysAdmin = Annotated[Caller, Depends(allow(Scope.KEYS_ADMIN))]
WebhooksAdmin = Annotated[Caller, Depends(allow(Scope.WEBHOOKS_ADMIN))]
