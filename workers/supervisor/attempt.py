"""One attempt at a job: its inputs brought, its trainer started, heard and ended; whatever happens, recorded."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.domain.messages import EXIT_CUDA, EXIT_FAILED, OrderMessage, StopMessage
from app.domain.runplan import RunPlan
from app.domain.states import JobState, StopRequest
from app.errors import Fenced, NotFound, TrainingFailed, Unavailable
from app.services.evaluation_jobs import prepare_attempt
from app.services.runs import Prepared
from app.services.scratch import Scratch
from app.services.storage import Storage
from app.settings import Settings
from workers.supervisor.channel import BrokenTalk, Channel
from workers.supervisor.inputs import CheckpointDamaged, fetch_input, fetch_state
from workers.supervisor.lease import Holding, Lease
from workers.supervisor.ledger import GivenUp, Ledger
from workers.supervisor.process import TrainerProcess
from workers.supervisor.recorder import Recorder
from workers.supervisor.scratch import using
from workers.supervisor.slots import Slot

TICK_SECONDS = 0.2
USER_ERRORS = range(EXIT_FAILED, 70)  # exit codes of runs that are not tried again

log = structlog.get_logger()

StopMode = Literal["pause", "cancel", "drain"]


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt came to its end.

    Attributes:
        state: Where it left the job; None when it wrote nothing, having lost the job.
        is_device_error: The trainer died of its GPU.
    """

    state: JobState | None
    is_device_error: bool


