"""The hybrid optimiser against closed forms, torch's own decay, and written-out steps."""

import math

import pytest
import torch
from torch import nn

from app.domain.configs.hybrid import HybridOptimizerConfig, check_hybrid_optimizer
from app.errors import BadRequest
from tests.workers.strategies.stage import Stage, same
from workers.strategies.context import Context, LoraPair
from workers.strategies.decay import largest_rate, total_shrink
from workers.strategies.methods.hybrid_optimizer import HybridOptimizer
from workers.strategies.penalties import apply_pulls
from workers.strategies.pulls import Pull

F64 = torch.float64


class Linear(nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(5, generator=generator, dtype=dtype))


def context_of(model, *, steps=100, strength=1.0, pairs=(), schedule=lambda _: 1.0, num_tasks=1):
    return Context(
        model=model,
        params={n: p for n, p in model.named_parameters() if p.requires_grad},
        lora_pairs=pairs,
        coefs={"hybrid_optimizer": strength},
        run_seed=1,
        device=torch.device("cpu"),
        batch_size=1,
        num_training_rows=1,
        num_general_rows=0,
        num_tasks=num_tasks,
        task_steps=steps,
        schedule=schedule,
    )


def begin(strategy, ctx, learning_rate, weight_decay=0.0):
    group = {
        "params": list(ctx.params.values()),
        "names": list(ctx.params),
        "lr": learning_rate,
        "base_lr": learning_rate,
        "weight_decay": weight_decay,
    }
    groups = strategy.edit_param_groups(ctx, [group])
    strategy.on_task_start(ctx)
    return groups


def decay(strategy, ctx, learning_rate, steps, extra=()):
    """The decay of so many steps in which nothing else moves; the step goes on counting."""
    for _ in range(steps):
        factor = ctx.schedule(ctx.step - ctx.task_first_step)
        ctx.learning_rates = dict.fromkeys(ctx.params, learning_rate * factor)
        strategy.on_step_start(ctx)
        apply_pulls(ctx.params, [strategy.prox_pulls(ctx), *extra], ctx.learning_rates)
        strategy.on_step_end(ctx)
        ctx.step += 1


def test_without_gradient_the_distance_from_the_anchor_shrinks_as_the_closed_form_says():
    model = Linear()
    ctx = context_of(model)
    strategy = HybridOptimizer(wd_backbone=0.3)
    begin(strategy, ctx, 0.02)
    anchor = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.5)
        start, bias = model.weight.detach().clone(), model.bias.detach().clone()
    decay(strategy, ctx, 0.02, 100)
    expected = anchor + (1 - 0.02 * 0.3) ** 100 * (start - anchor)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=2e-14)
    assert torch.equal(model.bias, bias)  # vectors never decay


def test_toward_zero_and_without_gradient_it_is_torch_s_own_decay():
    ours, theirs = Linear(), Linear()
    ctx = context_of(ours)
    strategy = HybridOptimizer(wd_backbone=0.3, decay_anchor="zero")
    begin(strategy, ctx, 0.02)
    optimizer = torch.optim.AdamW([theirs.weight], lr=0.02, weight_decay=0.3)
    for _ in range(50):
        theirs.weight.grad = torch.zeros_like(theirs.weight)
        optimizer.step()
    decay(strategy, ctx, 0.02, 50)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-14, atol=0)


def test_decay_and_another_pull_are_one_implicit_step():
    model = Linear()
    ctx = context_of(model)
    strategy = HybridOptimizer(wd_backbone=0.3)
    begin(strategy, ctx, 0.02)
    own = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(0.7)
        start = model.weight.detach().clone()
    importance, other = torch.rand(5, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    decay(strategy, ctx, 0.02, 1, [{"weight": Pull(40.0, importance, other)}])
    first, second = 0.3 / (1 - 0.02 * 0.3), 40.0 * importance
    expected = (start + 0.02 * (first * own + second * other)) / (1 + 0.02 * (first + second))
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-14)


