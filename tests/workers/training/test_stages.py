"""Stages in the real trainer: rows, schedules and trained weights by stage, resumed and rolled back across their ends."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.domain.configs.quadratic import L2SpConfig
from app.domain.messages import EXIT_DONE, EXIT_RELEASED
from app.domain.runplan import StagePlan
from app.domain.spec import ResolvedStudent
from tests.workers.training.rows import make_supervisor, write_rows
from tests.workers.training.runs import make_training, same, tiny_base
from tests.workers.training.supervised import stop

FIRST, SECOND = 5, 6  # steps of the two stages


def make_staged(scratch, *, kind="full", trains=("all", "all"), strengths=({}, {}), **overrides):
    whole = make_training(
        type=kind, total_steps=FIRST + SECOND, late_adapter=kind == "full" and "adapter" in trains
    )
    stages = tuple(
        StagePlan(
            name=name,
            training_rows=write_rows(scratch / f"{name}.jsonl", 40, seed),
            training=whole.model_copy(update={"total_steps": steps, "learning_rate": rate}),
            trains=what,
            strengths=own,
        )
        for name, seed, steps, rate, what, own in (
            ("one", 11, FIRST, 1e-3, trains[0], strengths[0]),
            ("two", 12, SECOND, 3e-3, trains[1], strengths[1]),
        )
    )
    return make_supervisor(scratch, training=whole.model_dump(), stages=stages, **overrides)


def weights_at(supervisor, branch, step):
    return load_file(f"{supervisor.checkpoints[branch, step]}/model.safetensors")


def rates(supervisor):
    return {row.step: row.learning_rate for m in supervisor.of("progress") for row in m.metrics}


def test_each_stage_has_its_rows_its_schedule_and_an_evaluation_at_its_end(tmp_path):
    supervisor = make_staged(tmp_path)
    assert supervisor.run_here() == EXIT_DONE
    assert [(m.step, m.is_last) for m in supervisor.of("evaluated")] == [
        (4, False),
        (FIRST, False),
        (8, False),
        (FIRST + SECOND, True),
    ]
    found = rates(supervisor)
    assert max(found[step] for step in range(1, FIRST + 1)) <= 1e-3
    assert max(found[step] for step in range(FIRST + 1, FIRST + SECOND + 1)) > 2e-3
    state = json.loads(Path(supervisor.checkpoints[0, FIRST + SECOND], "state.json").read_text())
    assert state["task_index"] == 1
    assert set(state["carry"]["cursors"]["streams"]) == {"domain", "domain@training-1"}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("left_at", [FIRST - 1, FIRST, FIRST + 2])
def test_a_job_left_in_either_stage_goes_on_bit_for_bit(tmp_path, kind, left_at):
    whole_dir, parts_dir = tmp_path / "whole", tmp_path / "parts"
    whole_dir.mkdir()
    parts_dir.mkdir()
    whole = make_staged(whole_dir, kind=kind, strategies=(L2SpConfig(strength=0.3),))
    assert whole.run_here() == EXIT_DONE
    parts = make_staged(parts_dir, kind=kind, strategies=(L2SpConfig(strength=0.3),))

    def leave(message):
        steps = [row.step for row in message.metrics] if message.type == "progress" else []
        return (
            [stop("drain")]
            if left_at in steps or (message.type == "progress" and message.step >= left_at)
            else None
        )

    assert parts.run_here(send_at=leave) == EXIT_RELEASED
    assert parts.run_here() == EXIT_DONE
    last = (0, FIRST + SECOND)
    assert same(weights_at(parts, *last), weights_at(whole, *last))


def test_a_rollback_goes_back_over_the_end_of_a_stage(tmp_path):
    def decide(supervisor, message):
        if (message.branch, message.step) != (0, 8):
            return {}
        state = supervisor.last_state().model_copy(update={"branch": 1})
        return {"state": state, "roll_back": supervisor.to_checkpoint(0, 4)}

    supervisor = make_staged(tmp_path, decide=decide)
    assert supervisor.run_here() == EXIT_DONE
    points = [(m.branch, m.step) for m in supervisor.of("evaluated")]
    assert points == [(0, 4), (0, 5), (0, 8), (1, 5), (1, 8), (1, 11)]


def test_a_late_adapter_is_trained_on_the_tuned_backbone_and_published_as_whole_weights(tmp_path):
    supervisor = make_staged(tmp_path, trains=("backbone", "adapter"))
    assert supervisor.run_here() == EXIT_DONE
    between, end = weights_at(supervisor, 0, FIRST), weights_at(supervisor, 0, FIRST + SECOND)
    backbone = {name for name in end if ".lora_" not in name}
    assert all(torch.equal(between[name], end[name]) for name in backbone)
    assert any(not torch.equal(between[n], end[n]) for n in end if ".lora_B" in n)
    assert all(not between[n].any() for n in end if ".lora_B" in n)
    (finished,) = supervisor.of("finished")
    assert finished.artifact_kind == "full"
    published = AutoModelForCausalLM.from_pretrained(finished.artifact_directory).state_dict()
    name = "model.layers.0.mlp.up_proj"
    inner = f"base_model.model.{name}"
    training = supervisor.plan.training.lora
    change = end[f"{inner}.lora_B.default.weight"] @ end[f"{inner}.lora_A.default.weight"]
    expected = end[f"{inner}.base_layer.weight"] + change * training.alpha / training.r
    torch.testing.assert_close(published[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    assert finished.frontier[0].valid_loss == pytest.approx(
        _valid_loss_of_base(supervisor), rel=1e-4
    )
    assert finished.frontier[-1].valid_loss == pytest.approx(finished.valid_loss, rel=1e-5)


def test_a_student_with_half_the_layers_is_published_where_it_holds(tmp_path):
    student = ResolvedStudent(
        name="student",
        layers=0.5,
        training=make_training(total_steps=4),
        kd_coef=1.0,
        ce_coef=0.5,
        temperature=1.0,
        general_ratio=0.25,
    )
    supervisor = make_staged(tmp_path, student=student)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    notes = {m.code: m for m in supervisor.of("note")}
    is_published = "student_distilled" in notes
    facts = notes["student_distilled" if is_published else "student_not_held"].data
    assert facts["parameters"]["student"] < facts["parameters"]["teacher"]
    published = AutoModelForCausalLM.from_pretrained(finished.artifact_directory)
    layers = published.config.num_hidden_layers
    base_layers = AutoModelForCausalLM.from_pretrained(tiny_base()).config.num_hidden_layers
    assert layers == (base_layers // 2 if is_published else base_layers)
    again = make_staged_again(tmp_path / "again", student)
    assert again == facts["report"]


def make_staged_again(scratch, student):
    """What the report set says of the student in a second run of the same plan."""
    scratch.mkdir()
    supervisor = make_staged(scratch, student=student)
    assert supervisor.run_here() == EXIT_DONE
    return next(m.data["report"] for m in supervisor.of("note") if m.code.startswith("student_"))


@pytest.mark.parametrize("asked", [0.25, "search"])
def test_the_published_weights_go_back_to_the_base_as_asked(tmp_path, asked):
    supervisor = make_supervisor(tmp_path, merge_back=asked)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    (note,) = [m for m in supervisor.of("note") if m.code == "merged_back"]
    assert finished.alpha == note.data["alpha"]
    if asked == 0.25:
        assert finished.alpha == 0.75
    published = AutoModelForCausalLM.from_pretrained(finished.artifact_directory).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_base()).state_dict()
    tuned = weights_at(supervisor, 0, 12)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = torch.lerp(base[name], tuned[name], finished.alpha)
    torch.testing.assert_close(published[name], expected, rtol=0, atol=1e-6)


def _valid_loss_of_base(supervisor):
    """The validation loss that a run with no step at all would report: that of the frontier's first point."""
    scratch = Path(supervisor.scratch) / "base"
    scratch.mkdir()
    plain = make_supervisor(scratch)
    assert plain.run_here() == EXIT_DONE
    return plain.of("finished")[0].frontier[0].valid_loss
