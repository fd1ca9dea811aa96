"""The application on a real loopback port, for clients that bring their own HTTP."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from app.db.models import Project
from app.db.session import SessionFactory
from app.domain.scopes import DEFAULT_SCOPES
from app.main import create_app
from app.services.keys import create_key
from app.services.storage import Storage
from app.settings import Settings
from tests.external import store_benchmark
from tests.factories import make_project


@contextmanager
def serving(settings: Settings, session_factory: SessionFactory) -> Iterator[str]:
    """Serves until the block ends; gives the address.

    Args:
        settings: Of a throw-away data directory.
        session_factory: One whose sessions really commit.
    """
    with serving_app(create_app(settings, session_factory)) as url:
        yield url


@contextmanager
def serving_app(app: FastAPI) -> Iterator[str]:
    """Serves an application until the block ends; gives the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)  # who connects before the server is up waits
        config = uvicorn.Config(app, log_level="warning", lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            app.state.resources.room.close()  # in a process of its own a signal does it
            thread.join(timeout=20)


def make_caller(session_factory: SessionFactory, settings: Settings) -> tuple[Project, str]:
    """A project whose benchmark `general` lies in the store, and a key of it."""
    with session_factory() as session:
        project = make_project(session)
        key = create_key(session, project_id=project.id, name="key", scopes=DEFAULT_SCOPES).text
        store_benchmark(session, Storage(settings.storage_root), project)
        session.commit()
        return project, key
