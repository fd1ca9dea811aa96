"""The Unix socket on which a trainer connects: JSON lines both ways."""

import contextlib
import fcntl
import os
import selectors
import shutil
import socket
import tempfile
from pathlib import Path

from pydantic import ValidationError

from app.domain.messages import DOWNWARD, UPWARD, Downward, Upward

MAX_LINE_BYTES = 256 * 2**20  # per-item scores of large benchmarks travel in one line
CHUNK_BYTES = 2**20
SEND_SECONDS = 30.0
PREFIX = "retain-talk-"


class BrokenTalk(Exception):
    """The trainer sent something that is no message, or does not read."""


class Channel:
    """Listens under a short path, since a socket's path has at most 108 bytes; takes one connection."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_short_directory()))
        self._lock = os.open(self._directory, os.O_RDONLY)  # held as long as the socket is in use
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = str(self._directory / "s")
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(self.path)
        self._server.listen(1)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._peer: socket.socket | None = None
        self._buffer = bytearray()
        self.is_closed = False  # by the trainer

    @property
    def is_connected(self) -> bool:
        """The trainer has connected, and has not hung up."""
        return self._peer is not None and not self.is_closed

    def receive(self, seconds: float) -> list[Upward]:
        """What has come, after waiting for at most so long for anything.

        Raises:
            BrokenTalk: It is no message.
        """
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
            else:
                self._read()
        return self._take_lines()

    def send(self, message: Downward) -> None:
        """Writes one message; a trainer that is gone is noticed elsewhere.

        Raises:
            BrokenTalk: The trainer does not read.
        """
        if self._peer is None or self.is_closed:
            return
        try:
            self._peer.sendall(DOWNWARD.dump_json(message) + b"\n")
        except TimeoutError as error:
            raise BrokenTalk("the trainer does not read what it is told") from error
        except OSError:
            self.is_closed = True

    def close(self) -> None:
        """Hangs up, which ends the trainer, and removes the path."""
        self._selector.close()
        self._server.close()
        if self._peer is not None:
            self._peer.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _accept(self) -> None:
        peer, _ = self._server.accept()
        if self._peer is not None:
            peer.close()
            return
        peer.settimeout(SEND_SECONDS)
        self._peer = peer
        self._selector.unregister(self._server)
        self._selector.register(peer, selectors.EVENT_READ)

    def _read(self) -> None:
        assert self._peer is not None
        data = b""
        with contextlib.suppress(OSError):
            data = self._peer.recv(CHUNK_BYTES)
        if not data:
            self.is_closed = True
            self._selector.unregister(self._peer)
        self._buffer += data

    def _take_lines(self) -> list[Upward]:
        if b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise BrokenTalk("the trainer sent a line without end")
            return []
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        try:
            return [UPWARD.validate_json(line) for line in lines]
        except ValidationError as error:
            raise BrokenTalk(f"the trainer sent no message: {error.errors()[0]['msg']}") from error


def clear_sockets() -> None:
    """Removes the paths of workers that were killed."""
    for directory in Path(_short_directory()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or just removed
            lock = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)


def _short_directory() -> str:
    directory = tempfile.gettempdir()
    return directory if len(directory) < 60 else "/tmp"  # noqa: S108 - mkdtemp makes it private
