"""`python -m tests.benchmarks.domain_shift BASE`: what the causal strategy does to the reported domain shift.

BASE is a directory of `python -m workers.demo_model BASE`; without one it is built there first (a minute).
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.domain.configs.causal import CausalConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.runplan import BasePlan, RowsPlan
from app.domain.strategies import StrategyConfig
from tests.workers.training.rows import make_supervisor
from workers.demo_model.domains import THINGS
from workers.demo_model.skills import NAMES

SEEDS = (7, 8, 9)
TRAINING = {
    "type": "full",
    "total_steps": 180,
    "batch_size": 16,
    "learning_rate": 5e-4,
    "n_epochs": 3,
    "max_tokens_per_micro_batch": 8192,
    "lr_scheduler": "cosine",
}


def _arms() -> Mapping[str, tuple[StrategyConfig, ...]]:
    swaps: dict[str, Any] = {"rules": ("entities", "numbers"), "entities": (NAMES, THINGS)}
    return {
        "plain": (),
        "replay 0.5": (ReplayConfig(strength=0.5),),
        "causal, defaults": (CausalConfig(**swaps),),
        "consistency 1 + V-REx 10": (
            CausalConfig(consistency_coef=1.0, cf_fraction=1.0, vrex_beta=10.0, **swaps),
        ),
        "consistency 1": (
            CausalConfig(consistency_coef=1.0, cf_fraction=1.0, vrex_beta=0.0, **swaps),
        ),
        "V-REx 10": (CausalConfig(consistency_coef=0.0, vrex_beta=10.0),),
        "CORAL 1, queue 64": (
            CausalConfig(consistency_coef=0.0, vrex_beta=0.0, coral_coef=1.0, coral_queue=64),
        ),
    }


def run(base: Path) -> dict[str, dict[str, Any]]:
    """Each arm's shift before and after, its reduction with the interval of each seed, and the validation loss."""
    if not (base / "model").is_dir():
        subprocess.run([sys.executable, "-m", "workers.demo_model", str(base)], check=True)
    return {
        name: _summary([_report(base, strategies, seed) for seed in SEEDS])
        for name, strategies in _arms().items()
    }


def _report(base: Path, strategies: tuple[StrategyConfig, ...], seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        supervisor = make_supervisor(
            Path(scratch),
            with_suite=False,
            strategies=strategies,
            shift_report=True,
            training={**TRAINING, "seed": seed},
            training_rows=_rows(base / "tickets" / "train.jsonl"),
            validation_rows=_rows(base / "tickets" / "validation.jsonl"),
            general_rows=_rows(base / "general.jsonl"),
        )
        plan = BasePlan(
            name="demo", directory=str(base / "model"), sha256="d" * 64, default_template=False
        )
        supervisor.plan = supervisor.plan.model_copy(update={"base": plan})
        code = supervisor.run_here()
        if code:
            raise RuntimeError(f"the trainer ended with {code}: {supervisor.of('failed')}")
        (found,) = [m for m in supervisor.of("note") if m.code == "domain_shift"]
        return dict(found.data)


def _summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(*path: str) -> float:
        values = []
        for report in reports:
            value: Any = report
            for key in path:
                value = value[key]
            values.append(float(value))
        return round(statistics.mean(values), 4)

    return {
        "mmd_before": mean("before", "mmd"),
        "mmd_after": mean("after", "mmd"),
        "reduction": mean("reduction"),
        "intervals": [report["reduction_interval"] for report in reports],
        "domain_loss_after": mean("guards", "domain_loss_after"),
        "claims_40_percent": [report["claims_40_percent"] for report in reports],
    }


def _rows(path: Path) -> RowsPlan:
    return RowsPlan(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.write(f"{json.dumps(run(Path(sys.argv[1])), indent=1)}\n")
