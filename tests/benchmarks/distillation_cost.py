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
from app.domain.runplan import BasePlan, RowsPlan, RunPlan
from app.domain.spec import LoraConfig, ResolvedTraining
from app.domain.strategies import StrategyConfig
from tests.benchmarks.training_speed import VOCABULARY, Documents
from workers.training.build import build_run
from workers.training.loop import Run, start_task, train_step
from workers.training.ranks import Ranks

STEPS = 6  # timed together: whole periods of every 2nd and every 3rd step
REPLAYED = ReplayConfig(strength=0.25, store_fraction=1.0)
Kind = Literal["full", "lora"]


def _variants(kind: Kind) -> Mapping[str, tuple[StrategyConfig, ...]]:
    every = 2 if kind == "full" else 3
    data_free = DistillationConfig(on=("domain",), every=every)
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
        rounds: Each times every variant over 6 steps.

    Returns:
        For full and lora each ratio of RATIOS: its median, range, goal and whether it is met.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            base = _save_model(Path(name))
            kinds: tuple[Kind, Kind] = ("full", "lora")
            return {kind: _measure(base, kind, rounds) for kind in kinds}
    finally:
        torch.set_num_threads(threads)


def _measure(base: BasePlan, kind: Kind, rounds: int) -> dict[str, dict[str, Any]]:
    runs = {name: _make_run(base, kind, configs) for name, configs in _variants(kind).items()}
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


def _save_model(directory: Path) -> BasePlan:
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
    LlamaForCausalLM(config).save_pretrained(directory)
    return BasePlan(name="S", directory=str(directory), sha256="0" * 64, default_template=True)


def _make_run(base: BasePlan, kind: Kind, configs: tuple[StrategyConfig, ...]) -> Run:
    rows = RowsPlan(path="unused", sha256="0" * 64)
    training = ResolvedTraining(
        type=kind,
        lora=LoraConfig(),
        n_epochs=1,
        batch_size=8,
        total_steps=100_000,
        learning_rate=1e-4,
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
    stores = {"training": Documents(48, 0), "general": Documents(48, 1)}
    run_of_plan = build_run(plan, stores, Ranks(), torch.device("cpu"))
    start_task(run_of_plan)
    return run_of_plan


if __name__ == "__main__":
    for trained, ratios in run().items():
        for ratio, numbers in ratios.items():
            print(f"{trained} {ratio}: {numbers}")
