"""One POST to a receiver that may be hostile: checked addresses, hard limits, nothing followed or decoded."""

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httpcore

from app.control.webhook_streams import connect
from app.domain.addresses import is_public_address

CONNECT_SECONDS = 3.0
TOTAL_SECONDS = 15.0
IDLE_SECONDS = 2.0
MAX_IDLE = 100
MAX_READ_BYTES = 16 * 1024
MAX_KEPT_BYTES = 2 * 1024

Resolver = Callable[[str, int], Awaitable[list[str]]]
Connector = Callable[[str, int, float | None], Awaitable[httpcore.AsyncNetworkStream]]


@functools.cache
def _default_context() -> ssl.SSLContext:
    """Certificates are checked against the system's roots; reading those takes a while."""
    return ssl.create_default_context()


class AddressRefused(Exception):
    """The receiver's name leads to an address that must not be called."""


@dataclass(frozen=True)
class Reply:
    """What a receiver answered, or why it did not."""

    status: int | None
    error: str | None  # None when the status says success
    body: str | None = None  # its beginning
    retry_after: str | None = None


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a name, as the system resolves it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name once, checks every answer, and connects to one of those very addresses.

    So a name that answers differently the second time (DNS rebinding) changes nothing. TLS still names and
    checks the host of the URL.
    """

    def __init__(
        self, *, allow_private: bool, resolver: Resolver = resolve, connector: Connector = connect
    ) -> None:
        self._allow_private = allow_private
        self._resolve = resolver
        self._connect = connector

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,  # noqa: ARG002 - httpcore's interface
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        """Connects to a checked address of the host."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from None
        except OSError as error:
            raise httpcore.ConnectError(f"the name does not resolve: {error}") from None
        if not self._allow_private:
            for address in addresses:
                if not is_public_address(address):
                    raise AddressRefused(f"{host} resolves to {address}, which is not public")
        failure: Exception = httpcore.ConnectError("the name has no address")
        for address in addresses[:4]:
            ipaddress.ip_address(address.partition("%")[0])  # never a name to resolve again
            try:
                return await self._connect(address, port, timeout)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109 - httpcore's interface
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        """Refuses: receivers are reached over the network alone."""
        raise AddressRefused(f"{path} is not a network address")

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


class WebhookClient:
    """Posts signed bodies. Proxies of the environment are not used, redirects not followed.

    Args:
        allow_private: Whether loopback and private addresses may be called.
        resolver: How names become addresses.
        connector: How a checked address is connected to.
        ssl_context: How certificates are checked; the system's roots by default.
        total_seconds: Deadline for everything, however slowly the receiver drips.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        resolver: Resolver = resolve,
        connector: Connector = connect,
        ssl_context: ssl.SSLContext | None = None,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self.allow_private = allow_private
        self._total_seconds = total_seconds
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or _default_context(),
            max_connections=None,
            # An open connection leads where it was checked to lead; a new one resolves and checks anew.
            # Receivers close idle ones after 5 s at the earliest, as their servers come: it is we who do.
            max_keepalive_connections=MAX_IDLE,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=GuardedBackend(
                allow_private=allow_private, resolver=resolver, connector=connector
            ),
        )

    async def post(self, url: str, headers: dict[str, str], body: bytes) -> Reply:
        """Makes one try; never raises for what the receiver does."""
        try:
            async with asyncio.timeout(self._total_seconds):
                return await self._post(url, headers, body)
        except TimeoutError:
            return Reply(None, f"no complete answer within {self._total_seconds:g} s")
        except httpcore.TimeoutException as error:
            return Reply(None, f"timed out: {error or type(error).__name__}")
        except AddressRefused as error:
            return Reply(None, f"refused: {error}")
        except (
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.UnsupportedProtocol,
        ) as error:
            return Reply(None, f"{type(error).__name__}: {error}"[:500])
        except (ssl.SSLError, OSError, ValueError) as error:
            return Reply(None, f"{type(error).__name__}: {error}"[:500])

    async def aclose(self) -> None:
        """Closes what is open."""
        await self._pool.aclose()

    async def _post(self, url: str, headers: dict[str, str], body: bytes) -> Reply:
        timeouts = {
            "connect": CONNECT_SECONDS,
            "read": self._total_seconds,
            "write": self._total_seconds,
            "pool": self._total_seconds,
        }
        async with self._pool.stream(
            "POST", url, headers=[*headers.items()], content=body, extensions={"timeout": timeouts}
        ) as response:
            received = b""
            async for chunk in response.aiter_stream():
                received += chunk
                if len(received) >= MAX_READ_BYTES:
                    break  # whatever follows is not read; leaving the block closes the connection
        sent = {name.lower(): value for name, value in response.headers}
        is_success = 200 <= response.status <= 299
        return Reply(
            status=response.status,
            error=None if is_success else f"answered {response.status}",
            body=received[:MAX_KEPT_BYTES].decode(errors="replace").replace("\0", "\ufffd"),
            retry_after=sent.get(b"retry-after", b"").decode("latin-1") or None,
        )
