"""The domain shift: against closed forms, other libraries' numbers and what must leave it unchanged."""

import math

import numpy as np
import pytest
import torch

from tests.workers.training.runs import ListRows
from workers.evaluation.shift import (
    Kernels,
    States,
    base_bandwidth,
    content_probe,
    coral_distance,
    evenly,
    held_out_accuracy,
    linear_mmd,
    measure_shift,
    median_bandwidth,
    pooled_states,
    proxy_a_distance,
    reduction,
    shift_report,
    standardised,
)


def normal(rows, width, *, seed, mean=0.0):
    return np.random.default_rng(seed).normal(size=(rows, width)) + mean


def states(gap, *, rows=200, width=6, seed=0):
    """Two domains whose means differ by `gap` in every coordinate; the same rows for every gap."""
    left, right = (normal(rows, width, seed=seed + k) for k in (0, 1))
    return States(left + gap, right)


def test_mmd_of_two_gaussians_is_its_closed_form():
    rows, width, sigma_squared = 1500, 3, 2.0
    shift = np.full(width, 0.4)
    left = normal(rows, width, seed=0)
    right = normal(rows, width, seed=1) + shift
    factor = (sigma_squared / (sigma_squared + 2)) ** (width / 2)
    expected = 2 * factor * (1 - math.exp(-(shift @ shift) / (2 * (sigma_squared + 2))))
    found = Kernels.of(left, right, sigma_squared).mmd()
    assert expected == pytest.approx(0.0412, abs=1e-4)
    assert found == pytest.approx(expected, abs=0.006)


def test_mmd_by_its_definition_and_of_a_set_with_itself():
    left, right = normal(12, 2, seed=0), normal(9, 2, seed=1, mean=0.5)

    def kernel(x, y):
        return math.exp(-((x - y) @ (x - y)) / (2 * 1.3))

    own = [kernel(x, y) for i, x in enumerate(left) for j, y in enumerate(left) if i != j]
    other = [kernel(x, y) for i, x in enumerate(right) for j, y in enumerate(right) if i != j]
    cross = [kernel(x, y) for x in left for y in right]
    expected = np.mean(own) + np.mean(other) - 2 * np.mean(cross)
    assert Kernels.of(left, right, 1.3).mmd() == pytest.approx(expected, rel=1e-10)
    assert abs(Kernels.of(left, left, 1.3).mmd(is_biased=True)) < 1e-15


def test_a_resample_that_takes_each_row_once_is_the_estimate_and_copies_are_no_likeness():
    left, right = normal(30, 2, seed=0), normal(20, 2, seed=1, mean=1.0)
    kernels = Kernels.of(left, right, 1.0)
    counts = np.zeros((30, 1))
    counts[:10] = 3.0  # thrice each of the first ten
    thrice = float(kernels.weighted(counts, np.ones((20, 1)))[0])
    once = Kernels.of(left[:10], right, 1.0).mmd()
    assert thrice == pytest.approx(once, rel=1e-10)


def test_the_linear_kernel_is_the_distance_of_the_means():
    left, right = normal(40, 3, seed=0), normal(50, 3, seed=1, mean=2.0)
    biased = (left @ left.T).mean() + (right @ right.T).mean() - 2 * (left @ right.T).mean()
    assert linear_mmd(left, right) == pytest.approx(biased, rel=1e-10)


def test_coral_sees_a_shifted_mean_and_a_wider_spread():
    left = normal(300, 4, seed=0)
    assert coral_distance(left, left) == 0
    assert coral_distance(left, left + 2) == pytest.approx(4.0, rel=1e-9)
    wider = np.sqrt(3) * left
    expected = (2 * np.cov(left.T)) ** 2
    mean = ((np.sqrt(3) - 1) * left.mean(0)) ** 2
    assert coral_distance(left, wider) == pytest.approx(expected.sum() / 64 + mean.sum() / 4)


def test_the_bandwidth_is_the_median_of_squared_distances():
    points = np.asarray([[0.0], [1.0], [3.0]])
    assert median_bandwidth(points) == 4.0  # of 1, 4 and 9


def test_the_a_distance_is_near_0_for_one_law_and_2_for_two():
    same = proxy_a_distance(normal(400, 5, seed=0), normal(400, 5, seed=1))
    apart = proxy_a_distance(normal(400, 5, seed=0), normal(300, 5, seed=1, mean=6.0))
    assert same < 0.25
    assert apart == pytest.approx(2.0, abs=0.02)


def test_the_logistic_regression_comes_near_the_best_possible_accuracy():
    left, right = normal(3000, 2, seed=0), normal(3000, 2, seed=1, mean=1.0)
    best = 0.5 * (1 + math.erf(math.sqrt(2) / 2 / math.sqrt(2)))  # Bayes: distance sqrt(2)
    labels = np.repeat([False, True], 3000)
    assert held_out_accuracy(np.concatenate([left, right]), labels) == pytest.approx(best, abs=0.02)


def test_scaling_and_moving_all_features_leaves_the_shift_as_it_was():
    base, tuned = states(1.0), states(0.3)
    scale = np.geomspace(0.01, 1000, 6)

    def moved(one):
        return States(one.domain_XD * scale + 5, one.general_YD * scale + 5)

    plain = measure_shift(tuned, base, base_bandwidth(base))
    other = measure_shift(moved(tuned), moved(base), base_bandwidth(moved(base)))
    assert other == pytest.approx(plain, rel=1e-9)
    assert reduction(moved(base), moved(tuned))["reduction"] == pytest.approx(
        reduction(base, tuned)["reduction"], rel=1e-9
    )


