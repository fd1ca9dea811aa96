"""The ladder as a table, and what must hold whatever the evidence."""

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.configs.replay import ReplayConfig
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
from app.domain.levers import build_levers, check_lever, initial_state
from app.domain.policy import EarlyStopping, Ladder, Policy
from app.errors import BadRequest

if TYPE_CHECKING:
    from app.domain.strategies import StrategyConfig

EWC = LeverState(strategy="ewc", asked=1.0, default=100.0, cap=1000.0)
REPLAY = LeverState(strategy="replay", asked=0.1, default=0.1, cap=0.5)
ARMED = LeverState(strategy="ewc", asked=0.0, default=100.0, cap=100_000.0, armed=True)
NO_REPAIR = Policy(ladder=Ladder(repair=False))
START = CheckpointFact(checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None)


def make_reading(
    verdict=Verdict.PASS, drop=0.0, *, severe=False, look=1, not_finite=False, upper=None
):
    missing = verdict in {Verdict.NO_DATA, Verdict.AT_FLOOR} or not_finite
    return Reading(
        look=look,
        alpha=0.006,
        drop=None if missing else drop,
        stderr=None if missing else 0.004,
        lower=None if missing else drop - 0.01,
        upper=None if missing else drop + 0.01 if upper is None else upper,
        limit=0.03,
        p_regress=None if missing else 0.5,
        verdict=verdict,
        severe=severe,
        not_finite=not_finite,
    )


def make_look(
    reading=None, *, step=30, branch=0, is_last=False, valid_loss=1.0, checkpoints=(START,), **rest
):
    return Look(
        branch=branch,
        step=step,
        is_last=is_last,
        reading=make_reading() if reading is None else reading,
        valid_loss=valid_loss,
        checkpoints=checkpoints,
        **rest,
    )


def checkpoint(step, status, *, branch=0, valid_loss=1.0):
    return CheckpointFact(
        checkpoint_id=f"b{branch}s{step}",
        branch=branch,
        step=step,
        status=status,
        valid_loss=valid_loss,
    )


def make_state(**overrides):
    values = {"strengths": {"ewc": 1.0, "replay": 0.1}}
    return ControllerState(**{**values, **overrides})


def regress(drop=0.05, **rest):
    return make_reading(Verdict.REGRESS, drop, **rest)


@pytest.mark.parametrize(
    ("reading", "code"),
    [
        (make_reading(Verdict.PASS, 0.0, upper=0.025), "within_limit"),
        (make_reading(Verdict.INCONCLUSIVE, 0.03), "inconclusive"),  # noise at the threshold
        (
            make_reading(Verdict.INCONCLUSIVE, 0.2),
            "inconclusive",
        ),  # a missing benchmark forbids a pass
        (make_reading(Verdict.NO_DATA), "no_data"),
        (make_reading(Verdict.AT_FLOOR), "at_floor"),
    ],
)
def test_without_a_confirmed_regression_nothing_changes(reading, code) -> None:
    state = make_state(strengths={"ewc": 8.0, "replay": 0.1})
    decision = decide(Policy(), [EWC, REPLAY], state, make_look(reading))
    assert (decision.action, decision.code) == (Action.KEEP, code)
    assert decision.state.strengths == state.strengths
    assert decision.state.learning_rate_scale == 1.0


def test_repair_is_the_first_rung_and_is_tried_once() -> None:
    first = decide(Policy(), [EWC], make_state(), make_look(regress()))
    assert first.action is Action.REPAIR
    assert first.state.strengths == make_state().strengths
    second = decide(Policy(), [EWC], first.state, make_look(regress(), step=60))
    assert second.action is Action.RAISE_STRENGTH
    assert "repair: done since the last pass" in second.alternatives
    passed = decide(Policy(), [EWC], second.state, make_look(make_reading(upper=0.029), step=90))
    again = decide(Policy(), [EWC], passed.state, make_look(regress(), step=120))
    assert again.action is Action.REPAIR


