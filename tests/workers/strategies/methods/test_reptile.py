"""Reptile as a step owner: K = 1 is the plain step, and more steps are the way that SGD takes."""

import pytest
import torch

from tests.workers.strategies.stage import Stage, make_micro, same
from workers.strategies.methods.replay import Replay
from workers.strategies.methods.reptile import Reptile


def stage_of(strategy, *others, strength=1.0, **overrides):
    return Stage([strategy, *others], {"reptile": strength, "replay": 0.5}, **overrides)


@pytest.mark.parametrize("lora", [False, True])
def test_one_inner_step_is_the_plain_step_bit_for_bit(lora):
    plain = Stage([], {}, lora=lora).train(5).weights()
    assert same(stage_of(Reptile(inner_steps=1), lora=lora).train(5).weights(), plain)


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("micro_rows", [8, 3])
def test_the_gradient_is_the_way_of_sgd_over_the_slices(strength, micro_rows):
    """Against torch's own SGD on rows 0, 3, 6; then 1, 4, 7; then 2, 5."""
    strategy = Reptile(inner_lr=0.1, inner_steps=3)
    stage = stage_of(strategy, strength=strength, micro_rows=micro_rows)
    before = stage.weights()
    found = stage.gradients()
    assert same(stage.weights(), before)
    sgd = torch.optim.SGD(stage.params.values(), lr=0.1)
    for index in range(3):
        rows = [("domain", i, stage.training[i], True) for i in range(index, 8, 3)]
        micro = make_micro(rows)
        sgd.zero_grad()
        logits = stage.model(micro.input_ids_BT, micro.positions_N)
        torch.nn.functional.cross_entropy(logits, micro.targets_N).backward()
        sgd.step()
    for name, p in stage.params.items():
        way = (before[name] - p.detach()) / (0.1 * 3)
        torch.testing.assert_close(found[name], strength * way, rtol=0, atol=1e-13)
    moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in stage.params.items())
    assert strategy.metrics()["applied_norm"] == pytest.approx(moved**0.5, rel=1e-5)


def test_more_inner_steps_than_rows_take_as_many_as_there_are():
    few, many = (
        stage_of(Reptile(inner_lr=0.1, inner_steps=k), batch_size=2).train(2).weights()
        for k in (2, 9)
    )
    assert same(few, many)


def test_replayed_rows_are_spread_over_the_slices():
    strategy = Reptile(inner_steps=2)
    stage = stage_of(strategy, Replay(min_store_rows=4, store_fraction=0.5))
    seen = []

    def backward(micros, *, task_only=False):
        assert not task_only
        seen.append([source for micro in micros for source in micro.sources])

    strategy.compute_grads(stage.ctx, stage.micros(), backward)
    assert [sources.count("replay") for sources in seen] == [2, 2]
    assert [sources.count("domain") for sources in seen] == [4, 4]
