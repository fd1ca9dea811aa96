"""Causal: its penalties against autograd and closed forms, and its terms against a written-out loss."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.workers.strategies.stage import Stage, make_rows, same
from workers.strategies.context import Pairs
from workers.strategies.invariance import (
    consistency,
    coral,
    covariance_gap,
    dummy_gradients,
    pool,
    risk_variance,
    uniform_of,
)
from workers.strategies.methods.causal import Causal

F64 = torch.float64


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64, **options)


def stage_of(strategy, *, strength=1.0, **overrides):
    return Stage([strategy], {"causal": strength}, **overrides)


def away(stage):
    """Weights off the start, alike for stages of one seed."""
    with torch.no_grad():
        for index, p in enumerate(stage.params.values()):
            wave = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + index)
            p.add_(0.3 * wave.view_as(p))
    return stage


# --- closed forms


def test_the_variance_of_risks_has_slope_two_times_the_distance_over_their_number():
    risks = normal(5).requires_grad_()
    (slope,) = torch.autograd.grad(risk_variance(risks), risks)
    expected = 2 * (risks - risks.mean()) / 5
    assert (slope - expected).abs().max() < 1e-15
    assert risk_variance(risks).item() == pytest.approx(risks.detach().numpy().var(), rel=1e-14)


def test_equal_risks_cost_nothing_and_pull_nowhere():
    risks = torch.full((4,), 1.25, dtype=F64, requires_grad=True)
    value = risk_variance(risks)
    (slope,) = torch.autograd.grad(value, risks)
    assert value.item() == 0.0
    assert not slope.any()


def test_irm_has_the_value_and_gradient_of_double_backward():
    logits, targets = 3 * normal(40, 9), torch.randint(9, (40,))
    inner = logits.clone().requires_grad_()
    weight = torch.ones((), dtype=F64, requires_grad=True)
    risk = F.cross_entropy(weight * inner, targets)
    (slope,) = torch.autograd.grad(risk, weight, create_graph=True)
    (expected,) = torch.autograd.grad(slope**2, inner)
    outer = logits.clone().requires_grad_()
    value = dummy_gradients(outer, targets).mean() ** 2
    (found,) = torch.autograd.grad(value, outer)
    assert value.item() == pytest.approx(slope.item() ** 2, rel=1e-12)
    assert (found - expected).abs().max() < 1e-15


def test_covariances_are_blind_to_a_shift_and_coral_is_not():
    left = normal(200, 6)
    assert covariance_gap(left, left + 5) < 1e-25
    assert coral(left, left + 5).item() == pytest.approx(25.0, rel=1e-12)


def test_coral_is_that_of_numpys_covariances():
    import numpy as np

    left, right = normal(50, 4), 2 * normal(70, 4, seed=1)
    difference = np.cov(left.numpy().T) - np.cov(right.numpy().T)
    expected = (difference**2).sum() / (4 * 4**2)
    assert covariance_gap(left, right).item() == pytest.approx(expected, rel=1e-12)


def test_a_pair_of_equal_states_costs_nothing():
    states = normal(6, 5).requires_grad_()
    value, squared = consistency(states, states.detach().clone())
    (slope,) = torch.autograd.grad(value, states)
    assert abs(value.item()) < 1e-14
    assert slope.abs().max() < 1e-15
    assert squared.item() < 1e-14


def test_consistency_pulls_both_sides_by_half_and_says_how_hard():
    left, right = normal(6, 5).requires_grad_(), normal(6, 5, seed=1).requires_grad_()
    value, squared = consistency(left, right)
    slopes = torch.autograd.grad(value, (left, right))
    plain = (1 - F.cosine_similarity(left, right, dim=-1)).sum()
    expected = torch.autograd.grad(plain, (left, right))
    assert value.item() == pytest.approx(plain.item(), rel=1e-14)
    for slope, twice in zip(slopes, expected, strict=True):
        assert (2 * slope - twice).abs().max() < 1e-14
    assert squared.item() == pytest.approx(sum(float(s.square().sum()) for s in slopes), rel=1e-12)


def test_pooled_states_end_with_the_last_supervised_position():
    stage = stage_of(Causal(vrex_beta=0.0))
    (micro,) = stage.micros()
    hidden = normal(*micro.input_ids_BT.shape, 3)
    mean, last = pool(micro, hidden, last=False), pool(micro, hidden, last=True)
    width = micro.input_ids_BT.shape[1]
    for row in range(len(micro.sources)):
        end = int((micro.positions_N[micro.row_of_N == row] % width).max())
        assert torch.allclose(mean[row], hidden[row, : end + 1].mean(0))
        assert torch.equal(last[row], hidden[row, end])


def test_draws_without_state_are_uniform_and_differ_by_each_number():
    draws = torch.tensor([uniform_of(5, step, row) for step in range(40) for row in range(50)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (draws < 0.25).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert len(set(draws.tolist())) == 2000
    assert uniform_of(5, 1, 2) == uniform_of(5, 1, 2) != uniform_of(6, 1, 2)


# --- the whole loss, written out


BOTH = {"vrex_beta": 3.0, "irm_lambda": 2.0, "consistency_coef": 0.7, "cf_fraction": 0.6}


def written_out(stage, knobs, strength, *, tags=None):
    """The whole penalty of the stage's next step with its graph, from one forward of all rows."""
    micros = stage.micros()
    assert len(micros) == 1
    micro = micros[0]
    logits = stage.model(micro.input_ids_BT, micro.positions_N)
    hidden = stage.model.hidden_BTD[1]
    losses = F.cross_entropy(logits, micro.targets_N, reduction="none")
    groups: dict[str, list[int]] = {}
    for place, (source, row) in enumerate(zip(micro.sources, micro.sample_ids, strict=True)):
        if source != "counterfactual":
            name = tags[row] if tags and source == "domain" else source
            groups.setdefault(name, []).append(place)
    risks, penalties, sides = [], [], []
    for places in groups.values():
        own = torch.isin(micro.row_of_N, torch.tensor(places))
        risks.append(losses[own].mean())
        weight = torch.ones((), dtype=F64, requires_grad=True)
        risk = F.cross_entropy(weight * logits[own], micro.targets_N[own])
        penalties.append(torch.autograd.grad(risk, weight, create_graph=True)[0] ** 2)
        sides.append(pool(micro, hidden, last=False)[places])
    total = knobs.get("vrex_beta", 1.0) * torch.stack(risks).var(unbiased=False)
    total = total + knobs.get("irm_lambda", 0.0) * torch.stack(penalties).mean()
    if knobs.get("coral_coef"):
        total = total + knobs["coral_coef"] * coral(*sides)
    gaps = []
    pooled = pool(micro, hidden, last=False)
    for place, (source, row) in enumerate(zip(micro.sources, micro.sample_ids, strict=True)):
        if source == "counterfactual":
            other = list(zip(micro.sources, micro.sample_ids, strict=True)).index(("domain", row))
            gaps.append(1 - F.cosine_similarity(pooled[place], pooled[other], dim=0))
    if gaps:
        # half of a plain gradient: each side is held still for the other
        mean = torch.stack(gaps).mean()
        total = total + knobs.get("consistency_coef", 0.1) * (0.5 * mean + 0.5 * mean.detach())
    return strength * total