@pytest.mark.parametrize("policy", [NO_REPAIR, Policy()])
def test_repair_off_or_impossible_goes_to_the_raise(policy) -> None:
    decision = decide(
        policy, [EWC], make_state(), make_look(regress(), repair_possible=policy is NO_REPAIR)
    )
    assert decision.action is Action.RAISE_STRENGTH
    assert decision.lever == "ewc"
    assert decision.state.strengths["ewc"] == 2.0
    assert decision.alternatives[0].startswith("repair: ")
    assert "5.00%" in decision.reason
    assert "limit 3.00%" in decision.reason
    assert "ewc strength 1 -> 2" in decision.reason


def run_regressions(policy, levers, state, drops, checkpoints=(START,)) -> list[Decision]:
    decisions = []
    for number, drop in enumerate(drops, start=1):
        decision = decide(
            policy,
            levers,
            state,
            make_look(regress(drop, look=number), step=30 * number, checkpoints=checkpoints),
        )
        decisions.append(decision)
        state = decision.state
    return decisions


def test_two_raises_that_shrink_the_drop_but_do_not_mend_it_end_in_a_rollback() -> None:
    decisions = run_regressions(NO_REPAIR, [EWC], make_state(), [0.05, 0.045, 0.04])
    assert [d.action for d in decisions] == [
        Action.RAISE_STRENGTH,
        Action.RAISE_STRENGTH,
        Action.ROLL_BACK,
    ]
    assert decisions[1].state.strengths["ewc"] == 4.0
    last = decisions[2]
    assert last.state.strengths["ewc"] == 16.0
    assert last.state.learning_rate_scale == 0.5
    assert last.target_checkpoint_id == "start"
    assert (last.state.branch, last.state.rollbacks, last.state.raises_in_a_row) == (1, 1, 0)


def test_a_second_raise_without_effect_halves_the_learning_rate_once() -> None:
    decisions = run_regressions(NO_REPAIR, [EWC], make_state(), [0.05, 0.045, 0.046, 0.045])
    assert [d.action for d in decisions[2:]] == [Action.LOWER_LEARNING_RATE, Action.ROLL_BACK]
    assert decisions[2].code == "raise_without_effect"
    assert decisions[2].state.learning_rate_scale == 0.5
    assert decisions[2].state.strengths["ewc"] == 4.0
    again = run_regressions(NO_REPAIR, [EWC], decisions[3].state, [0.05, 0.06, 0.07])
    assert [d.action for d in again] == [
        Action.RAISE_STRENGTH,
        Action.RAISE_STRENGTH,
        Action.ROLL_BACK,
    ]


def test_severe_drop_goes_straight_to_the_rollback() -> None:
    decision = decide(Policy(), [EWC], make_state(), make_look(regress(0.2, severe=True)))
    assert (decision.action, decision.code) == (Action.ROLL_BACK, "severe_drop")
    assert decision.state.strengths["ewc"] == 4.0


@pytest.mark.parametrize(
    "look",
    [
        make_look(make_reading(Verdict.REGRESS, severe=True, not_finite=True)),
        make_look(make_reading(), train_loss_finite=False),
        make_look(make_reading(Verdict.NO_DATA), train_loss_finite=False),
    ],
)
def test_values_that_are_not_finite_go_straight_to_the_rollback(look) -> None:
    decision = decide(Policy(), [EWC], make_state(), look)
    assert (decision.action, decision.code) == (Action.ROLL_BACK, "not_finite")


def test_the_last_evaluation_rolls_back_since_no_softer_rung_could_show() -> None:
    checkpoints = (START, checkpoint(60, "good"), checkpoint(90, "bad"))
    decision = decide(
        Policy(),
        [EWC],
        make_state(),
        make_look(regress(), step=90, is_last=True, checkpoints=checkpoints),
    )
    assert decision.action is Action.ROLL_BACK
    assert decision.target_checkpoint_id == "b0s60"


