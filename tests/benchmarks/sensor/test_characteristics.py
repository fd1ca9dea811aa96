"""The promised characteristics hold, in a reduced version of SENSOR.md's run: fewer jobs, fewer looks."""

from dataclasses import replace

import pytest

from app.domain.power import FEWEST_ITEMS, power
from tests.benchmarks.sensor.running import POLICY, Scenario, run
from tests.benchmarks.sensor.scenarios import (
    ABOVE,
    MEAN,
    RISE_ABOVE,
    SUITES,
    TEXT,
    items,
    recommend,
)

WATCHED = pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.name)


@WATCHED
def test_undamaged_jobs_pass_and_are_not_acted_on(suite) -> None:
    found = run(Scenario("a", suite, items(suite), 300, 50, passes_at=(1,), seed=11))
    assert found.acted_by(50) <= 3
    assert found.passed[1] >= 0.8 * 300


@pytest.mark.parametrize("discordance", [0.02, 0.3])
def test_undamaged_jobs_are_not_acted_on_with_few_items_either(discordance) -> None:
    suite = replace(MEAN, discordance=discordance)
    found = run(Scenario("few", suite, FEWEST_ITEMS, 300, 50, stickiness=0.5, seed=12))
    assert found.acted_by(50) <= 3


@WATCHED
def test_a_drop_at_the_limit_is_rarely_acted_on(suite) -> None:
    drop, rise = POLICY.max_drop, POLICY.max_nll_increase
    found = run(Scenario("b", suite, items(suite), 400, 60, drop=drop, rise=rise, seed=13))
    assert found.acted_by(60) <= 0.05 * 400
    assert sum(found.actions.values()) == found.acted_by(60)


@WATCHED
def test_two_points_above_the_limit_are_called_with_the_declared_items(suite) -> None:
    scenario = Scenario("c", suite, items(suite), 400, 20, drop=ABOVE, stickiness=1.0, seed=14)
    assert run(scenario).acted_by(20) >= 0.9 * 400


def test_a_text_that_rises_two_hundredths_above_its_limit_is_called() -> None:
    look = recommend(TEXT).look
    needed = power(POLICY, TEXT.planned(POLICY), look=look).benchmarks["text-0"]
    assert needed.items_for_regress_90 is not None
    n = needed.items_for_regress_90
    found = run(Scenario("text", TEXT, n, 400, 20, rise=RISE_ABOVE, stickiness=0.9, seed=15))
    assert found.acted_by(20) >= 0.9 * 400


def test_damage_that_begins_at_any_of_ten_looks_is_called_when_it_begins() -> None:
    n = items(MEAN)
    scenario = Scenario(
        "late", MEAN, n, 300, 10, drop=ABOVE, stickiness=0.9, is_late=True, after=5, seed=16
    )
    found = run(scenario)
    assert found.acted_before_damage() <= 3
    assert found.seen_within(1) >= 0.9 * 300
    assert len(set(found.onset_J.tolist())) == 10


@WATCHED
def test_the_item_counts_that_power_names_do_what_it_says(suite) -> None:
    mean = power(POLICY, suite.planned(POLICY)).mean
    assert mean is not None
    assert mean.items_for_pass_80 is not None
    assert mean.items_for_regress_90 is not None
    n_jobs = 300
    passing = run(
        Scenario("pass", suite, mean.items_for_pass_80, n_jobs, 1, passes_at=(1,), seed=17)
    )
    assert passing.passed[1] / n_jobs == pytest.approx(0.8, abs=0.08)  # 3.5 standard errors
    called = run(Scenario("call", suite, mean.items_for_regress_90, n_jobs, 1, drop=ABOVE, seed=18))
    assert called.acted_by(1) / n_jobs == pytest.approx(0.9, abs=0.06)  # 3.5 standard errors
