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
from app.domain.policy import EarlyStopping, Ladder, Policy
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
    assert carried_out(POLICY, real, STATE, evidence) == real
    done = carried_out(DRY, proposed, STATE, evidence)
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
    done = carried_out(DRY, proposed, STATE, evidence)
    assert (done.action, done.state.strengths, done.state.branch) == (Action.KEEP, {"ewc": 5.0}, 0)


def watch(policy: Policy, points: list[tuple[Verdict, float]]) -> list[tuple[Decision, Decision]]:
    """Decisions of a run with these verdicts and validation losses, and what was carried out of each."""
    state, made = STATE, []
    for number, (verdict, loss) in enumerate(points, start=1):
        state = ControllerState.model_validate_json(state.model_dump_json())
        evidence = look(verdict, step=30 * number).model_copy(update={"valid_loss": loss})
        decision = decide(policy, LEVERS, state, evidence)
        done = carried_out(policy, decision, state, evidence)
        made.append((decision, done))
        state = done.state
    return made


PATIENT = EarlyStopping(patience=2)
LOSSES = [0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]


def test_a_dry_run_proposes_to_stop_once_and_trains_on() -> None:
    dry = DRY.model_copy(update={"early_stopping": PATIENT})
    made = watch(dry, [(Verdict.INCONCLUSIVE, loss) for loss in LOSSES])
    assert [d.action for d, _ in made] == [Action.KEEP] * 3 + [Action.STOP] + [Action.KEEP] * 3
    assert {done.action for _, done in made} == {Action.KEEP}
    (stop, done) = made[3]
    assert (stop.code, stop.is_proposal, done.code) == ("early_stopping", True, "proposed")
    assert "has not improved on 0.4 for 2 evaluations. A dry run: training goes on" in stop.reason
    assert "this is proposed once" in stop.reason
    assert not stop.state.stop_proposed
    assert [done.state.evals_without_improvement for _, done in made] == [0, 0, 1, 2, 3, 4, 5]
    real = watch(POLICY.model_copy(update={"early_stopping": PATIENT}), [(Verdict.PASS, 0.4)] * 4)
    assert [d.action for d, _ in real] == [Action.KEEP] * 2 + [Action.STOP] * 2
    assert "dry run" not in real[-1][0].reason


def test_after_the_metric_improved_again_it_may_be_proposed_anew() -> None:
    dry = DRY.model_copy(update={"early_stopping": PATIENT})
    losses = [0.5, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3]
    made = watch(dry, [(Verdict.INCONCLUSIVE, loss) for loss in losses])
    stops = [number for number, (d, _) in enumerate(made, start=1) if d.action is Action.STOP]
    assert stops == [3, 7]
    assert [done.state.stop_proposed for _, done in made] == [False] * 2 + [True] * 2 + [
        False,
        False,
        True,
        True,
    ]


def test_looks_on_which_something_was_only_proposed_count_for_patience() -> None:
    dry = DRY.model_copy(update={"early_stopping": PATIENT})
    regressed = [(Verdict.REGRESS, 0.4)] * 3
    made = watch(dry, [(Verdict.PASS, 0.4), *regressed, (Verdict.INCONCLUSIVE, 0.4)])
    assert [d.action for d, _ in made] == [
        Action.KEEP,
        *[Action.RAISE_STRENGTH] * 3,  # proposed each time: nothing was carried out
        Action.STOP,
    ]
    assert [done.state.evals_without_improvement for _, done in made] == [0, 1, 2, 3, 4]
    assert {done.state.strengths["ewc"] for _, done in made} == {1.0}
    better = watch(dry, [(Verdict.PASS, 0.4), (Verdict.REGRESS, 0.2), (Verdict.INCONCLUSIVE, 0.3)])
    assert better[-1][1].state.best_valid_loss == 0.2
    assert better[-1][1].state.evals_without_improvement == 1
    broken = look(Verdict.REGRESS, train_loss_finite=False).model_copy(update={"valid_loss": 0.1})
    done = carried_out(dry, decide(dry, LEVERS, STATE, broken), STATE, broken)
    assert (done.state.best_valid_loss, done.state.evals) == (None, 1)


def test_dual_smooths_over_looks_on_which_it_only_proposed() -> None:
    dual = DRY.model_copy(update={"controller": "dual"})
    ((proposed, done),) = watch(dual, [(Verdict.INCONCLUSIVE, 0.4)])
    assert (proposed.action, proposed.is_proposal) == (Action.RAISE_STRENGTH, True)
    assert done.state.excess_smoothed == proposed.state.excess_smoothed is not None
    assert (done.state.law_factor, done.state.strengths) == (1.0, {"ewc": 1.0})


def test_accepting_something_else_starts_patience_anew() -> None:
    state = STATE.model_copy(update={"stop_proposed": True, "evals_without_improvement": 4})
    raised = decide(POLICY, LEVERS, state, look(Verdict.REGRESS))
    assert raised.action is Action.RAISE_STRENGTH
    assert (raised.state.stop_proposed, raised.state.evals_without_improvement) == (False, 0)


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
