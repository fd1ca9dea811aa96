"""Speed of the training loop: against a bare PyTorch loop, against its own strategies, and against peers.

Everything runs interleaved in one process on one thread, over the same documents; a number is the median of
per-round ratios with its range. CPU time is what counts on a shared machine; wall time is given beside it.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from app.domain.runplan import BasePlan, RowsPlan, RunPlan
from app.domain.spec import LoraConfig, ResolvedTraining
from app.domain.strategies import DistillationConfig, EwcConfig, ReplayConfig, StrategyConfig
from workers.training.build import build_run
from workers.training.loop import Run, train_step
from workers.training.ranks import Ranks

VOCABULARY = 4096
NUM_DOCUMENTS = 64
BATCH_SIZE = 8
TOKEN_BUDGET = 640  # padded tokens of a bare step: about eight documents
LEARNING_RATE = 1e-4
GOALS = {
    "plain_to_bare": (0.90, "at least"),
    "replay_25_percent": (1.30, "at most"),  # 1 + 1.2 r
    "live_teacher": (1.45, "at most"),
    "ewc": (1.05, "at most"),
}
Row = tuple[NDArray[np.int32], NDArray[np.float32]]


class Documents:
    """Zipf tokens in documents of log-normal length (mean 79, from 12 to 256), all tokens supervised."""

    def __init__(self, count: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        lengths = np.clip(generator.lognormal(4.2, 0.6, count), 12, 256).astype(np.int64)
        self.rows: list[Row] = []
        for length in lengths:
            ids = np.minimum(generator.zipf(1.2, length), VOCABULARY - 1).astype(np.int32)
            self.rows.append((ids, np.ones(length, np.float32)))
        self.lengths = lengths

    def row(self, index: int) -> Row:
        """Token ids and loss weights of one document."""
        return self.rows[index]


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass over the documents."""

    cpu: float
    wall: float


def run(rounds: int = 5) -> dict[str, Any]:
    """Ratios of this loop to a bare one, and of its strategies to its own plain run.

    Returns:
        For each ratio of GOALS its median by CPU time, range, median by wall time, goal and whether it is met;
        and tokens per CPU second of both plain loops.
    """
    torch.set_num_threads(1)
    documents, general = Documents(NUM_DOCUMENTS, 0), Documents(NUM_DOCUMENTS, 1)
    with tempfile.TemporaryDirectory() as directory:
        base = _save_model(Path(directory))
        passes: dict[str, Callable[[], None]] = {"bare": _bare_loop(documents)}
        for name, configs in _variants().items():
            passes[name] = _own_loop(_make_run(base, configs, documents, general))
        costs = _interleave(passes, rounds)
    tokens = int(documents.lengths.sum())
    ratios = {"plain_to_bare": _ratio(costs["bare"], costs["plain"])}
    ratios |= {name: _ratio(costs[name], costs["plain"]) for name in _variants() if name != "plain"}
    result: dict[str, Any] = {name: _judge(name, ratio) for name, ratio in ratios.items()}
    for name in ("bare", "plain"):
        seconds = statistics.median(cost.cpu for cost in costs[name])
        result[f"{name}_tokens_per_cpu_second"] = round(tokens / seconds)
    result |= {"rounds": rounds, "peers": run_peers(rounds)}
    return result


def run_peers(rounds: int = 3) -> dict[str, Any]:
    """Real tokens per CPU second of other trainers on the same documents, or why they were left out."""
    documents = Documents(NUM_DOCUMENTS, 0)
    peers: dict[str, tuple[str, Callable[[Documents], Callable[[], None]]]] = {
        "transformers_trainer": ("accelerate", _transformers_trainer),
        "trl_packing": ("trl", _trl_packing),
    }
    found: dict[str, Any] = {}
    for name, (module, make) in peers.items():
        if importlib.util.find_spec(module) is None:
            found[name] = f"skipped: {module} is not installed"
            continue
        costs = _interleave({name: make(documents)}, rounds)[name]
        seconds = statistics.median(cost.cpu for cost in costs)
        found[name] = {"tokens_per_cpu_second": round(int(documents.lengths.sum()) / seconds)}
    return found


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


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _save_model(directory: Path) -> BasePlan:
    _model().save_pretrained(directory)
    return BasePlan(name="S", directory=str(directory), sha256="0" * 64, default_template=True)


def _make_run(
    base: BasePlan, configs: tuple[StrategyConfig, ...], documents: Documents, general: Documents
) -> Run:
    rows = RowsPlan(path="unused", sha256="0" * 64)
    training = ResolvedTraining(
        type="full",
        lora=LoraConfig(),
        n_epochs=1,
        batch_size=BATCH_SIZE,
        total_steps=100_000,
        learning_rate=LEARNING_RATE,
        max_seq_length=256,
        warmup_ratio=0.0,
        lr_scheduler="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_tokens_per_micro_batch=8192,
        gradient_checkpointing=False,
        checkpoint_interval=None,
        precision="fp32",
        seed=0,
    )
    plan = RunPlan(
        job_id="benchmark",
        attempt=1,
        branch=0,
        base=base,
        training_rows=rows,
        validation_rows=None,
        general_rows=rows,
        training=training,
        strategies=configs,
        policy=None,
        scratch_directory=base.directory,
        cache_directory=base.directory,
    )
    stores = {"training": documents, "general": general}
    made = build_run(plan, stores, Ranks(), torch.device("cpu"))
    for strategy in made.strategies:
        strategy.on_task_start(made.ctx)
    return made


def _own_loop(made: Run) -> Callable[[], None]:
    def one_pass() -> None:
        for _ in range(NUM_DOCUMENTS // BATCH_SIZE):
            train_step(made)

    return one_pass


def _bare_loop(documents: Documents) -> Callable[[], None]:
    """The best loop written by hand: token-budget length buckets, no mask, head on supervised positions."""
    model = _model().train()
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


def _transformers_trainer(documents: Documents) -> Callable[[], None]:
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

    model = _model()

    def one_pass() -> None:
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                output_dir=directory,
                per_device_train_batch_size=BATCH_SIZE,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()

    return one_pass


def _trl_packing(documents: Documents) -> Callable[[], None]:
    """TRL's SFTTrainer with best-fit packing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.tiny import make_tokenizer

    dataset = Dataset.from_list([{"input_ids": ids.tolist()} for ids, _ in documents.rows])
    model, tokenizer = _model(), make_tokenizer()

    def one_pass() -> None:
        with tempfile.TemporaryDirectory() as directory:
            arguments = SFTConfig(
                output_dir=directory,
                per_device_train_batch_size=3,  # three packs of 256: about eight documents
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_length=256,
                packing=True,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            SFTTrainer(
                model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
            ).train()

    return one_pass
