"""What came back of a drop, with its interval, and how the diagnosis orders the ladder."""

import numpy as np
import pytest

from app.domain.benchmarks import Scorer
from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Damage,
    Diagnosis,
    LeverState,
    Look,
)
from app.domain.diagnosis import (
    Lost,
    conclude,
    describe_diagnosis,
    find_lost,
    kind_of,
    measure_recovery,
    with_scores,
)
from app.domain.policy import Ladder, Policy
from app.domain.sensing import SensedBenchmark, read_sensor

N = 400
EWC = LeverState(strategy="ewc", asked=1.0, default=100.0, cap=1000.0)
START = CheckpointFact(checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None)
PROBE = Diagnosis(steps=8, rows=128, rate=1.0, held_before=2.0, held_after=1.5)


def accuracy(name="choice", *, lost=100, weight=1.0, max_drop=None) -> SensedBenchmark:
    """All of N items right before, all but the first `lost` right now."""
    current = np.ones(N, np.float32)
    current[:lost] = 0.0
    return SensedBenchmark(
        name, "v", Scorer.MULTIPLE_CHOICE, weight, max_drop, np.ones(N, np.float32), current
    )


def nll(name="text", *, rise=0.2) -> SensedBenchmark:
    tokens = np.full(N, 10.0, np.float32)
    baseline = tokens * 2.0
    return SensedBenchmark(
        name, "v", Scorer.NLL, 1.0, None, baseline, baseline + tokens * rise, baseline_tokens=tokens
    )


def lost_in(policy, *sensed) -> tuple[Lost, ...]:
    return find_lost(policy, read_sensor(policy, sensed, look=1), sensed)


def brought_back(part, count) -> Lost:
    after = part.before.copy()
    after[:count] = part.baseline[:count]
    return with_scores(part, after)


@pytest.mark.parametrize("count", [0, 50, 100])
def test_the_share_is_what_came_back_of_the_drop(count) -> None:
    (part,) = lost_in(Policy(), accuracy())
    found = measure_recovery([brought_back(part, count)])
    assert found is not None
    assert found.drop == pytest.approx(0.25 / 0.03)
    assert found.estimate.drop == pytest.approx(count / 100)
    assert found.n_items == N
    assert 0 < found.estimate.stderr < 0.1


def test_a_rise_in_nats_comes_back_as_well_and_several_drops_are_weighed_by_their_limits() -> None:
    policy = Policy()
    choice, text = lost_in(policy, accuracy(), nll())
    assert (choice.name, text.name) == ("choice", "text")
    assert text.tokens is not None
    alone = measure_recovery([with_scores(text, text.before - 0.05 * text.tokens)])
    assert alone is not None
    assert alone.drop == pytest.approx(0.2 / 0.05, rel=1e-5)
    assert alone.estimate.drop == pytest.approx(0.25, rel=1e-4)
    both = measure_recovery(
        [brought_back(choice, 100), with_scores(text, text.before - 0.05 * text.tokens)]
    )
    assert both is not None
    assert both.estimate.drop == pytest.approx((0.25 / 0.03 + 1.0) / (0.25 / 0.03 + 4.0), rel=1e-4)


def test_a_drop_lies_in_the_mean_or_in_what_broke_a_limit_of_its_own() -> None:
    assert [
        p.name for p in lost_in(Policy(), accuracy("a"), accuracy("b", lost=0), nll(rise=0))
    ] == [
        "a",
        "b",
    ]
    assert [p.name for p in lost_in(Policy(), accuracy("a", lost=0), nll())] == ["text"]
    own = lost_in(
        Policy(max_drop=0.5), accuracy("a", lost=100, max_drop=0.05), accuracy("b", lost=0)
    )
    assert [p.name for p in own] == ["a"]


def test_the_interval_covers_the_true_share() -> None:
    generator = np.random.default_rng(3)
    baseline = np.ones(200, np.float32)
    covered, lower_misses = 0, 0
    for _ in range(600):
        before = (generator.random(200) > 0.4).astype(np.float32)
        came_back = generator.random(200) < 0.6
        after = np.where(before == 1, generator.random(200) > 0.05, came_back).astype(np.float32)
        found = measure_recovery([Lost("a", 1.0, baseline, before, after)])
        assert found is not None
        diagnosis = conclude(found, PROBE)
        assert diagnosis.lower is not None
        assert diagnosis.upper is not None
        true = (0.4 * 0.6 - 0.6 * 0.05) / 0.4
        covered += diagnosis.lower <= true <= diagnosis.upper
        lower_misses += true < diagnosis.lower
    assert covered / 600 >= 0.87
    assert lower_misses / 600 <= 0.08