class Attempt:
    """Runs in one thread, which waits for its trainer.

    Args:
        holding: Which job, as which attempt, for which worker.
        slots: Its devices.
        settings: Of the worker.
        storage: The store.
        is_draining: Whether the worker is to shut down.
        command: Replaces the trainer's command line.
    """

    def __init__(
        self,
        holding: Holding,
        slots: Sequence[Slot],
        settings: Settings,
        storage: Storage,
        *,
        is_draining: Callable[[], bool],
        command: Sequence[str] | None = None,
    ) -> None:
        self.holding = holding
        self._slots = slots
        self._settings = settings
        self._storage = storage
        self._is_draining = is_draining
        self._command = command
        self._scratch = Scratch(settings.scratch_root, holding.job_id, holding.attempt)
        self._lease = Lease(holding, settings)
        self._ledger = Ledger(self._lease, settings, self._may_wait)
        self._recorder = Recorder(self._lease, self._ledger, storage, settings, self._scratch)
        self._told: StopMode | None = None  # what the trainer was told
        self._told_at = 0.0
        self._heard_at = 0.0
        self._is_device_error = False

    def run(self) -> Ending:
        """Works until the job has ended, was given back or lost."""
        self._lease.start()
        try:
            with using(self._scratch.directory):
                self._run()
        except (Fenced, GivenUp) as error:
            log.warning("worker.job_lost", **self._names(), why=str(error) or "database away")
        except (
            Exception
        ) as error:  # the top of an attempt: logged whole, and the job is not left hanging
            log.exception("worker.attempt_broke", **self._names())
            with contextlib.suppress(Fenced, GivenUp, SQLAlchemyError):
                self._recorder.end_crashed(f"The worker failed: {type(error).__name__}.")
        finally:
            self._lease.stop()
            self._ledger.close()
        state = self._recorder.ended
        log.info("worker.attempt_over", **self._names(), state=state and state.value)
        return Ending(state, self._is_device_error)

    def _run(self) -> None:
        try:
            prepared = self._prepare()
        except TrainingFailed as error:
            self._recorder.end_failed(code=error.code, message=error.message, param=error.param)
            return
        except (Unavailable, NotFound, OSError) as error:
            self._recorder.end_crashed(f"The inputs could not be brought: {error}")
            return
        mode = self._wanted()
        if mode is not None:  # nothing has begun yet
            self._recorder.end_stopped(mode)
            return
        channel = Channel()
        try:
            process = self._start(prepared, channel)
            self._lease.at_loss(process.end)
            try:
                reason = self._listen(process, channel)
            finally:
                self._lease.at_loss(None)
                channel.close()
                process.kill()
            self._conclude(process, reason)
        finally:
            channel.close()

    def _prepare(self) -> Prepared:
        """Plans the attempt and brings what it needs; a damaged checkpoint gives way to the one before."""
        while True:
            prepared = self._ledger.write(self._plan)
            for item in prepared.inputs:
                self._lease.check()
                fetch_input(self._storage, item)
            for start in prepared.starts:
                self._lease.check()
                try:
                    fetch_state(self._storage, start)
                except (CheckpointDamaged, NotFound) as error:
                    raise TrainingFailed(str(error), "model", "no_valid_checkpoint") from error
            if prepared.state is not None:
                try:
                    self._recorder.bring(prepared.state)
                except CheckpointDamaged as error:
                    log.warning("worker.checkpoint_damaged", **self._names(), error=str(error))
                    continue
            self._recorder.begin(order_version=prepared.order_version, state=prepared.state)
            return prepared

    def _plan(self, session: Session) -> Prepared:
        return prepare_attempt(session, self.holding.job_id, self.holding.attempt, self._settings)

    def _start(self, prepared: Prepared, channel: Channel) -> TrainerProcess:
        plan = prepared.plan
        if isinstance(plan, RunPlan):
            self._recorder.branch = plan.branch
            if plan.resume is not None and plan.resume.decision is not None:
                decision = self._recorder.localise(plan.resume.decision)
                resume = plan.resume.model_copy(update={"decision": decision})
                plan = plan.model_copy(update={"resume": resume})
        Path(plan.cache_directory).mkdir(parents=True, exist_ok=True)
        path = self._scratch.directory / "plan.json"
        path.write_text(plan.model_dump_json())
        self._heard_at = time.monotonic()
        process = TrainerProcess(
            plan,
            path,
            channel.path,
            self._slots,
            self._scratch.directory / "trainer.log",
            command=self._command,
        )
        log.info("worker.trainer_started", **self._names(), pid=process.pid)
        return process

    def _listen(self, process: TrainerProcess, channel: Channel) -> str | None:
        """Hears the trainer until it has ended or has to be; why it has to be, else None."""
        while True:
            has_ended = process.poll() is not None
            try:
                messages = channel.receive(0 if has_ended else TICK_SECONDS)
                for message in messages:
                    answer = self._recorder.handle(message)
                    if answer is not None:
                        channel.send(answer)
            except BrokenTalk as error:
                return f"The trainer was ended: {error}."
            if messages:
                self._heard_at = time.monotonic()
            elif has_ended and not channel.is_connected:
                return None
            self._lease.check()
            if self._recorder.crash is not None or self._recorder.ended is not None:
                if self._has_overstayed(channel):
                    return self._recorder.crash
                continue
            self._ledger.catch_up()
            self._pass_on(channel)
            reason = self._find_overdue()
            if reason is not None:
                return reason

    def _pass_on(self, channel: Channel) -> None:
        """Tells the trainer what came from outside: orders, and to stop."""
        if not channel.is_connected:
            return
        for order in self._recorder.list_new_orders():
            channel.send(OrderMessage(order=order))
        mode = self._wanted()
        if mode is not None and mode != self._told:
            self._told, self._told_at = mode, time.monotonic()
            channel.send(StopMessage(mode=mode))

    def _wanted(self) -> StopMode | None:
        """What the attempt is to do instead of working on; a cancel goes before all else."""
        match self._lease.stop_requested:
            case StopRequest.CANCEL:
                return "cancel"
            case StopRequest.PAUSE:
                return "pause"
            case None:
                return "drain" if self._is_draining() else None

    def _find_overdue(self) -> str | None:
        """Why the trainer has to be ended now, if it has."""
        now = time.monotonic()
        if self._told is not None and now - self._told_at > self._settings.stop_grace_seconds:
            return "The trainer did not stop when told to."
        if now - self._heard_at > self._settings.stall_seconds:
            return f"The trainer was silent for {self._settings.stall_seconds:.0f} s."
        return None

    def _has_overstayed(self, channel: Channel) -> bool:
        """Whether a trainer whose part is over has had its time to leave."""
        grace = self._settings.stop_grace_seconds
        return channel.is_closed or time.monotonic() - self._heard_at > grace

    def _may_wait(self) -> bool:
        """Whether there is time to wait for the database: a worker that shuts down has little."""
        if not self._is_draining():
            return True
        if self._told is None:
            self._told, self._told_at = "drain", time.monotonic()
        return time.monotonic() - self._told_at < self._settings.stop_grace_seconds

    def _conclude(self, process: TrainerProcess, reason: str | None) -> None:
        """Records how it ended, unless the trainer's last message said so."""
        if self._recorder.ended is not None:
            return
        code = process.poll()
        if self._told is not None and self._recorder.crash is None:
            self._recorder.end_stopped(self._told)  # ended before it could say so, or by us
        elif code in USER_ERRORS:
            self._recorder.end_failed(code="trainer_failed", message=process.last_line())
        else:
            self._is_device_error = code == EXIT_CUDA
            why = self._recorder.crash or reason or _describe(code, process.last_line())
            log.warning("worker.trainer_crashed", **self._names(), why=why, output=process.tail())
            self._recorder.end_crashed(why)

    def _names(self) -> dict[str, str | int]:
        return {"job": str(self.holding.job_id), "attempt": self.holding.attempt}


def _describe(code: int | None, last_line: str) -> str:
    if code is not None and code < 0:
        return f"The trainer was ended by signal {-code}."
    detail = f": {last_line}" if last_line else ""
    return f"The trainer ended with status {code}{detail}."
