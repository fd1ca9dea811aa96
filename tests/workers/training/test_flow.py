"""A whole attempt against a scripted supervisor, in this process."""

import csv
from pathlib import Path

import numpy as np
import pytest

from app.domain.benchmarks import unpack_array
from app.domain.messages import EXIT_DONE
from tests.workers.training.rows import make_supervisor


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
    with Path(finished.result_csv).open(newline="") as file:
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
