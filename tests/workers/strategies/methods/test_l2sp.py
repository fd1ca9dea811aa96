"""L2-SP: the anchor at the starting weights, with and without adapters."""

import pytest
import torch

from tests.workers.strategies.stage import F64, WIDTH, Stage
from workers.strategies.methods.l2sp import L2Sp


def stage_of(strategy, *, strength=1.0, **overrides):
    return Stage([strategy], {"l2sp": strength}, **overrides)


def test_anchor_is_a_copy_of_the_starting_weights():
    strategy = L2Sp()
    stage = stage_of(strategy)
    start = {n: p.detach().clone() for n, p in stage.params.items()}
    stage.train(3)
    assert all(torch.equal(strategy.anchor[n], start[n]) for n in start)
    assert not torch.equal(stage.model.layer.weight.detach(), start["layer.weight"])


def test_gradient_mode_adds_strength_times_the_displacement():
    strategy = L2Sp()
    stage = stage_of(strategy, strength=0.7)
    for p in stage.params.values():
        p.data.add_(0.5)
        p.grad = torch.ones_like(p)
    strategy.add_grads(stage.ctx)
    for p in stage.params.values():
        torch.testing.assert_close(p.grad, torch.full_like(p, 1 + 0.7 * 0.5).detach())
    assert strategy.prox_pulls(stage.ctx) == {}


def test_implicit_mode_pulls_and_adds_no_gradient():
    strategy = L2Sp(penalty_mode="implicit")
    stage = stage_of(strategy)
    strategy.add_grads(stage.ctx)
    assert all(p.grad is None for p in stage.params.values())
    assert strategy.prox_pulls(stage.ctx).keys() == stage.params.keys()


@pytest.mark.parametrize("mode", ["implicit", "gradient"])
def test_with_adapters_the_gradient_is_that_of_the_squared_effective_change(mode):
    strategy = L2Sp(penalty_mode=mode)
    stage = stage_of(strategy, strength=0.7, lora=True)
    layer = stage.model.layer
    rng = torch.Generator().manual_seed(1)
    layer.lora_B.data.copy_(torch.randn(WIDTH, 2, generator=rng, dtype=F64))
    A, B = (x.detach().clone().requires_grad_() for x in (layer.lora_A, layer.lora_B))
    (0.35 * (layer.scale * B @ A).square().sum()).backward()
    strategy.add_grads(stage.ctx)
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)
    assert strategy.prox_pulls(stage.ctx) == {}
    assert strategy.state_dict()["tensors"] == {}


@pytest.mark.parametrize("mode", ["implicit", "gradient"])
def test_strength_holds_the_weights_nearer_to_the_start(mode):
    distances = []
    for strength in (0.0, 0.3, 30.0):
        strategy = L2Sp(penalty_mode=mode)
        stage = stage_of(strategy, strength=strength).train(30)
        distances.append(
            sum(float((p.detach() - strategy.anchor[n]).norm()) for n, p in stage.params.items())
        )
    assert distances[0] > distances[1] > 1.5 * distances[2]


def test_states_that_do_not_fit_are_refused():
    state = stage_of(L2Sp()).strategies[0].state_dict()
    fresh = stage_of(L2Sp(), start=False).strategies[0]
    name = "anchor/layer.weight"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        fresh.load_state_dict(
            {**state, "tensors": {n: t for n, t in state["tensors"].items() if n != name}}
        )
    with pytest.raises(ValueError, match="shape"):
        fresh.load_state_dict({**state, "tensors": {**state["tensors"], name: torch.zeros(2)}})
