"""Streams of a job's log: complete, in order, resumable, and gone without a trace."""

import itertools
import json
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from sqlalchemy import Engine, text

from app.db.session import SessionFactory, transaction
from app.services.keys import create_key, revoke_key
from app.settings import Settings
from tests.factories import make_project
from tests.following import Followed, Reader, followed, open_openai_stream, read_some


@pytest.fixture
def stand(settings: Settings, committed_factory: SessionFactory) -> Iterator[Followed]:
    with followed(settings, committed_factory) as stand:
        yield stand


def test_the_openai_client_reads_a_job_to_its_end(
    settings: Settings, committed_factory: SessionFactory
) -> None:
    often = settings.model_copy(update={"stream_ping_seconds": 0.2})
    with followed(often, committed_factory) as stand:
        stand.say("one", "two")
        seen = []

        def go_on() -> None:
            time.sleep(0.9)  # pings come between events
            stand.say("three")
            time.sleep(0.5)
            stand.end()

        writer = threading.Thread(target=go_on)
        writer.start()
        with open_openai_stream(stand) as stream:
            seen = list(stream)
        writer.join()
    assert [event.message for event in seen] == [
        "one",
        "two",
        "three",
        "Fine-tuning job cancelled.",
    ]
    assert seen[0].object == "fine_tuning.job.event"
    assert seen[0].level == "info"
    assert seen[0].data == {"of": "one"}
    assert abs(seen[0].created_at - time.time()) < 60


def test_what_is_committed_arrives_at_once(stand: Followed) -> None:
    with Reader(stand) as reader:
        stand.wait_for_waiters(1)
        time.sleep(0.3)
        stand.say("now")
        assert reader.wait_for('"now"') < 0.5
        stand.end()
    assert reader.lines[0].startswith("retry: ")
    assert reader.data[-1] == "[DONE]"


def test_an_event_is_shown_as_in_a_page(stand: Followed) -> None:
    stand.say("one", "two")
    stand.end()
    with Reader(stand) as reader:
        pass
    with stand.client() as client:
        page = client.get(f"{stand.path}/events").json()["data"]
    assert [json.loads(line) for line in reader.data[:-1]] == page[::-1]
    ids = [line.removeprefix("id: ") for line in reader.lines if line.startswith("id: ")]
    assert ids == [event["id"] for event in page[::-1]]


def test_a_broken_stream_goes_on_where_it_broke(stand: Followed) -> None:
    """While others write, a client leaves after every few events and comes back with the last id."""
    stop = threading.Event()

    def write(name: str) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            stand.say(f"{name}{number}")

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    sequences: list[int] = []
    last = ""
    for count in (3, 7, 1, 12, 30):
        some, last = read_some(stand, count, last)
        sequences += some
    stop.set()
    for writer in writers:
        writer.join()
    stand.end()
    with Reader(stand, after=last) as reader:
        pass
    assert reader.data[-1] == "[DONE]"
    sequences += [json.loads(line)["sequence"] for line in reader.data[:-1]]
    assert sequences == list(range(1, len(sequences) + 1))
    assert len(sequences) > 53


def test_a_long_log_is_sent_whole(stand: Followed) -> None:
    stand.say(*(str(number) for number in range(450)))
    stand.end()
    with Reader(stand) as reader:
        pass
    assert [json.loads(line)["sequence"] for line in reader.data[:-1]] == list(range(1, 452))


def test_what_cannot_be_followed_is_refused_before_the_stream(stand: Followed) -> None:
    with transaction(stand.factory) as session:
        other = create_key(session, project_id=make_project(session).id, name="key").text
    unknown = "ftevent-" + "0" * 32
    path, query = f"{stand.path}/events", {"stream": "true"}
    with stand.client() as client:
        refused = client.get(path, params=query, headers={"last-event-id": unknown})
        nonsense = client.get(path, params=query, headers={"last-event-id": "7"})
        missing = client.get(path, params=query | {"after": unknown})
        head = {"authorization": f"Bearer {other}"}
        foreign = client.get(path, params=query, headers=head)
    assert refused.status_code == nonsense.status_code == 400
    assert refused.json()["error"]["param"] == "Last-Event-ID"
    assert refused.json()["error"]["code"] == "unknown_event_id"
    assert missing.status_code == foreign.status_code == 404
    assert stand.room.count() == 0


def test_a_revoked_key_ends_its_streams(stand: Followed) -> None:
    with open_openai_stream(stand) as stream:
        stand.say("one")
        assert next(stream).message == "one"
        with transaction(stand.factory) as session:
            revoke_key(session, stand.key)
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="revoked"):
            next(stream)
    assert time.monotonic() - began < 3
    stand.wait_for_waiters(0)


def test_a_stream_that_lasted_long_enough_asks_to_be_gone_on_with(
    settings: Settings, committed_factory: SessionFactory
) -> None:
    short = settings.model_copy(update={"max_stream_seconds": 0.5})
    with followed(short, committed_factory) as stand, Reader(stand) as reader:
        stand.say("one")
        assert reader.is_over.wait(5)
    assert json.loads(reader.data[0])["message"] == "one"
    assert json.loads(reader.data[-1])["error"]["code"] == "service_unavailable"


def test_streams_hold_nothing_and_leave_nothing(stand: Followed, committed_engine: Engine) -> None:
    """More stream than there are connections and threads; requests are answered beside them."""
    count = 60
    busy = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND state = 'idle in transaction'"
    )
    path, query = f"{stand.path}/events", {"stream": "true"}
    limits = httpx.Limits(max_connections=count + 1)
    head = {"authorization": f"Bearer {stand.key}"}
    with httpx.Client(base_url=stand.url, headers=head, limits=limits, timeout=20) as client:
        requests = [client.build_request("GET", path, params=query) for _ in range(count)]
        answers = [client.send(request, stream=True) for request in requests]
        stand.wait_for_waiters(count)
        began = time.monotonic()
        assert client.get(stand.path).status_code == 200
        assert time.monotonic() - began < 2
        with committed_engine.connect() as connection:
            assert connection.scalar(text(busy)) == 0
        stand.say("to all")
        for answer in answers:
            lines = answer.iter_lines()
            assert any('"to all"' in line for line in lines)
        for answer in answers:
            answer.close()
        stand.wait_for_waiters(0)
