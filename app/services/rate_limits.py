"""How many requests a key and its project may send a minute, counted in Redis in blocks."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import structlog
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.domain.scopes import Caller
from app.errors import QuotaExceeded
from app.settings import Settings

log = structlog.get_logger()

WINDOW_SECONDS: Final = 60
#: A process takes a hundredth of a limit at a time, so that Redis is asked once in so many requests; small
#: limits are counted one by one. What a process took and did not use is lost to the others until the minute ends.
BLOCKS: Final = 100
REDIS_SECONDS: Final = 0.25  # to connect, and to answer
AWAY_SECONDS: Final = 10.0  # of counting in this process, before Redis is tried again


class RateLimited(QuotaExceeded):
    """Too many requests in this minute; the one 429 that is worth sending again by itself."""

    code = "rate_limit_exceeded"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of the tighter limit; `is_over` when this request found nothing left."""

    limit: int
    remaining: int
    reset_seconds: int
    scope: str  # whose limit it is: `key` or `project`
    is_over: bool = False


#: Of a server without limits.
UNLIMITED: Final = Allowance(limit=0, remaining=0, reset_seconds=0, scope="none")


class _Limit(NamedTuple):
    """One limit that a request counts against."""

    name: str  # of its counter
    scope: str
    size: int


@dataclass(slots=True)
class _Lease:
    """Requests that this process may let through, of the `counted` ones that all processes took."""

    left: int
    counted: int


class RateLimiter:
    """Counts requests by key and by project in windows of a minute.

    Counts live in Redis, shared by all processes; while it is away each process counts for itself, and nothing
    fails.

    Args:
        settings: The limits (0: none) and where Redis is.
        clock: Seconds since 1970.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._per_key = settings.requests_per_minute_per_key
        self._per_project = settings.requests_per_minute_per_project
        self._redis_url = settings.redis_url
        self._clock = clock
        self._window = 0
        self._leases: dict[str, _Lease] = {}
        self._lock = threading.Lock()  # held for moments, never while waiting
        self._refill = threading.Lock()  # one thread asks Redis, the others use what it gets
        self._redis: RedisStorage | None = None
        self._memory: MemoryStorage | None = None
        self._away_until = 0.0

    def take_at_once(self, caller: Caller) -> Allowance | None:
        """Counts a request without waiting for anything; None when `take` has to ask Redis first."""
        limits = self._limits_of(caller)
        with self._lock:
            now = self._turn()
            if any(self._is_due(limit) for limit in limits):
                return None
            empty = [limit for limit in limits if self._leases[limit.name].left < 1]
            if not empty:
                for limit in limits:
                    self._leases[limit.name].left -= 1
            shown = [
                Allowance(
                    limit=limit.size,
                    remaining=self._remaining(limit),
                    reset_seconds=math.ceil((self._window + 1) * WINDOW_SECONDS - now),
                    scope=limit.scope,
                    is_over=bool(empty),
                )
                for limit in empty or limits
            ]
        return min(shown, key=lambda allowance: allowance.remaining, default=UNLIMITED)

    def take(self, caller: Caller) -> Allowance:
        """Counts a request; Redis is asked for a block of each limit of which this process has none left."""
        found = self.take_at_once(caller)
        while found is None:
            with self._refill:
                self._fetch(caller)
            found = self.take_at_once(caller)
        return found

    def _limits_of(self, caller: Caller) -> list[_Limit]:
        both = (
            _Limit(f"key/{caller.key_id}", "key", self._per_key),
            _Limit(f"project/{caller.project_id.hex}", "project", self._per_project),
        )
        return [limit for limit in both if limit.size > 0]

    def _turn(self) -> float:
        """The time; leases end with their window."""
        now = self._clock()
        window = int(now // WINDOW_SECONDS)
        if window != self._window:
            self._window = window
            self._leases.clear()
        return now

    def _is_due(self, limit: _Limit) -> bool:
        """Whether nothing is known of a limit, or nothing is left here while others may still have some."""
        lease = self._leases.get(limit.name)
        return lease is None or (lease.left < 1 and lease.counted < limit.size)

    def _remaining(self, limit: _Limit) -> int:
        lease = self._leases[limit.name]
        return max(limit.size - lease.counted, 0) + lease.left

    def _fetch(self, caller: Caller) -> None:
        """Takes a block of each limit that is due."""
        with self._lock:
            self._turn()
            window = self._window
            due = [limit for limit in self._limits_of(caller) if self._is_due(limit)]
        for limit in due:
            block = max(limit.size // BLOCKS, 1)
            counted = self._count(f"{limit.name}/{window}", block)
            granted = min(max(limit.size - (counted - block), 0), block)
            with self._lock:
                self._turn()
                if self._window == window:
                    self._leases[limit.name] = _Lease(granted, counted)

    def _count(self, name: str, amount: int) -> int:
        """A shared counter after adding to it."""
        if self._redis_url is not None and time.monotonic() >= self._away_until:
            try:
                if self._redis is None:
                    self._redis = open_redis(self._redis_url)
                return self._redis.incr(name, 2 * WINDOW_SECONDS, amount)
            except StorageError as error:
                self._away_until = time.monotonic() + AWAY_SECONDS
                log.warning("api.rate_limits_without_redis", error=str(error)[:200])
        if self._memory is None:
            self._memory = MemoryStorage()
        return self._memory.incr(name, 2 * WINDOW_SECONDS, amount)


def open_redis(url: str) -> RedisStorage:
    """A store of counters; nothing is sent before the first count."""
    return RedisStorage(
        url,
        key_prefix="retain:requests",
        wrap_exceptions=True,
        socket_timeout=REDIS_SECONDS,
        socket_connect_timeout=REDIS_SECONDS,
        # The client's own retries would take seconds while Redis is away.
        retry=Retry(NoBackoff(), 0),  # type: ignore[arg-type]
    )