@pytest.mark.parametrize(
    ("checkpoints", "target"),
    [
        (
            (START, checkpoint(30, "good"), checkpoint(60, "unproven"), checkpoint(90, "unproven")),
            "b0s30",
        ),
        ((START, checkpoint(30, "unproven"), checkpoint(60, "unproven")), "b0s60"),
        ((START, checkpoint(30, "bad"), checkpoint(60, "bad")), "start"),
        ((checkpoint(30, "good"), START, checkpoint(60, "good", branch=1)), "b1s60"),
        ((START, checkpoint(120, "unproven")), "start"),  # the point itself is no target
    ],
)
def test_rollback_target_is_the_last_good_else_unproven_else_the_start(checkpoints, target) -> None:
    look = make_look(regress(0.2, severe=True), step=120, checkpoints=checkpoints)
    assert decide(Policy(), [EWC], make_state(), look).target_checkpoint_id == target


def test_without_a_target_the_controller_stops() -> None:
    look = make_look(regress(0.2, severe=True), checkpoints=(checkpoint(30, "bad"),))
    decision = decide(Policy(), [EWC], make_state(), look)
    assert (decision.action, decision.code) == (Action.STOP, "could_not_hold")
    assert decision.state.could_not_hold
    assert "no checkpoint to return to" in decision.reason


def test_after_five_rollbacks_it_could_not_hold() -> None:
    state, looks = make_state(), []
    for _ in range(6):
        decision = decide(
            Policy(), [EWC], state, make_look(regress(0.2, severe=True), branch=state.branch)
        )
        looks.append(decision)
        state = decision.state
    assert [d.action for d in looks] == [Action.ROLL_BACK] * 5 + [Action.STOP]
    assert looks[4].state.strengths["ewc"] == 1000.0  # 4^5 = 1024 is over the cap
    assert looks[4].state.branch == 5
    assert looks[5].code == "could_not_hold"
    assert looks[5].state.learning_rate_scale == 0.5**5


def test_demo_policy_walks_from_1_over_10_to_100() -> None:
    policy = Policy(
        ladder=Ladder(repair=False, rollback_strength_factor=10, rollback_learning_rate_factor=1)
    )
    one = decide(policy, [EWC], make_state(), make_look(regress(0.2, severe=True)))
    two = decide(policy, [EWC], one.state, make_look(regress(0.1, severe=True), branch=1))
    assert [d.state.strengths["ewc"] for d in (one, two)] == [10.0, 100.0]
    assert two.state.learning_rate_scale == 1.0


def test_a_raise_stops_at_the_cap_and_then_takes_the_next_lever() -> None:
    state = make_state(strengths={"ewc": 700.0, "replay": 0.1})
    first = decide(NO_REPAIR, [EWC, REPLAY], state, make_look(regress()))
    assert (first.lever, first.state.strengths["ewc"]) == ("ewc", 1000.0)
    assert "(its cap)" in first.reason
    second = decide(NO_REPAIR, [EWC, REPLAY], first.state, make_look(regress(0.06)))
    assert (second.lever, second.state.strengths["replay"]) == ("replay", 0.2)
    assert second.state.strengths["ewc"] == 1000.0


def test_the_rollback_also_takes_the_next_lever_at_the_cap() -> None:
    state = make_state(strengths={"ewc": 1000.0, "replay": 0.2})
    decision = decide(Policy(), [EWC, REPLAY], state, make_look(regress(0.2, severe=True)))
    assert decision.state.strengths == {"ewc": 1000.0, "replay": 0.5}


@pytest.mark.parametrize("levers", [[], [EWC]])
def test_without_a_lever_that_turns_the_raise_rung_is_the_learning_rate(levers) -> None:
    state = make_state(strengths={"ewc": 1000.0})
    decisions = run_regressions(NO_REPAIR, levers, state, [0.05, 0.05])
    assert [d.action for d in decisions] == [Action.LOWER_LEARNING_RATE] * 2
    assert decisions[0].code == "no_lever"
    assert decisions[1].state.learning_rate_scale == 0.25
    rolled = decide(NO_REPAIR, [], decisions[1].state, make_look(regress()))
    assert rolled.action is Action.ROLL_BACK
    assert rolled.state.learning_rate_scale == 0.125
    assert rolled.lever is None


