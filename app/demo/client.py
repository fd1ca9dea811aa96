"""The demo's HTTP client: the public API and nothing else."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from app.demo.server import DemoFailed

JOBS = "/v1/fine_tuning/jobs"
POLL_SECONDS = 0.5
ENDED = frozenset({"succeeded", "failed", "cancelled"})

Json = dict[str, Any]


class Client:
    """Speaks to a Retain server with one key."""

    def __init__(self, address: str, key: str) -> None:
        self._http = httpx.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(120, connect=10),
            trust_env=False,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def get(self, path: str, **params: str | int) -> Json:
        """The answer to a GET.

        Raises:
            DemoFailed: The server answered with an error.
        """
        return self._answer(self._http.get(path, params=params))

    def post(self, path: str, body: Json | None = None) -> Json:
        """The answer to a POST; see `get` for its errors."""
        return self._answer(self._http.post(path, json=body))

    def delete(self, path: str) -> None:
        """A DELETE; see `get` for its errors."""
        self._answer(self._http.delete(path))

    def exists(self, path: str) -> bool:
        """Whether a GET is answered, or else says 404."""
        response = self._http.get(path)
        if response.status_code == httpx.codes.NOT_FOUND:
            return False
        self._answer(response)
        return True

    def pages(self, path: str, **params: str | int) -> Iterator[Json]:
        """Every entry of a list, page by page."""
        query = dict(params)
        while True:
            page = self.get(path, **query)
            yield from page["data"]
            if not page["has_more"]:
                return
            query["after"] = page["data"][-1]["id"]

    def upload(self, file: Path, purpose: str) -> str:
        """Uploads a file and returns its id."""
        with file.open("rb") as content:
            answer = self._http.post(
                "/v1/files", data={"purpose": purpose}, files={"file": (file.name, content)}
            )
        return str(self._answer(answer)["id"])

    def follow(
        self,
        job_id: str,
        on_event: Callable[[Json], None],
        on_progress: Callable[[Json], None],
    ) -> Json:
        """The job once it has ended; its events and its state are reported on the way."""
        seen = 0
        while True:
            job = self.get(f"{JOBS}/{job_id}")  # before its events, so that the last ones are there
            for event in self._new_events(job_id, seen):
                seen = event["sequence"]
                on_event(event)
            on_progress(job)
            if job["status"] in ENDED:
                return job
            time.sleep(POLL_SECONDS)

    def _new_events(self, job_id: str, seen: int) -> list[Json]:
        """Events after the sequence number, oldest first; the server lists them newest first."""
        found: list[Json] = []
        for event in self.pages(f"{JOBS}/{job_id}/events", limit=100):
            if event["sequence"] <= seen:
                break
            found.append(event)
        return found[::-1]

    @staticmethod
    def _answer(response: httpx.Response) -> Json:
        if response.is_success:
            answer: Json = response.json()
            return answer
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text[:200]
        raise DemoFailed(
            f"{response.request.method} {response.request.url.path}: {response.status_code} {message}"
        )