@pytest.mark.parametrize("micro_rows", [1, 3, 64])
@pytest.mark.parametrize("coral_coef", [0.0, 0.5])
def test_terms_over_any_micro_batches_are_the_written_out_penalty(micro_rows, coral_coef):
    knobs = {**BOTH, "coral_coef": coral_coef, "general_ratio": 1.0, "anneal": 0.0}
    size: dict[str, Any] = {
        "batch_size": 32,
        "training": make_rows(40, 1),
        "general": make_rows(40, 2),
    }
    whole = away(stage_of(Causal(**knobs), strength=2.0, micro_rows=1000, **size))
    whole.strategies[0].on_step_start(whole.ctx)
    expected_value = written_out(whole, knobs, 2.0)
    expected = torch.autograd.grad(expected_value, list(whole.params.values()))

    plain = away(Stage([], {}, micro_rows=micro_rows, **size)).gradients()
    parts = away(stage_of(Causal(**knobs), strength=2.0, micro_rows=micro_rows, **size))
    parts.strategies[0].on_step_start(parts.ctx)
    found = parts.gradients()
    terms = {k: v for k, v in parts.losses[-1].items() if k.startswith("causal")}
    assert sum(terms.values()) == pytest.approx(expected_value.item(), rel=1e-10)
    assert parts.losses[-1]["task"] == pytest.approx(_task(plain, size), rel=1e-12)
    for (name, gradient), right in zip(found.items(), expected, strict=True):
        assert (gradient - plain[name] - right).abs().max() < 1e-12
    assert parts.strategies[0].metrics()["environments"] == 2