def test_an_armed_lever_is_activated_in_place_of_a_raise_and_then_multiplied() -> None:
    state = make_state(strengths={"ewc": 0.0})
    decisions = run_regressions(NO_REPAIR, [ARMED], state, [0.05, 0.05])
    assert [d.state.strengths["ewc"] for d in decisions] == [100.0, 200.0]
    assert decisions[0].action is Action.RAISE_STRENGTH
    assert "activated at 100" in decisions[0].reason
    assert decisions[0].state.raises_in_a_row == 1


def test_an_armed_lever_is_activated_in_place_of_a_rollback_factor() -> None:
    state = make_state(strengths={"ewc": 0.0})
    first = decide(Policy(), [ARMED], state, make_look(regress(0.2, severe=True)))
    second = decide(Policy(), [ARMED], first.state, make_look(regress(0.2, severe=True)))
    assert [d.state.strengths["ewc"] for d in (first, second)] == [100.0, 400.0]
    assert first.state.learning_rate_scale == 0.5


def test_a_pass_with_room_lowers_a_raised_strength_never_below_what_was_asked() -> None:
    state = make_state(strengths={"ewc": 1.08, "replay": 0.1})
    decision = decide(Policy(), [EWC, REPLAY], state, make_look(make_reading(upper=0.019)))
    assert (decision.action, decision.lever) == (Action.LOWER_STRENGTH, "ewc")
    assert decision.state.strengths["ewc"] == 1.0
    assert decision.state.cool_down == 1


@pytest.mark.parametrize(
    ("reading", "changes"),
    [
        (make_reading(upper=0.0201), {}),  # over two thirds of the limit
        (make_reading(Verdict.INCONCLUSIVE, upper=0.019), {}),
        (make_reading(upper=0.019), {"strengths": {"ewc": 1.0, "replay": 0.1}}),  # as asked
        (make_reading(upper=0.019), {"cool_down": 1}),
    ],
)
def test_a_strength_is_not_lowered(reading, changes) -> None:
    state = make_state(**{"strengths": {"ewc": 8.0, "replay": 0.1}, **changes})
    decision = decide(Policy(), [EWC, REPLAY], state, make_look(reading))
    assert decision.action is Action.KEEP
    assert decision.state.cool_down == 0


def test_lowering_waits_one_evaluation_after_every_change() -> None:
    state = make_state(strengths={"ewc": 8.0, "replay": 0.1})
    actions = []
    for _ in range(4):
        decision = decide(Policy(), [EWC, REPLAY], state, make_look(make_reading(upper=0.0)))
        actions.append(decision.action)
        state = decision.state
    assert actions == [Action.LOWER_STRENGTH, Action.KEEP] * 2
    assert state.strengths["ewc"] == pytest.approx(8 * 0.9**2)


def run_losses(policy, losses, state=None) -> list[Decision]:
    decisions = []
    state = make_state() if state is None else state
    for loss in losses:
        decision = decide(
            policy, [EWC], state, make_look(make_reading(upper=0.025), valid_loss=loss)
        )
        decisions.append(decision)
        state = decision.state
    return decisions


def test_early_stopping_after_patience_evaluations_without_improvement() -> None:
    decisions = run_losses(Policy(), [1.0, 0.8, 0.9, 0.8, 0.81, 0.85, 0.9])
    assert [d.action for d in decisions[:-1]] == [Action.KEEP] * 6
    assert (decisions[-1].action, decisions[-1].code) == (Action.STOP, "early_stopping")
    assert not decisions[-1].state.could_not_hold
    assert "0.8 for 5 evaluations" in decisions[-1].reason


