"""What the speed of training is measured on: synthetic documents, a small model, and runs of it."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from app.domain.runplan import BasePlan, RowsPlan, RunPlan
from app.domain.spec import LoraConfig, ResolvedTraining
from app.domain.strategies import StrategyConfig
from workers.training.build import build_run
from workers.training.loop import Run, start_task
from workers.training.ranks import Ranks

VOCABULARY = 4096
BATCH_SIZE = 8
LEARNING_RATE = 1e-4
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


def make_model() -> Any:
    """A Llama of 6 layers and width 256, its weights seeded."""
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


def save_model(directory: Path) -> BasePlan:
    """The model as a base that runs are made of."""
    make_model().save_pretrained(directory)
    return BasePlan(name="S", directory=str(directory), sha256="0" * 64, default_template=True)


def make_run(
    base: BasePlan,
    configs: tuple[StrategyConfig, ...],
    documents: Documents,
    general: Documents,
    *,
    kind: Literal["full", "lora"] = "full",
) -> Run:
    """A run over documents that has begun its task, in float32 on the CPU."""
    rows = RowsPlan(path="unused", sha256="0" * 64)
    training = ResolvedTraining(
        type=kind,
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
    start_task(made)
    return made
