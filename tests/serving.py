"""The application on a real loopback port, for clients that bring their own HTTP."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from app.db.session import SessionFactory
from app.main import create_app
from app.settings import Settings


@contextmanager
def serving(settings: Settings, session_factory: SessionFactory) -> Iterator[str]:
    """Serves until the block ends; gives the address.

    Args:
        settings: Of a throw-away data directory.
        session_factory: One whose sessions really commit.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(settings, session_factory), log_level="warning", lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
