"""The Fisher against enumeration, and elastic weight consolidation against joint training."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.workers.strategies.linear import Linear, draw_pairs, linear_context
from tests.workers.strategies.stage import (
    F64,
    WIDTH,
    Stage,
    make_micro,
    make_rows,
)
from workers.strategies import importance as passes
from workers.strategies.importance import clip_at_quantile, normalize_importance
from workers.strategies.methods import ewc
from workers.strategies.methods.ewc import Ewc, measure_fisher
from workers.strategies.penalties import apply_pulls


def stage_of(strategy=None, *, strength=1.0, **overrides):
    return Stage([strategy] if strategy else [], {"ewc": strength}, **overrides)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def enumerated_fisher(stage):
    """Sum over positions and *all* labels of q(label) * score^2, per token, by autograd."""
    micro = make_micro([("general", i, row, False) for i, row in enumerate(stage.general)])
    logits_NV = stage.model(micro.input_ids_BT, micro.positions_N)
    names, params = zip(*stage.params.items(), strict=True)
    total = {name: torch.zeros_like(p) for name, p in zip(names, params, strict=True)}
    for log_q_V in logits_NV.log_softmax(-1):
        for log_q in log_q_V:
            grads = torch.autograd.grad(log_q, params, retain_graph=True, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    total[name] += log_q.exp().detach() * grad**2
    return {f"importance/{n}": value / len(logits_NV) for n, value in total.items()}


def flat(fisher):
    return torch.cat([fisher[name].flatten() for name in sorted(fisher)])


@pytest.fixture
def regression():
    """(context, features x, labels y, probabilities q) of 40 rows with one supervised token each."""
    model = Linear()
    ids, labels = draw_pairs()
    features = model.features[ids]
    probabilities = (features @ model.weight.detach().T).softmax(-1)
    return linear_context(model, "ewc", ids, labels), features, labels, probabilities


def test_empirical_fisher_of_softmax_regression_is_the_closed_form(regression):
    ctx, x, y, q = regression
    measured = measure_fisher(ctx, range(40), "empirical", 0)["importance/weight"]
    residual = q - F.one_hot(y, 4)
    expected = torch.einsum("nk,nj->kj", residual**2, x**2) / 40
    torch.testing.assert_close(measured, expected, rtol=1e-12, atol=0)


def test_true_fisher_of_softmax_regression_is_unbiased_and_not_the_empirical(regression):
    ctx, x, y, q = regression
    expected = torch.einsum("nk,nj->kj", q * (1 - q), x**2) / 40  # = the diagonal Hessian
    empirical = torch.einsum("nk,nj->kj", (q - F.one_hot(y, 4)) ** 2, x**2) / 40
    runs = [measure_fisher(ctx, range(40), "true", seed)["importance/weight"] for seed in range(60)]
    mean = torch.stack(runs).mean(0)
    assert (mean - expected).abs().sum() / expected.sum() < 0.06
    assert (empirical - expected).abs().sum() / expected.sum() > 0.3


@pytest.mark.parametrize("num_squares", [128, 3])
def test_error_of_the_true_fisher_shrinks_as_one_over_the_root_of_passes(monkeypatch, num_squares):
    monkeypatch.setattr(ewc, "NUM_SQUARES", num_squares)  # one row a square, and three
    stage = stage_of(general=make_rows(8, 2))
    expected = flat(enumerated_fisher(stage))
    runs = torch.stack(
        [flat(measure_fisher(stage.ctx, range(8), "true", seed)) for seed in range(160)]
    )

    def error(passes):
        means = runs.view(-1, passes, runs.shape[1]).mean(1)
        return float(((means - expected).abs().sum(1) / expected.sum()).mean())

    assert error(160) < 0.12
    assert 2.5 < error(10) / error(160) < 6.5  # 4 in expectation


def test_squaring_the_mean_of_a_batch_is_not_the_fisher():
    stage = stage_of()
    exact = flat(measure_fisher(stage.ctx, range(20), "empirical", 0))
    micro = make_micro([("general", i, row, False) for i, row in enumerate(stage.general)])
    loss = F.cross_entropy(stage.model(micro.input_ids_BT, micro.positions_N), micro.targets_N)
    grads = torch.autograd.grad(loss, list(stage.params.values()))
    assert sum(float((g**2).sum()) for g in grads) < 0.5 * float(exact.sum())


@pytest.mark.parametrize("micro_rows", [1, 3, 20])
def test_empirical_fisher_is_exact_document_by_document(micro_rows):
    stage = stage_of(micro_rows=micro_rows)
    measured = measure_fisher(stage.ctx, range(20), "empirical", 0)
    total = {name: torch.zeros_like(p) for name, p in stage.params.items()}
    tokens = 0
    for row in stage.general:
        ids = torch.tensor(row)
        logits = stage.model(ids[None, :-1], torch.arange(1, len(row) - 1))
        loss = F.cross_entropy(logits, ids[2:], reduction="sum")
        for name, grad in zip(
            total, torch.autograd.grad(loss, list(stage.params.values())), strict=True
        ):
            total[name] += grad**2
        tokens += len(row) - 2
    for name, value in total.items():
        torch.testing.assert_close(measured[f"importance/{name}"], value / tokens)


def test_the_pass_leaves_no_trace():
    stage = stage_of(lora=True, dropout=0.5)
    before, rng = stage.weights(), torch.get_rng_state()
    stage.layer_grad = torch.ones_like(stage.model.layer.lora_A)
    stage.model.layer.lora_A.grad = stage.layer_grad
    flags = {n: p.requires_grad for n, p in stage.model.named_parameters()}
    first = measure_fisher(stage.ctx, range(20), "true", 0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert stage.model.training
    assert {n: p.requires_grad for n, p in stage.model.named_parameters()} == flags
    assert all(torch.equal(before[n], p.detach()) for n, p in stage.model.named_parameters())
    assert torch.equal(stage.layer_grad, torch.ones_like(stage.layer_grad))
    assert stage.model.layer.base.weight.grad is None
    again = measure_fisher(stage.ctx, range(20), "true", 0)  # dropout is off
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_factors_with_adapters_are_the_means_of_the_full_fisher():
    adapted, full = stage_of(lora=True), stage_of()
    with torch.no_grad():
        full.model.load_state_dict(
            {
                **{n: p for n, p in adapted.model.state_dict().items() if "layer" not in n},
                "layer.weight": adapted.model.layer.base.weight,
            }
        )
    whole = measure_fisher(full.ctx, range(20), "true", 4)["importance/layer.weight"]
    factors = measure_fisher(adapted.ctx, range(20), "true", 4)
    torch.testing.assert_close(factors["rows/layer"], whole.mean(1))
    torch.testing.assert_close(factors["columns/layer"], whole.mean(0) / whole.mean())


def test_groups_of_layers_measure_what_all_at_once_do(monkeypatch):
    stage = stage_of(lora=True)
    other = stage.ctx.lora_pairs[0].__class__(
        "head", *(stage.model.layer.lora_A, stage.model.layer.lora_B), 1.0, stage.model.head.weight
    )
    stage.ctx.lora_pairs = (*stage.ctx.lora_pairs, other)
    at_once = measure_fisher(stage.ctx, range(20), "true", 0)
    monkeypatch.setattr(passes, "GROUP_ELEMENTS", 1)
    one_by_one = measure_fisher(stage.ctx, range(20), "true", 0)
    assert at_once.keys() == one_by_one.keys()
    for name, value in at_once.items():
        torch.testing.assert_close(one_by_one[name], value, rtol=1e-12, atol=0)


def test_normalised_mean_and_maximum_are_one():
    stage = stage_of()
    fisher = measure_fisher(stage.ctx, range(20), "true", 0)
    assert float(flat(normalize_importance(fisher, "mean")).mean()) == pytest.approx(1.0)
    assert float(flat(normalize_importance(fisher, "max")).max()) == pytest.approx(1.0)
    assert torch.equal(flat(normalize_importance(fisher, "none")), flat(fisher))


def test_normalised_factors_have_mean_and_maximum_one_over_all_layers():
    rng = generator()
    fisher = {}
    for layer, shape in (("a", (5, 7)), ("b", (3, 4))):
        matrix = torch.rand(shape, generator=rng, dtype=F64)
        fisher[f"rows/{layer}"] = matrix.mean(1)
        fisher[f"columns/{layer}"] = matrix.mean(0) / matrix.mean()

    def entries(factors):
        parts = []
        for layer in "ab":
            rows, columns = factors[f"rows/{layer}"], factors[f"columns/{layer}"]
            parts.append(torch.outer(rows, columns).flatten())
        return torch.cat(parts)

    assert float(entries(normalize_importance(fisher, "mean")).mean()) == pytest.approx(1.0)
    assert float(entries(normalize_importance(fisher, "max")).max()) == pytest.approx(1.0)


def test_clip_cuts_off_at_the_quantile_of_all_values():
    values = torch.arange(1.0, 1001.0)
    fisher = {"importance/a": values[:400].clone(), "importance/b": values[400:].clone()}
    clipped = clip_at_quantile(fisher, 0.9)
    assert float(clipped["importance/b"].max()) == 900.0
    assert torch.equal(clipped["importance/a"], fisher["importance/a"])
    assert torch.equal(flat(clip_at_quantile(fisher, 1.0)), flat(fisher))
    mostly_zero = {"importance/a": torch.tensor([0.0] * 99 + [1.0])}
    assert float(clip_at_quantile(mostly_zero, 0.9)["importance/a"].max()) == 1.0


def test_fisher_is_computed_once_for_all_jobs_that_differ_only_in_how_it_is_used():
    kept, passes = {}, []

    def cached(key, make):
        if key not in kept:
            passes.append(key)
            kept[key] = make()
        return kept[key]

    first = stage_of(Ewc(fisher_samples=8), cached=cached)
    stage_of(Ewc(fisher_samples=8, fisher_clip=0.5, fisher_normalize="max"), cached=cached)
    third = stage_of(Ewc(fisher_samples=8), cached=cached)
    assert len(passes) == 1
    mine, other = (flat(s.strategies[0].importance) for s in (first, third))
    assert torch.equal(mine, other)
    stage_of(Ewc(fisher_samples=8, fisher_type="empirical"), cached=cached)
    stage_of(Ewc(fisher_samples=9), cached=cached)
    assert len(set(passes)) == 3


def quadratics(count, seed=5):
    """Curvatures and targets of diagonal quadratics."""
    rng = generator(seed)
    curvatures = [torch.rand(6, generator=rng, dtype=F64) + 0.1 for _ in range(count)]
    return curvatures, [torch.randn(6, generator=rng, dtype=F64) for _ in range(count)]


def minimise(strategy, stage, curvature, target, steps=500):
    """Proximal gradient descent on a quadratic and the strategy's penalty."""
    parameter = stage.ctx.params["w"]
    for _ in range(steps):
        explicit = parameter.detach() - 0.2 * curvature * (parameter.detach() - target)
        parameter.data.copy_(explicit)
        apply_pulls({"w": parameter}, [strategy.prox_pulls(stage.ctx)], {"w": 0.2})


