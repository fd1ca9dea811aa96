"""The generic oracles G1 to G7 over every strategy, on a tiny model under a written-out step."""

import copy

import pytest
import torch

from app.domain.configs.quadratic import EwcConfig
from tests.workers.strategies.cases import CASE_IDS, CASES
from tests.workers.strategies.stage import Stage, same
from workers.strategies.base import Strategy

STEPS = 20
every_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
every_run = pytest.mark.parametrize(
    ("case", "lora"),
    [
        pytest.param(case, lora, id=f"{case.name}-{'lora' if lora else 'full'}")
        for case in CASES
        for lora in (False, True)
        if not (lora and case.no_adapters)
    ],
)
both_kinds = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def stage_of(*cases, strength=None, **overrides):
    coefs = {c.kind: c.strength if strength is None else strength for c in cases}
    num_blocks = max(c.num_blocks for c in cases)
    task_index = cases[0].task_index if len(cases) == 1 else 0
    boundary = cases[0].boundary if len(cases) == 1 else 0
    values = {"num_blocks": num_blocks, "task_index": task_index, "boundary": boundary, **overrides}
    return Stage([c.make() for c in cases], coefs, **values)


def plain_weights(lora, num_blocks):
    torch.manual_seed(11)
    stage = Stage([], {}, lora=lora, dropout=0.1, num_blocks=num_blocks)
    return stage.train(STEPS).weights()


@every_run
def test_g1_strength_zero_is_bit_identical_to_plain_training(case, lora):
    expected = plain_weights(lora, case.num_blocks)
    torch.manual_seed(11)
    armed = stage_of(case, strength=0.0, lora=lora, dropout=0.1).train(STEPS)
    assert same(armed.weights(), expected)


@every_run
def test_g2_strength_moves_the_weights_and_the_metric_says_so(case, lora):
    stage = stage_of(case, lora=lora).train(3)
    assert not same(
        stage.weights(), Stage([], {}, lora=lora, num_blocks=case.num_blocks).train(3).weights()
    )
    assert stage.strategies[0].metrics()[case.effect_metric] > 0


@every_run
def test_an_armed_strategy_is_turned_on_later(case, lora):
    stage = stage_of(case, strength=0.0, lora=lora).train(5)
    assert stage.strategies[0].metrics()[case.effect_metric] == 0
    stage.ctx.coefs[case.kind] = case.strength
    stage.train(2)
    assert stage.strategies[0].metrics()[case.effect_metric] > 0
    assert not same(
        stage.weights(), Stage([], {}, lora=lora, num_blocks=case.num_blocks).train(7).weights()
    )


@every_run
def test_g3_a_restored_strategy_goes_on_bit_for_bit(case, lora):
    whole = stage_of(case, lora=lora).train(7)
    first = stage_of(case, lora=lora).train(3)
    second = stage_of(case, lora=lora, start=False)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.step = first.step
    second.streams()
    second.strategies[0].load_state_dict(first.strategies[0].state_dict())
    second.train(4)
    assert same(second.weights(), whole.weights())
    assert second.strategies[0].metrics() == whole.strategies[0].metrics()


