"""F30: receivers that drip, stall, never end or send bombs are cut off, and hold up nobody but themselves."""

import asyncio
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

import httpcore
import pytest
from sqlalchemy import select

from app.control.webhook_http import MAX_READ_BYTES, TOTAL_SECONDS, Reply, WebhookClient
from app.control.webhook_streams import MAX_ANSWER_BYTES, Stream, connect
from app.db.models import WebhookDelivery
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from tests.app.control.receivers import (
    Answer,
    Handler,
    after,
    drip,
    endless,
    endless_continue,
    endless_headers,
    receiving,
    status,
)
from tests.app.control.test_webhook_http import post
from tests.app.control.test_webhook_sender import emit, sending, subscribe, wait_for
from tests.factories import make_project

SHORT_SECONDS = 1.0  # instead of the 15 s of a real try
SLACK_SECONDS = 1.5  # for a busy machine


def drip_headers(handler: Handler) -> None:
    """A header that comes letter by letter."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        handler.wfile.write(b"z")
        handler.wfile.flush()
        time.sleep(0.05)


def many_headers(handler: Handler) -> None:
    """Small headers without an end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-A: b\r\n" * 1000)


def fast_continue(handler: Handler) -> None:
    """Interim answers as fast as they go."""
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def switching(handler: Handler) -> None:
    """Another protocol, which nobody asked for."""
    handler.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")
    time.sleep(30)


def silent(_handler: Handler) -> None:
    """No answer."""
    time.sleep(30)


def nonsense(handler: Handler) -> None:
    """What is no HTTP."""
    handler.wfile.write(b"\x00\xff" * 100 + b"\r\n\r\n")
    handler.close_connection = True


def short(handler: Handler) -> None:
    """A body that ends before its length."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nten bytes.")
    handler.close_connection = True


def huge_chunk(handler: Handler) -> None:
    """A chunk that says it is an exabyte long, and its beginning."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffff\r\n")
    while True:
        handler.wfile.write(b"y" * 65536)


BOMB = gzip.compress(bytes(10 * 2**20))  # 10 MiB of nothing in 10 KB


def bomb(handler: Handler) -> None:
    """A small body that is a large one."""
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(BOMB)))
    handler.end_headers()
    handler.wfile.write(BOMB)


