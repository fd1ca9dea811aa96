"""A whole attempt against a scripted supervisor, in this process."""

import csv
import json

import numpy as np
import pytest

from app.domain.benchmarks import BenchmarkKind, Scorer, unpack_array
from app.domain.messages import EXIT_DONE
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


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_plan_runs_to_finished(tmp_path, kind):
    supervisor = make_supervisor(tmp_path, training={"type": kind})
    assert supervisor.run_here() == EXIT_DONE
    assert [(m.branch, m.step, m.is_last) for m in supervisor.of("evaluated")] == [
        (0, 4, False),
        (0, 8, False),
        (0, 12, True),
    ]
    assert [m.step for m in supervisor.of("checkpoint_saved")] == [0, 4, 8, 12]
    assert not supervisor.of("planned")
    (finished,) = supervisor.of("finished")
    assert finished.checkpoint_id == "0/12"
    assert finished.artifact_kind == ("adapter" if kind == "lora" else "full")
    assert [p.alpha for p in finished.frontier] == pytest.approx([k / 10 for k in range(11)])
    assert finished.frontier[0].valid_loss > finished.frontier[-1].valid_loss
    assert finished.valid_loss == pytest.approx(supervisor.of("evaluated")[-1].valid_loss)
    report = unpack_array(finished.report[0].scores)
    gate = unpack_array(supervisor.of("evaluated")[0].scores[0].scores)
    assert np.isfinite(report).any()
    assert not (np.isfinite(report) & np.isfinite(gate)).any()
    with open(finished.result_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["valid_loss"]) == pytest.approx(finished.valid_loss, rel=1e-6)
    steps = [row.step for m in supervisor.of("progress") for row in m.metrics]
    assert steps == list(range(1, 13))


def test_a_run_without_a_suite_ends_with_one_evaluation_an_epoch(tmp_path):
    supervisor = make_supervisor(tmp_path, with_suite=False)
    assert supervisor.run_here() == EXIT_DONE
    assert [m.step for m in supervisor.of("evaluated")] == [5, 10, 12]
    assert not supervisor.of("baseline_measured")
    assert supervisor.of("finished")[0].report == ()
