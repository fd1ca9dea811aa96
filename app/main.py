"""The HTTP server's wiring; nothing happens at import."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

from cryptography.fernet import MultiFernet
from fastapi import FastAPI

from app.api.audit import AuditTrail
from app.api.dependencies import Resources
from app.api.errors import install_error_handlers
from app.api.limits import BodyLimits, RequestFrame
from app.api.openapi import install_openapi, operation_id
from app.api.routes import (
    audit_log,
    benchmarks,
    decisions,
    estimates,
    files,
    health,
    jobs,
    keys,
    models,
    monitors,
    projects,
    registered_models,
    results,
    runs,
    uploads,
    webhook_deliveries,
    webhooks,
)
from app.db.session import SessionFactory, build_engine, build_session_factory
from app.services.ciphers import load_cipher
from app.services.known_keys import KnownKeys
from app.services.logs import configure_logging
from app.services.rate_limits import RateLimiter
from app.services.storage import Storage
from app.services.waiting import WaitingRoom
from app.settings import Settings, load_settings
from app.web import build_router

#: One process serves so many requests at once from threads; each holds at most one connection.
POOL_SIZE = 15
RESULTS_PATHS = ("/v1/benchmark_results", "/v1/runs/*/baseline", "/v1/runs/*/evaluations")
MAX_RESULTS_BYTES = 16 * 2**20  # hundreds of thousands of items' scores


def create_app(
    settings: Settings, session_factory: SessionFactory, *, cipher: MultiFernet | None = None
) -> FastAPI:
    """The application over a database; storage and the secrets' key come from the settings."""
    room = WaitingRoom(session_factory)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        room.start()
        with closing_at_signal(room):
            yield
        room.stop()

    app = FastAPI(
        lifespan=lifespan,
        title="Retain",
        version="0.1.0",
        docs_url=None,  # the page that FastAPI brings loads its scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs_enabled else None,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
    )
    app.state.resources = Resources(
        settings=settings,
        session_factory=session_factory,
        storage=Storage(settings.storage_root),
        cipher=load_cipher(settings) if cipher is None else cipher,
        limiter=RateLimiter(settings),
        known_keys=KnownKeys(settings.key_cache_seconds),
        room=room,
    )
    install_error_handlers(app)
    for noun in (
        files,
        uploads,
        jobs,
        estimates,
        models,
        registered_models,
        monitors,
        benchmarks,
        results,
        runs,
        decisions,
        webhooks,
        webhook_deliveries,
        keys,
        projects,
        audit_log,
        health,
    ):
        app.include_router(noun.router)
    app.include_router(build_router(with_docs=settings.docs_enabled))
    install_openapi(app)
    app.add_middleware(AuditTrail)
    app.add_middleware(
        BodyLimits,
        max_bytes=settings.max_json_bytes,
        larger=dict.fromkeys(RESULTS_PATHS, max(settings.max_json_bytes, MAX_RESULTS_BYTES)),
    )
    app.add_middleware(RequestFrame)  # added last, so outermost
    return app


def create_app_from_environment() -> FastAPI:
    """The application as `uvicorn --factory` starts it, from `RETAIN_*` variables."""
    settings = load_settings()
    configure_logging(settings)
    if settings.database_url is None:
        raise RuntimeError("RETAIN_DATABASE_URL is not set; `retain up` sets it for its processes")
    engine = build_engine(settings.database_url, pool_size=POOL_SIZE, application="retain-api")
    app = create_app(settings, build_session_factory(engine))
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def dispose(app: FastAPI) -> AsyncIterator[None]:
        async with serve(app):
            yield
        engine.dispose()

    app.router.lifespan_context = dispose
    return app


@contextmanager
def closing_at_signal(room: WaitingRoom) -> Iterator[None]:
    """Sends those who wait home at the signals that stop the server.

    It tells the application that it stops only when all requests are over; streams would keep it for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def close(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(
            room.close
        )  # not here: the lock may be held by what was interrupted
        then = before[signal.Signals(number)]
        if callable(then):
            then(number, frame)

    for number in before:
        signal.signal(number, close)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
