"""What a trainer says becomes durable here: stored, written under the fence, answered."""

import errno
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from app.domain.messages import (
    Ack,
    BaselineMeasured,
    CheckpointSaved,
    DecisionReply,
    Downward,
    Evaluated,
    EvaluationFinished,
    ExportFinished,
    Failed,
    Finished,
    Note,
    Order,
    OrderApplied,
    Planned,
    Progress,
    Repaired,
    StepMetrics,
    Stopped,
    Upward,
)
from app.domain.states import JobState
from app.errors import Fenced, NotFound
from app.services import engine, finishing, progress
from app.services.checkpoints import (
    checkpoint_path,
    expire_checkpoints,
    mark_corrupt,
    register_checkpoint,
)
from app.services.evaluation_jobs import finish_evaluation
from app.services.monitoring import record_baseline
from app.services.runs import find_state
from app.services.scratch import SavedState, Scratch
from app.services.storage import Storage
from app.settings import Settings
from workers.supervisor.inputs import CheckpointDamaged, fetch_state
from workers.supervisor.lease import Lease
from workers.supervisor.ledger import Ledger
from workers.supervisor.room import DISK_FULL, MissedSaves

MAX_KEPT_METRICS = 1000
BAD_CHECKPOINT = "bad_checkpoint"
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Localised = TypeVar("Localised", DecisionReply, Order)


