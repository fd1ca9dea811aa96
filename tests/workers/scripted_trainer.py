"""A trainer that trains nothing: a real child that speaks the protocol, for each test in its own way.

Run as `scripted_trainer.py SCENARIO --plan PLAN --socket PATH`.
"""

import argparse
import base64
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
import zlib
from array import array
from itertools import count
from pathlib import Path
from typing import Any

CARRY = {"cursors": {"streams": {}, "executed": 1, "trained_tokens": 10}, "rng": {}}


class Talk:
    """The trainer's end of the socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._ids = count(1)
        self.unasked: list[dict[str, Any]] = []

    def tell(self, kind: str, **fields: Any) -> int:
        number = next(self._ids)
        self._socket.sendall(json.dumps({"type": kind, "id": number} | fields).encode() + b"\n")
        return number

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        number = self.tell(kind, **fields)
        while True:
            found = self.hear()
            if found.get("reply_to") == number:
                return found
            self.unasked.append(found)

    def hear(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            sys.exit(1)
        found: dict[str, Any] = json.loads(line)
        return found

    def hear_within(self, seconds: float) -> dict[str, Any] | None:
        self._socket.settimeout(seconds)
        try:
            return self.hear()
        except TimeoutError:
            self._lines = self._socket.makefile("rb")
            return None
        finally:
            self._socket.settimeout(None)

    def raw(self, data: bytes) -> None:
        self._socket.sendall(data)


class Script:
    """The scenarios, and what they share."""

    def __init__(self, plan: dict[str, Any], talk: Talk, pace: float) -> None:
        self.plan = plan
        self.talk = talk
        self.pace = pace  # seconds of a step, in scenarios that take their time
        self.big_from = 0  # checkpoints are large from this step on; 0: never
        self.scratch = Path(plan["scratch_directory"])
        resume = plan.get("resume")
        self.branch = plan.get("branch", 0)
        self.step = resume["step"] if resume else 0
        self.total = plan["training"]["total_steps"]

    # ---- what a trainer does

    def progress(self, *, loss: float = 1.0) -> None:
        metrics = {
            "step": self.step,
            "branch": self.branch,
            "train_loss": loss,
            "train_mean_token_accuracy": 0.5,
            "learning_rate": 1e-3,
            "tokens": 10,
            "seconds": 0.01,
            "values": {},
        }
        self.talk.tell(
            "progress",
            branch=self.branch,
            step=self.step,
            total_steps=self.total,
            seconds_remaining=1.0,
            trained_tokens=self.step * 10,
            phase="training",
            metrics=[metrics] if self.step else [],
        )

    def save(self, *, is_evaluated: bool = False, padding: int = 0) -> None:
        directory = (
            self.scratch
            / "checkpoints"
            / f"a{self.plan['attempt']}"
            / f"b{self.branch}"
            / f"step-{self.step}"
        )
        directory.mkdir(parents=True)
        if 0 < self.big_from <= self.step:
            padding = 200_000
        content = f"weights of step {self.step}".encode() + bytes(padding)
        (directory / "model.safetensors").write_bytes(content)
        facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = json.dumps({"step": self.step, "files": {"model.safetensors": facts}})
        (directory / "manifest.json").write_text(manifest)
        self.talk.ask(
            "checkpoint_saved",
            branch=self.branch,
            step=self.step,
            directory=str(directory),
            manifest_sha256=hashlib.sha256(manifest.encode()).hexdigest(),
            size_bytes=100,
            metrics={"train_loss": 1.0},
            is_evaluated=is_evaluated,
        )

    def evaluate(self, *, valid_loss: float = 1.0, losses_finite: bool = True) -> dict[str, Any]:
        self.save(is_evaluated=True)
        return self.talk.ask(
            "evaluated",
            branch=self.branch,
            step=self.step,
            is_last=self.step == self.total,
            scores=[],
            valid_loss=valid_loss,
            valid_mean_token_accuracy=0.5,
            train_loss=1.0,
            seconds=0.1,
            carry=CARRY,
            losses_finite=losses_finite,
        )

    def train_to(self, step: int, *, save_every: int = 10) -> None:
        while self.step < step:
            self.step += 1
            self.progress()
            if self.step % save_every == 0 and self.step < self.total:
                self.save()

    def finish(self, reply: dict[str, Any]) -> None:
        target = reply["publish"]
        weights = Path(target["checkpoint_directory"]) / "model.safetensors"
        artifact = self.scratch / "artifact"
        artifact.mkdir()
        (artifact / "model.safetensors").write_bytes(weights.read_bytes())
        csv = self.scratch / "result.csv"
        csv.write_text("step,train_loss\n1,1.0\n")
        self.talk.ask(
            "finished",
            checkpoint_id=target["checkpoint_id"],
            artifact_directory=str(artifact),
            artifact_kind="full",
            alpha=1.0,
            report=[],
            tuned_report=[],
            valid_loss=0.5,
            frontier=[],
            result_csv=str(csv),
            trained_tokens=self.total * 10,
            seconds={"training": 1.0},
        )

    def run_to_the_end(self) -> None:
        resume = self.plan.get("resume")
        if resume is None:
            self.save()
        reply = resume and resume["decision"]
        if not (reply and reply["finish"]):
            self.train_to(self.total)
            reply = self.evaluate()
        self.finish(reply)

    def wait_for_stop(self) -> None:
        while True:
            self.step += 1
            self.progress()
            heard = self.talk.hear_within(0.05)
            if heard is not None and heard["type"] == "stop_requested":
                if heard["mode"] != "cancel":
                    self.save()
                self.talk.ask("stopped", mode=heard["mode"], branch=self.branch, step=self.step)
                sys.exit(75)

    def pause_a_step(self) -> None:
        """Takes the time of a step; leaves where it is told to meanwhile."""
        heard = self.talk.hear_within(max(self.pace, 0.001))
        told = [*self.talk.unasked, *([] if heard is None else [heard])]
        self.talk.unasked = []
        for message in told:
            if message["type"] == "stop_requested":
                if message["mode"] != "cancel":
                    self.save()
                mode = message["mode"]
                self.talk.ask("stopped", mode=mode, branch=self.branch, step=self.step)
                sys.exit(75)

    # ---- scenarios

    def paced(self, *, bad_at: int = 0, die_at: int = 0) -> None:
        """Takes its time, saves every fifth step, stops when told to, resumes from wherever it was."""
        resume = self.plan.get("resume")
        reply = resume and resume["decision"]
        if resume is None:
            self.save()
        elif reply is None and (self.branch, self.step) == (0, bad_at):
            self.go_back(self.evaluate(losses_finite=False))  # saved, but its decision never came
        elif reply is None and self.step == self.total:
            reply = self.evaluate()
        while not (reply and reply["finish"]):
            self.step += 1
            self.progress()
            self.pause_a_step()
            if self.step == die_at:
                sys.exit(1)
            if self.branch == 0 and self.step == bad_at:
                self.go_back(self.evaluate(losses_finite=False))
            elif self.step == self.total:
                reply = self.evaluate()
            elif self.step % 5 == 0:
                self.save()
        self.finish(reply)

    def rolls_back(self) -> None:
        """Numbers that are not finite at step 12 of the first branch: the answer is a rollback."""
        self.paced(bad_at=12)

    def go_back(self, reply: dict[str, Any]) -> None:
        target = reply["roll_back"]
        self.branch, self.step = target["branch"], target["step"]

    def poisons(self) -> None:
        """Of 13 steps, it ends at its first, each time; any other job is fine."""
        self.paced(die_at=1 if self.total == 13 else 0)

    def fills_the_disk(self) -> None:
        """From step 10 on its checkpoints are too large for its worker's store."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
        self.big_from = 10
        self.paced()

    def needs_another_device(self) -> None:
        """Its GPU fails in the first two attempts."""
        if self.plan["attempt"] <= 2:
            sys.exit(71)
        self.paced()

    def freezes_once(self) -> None:
        """Stops dead in the first attempt, as a hung kernel does."""
        self.progress()
        if self.plan["attempt"] == 1:
            self.save()
            os.kill(os.getpid(), signal.SIGSTOP)
        self.paced()

    def whole(self) -> None:
        self.run_to_the_end()

    def dies_once(self) -> None:
        if self.plan["attempt"] > 1:
            self.run_to_the_end()
            return
        self.save()
        self.train_to(15)
        os.kill(os.getpid(), signal.SIGKILL)

    def dies_always(self) -> None:
        if self.plan.get("resume") is None:
            self.save()
        self.step += 1
        self.progress()
        print("RuntimeError: the reason", flush=True)
        sys.exit(1)

    def stops(self) -> None:
        if self.plan["attempt"] > 1:
            self.run_to_the_end()
            return
        self.save()
        self.wait_for_stop()

    def never_stops(self) -> None:
        self.save()
        while True:
            self.step += 1
            self.progress()
            time.sleep(0.05)

    def falls_silent(self) -> None:
        self.save()
        time.sleep(3600)

    def fails(self) -> None:
        self.talk.ask(
            "failed", code="bad_rows", message="Line 3 has no messages.", param="training_file"
        )
        sys.exit(64)

    def loses_its_device(self) -> None:
        sys.exit(71)

    def babbles(self) -> None:
        self.talk.raw(b'{"type": "gossip"}\n')
        time.sleep(3600)

    def lies(self) -> None:
        self.talk.ask(
            "checkpoint_saved",
            branch=0,
            step=1,
            directory="/etc",
            manifest_sha256="0" * 64,
            size_bytes=1,
            metrics={},
            is_evaluated=False,
        )

    def finds_damage(self) -> None:
        if self.plan["attempt"] > 2:
            self.run_to_the_end()
        elif self.plan["attempt"] == 2:
            self.talk.ask("failed", code="bad_checkpoint", message="model.safetensors is torn.")
            sys.exit(64)
        else:
            self.save()
            self.train_to(12)
            os.kill(os.getpid(), signal.SIGKILL)

    def obeys(self) -> None:
        self.save()
        while True:
            self.step += 1
            self.progress()
            heard = self.talk.hear_within(0.05)
            if heard is not None and heard["type"] == "order":
                order = heard["order"]
                self.talk.tell(
                    "order_applied",
                    version=order["version"],
                    branch=self.branch,
                    step=self.step + 1,
                )
                self.step = self.total - 1
                self.run_after_order()
                return

    def run_after_order(self) -> None:
        self.step = self.total
        self.finish(self.evaluate())

    def goes_on_alone(self) -> None:
        """Saves every tenth step while the database may be away; each save has to be answered at once."""
        self.save()
        slowest = 0.0
        while self.step < self.total - 1:
            self.step += 1
            self.progress()
            time.sleep(0.02)
            if self.step % 10 == 0:
                began = time.monotonic()
                self.save()
                slowest = max(slowest, time.monotonic() - began)
        self.talk.tell(
            "note", level="info", code="slowest", message="slowest", data={"seconds": slowest}
        )
        self.step = self.total
        self.finish(self.evaluate())

    def saves_too_much(self) -> None:
        """At step 10 a checkpoint that its worker's store has no room for."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
        self.save()
        self.train_to(9)
        self.step = 10
        self.save(padding=200_000)
        self.run_to_the_end_from_here()

    def run_to_the_end_from_here(self) -> None:
        self.train_to(self.total)
        self.finish(self.evaluate())

    def measures(self) -> None:
        """An evaluation: of every benchmark the base gets 60 % right, the version 50 %."""
        sent: dict[str, list[dict[str, str]]] = {"scores": [], "baseline": []}
        for benchmark in self.plan["benchmarks"]:
            n = len(Path(benchmark["path"]).read_text().splitlines())
            for field, share in (("scores", 0.5), ("baseline", 0.6)):
                if field == "baseline" and benchmark["baseline_scores"] is not None:
                    continue
                values = array("f", [float(k < share * n) for k in range(n)])
                packed = base64.b64encode(zlib.compress(values.tobytes())).decode()
                version = benchmark["benchmark_version_id"]
                sent[field].append(
                    {"benchmark_version_id": version, "item_set": "all", "scores": packed}
                )
        assert Path(self.plan["artifact_directory"], "model.safetensors").read_bytes() == b"w"
        self.talk.ask("evaluation_finished", seconds={"version": 0.1}, **sent)

    def measures_at_last(self) -> None:
        if self.plan["attempt"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.measures()

    def shows_itself(self) -> None:
        """Tells its environment and its open files."""
        own = (Path(f"/proc/self/fd/{fd}") for fd in range(64))
        descriptors = [str(path.readlink()) for path in own if path.is_symlink()]
        data = {"environment": dict(os.environ), "files": descriptors, "pid": os.getpid()}
        self.talk.tell("note", level="info", code="self", message="self", data=data)
        self.run_to_the_end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--pace", type=float, default=0.0)
    options = parser.parse_args()
    plan = json.loads(Path(options.plan).read_text())
    script = Script(plan, Talk(options.socket), options.pace)
    getattr(script, options.scenario)()


if __name__ == "__main__":
    main()
