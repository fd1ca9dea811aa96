"""SI: the path integral against the loss it explains, and what is consolidated from it."""

import pytest
import torch
from torch import nn

from app.domain.configs.quadratic import EwcConfig, SiConfig, check_quadratic
from app.errors import BadRequest
from tests.workers.strategies.stage import F64, Stage, same
from workers.strategies.methods.l2sp import L2Sp
from workers.strategies.methods.si import Si


def stage_of(strategy, *, strength=1.0, **overrides):
    return Stage([strategy], {"si": strength}, **overrides)


class Quadratic:
    """A strategy on 1/2 (x - t)' A (x - t), trained by SGD."""

    def __init__(self, strategy, *, size=6):
        rng = torch.Generator().manual_seed(1)
        root = torch.randn(size, size, generator=rng, dtype=F64)
        self.hessian = root @ root.T / size
        self.target = torch.randn(size, generator=rng, dtype=F64)
        self.parameter = nn.Parameter(torch.randn(size, generator=rng, dtype=F64))
        self.strategy = strategy
        self.ctx = Stage([], {"si": 1.0}).ctx
        self.ctx.params, self.ctx.num_tasks = {"w": self.parameter}, 2
        strategy.on_task_start(self.ctx)

    def loss(self):
        away = self.parameter.detach() - self.target
        return float(0.5 * away @ self.hessian @ away)

    def step(self, displacement):
        gradient = self.hessian @ (self.parameter.detach() - self.target)
        self.parameter.grad = gradient
        self.strategy.read_grads(self.ctx)
        self.parameter.grad = gradient * 100 + 1  # penalties, projections and clipping come later
        self.parameter.data.add_(displacement(gradient))
        self.strategy.on_step_end(self.ctx)


def test_the_path_integral_is_the_fall_of_the_loss_and_half_the_curvature_of_the_steps():
    """Exact for a quadratic: L0 - L_end = sum -g d - 1/2 sum d'Hd; the left-point sum overshoots."""
    problem = Quadratic(Si())
    start, curved = problem.loss(), 0.0
    rng = torch.Generator().manual_seed(5)
    for _ in range(40):

        def displacement(gradient):  # whatever the optimiser made of the gradient
            return -0.1 * gradient + 0.01 * torch.randn(6, generator=rng, dtype=F64)

        before = problem.parameter.detach().clone()
        problem.step(displacement)
        moved = problem.parameter.detach() - before
        curved += float(0.5 * moved @ problem.hessian @ moved)
    total = float(problem.strategy.omega["w"].sum())
    assert total == pytest.approx(start - problem.loss() + curved, rel=1e-12)
    assert total > start - problem.loss()


def test_consolidation_divides_by_the_squared_displacement_and_drops_what_did_harm():
    strategy = Si(xi=0.01, importance_normalize="none", importance_clip=1.0)
    problem = Quadratic(strategy)
    start = problem.parameter.detach().clone()
    harmful = torch.tensor([1.0, 1, 1, 1, 1, -1], dtype=F64)
    for _ in range(5):
        problem.step(lambda g: -0.05 * g * harmful)
    omega = strategy.omega["w"].clone()
    assert (omega[:5] >= 0).all()
    assert omega[5] < 0
    strategy.on_task_end(problem.ctx)
    moved = problem.parameter.detach() - start
    expected = omega.clamp(min=0) / (moved**2 + 0.01)
    torch.testing.assert_close(strategy.importance["importance/w"], expected, rtol=1e-12, atol=0)
    assert torch.equal(strategy.anchor["w"], start + moved)
    problem.ctx.task_index, problem.ctx.num_tasks = 1, 3
    strategy.on_task_start(problem.ctx)
    assert not strategy.omega["w"].any()
    problem.step(lambda g: -0.05 * g)
    second = strategy.omega["w"].clamp(min=0) / (
        (problem.parameter.detach() - strategy.start["w"]) ** 2 + 0.01
    )
    strategy.on_task_end(problem.ctx)
    torch.testing.assert_close(strategy.importance["importance/w"], expected + second)
    assert torch.equal(strategy.anchor["w"], problem.parameter.detach())