class Recorder:
    """One attempt's word to the database and the store.

    While the database is away, what the trainer need not wait for is put off; the rest waits.

    Args:
        lease: Of the attempt.
        ledger: Its transactions.
        storage: Where checkpoints and artifacts go.
        settings: Periods and limits.
        scratch: The attempt's directories.
    """

    def __init__(
        self,
        lease: Lease,
        ledger: Ledger,
        storage: Storage,
        settings: Settings,
        scratch: Scratch,
    ) -> None:
        self.ended: JobState | None = None  # where this attempt left the job
        self.crash: str | None = None  # the trainer cannot go on, but another attempt may
        self.branch = 0  # the trainer's
        self._lease = lease
        self._ledger = ledger
        self._storage = storage
        self._settings = settings
        self._scratch = scratch
        self._metrics: list[StepMetrics] = []
        self._local: dict[str, Path] = {}  # by path under the storage root
        self._order_version = 0
        self._target: UUID | None = None  # the checkpoint that the trainer was last sent to
        self._missed = MissedSaves(ledger, scratch)

    def begin(self, *, order_version: int, state: SavedState | None) -> None:
        """Takes note of what the plan holds already."""
        self._order_version = order_version
        self._target = None if state is None else state.checkpoint_id

    def handle(self, message: Upward) -> Downward | None:
        """Makes a message durable and answers it.

        Raises:
            Fenced: The attempt lost its job.
            GivenUp: The database stayed away for too long.
        """
        answer: Downward | None = Ack(reply_to=message.id)
        match message:
            case Progress():
                self._progress(message)
                answer = None
            case Note() | OrderApplied():
                self._ledger.write_soon(partial(self._record, message=message))
                if isinstance(message, Note) and message.code == DISK_FULL:
                    self._missed.add()  # on the trainer's own disk
                answer = None
            case CheckpointSaved():
                self._save(message)
            case Evaluated():
                answer = self._evaluated(message)
            case BaselineMeasured() | Planned() | Repaired():
                self._ledger.write(partial(self._record, message=message))
            case Finished() | ExportFinished() | EvaluationFinished():
                self._conclude(message)
            case Failed():
                self._failed(message)
            case Stopped():
                self.end_stopped(message.mode)
        return answer

    def list_new_orders(self) -> list[Order]:
        """Orders from outside that the trainer has not been sent, with local paths."""
        if self._lease.order_version <= self._order_version:
            return []
        operation = partial(
            progress.list_new_orders,
            job_id=self._scratch.job_id,
            branch=self.branch,
            after=self._order_version,
        )
        orders = self._ledger.write_now(operation) or []
        self._order_version = max([self._order_version, *(order.version for order in orders)])
        return [self.localise(order) for order in orders]

    def localise(self, message: Localised) -> Localised:
        """The message with directories on this disk where it names paths in the store.

        Raises:
            CheckpointDamaged: The checkpoint is not what was saved; it is marked so.
        """
        changes = {}
        for field in ("roll_back", "publish"):
            target = getattr(message, field, None)
            if target is not None:
                directory = self._bring(target.checkpoint_directory)
                changes[field] = target.model_copy(update={"checkpoint_directory": directory})
        return message.model_copy(update=changes)

    def bring(self, state: SavedState) -> None:
        """Brings a stored checkpoint to this disk.

        Raises:
            CheckpointDamaged: It is not what was saved; it is marked so.
        """
        try:
            fetch_state(self._storage, state)
        except (CheckpointDamaged, NotFound) as error:
            self._mark_corrupt(state.checkpoint_id)
            raise CheckpointDamaged(str(error)) from error
        self._local[state.path] = state.local

    def end_stopped(self, mode: str) -> None:
        """The trainer has left, or was ended, because it was told to."""
        match mode:
            case "pause":
                operation, ends = engine.mark_paused, {JobState.PAUSED, JobState.CANCELLED}
            case "cancel":
                operation, ends = engine.mark_cancelled, {JobState.CANCELLED}
            case _:
                operation = partial(engine.release_job, reason="The worker is shutting down.")
                ends = {JobState.QUEUED, JobState.PAUSED, JobState.CANCELLED}
        self._end(operation, ends)

    def end_crashed(self, reason: str) -> None:
        """The trainer died."""
        rules = engine.CrashRules(self._settings.max_crashes, self._settings.lease_ttl_seconds)
        self._end(
            partial(engine.record_crash, reason=reason, rules=rules),
            {JobState.QUEUED, JobState.FAILED, JobState.PAUSED, JobState.CANCELLED},
        )

    def end_failed(self, *, code: str, message: str, param: str | None = None) -> None:
        """The run cannot go on, nor would trying again help."""
        operation = partial(engine.fail_job, code=code, message=message, param=param)
        self._end(operation, {JobState.FAILED})

    def _record(self, session: Session, message: Upward) -> None:
        """Messages whose record is one call."""
        job_id, attempt = self._scratch.job_id, self._scratch.attempt
        match message:
            case BaselineMeasured():
                record_baseline(session, engine.hold(session, job_id, attempt), message.scores)
            case Planned():
                progress.store_plan(session, job_id, attempt, message)
            case Repaired():
                progress.record_repair(session, job_id, attempt, message)
            case OrderApplied():
                progress.record_order_applied(session, job_id, attempt, message)
            case Note():
                engine.note(
                    session,
                    job_id,
                    attempt,
                    level=message.level,
                    code=message.code,
                    message=message.message,
                    data=message.data,
                )
            case _:
                raise TypeError(f"{message.type} is not recorded by one call")

    def _progress(self, message: Progress) -> None:
        self.branch = message.branch
        self._lease.position = (message.branch, message.step)
        kept = [*self._metrics, *progress.sample_metrics(message.metrics, message.total_steps)]
        self._metrics = kept[-MAX_KEPT_METRICS:]
        sent_at = time.monotonic()
        full = message.model_copy(update={"metrics": tuple(self._metrics)})
        operation = partial(
            progress.save_progress,
            job_id=self._scratch.job_id,
            attempt=self._scratch.attempt,
            message=full,
            worker_id=self._lease.holding.worker_id,
            ttl=self._settings.lease_ttl_seconds,
        )
        answer = self._ledger.write_now(operation)
        if answer is not None:
            self._metrics = []
            self._lease.note(answer, sent_at)

    def _save(self, message: CheckpointSaved) -> None:
        """Uploads a checkpoint, then registers it; an evaluated one is registered before its evaluation."""
        job_id, attempt = self._scratch.job_id, self._scratch.attempt
        self.branch = message.branch
        path = checkpoint_path(job_id, attempt, message.branch, message.step)
        local = self._own(message.directory)
        if not (self._upload(local, path) or (self._thin_out() and self._upload(local, path))):
            shutil.rmtree(local, ignore_errors=True)
            self._missed.add_of_store(message.branch, message.step)
            return
        self._missed.end()
        self._local[path] = local
        register = partial(
            register_checkpoint, job_id=job_id, attempt=attempt, message=message, path=path
        )
        if message.is_evaluated:
            self._ledger.write(register)
        else:
            self._ledger.write_soon(register)
            self._thin_out()

    def _upload(self, local: Path, path: str) -> bool:
        """Stores a checkpoint; False where the store is full."""
        try:
            self._storage.delete(path)  # of an upload that was broken off
            self._storage.put_directory(local, path)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            return False
        return True

    def _evaluated(self, message: Evaluated) -> DecisionReply:
        operation = partial(
            progress.record_point,
            job_id=self._scratch.job_id,
            attempt=self._scratch.attempt,
            message=message,
        )
        reply = self.localise(self._ledger.write(operation))
        target = reply.roll_back or reply.publish
        if target is not None:
            self._target = _uuid(target.checkpoint_id)
        self._thin_out()
        return reply

    def _thin_out(self) -> bool:
        """Deletes checkpoints that are not worth keeping, here and in the store; whether there were any."""
        operation = partial(
            expire_checkpoints, job_id=self._scratch.job_id, attempt=self._scratch.attempt
        )
        paths = self._ledger.write_now(operation) or []
        for path in paths:
            self._storage.delete(path)
            local = self._local.pop(path, None)
            if local is not None:
                shutil.rmtree(local, ignore_errors=True)
        return bool(paths)

    def _conclude(self, message: Finished | ExportFinished | EvaluationFinished) -> None:
        match message:
            case Finished():
                self._finish(message)
            case ExportFinished():
                self._finish_export(message)
            case EvaluationFinished():
                self._end(partial(finish_evaluation, message=message), {JobState.SUCCEEDED})

    def _finish(self, message: Finished) -> None:
        artifact = result = None
        csv = self._own(message.result_csv)
        if message.artifact_directory is not None:
            directory = self._own(message.artifact_directory)
            artifact = self._storage.put_directory(directory, f"models/{uuid4().hex}")
        if csv.is_file():
            result = self._storage.put_file(csv, f"files/{uuid4().hex}")
        uploads = finishing.Uploads(artifact, result)
        operation = partial(finishing.finish_job, message=message, uploads=uploads)
        try:
            self._end(operation, {JobState.SUCCEEDED, JobState.FAILED})
        except Fenced:
            for stored in (artifact, result):
                if stored is not None:
                    self._storage.delete(stored.path)
            raise

    def _finish_export(self, message: ExportFinished) -> None:
        directory = self._own(message.artifact_directory)
        artifact = self._storage.put_directory(directory, f"models/{uuid4().hex}")
        operation = partial(finishing.finish_export, message=message, artifact=artifact)
        try:
            self._end(operation, {JobState.SUCCEEDED, JobState.FAILED})
        except Fenced:
            self._storage.delete(artifact.path)
            raise

    def _failed(self, message: Failed) -> None:
        if message.code != BAD_CHECKPOINT or self._target is None:
            self.end_failed(code=message.code, message=message.message, param=message.param)
            return
        self._mark_corrupt(self._target)
        self.crash = message.message

    def _end(self, operation: Callable[..., JobState], ends: set[JobState]) -> None:
        """Writes the attempt's end; one that was written already, its reply lost, is taken for done."""
        job_id, attempt = self._scratch.job_id, self._scratch.attempt
        self._lease.expect_end()
        try:
            self.ended = self._ledger.write(partial(_call, operation, job_id, attempt))
        except Fenced:
            found = self._ledger.write(partial(engine.find_end, job_id=job_id, attempt=attempt))
            if found not in ends:
                raise
            self.ended = found

    def _bring(self, path: str) -> str:
        """The local directory of a stored checkpoint; empty for the start that was never saved."""
        if not path:
            return ""
        local = self._local.get(path)
        if local is not None and local.exists():
            return str(local)
        state = self._ledger.write(partial(find_state, path=path, scratch=self._scratch))
        if state is None:
            raise CheckpointDamaged(f"No checkpoint lies at {path}.")
        self.bring(state)
        return str(state.local)

    def _mark_corrupt(self, checkpoint_id: UUID) -> None:
        job_id, attempt = self._scratch.job_id, self._scratch.attempt
        self._ledger.write(
            partial(mark_corrupt, job_id=job_id, attempt=attempt, checkpoint_id=checkpoint_id)
        )

    def _own(self, path: str) -> Path:
        """A path that the trainer named, which has to be its own.

        Raises:
            ValueError: It is not.
        """
        found = Path(path).resolve()
        if not found.is_relative_to(self._scratch.directory.resolve()):
            raise ValueError(f"the trainer named a path outside its directory: {path}")
        return found


def _call(
    operation: Callable[..., JobState], job_id: UUID, attempt: int, session: Session
) -> JobState:
    return operation(session, job_id, attempt)


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text.rpartition("_")[2])
    except ValueError:
        return None  # the start, which was never saved
