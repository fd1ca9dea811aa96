"""Row files and benchmarks on disk, and a supervised job over them."""

import json

import numpy as np

from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.policy import Policy
from app.domain.runplan import BenchmarkPlan, RowsPlan
from tests.workers.training.runs import make_plan
from tests.workers.training.supervised import Supervisor

WORDS = ("red", "green", "blue", "seven", "nine", "river", "stone", "cloud", "lamp", "tree")


def write_rows(path, count, seed):
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = generator.choice(WORDS, int(generator.integers(2, 9)))
        lines.append(json.dumps({"text": " ".join(words)}))
    path.write_text("\n".join(lines) + "\n")
    return RowsPlan(path=str(path), sha256=f"{seed:064d}")


def write_benchmarks(directory, *, count=24):
    generator = np.random.default_rng(5)
    choice, text = directory / "choice.jsonl", directory / "text.jsonl"
    choice.write_text(
        "\n".join(
            json.dumps(
                {
                    "id": f"c{i}",
                    "question": f"{WORDS[i % 10]} {i}?",
                    "choices": ["red", "blue"],
                    "answer": int(generator.integers(2)),
                }
            )
            for i in range(count)
        )
    )
    text.write_text(
        "\n".join(
            json.dumps({"id": f"t{i}", "text": " ".join(generator.choice(WORDS, 5))})
            for i in range(count)
        )
    )
    return tuple(
        BenchmarkPlan(
            benchmark_version_id=f"benchv_{name}",
            name=name,
            kind=BenchmarkKind.GENERAL,
            scorer=scorer,
            weight=1.0,
            max_drop=None,
            path=str(path),
            sha256="2" * 64,
        )
        for name, scorer, path in (
            ("choice", Scorer.MULTIPLE_CHOICE, choice),
            ("text", Scorer.NLL, text),
        )
    )


def make_supervisor(scratch, *, with_suite=True, strategies=(), decide=None, **overrides):
    training = {"total_steps": 12, "type": "full", **overrides.pop("training", {})}
    values = {
        "training_rows": write_rows(scratch / "train.jsonl", 40, 1),
        "general_rows": write_rows(scratch / "general.jsonl", 40, 2),
        "validation_rows": write_rows(scratch / "valid.jsonl", 8, 3),
        "policy": Policy(eval_interval=4, gate_items=10) if with_suite else None,
        "benchmarks": write_benchmarks(scratch) if with_suite else (),
        **overrides,
    }
    plan = make_plan(scratch, training=training, strategies=strategies, **values)
    return Supervisor(plan, scratch, **({} if decide is None else {"decide": decide}))