class Counted:
    """Streams whose bytes are counted as the client reads them."""

    def __init__(self) -> None:
        self.num_read = 0

    async def connect(
        self, address: str, port: int, seconds: float | None
    ) -> httpcore.AsyncNetworkStream:
        stream = await connect(address, port, seconds)
        assert isinstance(stream, Stream)
        read = stream.read

        async def counting(max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
            received = await read(max_bytes, timeout)
            self.num_read += len(received)
            return received

        stream.read = counting  # type: ignore[method-assign]
        return stream


def attempt(answer: Answer, seconds: float = SHORT_SECONDS) -> tuple[Reply, float, int]:
    """What a try of a receiver gives, how long it takes, and how many bytes of it are read."""
    counted = Counted()
    with receiving(answer) as receiver:
        client = WebhookClient(allow_private=True, connector=counted.connect, total_seconds=seconds)
        began = time.monotonic()
        reply = post(client, receiver.url)
        return reply, time.monotonic() - began, counted.num_read


@pytest.mark.parametrize(
    "answer",
    [
        drip(0.02),
        drip_headers,
        endless_headers,
        many_headers,
        endless_continue,
        fast_continue,
        switching,
        silent,
        nonsense,
        short,
    ],
    ids=lambda answer: answer.__qualname__.partition(".")[0],
)
def test_f30_a_receiver_that_does_not_answer_properly_is_a_failure_in_time(answer: Answer) -> None:
    reply, seconds, num_read = attempt(answer)
    assert reply.error is not None
    assert seconds < SHORT_SECONDS + SLACK_SECONDS
    assert num_read <= MAX_ANSWER_BYTES


@pytest.mark.parametrize("answer", [endless, huge_chunk])
def test_f30_of_an_endless_body_sixteen_kibibytes_are_read(answer: Answer) -> None:
    reply, seconds, num_read = attempt(answer)
    assert (reply.status, reply.error, reply.body) == (200, None, "y" * 2048)
    assert seconds < SHORT_SECONDS + SLACK_SECONDS
    assert num_read <= MAX_READ_BYTES + 8192  # the head, and the read that crossed the line


def test_f30_a_compressed_bomb_is_kept_as_it_came() -> None:
    reply, _, num_read = attempt(bomb)
    assert (reply.status, reply.error) == (200, None)
    assert reply.body is not None
    assert reply.body.startswith("\x1f")
    assert len(reply.body) <= 2048
    assert num_read < len(BOMB) + 1024


@contextmanager
def mute_port() -> Iterator[int]:
    """A port that takes connections and never says or reads a byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []
        stop = threading.Event()
        server.settimeout(0.05)

        def accept() -> None:
            while not stop.is_set():
                try:
                    held.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            thread.join()
            for each in held:
                each.close()


def test_f30_a_tls_handshake_that_stalls_ends_after_three_seconds() -> None:
    with mute_port() as port:
        began = time.monotonic()
        reply = post(WebhookClient(allow_private=True), f"https://127.0.0.1:{port}/")
        assert 2.5 < time.monotonic() - began < 3 + SLACK_SECONDS
    assert "TLS was not agreed on in time" in (reply.error or "")


@pytest.mark.slow
def test_f30_a_slow_drip_ends_after_fifteen_seconds() -> None:
    reply, seconds, _ = attempt(drip(0.2), TOTAL_SECONDS)
    assert TOTAL_SECONDS - 1 < seconds < TOTAL_SECONDS + SLACK_SECONDS
    assert reply.error == "no complete answer within 15 s"


def clocked(arrivals: dict[str, float]) -> Answer:
    """Says 200 and notes when each event came."""
    answer = status(200)

    def noting(handler: Handler) -> None:
        arrivals.setdefault(handler.headers["webhook-id"], time.monotonic())
        answer(handler)

    return noting


def delays(
    factory: SessionFactory, receivers: list[Callable[[Handler], None]], count: int
) -> list[float]:
    """How long each of so many events takes to a healthy receiver, with others beside it."""
    arrivals: dict[str, float] = {}
    with transaction(factory) as session:
        project_id: UUID = make_project(session).id
    with receiving(clocked(arrivals)) as healthy:
        subscribe(factory, project_id, healthy.url)
        with running(factory, project_id, receivers), sending(factory, scale=1, total_seconds=15):
            sent: list[float] = []
            for _ in range(count):
                emit(factory, project_id)
                sent.append(time.monotonic())
                time.sleep(0.01)
            wait_for(lambda: len(arrivals) == count, 60)
    with transaction(factory) as session:
        rows = session.scalars(
            select(WebhookDelivery.event_id)
            .where(WebhookDelivery.delivered_at.is_not(None))
            .order_by(WebhookDelivery.seq)
        )
        ids = [public_id("webhook_event", key) for key in rows]
    known = [key for key in ids if key in arrivals]
    return sorted(arrivals[key] - at for key, at in zip(known, sent, strict=True))


@contextmanager
def running(
    factory: SessionFactory, project_id: UUID, answers: list[Callable[[Handler], None]]
) -> Iterator[None]:
    """Receivers with these answers, subscribed to everything."""
    if not answers:
        yield
        return
    with receiving(answers[0]) as receiver:
        subscribe(factory, project_id, receiver.url)
        with running(factory, project_id, answers[1:]):
            yield


@pytest.mark.slow
def test_f30_one_slow_receiver_delays_the_others_by_less_than_two_seconds(
    committed_factory: SessionFactory, record_property: Callable[[str, object], None]
) -> None:
    """200 events; the slow receiver drips until it is cut off after 15 s, each time."""
    count = 200
    alone = delays(committed_factory, [], count)
    beside = delays(committed_factory, [drip(0.2)], count)
    at = int(0.95 * count) - 1
    record_property("p95_alone_seconds", round(alone[at], 3))
    record_property("p95_beside_a_slow_one_seconds", round(beside[at], 3))
    print(f"p95 alone {alone[at]:.3f} s, beside a slow one {beside[at]:.3f} s")
    assert beside[at] - alone[at] < 2
    assert beside[at] < 2


def test_f30_a_slow_receiver_gets_two_tries_at_once_and_the_others_theirs(
    committed_factory: SessionFactory,
) -> None:
    with transaction(committed_factory) as session:
        project_id = make_project(session).id
    with receiving(after(1, status(200))) as slow, receiving() as healthy:
        for receiver in (slow, healthy):
            subscribe(committed_factory, project_id, receiver.url)
        emit(committed_factory, project_id, 100)
        with sending(committed_factory):
            wait_for(lambda: len(healthy.ids()) == 100)
            wait_for(lambda: len(slow.ids()) > 2)
        assert slow.most_at_once == 2
        assert len(healthy.ids()) == len(set(healthy.ids())) == 100


def test_f30_fifty_slow_receivers_end_and_the_rest_is_served(
    committed_factory: SessionFactory,
) -> None:
    """More slow receivers than may be tried at once: everything is late, nothing is lost."""
    with transaction(committed_factory) as session:
        project_id = make_project(session).id
    with receiving(after(3, status(200))) as slow, receiving() as healthy:
        for number in range(30):
            subscribe(committed_factory, project_id, f"{slow.url}/{number}")
        subscribe(committed_factory, project_id, healthy.url)
        emit(committed_factory, project_id, 3)
        with sending(committed_factory, total_seconds=0.5):
            wait_for(lambda: len(healthy.ids()) == 3, 20)


def test_f30_streams_do_not_outlive_their_client() -> None:
    """A cut-off try leaves no connection open."""

    async def cut_off(url: str) -> int:
        client = WebhookClient(allow_private=True, total_seconds=0.3)
        reply = await client.post(url, {}, b"{}")
        assert reply.error is not None
        await asyncio.sleep(0.05)
        return sum(1 for task in asyncio.all_tasks() if task is not asyncio.current_task())

    closed = threading.Event()

    def note_hangup(handler: Handler) -> None:
        try:
            drip(0.02)(handler)
        except OSError:
            closed.set()
            raise

    with receiving(note_hangup) as receiver:
        assert asyncio.run(cut_off(receiver.url)) == 0
        assert closed.wait(5)
