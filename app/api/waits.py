"""Long polls: how long a client wants to wait, and the wait itself."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final, TypeVar
from uuid import UUID

from fastapi import Header, Query, Request, Response
from pydantic import BaseModel

from app.api.dependencies import Resources
from app.domain.scopes import Caller
from app.services.waiting import WaitingRoom, noticing_departure

Wait = Annotated[
    float | None, Query(ge=0, le=3600, description="Seconds to wait for a change before answering")
]
Prefer = Annotated[
    str | None, Header(max_length=512, description="`wait=` seconds, as RFC 7240 has it")
]

_PREFER_WAIT: Final = re.compile(
    r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?:$|[,;\s])", re.IGNORECASE
)

Shown = TypeVar("Shown")


@dataclass(frozen=True, slots=True)
class Waiter:
    """One request that waits for something to happen to a job."""

    room: WaitingRoom
    request: Request
    caller: Caller
    job_id: UUID
    seconds: float

    async def until(
        self,
        first: tuple[Shown, int],
        read: Callable[[], tuple[Shown, int]],
        is_enough: Callable[[Shown], bool],
    ) -> Shown:
        """Reads when something happened until that is enough, the time is over or the client has left.

        No session is held while waiting: every look is a short transaction of its own.

        Args:
            first: What was read before.
            read: Gives what is shown, and the number of the last line of the job's log.
            is_enough: Of what was read.

        Raises:
            Unauthorized: The key was revoked meanwhile.
            Unavailable: Too many requests wait already.
        """
        ends_at = time.monotonic() + self.seconds
        shown, seen = first
        with (
            self.room.watch(self.job_id, self.caller, seen=seen) as watch,
            noticing_departure(watch, self.request.receive),
        ):
            while not (is_enough(shown) or watch.is_gone or self.room.is_closing):
                left = ends_at - time.monotonic()
                if left <= 0:
                    break
                await self.room.wait(watch, left)
                shown, watch.seen = await self.room.look(read)
        return shown


def wished_wait(
    resources: Resources, wait: float | None, prefer: str | None
) -> tuple[float, int | None]:
    """Seconds to wait, within the server's limit, and how many of a `Prefer` header are honoured."""
    most = resources.settings.max_wait_seconds
    if wait is not None:
        return min(wait, most), None
    found = None if prefer is None else _PREFER_WAIT.search(prefer)
    if found is None:
        return 0.0, None
    seconds = min(int(found[1]), int(most))
    return float(seconds), seconds


def answer(shown: BaseModel, applied: int | None = None) -> Response:
    """A model as JSON, written once: FastAPI would check and copy it before it writes it."""
    headers = None if applied is None else {"preference-applied": f"wait={applied}"}
    return Response(shown.model_dump_json(), media_type="application/json", headers=headers)
