"""`python -m tests.benchmarks.board.smoothness`: how sharp the optimum of a domain is, with and without strategies."""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tests.benchmarks.board.__main__ import CACHE
from tests.benchmarks.board.schedule import load_seed
from tests.benchmarks.board.table import METHODS
from tests.benchmarks.board.trial import _Trial
from workers.evaluation.landscape import loss_of, sharpness
from workers.training.loop import train_step

NAMES = (
    "frozen base",
    "plain",
    "plain, rate x0.25",
    "hybrid_optimizer (toward the base)",
    "hybrid_optimizer (layer-wise)",
    "l2sp",
    "ewc",
    "ewc + replay",
)
DIRECTIONS = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line a method: mean over seeds and their range, on general and on domain rows."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.board.smoothness")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| method | loss, general | sharpness, general | loss, domain | sharpness, domain |")
    print("| --- | --- | --- | --- | --- |")
    for name in NAMES:
        found = [measure(name, seed) for seed in range(1, asked.seeds + 1)]
        columns = [_shown([one[key] for one in found]) for key in found[0]]
        print(f"| {' | '.join([name, *columns])} |", flush=True)
    return 0


def measure(name: str, seed: int) -> Mapping[str, float]:
    """Loss and sharpness (nats) after the first domain at the method's default setting.

    Sharpness is the mean rise of the loss a tenth of the weights' own length away, over random
    filter-normalised directions that are the same for every method of a seed.
    """
    method = next(m for m in METHODS if m.name == name)
    material, items = load_seed(CACHE, seed)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        trial = _Trial(method, method.settings[0], material, items, num_stages=1)
        trial.scratch = scratch
        run = trial._start([material.training[0]])
        for _ in range(0 if method.protocol == "frozen" else trial._steps()):
            train_step(run)
        sets: Mapping[str, Any] = {"general": material.general, "domain": material.training[0]}
        for label, rows in sets.items():
            found[f"{label} loss"] = loss_of(run.model, rows)
            found[f"{label} sharpness"] = sharpness(
                run.model,
                partial(loss_of, run.model, rows),
                num_directions=DIRECTIONS,
                seed=seed,
            ).value
    return found


def _shown(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    sys.exit(main())