@every_run
def test_g4_micro_batches_do_not_matter(case, lora):
    stages = [stage_of(case, lora=lora, micro_rows=size) for size in (16, 3, 1)]
    for stage in stages:
        stage.train(2)
        stage.gradients()
        stage.strategies[0].add_grads(stage.ctx)
    whole, *others = [[p.grad for p in stage.params.values()] for stage in stages]
    for other in others:
        for left, right in zip(whole, other, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


STEP_OWNERS = ("maml_prox", "reptile")  # of whom a run has one, without penalties on whole steps


def one_of_each_kind(lora):
    fits = [c for c in CASES if not (lora and c.no_adapters) and c.kind not in STEP_OWNERS]
    return {case.kind: case for case in fits}


@both_kinds
def test_g5_the_order_of_the_list_does_not_matter(lora):
    """Even where the loop did not sort them; a cap alone sees what was added before it."""
    by_kind = one_of_each_kind(lora)
    uncapped = EwcConfig(strength=10.0, fisher_samples=16, penalty_mode="gradient", rho=None)
    by_kind["ewc"] = by_kind["ewc"]._replace(config=uncapped)
    for kind in {"mas", "si"} & by_kind.keys():
        config = by_kind[kind].config.model_copy(update={"rho": None})
        by_kind[kind] = by_kind[kind]._replace(config=config)
    chosen = list(by_kind.values())
    orders = (chosen, chosen[::-1], chosen[2:] + chosen[:2])
    listed, *others = [
        stage_of(*order, lora=lora, is_sorted=False).train(3).weights() for order in orders
    ]
    for other in others:
        for name, value in listed.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10)


@both_kinds
def test_g5_sorted_by_kind_any_order_is_bit_identical(lora):
    chosen = list(one_of_each_kind(lora).values())
    first, second = (
        stage_of(*order, lora=lora).train(3).weights() for order in (chosen, chosen[::-1])
    )
    assert same(first, second)


@pytest.mark.parametrize(
    "name",
    [
        *("distillation", "distillation-jsd", "distillation-reverse"),
        *("causal-consistency", "causal-answers", "causal-risks"),
    ],
)
def test_g6_loss_and_gradient_of_a_term_add_up(name):
    case = next(c for c in CASES if c.name == name)
    assert case.only_loss
    alone, with_term = Stage([], {}), stage_of(case)
    torch.manual_seed(3)
    for stage in (alone, with_term):  # away from the start, where the divergence is 0
        with torch.no_grad():
            for index, p in enumerate(stage.params.values()):
                wave = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + index)
                p.add_(0.1 * wave.view_as(p))
    (strategy,) = with_term.strategies

    def gradients_and_term():
        strategy.on_step_start(with_term.ctx)
        found, parts = with_term.gradients(), with_term.losses[-1]
        return found, sum(v for name, v in parts.items() if name.startswith(case.kind))

    task = alone.gradients()
    both, term = gradients_and_term()
    assert term > 0
    assert with_term.losses[-1]["task"] == pytest.approx(alone.losses[-1]["task"], rel=1e-12)

    with_term.ctx.coefs[case.kind] = 2 * case.strength
    with_term.optimizer.zero_grad()
    twice, doubled = gradients_and_term()
    assert doubled == pytest.approx(2 * term, rel=1e-12)
    for key, value in task.items():
        torch.testing.assert_close(twice[key] - both[key], both[key] - value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.no_adapters], ids=lambda c: c.name)
def test_a_strategy_that_does_not_go_with_adapters_says_so(case):
    with pytest.raises(ValueError, match=f"{case.kind}: "):
        stage_of(case, lora=True)


@pytest.mark.parametrize("case", [c for c in CASES if not c.no_adapters], ids=lambda c: c.name)
def test_g7_what_is_frozen_stays_as_it_was(case):
    stage = stage_of(case, lora=True)
    before = stage.weights()
    stage.train(5)
    after = stage.weights()
    frozen = set(after) - set(stage.params)
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not any(p.requires_grad for n, p in stage.model.named_parameters() if n in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in stage.params)


@every_case
def test_a_state_of_another_strategy_is_refused(case):
    strategy = stage_of(case).strategies[0]
    with pytest.raises(ValueError, match="given to"):
        strategy.load_state_dict({**strategy.state_dict(), "kind": "other"})
    with pytest.raises(ValueError, match="given to"):
        strategy.load_state_dict({**strategy.state_dict(), "version": 0})


@every_case
def test_what_a_strategy_says_of_itself(case):
    strategy = case.make()
    assert isinstance(strategy, Strategy)
    assert strategy.kind == case.kind
    assert strategy.cost().step_share >= 0
    assert strategy.metrics()[case.effect_metric] == 0
