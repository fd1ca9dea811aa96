"""A client of few words: many keep-alive connections in one thread, as cheap as Python allows."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

OK = 200


@dataclass
class Result:
    """What a run of requests gave; seconds by request."""

    seconds: list[float] = field(default_factory=list)
    failures: list[tuple[int, bytes]] = field(default_factory=list)
    elapsed: float = 0.0

    @property
    def per_second(self) -> float:
        """Answers in a second."""
        return len(self.seconds) / self.elapsed

    def quantile(self, share: float) -> float:
        """Seconds that this share of the answers took at most."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class Connection:
    """One connection to a loopback port."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str
    ) -> None:
        self.reader = reader
        self._writer = writer
        self._head = f"Host: localhost\r\nAuthorization: Bearer {key}\r\n"

    @classmethod
    async def open(cls, port: int, key: str) -> Self:
        """Connects."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**20), key)

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        """Sends a request."""
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{self._head}{kind}\r\n".encode() + body)

    async def receive_head(self) -> tuple[int, int]:
        """Status and length of the answer to come."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        _, _, length = head.partition(b"content-length:")
        return int(head[9:12]), int(length.partition(b"\r\n")[0] or 0)

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer."""
        self.send(method, path, body)
        status, length = await self.receive_head()
        return status, await self.reader.readexactly(length)

    def close(self) -> None:
        """Hangs up."""
        self._writer.close()


async def closed_loop(
    port: int, key: str, paths: Sequence[str], *, connections: int, seconds: float
) -> Result:
    """Each connection asks again once it is answered, for so long."""
    result = Result()
    began = time.perf_counter()
    ends_at = began + seconds

    async def ask(number: int) -> None:
        connection = await Connection.open(port, key)
        while (sent_at := time.perf_counter()) < ends_at:
            status, body = await connection.request("GET", paths[number % len(paths)])
            number += connections
            result.seconds.append(time.perf_counter() - sent_at)
            if status != OK:
                result.failures.append((status, body))
        connection.close()

    await asyncio.gather(*(ask(number) for number in range(connections)))
    result.elapsed = time.perf_counter() - began
    return result


async def open_loop(
    port: int, key: str, path: str, body: bytes, *, connections: int, rate: float, seconds: float
) -> Result:
    """Requests at their times whether or not earlier ones were answered; seconds count from those times."""
    result = Result()
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await Connection.open(port, key))
    began = time.perf_counter()

    async def ask(due: float) -> None:
        connection = await free.get()
        status, answer = await connection.request("POST", path, body)
        result.seconds.append(time.perf_counter() - due)
        free.put_nowait(connection)
        if status != OK:
            result.failures.append((status, answer))

    asked = []
    for number in range(int(rate * seconds)):
        due = began + number / rate
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        asked.append(asyncio.create_task(ask(due)))
    await asyncio.gather(*asked)
    result.elapsed = time.perf_counter() - began
    while not free.empty():
        free.get_nowait().close()
    return result
