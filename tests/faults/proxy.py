"""A TCP proxy between a client and a server on loopback: passes, stalls, drops, refuses, and loses replies."""

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

CHUNK_BYTES = 65536
GREETING_BYTES = 512
MAX_HEARD_BYTES = 2**20  # of what a client said, in which needles are looked for

Moment = Literal["before", "after"]


@dataclass(eq=False)
class _Link:
    """One client's connection, and what it said so far."""

    client: socket.socket
    upstream: socket.socket
    flowing: threading.Event = field(default_factory=threading.Event)
    greeting: bytes = b""  # the beginning of what it said
    heard: bytes = b""  # since its last commit, while there are traps
    loses_reply: bool = False

    def close(self) -> None:
        self.flowing.set()
        for peer in (self.client, self.upstream):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()


@dataclass(eq=False)
class _Trap:
    """Something to do once, when a client commits after it said something."""

    needle: bytes
    moment: Moment  # before the commit reaches the server, or after it was done and before the client knows
    then: Callable[[], object]


class Proxy:
    """Stands before the server of a URL; use `url` instead of it."""

    def __init__(self, url: str) -> None:
        head, at, tail = url.rpartition("@")
        scheme = "" if at else url.partition("://")[0] + "://"
        address = tail if at else url.partition("://")[2]
        place, slash, rest = address.partition("/")
        host, _, port = place.partition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._port = self._server.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self._links: list[_Link] = []
        self._traps: list[_Trap] = []
        self._mutex = threading.Lock()
        self.url = f"{scheme}{head}{at}127.0.0.1:{self._port}{slash}{rest}"

    def stall(self) -> None:
        """Takes bytes and connections, and passes nothing on."""
        self._flowing.clear()

    def stall_live(self, name: bytes) -> int:
        """Stalls the live connections whose client said this in its greeting; new ones pass. How many."""
        chosen = [link for link in self._links if name in link.greeting]
        for link in chosen:
            link.flowing.clear()
        return len(chosen)

    def resume(self) -> None:
        """Passes everything on again, what was held back first."""
        self._flowing.set()
        for link in self._links:
            link.flowing.set()

    def drop(self) -> None:
        """Cuts every live connection."""
        for link in list(self._links):
            link.close()

    def refuse(self) -> None:
        """Cuts every connection and takes no new one."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._server.close()
        self.drop()

    def allow(self) -> None:
        """Takes connections again, at the same address."""
        self._server = socket.create_server(("127.0.0.1", self._port))
        self._listen()

    def at_commit(self, needle: bytes, moment: Moment, then: Callable[[], object]) -> None:
        """Once, at the COMMIT of a client that said `needle`: `then` is called and the connection is cut.

        `before`: the server never sees the commit. `after`: the server has done it and its reply is lost.
        """
        self._traps.append(_Trap(needle, moment, then))

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._flowing.set()
        self.refuse()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            try:
                upstream = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            link = _Link(client, upstream)
            link.flowing.set()
            self._links.append(link)
            for work in (self._pass_up, self._pass_down):
                threading.Thread(target=work, args=(link,), daemon=True).start()

    def _pass_up(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.client.recv(CHUNK_BYTES):
                self._wait(link)
                if self._is_trapped(link, data):
                    return
                link.upstream.sendall(data)
            link.upstream.shutdown(socket.SHUT_WR)

    def _pass_down(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.upstream.recv(CHUNK_BYTES):
                self._wait(link)
                if link.loses_reply:
                    self._spring(link)
                    return
                link.client.sendall(data)
            link.client.shutdown(socket.SHUT_WR)

    def _wait(self, link: _Link) -> None:
        self._flowing.wait()
        link.flowing.wait()

    def _is_trapped(self, link: _Link, data: bytes) -> bool:
        """Whether the bytes are held back for good; a reply to them may be lost instead."""
        link.greeting = (link.greeting + data)[:GREETING_BYTES]
        if not self._traps:
            return False
        link.heard = (link.heard + data)[-MAX_HEARD_BYTES:]
        if b"COMMIT" not in data:
            return False
        trap = next((trap for trap in self._traps if trap.needle in link.heard), None)
        if trap is None:
            link.heard = b""
            return False
        if trap.moment == "after":
            link.loses_reply = True
            return False
        self._spring(link)
        return True

    def _spring(self, link: _Link) -> None:
        with self._mutex:
            trap = next((trap for trap in self._traps if trap.needle in link.heard), None)
            if trap is not None:
                self._traps.remove(trap)
                trap.then()
        link.close()