def _task(_, size):
    """The task's loss by one plain micro-batch; the added general rows stay outside it."""
    stage = away(Stage([], {}, micro_rows=1000, **size))
    stage.gradients()
    return stage.losses[-1]["task"]


def test_tags_make_the_environments_where_rows_name_several():
    tags = ["law", "law", "health", ""] * 6
    knobs = {"vrex_beta": 4.0, "consistency_coef": 0.0, "anneal": 0.0, "min_rows_per_env": 1}
    stage = away(stage_of(Causal(**knobs), micro_rows=3))
    stage.ctx.environments = {"training": tags}
    assert [s.name for s in stage.streams()] == ["domain"]  # no general rows are needed
    strategy = stage.strategies[0]
    strategy.on_step_start(stage.ctx)
    stage.gradients()
    whole = away(stage_of(Causal(**knobs), micro_rows=1000))
    whole.ctx.environments = {"training": tags}
    whole.strategies[0].on_step_start(whole.ctx)
    value = written_out(whole, knobs, 1.0, tags=[tag or "domain" for tag in tags])
    assert stage.losses[-1]["causal_vrex"] == pytest.approx(value.item(), rel=1e-12)
    assert strategy.metrics()["environments"] == 3


def test_an_environment_with_too_few_rows_is_left_out_of_the_step():
    tags = ["law"] * 7 + ["health"] + ["law"] * 16
    stage = stage_of(Causal(consistency_coef=0.0, min_rows_per_env=2))
    stage.ctx.environments = {"training": tags}
    stage.streams()
    stage.strategies[0].on_step_start(stage.ctx)
    stage.gradients()
    assert "causal_vrex" not in stage.losses[-1]
    assert stage.strategies[0].metrics()["applied_norm"] == 0


def test_the_answers_divergence_is_symmetric_and_over_the_same_tokens():
    knobs = {"consistency": "answer_kl", "cf_fraction": 1.0, "vrex_beta": 0.0, "anneal": 0.0}
    stage = away(stage_of(Causal(**knobs), micro_rows=3))
    stage.strategies[0].on_step_start(stage.ctx)
    stage.gradients()
    (micro,) = away(stage_of(Causal(**knobs), micro_rows=1000)).micros()
    logs = stage.model(micro.input_ids_BT, micro.positions_N).log_softmax(-1).detach()
    total, count = 0.0, 0
    for row in range(8):
        left, right = logs[micro.row_of_N == row], logs[micro.row_of_N == row + 8]
        total += 0.5 * float(((left.exp() - right.exp()) * (left - right)).sum())
        count += len(left)
    assert stage.losses[-1]["causal_consistency"] == pytest.approx(0.1 * total / count, rel=1e-10)


# --- what it reads


def test_a_share_of_the_domain_rows_gets_its_pair_outside_the_cross_entropy():
    stage = stage_of(Causal(cf_fraction=0.5, vrex_beta=0.0))
    seen = 0
    for step in range(60):
        stage.ctx.step = stage.step = step
        for micro in stage.micros():
            own = [s == "counterfactual" for s in micro.sources]
            seen += sum(own)
            assert not micro.is_task_B[torch.tensor(own)].any()
            domain = {
                r for s, r in zip(micro.sources, micro.sample_ids, strict=True) if s == "domain"
            }
            assert {r for o, r in zip(own, micro.sample_ids, strict=True) if o} <= domain
    assert seen / (60 * 8) == pytest.approx(0.5, abs=0.07)


def test_pairs_outside_the_encoders_bounds_are_left_out_and_told():
    notes = []
    bounds = (0.75, 0.98)
    stage = stage_of(Causal(cf_fraction=1.0, vrex_beta=0.0, embedding_cosine=bounds))
    cosines = torch.linspace(0.5, 1.0, 24, dtype=F64)

    def embed(store, rows):
        if store == "training":
            return torch.tensor([[1.0, 0.0]], dtype=F64).repeat(len(rows), 1)
        angle = cosines[list(rows)].arccos()
        return torch.stack([angle.cos(), angle.sin()], -1)

    stage.ctx.embed = embed
    stage.ctx.note = lambda code, text, data: notes.append((code, data))
    seen = set()
    for step in range(3):
        stage.ctx.step = stage.step = step
        stage.strategies[0].on_step_start(stage.ctx)
        for micro in stage.micros():
            seen |= {
                r
                for s, r in zip(micro.sources, micro.sample_ids, strict=True)
                if s == "counterfactual"
            }
    kept = {row for row, cosine in enumerate(cosines.tolist()) if 0.75 <= cosine <= 0.98}
    assert seen == kept
    assert notes == [("causal_pairs_embedded", {"kept": len(kept), "pairs": 24})]


