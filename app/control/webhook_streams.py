"""Connections to receivers, plain or TLS: a request leaves in one piece, and closing waits for nobody."""

import asyncio
import ssl
from typing import Any

import httpcore

#: Of an answer no more than this is read: 16 KiB of body, and as much before it.
MAX_ANSWER_BYTES = 32 * 1024
_READ_BYTES = 4 * 1024  # at once


class Stream(httpcore.AsyncNetworkStream):
    """A connection. What is written goes out at the next read, so head and body travel together."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unsent = bytearray()
        self.num_left = MAX_ANSWER_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's interface
        """What comes next; nothing when the receiver has hung up."""
        try:
            async with asyncio.timeout(timeout):
                await self._send()
                if self.num_left == 0:
                    raise httpcore.RemoteProtocolError("the answer does not end")
                received = await self._reader.read(min(max_bytes, _READ_BYTES, self.num_left))
                self.num_left -= len(received)
                return received
        except TimeoutError:
            raise httpcore.ReadTimeout("nothing came in time") from None
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109 - httpcore's interface
        """Keeps bytes for the next read."""
        self._unsent += buffer

    async def aclose(self) -> None:
        """Ends the connection at once: a farewell would depend on the receiver."""
        self._writer.transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
    ) -> httpcore.AsyncNetworkStream:
        """The same connection, encrypted; the certificate must be the host's."""
        try:
            async with asyncio.timeout(timeout):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        except TimeoutError:
            await self.aclose()
            raise httpcore.ConnectTimeout("TLS was not agreed on in time") from None
        except OSError as error:  # ssl.SSLError is one
            await self.aclose()
            raise httpcore.ConnectError(str(error)) from error
        return self

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore's interface
        """What httpcore asks of a connection before it uses it again: whether the receiver has ended it."""
        if info == "is_readable":
            return self._reader.at_eof() or self._writer.transport.is_closing()
        return self._writer.get_extra_info(info)

    async def _send(self) -> None:
        if self._unsent:
            self._writer.write(bytes(self._unsent))
            self._unsent.clear()
            self.num_left = MAX_ANSWER_BYTES  # of the next answer
            await self._writer.drain()


async def connect(address: str, port: int, seconds: float | None) -> httpcore.AsyncNetworkStream:
    """A connection to an IP address, made within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(address, port, limit=MAX_ANSWER_BYTES)
    except TimeoutError:
        raise httpcore.ConnectTimeout("no connection in time") from None
    except OSError as error:
        raise httpcore.ConnectError(str(error)) from error
    return Stream(reader, writer)
