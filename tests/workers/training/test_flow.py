"""A whole attempt against a scripted supervisor, in this process."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.domain.benchmarks import unpack_array
from app.domain.configs.quadratic import L2SpConfig
from app.domain.messages import EXIT_DONE, EXIT_RELEASED, Order, PublishTarget
from app.domain.policy import Policy
from app.domain.runplan import ExportPlan
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import same
from tests.workers.training.supervised import Committed, order, stop


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


def raised(supervisor, branch, **strengths):
    state = supervisor.last_state()
    update = {"strengths": {**state.strengths, **strengths}, "branch": branch}
    return state.model_copy(update=update)


def weights_at(supervisor, branch, step):
    return load_file(f"{supervisor.checkpoints[branch, step]}/model.safetensors")


def test_a_rollback_runs_on_as_another_branch_with_fresh_rows_and_the_new_strengths(tmp_path):
    def decide(supervisor, message):
        if (message.branch, message.step) != (0, 8):
            return {}
        state = raised(supervisor, 1, l2sp=30.0)
        return {"state": state, "roll_back": supervisor.to_checkpoint(0, 4)}

    supervisor = make_supervisor(tmp_path, strategies=(L2SpConfig(),), decide=decide)
    assert supervisor.run_here() == EXIT_DONE
    points = [(m.branch, m.step) for m in supervisor.of("evaluated")]
    assert points == [(0, 4), (0, 8), (1, 8), (1, 12)]
    carry = {(m.branch, m.step): m.carry.cursors for m in supervisor.of("evaluated")}
    assert carry[1, 8]["executed"] == 12  # 8 steps, then 4 more that read other rows
    assert not same(weights_at(supervisor, 0, 8), weights_at(supervisor, 1, 8))
    state = json.loads(Path(supervisor.checkpoints[1, 8], "state.json").read_text())
    assert state["controller"]["strengths"] == {"l2sp": 30.0}
    with Path(supervisor.of("finished")[0].result_csv).open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 13))


def test_a_rollback_to_step_0_starts_from_the_base_again(tmp_path):
    def decide(supervisor, message):
        if (message.branch, message.step) != (0, 4):
            return {}
        return {
            "state": raised(supervisor, 1),
            "roll_back": supervisor.to_checkpoint(0, 0),
        }

    supervisor = make_supervisor(tmp_path, decide=decide)
    assert supervisor.run_here() == EXIT_DONE
    assert [(m.branch, m.step) for m in supervisor.of("evaluated")] == [
        (0, 4),
        (1, 4),
        (1, 8),
        (1, 12),
    ]


@pytest.mark.parametrize("mode", ["pause", "drain"])
def test_a_stop_saves_and_a_resume_goes_on_bit_identically(tmp_path, mode):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = make_supervisor(tmp_path / "a")
    assert whole.run_here() == EXIT_DONE
    halved = make_supervisor(tmp_path / "b")

    def send_after(message):
        is_time = message.type == "evaluated" and message.step == 4
        return [stop(mode)] if is_time else None

    assert halved.run_here(send_after=send_after) == EXIT_RELEASED
    (stopped,) = halved.of("stopped")
    assert stopped.mode == mode
    assert (stopped.branch, stopped.step) in halved.checkpoints
    assert halved.run_here() == EXIT_DONE
    assert same(weights_at(whole, 0, 12), weights_at(halved, 0, 12))


def test_a_stop_that_comes_while_a_decision_is_awaited_is_obeyed(tmp_path):
    supervisor = make_supervisor(tmp_path)
    supervisor.is_silent = True
    code = supervisor.run_here(
        send_at=lambda m: [stop("drain")] if m.type == "evaluated" and m.step == 8 else None
    )
    assert code == EXIT_RELEASED
    assert supervisor.committed.step == 8
    supervisor.is_silent = False
    assert supervisor.run_here() == EXIT_DONE
    points = [(m.branch, m.step) for m in supervisor.of("evaluated")]
    assert points == [(0, 4), (0, 8), (0, 8), (0, 12)]


def test_a_cancelled_run_saves_nothing_more(tmp_path):
    supervisor = make_supervisor(tmp_path)
    code = supervisor.run_here(
        send_at=lambda m: [stop("cancel")] if m.type == "evaluated" and m.step == 4 else None
    )
    assert code == EXIT_RELEASED
    assert [m.step for m in supervisor.of("checkpoint_saved")] == [0, 4]


def test_an_order_acts_at_the_next_step_and_again_there_after_a_resume(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def send_at(supervisor):
        entry = Order(version=1, branch=0, state=raised(supervisor, 0, l2sp=50.0))

        def send(message):
            is_time = message.type == "evaluated" and message.step == 4 and not supervisor.orders
            return [order(supervisor, entry)] if is_time else None

        return send

    whole = make_supervisor(tmp_path / "a", strategies=(L2SpConfig(),))
    assert whole.run_here(send_at=send_at(whole)) == EXIT_DONE
    (applied,) = whole.of("order_applied")
    assert (applied.version, applied.branch, applied.step) == (1, 0, 5)
    plain = make_supervisor(tmp_path / "b", strategies=(L2SpConfig(),))
    assert plain.run_here() == EXIT_DONE
    assert same(weights_at(whole, 0, 4), weights_at(plain, 0, 4))
    assert not same(weights_at(whole, 0, 8), weights_at(plain, 0, 8))
    # as after a crash: back to the checkpoint of step 4, with the order as it was recorded
    resumed = dataclasses.replace(whole, messages=[])
    resumed.committed = Committed(whole.checkpoints[0, 4], 0, 4, decision=whole.decisions[0, 4])
    before = weights_at(whole, 0, 8)
    assert resumed.run_here() == EXIT_DONE
    assert not resumed.of("order_applied")
    assert same(weights_at(resumed, 0, 8), before)


def test_the_budget_chooses_once_and_a_resume_keeps_the_choice(tmp_path):
    policy = Policy(eval_budget=5.0)
    supervisor = make_supervisor(tmp_path, policy=policy, training={"total_steps": 30})
    send_at = lambda m: [stop("pause")] if m.type == "evaluated" else None  # noqa: E731
    assert supervisor.run_here(send_at=send_at) == EXIT_RELEASED
    (planned,) = supervisor.of("planned")
    assert 1 <= planned.eval_interval <= 30
    assert planned.gate_items >= 1
    assert planned.seconds_per_step > 0
    assert supervisor.of("evaluated")[0].step > 5
    assert supervisor.run_here() == EXIT_DONE
    assert len(supervisor.of("planned")) == 1
    calendar = [m.step for m in supervisor.of("evaluated")]
    assert all(step % planned.eval_interval == 0 or step == 30 for step in calendar)


def teach_other_words(supervisor):
    """Training rows that have nothing in common with the benchmarks."""
    path = Path(supervisor.plan.training_rows.path)
    path.write_text("\n".join(json.dumps({"text": "0123456789 " * 3}) for _ in range(40)))


def forgetting(supervisor, message):
    """Orders a repair at step 8."""
    return {"repair": True} if message.step == 8 else {}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_repair_scales_back_to_a_point_that_holds(tmp_path, kind):
    training = {"type": kind, "learning_rate": 3e-2, "lr_scheduler": "constant"}
    policy = Policy(eval_interval=4, gate_items=10, max_nll_increase=0.2, max_drop=0.9)
    supervisor = make_supervisor(tmp_path, decide=forgetting, training=training, policy=policy)
    teach_other_words(supervisor)
    assert supervisor.run_here() == EXIT_DONE
    (repaired,) = supervisor.of("repaired")
    assert 0 < repaired.alpha <= 1
    assert repaired.tried


def test_a_confirmed_regression_at_the_end_is_shrunk_or_refused(tmp_path):
    training = {"learning_rate": 3e-2, "lr_scheduler": "constant"}
    policy = Policy(eval_interval=6, gate_items=10, max_nll_increase=0.01)
    supervisor = make_supervisor(tmp_path, training=training, policy=policy)
    teach_other_words(supervisor)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    assert finished.alpha < 1
    assert finished.report != finished.tuned_report
    if finished.alpha == 0:
        assert finished.failure == "retention_not_met"
    assert Path(finished.artifact_directory).is_dir()


def test_nothing_to_publish_ends_with_the_reason_and_no_artifact(tmp_path):
    def decide(_, message):
        return {"publish": None, "failure": "retention_not_met"} if message.is_last else {}

    supervisor = make_supervisor(tmp_path, decide=decide)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    assert finished.artifact_directory is None
    assert finished.failure == "retention_not_met"


def test_an_early_stop_publishes_the_checkpoint_that_the_decision_names(tmp_path):
    def decide(supervisor, message):
        if message.step != 8:
            return {}
        target = PublishTarget(
            checkpoint_id="0/4",
            checkpoint_directory=supervisor.checkpoints[0, 4],
            branch=0,
            step=4,
            status="good",
        )
        return {"finish": True, "publish": target}

    supervisor = make_supervisor(tmp_path, decide=decide)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    assert finished.checkpoint_id == "0/4"
    assert finished.valid_loss == pytest.approx(supervisor.of("evaluated")[0].valid_loss)
    published = load_file(f"{finished.artifact_directory}/model.safetensors")
    for name, value in weights_at(supervisor, 0, 4).items():
        assert torch.equal(published[name], value)


def test_a_full_disk_is_warned_of_and_training_goes_on(tmp_path, monkeypatch):
    supervisor = make_supervisor(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    full = iter([usage.free, 10])  # the second checkpoint finds no room
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(full, usage.free)))
    assert supervisor.run_here() == EXIT_DONE
    assert [m.step for m in supervisor.of("checkpoint_saved")] == [0, 8, 12]
    assert [m.code for m in supervisor.of("note")] == ["disk_full"]
    assert not list(tmp_path.glob("checkpoints/**/.tmp-*"))


def test_an_export_writes_another_point_of_the_line(tmp_path):
    supervisor = make_supervisor(tmp_path, training={"type": "lora"})
    assert supervisor.run_here() == EXIT_DONE
    plan = supervisor.plan
    supervisor.plan = ExportPlan(
        job_id="export",
        attempt=9,
        base=plan.base,
        checkpoint_directory=supervisor.checkpoints[0, 12],
        training=plan.training,
        alpha=0.5,
        benchmarks=plan.benchmarks,
        scratch_directory=str(tmp_path),
        cache_directory=plan.cache_directory,
    )
    supervisor.next_plan = lambda: supervisor.plan
    supervisor.attempt = 9
    assert supervisor.run_here() == EXIT_DONE
    (done,) = supervisor.of("export_finished")
    half = load_file(f"{done.artifact_directory}/adapter_model.safetensors")
    whole = load_file(
        f"{supervisor.of('finished')[0].artifact_directory}/adapter_model.safetensors"
    )
    for name, value in whole.items():
        expected = value * 0.5 if "lora_B" in name else value
        assert torch.equal(half[name], expected)
    assert len(done.report) == 2
