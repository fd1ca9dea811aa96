"""Small runs for the tests of the loop: rows from lists, plans, and runs of a tiny model."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from app.domain.runplan import BasePlan, RowsPlan, RunPlan
from app.domain.spec import LoraConfig, ResolvedTraining
from tests.tiny import make_tiny_model
from workers.training.build import build_run
from workers.training.ranks import Ranks

CPU = torch.device("cpu")


class ListRows:
    """Rows of random tokens and unequal lengths; the first third of each is a prompt without loss."""

    def __init__(self, count, *, seed=0, longest=40, vocab_size=300):
        generator = np.random.default_rng(seed)
        self.rows = []
        for _ in range(count):
            length = int(generator.integers(4, longest))
            ids = generator.integers(3, vocab_size, length).astype(np.int32)
            weights = np.ones(length, np.float32)
            weights[: length // 3] = 0.0
            self.rows.append((ids, weights))

    @property
    def lengths(self):
        return np.asarray([len(ids) for ids, _ in self.rows], dtype=np.int64)

    def row(self, index):
        return self.rows[index]


@functools.cache
def tiny_base(seed=0):
    """A base model directory, made once a process."""
    return make_tiny_model(Path(tempfile.mkdtemp(prefix="tiny-base-")), seed=seed)


def make_training(**overrides):
    values = {
        "type": "full",
        "lora": LoraConfig(r=4, alpha=8.0),
        "n_epochs": 1,
        "batch_size": 8,
        "total_steps": 20,
        "learning_rate": 1e-3,
        "max_seq_length": 64,
        "warmup_ratio": 0.1,
        "lr_scheduler": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "max_tokens_per_micro_batch": 4096,
        "gradient_checkpointing": False,
        "checkpoint_interval": None,
        "precision": "fp32",
        "seed": 7,
    }
    return ResolvedTraining(**{**values, **overrides})


def make_plan(scratch, *, base=None, strategies=(), policy=None, training=None, **overrides):
    """A plan whose row files need not exist where the stores are given."""
    rows = RowsPlan(path=str(Path(scratch) / "rows.jsonl"), sha256="0" * 64)
    values = {
        "job_id": "job",
        "attempt": 1,
        "branch": 0,
        "base": BasePlan(
            name="tiny", directory=str(base or tiny_base()), sha256="1" * 64, default_template=True
        ),
        "training_rows": rows,
        "validation_rows": None,
        "general_rows": rows,
        "training": make_training(**(training or {})),
        "strategies": strategies,
        "policy": policy,
        "scratch_directory": str(scratch),
        "cache_directory": str(Path(scratch) / "cache"),
    }
    return RunPlan(**{**values, **overrides})


def make_stores():
    return {"training": ListRows(64, seed=1), "general": ListRows(96, seed=2)}


def make_run(plan, *, dtype=None, ranks=None, stores=None, strategies=None, start=True):
    """A run at step 0, its strategies started."""
    run = build_run(
        plan, stores or make_stores(), ranks or Ranks(), CPU, dtype=dtype, strategies=strategies
    )
    if start:
        for strategy in run.strategies:
            strategy.on_task_start(run.ctx)
    return run


def weights(run):
    return {name: p.detach().clone() for name, p in run.ctx.params.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def push_off(parameters, *, alpha=0.01):
    """Moves weights off the start, where penalties vanish; always alike."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(noise, alpha=alpha)