def test_early_stopping_can_be_off_and_is_reset_by_improvement_and_silence() -> None:
    losses = [1.0, 1.1, 1.1, 1.1, 1.1, 0.9, None, 1.0, 1.0, 1.0, 1.0]
    assert all(d.action is Action.KEEP for d in run_losses(Policy(), losses))
    off = Policy(early_stopping=EarlyStopping(enabled=False))
    assert all(d.action is Action.KEEP for d in run_losses(off, [1.0] * 20))


def test_early_stopping_min_delta_and_warmup() -> None:
    policy = Policy(early_stopping=EarlyStopping(patience=1, min_delta=0.1, warmup_evals=2))
    actions = [d.action for d in run_losses(policy, [1.0, 0.95, 0.89, 0.85])]
    assert actions == [Action.KEEP, Action.KEEP, Action.KEEP, Action.STOP]


def test_a_raise_resets_the_patience_and_a_regressed_loss_is_no_best() -> None:
    state = make_state(best_valid_loss=1.0, evals_without_improvement=4)
    decision = decide(NO_REPAIR, [EWC], state, make_look(regress(), valid_loss=0.2))
    assert decision.state.evals_without_improvement == 0
    assert decision.state.best_valid_loss == 1.0


def test_a_rollback_recomputes_the_best_over_what_stays_valid() -> None:
    checkpoints = (
        START,
        checkpoint(30, "unproven", valid_loss=0.7),
        checkpoint(60, "good", valid_loss=0.9),
        checkpoint(90, "unproven", valid_loss=0.5),  # superseded by this rollback
    )
    state = make_state(best_valid_loss=0.5, evals_without_improvement=3)
    look = make_look(regress(0.2, severe=True), step=120, checkpoints=checkpoints)
    decision = decide(Policy(), [EWC], state, look)
    assert decision.target_checkpoint_id == "b0s60"
    assert decision.state.best_valid_loss == 0.7
    assert decision.state.evals_without_improvement == 0


def test_levers_are_ordered_by_policy_then_rank() -> None:
    strategies: list[StrategyConfig] = [
        DistillationConfig(),
        ReplayConfig(strength=0.2),
        EwcConfig(armed=True),
        L2SpConfig(strength=0),
    ]
    levers = build_levers(strategies, Policy(), lora=False)
    assert [lever.strategy for lever in levers] == ["ewc", "replay", "distillation"]
    assert levers[0] == ARMED
    assert (levers[1].asked, levers[1].cap) == (0.2, 0.5)
    assert levers[2].cap == 1000.0
    chosen = build_levers(strategies, Policy(lever="replay"), lora=False)
    assert [lever.strategy for lever in chosen] == ["replay", "ewc", "distillation"]
    lora = build_levers([EwcConfig()], Policy(), lora=True)
    assert lora[0].asked == 0.1
    assert lora[0].cap == pytest.approx(100.0)
    assert build_levers([ReplayConfig(strength=0.8)], Policy(), lora=False)[0].cap == 0.8


def test_initial_state_holds_the_strengths_in_force() -> None:
    state = initial_state(
        [EwcConfig(armed=True), ReplayConfig(), L2SpConfig(strength=3)], lora=False
    )
    assert state.strengths == {"ewc": 0.0, "replay": 0.1, "l2sp": 3.0}


@pytest.mark.parametrize("strategies", [[], [L2SpConfig()], [EwcConfig(strength=0)]])
def test_a_lever_the_job_lacks_is_refused_by_name(strategies) -> None:
    with pytest.raises(BadRequest) as caught:
        check_lever(strategies, Policy(lever="ewc"))
    assert caught.value.param == "retention.policy.lever"


def test_a_lever_the_job_has_is_accepted() -> None:
    check_lever([EwcConfig(armed=True)], Policy(lever="ewc"))
    check_lever([], Policy())