def test_the_implicit_step_tends_to_the_explicit_one():
    """Weighted by importance: the difference of one step falls as the square of the learning rate."""
    gaps = []
    for rate in (1e-2, 1e-3, 1e-4):
        model = Linear()
        ctx = context_of(model)
        strategy = HybridOptimizer(wd_backbone=1.0, importance="gradient_ema", importance_decay=0.0)
        begin(strategy, ctx, rate)
        anchor = model.weight.detach().clone()
        model.weight.grad = torch.arange(1.0, 21.0, dtype=F64).view(5, 4)
        strategy.on_step_end(ctx)
        with torch.no_grad():
            model.weight.add_(1.0)
            start = model.weight.detach().clone()
        decay(strategy, ctx, rate, 1)
        square = model.weight.grad**2
        explicit = start - rate * square / square.mean() * (start - anchor)
        gaps.append(float((model.weight.detach() - explicit).abs().max()))
        exact = anchor + (start - anchor) / (1 + rate * square / square.mean())
        torch.testing.assert_close(model.weight.detach(), exact, rtol=0, atol=1e-14)
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(100, rel=0.1)


def test_importance_is_the_running_mean_of_squared_gradients():
    model = Linear()
    ctx = context_of(model)
    strategy = HybridOptimizer(wd_backbone=0.1, importance="gradient_ema", importance_decay=0.8)
    begin(strategy, ctx, 0.02)
    generator = torch.Generator().manual_seed(2)
    seen = []
    for _ in range(6):
        model.weight.grad = torch.randn(5, 4, generator=generator, dtype=F64)
        seen.append(model.weight.grad**2)
        strategy.on_step_end(ctx)
    weights = [0.8**5, *(0.2 * 0.8 ** (5 - k) for k in range(1, 6))]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * s for w, s in zip(weights, seen, strict=True))
    torch.testing.assert_close(strategy.squares["weight"], expected, rtol=1e-12, atol=0)
    assert set(strategy.squares) == {"weight"}


@pytest.mark.parametrize(
    ("wd", "scaled", "free"),
    [(1e-5, 2.0e-6, 0.0952), (1e-3, 2.0e-4, 0.99995), (0.1, 1.98e-2, None)],
)
def test_the_implied_shrink_of_ten_thousand_steps_at_2e_5(wd, scaled, free):
    for mode, expected in (("lr_scaled", scaled), ("lr_free", free)):
        if expected is None:
            continue
        config = HybridOptimizerConfig(wd_backbone=wd, decay_mode=mode, force=True)
        strategy = HybridOptimizer(**config.model_dump(exclude={"type", "strength", "armed"}))
        said: dict[str, tuple[str, dict[str, float]]] = {}
        ctx = context_of(Linear(), steps=10_000)
        ctx.note = lambda code, text, data, said=said: said.update({code: (text, data)})
        begin(strategy, ctx, 2e-5)
        shrink = strategy.metrics()["implied_shrink_backbone"]
        assert shrink == pytest.approx(expected, rel=5e-3 if expected < 0.9 else 1e-5)
        factor = 2e-5 if mode == "lr_scaled" else 1.0
        assert shrink == pytest.approx(1 - (1 - factor * wd) ** 10_000, rel=1e-9)
        text, data = said["decay_shrink"]
        assert data == {"implied_shrink_backbone": shrink}
        assert f"{100 * shrink:.3g} %" in text
        assert mode in text


def cosine(step):
    return 0.5 * (1 + math.cos(math.pi * step / 300))


@pytest.mark.parametrize(("force", "num_tasks"), [(False, 1), (False, 2), (True, 1)])
def test_lr_free_decay_stops_at_half_of_the_way_over_the_run_unless_forced(force, num_tasks):
    model = Linear()
    ctx = context_of(model, steps=300, schedule=cosine, num_tasks=num_tasks, strength=2.0)
    strategy = HybridOptimizer(
        wd_backbone=0.02, decay_mode="lr_free", decay_anchor="zero", force=force
    )
    start = model.weight.detach().clone()
    for task in range(num_tasks):
        ctx.task_index, ctx.task_first_step = task, 300 * task
        begin(strategy, ctx, 2e-5)
        decay(strategy, ctx, 2e-5, 300)
    left = 0.5
    if force:
        left = math.prod(1 - 0.04 * cosine(k) for k in range(300))
        assert left < 0.01
    torch.testing.assert_close(model.weight.detach(), left * start, rtol=1e-12, atol=0)
    total = 1 - (1 - strategy.metrics()["implied_shrink_backbone"]) ** num_tasks
    assert total == pytest.approx(1 - left, rel=1e-12)


