"""Speed of the training loop: against a bare PyTorch loop, against its own strategies, and against peers.

Everything runs interleaved in one process on one thread, over the same documents; a number is the median of
per-round ratios with its range. CPU time is what counts on a shared machine; wall time is given beside it.
"""

import contextlib
import importlib.util
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.quadratic import EwcConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.strategies import StrategyConfig
from tests.benchmarks.small_runs import (
    BATCH_SIZE,
    LEARNING_RATE,
    Documents,
    make_model,
    make_run,
    save_model,
)
from workers.training.loop import Run, train_step

NUM_DOCUMENTS = 64
TOKEN_BUDGET = 640  # padded tokens of a bare step: about eight documents
GOALS = {
    "plain_to_bare": (0.90, "at least"),
    "replay_25_percent": (1.30, "at most"),  # 1 + 1.2 r
    "live_teacher": (1.45, "at most"),
    "ewc": (1.05, "at most"),
    "trl_default": (2.5, "at least"),
    "trl_packing": (1.25, "at least"),
    "transformers_trainer": (2.0, "at least"),
}
RATIOS = {  # time of the first over time of the second
    "plain_to_bare": ("bare", "plain"),
    "replay_25_percent": ("replay_25_percent", "plain"),
    "live_teacher": ("live_teacher", "plain"),
    "ewc": ("ewc", "plain"),
    "trl_default": ("trl_default", "plain"),
    "trl_packing": ("trl_packing", "plain"),
    "transformers_trainer": ("transformers_trainer", "plain"),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass over the documents."""

    cpu: float
    wall: float


def run(rounds: int = 5) -> dict[str, Any]:
    """Ratios of this loop to a bare one, to its strategies, and to the peers that are installed.

    Returns:
        For each ratio of GOALS its median by CPU time, range, median by wall time, goal and whether it is met;
        tokens per CPU second of every loop; peak memory above imports; the peers that were left out.
    """
    torch.set_num_threads(1)
    documents, general = Documents(NUM_DOCUMENTS, 0), Documents(NUM_DOCUMENTS, 1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base = save_model(directory)
        passes: dict[str, Callable[[], None]] = {"bare": _bare_loop(documents)}
        for variant, configs in _variants().items():
            passes[variant] = _own_loop(make_run(base, configs, documents, general))
        for peer, make in _installed_peers().items():
            passes[peer] = make(documents, directory)
        costs = _interleave(passes, rounds)
    tokens = int(documents.lengths.sum())
    result: dict[str, Any] = {}
    for key, (slower, faster) in RATIOS.items():
        if slower in costs:
            result[key] = _judge(key, _ratio(costs[slower], costs[faster]))
    result["tokens_per_cpu_second"] = {
        key: round(tokens / statistics.median(cost.cpu for cost in own))
        for key, own in costs.items()
    }
    result["memory"] = _memory()
    result["left_out"] = sorted(PEERS.keys() - costs.keys())
    return result | {"rounds": rounds}


def peak_memory(name: str) -> float:
    """Peak resident MB above what the imports took, of two passes of one loop in this fresh process."""
    torch.set_num_threads(1)
    documents = Documents(NUM_DOCUMENTS, 0)
    with tempfile.TemporaryDirectory() as directory:
        base = save_model(Path(directory))
        if name == "plain":
            make = lambda: _own_loop(make_run(base, (), documents, documents))  # noqa: E731
        else:
            make = lambda: _installed_peers()[name](documents, Path(directory))  # noqa: E731
        before = _resident_mb()
        one_pass = make()
        one_pass()
        one_pass()
    # ru_maxrss survives exec and would show the parent's peak; VmHWM belongs to this program alone.
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024 - before


def _resident_mb() -> float:
    """Now, in MB; the libraries that a pass would import are loaded first."""
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _memory() -> dict[str, Any]:
    """Peak memory of this loop beside transformers' Trainer, each in its own process."""
    found = {}
    for name in ("plain", "transformers_trainer"):
        command = [sys.executable, "-m", "tests.benchmarks.training_speed", "--memory", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[name] = round(float(output.splitlines()[-1]))
    ratio = found["plain"] / found["transformers_trainer"]
    return found | {"ratio": round(ratio, 2), "goal": "at most 0.6", "met": ratio <= 0.6}


def _variants() -> Mapping[str, tuple[StrategyConfig, ...]]:
    return {
        "plain": (),
        "replay_25_percent": (ReplayConfig(strength=0.25, store_fraction=1.0),),
        "live_teacher": (DistillationConfig(on=("domain",)),),
        "ewc": (EwcConfig(fisher_samples=32),),
    }


def _interleave(
    passes: Mapping[str, Callable[[], None]], rounds: int
) -> Mapping[str, Sequence[Cost]]:
    """Costs by name; one warm-up round, then the order rotates."""
    names = list(passes)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            cpu, wall = time.process_time(), time.perf_counter()
            passes[name]()
            cost = Cost(time.process_time() - cpu, time.perf_counter() - wall)
            if round_number:
                costs[name].append(cost)
    return costs


def _ratio(upper: Sequence[Cost], lower: Sequence[Cost]) -> dict[str, Any]:
    by_cpu = [u.cpu / w.cpu for u, w in zip(upper, lower, strict=True)]
    by_wall = [u.wall / w.wall for u, w in zip(upper, lower, strict=True)]
    return {
        "ratio": round(statistics.median(by_cpu), 3),
        "range": [round(min(by_cpu), 3), round(max(by_cpu), 3)],
        "wall_ratio": round(statistics.median(by_wall), 3),
    }


def _judge(name: str, ratio: dict[str, Any]) -> dict[str, Any]:
    goal, sense = GOALS[name]
    is_met = ratio["ratio"] >= goal if sense == "at least" else ratio["ratio"] <= goal
    return {**ratio, "goal": f"{sense} {goal}", "met": is_met}


def _own_loop(made: Run) -> Callable[[], None]:
    def one_pass() -> None:
        for _ in range(NUM_DOCUMENTS // BATCH_SIZE):
            train_step(made)

    return one_pass


def _bare_loop(documents: Documents) -> Callable[[], None]:
    """The best loop written by hand: token-budget length buckets, no mask, head on supervised positions."""
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    batches = _budget_batches(documents)
    generator = np.random.default_rng(0)

    def one_pass() -> None:
        for index in generator.permutation(len(batches)):
            ids, positions, targets = batches[index]
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[positions])
            F.cross_entropy(logits, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return one_pass


def _budget_batches(
    documents: Documents,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    groups: list[list[int]] = []
    for index in np.argsort(documents.lengths, kind="stable"):
        width = int(documents.lengths[index])
        if groups and (len(groups[-1]) + 1) * width <= TOKEN_BUDGET:
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    batches = []
    for group in groups:
        rows = [torch.from_numpy(documents.row(i)[0].astype(np.int64)) for i in group]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(padded.shape[1] - 1)[None] < (lengths - 1)[:, None]
        positions = mask.flatten().nonzero()[:, 0]
        batches.append((padded[:, :-1], positions, padded[:, 1:].flatten()[positions]))
    return batches


def _transformers_trainer(documents: Documents, directory: Path) -> Callable[[], None]:
    """transformers' Trainer at its defaults: random batches, padded to their longest row."""
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": [1] * len(ids)}
        for ids, _ in documents.rows
    ]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        padded = {}
        for key, filler in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            tensors = [torch.tensor(row[key]) for row in batch]
            padded[key] = torch.nn.utils.rnn.pad_sequence(
                tensors, batch_first=True, padding_value=filler
            )
        return padded

    arguments = TrainingArguments(**_settings(directory), optim="adamw_torch_fused")
    trainer = Trainer(model=make_model(), args=arguments, train_dataset=rows, data_collator=collate)
    return lambda: _train(trainer)


def _trl_default(documents: Documents, directory: Path) -> Callable[[], None]:
    """TRL's SFTTrainer at its defaults: padded batches, gradient checkpointing."""
    return _trl(documents, {**_settings(directory), "max_length": 256})


def _trl_packing(documents: Documents, directory: Path) -> Callable[[], None]:
    """TRL's SFTTrainer with best-fit packing, checkpointing off; three packs of 256 are about eight documents."""
    packing = {"packing": True, "max_length": 256, "gradient_checkpointing": False}
    return _trl(documents, {**_settings(directory), **packing, "per_device_train_batch_size": 3})


def _trl(documents: Documents, settings: dict[str, Any]) -> Callable[[], None]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.tiny import make_tokenizer

    trainer = SFTTrainer(
        model=make_model(),
        args=SFTConfig(**settings, bf16=False),
        train_dataset=Dataset.from_list([{"input_ids": i.tolist()} for i, _ in documents.rows]),
        processing_class=make_tokenizer(),
    )
    return lambda: _train(trainer)


def _settings(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _train(trainer: Any) -> None:
    """One epoch, its log kept off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()


Peer = Callable[[Documents, Path], Callable[[], None]]
PEERS: Mapping[str, tuple[str, Peer]] = {
    "transformers_trainer": ("accelerate", _transformers_trainer),
    "trl_default": ("trl", _trl_default),
    "trl_packing": ("trl", _trl_packing),
}


def _installed_peers() -> Mapping[str, Peer]:
    return {n: make for n, (module, make) in PEERS.items() if importlib.util.find_spec(module)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        sys.stdout.write(f"{peak_memory(sys.argv[2])}\n")
    else:
        sys.stdout.write(json.dumps(run(), indent=1) + "\n")
