"""`retain up`: everything in one command, until interrupted."""

import signal
import socket
import threading
from types import FrameType
from typing import Annotated

import typer

from app.cli.operator import DataDir, settings_for
from app.cli.output import show, tell
from app.db.session import build_engine, build_session_factory, transaction
from app.embedded import EmbeddedServices
from app.embedded.processes import find_free_port
from app.embedded.schema import upgrade
from app.embedded.stack import Stack
from app.errors import Unavailable
from app.services.keys import DEFAULT_PROJECT, ensure_project, list_keys
from app.services.logs import configure_logging
from app.settings import Settings


def up(
    data_dir: DataDir = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port to listen on; 0 takes a free one. [default: 8000]"
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=0, max=64, help="Worker processes; each has the node's GPUs, or one CPU slot."
        ),
    ] = 1,
) -> None:
    """Run the whole stack: Postgres, Redis, API, control loops and workers.

    Prints one line `ready http://HOST:PORT` when it can serve. Ctrl-C or SIGTERM stops it; twice, at once.
    RETAIN_DATABASE_URL and RETAIN_REDIS_URL replace the embedded servers. Logs are in DATA_DIR/logs.
    """
    settings = settings_for(data_dir)
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update=given)
    configure_logging(settings)
    stop = threading.Event()
    stack: Stack | None = None

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set() and stack is not None:
            stack.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    listen_on = _choose_port(settings)
    services = EmbeddedServices(
        settings.data_dir, database_url=settings.database_url, redis_url=settings.redis_url
    )
    endpoints = services.start()
    try:
        upgrade(endpoints.database_url)
        _welcome(endpoints.database_url)
        stack = Stack(services, endpoints, settings, port=listen_on, num_workers=workers)
        stack.run(stop, announce=lambda url: show(f"ready {url}"))
    finally:
        services.stop()


def _choose_port(settings: Settings) -> int:
    if settings.port == 0:
        return find_free_port(settings.host)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        raise Unavailable(
            f"Cannot listen on {settings.host} port {settings.port}: {error.strerror}. Choose another --port,"
            " or 0 for a free one."
        ) from None
    return settings.port


def _welcome(database_url: str) -> None:
    engine = build_engine(database_url, application="retain-cli")
    try:
        with transaction(build_session_factory(engine)) as session:
            ensure_project(session, DEFAULT_PROJECT)
            has_keys = bool(list_keys(session))
    finally:
        engine.dispose()
    if not has_keys:
        tell(
            "No API key exists yet. Make the first one, in another terminal, with: retain keys create NAME"
        )
