"""How long a step waits for a checkpoint, written at once and beside training: `python -m tests.faults.saving_stall`."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from tests.tiny import make_tiny_model
from tests.workers.training.runs import ListRows, make_plan, make_run
from workers.training.loop import train_step
from workers.training.saving import Saver

if TYPE_CHECKING:
    from workers.training.conversation import Conversation

INTERVAL, ROUNDS = 20, 4
VOCAB = 2000


class Silence:
    """A talk that nobody answers."""

    def __init__(self) -> None:
        self.saved: list[Any] = []

    def next_id(self) -> int:
        return len(self.saved) + 1

    def ask(self, message: Any) -> None:
        self.saved.append(message)

    tell = ask


def main() -> None:
    """Trains a model of some millions of parameters with a checkpoint every twenty steps."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base = make_tiny_model(root / "base", hidden=384, layers=6, vocab_size=VOCAB)
        stores = {
            "training": ListRows(400, seed=1, longest=64, vocab_size=VOCAB),
            "general": ListRows(16, seed=2, vocab_size=VOCAB),
        }
        training = {"batch_size": 32, "total_steps": 10_000}
        plan = make_plan(root, base=base, training=training)
        for mode in ("at once", "beside training"):
            run = make_run(plan, stores=stores)
            report(mode, run, Saver(cast("Conversation", Silence()), root / mode, 1))


def report(mode: str, run: Any, saver: Saver) -> None:
    """Steps with and without a save; the share of time that training stood still for it."""
    for _ in range(3):
        train_step(run)
    steps: list[float] = []
    stalls: list[float] = []
    beside: list[float] = []
    for _ in range(ROUNDS):
        for number in range(INTERVAL):
            began = time.perf_counter()
            train_step(run)
            saver.announce()
            (beside if number < 3 and stalls else steps).append(time.perf_counter() - began)
        began = time.perf_counter()
        if mode == "at once":
            saver.save(run, is_evaluated=False)
        else:
            saver.save_beside(run)
        stalls.append(time.perf_counter() - began)
    saver.settle(run)
    step, stall = statistics.median(steps), statistics.median(stalls)
    size = sum(p.numel() * p.element_size() for p in run.all_params.values()) * 3 / 2**20
    print(
        f"{mode}: state {size:.0f} MB, step {step * 1000:.0f} ms, stall {stall * 1000:.1f} ms a save,"
        f" {stall / (INTERVAL * step):.2%} of step time at a save every {INTERVAL} steps;"
        f" steps right after a save {statistics.median(beside) * 1000:.0f} ms"
    )


if __name__ == "__main__":
    main()
