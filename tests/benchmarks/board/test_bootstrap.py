"""The two-level bootstrap against closed forms, and against resampling written out."""

import numpy as np
import pytest

from tests.benchmarks.board.bootstrap import Estimate, TwoLevelBootstrap, interval


def test_the_spread_is_that_of_seeds_and_items():
    """Var = (seed variance + item variance / n) / S for independent items, up to the 1 - 1/S of resampling."""
    generator = np.random.default_rng(0)
    num_seeds, num_items = 40, 200
    chances = np.clip(generator.normal(0.6, 0.1, num_seeds), 0.05, 0.95)
    values = generator.random((num_seeds, num_items, 1)) < chances[:, None, None]
    boot = TwoLevelBootstrap(num_seeds, {"x": num_items}, num_draws=4000)
    draws = boot.means("x", values.astype(np.float32))[:, 0]
    means = values.mean(1)[:, 0]
    within = (means * (1 - means)).mean() / num_items
    expected = np.sqrt((means.var() + within) / num_seeds)
    assert draws.std() == pytest.approx(expected, rel=0.05)
    assert draws.mean() == pytest.approx(values.mean(), abs=3 * expected / np.sqrt(4000))


def test_one_seed_leaves_the_spread_of_items():
    values = np.zeros((1, 100, 1), np.float32)
    values[:, :30] = 1.0
    draws = TwoLevelBootstrap(1, {"x": 100}, num_draws=4000).means("x", values)[:, 0]
    assert draws.std() == pytest.approx(np.sqrt(0.3 * 0.7 / 100), rel=0.05)


def test_columns_are_drawn_together():
    generator = np.random.default_rng(1)
    first = (generator.random((3, 50)) < 0.5).astype(np.float32)
    both = np.stack([first, 1 - first], 2)
    draws = TwoLevelBootstrap(3, {"x": 50}).means("x", both)
    np.testing.assert_allclose(draws.sum(1), 1.0, atol=1e-6)


def test_draws_are_the_same_whoever_asks():
    values = (np.random.default_rng(2).random((3, 40, 2)) < 0.5).astype(np.float32)
    first, second = (TwoLevelBootstrap(3, {"a": 40, "b": 10}).means("a", values) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_an_interval_holds_the_middle_of_its_draws():
    found = interval(0.5, np.arange(1001) / 1000)
    assert (found.low, found.high) == pytest.approx((0.025, 0.975))
    assert found.shown() == "50.0 [2.5, 97.5]"


def test_a_zero_has_no_sign():
    assert Estimate(-1e-9, -0.0, 1e-9).shown() == "0.0 [0.0, 0.0]"