def test_sequential_tasks_end_at_the_joint_minimiser_when_curvature_is_exact():
    """Three diagonal quadratics with gamma = 1: each trained against the one anchor of those before."""
    curvatures, targets = quadratics(3)
    strategy = Ewc(gamma=1.0, anchor="latest")
    parameter = nn.Parameter(targets[0].clone())
    stage = stage_of()
    stage.ctx.params = {"w": parameter}
    for curvature, target in zip(curvatures, targets, strict=True):
        if strategy.importance:
            minimise(strategy, stage, curvature, target)
        strategy.consolidate(stage.ctx, {"importance/w": curvature})
    joint = sum(c * t for c, t in zip(curvatures, targets, strict=True)) / sum(curvatures)
    torch.testing.assert_close(parameter.detach(), joint, rtol=0, atol=1e-12)


def test_with_the_anchor_at_the_base_ends_at_own_minima_give_the_joint_minimiser():
    """Each task ends at its own minimum, as with the strength at 0; the last is held by all before it."""
    curvatures, targets = quadratics(4)
    strategy = Ewc(gamma=1.0, anchor="base")
    parameter = nn.Parameter(targets[0].clone())
    stage = stage_of()
    stage.ctx.params = {"w": parameter}
    for curvature, target in zip(curvatures[:3], targets[:3], strict=True):
        parameter.data.copy_(target)
        strategy.consolidate(stage.ctx, {"importance/w": curvature})
    minimise(strategy, stage, curvatures[3], targets[3])
    joint = sum(c * t for c, t in zip(curvatures, targets, strict=True)) / sum(curvatures)
    torch.testing.assert_close(parameter.detach(), joint, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_one_anchor_pulls_like_the_sum_of_the_base_and_the_decayed_tasks(gamma):
    importances, ends = quadratics(4)
    importances[2][0] = 0.0
    strategy = Ewc(gamma=gamma)
    parameter = nn.Parameter(torch.zeros(6, dtype=F64))
    stage = stage_of()
    stage.ctx.params = {"w": parameter}
    for importance, end in zip(importances, ends, strict=True):
        parameter.data.copy_(end)
        strategy.consolidate(stage.ctx, {"importance/w": importance})
    here = torch.randn(6, generator=generator(9), dtype=F64, requires_grad=True)
    weights = [1.0, gamma**2, gamma, 1.0]  # the base does not decay
    parts = zip(weights, importances, ends, strict=True)
    (0.5 * sum((w * f * (here - a) ** 2).sum() for w, f, a in parts)).backward()
    ours = strategy.importance["importance/w"] * (here.detach() - strategy.anchor["w"])
    torch.testing.assert_close(ours, here.grad, rtol=1e-12, atol=1e-12)


def test_a_weight_that_matters_to_nobody_keeps_a_finite_anchor():
    strategy = Ewc()
    stage = stage_of()
    stage.ctx.params = {"w": nn.Parameter(torch.ones(3, dtype=F64))}
    for _ in range(3):
        strategy.consolidate(stage.ctx, {"importance/w": torch.zeros(3, dtype=F64)})
    assert strategy.anchor["w"].tolist() == [1.0, 1.0, 1.0]


def test_former_importance_decays_and_the_anchor_is_a_copy():
    strategy = Ewc(gamma=0.5, anchor="latest")
    stage = stage_of()
    parameter = nn.Parameter(torch.zeros(2, dtype=F64))
    stage.ctx.params = {"w": parameter}
    for value in (4.0, 2.0, 1.0):
        parameter.data.fill_(value)
        strategy.consolidate(stage.ctx, {"importance/w": torch.full((2,), value, dtype=F64)})
    assert strategy.importance["importance/w"].tolist() == [3.0, 3.0]  # 4/4 + 2/2 + 1
    parameter.data.fill_(9.0)
    assert strategy.anchor["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("place", ["base", "latest"])
def test_with_adapters_the_penalty_is_the_sum_over_tasks_of_weighted_distances(place):
    """Against the effective weights written out, with autograd for the gradient."""
    rng = generator(3)
    stage = stage_of(lora=True)
    stage.ctx.num_tasks = 3
    layer = stage.model.layer
    strategy = Ewc(gamma=0.5, anchor=place, rho=None)
    first = {"rows/layer": torch.rand(WIDTH, generator=rng, dtype=F64)}
    first["columns/layer"] = torch.rand(WIDTH, generator=rng, dtype=F64)
    strategy.importance = dict(first)
    fishers, changes = [torch.outer(*first.values())], [torch.zeros(WIDTH, WIDTH, dtype=F64)]
    for task in range(2):
        stage.ctx.task_index = task
        layer.lora_A.data.normal_(generator=rng)
        layer.lora_B.data.normal_(generator=rng)
        new = {name: torch.rand(WIDTH, generator=rng, dtype=F64) for name in first}
        strategy.consolidate(stage.ctx, new)
        fishers.append(torch.outer(*new.values()))
        changes.append(layer.scale * (layer.lora_B @ layer.lora_A).detach())
    weights = [1.0, 0.5, 1.0]
    if place == "latest":
        weights, changes = [0.25, 0.5, 1.0], [changes[-1]] * 3
    layer.lora_A.data.normal_(generator=rng)
    layer.lora_B.data.normal_(generator=rng)
    A, B = (x.detach().clone().requires_grad_() for x in (layer.lora_A, layer.lora_B))
    parts = zip(weights, fishers, changes, strict=True)
    value = 0.5 * sum((w * f * (layer.scale * B @ A - c) ** 2).sum() for w, f, c in parts)
    value.backward()
    penalty = strategy.pair_penalty(stage.ctx.lora_pairs[0])
    torch.testing.assert_close(penalty.value, value.detach())
    torch.testing.assert_close(penalty.grad_A_RI, A.grad)
    torch.testing.assert_close(penalty.grad_B_OR, B.grad)


@pytest.mark.parametrize("lora", [False, True])
def test_the_end_of_a_task_adds_the_fisher_of_its_own_rows_and_the_base_stays(lora):
    calls, seen = [], []

    def cached(key, make):
        calls.append(key)
        return make()

    strategy = Ewc(fisher_samples=8)
    stage = stage_of(strategy, cached=cached, lora=lora).train(3)
    stage.ctx.num_tasks = 2
    first, start = dict(strategy.importance), dict(strategy.anchor)
    read = stage.ctx.store_micros

    def store_micros(store, rows):
        seen.append((store, list(rows)))
        return read(store, rows)

    stage.ctx.store_micros = store_micros
    strategy.on_task_end(stage.ctx)
    assert [store for store, _ in seen] == ["training"]
    assert len(seen[0][1]) == 8
    stage.ctx.task_index = 1
    strategy.on_task_start(stage.ctx)
    assert len(calls) == 1  # the starting model's alone
    if lora:
        assert all(torch.equal(strategy.importance[name], first[name]) for name in first)
        assert "task0/rows/layer" in strategy.importance
    else:
        name = "importance/layer.weight"
        own = measure_fisher(stage.ctx, seen[0][1], "true", 0, store="training")
        assert flat(own).sum() > 0
        assert (strategy.importance[name] >= first[name]).all()
        end, new = stage.model.layer.weight.detach(), strategy.anchor["layer.weight"]
        low, high = (
            torch.minimum(end, start["layer.weight"]),
            torch.maximum(end, start["layer.weight"]),
        )
        assert ((new >= low - 1e-12) & (new <= high + 1e-12)).all()  # a weighted mean of the two
        assert not torch.equal(new, start["layer.weight"])
    before = dict(strategy.importance)
    strategy.on_task_end(stage.ctx)  # after the last one nothing comes that it would hold
    assert all(strategy.importance[name] is value for name, value in before.items())


def test_switched_off_online_keeps_the_base_anchor_alone():
    strategy = Ewc(fisher_samples=8, online=False)
    stage = stage_of(strategy).train(3)
    stage.ctx.num_tasks = 2
    before = (dict(strategy.importance), dict(strategy.anchor))
    strategy.on_task_end(stage.ctx)
    stage.ctx.task_index = 1
    strategy.on_task_start(stage.ctx)
    assert all(strategy.importance[n] is t for n, t in before[0].items())
    assert all(strategy.anchor[n] is t for n, t in before[1].items())


@pytest.mark.parametrize("lora", [False, True])
def test_a_state_from_a_later_task_is_taken_up_whole(lora):
    def begin():
        strategy = Ewc(fisher_samples=8)
        stage = stage_of(strategy, lora=lora)
        stage.ctx.num_tasks = 3
        stage.stores["training-1"] = stage.training
        return strategy, stage

    strategy, stage = begin()
    for task in range(2):
        stage.train(2)
        strategy.on_task_end(stage.ctx)
        stage.ctx.task_index = task + 1
        strategy.on_task_start(stage.ctx)
    state = strategy.state_dict()
    other, _ = begin()
    other.load_state_dict(state)
    again = other.state_dict()["tensors"]
    assert again.keys() == state["tensors"].keys()
    assert all(torch.equal(again[n], t) for n, t in state["tensors"].items())
    with pytest.raises(ValueError, match="belongs to no"):
        other.load_state_dict({**state, "tensors": {**state["tensors"], "task0/x": torch.zeros(1)}})


def test_the_document_fisher_is_the_sum_of_each_documents_own_squared_score():
    """The labels are those drawn; the right-hand side is one backward a document."""
    stage = stage_of(micro_rows=7)
    measured = measure_fisher(stage.ctx, range(20), "true", 3, estimator="document")
    total = {name: torch.zeros_like(p) for name, p in stage.params.items()}
    tokens = 0
    for index, row in enumerate(stage.general):
        micro = make_micro([("general", index, row, False)])
        logits = stage.model(micro.input_ids_BT, micro.positions_N)
        labels = ewc.sample_labels(logits.detach(), micro, 3)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        grads = torch.autograd.grad(loss, list(stage.params.values()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad**2
        tokens += len(row) - 2
    for name, value in total.items():
        torch.testing.assert_close(measured[f"importance/{name}"], value / tokens)


def test_the_document_fisher_errs_less_than_that_of_groups(monkeypatch):
    monkeypatch.setattr(ewc, "NUM_SQUARES", 2)
    stage = stage_of()
    expected = flat(enumerated_fisher(stage))

    def error(estimator):
        runs = [
            flat(measure_fisher(stage.ctx, range(20), "true", seed, estimator=estimator))
            for seed in range(30)
        ]
        return float((torch.stack(runs) - expected).abs().sum(1).mean() / expected.sum())

    assert 1.25 * error("document") < error("batch")


@pytest.mark.parametrize("lora", [False, True])
def test_states_that_do_not_fit_are_refused(lora):
    stage = stage_of(Ewc(fisher_samples=4), lora=lora)
    state = stage.strategies[0].state_dict()
    name = sorted(state["tensors"])[0]
    fresh = stage_of(Ewc(), lora=lora, start=False).strategies[0]
    missing = {n: t for n, t in state["tensors"].items() if n != name}
    with pytest.raises(ValueError, match="missing"):
        fresh.load_state_dict({**state, "tensors": missing})
    with pytest.raises(ValueError, match="shape"):
        fresh.load_state_dict({**state, "tensors": {**state["tensors"], name: torch.zeros(1)}})
    with pytest.raises(ValueError, match="belongs to no"):
        fresh.load_state_dict({**state, "tensors": {**state["tensors"], "x": torch.zeros(1)}})
    fresh.load_state_dict(state)
    assert torch.equal(flat(fresh.importance), flat(stage.strategies[0].importance))


def test_without_general_rows_it_says_so():
    with pytest.raises(ValueError, match="no general rows"):
        stage_of(Ewc(), general=[])
    with pytest.raises(ValueError, match="no supervised token"):
        stage_of(Ewc(), general=[[1, 2], [3, 4]])


def test_the_adapter_term_is_zero_before_the_first_step_and_closed_form_after():
    strategy = Ewc(fisher_samples=8, rho=None)
    stage = stage_of(strategy, lora=True, strength=2.0)
    layer = stage.model.layer
    rng = generator(7)
    for p in stage.params.values():
        p.grad = torch.zeros_like(p)
    strategy.add_grads(stage.ctx)
    assert not layer.lora_A.grad.any()
    assert not layer.lora_B.grad.any()
    layer.lora_B.data.copy_(torch.randn(WIDTH, 2, generator=rng, dtype=F64))
    strategy.add_grads(stage.ctx)
    rows, columns = strategy.importance["rows/layer"], strategy.importance["columns/layer"]
    importance = torch.outer(rows, columns)
    A, B = (x.detach().clone().requires_grad_() for x in (layer.lora_A, layer.lora_B))
    (2.0 * 0.5 * (importance * (layer.scale * B @ A) ** 2).sum()).backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)


def test_strength_holds_important_weights_nearer_to_the_anchor():
    distances = []
    for strength in (0.0, 30.0, 3000.0):
        strategy = Ewc(fisher_samples=20)
        stage = stage_of(strategy, strength=strength).train(30)
        moved = {n: (p.detach() - strategy.anchor[n]) ** 2 for n, p in stage.params.items()}
        distances.append(
            sum(float((strategy.importance[f"importance/{n}"] * m).sum()) for n, m in moved.items())
        )
    assert distances[0] > 1.5 * distances[1] > 2 * distances[2]
