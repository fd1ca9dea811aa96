"""A repair and what is activated with it: an armed strategy that comes next, or the drop would return."""

import pytest

from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Decision,
    LeverState,
    Look,
    Reading,
    Verdict,
)
from app.domain.policy import Policy
from app.domain.proposals import carried_out

ARMED = LeverState(strategy="ewc", asked=0.0, default=100.0, cap=100_000.0, armed=True)
L2SP = LeverState(strategy="l2sp", asked=0.3, default=0.3, cap=300.0)
REPLAY = LeverState(strategy="replay", asked=0.0, default=0.1, cap=0.5, armed=True)
START = CheckpointFact(checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None)


def look(verdict=Verdict.REGRESS, *, step=30, upper=0.06, **rest) -> Look:
    reading = Reading(
        look=1,
        alpha=0.006,
        drop=upper - 0.01,
        stderr=0.004,
        lower=upper - 0.02,
        upper=upper,
        limit=0.03,
        p_regress=0.001,
        verdict=verdict,
        severe=rest.pop("severe", False),
    )
    values = {"branch": 0, "valid_loss": 1.0, "is_last": False, "checkpoints": (START,)}
    return Look(reading=reading, step=step, **values | rest)


def run(policy, levers, strengths, looks) -> list[Decision]:
    state, made = ControllerState(strengths=strengths), []
    for evidence in looks:
        made.append(decide(policy, levers, state, evidence))
        state = made[-1].state
    return made


@pytest.mark.parametrize("controller", ["deadband", "dual"])
def test_a_repair_activates_the_armed_strategy_that_comes_next(controller) -> None:
    looks = [look(step=30), look(step=60), look(step=90)]
    made = run(Policy(controller=controller), [ARMED], {"ewc": 0.0}, looks)
    assert [d.action for d in made] == [Action.REPAIR] + [Action.RAISE_STRENGTH] * 2
    assert [d.state.strengths["ewc"] for d in made] == [100.0, 200.0, 400.0]
    first = made[0]
    assert (first.lever, first.code, first.state.repaired) == ("ewc", "drop_confirmed", True)
    assert first.reason.endswith("Scaling the change back toward the base; ewc activated at 100.")
    assert first.state.cool_down == 1  # what was just activated is not lowered at once
    assert first.state.raises_in_a_row == 0  # both raises of the ladder are still to come


@pytest.mark.parametrize(
    ("levers", "strengths", "lever", "after"),
    [
        # a strength that can still be raised comes first, so nothing armed is next
        ([L2SP, REPLAY], {"l2sp": 0.3, "replay": 0.0}, None, {"l2sp": 0.3, "replay": 0.0}),
        # at its cap the next lever is taken, and that one is armed
        ([L2SP, REPLAY], {"l2sp": 300.0, "replay": 0.0}, "replay", {"l2sp": 300.0, "replay": 0.1}),
        # what is active already stays as it is
        ([ARMED], {"ewc": 100.0}, None, {"ewc": 100.0}),
        ([], {}, None, {}),
        # of two armed ones the first alone
        ([ARMED, REPLAY], {"ewc": 0.0, "replay": 0.0}, "ewc", {"ewc": 100.0, "replay": 0.0}),
    ],
)
def test_only_what_is_armed_and_next_is_activated(levers, strengths, lever, after) -> None:
    (made,) = run(Policy(), levers, strengths, [look()])
    assert (made.action, made.lever, made.state.strengths) == (Action.REPAIR, lever, after)
    assert ("activated" in made.reason) is (lever is not None)


def test_after_a_pass_a_second_repair_activates_nothing_more() -> None:
    passed = look(Verdict.PASS, step=60, upper=0.029)
    made = run(Policy(), [ARMED], {"ewc": 0.0}, [look(), passed, look(step=90)])
    assert [d.action for d in made] == [Action.REPAIR, Action.KEEP, Action.REPAIR]
    assert [d.state.strengths["ewc"] for d in made] == [100.0] * 3
    assert made[-1].lever is None


@pytest.mark.parametrize("rest", [{"repair_possible": False}, {"severe": True}, {"is_last": True}])
def test_without_a_repair_the_rung_that_is_taken_activates(rest) -> None:
    (made,) = run(Policy(), [ARMED], {"ewc": 0.0}, [look(**rest)])
    assert made.action is (Action.RAISE_STRENGTH if "repair_possible" in rest else Action.ROLL_BACK)
    assert (made.lever, made.state.strengths) == ("ewc", {"ewc": 100.0})


def test_a_repair_that_is_only_proposed_activates_nothing() -> None:
    policy, before, evidence = (
        Policy(dry_run=True),
        ControllerState(strengths={"ewc": 0.0}),
        look(),
    )
    proposed = decide(policy, [ARMED], before, evidence)
    assert (proposed.action, proposed.state.strengths) == (Action.REPAIR, {"ewc": 100.0})
    done = carried_out(policy, proposed, before, evidence)
    assert (done.action, done.state.strengths, done.state.repaired) == (
        Action.KEEP,
        {"ewc": 0.0},
        False,
    )