numbers = st.floats(-0.5, 0.9, allow_nan=False)
states = st.builds(
    make_state,
    strengths=st.fixed_dictionaries({"ewc": st.floats(0.0, 1000.0), "replay": st.floats(0.1, 0.5)}),
    rollbacks=st.integers(0, 6),
    raises_in_a_row=st.integers(0, 3),
    repaired=st.booleans(),
    learning_rate_lowered=st.booleans(),
    learning_rate_scale=st.sampled_from([1.0, 0.5, 0.125]),
    excess_before_raise=st.none() | st.floats(0, 5),
    best_valid_loss=st.none() | st.floats(0.1, 3),
    evals_without_improvement=st.integers(0, 6),
    evals=st.integers(0, 50),
    cool_down=st.integers(0, 1),
)
checkpoint_lists = st.lists(
    st.builds(
        checkpoint,
        step=st.integers(1, 120),
        status=st.sampled_from(["good", "unproven", "bad"]),
        valid_loss=st.none() | st.floats(0.1, 3),
    ),
    max_size=5,
    unique_by=lambda c: c.step,
).map(lambda found: (START, *found))
looks = st.builds(
    make_look,
    st.builds(
        make_reading,
        st.sampled_from(list(Verdict)),
        numbers,
        severe=st.booleans(),
    ),
    step=st.integers(1, 120),
    is_last=st.booleans(),
    valid_loss=st.none() | st.floats(0.1, 3),
    repair_possible=st.booleans(),
    checkpoints=checkpoint_lists,
)
lever_lists = st.sampled_from([(), (EWC,), (REPLAY, EWC), (EWC, REPLAY), (ARMED, REPLAY)])
policies = st.sampled_from(
    [Policy(), NO_REPAIR, Policy(ladder=Ladder(max_raises=0, max_rollbacks=1))]
)


@given(policies, lever_lists, states, looks)
@settings(max_examples=400, deadline=None)
def test_harm_is_done_on_a_confirmed_regression_alone(policy, levers, state, look) -> None:
    decision = decide(policy, levers, state, look)
    if look.reading.verdict is Verdict.REGRESS:
        assert decision.action not in {Action.KEEP, Action.LOWER_STRENGTH}
        return
    assert decision.action in {Action.KEEP, Action.LOWER_STRENGTH, Action.STOP}
    assert decision.action is not Action.STOP or decision.code == "early_stopping"
    assert decision.action is not Action.LOWER_STRENGTH or look.reading.verdict is Verdict.PASS
    assert decision.state.learning_rate_scale == state.learning_rate_scale
    assert decision.state.rollbacks == state.rollbacks
    assert all(decision.state.strengths[k] <= v for k, v in state.strengths.items())


@given(policies, lever_lists, states, looks)
@settings(max_examples=400, deadline=None)
def test_what_is_decided_keeps_within_its_bounds_and_replays(policy, levers, state, look) -> None:
    decision = decide(policy, levers, state, look)
    replayed = decide(
        Policy.model_validate_json(policy.model_dump_json()),
        [LeverState.model_validate_json(lever.model_dump_json()) for lever in levers],
        ControllerState.model_validate_json(state.model_dump_json()),
        Look.model_validate_json(look.model_dump_json()),
    )
    assert replayed == decision
    for lever in levers:
        before, after = state.strengths[lever.strategy], decision.state.strengths[lever.strategy]
        assert math.isfinite(after)
        assert after <= max(lever.cap, before)
        assert after >= min(lever.asked, before)
    assert decision.state.rollbacks <= max(policy.ladder.max_rollbacks, state.rollbacks)
    changed = sum(decision.state.strengths[k] != v for k, v in state.strengths.items())
    assert changed <= 1
    if decision.action is Action.ROLL_BACK:
        target = next(
            c for c in look.checkpoints if c.checkpoint_id == decision.target_checkpoint_id
        )
        assert target.status != "bad"
        assert target.step != look.step
        assert decision.state.branch == look.branch + 1