def test_shrinking_the_tuned_states_alone_is_seen_on_their_own_scale():
    base = states(1.0)
    shrunk = States(base.domain_XD * 0.1, base.general_YD * 0.1)
    found = reduction(base, shrunk)
    assert found["reduction"] > 0.9
    assert abs(found["reduction_own_scale"]) < 1e-9


def test_a_halved_gap_is_a_reduction_with_its_interval_and_none_is_none():
    base = states(1.0)
    found = reduction(base, states(0.4))
    low, high = found["reduction_interval"]
    assert 0.4 < low < found["reduction"] < high < 1
    unchanged = reduction(base, base)
    assert unchanged["reduction"] == 0
    assert unchanged["reduction_interval"] == [0, 0]
    nothing = reduction(states(0.0, seed=8), states(0.0, seed=7))
    assert nothing["reduction"] is None
    assert nothing["base_p_value"] > 0.05


def test_the_permutation_test_finds_nothing_as_often_as_it_says():
    p_values = []
    for seed in range(100, 160):
        same = states(0.0, rows=60, seed=1000 * seed)
        kernels = Kernels.of(*standardised(same, same), base_bandwidth(same))
        p_values.append(kernels.p_value(np.random.default_rng(seed)))
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.12)
    assert np.mean(np.asarray(p_values) <= 0.05) < 0.15


def test_the_interval_covers_the_reduction_of_the_laws():
    """Over seeds, against the reduction of a large sample."""
    gaps = (0.8, 0.5)
    truth = reduction(states(gaps[0], rows=2000, seed=900), states(gaps[1], rows=2000, seed=900))
    covered = 0
    for seed in range(20):
        options = {"rows": 150, "seed": 2 * seed}
        low, high = reduction(states(gaps[0], **options), states(gaps[1], **options))[
            "reduction_interval"
        ]
        covered += low <= truth["reduction"] <= high
    assert covered >= 17


IDS = [np.asarray([1, 2, 3 + k % 2], np.int32) for k in range(200)]


def report(base, tuned, *, losses=(2.0, 1.0), content=True):
    """Domain rows whose token 3 or 4 shows in the first coordinate, unless the tuned states have lost it."""
    mark = np.where(np.arange(200) % 2, 3.0, -3.0)
    with_content = []
    for one, keeps in ((base, True), (tuned, content)):
        domain = one.domain_XD.copy()
        domain[:, 0] += mark if keeps else 0.0
        with_content.append(States(domain, one.general_YD))
    return shift_report(*with_content, domain_ids=IDS, base_loss=losses[0], tuned_loss=losses[1])


def test_a_reduction_is_claimed_only_with_loss_and_content_kept():
    base, tuned = states(1.5), states(0.2)
    good = report(base, tuned)
    assert good["claims_40_percent"]
    assert good["reduction_interval"][0] > 0.4
    assert good["before"]["mmd"] > good["after"]["mmd"]
    worse = report(base, tuned, losses=(2.0, 2.03))
    assert worse["guards"]["domain_loss_kept"] is False
    assert not worse["claims_40_percent"]
    collapsed = report(base, tuned, content=False)
    assert collapsed["guards"]["content_kept"] is False
    assert not collapsed["claims_40_percent"]
    unknown = report(base, tuned, losses=(None, None))
    assert unknown["guards"]["domain_loss_kept"] is None
    assert not unknown["claims_40_percent"]
    assert not report(base, base)["claims_40_percent"]


def test_the_content_probe_reads_what_is_there_and_needs_something_to_read():
    mark = np.where(np.arange(200) % 2, 1.0, -1.0)[:, None]
    assert content_probe(mark + 0.1 * normal(200, 3, seed=0), IDS) == pytest.approx(1.0, abs=0.01)
    assert content_probe(normal(200, 3, seed=0), IDS) == pytest.approx(0.5, abs=0.1)
    assert content_probe(normal(200, 3, seed=0), [IDS[0]] * 200) is None


def test_too_few_rows_or_states_that_are_no_numbers_are_said():
    few = States(normal(5, 3, seed=0), normal(50, 3, seed=1))
    found = shift_report(few, few, domain_ids=IDS[:5], base_loss=1.0, tuned_loss=1.0)
    assert found["measured"] is False
    assert "fewer than" in found["reason"]
    broken = states(0.5)
    broken.domain_XD[0, 0] = np.nan
    found = shift_report(states(0.5), broken, domain_ids=IDS, base_loss=1.0, tuned_loss=1.0)
    assert "not finite" in found["reason"]


def test_states_are_pooled_over_the_tokens_that_are_fed_in_batches_of_any_size():
    store = ListRows(30, seed=3)

    def read(ids_BT):
        return torch.stack([ids_BT.double(), ids_BT.double() ** 2], -1)

    rows = [4, 0, 17, 9]
    for budget in (1, 90, 10_000):
        found = pooled_states(read, store, rows, token_budget=budget)
        for place, row in enumerate(rows):
            ids = store.row(row)[0][:-1].astype(float)
            assert found[place] == pytest.approx([ids.mean(), (ids**2).mean()])


def test_rows_are_taken_evenly():
    assert evenly(5) == [0, 1, 2, 3, 4]
    chosen = evenly(10_000)
    assert len(chosen) == 2000
    assert chosen[0] == 0
    assert chosen[-1] == 9999