def test_items_without_a_drop_or_too_few_of_them_say_nothing() -> None:
    same = np.ones(50, np.float32)
    assert measure_recovery([Lost("a", 1.0, same, same, same)]) is None
    few = np.ones(9, np.float32)
    assert measure_recovery([Lost("a", 1.0, few, 0 * few, few)]) is None
    found = conclude(None, PROBE, ["a"])
    assert kind_of(found) is Damage.UNCLEAR
    assert describe_diagnosis(found) == "Diagnosis: unclear, the items scored again show no drop."


def make_diagnosis(share, half_width=0.1, **rest) -> Diagnosis:
    numbers = {
        "n_items": 400,
        "drop": 5.0,
        "share": share,
        "lower": share - half_width,
        "upper": share + half_width,
    }
    return PROBE.model_copy(update={**numbers, **rest})


@pytest.mark.parametrize(
    ("diagnosis", "kind"),
    [
        (None, Damage.UNCLEAR),
        (Diagnosis(reason="the job has no general data to replay"), Damage.UNCLEAR),
        (make_diagnosis(0.9), Damage.FORMAT),
        (make_diagnosis(0.6), Damage.FORMAT),
        (make_diagnosis(0.55), Damage.UNCLEAR),
        (make_diagnosis(0.45), Damage.UNCLEAR),
        (make_diagnosis(0.35), Damage.KNOWLEDGE),
        (make_diagnosis(-1.0), Damage.KNOWLEDGE),
        (make_diagnosis(0.9, held_after=2.2), Damage.UNCLEAR),  # the steps did harm
        (make_diagnosis(0.0, held_after=2.2), Damage.UNCLEAR),
    ],
)
def test_the_whole_interval_must_lie_on_one_side_of_half_the_drop(diagnosis, kind) -> None:
    assert kind_of(diagnosis) is kind


def climb(diagnosis, *, policy=None, **state):
    reading = read_sensor(Policy(), [accuracy(lost=32)], look=1)
    assert reading.verdict == "regress"
    assert not reading.severe
    look = Look(
        branch=0,
        step=30,
        is_last=False,
        reading=reading,
        valid_loss=1.0,
        checkpoints=(START,),
        diagnosis=diagnosis,
    )
    before = ControllerState(**{"strengths": {"ewc": 1.0}, **state})
    return decide(policy or Policy(), [EWC], before, look)


KNOWLEDGE = make_diagnosis(0.0)


@pytest.mark.parametrize("diagnosis", [None, make_diagnosis(0.9), make_diagnosis(0.5)])
def test_format_and_what_is_unclear_begin_with_repair(diagnosis) -> None:
    decision = climb(diagnosis)
    assert decision.action is Action.REPAIR
    assert (diagnosis is None) == ("Diagnosis" not in decision.reason)


def test_lost_knowledge_begins_with_strength_and_says_why() -> None:
    decision = climb(KNOWLEDGE)
    assert (decision.action, decision.lever) == (Action.RAISE_STRENGTH, "ewc")
    assert decision.alternatives[0] == (
        "repair: put last, knowledge was lost: 0% of the drop came back by a few replay steps"
    )
    assert "Diagnosis: knowledge, 0% of the drop came back" in decision.reason
    assert "8 steps on 128 general rows, 400 other items, bounds -10% to 10%" in decision.reason
    assert decision.details["diagnosis"]["kind"] == "knowledge"
    assert decision.details["diagnosis"]["share"] == 0.0


def test_behind_raises_comes_the_rollback_and_repair_only_before_the_end() -> None:
    used_up = {"raises_in_a_row": 2}
    assert climb(KNOWLEDGE, **used_up).action is Action.ROLL_BACK
    last = climb(KNOWLEDGE, rollbacks=5, **used_up)
    assert last.action is Action.REPAIR
    assert climb(KNOWLEDGE, rollbacks=5, repaired=True, **used_up).action is Action.STOP
    off = Policy(ladder=Ladder(repair=False))
    assert climb(KNOWLEDGE, policy=off, rollbacks=5, **used_up).action is Action.STOP


def test_a_diagnosis_that_is_unclear_changes_nothing_but_the_words() -> None:
    plain, unclear = climb(None), climb(make_diagnosis(0.5))
    left, right = (d.model_dump(exclude={"reason", "details"}) for d in (plain, unclear))
    assert left == right
    assert unclear.reason.startswith(plain.reason)
