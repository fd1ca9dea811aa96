"""The trainer's side of the talk with its supervisor, heard alike by every rank."""

import contextlib
import os
import queue
import socket
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from pydantic import ValidationError

from app.domain.messages import (
    DOWNWARD,
    UPWARD,
    Ack,
    DecisionReply,
    Downward,
    Evaluated,
    Note,
    Order,
    OrderMessage,
    Progress,
    StepMetrics,
    StopMessage,
    Upward,
)
from workers.training.ranks import Ranks

StopMode = Literal["pause", "cancel", "drain"]
PROGRESS_SECONDS = 1.0
EXIT_ALONE = 1  # the supervisor is gone


class StopRequested(Exception):
    """The supervisor told the trainer to leave."""

    def __init__(self, mode: StopMode) -> None:
        super().__init__(mode)
        self.mode = mode


class Line:
    """A connected Unix socket; a thread reads it, and ends the process when it closes."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._is_closing = False
        self.inbox: queue.SimpleQueue[Downward] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="supervisor", daemon=True).start()

    def send(self, message: Upward) -> None:
        """Writes one message; without a reader the process ends."""
        try:
            self._socket.sendall(UPWARD.dump_json(message) + b"\n")
        except OSError:
            os._exit(EXIT_ALONE)

    def close(self) -> None:
        """Ends the talk from this side."""
        self._is_closing = True
        with contextlib.suppress(OSError):  # the other side may have closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    self.inbox.put(DOWNWARD.validate_json(line))
        except (OSError, ValueError, ValidationError):
            pass  # a broken line is as good as a closed one: nothing can be trusted after it
        if not self._is_closing:
            os._exit(EXIT_ALONE)


@dataclass
class _Heard:
    """What came down unasked."""

    orders: list[Order] = field(default_factory=list)
    stop: StopMode | None = None


class Conversation:
    """Rank 0 speaks; what comes down is broadcast, so that all ranks do the same.

    Every method is called by every rank, in the same order.
    """

    def __init__(self, line: Line | None, ranks: Ranks) -> None:
        self._line = line  # None: another rank speaks
        self._ranks = ranks
        self._ids = count(1)
        self._heard = _Heard()
        self._metrics: list[StepMetrics] = []
        self._last_progress = 0.0

    def next_id(self) -> int:
        """Id of the next upward message."""
        return next(self._ids)

    def tell(self, message: Upward) -> None:
        """Sends a message that is not answered."""
        if self._line is not None:
            self._line.send(message)

    def ask(self, message: Upward) -> None:
        """Sends a message and waits until it is durable."""
        self._wait(message, may_leave=False)

    def ask_decision(self, message: Evaluated) -> DecisionReply:
        """Reports an evaluation and waits for its decision.

        Raises:
            StopRequested: Told to leave meanwhile; the checkpoint is saved already.
        """
        reply = self._wait(message, may_leave=True)
        if not isinstance(reply, DecisionReply):
            raise TypeError(f"an evaluation was answered by {type(reply).__name__}")
        return reply

    def ask_alone(self, message: Upward) -> None:
        """As `ask`, without the other ranks: they may have failed."""
        if self._line is not None:
            self._hear_reply(self._line, message, may_leave=False)

    def note(
        self,
        level: Literal["info", "warn"],
        code: str,
        text: str,
        **data: Any,  # noqa: ANN401
    ) -> None:
        """Tells the job's owner something."""
        self.tell(Note(id=self.next_id(), level=level, code=code, message=text, data=data))

    def hear(self) -> tuple[tuple[Order, ...], StopMode | None]:
        """Orders and a wish to stop that came since the last call."""
        if self._line is not None:
            while not self._line.inbox.empty():
                self._keep(self._line.inbox.get())
        heard = (tuple(self._heard.orders), self._heard.stop)
        self._heard.orders = []
        common: tuple[tuple[Order, ...], StopMode | None] = self._ranks.broadcast(heard)
        return common

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Keeps a step's numbers for the next progress message."""
        if self._line is not None:
            self._metrics.append(metrics)

    def progress(self, *, now: bool = False, **fields: Any) -> None:  # noqa: ANN401
        """Sends progress with the metrics so far, at most once a second unless `now`."""
        moment = time.monotonic()
        if self._line is None or not (now or moment - self._last_progress >= PROGRESS_SECONDS):
            return
        self._last_progress = moment
        metrics, self._metrics = tuple(self._metrics), []
        self.tell(Progress(id=self.next_id(), metrics=metrics, **fields))

    def close(self) -> None:
        """Ends the talk."""
        if self._line is not None:
            self._line.close()

    def _wait(self, message: Upward, *, may_leave: bool) -> Ack | DecisionReply | None:
        reply: Ack | DecisionReply | StopMode | None = None
        if self._line is not None:
            reply = self._hear_reply(self._line, message, may_leave=may_leave)
        reply = self._ranks.broadcast(reply)
        if isinstance(reply, str):
            raise StopRequested(reply)
        return reply

    def _hear_reply(
        self, line: Line, message: Upward, *, may_leave: bool
    ) -> Ack | DecisionReply | StopMode:
        line.send(message)
        while not (may_leave and self._heard.stop is not None):
            came = line.inbox.get()
            if not isinstance(came, Ack | DecisionReply):
                self._keep(came)
            elif came.reply_to == message.id:
                return came
        return self._heard.stop

    def _keep(self, message: Downward) -> None:
        if isinstance(message, OrderMessage):
            self._heard.orders.append(message.order)
        elif isinstance(message, StopMessage):
            self._heard.stop = message.mode
