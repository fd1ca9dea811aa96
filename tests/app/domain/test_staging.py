"""Stages resolved at submit, and the coefficients that cross from one to the next."""

import pytest

from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    LeverState,
    Look,
    Reading,
    Verdict,
)
from app.domain.policy import EarlyStopping, Ladder, Policy
from app.domain.spec import CreateJob, ResolvedTraining
from app.domain.staging import (
    next_stage,
    resolve_stages,
    stage_facts,
    stage_files,
    stage_strategies,
    trained_stage,
)
from app.domain.submit import resolve_training
from app.errors import BadRequest

ROWS = {"file-0": 100, "file-1": 33}
STRATEGIES = (EwcConfig(strength=10.0), L2SpConfig(armed=True))


def request(**fields: object) -> CreateJob:
    body = {"model": "m", "training_file": "file-0", "training": {"type": "full"}}
    body["hyperparameters"] = {"n_epochs": 3, "batch_size": 10}
    return CreateJob.model_validate(body | fields)


def trained(body: CreateJob) -> ResolvedTraining:
    return resolve_training(body, num_rows=100, context_length=None, seed=0)


def resolve(**fields: object):
    body = request(**fields)
    return resolve_stages(body, trained(body), STRATEGIES, ROWS)


def test_without_stages_the_training_stays_as_it_was() -> None:
    body = request()
    assert resolve() == (trained(body), (), None)


def test_a_stage_takes_from_the_job_what_it_leaves_out() -> None:
    found = resolve(
        stages=[
            {"name": "a"},
            {"name": "b", "training_file": "file-1", "n_epochs": 2, "learning_rate": 0.1},
        ]
    )
    first, second = found.stages
    assert (first.training_file, first.training.total_steps) == ("file-0", 30)
    assert (second.training_file, second.training.total_steps) == ("file-1", 8)
    assert (first.training.learning_rate, second.training.learning_rate) == (2e-5, 0.1)
    assert (found.training.total_steps, found.training.n_epochs) == (38, 5)
    assert not found.training.late_adapter


