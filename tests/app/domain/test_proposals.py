"""What a dry run proposes and carries out, and what an external run can go back to."""

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
    StageFact,
    Verdict,
)
from app.domain.external import START, instructions, live_checkpoints
from app.domain.policy import Ladder, Policy
from app.domain.proposals import carried_out

LEVERS = (LeverState(strategy="ewc", asked=1.0, default=1.0, cap=1000.0),)
STATE = ControllerState(strengths={"ewc": 1.0})
POLICY = Policy(ladder=Ladder(repair=False))
DRY = POLICY.model_copy(update={"dry_run": True})


def look(verdict: Verdict, *, severe: bool = False, **rest) -> Look:
    reading = Reading(
        look=1,
        alpha=0.01,
        drop=0.1,
        stderr=0.01,
        lower=0.05,
        upper=0.15,
        limit=0.03,
        p_regress=0.001,
        verdict=verdict,
        severe=severe,
    )
    facts = (START, fact(0, 50))
    fields = {"branch": 0, "step": 100, "is_last": False, "checkpoints": facts}
    return Look(reading=reading, valid_loss=None, **fields | rest)


def fact(branch: int, step: int) -> CheckpointFact:
    return CheckpointFact(
        checkpoint_id=f"{branch}:{step}", branch=branch, step=step, status="good", valid_loss=None
    )


@pytest.mark.parametrize("severe", [False, True])
def test_a_dry_run_decides_the_same_and_carries_nothing_out(severe: bool) -> None:
    evidence = look(Verdict.REGRESS, severe=severe)
    real = decide(POLICY, LEVERS, STATE, evidence)
    proposed = decide(DRY, LEVERS, STATE, evidence)
    assert proposed == real.model_copy(update={"is_proposal": True})
    assert carried_out(real, STATE, evidence) == real
    done = carried_out(proposed, STATE, evidence)
    assert done.action is Action.KEEP
    assert done.state == STATE.model_copy(update={"evals": 1})
    assert instructions(STATE, done) == ()


def test_keeping_on_is_no_proposal() -> None:
    assert not decide(DRY, LEVERS, STATE, look(Verdict.INCONCLUSIVE)).is_proposal


def test_a_stage_begins_with_its_strengths_in_a_dry_run_too() -> None:
    stages = (
        StageFact(name="a", first_step=0, last_step=100, strengths={"ewc": 1.0}),
        StageFact(name="b", first_step=100, last_step=200, strengths={"ewc": 5.0}),
    )
    evidence = look(Verdict.REGRESS, stages=stages)
    proposed = decide(DRY, LEVERS, STATE, evidence)
    assert proposed.action is Action.ROLL_BACK
    done = carried_out(proposed, STATE, evidence)
    assert (done.action, done.state.strengths, done.state.branch) == (Action.KEEP, {"ewc": 5.0}, 0)


def rolled_back(step: int) -> Decision:
    return Decision(
        action=Action.ROLL_BACK, reason="r", code="c", state=STATE, details={"target_step": step}
    )


def test_each_rollback_leaves_behind_what_lay_after_it() -> None:
    assert live_checkpoints(None, []) == (START,)
    evidence = look(Verdict.PASS, checkpoints=(START, fact(0, 10), fact(0, 20), fact(0, 30)))
    keep = Decision(action=Action.KEEP, reason="r", code="c", state=STATE)
    assert live_checkpoints(evidence, [keep]) == evidence.checkpoints
    left = live_checkpoints(evidence, [keep, rolled_back(20)])
    assert left == (START, fact(0, 10), fact(0, 20))
    assert live_checkpoints(evidence, [keep, rolled_back(20), rolled_back(0)]) == (START,)
