"""`python -m tests.benchmarks.board.peers`: other libraries on the board's models, rows, items and search budget."""

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.board.cells import Cache, Cell, fingerprint
from tests.benchmarks.board.methods import STEPS, Method, Setting
from tests.benchmarks.board.peer_methods import (
    Learn,
    avalanche_ewc,
    peft_osf,
    stand_in_for_torchvision,
    trl_distillation,
)
from tests.benchmarks.board.selection import SEARCH_SEED, SEARCH_STAGES, choose

EWC = Method(
    "Avalanche: EWC",
    settings=tuple(
        Setting(label, strength=strength, rate=rate)
        for label, strength, rate in (
            ("lambda 1e3", 1e3, 1.0),
            ("lambda 1e2", 1e2, 1.0),
            ("lambda 1e4", 1e4, 1.0),
            ("lambda 1e3, rate x0.4", 1e3, 0.4),
        )
    ),
    group="peer",
    general_rows=True,
)
OSF = Method(
    "peft: OSF",
    settings=(
        Setting("half kept", fields={"peer": {"preserved": 0.5}}),
        Setting("0.25 kept", fields={"peer": {"preserved": 0.25}}),
        Setting("0.75 kept", fields={"peer": {"preserved": 0.75}}),
        Setting("half kept, rate x0.4", rate=0.4, fields={"peer": {"preserved": 0.5}}),
    ),
    group="peer",
    general_rows=False,
)
DISTILLATION = Method(
    "TRL: SFT, then distillation from the base",
    settings=(
        Setting("repair rate x0.2", fields={"peer": {"repair_rate": 0.2}}),
        Setting("repair rate x0.05", fields={"peer": {"repair_rate": 0.05}}),
        Setting("repair rate x1", fields={"peer": {"repair_rate": 1.0}}),
        Setting("repair rate x0.2, rate x0.4", rate=0.4, fields={"peer": {"repair_rate": 0.2}}),
    ),
    group="peer",
    general_rows=True,
)
PEERS = (EWC, OSF, DISTILLATION)
PACKAGES = {EWC.name: "avalanche-lib", OSF.name: "peft", DISTILLATION.name: "trl"}
MODULES = {EWC.name: "avalanche", OSF.name: "peft", DISTILLATION.name: "trl"}
LEARN: dict[str, Learn] = {
    EWC.name: avalanche_ewc,
    OSF.name: peft_osf,
    DISTILLATION.name: trl_distillation,
}


@dataclass(frozen=True)
class PeerCell(Cell):
    """One trial of a peer; known by its settings and this code, whatever version was installed."""

    def describe(self) -> dict[str, Any]:
        """All that its result depends on."""
        return {
            "peer": self.method.name,
            "setting": self.setting.label,
            "knobs": knobs(self.setting),
            "seed": self.seed,
            "num_stages": self.num_stages,
            "code": fingerprint(("tests.benchmarks.board.peer_methods",)),
        }


def knobs(setting: Setting) -> dict[str, Any]:
    """Those of a setting that the peers read."""
    return {"rate": setting.rate, "strength": setting.strength, **setting.fields.get("peer", {})}


def search_cells(method: Method) -> list[Cell]:
    """The same budget as the board's own methods have, on the same seed."""
    return [PeerCell(method, s, SEARCH_SEED, SEARCH_STAGES) for s in method.settings]


def final_cells(method: Method, cache: Cache, seeds: Sequence[int], num_stages: int) -> list[Cell]:
    """One a seed at the setting that the search chose."""
    setting = method.settings[choose(cache, search_cells(method))]
    return [PeerCell(method, setting, seed, num_stages) for seed in seeds]


def installed(method: Method) -> bool:
    """Whether the peer's library is there."""
    return importlib.util.find_spec(MODULES[method.name]) is not None


def run_peer(cell: Cell, material: Any, items: Any) -> dict[str, Any]:
    """The scores after each domain and the cost, as the board's own trials have them."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.benchmarks.board.scoring import score
    from tests.benchmarks.board.trial import Point
    from workers.training.forward import SelectedLogits

    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    started, wall = time.process_time(), time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(str(material.directory), local_files_only=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    points, training = [], 0.0
    learning = LEARN[cell.method.name](model, material, knobs(cell.setting), cell.num_stages)
    for stage in range(cell.num_stages):
        begun = time.process_time()
        student = SelectedLogits(copy.deepcopy(next(learning)).eval(), autocast=None)
        training += time.process_time() - begun
        domains = [score(student, items.domains[i]) for i in range(stage + 1)]
        points.append(Point(score(student, items.unseen), score(student, items.seen), domains))
    return {
        "package": f"{PACKAGES[cell.method.name]} {version(PACKAGES[cell.method.name])}",
        "points": [point.pack() for point in points],
        "train_cpu_seconds": training,
        "steps": STEPS * cell.num_stages,
        "memory_bytes": size,  # of the model alone: what a library keeps beside it isn't asked
        "cpu_seconds": time.process_time() - started,
        "wall_seconds": time.monotonic() - wall,
    }


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing of each installed peer; 1 when none is installed."""
    stand_in_for_torchvision()
    from tests.benchmarks.board.__main__ import CACHE
    from tests.benchmarks.board.schedule import load_seed

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.board.peers")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--only", default="", metavar="TEXT", help="peers whose name has this")
    options = parser.parse_args(arguments)
    cache = Cache(CACHE / "trials")
    chosen = [m for m in PEERS if installed(m) and options.only.lower() in m.name.lower()]
    for method in chosen:
        for cell in search_cells(method):
            _run_missing(cell, cache, load_seed, CACHE)
        for cell in final_cells(method, cache, range(1, options.seeds + 1), 4):
            _run_missing(cell, cache, load_seed, CACHE)
    return int(not chosen)


def _run_missing(cell: Cell, cache: Cache, load_seed: Any, root: Path) -> None:
    if cache.load(cell) is not None:
        return
    result = run_peer(cell, *load_seed(root, cell.seed))
    cache.save(cell, result)
    seconds = result["wall_seconds"]
    print(
        f"{cell.method.name} ({cell.setting.label}), seed {cell.seed}: {seconds:.0f} s", flush=True
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
