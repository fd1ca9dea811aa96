"""Early stopping on a benchmark: either way of better, patience, and what a rollback leaves."""

import pytest

from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Decision,
    LeverState,
    Look,
    MetricFact,
    Reading,
    Verdict,
)
from app.domain.policy import EarlyStopping, Ladder, Policy
from app.domain.publishing import choose_checkpoint

EWC = LeverState(strategy="ewc", asked=1.0, default=100.0, cap=1000.0)
START = CheckpointFact(checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None)
POLICY = Policy(
    early_stopping=EarlyStopping(metric="math", patience=2), ladder=Ladder(repair=False)
)


def look(step, value, *, verdict=Verdict.PASS, severe=False, higher_is_better=True, **rest):
    """An evaluation point at which `math` has this value; None: it was not measured."""
    metric = MetricFact(name="math", value=value or 0.0, higher_is_better=higher_is_better)
    reading = Reading(
        look=1,
        alpha=0.006,
        drop=0.02,
        stderr=0.004,
        lower=0.01,
        upper=0.029,
        limit=0.03,
        p_regress=0.5,
        verdict=verdict,
        severe=severe,
    )
    values = {"branch": 0, "valid_loss": 1.0, "checkpoints": (START,)}
    return Look(
        step=step,
        is_last=False,
        reading=reading,
        metric=None if value is None else metric,
        **{**values, **rest},
    )


def run(values, *, policy=POLICY, higher_is_better=True) -> list[Decision]:
    """Decisions of a run whose state goes through JSON at every evaluation, as when it is resumed."""
    state, made = ControllerState(strengths={"ewc": 1.0}), []
    for number, value in enumerate(values, start=1):
        state = ControllerState.model_validate_json(state.model_dump_json())
        point = look(30 * number, value, higher_is_better=higher_is_better)
        made.append(decide(policy, [EWC], state, point))
        state = made[-1].state
    return made


@pytest.mark.parametrize(
    ("values", "higher_is_better"),
    [([0.5, 0.6, 0.6, 0.55], True), ([2.0, 1.5, 1.5, 1.6], False)],
)
def test_it_stops_when_the_benchmark_no_longer_becomes_better(values, higher_is_better) -> None:
    made = run(values, higher_is_better=higher_is_better)
    assert [d.action for d in made] == [Action.KEEP] * 3 + [Action.STOP]
    assert made[-1].code == "early_stopping"
    assert f"math has not improved on {values[1]:g} for 2 evaluations" in made[-1].reason
    other_way = run(values[:3], higher_is_better=not higher_is_better)
    assert other_way[-1].action is Action.STOP


def test_the_validation_loss_no_longer_counts_and_a_missing_value_does_not_either() -> None:
    assert {d.action for d in run([0.1, 0.2, None, None, None, 0.3, 0.4])} == {Action.KEEP}


def test_min_delta_is_in_the_metrics_units() -> None:
    stopping = EarlyStopping(metric="math", patience=2, min_delta=0.05)
    made = run([0.5, 0.54, 0.54], policy=Policy(early_stopping=stopping))
    assert made[-1].action is Action.STOP
    made = run([0.5, 0.56, 0.54], policy=Policy(early_stopping=stopping))
    assert made[-1].action is Action.KEEP


def test_a_rollback_forgets_what_was_best_after_its_target() -> None:
    state = run([0.5, 0.6, 0.7])[-1].state
    assert state.best_scores == ((30, 0.5), (60, 0.6), (90, 0.7))
    target = CheckpointFact(checkpoint_id="a", branch=0, step=60, status="good", valid_loss=0.4)
    bad = look(120, 0.8, verdict=Verdict.REGRESS, severe=True, checkpoints=(START, target))
    rolled = decide(POLICY, [EWC], state, bad)
    assert rolled.target_checkpoint_id == "a"
    assert rolled.state.best_scores == ((30, 0.5), (60, 0.6))
    better = decide(POLICY, [EWC], rolled.state, look(90, 0.65, branch=1))
    assert better.state.best_scores[-1] == (90, 0.65)


def test_a_regressed_point_is_no_best() -> None:
    regressed = look(30, 0.9, verdict=Verdict.REGRESS)
    decision = decide(POLICY, [EWC], ControllerState(strengths={"ewc": 1.0}), regressed)
    assert decision.state.best_scores == ()


def test_the_published_checkpoint_is_still_chosen_by_validation_loss() -> None:
    facts = tuple(
        CheckpointFact(checkpoint_id=name, branch=0, step=step, status="good", valid_loss=loss)
        for name, step, loss in [("a", 30, 0.4), ("b", 60, 0.6)]
    )
    chosen = choose_checkpoint(facts, POLICY)
    assert chosen is not None
    assert chosen.checkpoint_id == "a"
