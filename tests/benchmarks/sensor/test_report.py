"""Intervals, states of promises, and the command."""

import subprocess
import sys

import numpy as np
import pytest

from tests.benchmarks.sensor.report import Promise, Share, clopper_pearson, write_report
from tests.benchmarks.sensor.running import Missed, Outcome, Scenario, run
from tests.benchmarks.sensor.scenarios import MEAN, Size, everything


def test_intervals_are_clopper_and_pearsons() -> None:
    assert clopper_pearson(0, 10) == pytest.approx((0, 0.30850), abs=1e-5)
    assert clopper_pearson(5, 10) == pytest.approx((0.18709, 0.81291), abs=1e-5)
    assert clopper_pearson(10, 10) == pytest.approx((0.69150, 1), abs=1e-5)


@pytest.mark.parametrize(
    ("count", "bound", "is_most", "state"),
    [
        (0, 0.01, True, "shown"),
        (8, 0.01, True, "kept"),
        (12, 0.01, True, "broken"),
        (950, 0.9, False, "shown"),
        (905, 0.9, False, "kept"),
        (890, 0.9, False, "broken"),
    ],
)
def test_a_promise_is_shown_by_its_whole_interval(count, bound, is_most, state) -> None:
    assert Promise("", Share(count, 1000), bound, is_most).state == state


def test_late_damage_is_counted_from_where_it_begins() -> None:
    acted, onset = np.array([0, 2, 5, 9, 30]), np.array([3, 3, 5, 5, 5])
    outcome = Outcome(acted, onset, {}, {}, 0, 0)
    assert (outcome.acted_by(5), outcome.acted_before_damage()) == (2, 1)
    assert [outcome.seen_within(n) for n in (1, 5, 20, 26)] == [1, 2, 2, 3]


def test_a_sensor_that_calls_what_was_not_to_be_read_ends_the_run(monkeypatch) -> None:
    monkeypatch.setattr("tests.benchmarks.sensor.running.NEAR", -1.0)
    monkeypatch.setattr("tests.benchmarks.sensor.running.SPOT_CHECKS", 1.0)
    with pytest.raises(Missed, match="was not to be read"):
        run(Scenario("x", MEAN, 2000, 5, 3, drop=0.3, read_all_until=0))


def test_the_report_names_every_broken_promise() -> None:
    size = Size(2, looks=(2, 3), read_all_until=1)
    measured = []
    for scenario in everything(size):
        onset = np.ones(scenario.n_jobs, dtype=np.int64)
        acted = onset * (scenario.key == "a1")
        passed = dict.fromkeys(scenario.passes_at, scenario.n_jobs)
        measured.append((scenario, Outcome(acted, onset, passed, {"repair": 2}, 7, 1)))
    told = write_report(measured, size, "python -m x")
    assert "Broken: A/A, five accuracies, each with its own limit, 3 looks: 100.0%" in told
    assert "Broken: above, five accuracies, 2 looks: 0.0%" in told
    assert "Broken: A/A, five accuracies, 3 looks" not in told
    assert "Broken: pass" not in told
    assert told.count("\n## ") == 8


def test_the_command_explains_itself() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.sensor", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--quick" in shown.stdout