def test_the_ramp_counts_steps_it_acted_in_and_reaches_its_strength():
    stage = stage_of(Causal(anneal=0.05, vrex_beta=0.0), strength=3.0)  # 5 of 100 steps
    scales = []
    for _ in range(7):
        stage.train(1)
        scales.append(stage.strategies[0].metrics()["scale"])
    assert scales == pytest.approx([0.6, 1.2, 1.8, 2.4, 3.0, 3.0, 3.0])


def test_the_queue_makes_up_for_small_steps_and_goes_on_after_a_resume():
    knobs = {
        "consistency_coef": 0.0,
        "vrex_beta": 0.0,
        "coral_coef": 1.0,
        "coral_queue": 40,
        "min_rows_per_env": 2,
        "general_ratio": 1.0,
    }
    whole = stage_of(Causal(**knobs)).train(8)
    assert whole.strategies[0].metrics()["coral"] > 0
    first = stage_of(Causal(**knobs)).train(5)
    second = stage_of(Causal(**knobs), start=False)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.step = first.step
    second.streams()
    state = first.strategies[0].state_dict()
    assert {name: len(t) for name, t in state["tensors"].items()} == {"queue/0": 40, "queue/1": 40}
    second.strategies[0].load_state_dict(state)
    second.train(3)
    assert same(second.weights(), whole.weights())


def test_coral_waits_for_enough_rows_a_side():
    knobs = {"consistency_coef": 0.0, "vrex_beta": 0.0, "coral_coef": 1.0, "coral_queue": 40}
    stage = stage_of(Causal(**knobs, general_ratio=1.0))
    values = []
    for _ in range(5):
        stage.train(1)
        values.append(stage.strategies[0].metrics()["coral"])
    assert values[:3] == [0.0] * 3  # 8, 16 and 24 rows
    assert min(values[3:]) > 0


# --- refusals


def test_what_could_never_act_is_refused():
    with pytest.raises(ValueError, match="coral_queue to 32"):
        stage_of(Causal(coral_coef=1.0))
    with pytest.raises(ValueError, match="fewer than min_rows_per_env"):
        stage_of(Causal(min_rows_per_env=5))
    with pytest.raises(ValueError, match="one environment alone"):
        stage_of(Causal(), general=[]).streams()
    with pytest.raises(ValueError, match="fewer than two"):
        stage_of(Causal(environments="tags"))
    stage = stage_of(Causal(), start=False)
    stage.ctx.pairs = {"training": Pairs("counterfactual", [-1] * 24, "none")}
    with pytest.raises(ValueError, match="no training row has a counterpart"):
        stage.strategies[0].on_task_start(stage.ctx)


def test_a_state_of_other_pairs_is_refused():
    first, second = stage_of(Causal()), stage_of(Causal())
    first.streams()
    second.ctx.pairs = {"training": Pairs("counterfactual", range(24), "other")}
    second.streams()
    with pytest.raises(ValueError, match="pairs are not those"):
        second.strategies[0].load_state_dict(first.strategies[0].state_dict())


def test_it_brings_the_risks_of_the_environments_together():
    gaps = []
    for strength in (0.0, 10.0):
        knobs = {"consistency_coef": 0.0, "min_rows_per_env": 1}
        general = [[3, 4, 5, 3, 4, 5]] * 20  # easy beside random rows
        stage = stage_of(Causal(**knobs), strength=strength, general=general)
        stage.train(40)
        stage.ctx.coefs["causal"] = 1e-9
        stage.strategies[0].on_step_start(stage.ctx)
        stage.gradients()
        gaps.append(stage.strategies[0].metrics()["risk_gap"])
    assert gaps[1] < 0.7 * gaps[0]


def test_it_brings_pairs_together():
    values = []
    for coef in (1e-9, 5.0):
        stage = stage_of(Causal(consistency_coef=coef, cf_fraction=1.0, vrex_beta=0.0))
        stage.train(40)
        values.append(stage.strategies[0].metrics()["consistency"])
    assert values[1] < 0.7 * values[0]