def test_the_largest_rate_is_where_the_shrink_is_reached():
    factors = torch.tensor([1.0, 0.25, 0.5], dtype=F64)
    rate = largest_rate(factors, 0.5)
    assert (1 - rate) * (1 - rate / 4) * (1 - rate / 2) == pytest.approx(0.5, rel=1e-14)
    assert total_shrink(factors, rate) == pytest.approx(0.5, rel=1e-14)


def test_decay_below_float32_s_rounding_is_not_lost():
    """2e-8 a step: torch's own decay rounds it at each step, here it comes due in portions."""
    model = Linear(torch.float32)
    theirs = model.weight.detach().clone()
    start = theirs.double()
    ctx = context_of(model, steps=2_000)
    strategy = HybridOptimizer(wd_backbone=1e-4, decay_anchor="zero")
    begin(strategy, ctx, 2e-4)
    optimizer = torch.optim.AdamW([theirs], lr=2e-4, weight_decay=1e-4)
    for _ in range(2_000):
        theirs.grad = torch.zeros_like(theirs)
        optimizer.step()
    decay(strategy, ctx, 2e-4, 2_000)
    wished = 1 - (1 - 2e-8) ** 2_000
    measured = 1 - (model.weight.detach().double() / start)
    assert float((measured - wished).abs().max()) < 0.02 * wished
    assert float(measured.mean()) == pytest.approx(wished, rel=5e-3)
    assert torch.equal(
        theirs.double(), start
    )  # a step of 2e-8 is below half a unit in the last place


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(5, 4, dtype=F64), requires_grad=False)
        self.a = nn.Parameter(torch.randn(2, 4, dtype=F64))
        self.b = nn.Parameter(torch.randn(5, 2, dtype=F64))


@pytest.mark.parametrize("anchor", ["auto", "zero", "pretrained"])
def test_adapters_decay_toward_no_change(anchor):
    model = Adapted()
    pair = LoraPair("layer", model.a, model.b, 1.0, model.base)
    ctx = context_of(model, pairs=(pair,))
    said = []
    ctx.note = lambda code, text, data: said.append(text)
    strategy = HybridOptimizer(wd_adapter=0.5, decay_anchor=anchor)
    begin(strategy, ctx, 0.02)
    start_a = model.a.detach().clone()
    with torch.no_grad():
        model.a.add_(1.0)
    moved_a, moved_b = model.a.detach().clone(), model.b.detach().clone()
    decay(strategy, ctx, 0.02, 10)
    kept = (1 - 0.01) ** 10
    torch.testing.assert_close(model.b.detach(), kept * moved_b, rtol=1e-13, atol=0)
    expected = {
        "auto": moved_a,
        "zero": kept * moved_a,
        "pretrained": start_a + kept * (moved_a - start_a),
    }[anchor]
    torch.testing.assert_close(model.a.detach(), expected, rtol=1e-13, atol=1e-14)
    assert "wd_backbone applies to nothing" in said[0]
    assert set(strategy.anchor) == ({"a"} if anchor == "pretrained" else set())


def test_the_anchor_stays_where_the_run_began_over_tasks():
    model = Linear()
    ctx = context_of(model, num_tasks=2)
    strategy = HybridOptimizer()
    start = model.weight.detach().clone()
    begin(strategy, ctx, 0.02)
    with torch.no_grad():
        model.weight.add_(1.0)
    ctx.task_index = 1
    begin(strategy, ctx, 0.02)
    assert torch.equal(strategy.anchor["weight"], start)


