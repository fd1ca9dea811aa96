"""Figures of made-up trials whose answers are known."""

import numpy as np
import pytest

from tests.benchmarks.board.bootstrap import TwoLevelBootstrap
from tests.benchmarks.board.figures import (
    Reference,
    backward_transfer,
    final,
    item_sizes,
    learning,
    lost,
    measure,
)
from tests.benchmarks.board.packing import pack_bits, unpack_bits

CARD = np.array([[[0.7, 0.0, 0.0], [0.7, 0.8, 0.0], [0.6, 0.75, 0.85]]])


def bits(share, size=100):
    values = np.zeros(size, bool)
    values[: round(share * size)] = True
    return pack_bits(values)


def trial(unseen, domains, *, seconds=1.0, memory=100):
    """A trial with these shares right: of unseen skills after each domain, and of the domains."""
    points = [
        {
            "unseen_em": bits(share),
            "unseen_mc": bits(share),
            "seen_em": bits(share),
            "seen_mc": bits(share),
            "domains": [bits(d) for d in own],
        }
        for share, own in zip(unseen, domains, strict=True)
    ]
    return {"points": points, "train_cpu_seconds": seconds, "memory_bytes": memory}


def make_reference(num_seeds=3):
    base = [trial([1.0, 1.0], [[0.0], [0.0, 0.0]])] * num_seeds
    plain = [trial([0.5, 0.2], [[0.9], [0.3, 0.8]])] * num_seeds
    return Reference(TwoLevelBootstrap(num_seeds, item_sizes(plain[0]), num_draws=200), base, plain)


def test_bits_survive_packing():
    values = np.random.default_rng(0).random(123) < 0.5
    np.testing.assert_array_equal(unpack_bits(pack_bits(values)), values)


def test_sequence_figures_are_those_of_the_worked_example():
    """R = [[.7 ..], [.7 .8 .], [.6 .75 .85]]: ACC .7333, BWT -.075."""
    assert final(CARD)[0] == pytest.approx(0.73333, abs=1e-5)
    assert backward_transfer(CARD)[0] == pytest.approx(((0.6 - 0.7) + (0.75 - 0.8)) / 2)
    assert learning(CARD)[0] == pytest.approx((0.7 + 0.8 + 0.85) / 3)
    np.testing.assert_allclose(lost(CARD)[0], [1 / 7, 1 / 16])


def test_one_domain_has_no_backward_transfer():
    assert backward_transfer(np.full((2, 1, 1), 0.5)).tolist() == [0.0, 0.0]


def test_figures_follow_from_the_shares():
    own = [trial([0.98, 0.94], [[0.8], [0.6, 0.9]], seconds=1.5, memory=130)] * 3
    found = measure(own, make_reference())
    assert found.single_domain.value == pytest.approx(0.8)
    assert found.single_em_drop.value == pytest.approx(0.02)
    assert found.final_domain.value == pytest.approx(0.75)
    assert found.of_plain_learning.value == pytest.approx(0.75 / 0.85)
    assert found.of_plain_final.value == pytest.approx(0.75 / 0.55)
    assert found.backward_transfer.value == pytest.approx(-0.2)
    assert found.decay_mean.value == pytest.approx(0.04)
    assert found.decay_worst.value == pytest.approx(0.06)
    assert found.decay_last.value == pytest.approx(0.06)
    assert found.lost_worst.value == pytest.approx(0.25)
    assert found.time_ratio == pytest.approx(1.5)
    assert found.memory_ratio == pytest.approx(1.3)


def test_intervals_hold_the_value_and_plain_is_all_of_itself():
    reference = make_reference()
    found = measure(reference.plain, reference)
    assert found.of_plain_final.shown() == "100.0 [100.0, 100.0]"
    for estimate in (found.single_domain, found.decay_worst, found.backward_transfer):
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.low < estimate.high
