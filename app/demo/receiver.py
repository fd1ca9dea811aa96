"""A platform's webhook receiver: checks each signature and keeps what arrived."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

MAX_BODY_BYTES = 2**20


class Receiver:
    """Listens on a free loopback port while the context lasts.

    Args:
        on_event: Called from another thread with each new event whose signature is right.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self.events: dict[
            str, dict[str, Any]
        ] = {}  # by webhook-id: a repeated delivery counts once
        self.num_refused = 0
        self._on_event = on_event
        self._webhook: Webhook | None = None
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            """Passes POSTs on, and says nothing in the terminal."""

            def do_POST(self) -> None:
                """Answers 204, or 400 for what is not signed as agreed."""
                size = min(int(self.headers.get("content-length") or 0), MAX_BODY_BYTES)
                accepted = receiver.take(self.rfile.read(size), dict(self.headers.items()))
                self.send_response(204 if accepted else 400)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Where events are to be sent."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/hooks"

    def trust(self, secret: str) -> None:
        """Accepts events signed with this secret from now on."""
        self._webhook = Webhook(secret)

    def take(self, body: bytes, headers: dict[str, str]) -> bool:
        """Whether the delivery was signed as agreed; a new one is kept and reported."""
        lowered = {name.lower(): value for name, value in headers.items()}
        if not self._is_signed(body, lowered):
            with self._lock:
                self.num_refused += 1
            return False
        event: dict[str, Any] = json.loads(body)
        with self._lock:
            is_new = lowered["webhook-id"] not in self.events
            self.events[lowered["webhook-id"]] = event
        if is_new:
            self._on_event(event)
        return True

    def _is_signed(self, body: bytes, headers: dict[str, str]) -> bool:
        if self._webhook is None:
            return False
        try:
            self._webhook.verify(body, headers)
        except WebhookVerificationError:
            return False
        return True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
