"""A small scripted supervisor: speaks the protocol over a real Unix socket and remembers what it was told."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.domain.decisions import ControllerState
from app.domain.messages import (
    DOWNWARD,
    UPWARD,
    Ack,
    Carry,
    DecisionReply,
    Evaluated,
    Order,
    OrderMessage,
    PublishTarget,
    RollBack,
    StopMessage,
    Upward,
)
from app.domain.runplan import ResumePoint, RunPlan

ROOT = Path(__file__).parents[3]


@dataclass
class Committed:
    """What the job's row points at."""

    directory: str
    branch: int
    step: int
    decision: DecisionReply | None = None
    carry: Carry | None = None
    state: ControllerState | None = None


@dataclass
class Supervisor:
    """Answers a trainer; its memory outlives attempts as the database would.

    `decide` gives the reply's fields for an evaluation; `at` maps a message type and how many of it came
    before to something sent down or done: a Downward message, or "kill".
    """

    plan: RunPlan
    scratch: Path
    decide: Callable[["Supervisor", Evaluated], dict[str, Any]] = lambda _, e: {}
    committed: Committed | None = None
    checkpoints: dict[tuple[int, int], str] = field(
        default_factory=dict
    )  # (branch, step) -> directory
    decisions: dict[tuple[int, int], DecisionReply] = field(default_factory=dict)
    orders: dict[int, Order] = field(default_factory=dict)  # version -> Order as recorded
    messages: list[tuple[int, Upward]] = field(default_factory=list)
    attempt: int = 0
    branch: int = 0
    is_silent: bool = False  # gives no decision after the first

    def next_plan(self):
        """The plan of the next attempt, with everything known so far."""
        self.attempt += 1
        resume = None
        if self.committed is not None:
            c = self.committed
            resume = ResumePoint(
                checkpoint_directory=c.directory,
                branch=c.branch,
                step=c.step,
                decision=c.decision,
                carry=c.carry,
                state=c.state,
                orders=tuple(o for o in self.orders.values() if o.branch == c.branch),
            )
        self.plan = self.plan.model_copy(
            update={"attempt": self.attempt, "branch": self.branch, "resume": resume}
        )
        return self.plan

    def spawn(self, *, kill_at=None, send_at=None, kill=None):
        """Runs one attempt in a process of its own; its exit code, negative for a signal."""
        plan = self.next_plan()
        path = self.scratch / f"plan-{self.attempt}.json"
        path.write_text(plan.model_dump_json())
        address = str(self.scratch / f"s{self.attempt}")
        server = _listen(address)
        command = [sys.executable, "-m"]
        if plan.num_processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += [str(plan.num_processes), "-m"]
        command += ["workers.training.trainer", "--plan", str(path), "--socket", address]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.scratch / f"log-{self.attempt}").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        connection = _accept(server, process)
        assert connection is not None, self.log()
        self.serve(connection, kill=kill or process.kill, kill_at=kill_at, send_at=send_at)
        code = process.wait(timeout=60)
        server.close()
        return code

    def run_here(self, *, send_at=None, send_after=None):
        """Runs one attempt in this process, served by a thread; its exit code."""
        from workers.training.trainer import run_plan

        plan = self.next_plan()
        address = str(self.scratch / f"s{self.attempt}")
        server = _listen(address)
        problems = []

        def answer():
            connection, _ = server.accept()
            try:
                self.serve(connection, send_at=send_at, send_after=send_after)
            except BaseException as error:  # shown by the test
                problems.append(error)
                raise

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        code = run_plan(plan, address)
        thread.join(timeout=60)
        server.close()
        assert not problems, problems
        return code

    def serve(self, connection, *, kill=None, kill_at=None, send_at=None, send_after=None):
        """Answers until the trainer closes; `kill_at` and `send_at` look at each message first."""
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                message = UPWARD.validate_json(line)
                self.messages.append((self.attempt, message))
                if kill_at is not None and kill_at(message):
                    kill()
                    return
                for extra in (send_at(message) if send_at is not None else None) or ():
                    _send(connection, extra)
                reply = self.answer(message)
                if reply is not None:
                    _send(connection, reply)
                for extra in (send_after(message) if send_after is not None else None) or ():
                    _send(connection, extra)

    def answer(self, message):
        """Records a message as the database would; the reply, where one is due."""
        kind = message.type
        if kind in ("progress", "note"):
            return None
        if kind == "order_applied":
            order = self.orders[message.version].model_copy(update={"effective_step": message.step})
            self.orders[message.version] = order
            if order.roll_back is not None:
                self.branch = order.roll_back.branch
            return None
        if kind == "checkpoint_saved":
            self.checkpoints[message.branch, message.step] = message.directory
            self.committed = Committed(message.directory, message.branch, message.step)
        elif kind == "planned":
            self.plan = self.plan.model_copy(
                update={"eval_interval": message.eval_interval, "gate_items": message.gate_items}
            )
        elif kind == "baseline_measured":
            scores = {s.benchmark_version_id: s for s in message.scores}
            self.plan = self.plan.model_copy(
                update={
                    "benchmarks": tuple(
                        b.model_copy(
                            update={
                                "baseline_scores": scores[b.benchmark_version_id].scores,
                                "baseline_tokens": scores[b.benchmark_version_id].tokens,
                            }
                        )
                        if b.benchmark_version_id in scores
                        else b
                        for b in self.plan.benchmarks
                    )
                }
            )
        elif kind == "evaluated":
            return None if self.is_silent and self.decisions else self.record(message)
        return Ack(reply_to=message.id)

    def record(self, message):
        """The recorded decision of an evaluation; the same when it is reported again."""
        key = (message.branch, message.step)
        if key not in self.decisions:
            publish = None
            if message.is_last:
                publish = PublishTarget(
                    checkpoint_id=f"{message.branch}/{message.step}",
                    checkpoint_directory=self.checkpoints[key],
                    branch=message.branch,
                    step=message.step,
                    status="good",
                )
            fields = {
                "action": "keep",
                "reason": "as scripted",
                "state": self.last_state(),
                "finish": message.is_last,
                "publish": publish,
                **self.decide(self, message),
            }
            self.decisions[key] = DecisionReply(reply_to=message.id, **fields)
        reply = self.decisions[key]
        if reply.roll_back is not None:
            target = reply.roll_back
            self.branch = target.branch
            self.committed = Committed(
                target.checkpoint_directory,
                target.branch,
                target.step,
                carry=message.carry,
                state=reply.state,
            )
        elif self.committed is not None:
            self.committed.decision = reply
        return reply.model_copy(update={"reply_to": message.id})

    def last_state(self):
        """The coefficients of the latest decision, or those the plan starts with."""
        if self.decisions:
            return list(self.decisions.values())[-1].state
        from workers.training.build import first_controller

        return first_controller(self.plan)

    def to_checkpoint(self, branch, step):
        """A rollback to a checkpoint, onto the next branch."""
        return RollBack(
            checkpoint_id=f"{branch}/{step}",
            checkpoint_directory=self.checkpoints[branch, step],
            step=step,
            branch=self.branch + 1,
        )

    def of(self, kind):
        """All messages of a type, over all attempts."""
        return [m for _, m in self.messages if m.type == kind]

    def log(self):
        """What the last process wrote."""
        return (self.scratch / f"log-{self.attempt}").read_text()


def stop(mode):
    """A wish to leave."""
    return StopMessage(mode=mode)


def order(supervisor, entry):
    """An order from outside, recorded and ready to send."""
    supervisor.orders[entry.version] = entry
    return OrderMessage(order=entry)


def _listen(address):
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(address)
    server.listen(1)
    return server


def _accept(server, process):
    """The trainer's connection; None where it ended without one."""
    server.settimeout(0.5)
    while process.poll() is None:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        return connection
    server.close()
    return None


def _send(connection, message):
    connection.sendall(DOWNWARD.dump_json(message) + b"\n")


SIGKILLED = -signal.SIGKILL
