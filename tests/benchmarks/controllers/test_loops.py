"""Both controllers on simulated plants: where they settle, how they get there, and what they never do."""

import functools
import itertools
import json

import pytest

from app.domain.decisions import Action, Verdict
from app.domain.policy import EarlyStopping, Ladder, Policy
from app.domain.replay import replay
from tests.benchmarks.controllers.plants import (
    ASKED,
    HOPELESS,
    LIMIT,
    MENDED,
    STEERABLE,
    Plant,
)
from tests.benchmarks.controllers.runs import GATE_ITEMS, Run, Step, simulate

CONTROLLERS = ("deadband", "dual")
PLANTS = {plant.name: plant for plant in (*STEERABLE, *HOPELESS, MENDED)}
UNTIRED = EarlyStopping(enabled=False)
FINE = 16_000  # gate items with which `deadband` sees a point over the limit

every_controller = pytest.mark.parametrize("controller", CONTROLLERS)
every_plant = pytest.mark.parametrize("name", PLANTS)


@functools.cache
def recorded(controller: str, name: str, seed: int = 0) -> Run:
    """A job with its evidence, shared by the tests that only look at what was decided."""
    policy = Policy.model_validate({"controller": controller})
    return simulate(PLANTS[name], policy, seed, is_recorded=True)


def has_changed(step: Step) -> bool:
    return step.decision.action not in {Action.KEEP, Action.STOP}


@pytest.mark.parametrize(
    ("controller", "gate_items", "over"),
    [("dual", GATE_ITEMS, 0.0), ("deadband", FINE, 0.01)],
)
@pytest.mark.parametrize("name", ["prompt", "slow", "sudden", "noisy"])
def test_it_settles_where_the_limit_holds_with_no_more_than_four_times_what_is_needed(
    name: str, controller: str, gate_items: int, over: float
) -> None:
    policy = Policy.model_validate({"controller": controller, "early_stopping": UNTIRED})
    plant = PLANTS[name]
    run = simulate(plant, policy, 1, gate_items=gate_items, looks=45)
    late = run.steps[-10:]
    assert all(plant.settled_drop(step.after) <= LIMIT + over for step in late)
    assert all(step.after <= 4 * plant.needs * ASKED for step in late)
    assert all(step.decision.action in {Action.KEEP, Action.LOWER_STRENGTH} for step in late) or (
        controller == "dual" and max(s.after for s in late) < 1.25 * min(s.after for s in late)
    )


def test_what_deadband_can_not_confirm_it_leaves_within_two_points_of_the_limit() -> None:
    run = simulate(PLANTS["prompt"], Policy(early_stopping=UNTIRED), 1)
    settled = [step.drop for step in run.steps[-5:]]
    assert all(LIMIT < drop < LIMIT + 0.02 for drop in settled)
    assert all(step.reading.verdict is not Verdict.REGRESS for step in run.steps[-5:])


@every_controller
@every_plant
def test_it_turns_back_at_most_twice(controller: str, name: str) -> None:
    assert recorded(controller, name).reversals <= 2


@every_controller
@every_plant
def test_cap_floor_and_cool_down_are_respected(controller: str, name: str) -> None:
    run = recorded(controller, name)
    (lever,) = run.levers
    assert all(lever.asked <= step.after <= lever.cap for step in run.steps)
    for before, step in itertools.pairwise(run.steps):
        if step.decision.action is Action.LOWER_STRENGTH:
            assert not has_changed(before)


@pytest.mark.parametrize("cool_down", [0, 3])
@every_controller
def test_the_cool_down_is_the_policys(controller: str, cool_down: int) -> None:
    policy = Policy.model_validate(
        {
            "controller": controller,
            "ladder": Ladder(cool_down_evals=cool_down),
            "early_stopping": UNTIRED,
        }
    )
    easy = Plant("easy", "drops nothing", needs=1.0, free=1e-4)
    run = simulate(easy, policy, 0, first=32 * ASKED, looks=20)
    changes = [at for at, step in enumerate(run.steps) if has_changed(step)]
    assert len(changes) >= 4
    assert min(b - a for a, b in itertools.pairwise(changes)) == cool_down + 1
    assert all(
        step.decision.action is Action.LOWER_STRENGTH for step in run.steps if has_changed(step)
    )


@pytest.mark.parametrize(
    ("controller", "first_by", "half_by"), [("dual", 3, 7), ("deadband", 3, 16)]
)
def test_a_long_time_at_the_cap_leaves_no_push_behind(
    controller: str, first_by: int, half_by: int
) -> None:
    cap_factor, recovery = 8.0, 40
    plant = Plant(
        "relieved", "needs 20 times, later nothing", 20.0, 0.045, pace=0.9, recovers_at=recovery
    )
    policy = Policy.model_validate(
        {
            "controller": controller,
            "ladder": Ladder(strength_cap_factor=cap_factor),
            "early_stopping": UNTIRED,
        }
    )
    run = simulate(plant, policy, 0, first=cap_factor * ASKED, looks=recovery + half_by + 2)
    assert len(run.steps) == recovery + half_by + 2
    stood, freed = run.steps[:recovery], run.steps[recovery:]
    assert all(step.after == cap_factor * ASKED for step in stood)
    assert sum(step.drop > LIMIT for step in stood) >= recovery - 2
    assert freed[first_by - 1].after < cap_factor * ASKED
    assert freed[half_by - 1].after <= cap_factor * ASKED / 2
    assert all(step.after <= step.strength for step in freed)


@every_controller
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_drop_that_is_step_noise_ends_in_could_not_hold(controller: str, seed: int) -> None:
    run = recorded(controller, "step noise", seed)
    last = run.steps[-1].decision
    assert (last.action, last.code) == (Action.STOP, "could_not_hold")
    assert last.state.could_not_hold
    assert last.state.rollbacks == Policy().ladder.max_rollbacks
    assert run.published is None
    assert len(run.steps) <= 25


@every_controller
def test_where_the_learning_rate_is_at_fault_it_is_lowered_and_the_job_holds(
    controller: str,
) -> None:
    run = recorded(controller, "rate")
    assert run.held
    assert run.steps[-1].decision.state.learning_rate_scale <= 0.5
    assert run.steps[-1].drop <= LIMIT


def test_the_law_of_dual_gives_raises_up_that_change_nothing() -> None:
    run = recorded("dual", "rate")
    until = next(
        at
        for at, step in enumerate(run.steps)
        if step.decision.action in {Action.LOWER_LEARNING_RATE, Action.ROLL_BACK}
    )
    law = Policy().dual
    factors = [
        step.after / step.strength
        for step in run.steps[:until]
        if step.decision.code == "law_raised"
    ]
    product = functools.reduce(lambda a, b: a * b, factors, 1.0)
    assert 1.0 < product <= law.futile_factor * law.max_factor


@every_controller
@every_plant
def test_every_decision_replays_exactly_from_its_evidence(controller: str, name: str) -> None:
    for step in recorded(controller, name).steps:
        assert replay(json.loads(json.dumps(step.evidence))) == step.decision


@every_controller
@pytest.mark.parametrize("name", ["noisy", "far"])
def test_equal_seeds_give_equal_jobs_and_others_do_not(controller: str, name: str) -> None:
    again = simulate(
        PLANTS[name], Policy.model_validate({"controller": controller}), 0, is_recorded=True
    )
    assert again == recorded(controller, name)
    assert recorded(controller, name, 1) != again
