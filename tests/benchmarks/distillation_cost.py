"""What distillation adds to a step: the cached form at equal rows, and the data-free form over plain training."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.runplan import BasePlan
from app.domain.strategies import StrategyConfig
from tests.benchmarks.small_runs import Documents, make_run, save_model
from workers.training.loop import train_step

EVERY = 4  # as on the retention board, where what it keeps stands beside the cached form
STEPS = 2 * EVERY  # timed together: whole periods
REPLAYED = ReplayConfig(strength=0.25, store_fraction=1.0)
Kind = Literal["full", "lora"]


def _variants() -> Mapping[str, tuple[StrategyConfig, ...]]:
    data_free = DistillationConfig(on=("domain",), every=EVERY)
    cached = DistillationConfig(on=("replay",), teacher="cached")
    return {
        "plain": (),
        "data_free": (data_free,),
        "replay": (REPLAYED,),
        "replay_cached": (REPLAYED, cached),
        "replay_online": (REPLAYED, DistillationConfig(on=("replay",))),
        "der": (REPLAYED.model_copy(update={"der_alpha": 0.5}),),
    }


#: The first over the second, and the most it may be.
RATIOS: Mapping[str, tuple[str, str, float]] = {
    "data_free": ("data_free", "plain", 1.20),
    "cached": ("replay_cached", "replay", 1.10),
    "der": ("der", "replay", 1.10),
    "online": ("replay_online", "replay", 1.20),
}


def run(rounds: int = 5) -> dict[str, dict[str, dict[str, Any]]]:
    """Ratios of CPU time, one thread, interleaved in rotating order after one round of warm-up.

    Args:
        rounds: Each times every variant over STEPS steps.

    Returns:
        For full and lora each ratio of RATIOS: its median, range, goal and whether it is met.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            base = save_model(Path(name))
            kinds: tuple[Kind, Kind] = ("full", "lora")
            return {kind: _measure(base, kind, rounds) for kind in kinds}
    finally:
        torch.set_num_threads(threads)


def _measure(base: BasePlan, kind: Kind, rounds: int) -> dict[str, dict[str, Any]]:
    runs = {
        name: make_run(base, configs, Documents(48, 0), Documents(48, 1), kind=kind)
        for name, configs in _variants().items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.process_time()
            for _ in range(STEPS):
                train_step(runs[name])
            if index:
                seconds[name].append(time.process_time() - started)
    return {
        name: _judge(seconds[slower], seconds[faster], most)
        for name, (slower, faster, most) in RATIOS.items()
    }


def _judge(slower: Sequence[float], faster: Sequence[float], most: float) -> dict[str, Any]:
    ratios = [s / f for s, f in zip(slower, faster, strict=True)]
    median = statistics.median(ratios)
    return {
        "ratio": round(median, 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "goal": f"at most {most}",
        "met": median <= most,
    }


if __name__ == "__main__":
    for trained, ratios in run().items():
        for ratio, numbers in ratios.items():
            print(f"{trained} {ratio}: {numbers}")
