"""What a run measures of itself."""

import tempfile
from pathlib import Path

import pytest
import torch

from app.domain.estimates import estimate
from app.domain.estimates_devices import cpu
from app.domain.estimates_evaluation import EvaluationRows
from app.domain.estimates_job import Asked, RowSample, StageRows
from app.domain.estimates_runs import reckon_run
from app.domain.estimates_work import RowTokens
from app.domain.messages import CheckpointSaved, Finished
from tests.benchmarks.estimates import read_shape
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import CPU, make_plan, make_run, tiny_base
from workers.training.footprint import measure_footprint
from workers.training.loop import train_step
from workers.training.measuring import Workload, begin_peak, device_name, held_bytes, read_peak


def test_a_finished_run_tells_rows_time_and_memory(tmp_path):
    supervisor = make_supervisor(tmp_path, with_suite=False)
    assert supervisor.run_here() == 0, supervisor.log()

    (end,) = [m for _, m in supervisor.messages if isinstance(m, Finished)]
    measured = end.measured
    assert measured is not None
    assert measured.steps == 11  # of 12: the first warms up
    assert measured.rows == 11 * 8
    assert measured.cpu_seconds > 0
    assert 0 < measured.step_seconds < 60
    assert measured.tokens >= measured.supervised > 0
    assert measured.pairs >= measured.tokens
    assert measured.device_class == f"{device_name(CPU)} x{torch.get_num_threads()}"
    rows, width, _ = measured.largest
    assert rows * width <= measured.tokens
    shape = read_shape(tiny_base())
    run = reckon_run(shape, supervisor.plan.training, (), measured)
    assert run.seconds == measured.step_seconds
    assert run.work.flops > 6 * shape.matrix_parameters * measured.tokens


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_lasting_memory_and_checkpoints_are_exact(tmp_path, kind):
    supervisor = make_supervisor(
        tmp_path, with_suite=False, training={"type": kind, "total_steps": 3}
    )
    assert supervisor.run_here() == 0, supervisor.log()
    training = supervisor.plan.training
    rows = RowSample(rows=(RowTokens(20, 10),), num_rows=40)
    asked = Asked(
        shape=read_shape(tiny_base()),
        training=training,
        strategies=(),
        stages=(StageRows(training=training, rows=rows),),
        general=None,
        evaluation=EvaluationRows(),
    )
    found = estimate(asked, cpu("cpu", 1))

    with tempfile.TemporaryDirectory() as scratch:
        run = make_run(make_plan(scratch, training={"type": kind}))
        train_step(run)
    footprint = measure_footprint(run)
    assert found.memory.weights == footprint.weights
    assert found.memory.gradients == footprint.gradients
    steps = len(run.ctx.params) * 4  # AdamW's own count of steps, one each
    assert found.memory.optimizer == footprint.moments - steps
    sizes = [m.size_bytes for _, m in supervisor.messages if isinstance(m, CheckpointSaved)]
    overhead = 60_000  # headers, manifest and state
    assert found.checkpoint_bytes <= max(sizes) <= found.checkpoint_bytes + overhead


def test_nothing_is_told_of_one_step():
    load = Workload()
    with load.step(CPU):
        pass
    load.end_step(1.0)
    assert load.measured(CPU, world_size=1, mean_row_tokens=1.0) is None


def test_the_peak_of_memory_begins_anew():
    size = 64 * 2**20
    begin_peak(CPU)
    block = torch.ones(size // 4)
    assert read_peak(CPU) >= size
    assert held_bytes(CPU) >= size
    del block
    if Path("/proc/self/clear_refs").exists():
        held = held_bytes(CPU)
        begin_peak(CPU)
        assert read_peak(CPU) < held + size // 2
