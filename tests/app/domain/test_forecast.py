"""What is foretold of a run's end, against runs that were recorded and runs that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.domain.forecast import Forecast, Scoring, Seen, count_evaluations

RECORDED = json.loads((Path(__file__).parent / "recorded_paces.json").read_text())


def replay(run: dict[str, Any]) -> list[tuple[float, float | None]]:
    """At every look of a recorded run: seconds that were left, and seconds that were foretold."""
    forecast = Forecast()
    told = []
    for moment, phase, step, steps, evaluations, (gate, report, point), validation in run["seen"]:
        forecast.see(Seen(moment, phase, step))
        forecast.validation_seconds = validation
        left = forecast.seconds_left(steps, evaluations, Scoring(gate, report, (point,) * 11))
        told.append((run["end"] - moment, left))
    return told


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_recorded_runs_end_about_when_it_was_foretold(name: str) -> None:
    """On a machine whose other work came and went: within a third at half time, never off by 0.3 of the run."""
    told = replay(RECORDED[name])
    whole = told[0][0]
    assert told[0][1] is None
    actual, left = min(told, key=lambda pair: abs(pair[0] - whole / 2))
    assert left == pytest.approx(actual, rel=0.35)
    for actual, left in told:
        if actual < 0.8 * whole:
            assert left is not None
            assert abs(left - actual) < 0.3 * whole


def test_an_even_run_is_foretold_to_the_second() -> None:
    """40 steps of a second, an evaluation of 5 s every 10, then a test of 8 s, 11 points and an artifact."""
    forecast, scoring = Forecast(), Scoring(gate=4.0, report=7.0, frontier=(2.0,) * 11)
    evaluation = 5.0  # 4 of scoring, 1 beside it
    end = 40 + 4 * evaluation + 7 + 11 * 2 + 2 * 1
    moment = 0.0
    forecast.see(Seen(moment, "training", 0))
    for step in range(1, 41):
        moment += 1.0
        forecast.see(Seen(moment, "training", step))
        left = forecast.seconds_left(40 - step, count_evaluations(step, 40, 10, ()), scoring)
        assert (left is None) == (step < 4)
        if step % 10:
            # Before the first evaluation only its scoring is known.
            known = end if step > 10 else end - 4 - 2
            assert left is None or left == pytest.approx(known - moment)
            continue
        for phase in ("evaluating", "diagnosis"):
            forecast.see(Seen(moment, phase, step))
            moment += evaluation / 2
        forecast.see(Seen(moment, "training", step))
    assert forecast.seconds_left(0, 0, scoring) == pytest.approx(end - moment)
    forecast.see(Seen(moment, "evaluating", 40))  # without a step since: the final test
    assert forecast.seconds_left(0, 0, scoring) == pytest.approx(end - moment)
    forecast.see(Seen(moment + 8, "frontier", 40))
    assert forecast.seconds_left(0, 0, scoring) == pytest.approx(23)
    forecast.see(Seen(moment + 10, "frontier", 40))
    assert forecast.seconds_left(0, 0, scoring) == pytest.approx(21)
    forecast.see(Seen(moment + 30, "exporting", 40))
    assert forecast.seconds_left(0, 0, scoring) == pytest.approx(1)


def test_an_early_end_is_the_finale_alone() -> None:
    forecast = Forecast()
    for step in range(6):
        forecast.see(Seen(float(step), "training", step))
    forecast.see(Seen(5.0, "evaluating", 5))
    forecast.see(Seen(7.0, "training", 5))
    assert forecast.seconds_left(100, 4, Scoring()) == pytest.approx(100 + 4 * 2 + 2 * 2)
    forecast.see(Seen(7.0, "evaluating", 5))
    assert forecast.seconds_left(100, 4, Scoring()) == pytest.approx(2 * 2)


def test_a_rollback_makes_the_run_longer_and_its_jump_is_no_step() -> None:
    forecast = Forecast()
    for step in range(11):
        forecast.see(Seen(float(step), "training", step))
    assert forecast.seconds_left(10, 0, Scoring()) == pytest.approx(10)
    forecast.see(Seen(10.0, "evaluating", 10))
    forecast.see(Seen(10.0, "training", 10))
    forecast.see(Seen(31.0, "training", 3))  # the checkpoint was loaded for 21 s
    forecast.see(Seen(32.0, "training", 4))
    assert forecast.seconds_left(16, 0, Scoring()) == pytest.approx(16)


def test_a_machine_that_slows_down_shows_within_fifty_steps() -> None:
    forecast, moment = Forecast(), 0.0
    for step in range(200):
        moment += 1.0 if step < 100 else 3.0
        forecast.see(Seen(moment, "training", step))
    assert forecast.seconds_left(100, 0, Scoring()) == pytest.approx(300)


@pytest.mark.parametrize(
    ("step", "interval", "others", "count"),
    [
        (0, 10, (), 3),
        (10, 10, (), 2),
        (11, 10, (25,), 3),
        (0, 7, (), 5),
        (30, 10, (), 0),
        (0, 0, (12,), 2),
    ],
)
def test_evaluations_are_counted_once(
    step: int, interval: int, others: tuple[int, ...], count: int
) -> None:
    assert count_evaluations(step, 30, interval, others) == count
