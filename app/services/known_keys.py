"""Keys that were checked a moment ago: their callers need no query."""

import hashlib
import threading
import time
from collections.abc import Callable
from typing import Final

from app.domain.scopes import Caller

MAX_KEPT: Final = 10_000


class KnownKeys:
    """Callers by their bearer key's digest; what is revoked works on for at most `seconds`.

    Args:
        seconds: How long a check counts; 0 keeps nothing.
        clock: Seconds that never go back.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kept: dict[bytes, tuple[float, Caller]] = {}
        self._lock = threading.Lock()

    def find(self, bearer: str) -> Caller | None:
        """The caller, if the key was checked lately."""
        found = self._kept.get(_digest(bearer))
        return None if found is None or found[0] <= self._clock() else found[1]

    def keep(self, bearer: str, caller: Caller, *, checked_at: float) -> None:
        """Keeps a caller from the time at which the check of its key began."""
        if self._seconds <= 0:
            return
        with self._lock:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[_digest(bearer)] = (checked_at + self._seconds, caller)

    def forget(self, key_id: str) -> None:
        """Drops a key that this process has just revoked."""
        with self._lock:
            self._kept = {at: kept for at, kept in self._kept.items() if kept[1].key_id != key_id}

    def now(self) -> float:
        """The clock's time."""
        return self._clock()


def _digest(bearer: str) -> bytes:
    return hashlib.sha256(bearer.encode(errors="surrogatepass")).digest()
