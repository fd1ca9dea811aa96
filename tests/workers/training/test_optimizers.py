"""Optimisers in the real loop: groups, rates, resumes and ranks, with the strategy that chooses them and without."""

import pytest
import torch

from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.quadratic import EwcConfig
from app.errors import TrainingFailed
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.runs import make_plan, make_run, same, tiny_base, weights
from workers.strategies.base import OptimizerChoice, Strategy
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.loop import train_step

KINDS = ("full", "lora")
EVERYTHING = HybridOptimizerConfig(
    wd_backbone=0.5,
    wd_adapter=0.5,
    decay_anchor="pretrained",
    importance="gradient_ema",
    layer_decay=0.8,
    lora_plus_ratio=4.0,
)
CONFIGS = {
    "adamw": HybridOptimizerConfig(wd_backbone=0.5, wd_adapter=0.5),
    "lamb": EVERYTHING.model_copy(update={"trust_ratio": "lamb"}),
    "lr_free": HybridOptimizerConfig(decay_mode="lr_free", wd_backbone=1e-2, wd_adapter=1e-2),
    "radam": EVERYTHING.model_copy(update={"optimizer": "radam"}),
    "sgd": HybridOptimizerConfig(optimizer="sgd", wd_backbone=0.5, wd_adapter=0.5),
    "adafactor": HybridOptimizerConfig(optimizer="adafactor", wd_backbone=0.5, wd_adapter=0.5),
}
kind = pytest.mark.parametrize("kind", KINDS)


def run_of(scratch, *configs, kind="full", strategies=None, start=True, training=None):
    numbers = {"type": kind, "weight_decay": 0.0, **(training or {})}
    plan = make_plan(scratch, strategies=configs, training=numbers)
    return make_run(plan, strategies=strategies, start=start)


def train(run, steps):
    return [train_step(run) for _ in range(steps)]


def test_without_the_strategy_it_is_fused_adamw_with_the_job_s_decay(tmp_path):
    run = run_of(tmp_path, training={"weight_decay": 0.03})
    assert type(run.optimizer) is torch.optim.AdamW
    assert run.optimizer.defaults["fused"]
    decays = {g["weight_decay"]: {p.ndim for p in g["params"]} for g in run.optimizer.param_groups}
    assert decays == {0.03: {2}, 0.0: {1}}


@kind
def test_with_neutral_knobs_and_no_strength_it_is_bit_identical_to_plain_training(tmp_path, kind):
    plain = run_of(tmp_path, kind=kind)
    armed = run_of(tmp_path, CONFIGS["adamw"].model_copy(update={"armed": True}), kind=kind)
    without_decay = HybridOptimizerConfig(wd_backbone=0.0, wd_adapter=0.0)
    idle = run_of(tmp_path, without_decay, kind=kind)
    for run in (plain, armed, idle):
        train(run, 20)
    assert same(weights(armed), weights(plain))
    assert same(weights(idle), weights(plain))


@kind
def test_decay_moves_the_weights_and_says_so(tmp_path, kind):
    plain, decayed = run_of(tmp_path, kind=kind), run_of(tmp_path, CONFIGS["adamw"], kind=kind)
    train(plain, 3)
    values = train(decayed, 3)[-1].values
    assert not same(weights(decayed), weights(plain))
    assert values["strategy/hybrid_optimizer/applied_norm"] > 0
    shrink = "adapter" if kind == "lora" else "backbone"
    assert 0 < values[f"strategy/hybrid_optimizer/implied_shrink_{shrink}"] < 0.02


@kind
@pytest.mark.parametrize("name", CONFIGS)
def test_groups_hold_every_parameter_exactly_once(tmp_path, kind, name):
    run = run_of(tmp_path, CONFIGS[name], kind=kind)
    held = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in run.model.parameters() if p.requires_grad}
    for group in run.optimizer.param_groups:
        assert [id(run.ctx.params[n]) for n in group["names"]] == [id(p) for p in group["params"]]
        assert len({p.ndim >= 2 for p in group["params"]}) == 1


def test_layers_nearer_to_the_input_learn_more_slowly(tmp_path):
    run = run_of(tmp_path, HybridOptimizerConfig(layer_decay=0.5, strength=0.0))
    train_step(run)
    top = run.ctx.learning_rates["model.norm.weight"]
    for name, rate in run.ctx.learning_rates.items():
        share = {"embed": 0.25, "rs.0.": 0.5}.get(next((k for k in ("embed", "rs.0.") if k in name), ""), 1.0)  # fmt: skip
        assert rate == pytest.approx(share * top, rel=1e-12), name
    assert run.history[-1].learning_rate == top


