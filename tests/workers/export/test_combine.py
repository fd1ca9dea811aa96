"""Merging on the change: exact sums, trimmed and elected means, random drops."""

import math

import pytest
import torch

from workers.export.combine import (
    Factors,
    Merged,
    cat,
    combine,
    dare,
    relative_error,
    ties,
    trim,
)


def make_factors(count=2, *, rank=3, inputs=7, outputs=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(rank, inputs, generator=rng),
            torch.randn(outputs, rank, generator=rng),
            scale=0.5 + k,
        )
        for k in range(count)
    ]


def weighted_sum(factors, weights):
    """Written out in float64, entry by entry of the definition."""
    total = torch.zeros(5, 7, dtype=torch.float64)
    for f, w in zip(factors, weights, strict=True):
        total += w * f.scale * (f.B_OR.double() @ f.A_RI.double())
    return total


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (1.0, -0.5)])
def test_cat_is_the_weighted_sum_of_the_changes_where_summing_factors_is_not(weights):
    factors = make_factors()
    merged = combine(factors, "cat", weights=weights)
    expected = weighted_sum(factors, weights)
    found = merged.factors.change().double()
    assert (found - expected).norm() / expected.norm() < 5e-7
    assert merged.factors.rank == 6
    assert merged.squared_error == 0
    assert merged.squared_norm == pytest.approx(float(expected.square().sum()), rel=1e-5)
    summed = sum(w * f.scale * f.B_OR for f, w in zip(factors, weights, strict=True)) @ sum(
        f.A_RI for f in factors
    )
    assert (summed.double() - expected).norm() / expected.norm() > 0.3  # the cross terms


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "dare"])
def test_a_merge_of_one_adapter_with_weight_one_reproduces_it(method):
    (one,) = make_factors(1)
    merged = combine(
        [one], method, weights=[1.0], density=1.0, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(merged.factors.change(), one.change(), rtol=1e-5, atol=1e-6)
    assert merged.factors.rank == one.rank
    assert relative_error([merged]) < 1e-6


def test_svd_is_the_nearest_change_of_its_rank():
    factors = make_factors(3)
    weights = (1.0, 0.5, -0.2)
    full = weighted_sum(factors, weights)
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    for rank in (1, 3, 4):
        merged = combine(factors, "svd", weights=weights, rank=rank)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        torch.testing.assert_close(merged.factors.change().double(), best, rtol=1e-5, atol=1e-5)
        lost = float((full - best).norm() / full.norm())
        assert relative_error([merged]) == pytest.approx(lost, abs=1e-6)
    assert combine(factors, "svd", weights=weights).factors.rank == 3
    exact = combine(factors, "svd", weights=weights, rank=9)
    torch.testing.assert_close(exact.factors.change().double(), full, rtol=1e-5, atol=1e-5)
    assert exact.factors.A_RI.shape == (9, 7)


def test_cat_with_a_lower_rank_is_cut_like_svd():
    factors = make_factors()
    left = combine(factors, "cat", weights=(1.0, 1.0), rank=2)
    right = combine(factors, "svd", weights=(1.0, 1.0), rank=2)
    torch.testing.assert_close(left.factors.change(), right.factors.change())


def test_ties_by_hand():
    first, second = torch.tensor([3.0, -1.0, 0.2]), torch.tensor([-2.0, -4.0, 0.5])
    equal = ties([first, second], (1.0, 1.0), density=2 / 3)
    assert equal.tolist() == [3.0, -2.5, 0.0]
    # elected after weighting, and averaged by weight: (0.9 * -1 + 0.1 * -4) / 1
    unequal = ties([first, second], (0.9, 0.1), density=2 / 3)
    torch.testing.assert_close(unequal, torch.tensor([3.0, -1.3, 0.0]))
    # 0.3 * 3 < 0.7 * 2: the other sign is elected
    other = ties([first, second], (0.3, 0.7), density=2 / 3)
    torch.testing.assert_close(other, torch.tensor([-2.0, -3.1, 0.0]))
    # a common factor of the weights is none of the mean's; a negative weight turns an adapter round
    torch.testing.assert_close(ties([first, second], (2.0, 2.0), density=2 / 3), equal)
    turned = ties([first, second], (1.0, -1.0), density=2 / 3)
    torch.testing.assert_close(turned, torch.tensor([2.5, 4.0, 0.0]))


def test_ties_against_a_loop_over_entries():
    rng = torch.Generator().manual_seed(3)
    changes = [torch.randn(4, 6, generator=rng) for _ in range(3)]
    weights = (0.5, 1.0, 0.8)
    found = ties(changes, weights, density=0.5)
    for i in range(4):
        for j in range(6):
            kept = []
            for change, w in zip(changes, weights, strict=True):
                larger = int((change.abs() > change[i, j].abs()).sum())
                kept.append(w * float(change[i, j]) if larger < 12 else 0.0)
            sign = math.copysign(1.0, sum(kept)) if sum(kept) else 0.0
            agree = [(k, w) for k, w in zip(kept, weights, strict=True) if k * sign > 0]
            mean = sum(k for k, _ in agree) / sum(w for _, w in agree) if agree else 0.0
            assert float(found[i, j]) == pytest.approx(mean, abs=1e-6)


def test_trimming_keeps_the_largest_entries_as_they_are():
    change = torch.tensor([[0.1, -3.0], [2.0, -0.5]])
    assert trim(change, 0.5).tolist() == [[0.0, -3.0], [2.0, 0.0]]
    assert trim(change, 0.01).tolist() == [[0.0, -3.0], [0.0, 0.0]]
    assert trim(change, 1.0) is change


def test_dare_keeps_everything_at_density_one():
    changes = [f.change() for f in make_factors()]
    rng = torch.Generator().manual_seed(0)
    found = dare(changes, (0.3, 0.7), density=1.0, generator=rng)
    assert torch.equal(found, 0.3 * changes[0] + 0.7 * changes[1])


def test_dare_has_the_sum_as_its_mean_over_seeds_and_repeats_itself():
    changes = [f.change() for f in make_factors()]
    expected = changes[0] + 0.5 * changes[1]
    draws = torch.stack(
        [
            dare(changes, (1.0, 0.5), density=0.4, generator=torch.Generator().manual_seed(k))
            for k in range(3000)
        ]
    )
    # an entry's variance is w^2 d^2 (1 - q) / q, so six standard errors of the mean are allowed
    variance = (changes[0].square() + 0.25 * changes[1].square()) * 0.6 / 0.4
    assert ((draws.mean(0) - expected).abs() <= 6 * (variance / 3000).sqrt()).all()
    share = float(
        (
            dare(
                [torch.ones(200, 200)],
                (1.0,),
                density=0.4,
                generator=torch.Generator().manual_seed(1),
            )
            == 2.5
        )
        .float()
        .mean()
    )
    assert share == pytest.approx(0.4, abs=0.015)
    again = dare(changes, (1.0, 0.5), density=0.4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again, draws[7])


def test_a_dense_merge_is_exact_at_full_rank_and_says_what_a_lower_one_loses():
    factors = make_factors()
    wanted = ties([f.change() for f in factors], (1.0, 1.0), density=0.5)
    whole = combine(factors, "ties", weights=(1.0, 1.0), rank=5)
    torch.testing.assert_close(whole.factors.change(), wanted, rtol=1e-5, atol=1e-6)
    assert relative_error([whole]) < 1e-6
    cut = combine(factors, "ties", weights=(1.0, 1.0), rank=2)
    lost = float((cut.factors.change() - wanted).norm() / wanted.norm())
    assert relative_error([cut]) == pytest.approx(lost, rel=1e-4)
    assert lost > 0.05


def test_the_error_of_several_layers_is_that_of_all_entries_together():
    nothing = make_factors(1)[0]
    parts = [Merged(nothing, 9.0, 1.0), Merged(nothing, 16.0, 3.0)]
    assert relative_error(parts) == pytest.approx(math.sqrt(4 / 25))
    assert relative_error([Merged(nothing, 0.0, 0.0)]) == 0


def test_what_makes_no_sense_is_refused():
    factors = make_factors()
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        combine(factors, "cat", weights=[1.0])
    with pytest.raises(ValueError, match="density"):
        combine(factors, "ties", weights=[1.0, 1.0], density=0.0)
    with pytest.raises(ValueError, match="needs a generator"):
        combine(factors, "dare", weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="0 adapters"):
        combine([], "cat", weights=[])


def test_cat_puts_factors_side_by_side():
    factors = make_factors()
    joined = cat(factors, (1.0, 2.0))
    assert torch.equal(joined.A_RI, torch.cat([f.A_RI for f in factors]))
    assert torch.equal(joined.B_OR[:, 3:], factors[1].B_OR * 3.0)
    assert joined.scale == 1
