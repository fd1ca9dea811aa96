"""Saving: at once where something waits for it, else beside training, by a thread; the talk stays in order."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from app.domain.messages import CheckpointSaved
from workers.training.checkpoints import (
    DiskFull,
    Saved,
    make_carry,
    save_checkpoint,
    write_checkpoint,
)
from workers.training.conversation import Conversation
from workers.training.loop import Run
from workers.training.preferences import REWARDS
from workers.training.snapshots import has_memory_for_copy, take_snapshot

Point = tuple[int, int]  # branch and step
Metrics = dict[str, float | None]


@dataclass
class Writing:
    """One checkpoint on its way to the disk.

    Attributes:
        point: Of the run when it was copied.
        metrics: That go with it.
        is_told: The supervisor knows of it.
    """

    point: Point
    metrics: Metrics
    is_told: bool = False
    _thread: threading.Thread | None = None  # None on ranks that write nothing
    _saved: list[Saved] = field(default_factory=list)
    _errors: list[Exception] = field(default_factory=list)

    def start(self, write: Callable[[], Saved]) -> None:
        """Begins to write."""

        def work() -> None:
            try:
                self._saved.append(write())
            except Exception as error:  # noqa: BLE001 - raised again where the result is asked for
                self._errors.append(error)

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def was_here(self) -> bool:
        """This rank is the one that writes."""
        return self._thread is not None

    @property
    def is_done(self) -> bool:
        """Nothing is left to wait for."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Saved | None:
        """What was written; None where there was no room for it, or another rank writes.

        Raises:
            OSError: It could not be written for another reason.
        """
        if self._thread is not None:
            self._thread.join()
        for error in self._errors:
            if not isinstance(error, DiskFull):
                raise error
        return self._saved[0] if self._saved else None


class Saver:
    """Saves a run's checkpoints and tells the supervisor of them, in the order of their steps.

    Every method but `announce` is called by every rank.

    Args:
        talk: With the supervisor.
        scratch: The job's scratch directory.
        attempt: Of the job.
    """

    def __init__(self, talk: Conversation, scratch: Path, attempt: int) -> None:
        self._talk = talk
        self._scratch = scratch
        self._attempt = attempt
        self._saved_at: Point | None = None  # of the last checkpoint
        self._saved_bytes = 0
        self._writing: Writing | None = None

    def save(self, run: Run, *, is_evaluated: bool) -> bool:
        """Saves and registers a checkpoint; False where the disk is full, which is only warned of."""
        self.settle(run)
        point = (run.branch, run.step)
        if self._saved_at == point:
            return True  # the state of a branch at a step is one
        saved, problem = None, False
        if run.ranks.is_speaker:
            try:
                saved = save_checkpoint(
                    run, self._scratch, self._attempt, last_size=self._saved_bytes
                )
            except DiskFull:
                problem = True
                self._warn(run.step)
        if run.ranks.broadcast(problem):
            return False
        self._talk.ask(self._message(point, saved, _last_metrics(run), is_evaluated=is_evaluated))
        self._saved_at = point
        self._saved_bytes = 0 if saved is None else saved.size_bytes
        return True

    def save_beside(self, run: Run) -> None:
        """Saves a checkpoint that nothing waits for: training goes on once the state is copied.

        Where the host's memory has no room for a copy, it is saved as any other.
        """
        self.settle(run)
        point = (run.branch, run.step)
        if self._saved_at == point:
            return
        if not run.ranks.broadcast(has_memory_for_copy(run)):
            self.save(run, is_evaluated=False)
            return
        writing = Writing(point, _last_metrics(run))
        if run.ranks.is_speaker:
            snapshot = take_snapshot(run, make_carry(run), is_copy=True)
            last_size = self._saved_bytes
            writing.start(
                partial(
                    write_checkpoint, snapshot, self._scratch, self._attempt, last_size=last_size
                )
            )
        self._writing, self._saved_at = writing, point

    def announce(self) -> None:
        """Tells the supervisor of a checkpoint that was written meanwhile; waits for nothing."""
        writing = self._writing
        if writing is None or writing.is_told or not writing.is_done:
            return
        saved = writing.wait()
        writing.is_told = True
        if saved is not None:
            self._saved_bytes = saved.size_bytes
            message = self._message(writing.point, saved, writing.metrics, is_evaluated=False)
            self._talk.tell(message)
        elif writing.was_here:
            self._warn(writing.point[1])

    def settle(self, run: Run) -> None:
        """Waits for the checkpoint that is being written, so that what follows is told after it."""
        writing = self._writing
        if writing is None:
            return
        is_missing = writing.wait() is None and run.ranks.is_speaker
        self.announce()
        self._writing = None
        if run.ranks.broadcast(is_missing):
            self._saved_at = None

    def _message(
        self, point: Point, saved: Saved | None, metrics: Metrics, *, is_evaluated: bool
    ) -> CheckpointSaved:
        """What the supervisor is told; a rank that wrote nothing tells nobody."""
        branch, step = point
        return CheckpointSaved(
            id=self._talk.next_id(),
            branch=branch,
            step=step,
            directory="" if saved is None else str(saved.directory),
            manifest_sha256="" if saved is None else saved.manifest_sha256,
            size_bytes=0 if saved is None else saved.size_bytes,
            metrics=metrics,
            is_evaluated=is_evaluated,
        )

    def _warn(self, step: int) -> None:
        self._talk.note(
            "warn",
            "disk_full",
            f"No room for the checkpoint of step {step}; training goes on without it.",
            step=step,
        )


def _last_metrics(run: Run) -> Metrics:
    last = run.history[-1] if run.history else None
    found = {
        "train_loss": None if last is None else last.train_loss,
        "train_mean_token_accuracy": None if last is None else last.train_mean_token_accuracy,
    }
    if last is not None:
        found |= {name: last.values[name] for name in REWARDS if name in last.values}
    return found
