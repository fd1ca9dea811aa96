"""MAS: the sensitivity of the centred logits against closed forms and autograd, and its sequences."""

import pytest
import torch

from tests.workers.strategies.linear import Linear, draw_pairs, linear_context
from tests.workers.strategies.stage import F64, WIDTH, Stage
from workers.strategies.methods.mas import Mas, measure_sensitivity


def stage_of(strategy=None, *, strength=1.0, **overrides):
    return Stage([strategy] if strategy else [], {"mas": strength}, **overrides)


def test_sensitivity_of_a_linear_map_is_the_closed_form():
    """|2 z_k x_j| of the centred logits z, whatever the labels."""
    model = Linear()
    ids, labels = draw_pairs()

    def measured(with_labels):
        ctx = linear_context(model, "mas", ids, with_labels)
        return measure_sensitivity(ctx, range(40))["importance/weight"]

    x = model.features[ids]
    z = x @ model.weight.detach().T
    z = z - z.mean(1, keepdim=True)
    expected = (2 * z[:, :, None] * x[:, None, :]).abs().mean(0)
    torch.testing.assert_close(measured(labels), expected, rtol=1e-12, atol=0)
    assert torch.equal(measured(labels), measured(labels.flip(0)))  # label-free


def test_a_shift_of_all_logits_changes_no_sensitivity():
    stage = stage_of()
    before = measure_sensitivity(stage.ctx, range(20))
    stage.model.head.bias.data.add_(3.0)
    after = measure_sensitivity(stage.ctx, range(20))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("micro_rows", [1, 7])
def test_sensitivity_is_exact_document_by_document(micro_rows):
    stage = stage_of(micro_rows=micro_rows)
    measured = measure_sensitivity(stage.ctx, range(20))
    total = {name: torch.zeros_like(p) for name, p in stage.params.items()}
    tokens = 0
    for row in stage.general:
        ids = torch.tensor(row)
        logits = stage.model(ids[None, :-1], torch.arange(1, len(row) - 1))
        value = ((logits - logits.mean(-1, keepdim=True)) ** 2).sum()
        grads = torch.autograd.grad(value, list(stage.params.values()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad.abs()
        tokens += len(row) - 2
    for name, value in total.items():
        torch.testing.assert_close(measured[f"importance/{name}"], value / tokens)


def test_factors_with_adapters_are_the_means_of_the_full_sensitivity():
    adapted, full = stage_of(lora=True), stage_of()
    with torch.no_grad():
        full.model.load_state_dict(
            {
                **{n: p for n, p in adapted.model.state_dict().items() if "layer" not in n},
                "layer.weight": adapted.model.layer.base.weight,
            }
        )
    whole = measure_sensitivity(full.ctx, range(20))["importance/layer.weight"]
    factors = measure_sensitivity(adapted.ctx, range(20))
    torch.testing.assert_close(factors["rows/layer"], whole.mean(1))
    torch.testing.assert_close(factors["columns/layer"], whole.mean(0) / whole.mean())


@pytest.mark.parametrize("lora", [False, True])
def test_the_end_of_a_task_adds_its_own_sensitivity(lora):
    strategy = Mas(importance_samples=8)
    stage = stage_of(strategy, lora=lora, boundary=3).train(3)
    first = {name: value.clone() for name, value in strategy.importance.items()}
    stage.train(1)
    assert stage.ctx.task_index == 1
    if lora:
        assert {"task0/rows/layer", "task0/A/layer", "task0/B/layer"} <= strategy.importance.keys()
    else:
        added = strategy.importance["importance/layer.weight"] - first["importance/layer.weight"]
        assert (added >= 0).all()
        assert float(added.sum()) > 0


def test_strength_holds_important_weights_nearer_to_the_anchor():
    distances = []
    for strength in (0.0, 30.0, 3000.0):
        strategy = Mas(importance_samples=20)
        stage = stage_of(strategy, strength=strength).train(30)
        moved = {n: (p.detach() - strategy.anchor[n]) ** 2 for n, p in stage.params.items()}
        distances.append(
            sum(float((strategy.importance[f"importance/{n}"] * m).sum()) for n, m in moved.items())
        )
    assert distances[0] > 1.5 * distances[1] > 2 * distances[2]


def test_without_general_rows_it_says_so():
    with pytest.raises(ValueError, match="mas: there are no general rows"):
        stage_of(Mas(), general=[])


def test_the_adapter_term_is_that_of_the_effective_change():
    strategy = Mas(importance_samples=8, rho=None)
    stage = stage_of(strategy, lora=True, strength=2.0)
    layer = stage.model.layer
    rng = torch.Generator().manual_seed(7)
    layer.lora_B.data.copy_(torch.randn(WIDTH, 2, generator=rng, dtype=F64))
    importance = torch.outer(
        strategy.importance["rows/layer"], strategy.importance["columns/layer"]
    )
    A, B = (x.detach().clone().requires_grad_() for x in (layer.lora_A, layer.lora_B))
    (2.0 * 0.5 * (importance * (layer.scale * B @ A) ** 2).sum()).backward()
    strategy.add_grads(stage.ctx)
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)
