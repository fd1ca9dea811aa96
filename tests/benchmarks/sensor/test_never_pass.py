"""Without numbers there is no pass: whatever is missing, broken, too old or at floor, in any company."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.benchmarks import Scorer
from app.domain.decisions import Verdict
from app.domain.monitors import is_too_old
from app.domain.sensing import SensedBenchmark, Summary, read_report, read_sensor
from app.domain.states import CheckpointStatus
from app.services.monitoring import checkpoint_status
from tests.benchmarks.sensor.running import HARMFUL, POLICY, answer

NOW = datetime(2030, 1, 1, tzinfo=UTC)
NOT_NUMBERS = st.sampled_from([float("nan"), float("inf"), float("-inf")])


def accuracy(n: int, right: int) -> SensedBenchmark:
    """An unchanged one, far above chance."""
    scores = np.zeros(n)
    scores[:right] = 1
    return SensedBenchmark(
        "b", "v", Scorer.MULTIPLE_CHOICE, 1.0, None, scores, scores.copy(), chance=0.25
    )


def text(n: int) -> SensedBenchmark:
    """An unchanged one."""
    tokens = np.full(n, 100.0)
    return SensedBenchmark(
        "t", "v", Scorer.NLL, 1.0, None, tokens * 3, tokens * 3, baseline_tokens=tokens
    )


sound = st.one_of(
    st.integers(500, 800).map(lambda n: accuracy(2000, 2 * n)),
    st.integers(200, 400).map(text),
)


@st.composite
def missing(draw: st.DrawFn) -> SensedBenchmark:
    """Nothing was sent, or not enough to say anything."""
    whole = draw(sound)
    bare = replace(whole, current=None)
    is_text = whole.scorer is Scorer.NLL
    found = [
        bare,
        replace(bare, summary=Summary(0.9, 0.001, draw(st.integers(0, 1)))),
        replace(whole, baseline=whole.baseline * np.nan),
        replace(
            whole,
            baseline=whole.baseline[:1],
            current=whole.baseline[:1],
            baseline_tokens=np.ones(1) if is_text else None,
        ),
    ]
    if is_text:
        found += [
            replace(whole, baseline_tokens=None),
            replace(whole, baseline_tokens=np.zeros(whole.baseline.size)),
            replace(bare, summary=Summary(3.0, None, 1000)),
        ]
    return draw(st.sampled_from(found))


@st.composite
def stale(draw: st.DrawFn) -> SensedBenchmark:
    """A result that is too old to count: what a monitor keeps of it is that nothing was sent."""
    hours = draw(st.floats(0.01, 1000))
    age = timedelta(hours=hours * draw(st.floats(1.01, 10)))
    whole = draw(sound)
    return replace(whole, current=None) if is_too_old(NOW - age, NOW, hours) else whole


@st.composite
def broken(draw: st.DrawFn) -> SensedBenchmark:
    """Some score is no number."""
    whole, bad = draw(sound), draw(NOT_NUMBERS)
    if draw(st.booleans()):
        return replace(whole, current=None, summary=Summary(bad, 0.01, 500))
    current = np.array(whole.current)
    current[draw(st.integers(0, current.size - 1))] = bad
    return replace(whole, current=current)


@st.composite
def at_floor(draw: st.DrawFn) -> SensedBenchmark:
    """The baseline guesses; what is scored now may be anything."""
    guessing = accuracy(2000, draw(st.integers(0, 500)))
    current = np.zeros(2000)
    current[: draw(st.integers(0, 2000))] = 1
    return replace(guessing, current=draw(st.sampled_from([current, None])))


def named(found: list[SensedBenchmark]) -> list[SensedBenchmark]:
    return [replace(b, name=f"{b.name}-{i}") for i, b in enumerate(found)]


def none_passes(found: list[SensedBenchmark], look: int) -> set[Verdict]:
    """The verdicts of the gate and the report, neither a pass, nor is the state kept as good or eased."""
    gate, report = read_sensor(POLICY, found, look=look), read_report(POLICY, found)
    assert Verdict.PASS not in {gate.verdict, report.verdict}
    assert checkpoint_status(gate, losses_finite=True) is not CheckpointStatus.GOOD
    is_harmful = answer(POLICY, gate) in HARMFUL
    assert is_harmful == (gate.verdict is Verdict.REGRESS)
    return {gate.verdict, report.verdict}


@given(st.lists(sound, min_size=1, max_size=4), st.lists(at_floor(), max_size=2))
@settings(max_examples=60, deadline=None)
def test_what_is_sound_passes_also_beside_what_is_at_floor(good, floors) -> None:
    reading = read_sensor(POLICY, named([*good, *floors]), look=3)
    assert reading.verdict is Verdict.PASS
    assert [b.verdict for b in reading.benchmarks[len(good) :]] == [Verdict.AT_FLOOR] * len(floors)


@given(
    st.lists(sound, max_size=3),
    st.lists(st.one_of(missing(), stale()), min_size=1, max_size=2),
    st.integers(1, 2000),
)
@settings(max_examples=120, deadline=None)
def test_what_is_missing_or_stale_never_passes(good, absent, look) -> None:
    found = named([*good, *absent])
    verdicts = none_passes(found, look)
    assert verdicts == {Verdict.INCONCLUSIVE if good else Verdict.NO_DATA}
    for reading in read_sensor(POLICY, found, look=look).benchmarks[len(good) :]:
        assert reading.verdict is Verdict.NO_DATA


@given(
    st.lists(st.one_of(sound, at_floor(), missing()), max_size=3), broken(), st.integers(1, 2000)
)
@settings(max_examples=120, deadline=None)
def test_what_is_not_a_number_is_a_regression(others, bad, look) -> None:
    found = named([*others, bad])
    assert none_passes(found, look) == {Verdict.REGRESS}
    assert read_sensor(POLICY, found, look=look).not_finite


@given(st.lists(at_floor(), min_size=1, max_size=3), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_what_is_at_floor_says_nothing(floors, look) -> None:
    found = named(floors)
    assert none_passes(found, look) == {Verdict.AT_FLOOR}
    assert none_passes([], look) == {Verdict.NO_DATA}
