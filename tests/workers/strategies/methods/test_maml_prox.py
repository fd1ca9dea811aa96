"""MAML-Prox as a step owner: the gradient it leaves against the written-out loop, and theta untouched."""

import pytest
import torch
from torch.nn import functional as F

from tests.workers.strategies.stage import Stage, make_rows, same
from workers.strategies.methods.distillation import Distillation
from workers.strategies.methods.ewc import Ewc
from workers.strategies.methods.l2sp import L2Sp
from workers.strategies.methods.maml_prox import MamlProx
from workers.strategies.methods.replay import Replay


def stage_of(strategy, *others, strength=0.5, **overrides):
    coefs = {"maml_prox": strength, "replay": 0.5, "l2sp": 0.3, "ewc": 10.0, "distillation": 1.0}
    return Stage([strategy, *others], coefs, **overrides)


def mean_loss(stage, params, rows):
    """Mean over the tokens of rows, by a functional call: not the strategy's way of doing it."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor(row)
        given = (ids[None, :-1], torch.arange(1, len(row) - 1))
        logits = torch.func.functional_call(stage.model, params, given)
        total = total + F.cross_entropy(logits, ids[2:], reduction="sum")
        tokens += len(row) - 2
    return total / tokens


def end_of_loop(stage, rows, *, rate, steps, mu):
    theta = {n: p.detach().clone() for n, p in stage.params.items()}
    phi = {n: p.clone() for n, p in theta.items()}
    for _ in range(steps):
        phi = {n: p.detach().requires_grad_() for n, p in phi.items()}
        grads = torch.autograd.grad(mean_loss(stage, phi, rows), list(phi.values()))
        phi = {
            n: p.detach() - rate * (g + mu * (p.detach() - theta[n]))
            for (n, p), g in zip(phi.items(), grads, strict=True)
        }
    return {n: p.detach().requires_grad_() for n, p in phi.items()}


def gradient_at(stage, phi, rows):
    return dict(
        zip(phi, torch.autograd.grad(mean_loss(stage, phi, rows), list(phi.values())), strict=True)
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("micro_rows", [8, 3])
def test_the_gradient_is_the_querys_at_the_end_of_the_proximal_loop(lora, micro_rows):
    """The step reads rows 0 to 7; support are the first five of the file, query the last three."""
    strategy = MamlProx(inner_lr=0.1, inner_steps=4, query_share=0.375, query_rows="later")
    stage = stage_of(strategy, strength=2.0, lora=lora, micro_rows=micro_rows)
    before = stage.weights()
    found = stage.gradients()
    phi = end_of_loop(stage, stage.training[:5], rate=0.1, steps=4, mu=2.0)
    expected = gradient_at(stage, phi, stage.training[5:8])
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-13)
    assert same(stage.weights(), before)  # bit for bit
    moved = sum(float((phi[n].detach() - before[n]).square().sum()) for n in phi) ** 0.5
    metrics = strategy.metrics()
    assert metrics["applied_norm"] == pytest.approx(moved, rel=1e-5)
    assert (metrics["support_rows"], metrics["future_rows"], metrics["memory_rows"]) == (5, 3, 0)


@pytest.mark.parametrize("coef", [0.7, 0.0])
def test_replayed_rows_enter_the_query_with_their_own_mean_and_weight(coef):
    strategy = MamlProx(inner_lr=0.1, inner_steps=2, memory_coef=coef, query_rows="later")
    replay = Replay(store_fraction=0.5, min_store_rows=4)
    stage = stage_of(strategy, replay)
    found = stage.gradients()
    phi = end_of_loop(stage, stage.training[:4], rate=0.1, steps=2, mu=0.5)
    future = gradient_at(stage, phi, stage.training[4:8])
    memory = gradient_at(stage, phi, [stage.general[row] for row in replay.store[:4]])
    for name, gradient in future.items():
        expected = gradient + coef * memory[name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-13)
    assert strategy.metrics()["memory_rows"] == 4


def test_with_an_unbounded_prox_it_is_the_querys_plain_gradient():
    """alpha * mu = 1/2: the loop ends where it began."""
    strategy = MamlProx(inner_lr=0.5e-8, inner_steps=3, query_rows="later")
    stage = stage_of(strategy, strength=1e8)
    found = stage.gradients()
    theta = {n: p.detach().clone().requires_grad_() for n, p in stage.params.items()}
    expected = gradient_at(stage, theta, stage.training[4:8])
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-7)


def test_one_domain_row_is_a_plain_step():
    strategy = MamlProx()
    alone = Stage([], {}, batch_size=1)
    stage = stage_of(strategy, batch_size=1)
    assert same(stage.gradients(), alone.gradients())
    assert strategy.metrics()["applied_norm"] == 0


def test_terms_of_other_strategies_are_in_the_query_and_not_in_the_loop():
    """Distillation at a student unlike its teacher: the loop's end is as without it."""
    ends = []
    for others in ((), (Distillation(on=("domain",)),)):
        strategy = MamlProx(inner_lr=0.1)
        stage = stage_of(strategy, *others)
        for p in stage.params.values():
            p.data.mul_(1.5)
        gradients = stage.gradients()
        ends.append((strategy.metrics()["applied_norm"], gradients))
    assert ends[0][0] == ends[1][0]
    assert any(not torch.equal(ends[0][1][n], g) for n, g in ends[1][1].items())


def test_an_anchor_and_replay_beside_it_in_any_order_give_the_same_weights():
    made = [
        stage_of(*order, is_sorted=True).train(4).weights()
        for order in (
            (MamlProx(), Ewc(fisher_samples=8), L2Sp(), Replay(min_store_rows=4)),
            (Replay(min_store_rows=4), L2Sp(), Ewc(fisher_samples=8), MamlProx()),
        )
    ]
    assert same(*made)


def test_shuffled_query_rows_change_from_step_to_step_and_cover_all():
    strategy = MamlProx()
    stage = stage_of(strategy)
    sets = []
    for step in range(12):
        stage.ctx.step = step
        sets.append(strategy._query_ids(stage.ctx, range(8)))
    assert {len(ahead) for ahead in sets} == {4}
    assert len(set(sets)) > 6
    assert frozenset().union(*sets) == set(range(8))
    assert strategy._query_ids(stage.ctx, [3, 3, 3]) == frozenset()


@pytest.mark.parametrize("query_rows", ["shuffled", "later"])
def test_what_is_learnt_is_what_is_query(query_rows):
    """Loss on the first rows of every step, which are support for good where the later ones are query."""
    strategy = MamlProx(inner_lr=0.05, query_rows=query_rows)
    stage = stage_of(strategy, learning_rate=0.05, training=make_rows(8, 1))
    start = float(mean_loss(stage, dict(stage.params), stage.training[:4]).detach())
    stage.train(40)
    end = float(mean_loss(stage, dict(stage.params), stage.training[:4]).detach())
    assert (end < 0.7 * start) == (query_rows == "shuffled")