def test_adapters_may_learn_at_two_rates(tmp_path):
    run = run_of(tmp_path, HybridOptimizerConfig(lora_plus_ratio=16.0), kind="lora")
    train_step(run)
    rates = run.ctx.learning_rates
    for name, rate in rates.items():
        if "lora_A" in name:
            assert rates[name.replace("lora_A", "lora_B")] == pytest.approx(16 * rate, rel=1e-12)


class Spy(Strategy):
    """The gradients that the optimiser saw."""

    kind = "zz_spy"

    def on_step_end(self, ctx):
        self.seen = {n: p.grad.detach().clone() for n, p in ctx.params.items()}


def test_the_optimiser_chosen_is_in_force_at_any_strength(tmp_path):
    """SGD's first step is minus the learning rate times the gradient."""
    from workers.strategies.methods.hybrid_optimizer import HybridOptimizer

    spy = Spy()
    run = run_of(tmp_path, strategies=(HybridOptimizer(optimizer="sgd"), spy))
    before = weights(run)
    train_step(run)
    for name, new in weights(run).items():
        expected = before[name] - run.ctx.learning_rates[name] * spy.seen[name]
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-8)
    assert run.ctx.strength("hybrid_optimizer") == 0


def test_with_layer_wise_steps_a_matrix_moves_by_its_own_length(tmp_path):
    run = run_of(tmp_path, HybridOptimizerConfig(trust_ratio="lamb", wd_backbone=0.1))
    before = weights(run)
    train_step(run)
    for name, new in weights(run).items():
        if new.ndim == 2:
            moved = float((new.double() - before[name].double()).norm())
            length = run.ctx.learning_rates[name] * min(float(before[name].norm()), 10.0)
            assert moved == pytest.approx(length, rel=1e-2), name


def optimizer_shapes(run):
    state = run.optimizer.state
    return {
        (name, key): (value.dtype, value.shape, value.device)
        for name, parameter in run.ctx.params.items()
        for key, value in state.get(parameter, {}).items()
    }


# layer-wise steps are refused at submit with adapters
@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in CONFIGS for k in KINDS if (n, k) != ("lamb", "lora")]
)
def test_a_loaded_checkpoint_goes_on_bit_identically(tmp_path, name, kind):
    configs = (CONFIGS[name], EwcConfig(fisher_samples=8), FreezeConfig(strength=0.5))
    first = run_of(tmp_path, *configs, kind=kind)
    train(first, 4)
    saved = save_checkpoint(first, tmp_path, 1)
    second = run_of(tmp_path, *configs, kind=kind, start=False)
    torch.manual_seed(99)
    load_checkpoint(second, saved.directory)
    assert optimizer_shapes(second) == optimizer_shapes(first) != {}
    for run in (first, second):
        train(run, 6)
    assert same(weights(second), weights(first))
    assert [row.values for row in second.history] == [row.values for row in first.history]


def test_a_checkpoint_of_other_groups_is_refused(tmp_path):
    saved = save_checkpoint(run_of(tmp_path, CONFIGS["adamw"]), tmp_path, 1)
    other = run_of(tmp_path, CONFIGS["lr_free"], start=False)
    with pytest.raises(TrainingFailed, match="other groups, anchor or decay mode"):
        load_checkpoint(other, saved.directory)


def test_two_strategies_can_not_both_choose(tmp_path):
    class Chooser(Strategy):
        kind = "chooser"

        def choose_optimizer(self, ctx):
            return OptimizerChoice("sgd")

    class Other(Chooser):
        kind = "other"

    with pytest.raises(TrainingFailed, match="chooser and other both choose"):
        run_of(tmp_path, strategies=(Chooser(), Other()))


def run_in_float64(scratch, base, kind, ranks=None):
    config = EVERYTHING if kind == "lora" else CONFIGS["lamb"]
    plan = make_plan(
        scratch,
        base=base,
        strategies=(config, FreezeConfig(strength=0.5)),
        training={"type": kind, "weight_decay": 0.0, "max_tokens_per_micro_batch": 120},
    )
    run = make_run(plan, dtype=torch.float64, ranks=ranks)
    run.spare_padding = None
    raised = {**run.controller.strengths, "hybrid_optimizer": 3.0}
    train(run, 2)
    run.use(run.controller.model_copy(update={"strengths": raised}))
    train(run, 2)
    return {name: p.detach().numpy() for name, p in run.ctx.params.items()}


def train_rank(ranks, scratch, base):
    return {kind: run_in_float64(scratch, base, kind, ranks) for kind in KINDS}


def test_two_ranks_end_with_the_weights_of_one(tmp_path):
    first, second = on_two_ranks(train_rank, str(tmp_path), str(tiny_base()))
    for kind in KINDS:
        alone = run_in_float64(tmp_path, tiny_base(), kind)
        for name, value in alone.items():
            assert (first[kind][name] == second[kind][name]).all()
            assert abs(first[kind][name] - value).max() < 1e-10, name
