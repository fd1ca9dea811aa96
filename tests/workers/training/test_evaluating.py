"""An evaluation job in the real trainer: it scores a published version as the job that made it did."""

import numpy as np
import pytest

from app.domain.benchmarks import unpack_array
from app.domain.messages import EXIT_DONE, EXIT_FAILED
from app.domain.runplan import EvaluationPlan
from tests.workers.training.rows import make_supervisor


def evaluation_of(supervisor, scratch, kind, **changes):
    """The supervisor's next attempt evaluates what its job published."""
    plan = supervisor.plan
    (finished,) = supervisor.of("finished")
    supervisor.plan = EvaluationPlan(
        **{
            "job_id": "evaljob-1",
            "attempt": 9,
            "base": plan.base,
            "artifact_directory": finished.artifact_directory,
            "artifact_kind": kind,
            "training": plan.training,
            "benchmarks": plan.benchmarks,
            "scratch_directory": str(scratch),
            "cache_directory": plan.cache_directory,
        }
        | changes
    )
    supervisor.next_plan = lambda: supervisor.plan
    supervisor.attempt = 9
    return finished


def scores(found):
    return {one.benchmark_version_id: unpack_array(one.scores) for one in found}


@pytest.mark.parametrize(("training", "kind"), [("full", "full"), ("lora", "adapter")])
def test_a_version_scores_as_it_did_when_it_was_published(tmp_path, training, kind):
    supervisor = make_supervisor(tmp_path, training={"type": training})
    assert supervisor.run_here() == EXIT_DONE
    finished = evaluation_of(supervisor, tmp_path, kind)
    assert supervisor.run_here() == EXIT_DONE
    (done,) = supervisor.of("evaluation_finished")
    told, found = scores(finished.report), scores(done.scores)
    assert told.keys() == found.keys()
    for key, values in told.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert [one.item_set for one in done.scores] == ["report"] * len(told)
    measured = scores(m for b in supervisor.of("baseline_measured") for m in b.scores)
    base = scores(done.baseline)
    for key, values in base.items():
        report = ~np.isnan(values)
        assert np.array_equal(report, ~np.isnan(found[key]))
        np.testing.assert_allclose(values[report], measured[key][report], rtol=1e-4, atol=1e-4)
    assert [p.step for p in supervisor.of("progress") if p.phase == "evaluating"][-1] == len(told)


def test_a_cached_baseline_is_not_measured_again(tmp_path):
    supervisor = make_supervisor(tmp_path)
    assert supervisor.run_here() == EXIT_DONE
    known = {
        one.benchmark_version_id: one
        for message in supervisor.of("baseline_measured")
        for one in message.scores
    }
    benchmarks = tuple(
        benchmark.model_copy(
            update={
                "baseline_scores": known[benchmark.benchmark_version_id].scores,
                "baseline_tokens": known[benchmark.benchmark_version_id].tokens,
            }
        )
        for benchmark in supervisor.plan.benchmarks
    )
    evaluation_of(supervisor, tmp_path, "full", benchmarks=benchmarks)
    assert supervisor.run_here() == EXIT_DONE
    (done,) = supervisor.of("evaluation_finished")
    assert done.baseline == ()
    assert len(done.scores) == len(benchmarks)


def test_a_damaged_artifact_is_not_evaluated(tmp_path):
    supervisor = make_supervisor(tmp_path)
    assert supervisor.run_here() == EXIT_DONE
    finished = evaluation_of(supervisor, tmp_path, "full")
    with open(f"{finished.artifact_directory}/config.json", "a") as file:  # noqa: PTH123
        file.write("\n")
    assert supervisor.run_here() == EXIT_FAILED
    (failed,) = supervisor.of("failed")
    assert failed.code == "damaged_artifact"