def test_in_the_first_task_nothing_is_held_and_after_the_last_nothing_is_kept():
    strategy = Si()
    stage = stage_of(strategy, strength=1e6).train(3)
    assert strategy.prox_pulls(stage.ctx) == {}
    assert strategy.metrics()["applied_norm"] == 0
    strategy.on_task_end(stage.ctx)  # the only task
    assert not strategy.importance
    assert not strategy.anchor


def test_gradients_of_other_penalties_do_not_enter_the_path():
    alone, beside = Si(), Si()
    Stage([alone], {"si": 0.0}).train(1)
    stage = Stage([beside, L2Sp()], {"si": 0.0, "l2sp": 50.0})
    for p in stage.params.values():
        p.data.add_(0.01)
    stage.ctx.step = 0
    beside.on_task_start(stage.ctx)
    stage.gradients()
    task = {n: g.clone() for n, p in stage.params.items() if (g := p.grad) is not None}
    beside.read_grads(stage.ctx)
    stage.strategies[0].add_grads(stage.ctx)
    assert any(
        p.grad is not None and not torch.equal(p.grad, task[n]) for n, p in stage.params.items()
    )
    assert all(torch.equal(beside._before[n][0], task[n]) for n in task)


def test_a_last_stage_on_an_adapter_is_left_alone():
    strategy = Si(penalty_mode="gradient")
    stage = stage_of(strategy, lora=True, task_index=1, strength=1e3)
    free = Stage([], {}, lora=True, task_index=1)
    assert same(stage.train(3).weights(), free.train(3).weights())
    assert strategy.metrics()["applied_norm"] == 0
    assert strategy.state_dict()["tensors"] == {}


def test_a_finished_task_is_forgotten_less():
    """The second task's rows differ: the loss on the first one's rises less with SI than without."""

    def loss_after(strength):
        strategy = Si(xi=1e-3)
        stage = stage_of(strategy, strength=strength, boundary=60, learning_rate=0.02)
        stage.train(60)
        stage.stores["kept"] = stage.training
        stage.training = stage.stores["training"] = [row[::-1] for row in stage.training]
        stage.train(40)
        micro = stage._rows_micro("domain", "kept", range(len(stage.training)))
        with torch.no_grad():
            logits = stage.model(micro.input_ids_BT, micro.positions_N)
        return float(nn.functional.cross_entropy(logits, micro.targets_N))

    free, held = loss_after(0.0), loss_after(100.0)
    assert held < 0.9 * free


def test_adapters_and_single_stages_are_refused_at_submit_with_the_reason():
    strategies = (EwcConfig(), SiConfig())
    check_quadratic(strategies, lora=False, num_stages=2)
    check_quadratic((EwcConfig(),), lora=True, num_stages=1)
    with pytest.raises(BadRequest, match=r"strategies\.1: 'si' needs full fine-tuning"):
        check_quadratic(strategies, lora=True, num_stages=2)
    with pytest.raises(BadRequest, match="this job has one stage"):
        check_quadratic(strategies, lora=False, num_stages=1)


def test_states_that_do_not_fit_are_refused():
    stage = stage_of(Si(), boundary=2).train(3)
    state = stage.strategies[0].state_dict()
    fresh = stage_of(Si(), start=False).strategies[0]
    name = "omega/layer.weight"
    without = {n: t for n, t in state["tensors"].items() if n != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        fresh.load_state_dict({**state, "tensors": without})
    with pytest.raises(ValueError, match="belongs to no"):
        fresh.load_state_dict({**state, "tensors": {**state["tensors"], "x/y": torch.zeros(1)}})
    fresh.load_state_dict(state)
    again = fresh.state_dict()["tensors"]
    assert again.keys() == state["tensors"].keys()
    assert all(torch.equal(again[n], t) for n, t in state["tensors"].items())
