"""Requests are counted by key and project, in Redis for all processes, in the process while Redis is away."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
import redis
from structlog.testing import capture_logs

from app.domain.scopes import Caller
from app.services.rate_limits import UNLIMITED, Allowance, RateLimiter
from app.settings import Settings

PROJECT = UUID(int=1)


def caller(key_id: str = "k", project_id: UUID = PROJECT) -> Caller:
    return Caller(project_id, key_id, frozenset())


def limiter(
    redis_url: str | None, *, key: int = 0, project: int = 0, now: float = 1_000_000.5
) -> RateLimiter:
    settings = Settings(
        redis_url=redis_url,
        requests_per_minute_per_key=key,
        requests_per_minute_per_project=project,
    )
    return RateLimiter(settings, clock=lambda: now)


@pytest.fixture
def silent_url() -> Iterator[str]:
    """Something that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def test_a_limit_is_shared_by_all_processes(redis_url: str) -> None:
    first, second = limiter(redis_url, key=3), limiter(redis_url, key=3)
    left = [first.take(caller()), second.take(caller()), first.take(caller())]
    assert [(one.remaining, one.is_over) for one in left] == [(2, False), (1, False), (0, False)]
    assert second.take(caller()) == Allowance(3, 0, 20, "key", is_over=True)
    assert first.take(caller()).is_over
    assert not first.take(caller("other")).is_over
    later = limiter(redis_url, key=3, now=1_000_060.5)
    assert not later.take(caller()).is_over


def test_a_project_s_keys_share_its_limit(redis_url: str) -> None:
    limits = limiter(redis_url, key=2, project=3)
    told = [limits.take(caller(key)) for key in ("a", "a", "b")]
    assert not any(one.is_over for one in told)
    assert (limits.take(caller("a")).scope, limits.take(caller("b")).scope) == ("key", "project")
    assert not limits.take(caller("c", uuid4())).is_over


def test_without_limits_nothing_is_counted() -> None:
    assert limiter("redis://127.0.0.1:1/0").take(caller()) == UNLIMITED


def test_large_limits_are_taken_in_blocks(redis_url: str) -> None:
    limits = limiter(redis_url, key=1000)
    with redis.Redis.from_url(redis_url) as client:
        limits.take(caller())
        before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        left = [limits.take_at_once(caller()) for _ in range(9)]
        after = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert before == after
    assert [one.remaining for one in left if one is not None] == list(range(998, 989, -1))
    assert limits.take_at_once(caller()) is None


def test_no_more_pass_than_the_limit_whatever_comes_at_once(redis_url: str) -> None:
    processes = [limiter(redis_url, key=250) for _ in range(3)]
    start = threading.Barrier(6)

    def send(number: int) -> int:
        start.wait()
        return sum(not processes[number % 3].take(caller()).is_over for _ in range(60))

    with ThreadPoolExecutor(6) as pool:
        passed = sum(pool.map(send, range(6)))
    # A block is two: what another process holds unused is all that can be missing.
    assert 250 - 2 * 2 <= passed <= 250


def test_while_redis_is_away_the_process_counts(silent_url: str) -> None:
    for url in ("redis://127.0.0.1:1/0", silent_url):
        limits = limiter(url, key=2)
        began = time.monotonic()
        with capture_logs() as logs:
            told = [limits.take(caller()).is_over for _ in range(3)]
        assert told == [False, False, True]
        assert time.monotonic() - began < 2
        assert [line["event"] for line in logs] == ["api.rate_limits_without_redis"]


def test_redis_is_used_again_once_it_is_back(redis_url: str, monkeypatch) -> None:
    limits = limiter("redis://127.0.0.1:1/0", key=200)
    limits.take(caller())
    monkeypatch.setattr(limits, "_redis_url", redis_url)
    monkeypatch.setattr(limits, "_redis", None)
    monkeypatch.setattr(limits, "_away_until", 0.0)
    for _ in range(2):
        limits.take(caller())
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("retain:requests*")
