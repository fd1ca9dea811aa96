"""The screen reads as the sensor does, and simulated answers flip as said."""

from dataclasses import replace

import numpy as np
import pytest

from app.domain.decisions import Verdict
from app.domain.sensing import read_sensor
from app.domain.statistics import alpha_spent
from tests.benchmarks.sensor.running import POLICY
from tests.benchmarks.sensor.scenarios import FLOOR, MEAN, SUITES
from tests.benchmarks.sensor.screen import smallest_p
from tests.benchmarks.sensor.simulation import Jobs, Suite, Truth, sensed


def truth(suite: Suite, n_jobs: int, drop: float, rise: float = 0.0) -> Truth:
    drops = (drop,) * len(suite.accuracies) + (0.0,) * suite.n_at_chance
    return Truth(np.tile(drops, (n_jobs, 1)), np.full((n_jobs, 1), rise))


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.name)
@pytest.mark.parametrize(("drop", "n"), [(0.0, 60), (0.03, 700), (0.07, 700)])
def test_the_screens_p_value_is_the_readings(suite, drop, n) -> None:
    jobs = Jobs(suite, n, 15, stickiness=0.5, seed=3)
    seen = set()
    for look in (1, 2, 300):
        looked = jobs.look(truth(suite, 15, drop, drop))
        screened = smallest_p(POLICY, suite, looked)
        for job in range(15):
            reading = read_sensor(POLICY, sensed(POLICY, suite, looked, job), look=look)
            tested = [b.p_regress for b in reading.benchmarks if b.p_regress is not None]
            tested += [] if reading.p_regress is None else [reading.p_regress]
            if not tested:
                assert screened[job] == 1.0
                continue
            if min(tested) < 0.3:
                assert screened[job] == pytest.approx(min(tested) * len(tested), rel=1e-6)
            else:
                assert screened[job] >= 0.3 * len(tested)
            is_called = bool(screened[job] <= alpha_spent(look))
            assert (reading.verdict is Verdict.REGRESS) == is_called
            seen.add(is_called)
    assert len(seen) == 2 or drop < 0.05


def test_a_benchmark_at_chance_is_at_floor_in_most_jobs() -> None:
    looked = Jobs(FLOOR, 400, 300, stickiness=0.0, seed=4).look(truth(FLOOR, 300, 0.0))
    floors = 0
    for job in range(300):
        last = read_sensor(POLICY, sensed(POLICY, FLOOR, looked, job), look=1).benchmarks[-1]
        floors += last.verdict is Verdict.AT_FLOOR
    assert 270 <= floors < 300  # 95 % +- 4 standard errors


def test_answers_flip_as_often_and_stay_as_long_as_said() -> None:
    suite = replace(MEAN, accuracies=(0.5,))
    jobs = Jobs(suite, 1000, 400, stickiness=0.8, seed=5)
    lost = np.stack([jobs.look(truth(suite, 400, 0.04)).lost_JB[:, 0] for _ in range(40)])
    assert lost.mean() == pytest.approx(1000 * (0.04 + 0.02), rel=0.02)
    pairs = np.corrcoef(lost[:-1].ravel(), lost[1:].ravel())[0, 1]
    assert pairs == pytest.approx(0.8, abs=0.04)


def test_damage_that_begins_late_is_there_at_once_and_goes_at_once() -> None:
    suite = replace(MEAN, accuracies=(0.5,))
    jobs = Jobs(suite, 1000, 400, stickiness=0.9, seed=6)
    falls = []
    for drop in (0.0, 0.0, 0.05, 0.05, 0.0):
        looked = jobs.look(truth(suite, 400, drop))
        falls.append((looked.lost_JB - looked.won_JB).mean() / 500)
    assert falls == pytest.approx([0.0, 0.0, 0.05, 0.05, 0.0], abs=0.004)  # 4 standard errors


def test_answers_of_other_jobs_are_drawn_anew_where_damage_begins_in_one() -> None:
    suite = replace(MEAN, accuracies=(0.5,))
    jobs = Jobs(suite, 1000, 2, stickiness=0.0, seed=8)
    lost = []
    for drop in (0.01, 0.02, 0.03, 0.04):
        looked = jobs.look(Truth(np.asarray([[0.0], [drop]]), np.zeros((2, 1))))
        lost.append(int(looked.lost_JB[0, 0]))
    assert len(set(lost)) > 1


def test_texts_rise_and_spread_as_said() -> None:
    suite = SUITES[2]
    looked = Jobs(suite, 100, 2000, stickiness=0.0, seed=7).look(truth(suite, 2000, 0.0, 0.05))
    assert looked.rise_JT.mean() == pytest.approx(0.05, abs=0.001)
    assert looked.rise_JT.std() == pytest.approx(0.01, rel=0.06)
    text = sensed(POLICY, suite, looked, 0)[-1]
    reading = read_sensor(POLICY, [text], look=1).benchmarks[0]
    assert reading.drop == pytest.approx(float(looked.rise_JT[0, 0]), abs=1e-9)
    spread = float(looked.spread_JT[0, 0])
    assert reading.stderr == pytest.approx(spread / 10, rel=1e-2)  # pseudo-documents