def test_the_roadmap_is_a_regularised_phase_an_adapter_and_a_student() -> None:
    found = resolve(preset="roadmap")
    assert [(s.name, s.trains, s.training.n_epochs) for s in found.stages] == [
        ("regularised", "backbone", 2),
        ("adapter", "adapter", 1),
    ]
    assert found.training.late_adapter
    assert found.stages[1].training.learning_rate == pytest.approx(2e-4)
    assert found.student is not None
    assert found.student.training.total_steps == 30


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"preset": "roadmap", "training": {"type": "lora"}}, "preset"),
        ({"preset": "roadmap", "stages": [{"name": "a"}]}, "preset"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages.1.name"),
        ({"stages": [{"type": "student"}]}, "stages.0"),
        ({"stages": [{"type": "student"}, {"name": "a"}]}, "stages.0"),
        ({"stages": [{"name": "a", "strengths": {"replay": 1}}]}, "stages.0.strengths"),
        (
            {"training": {"type": "lora"}, "stages": [{"name": "a", "trains": "backbone"}]},
            "stages.0.trains",
        ),
        (
            {"training": {"type": "lora"}, "stages": [{"name": "a"}, {"type": "student"}]},
            "stages.1",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_its_field(
    fields: dict[str, object], param: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        resolve(**fields)
    assert refused.value.param == param


def test_the_files_that_stages_name() -> None:
    body = request(stages=[{"name": "a"}, {"name": "b", "training_file": "file-1"}])
    assert stage_files(body) == (("stages.1.training_file", "file-1"),)


def make_stages():
    found = resolve(stages=[{"name": "a"}, {"name": "b", "strengths": {"ewc": 50}}, {"name": "c"}])
    return stage_facts(found.stages, STRATEGIES, lora=False)


def test_stages_cover_the_steps_and_a_boundary_belongs_to_both() -> None:
    stages = make_stages()
    assert [(s.first_step, s.last_step) for s in stages] == [(0, 30), (30, 60), (60, 90)]
    assert [s.strengths["ewc"] for s in stages] == [10.0, 50.0, 10.0]
    assert [trained_stage(stages, step) for step in (0, 1, 30, 31, 90)] == [0, 0, 0, 1, 2]
    assert [next_stage(stages, step) for step in (0, 29, 30, 60, 90)] == [0, 0, 1, 2, 2]


def test_a_strength_named_for_a_stage_disarms_there() -> None:
    ewc, l2sp = stage_strategies(STRATEGIES, {"l2sp": 0.5})
    assert (ewc, l2sp.strength, l2sp.armed) == (STRATEGIES[0], 0.5, False)


LEVERS = (LeverState(strategy="ewc", asked=10.0, default=100.0, cap=1e4),)
POLICY = Policy(ladder=Ladder(repair=False, rollback_strength_factor=4.0))


def look(step: int, *, verdict: Verdict = Verdict.INCONCLUSIVE, valid_loss: float = 1.0) -> Look:
    reading = Reading(
        look=1,
        alpha=0.01,
        drop=0.05,
        stderr=0.01,
        lower=0.04,
        upper=0.06,
        limit=0.03,
        p_regress=0.1,
        verdict=verdict,
        severe=False,
    )
    good = CheckpointFact(checkpoint_id="c", branch=0, step=20, status="good", valid_loss=1.0)
    return Look(
        branch=0,
        step=step,
        is_last=step == 90,
        reading=reading,
        valid_loss=valid_loss,
        checkpoints=(good,),
        stages=make_stages(),
    )


def state(**overrides: object) -> ControllerState:
    values: dict[str, object] = {"strengths": {"ewc": 20.0, "l2sp": 0.0}}
    return ControllerState.model_validate(values | overrides)


def test_a_raised_strength_stays_raised_by_its_factor_in_the_next_stage() -> None:
    decision = decide(POLICY, LEVERS, state(best_valid_loss=0.5), look(30))
    assert decision.action is Action.KEEP
    assert decision.state.strengths == {"ewc": 100.0, "l2sp": 0.0}
    assert decision.state.best_valid_loss is None
    activated = state(strengths={"ewc": 10.0, "l2sp": 0.3})
    assert decide(POLICY, LEVERS, activated, look(60)).state.strengths["l2sp"] == 0.3
    assert decide(POLICY, LEVERS, state(), look(29)).state.strengths["ewc"] == 20.0


def test_what_regresses_at_the_end_of_a_stage_is_rolled_back() -> None:
    assert decide(POLICY, LEVERS, state(), look(25, verdict=Verdict.REGRESS)).action is (
        Action.RAISE_STRENGTH
    )
    decision = decide(POLICY, LEVERS, state(), look(30, verdict=Verdict.REGRESS))
    assert decision.action is Action.ROLL_BACK
    assert decision.state.strengths["ewc"] == 80.0
    assert "of this stage" in decision.reason


def test_a_rollback_over_the_end_of_a_stage_takes_up_the_strengths_of_the_earlier_one() -> None:
    raised = state(strengths={"ewc": 100.0, "l2sp": 0.0})
    decision = decide(POLICY, LEVERS, raised, look(60, verdict=Verdict.REGRESS))
    assert decision.details["target_step"] == 20
    assert decision.state.strengths["ewc"] == pytest.approx(100.0 * 4 * 10 / 50)


def test_only_the_last_stage_is_stopped_early() -> None:
    patient = Policy(early_stopping=EarlyStopping(patience=1, warmup_evals=0))
    tired = state(best_valid_loss=0.1, evals_without_improvement=3, evals=9)
    assert decide(patient, LEVERS, tired, look(45)).action is Action.KEEP
    assert decide(patient, LEVERS, tired, look(75)).action is Action.STOP
