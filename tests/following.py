"""A served job whose log tests write, and those who follow it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

import httpx
import openai
from fastapi import FastAPI
from openai.types.fine_tuning import FineTuningJobEvent

from app.db.models import Job
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.domain.states import JobState, StopRequest
from app.main import create_app
from app.services.engine import mark_cancelled
from app.services.events import add_job_event
from app.services.keys import create_key
from app.services.waiting import WaitingRoom
from app.settings import Settings
from tests.factories import make_job, make_project
from tests.serving import serving_app


@dataclass
class Followed:
    """A running job on a server."""

    app: FastAPI
    url: str
    key: str
    factory: SessionFactory
    project_id: UUID
    job: Job

    @property
    def room(self) -> WaitingRoom:
        """Of the server."""
        room: WaitingRoom = self.app.state.resources.room
        return room

    @property
    def job_id(self) -> str:
        """As clients know the job."""
        return public_id("job", self.job.id)

    @property
    def path(self) -> str:
        """The job's."""
        return f"/v1/fine_tuning/jobs/{self.job_id}"

    def client(self) -> httpx.Client:
        """A client of the project."""
        head = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=head, timeout=30)

    def say(self, *messages: str) -> None:
        """Writes lines into the job's log."""
        with transaction(self.factory) as session:
            row = session.get_one(Job, self.job.id)
            for message in messages:
                add_job_event(session, row, level="info", message=message, data={"of": message})

    def end(self) -> None:
        """Cancels the job as its worker does."""
        with transaction(self.factory) as session:
            session.get_one(Job, self.job.id).stop_requested = StopRequest.CANCEL
            session.flush()
            mark_cancelled(session, self.job.id, self.job.attempt)

    def wait_for_waiters(self, count: int) -> None:
        """Until so many wait."""
        ends_at = time.monotonic() + 10
        while self.room.count() != count:
            assert time.monotonic() < ends_at, f"{self.room.count()} wait, not {count}"
            time.sleep(0.02)


@contextmanager
def followed(settings: Settings, factory: SessionFactory) -> Iterator[Followed]:
    """Serves a running job until the block ends."""
    with transaction(factory) as session:
        project = make_project(session)
        key = create_key(session, project_id=project.id, name="key").text
        job = make_job(session, project, state=JobState.RUNNING)
    app = create_app(settings, factory)
    with serving_app(app) as url:
        yield Followed(app, url, key, factory, project.id, job)


class Reader:
    """A stream read in a thread, as lines and as they came."""

    def __init__(self, stand: Followed, **query: Any) -> None:
        self.lines: list[str] = []
        self.is_over = threading.Event()
        self._stand = stand
        self._query = {"stream": "true"} | query
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def data(self) -> list[str]:
        """What came as data."""
        return [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]

    def wait_for(self, part: str) -> float:
        """Seconds until a line with that text came."""
        began = time.monotonic()
        while not any(part in line for line in self.lines):
            assert time.monotonic() < began + 15, self.lines
            time.sleep(0.005)
        return time.monotonic() - began

    def _read(self) -> None:
        with (
            self._stand.client() as client,
            client.stream("GET", f"{self._stand.path}/events", params=self._query) as answer,
        ):
            assert answer.status_code == 200
            for line in answer.iter_lines():
                self.lines.append(line)
        self.is_over.set()


def open_openai_stream(stand: Followed) -> openai.Stream[FineTuningJobEvent]:
    """The stream as the unchanged client opens it."""
    client = openai.OpenAI(base_url=f"{stand.url}/v1", api_key=stand.key, max_retries=0)
    return client.get(
        f"/fine_tuning/jobs/{stand.job_id}/events",
        cast_to=FineTuningJobEvent,
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
        options={"params": {"stream": True}},
    )


def read_some(stand: Followed, count: int, last: str) -> tuple[list[int], str]:
    """Leaves a stream after so many events: their numbers, and the last id."""
    sequences: list[int] = []
    head = {"last-event-id": last} if last else {}
    with (
        stand.client() as client,
        client.stream(
            "GET", f"{stand.path}/events", params={"stream": "true"}, headers=head
        ) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("id: "):
                last = line.removeprefix("id: ")
            if line.startswith("data: "):
                sequences.append(json.loads(line.removeprefix("data: "))["sequence"])
            if len(sequences) == count:
                break
    return sequences, last
