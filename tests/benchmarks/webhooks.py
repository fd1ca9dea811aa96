"""How fast webhooks reach one healthy receiver: `python -m tests.benchmarks.webhooks [EVENTS]`.

The sender runs as a process of its own against a durable Postgres, with two tries at once as for every endpoint;
the receiver checks each signature. The figure counts from the first request to the last delivery on record.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.fernet import Fernet, MultiFernet
from sqlalchemy import func, select
from standardwebhooks import Webhook

from app.db.models import WebhookDelivery
from app.db.session import SessionFactory, build_engine, build_session_factory, transaction
from app.domain.states import DeliveryState
from app.embedded import EmbeddedServices
from app.services.webhooks import create_endpoint, emit_event
from tests.databases import migrate
from tests.factories import make_project

GOAL_PER_SECOND = 200
EVENT_TYPE = "retention.strength_raised"
SENDER = """
import threading
from app.control.webhook_sender import run
from app.db.session import build_engine, build_session_factory
from app.services.logs import configure_logging
from app.settings import load_settings
settings = load_settings()
configure_logging(settings)
run(build_session_factory(build_engine(settings.database_url)), settings, threading.Event())
"""


@dataclass
class Tally:
    """What a receiver has seen."""

    ids: Counter[str] = field(default_factory=Counter)
    num_forged: int = 0
    began: float = 0.0
    webhook: Webhook | None = None

    def take(self, headers: dict[str, str], body: bytes) -> None:
        """Notes one request."""
        if not self.ids:
            self.began = time.monotonic()
        self.ids[headers["webhook-id"]] += 1
        assert self.webhook is not None
        try:
            self.webhook.verify(body, headers)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it is not ours
            self.num_forged += 1


@contextmanager
def healthy_receiver(tally: Tally) -> Iterator[str]:
    """A receiver that keeps its connections and answers at once; its URL."""
    ready = threading.Event()
    place: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                pairs = (line.partition(":") for line in head[1:] if line)
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                tally.take(headers, await reader.readexactly(int(headers["content-length"])))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async def serve() -> None:
        done = asyncio.Event()
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        place.append((asyncio.get_running_loop(), done, server.sockets[0].getsockname()[1]))
        ready.set()
        await done.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    loop, done, port = place[0]
    try:
        yield f"http://127.0.0.1:{port}/hook"
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(5)


def fill(factory: SessionFactory, cipher: MultiFernet, url: str, count: int) -> str:
    """An endpoint with so many events due; its secret."""
    with transaction(factory) as session:
        project_id = make_project(session).id
        made = create_endpoint(
            session,
            cipher,
            project_id=project_id,
            name="healthy",
            url=url,
            event_types=[EVENT_TYPE],
            allow_private=True,
        )
    for start in range(0, count, 500):
        with transaction(factory) as session:
            for number in range(start, min(start + 500, count)):
                data = {"decision": {"action": "raise_strength", "number": number, "reason": "r"}}
                emit_event(session, project_id=project_id, type=EVENT_TYPE, data=data)
    return made.secret


def count_left(factory: SessionFactory) -> int:
    """Deliveries that are not delivered yet."""
    with transaction(factory) as session:
        query = select(func.count()).where(WebhookDelivery.state != DeliveryState.DELIVERED)
        return session.execute(query).scalar_one()


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drain(
    database_url: str, count: int, *, limit_seconds: float = 300
) -> tuple[float, float, Tally]:
    """Seconds from the first request to the last delivery on record, the sender's CPU seconds, and what came."""
    key = Fernet.generate_key()
    engine = build_engine(database_url)
    factory = build_session_factory(engine)
    tally = Tally()
    environment = os.environ | {
        "RETAIN_DATABASE_URL": database_url,
        "RETAIN_SECRET_KEY": key.decode(),
        "RETAIN_WEBHOOK_ALLOW_PRIVATE": "true",
    }
    with healthy_receiver(tally) as url:
        tally.webhook = Webhook(fill(factory, MultiFernet([Fernet(key)]), url, count))
        sender = subprocess.Popen(
            [sys.executable, "-c", SENDER], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + limit_seconds
            while len(tally.ids) < count or count_left(factory) > 0:
                if time.monotonic() > deadline or sender.poll() is not None:
                    raise RuntimeError(f"{len(tally.ids)} of {count} events came")
                time.sleep(0.05)
            return time.monotonic() - tally.began, cpu_seconds(sender.pid), tally
        finally:
            sender.kill()
            sender.wait()
            engine.dispose()


def main() -> int:
    """Prints the figure; 0 when it is at least the goal and everything came once and signed."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as directory:
        services = EmbeddedServices(Path(directory))
        try:
            url = services.start().database_url
            migrate(url)
            seconds, used, tally = drain(url, count)
        finally:
            services.stop()
    rate = count / seconds
    again = sum(tally.ids.values()) - len(tally.ids)
    print(
        f"{count:,} webhook events to one receiver in {seconds:.1f} s: {rate:.0f}/s (goal {GOAL_PER_SECOND}/s);"
        f" {again} sent twice, {tally.num_forged} with a wrong signature; the sender used {used:.1f} s of CPU;"
        f" load {os.getloadavg()[0]:.1f}"
    )
    return int(rate < GOAL_PER_SECOND or again > 0 or tally.num_forged > 0)


if __name__ == "__main__":
    sys.exit(main())
