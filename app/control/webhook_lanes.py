"""Who is tried next: one lane for each endpoint, so that a slow receiver holds up nobody but itself."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from app.db.repositories.webhook_deliveries import ClaimedDelivery

PER_ENDPOINT: Final = 2  # tries at once
MAX_IN_FLIGHT: Final = 50  # tries at once, of all endpoints
MAX_HELD: Final = 500  # claims at once, of all endpoints
_AHEAD_SECONDS = 1.0  # of work are claimed ahead, by how fast the endpoint answered
_MAX_AHEAD = 64
#: A claim with less time than this left might run out during the try, and is given back instead.
LEAST_SECONDS: Final = 20.0


@dataclass(frozen=True)
class Claim:
    """A claimed delivery, and when the claim runs out on this process's own clock."""

    delivery: ClaimedDelivery
    deadline: float  # monotonic, never later than the database's

    def holds(self, seconds: float = 0.0) -> bool:
        """Whether nobody else gets it for so many seconds."""
        return time.monotonic() + seconds < self.deadline


@dataclass
class Lane:
    """What is claimed for one endpoint."""

    waiting: deque[Claim] = field(default_factory=deque)
    num_running: int = 0
    pace_seconds: float = _AHEAD_SECONDS  # a try takes so long; slow until it has shown otherwise
    may_have_more: bool = False  # the last claim got all that it asked for
    is_closed: bool = False  # it said that it is gone, which is not recorded yet

    @property
    def num_held(self) -> int:
        """Claims on this endpoint."""
        return len(self.waiting) + self.num_running

    @property
    def capacity(self) -> int:
        """Claims worth holding: what the endpoint takes in a second."""
        if self.is_closed:
            return 0
        ahead = int(PER_ENDPOINT * _AHEAD_SECONDS / max(self.pace_seconds, 1e-3))
        return max(PER_ENDPOINT, min(ahead, _MAX_AHEAD))


class Lanes:
    """The lanes of all endpoints with something claimed; takes turns between them."""

    def __init__(self) -> None:
        self._lanes: dict[UUID, Lane] = {}
        self.num_held = 0
        self.num_running = 0
        self.is_crowded = False  # somebody waits for one of the slots that all share

    def room(self) -> dict[UUID, int]:
        """How many more claims each known endpoint may get."""
        return {key: max(lane.capacity - lane.num_held, 0) for key, lane in self._lanes.items()}

    def add(self, claims: list[Claim], asked: dict[UUID, int]) -> None:
        """Takes claims in."""
        got: dict[UUID, int] = {}
        for claim in claims:
            key = claim.delivery.endpoint_id
            self._lanes.setdefault(key, Lane()).waiting.append(claim)
            got[key] = got.get(key, 0) + 1
        self.num_held += len(claims)
        for key, lane in self._lanes.items():
            lane.may_have_more = got.get(key, 0) >= max(asked.get(key, PER_ENDPOINT), 1)
        idle = [k for k, lane in self._lanes.items() if lane.num_held == 0 and not lane.is_closed]
        for key in idle:
            del self._lanes[key]

    def take(self) -> Iterator[Claim]:
        """Claims to try now, as many as may run at once; each endpoint's turn comes once a round."""
        self.is_crowded = False
        ready = deque(key for key, lane in self._lanes.items() if lane.waiting)
        while ready:
            key = ready.popleft()
            claim = self.take_of(key)
            if claim is not None:
                yield claim
                ready.append(key)

    def take_of(self, endpoint_id: UUID) -> Claim | None:
        """The endpoint's next claim, when it may be tried at once."""
        lane = self._lanes.get(endpoint_id)
        if lane is None or not lane.waiting or lane.num_running >= PER_ENDPOINT:
            return None
        if self.num_running >= MAX_IN_FLIGHT:
            self.is_crowded = True
            return None
        lane.num_running += 1
        self.num_running += 1
        return lane.waiting.popleft()

    def ended(self, claim: Claim, seconds: float | None) -> None:
        """A try is over; it took so long, if it was made."""
        lane = self._lanes[claim.delivery.endpoint_id]
        lane.num_running -= 1
        self.num_running -= 1
        self.num_held -= 1
        if seconds is not None:
            lane.pace_seconds = (lane.pace_seconds + seconds) / 2

    def close(self, endpoint_id: UUID) -> list[Claim]:
        """Ends the tries of an endpoint until what it said is recorded; gives up what waits."""
        self._lanes[endpoint_id].is_closed = True
        return self.drop_waiting(endpoint_id)

    def reopen(self, endpoint_ids: Iterable[UUID]) -> None:
        """What closed endpoints said is recorded: the database knows whether they get more."""
        for key in endpoint_ids:
            if key in self._lanes:
                self._lanes[key].is_closed = False

    def is_hungry(self, endpoint_id: UUID) -> bool:
        """Whether an endpoint with more to come has used up half of what was claimed for it."""
        lane = self._lanes.get(endpoint_id)
        return lane is not None and lane.may_have_more and lane.num_held <= lane.capacity // 2

    def drop_waiting(self, endpoint_id: UUID | None = None) -> list[Claim]:
        """Gives up what waits, of one endpoint or of all."""
        dropped: list[Claim] = []
        for key, lane in self._lanes.items():
            if endpoint_id in {None, key}:
                dropped.extend(lane.waiting)
                lane.waiting.clear()
        self.num_held -= len(dropped)
        return dropped