def test_layer_wise_steps_have_their_length_and_keep_their_direction():
    model = Linear()
    ctx = context_of(model)
    ctx.learning_rates = dict.fromkeys(ctx.params, 0.01)
    generator = torch.Generator().manual_seed(5)
    old = {
        "weight": 30 * torch.randn(5, 4, generator=generator, dtype=F64),
        "bias": torch.ones(5, dtype=F64),
    }
    delta = {n: torch.randn(p.shape, generator=generator, dtype=F64) for n, p in old.items()}
    norm = float(old["weight"].norm())
    assert norm > 10
    for kind, length in (("lamb", 0.01 * 10.0), ("lars", 0.01 * 1e-3 * norm)):
        strategy = HybridOptimizer(trust_ratio="lamb" if kind == "lamb" else "lars")
        begin(strategy, ctx, 0.01)
        new = strategy.edit_update(ctx, old, dict(delta))
        assert float(new["weight"].norm()) == pytest.approx(length, rel=1e-12)
        ratio = length / float(delta["weight"].norm())
        torch.testing.assert_close(new["weight"], ratio * delta["weight"], rtol=1e-12, atol=0)
        assert new["bias"] is delta["bias"]
        assert strategy.metrics()["trust_ratio"] == pytest.approx(ratio, rel=1e-12)
        still = strategy.edit_update(ctx, old, {"weight": torch.zeros(5, 4, dtype=F64)})
        assert not still["weight"].any()


def test_decay_of_the_optimiser_beside_it_is_refused():
    ctx = context_of(Linear())
    with pytest.raises(ValueError, match="weight_decay must be 0"):
        begin(HybridOptimizer(), ctx, 0.02, weight_decay=0.01)
    ctx.coefs["hybrid_optimizer"] = 0.0
    begin(HybridOptimizer(), ctx, 0.02, weight_decay=0.01)


def test_what_it_can_not_go_with_is_refused_at_submit():
    def check(lora=False, weight_decay=0.0, **fields):
        config = HybridOptimizerConfig(**fields)
        check_hybrid_optimizer((config,), lora=lora, weight_decay=weight_decay)

    for fields in ({}, {"armed": True}, {"strength": 0.0, "optimizer": "sgd"}):
        with pytest.raises(BadRequest, match="decay twice") as caught:
            check(weight_decay=0.01, **fields)
        assert caught.value.param == "training.weight_decay"
    check(weight_decay=0.01, strength=0.0)
    check(weight_decay=0.01, wd_backbone=0.0, wd_adapter=0.0, layer_decay=0.9)
    with pytest.raises(BadRequest, match="hardly move"):
        check(lora=True, trust_ratio="lamb")
    check(trust_ratio="lamb")


def test_a_state_of_other_groups_or_weights_is_refused():
    stage = Stage([HybridOptimizer(wd_backbone=0.1)], {"hybrid_optimizer": 1.0}).train(1)
    state = stage.strategies[0].state_dict()
    other = Stage([HybridOptimizer(decay_anchor="zero")], {"hybrid_optimizer": 1.0})
    with pytest.raises(ValueError, match="other groups, anchor or decay mode"):
        other.strategies[0].load_state_dict(state)
    own = Stage([HybridOptimizer(wd_backbone=0.1)], {"hybrid_optimizer": 1.0}).strategies[0]
    cut = {k: t for k, t in state["tensors"].items() if k != "anchor/layer.weight"}
    with pytest.raises(ValueError, match=r"layer\.weight is missing"):
        own.load_state_dict({**state, "tensors": cut})
    wrong = {**state["tensors"], "anchor/layer.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="has shape"):
        own.load_state_dict({**state, "tensors": wrong})
    odd = {**state["tensors"], "anchor/elsewhere": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="belongs to no trained weight"):
        own.load_state_dict({**state, "tensors": odd})


def test_stronger_decay_leaves_the_weights_nearer_to_where_they_started():
    """Over a real optimiser and a real loss."""
    start = Stage([], {}).weights()
    distances = []
    for strength in (0.0, 1.0, 10.0):
        strategy = HybridOptimizer(wd_backbone=0.5)
        stage = Stage([strategy], {"hybrid_optimizer": strength}).train(30)
        end = stage.weights()
        distances.append(float((end["layer.weight"] - start["layer.weight"]).norm()))
    assert distances[0] > 1.1 * distances[1] > 1.2 * distances[2]
    plain = Stage([], {}).train(30).weights()
    zero = Stage([HybridOptimizer(wd_backbone=0.5)], {"hybrid_optimizer": 0.0}).train(30)
    assert same(zero.weights(), plain)
