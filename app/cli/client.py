"""The HTTP side of the command line: one client, its errors in one sentence."""

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from app.errors import RetainError, Unavailable

DEFAULT_BASE_URL = "http://127.0.0.1:8000"


class RefusedByServer(RetainError):
    """The server answered with an error; its message is passed on."""

    code = "refused_by_server"


class ApiClient:
    """Speaks to the server as the caller of `RETAIN_API_KEY`.

    Raises:
        Unavailable: No key is set.
    """

    def __init__(self) -> None:
        key = os.environ.get("RETAIN_API_KEY", "")
        if not key:
            raise Unavailable("RETAIN_API_KEY is not set. Make a key with: retain keys create NAME")
        self.base_url = os.environ.get("RETAIN_BASE_URL", DEFAULT_BASE_URL).rstrip("/")
        self.base_url = self.base_url.removesuffix("/v1")
        self._client = httpx.Client(
            base_url=f"{self.base_url}/v1",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(60, connect=5, write=600),
            trust_env=not _is_loopback(self.base_url),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, **params: Any) -> dict[str, Any]:  # noqa: ANN401 - query parameters
        """The answer to a GET.

        Raises:
            RefusedByServer: The server answered with an error.
            Unavailable: No server answers.
        """
        given = {name: value for name, value in params.items() if value is not None}
        return self._send("GET", path, params=given)

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a POST; see `get` for its errors."""
        return self._send("POST", path, json=body) if body is not None else self._send("POST", path)

    def iter_list(self, path: str, *, limit: int, **params: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
        """The entries of a list, page by page, at most `limit`."""
        after: str | None = None
        while limit > 0:
            page = self.get(path, limit=min(limit, 100), after=after, **params)
            yield from page["data"]
            limit -= len(page["data"])
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def upload(self, file: Path, purpose: str) -> str:
        """Uploads a local file and returns its id.

        Raises:
            Unavailable: The file cannot be read, or no server answers.
            RefusedByServer: A line of it is wrong; the message names it.
        """
        try:
            with file.open("rb") as content:
                answer = self._send(
                    "POST", "files", files={"file": (file.name, content)}, data={"purpose": purpose}
                )
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise Unavailable(f"{file}: {error.strerror}") from None
        return str(answer["id"])

    def _send(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        try:
            response = self._client.request(method, path, **arguments)
        except httpx.ConnectError:
            raise Unavailable(
                f"No server answers at {self.base_url}. Start one with: retain up (or set RETAIN_BASE_URL)"
            ) from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.base_url}: {error or type(error).__name__}") from None
        if response.is_success:
            answer: dict[str, Any] = response.json()
            return answer
        raise RefusedByServer(_message_of(response))


def _message_of(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{error['message']} ({response.status_code} {error.get('code') or error['type']})"
    except (ValueError, KeyError, TypeError):
        return f"The server answered {response.status_code}: {response.text[:200]}"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
