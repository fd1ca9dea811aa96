"""What happens when there is no room for checkpoints: one may be missed, after two in a row the job is paused."""

from functools import partial

from app.services import engine
from app.services.scratch import Scratch
from workers.supervisor.ledger import Ledger

MISSES_BEFORE_PAUSE = 2
DISK_FULL = "disk_full"


class MissedSaves:
    """Counts checkpoints in a row that could not be kept.

    Args:
        ledger: Of the attempt.
        scratch: Says which attempt it is.
    """

    def __init__(self, ledger: Ledger, scratch: Scratch) -> None:
        self._ledger = ledger
        self._scratch = scratch
        self._in_a_row = 0

    def end(self) -> None:
        """A checkpoint was kept."""
        self._in_a_row = 0

    def add_of_store(self, branch: int, step: int) -> None:
        """The store had no room: training goes on without this checkpoint, and the job's owner is told."""
        operation = partial(
            engine.note,
            job_id=self._scratch.job_id,
            attempt=self._scratch.attempt,
            level="warn",
            code=DISK_FULL,
            message=f"The store has no room for the checkpoint of step {step}.",
            data={"branch": branch, "step": step},
        )
        self._ledger.write_soon(operation)
        self.add()

    def add(self) -> None:
        """One more was missed; a job that would go on losing its work is paused."""
        self._in_a_row += 1
        if self._in_a_row != MISSES_BEFORE_PAUSE:
            return
        operation = partial(
            engine.pause_by_itself,
            job_id=self._scratch.job_id,
            attempt=self._scratch.attempt,
            code=DISK_FULL,
            reason=f"There was no room for {self._in_a_row} checkpoints in a row."
            " Make room, then resume the job: it goes on from its last checkpoint.",
        )
        self._ledger.write_soon(operation)
