"""Webhook receivers on loopback: what they were sent, and answers as odd as a test wants them."""

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


@dataclass
class Receiver:
    """A server; `answers` are used up one by one, the last one for ever."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.requests]

    def next_answer(self, headers: dict[str, str], body: bytes) -> Answer:
        with self._lock:
            self.requests.append((headers, body))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def ended(self) -> None:
        with self._lock:
            self._now -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    receiver: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.receiver.next_answer(headers, body)
        try:
            answer(self)
        except OSError:
            self.close_connection = True  # the sender hung up, as it should
        finally:
            self.receiver.ended()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


def status(code: int, body: bytes = b"ok", **headers: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def after(seconds: float, then: Answer) -> Answer:
    def answer(handler: Handler) -> None:
        time.sleep(seconds)
        then(handler)

    return answer


def drip(seconds_a_byte: float) -> Answer:
    """A body that comes so slowly that no single read times out."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while True:
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(seconds_a_byte)

    return answer


def endless(handler: Handler) -> None:
    """A body without an end, as fast as it will go."""
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    while True:
        handler.wfile.write(b"y" * 65536)


def endless_headers(handler: Handler) -> None:
    """An answer that never gets to its body."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-Filler: " + b"z" * 8000 + b"\r\n")


def endless_continue(handler: Handler) -> None:
    """Interim answers without a final one."""
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


@contextmanager
def receiving(
    *answers: Answer,
    host: str = "127.0.0.1",
    port: int = 0,
    context: ssl.SSLContext | None = None,
) -> Iterator[Receiver]:
    """A running receiver, on any free port or a given one; without answers it says 200."""
    receiver = Receiver(answers=list(answers) or [status(200)])
    kind: Any = type("BoundHandler", (Handler,), {"receiver": receiver})
    server = ThreadingHTTPServer((host, port), kind)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    scheme = "http" if context is None else "https"
    receiver.url = f"{scheme}://{host}:{server.server_address[1]}/hook"
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
