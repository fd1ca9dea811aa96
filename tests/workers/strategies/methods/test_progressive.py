"""Progressive tuning on the tiny model: what is really displaced, and what the references are."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from app.domain.configs.progressive import ProgressiveConfig
from tests.workers.strategies.stage import Stage, same
from workers.strategies.base import Strategy
from workers.strategies.directions import Direction, write_trajectory
from workers.strategies.methods.progressive import Progressive

F64 = torch.float64
both_kinds = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


class Spy(Strategy):
    """Notes gradients and displacements as they come out."""

    kind = "zz_spy"

    def __init__(self):
        self.old, self.deltas, self.grads = {}, [], []

    def edit_grads(self, ctx):
        self.old = {name: p.detach().clone() for name, p in ctx.params.items()}
        self.grads.append({name: p.grad.clone() for name, p in ctx.params.items()})

    def on_step_end(self, ctx):
        self.deltas.append({name: p.detach() - self.old[name] for name, p in ctx.params.items()})


def make(strength=1.0, *, lora=False, start=True, models=None, **knobs):
    knobs = {"curriculum": "none", "mix_start": None, **knobs}
    strategy, spy = Progressive(**knobs), Spy()
    coefs = {"progressive": strength, "zz_spy": 1.0}
    stage = Stage([strategy, spy], coefs, lora=lora, start=False)
    stage.ctx.num_tasks = 2
    stage.ctx.models = models or {}
    if start:
        strategy.on_task_start(stage.ctx)
    return stage, strategy, spy


def cosine(left, right):
    return float(torch.dot(left, right) / (left.norm() * right.norm()))


def flat(tensors, names):
    return torch.cat([tensors[name].reshape(-1) for name in names])


def blocks_of(stage):
    names = list(stage.params)
    return [names] if stage.lora else [[name] for name in names]


@both_kinds
def test_displacements_after_the_warm_up_are_in_the_cone_around_the_mean_of_its_steps(lora):
    """Behind AdamW and its decay; the mean is written out by hand."""
    stage, strategy, spy = make(0.9, lora=lora, mode="cone", warmup_ref_steps=4, ref_beta=0.7)
    stage.train(4)
    mean = {name: 0.3 * d for name, d in spy.deltas[0].items()}
    for delta in spy.deltas[1:]:
        mean = {name: 0.7 * mean[name] + 0.3 * d for name, d in delta.items()}
    for name, held in strategy.reference.held.items():
        assert torch.allclose(held, mean[name], atol=1e-15)
    stage.train(6)
    for delta in spy.deltas[4:]:
        for names in blocks_of(stage):
            assert cosine(flat(delta, names), flat(mean, names)) >= 0.9 - 1e-9
    for name, held in strategy.reference.held.items():
        assert torch.allclose(held, mean[name], atol=1e-15)  # the early phase's, once and for all


def test_a_global_cone_holds_all_weights_together_and_both_cosines_are_reported():
    found = {}
    for scope in ("block", "global"):
        stage, strategy, spy = make(
            0.8, mode="cone", reference="general", scope=scope, ref_refresh=1, ref_rows=20
        )
        stage.train(3)
        names = list(stage.params)
        numbers = strategy.metrics()
        held, delta = strategy.reference.held, spy.deltas[-1]
        whole = cosine(flat(delta, names), flat(held, names))
        assert numbers["cos_global"] == pytest.approx(whole, abs=1e-6)
        own = [cosine(delta[n].reshape(-1), held[n].reshape(-1)) for n in names if held[n].any()]
        assert numbers["cos_block_min"] == pytest.approx(
            min(own) if scope == "block" else whole, abs=1e-6
        )
        found[scope] = min(own), whole
        assert numbers["applied_norm"] > 0
        assert 0 < numbers["length_kept"] < 1
    assert found["block"][0] >= 0.8 - 1e-6
    assert found["global"][1] >= 0.8 - 1e-6
    assert found["global"][0] < 0.8


@both_kinds
def test_the_general_reference_is_minus_the_gradient_over_all_general_tokens(lora):
    stage, strategy, _ = make(0.5, lora=lora, mode="cone", reference="general", ref_rows=20)
    stage.ctx.step = 0
    strategy.on_step_start(stage.ctx)
    nats, count = torch.zeros((), dtype=F64), 0
    for ids in stage.general:
        logits = stage.model(torch.tensor([ids[:-1]]), torch.arange(1, len(ids) - 1))
        nats = nats + F.cross_entropy(logits, torch.tensor(ids[2:]), reduction="sum")
        count += len(ids) - 2
    expected = torch.autograd.grad(nats / count, list(stage.params.values()), allow_unused=True)
    for (name, held), grad in zip(strategy.reference.held.items(), expected, strict=True):
        missing: bool = grad is None
        right = torch.zeros_like(held) if missing else -grad
        assert torch.allclose(held, right, atol=1e-12), name
    assert all(p.grad is None for p in stage.params.values())


def test_the_general_reference_is_renewed_every_so_many_steps_and_never_from_memory():
    stage, strategy, _ = make(0.5, mode="cone", reference="general", ref_refresh=3, ref_rows=5)
    seen = []
    for _ in range(7):
        stage.train(1)
        seen.append(next(iter(strategy.reference.held.values())).clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False, True]


class Against(Strategy):
    """Makes the task's gradient oppose the general one."""

    kind = "aa_against"

    def __init__(self, strategy):
        self.strategy = strategy

    def add_grads(self, ctx):
        for name, r in self.strategy.reference.held.items():
            ctx.params[name].grad.add_(3.0 * r)  # r is minus the general gradient


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_gem_takes_the_share_of_the_conflict_out_of_the_whole_gradient(strength):
    stage, strategy, spy = make(strength, ref_refresh=1, ref_rows=20)
    against = Against(strategy)
    before = {}

    class Before(Strategy):
        kind = "ab_before"

        def edit_grads(self, ctx):
            before.update({n: p.grad.clone() for n, p in ctx.params.items()})

    stage.strategies = [against, Before(), strategy, spy]
    for s in stage.strategies:
        stage.ctx.coefs[s.kind] = strength if s is strategy else 1.0
    stage.train(1)
    names = list(stage.params)
    general = -flat(strategy.reference.held, names)
    g, after = flat(before, names), flat(spy.grads[0], names)
    assert torch.dot(g, general) < 0
    expected = g - strength * torch.dot(g, general) / torch.dot(general, general) * general
    assert torch.allclose(after, expected, atol=1e-12)
    if strength == 1.0:
        assert abs(float(torch.dot(after, general))) < 1e-12 * float(g.norm() * general.norm())
    numbers = strategy.metrics()
    assert numbers["applied_norm"] == pytest.approx(float((after - g).norm()))
    assert numbers["cos_general"] == pytest.approx(cosine(g, general))


def test_gpm_leaves_what_old_inputs_give_as_it_was_behind_adam_and_decay():
    stage, strategy, spy = make(mode="gpm", gpm_threshold=0.9, gpm_rows=20)
    bases = strategy.bases.bases
    assert set(bases) == {"layer.weight", "head.weight"}
    stage.train(5)
    for name, basis in bases.items():
        assert 0 < basis.shape[1] < basis.shape[0]
        for grads, delta in zip(spy.grads, spy.deltas, strict=True):
            assert (grads[name] @ basis).norm() <= 1e-14 * (1 + grads[name].norm())
            assert (delta[name] @ basis).norm() <= 1e-14
            assert delta[name].norm() > 1e-4
    assert strategy.metrics()["applied_norm"] > 0
    assert 0 < strategy.metrics()["closed_share"] < 1


def test_gpm_on_a_fresh_adapter_makes_its_whole_change_invisible_on_old_inputs():
    stage, strategy, _ = make(lora=True, mode="gpm", gpm_threshold=0.9, gpm_rows=20)
    size = float(stage.base.layer.lora_A.detach().norm())
    assert float(stage.model.layer.lora_A.detach().norm()) == pytest.approx(size)
    stage.train(5)
    layer, basis = stage.model.layer, strategy.bases.bases["layer.lora_A"]
    change = layer.lora_B @ layer.lora_A
    assert change.norm() > 1e-3
    assert (change @ basis).norm() <= 1e-13


def test_gpm_learns_the_finished_tasks_inputs_too():
    stage, strategy, _ = make(mode="gpm", gpm_threshold=0.9, gpm_rows=2)
    first = {name: basis.clone() for name, basis in strategy.bases.bases.items()}
    stage.train(2)
    strategy.on_task_end(stage.ctx)
    for name, basis in first.items():
        longer = strategy.bases.bases[name]
        assert torch.equal(longer[:, : basis.shape[1]], basis)
    assert any(strategy.bases.bases[n].shape[1] > b.shape[1] for n, b in first.items())
    stage.ctx.task_index = 1
    stage.train(2)
    learnt = dict(strategy.bases.bases)
    strategy.on_task_end(stage.ctx)  # nothing comes after the last task
    assert all(strategy.bases.bases[name] is basis for name, basis in learnt.items())


def test_a_weight_that_a_later_task_adds_learns_the_general_inputs_alone():
    stage, strategy, _ = make(mode="gpm", gpm_threshold=0.9, gpm_rows=20)
    learnt = dict(strategy.bases.bases)
    del strategy.bases.bases["layer.weight"]
    stage.ctx.task_index = 1
    strategy.on_task_start(stage.ctx)
    assert strategy.bases.bases["head.weight"] is learnt["head.weight"]
    assert strategy.bases.bases["layer.weight"].shape == learnt["layer.weight"].shape
    frozen, _, _ = make(mode="gpm", gpm_rows=20, start=False)
    del frozen.ctx.params["layer.weight"], frozen.ctx.params["head.weight"]
    frozen.strategies[0].on_task_start(frozen.ctx)
    assert not frozen.strategies[0].bases.bases


def test_the_next_task_is_held_to_the_last_ones_mean_from_its_first_step():
    stage, strategy, spy = make(0.9, mode="cone", warmup_ref_steps=100, ref_beta=0.5)
    stage.train(4)
    assert not strategy.reference.held
    mean = {name: r.clone() for name, r in strategy.reference.recorded.items()}
    strategy.on_task_end(stage.ctx)
    stage.ctx.task_index = 1
    strategy.on_task_start(stage.ctx)
    stage.train(2)
    for delta in spy.deltas[4:]:
        for name, r in mean.items():
            assert cosine(delta[name].reshape(-1), r.reshape(-1)) >= 0.9 - 1e-9


def test_weights_of_another_task_are_no_reference():
    stage, strategy, _ = make(0.9, mode="cone", warmup_ref_steps=2)
    strategy.reference.held = {"another.weight": torch.ones(2)}
    strategy.on_task_start(stage.ctx)
    assert not strategy.reference.held
    stage.train(1)
    assert strategy.metrics()["applied_norm"] == 0
    stage.train(2)
    assert strategy.reference.held.keys() == stage.params.keys()


def write_direction(directory, stage, seed=3):
    generator = torch.Generator().manual_seed(seed)
    name = "layer.weight"
    direction = Direction(torch.randn(6, 6, generator=generator))
    write_trajectory(directory, {name: direction})
    return direction.whole().double()


def test_a_recorded_direction_holds_the_weight_that_has_one(tmp_path):
    stage, strategy, spy = make(
        0.7,
        mode="cone",
        reference="trajectory",
        reference_models=("earlier",),
        models={"earlier": str(tmp_path)},
        start=False,
    )
    r = write_direction(tmp_path, stage)
    strategy.on_task_start(stage.ctx)
    stage.train(3)
    for delta in spy.deltas:
        assert cosine(delta["layer.weight"].reshape(-1), r.reshape(-1)) >= 0.7 - 1e-7
    assert strategy.metrics()["blocks_free"] == pytest.approx(3 / 4)  # of 4 weights 1 has one


def test_an_adapter_follows_a_direction_of_its_effective_weight(tmp_path):
    """Held to cos(effective change, r) > 0 from factors alone: the axis is the pulled-back direction."""
    stage, strategy, spy = make(
        0.9,
        lora=True,
        mode="cone",
        reference="trajectory",
        reference_models=("earlier",),
        models={"earlier": str(tmp_path)},
        start=False,
    )
    r = write_direction(tmp_path, stage)
    strategy.on_task_start(stage.ctx)
    layer = stage.model.layer
    for _ in range(4):
        A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        stage.train(1)
        dA, dB = spy.deltas[-1]["layer.lora_A"], spy.deltas[-1]["layer.lora_B"]
        effective = layer.scale * (dB @ A + B @ dA)
        assert float((effective * r).sum()) > 0
        pulled = torch.cat(
            [(layer.scale * B.T @ r).reshape(-1), (layer.scale * r @ A.T).reshape(-1)]
        )
        assert cosine(torch.cat([dA.reshape(-1), dB.reshape(-1)]), pulled) >= 0.9 - 1e-7


def test_references_that_are_missing_or_do_not_fit_stop_the_start(tmp_path):
    knobs = {"mode": "cone", "reference": "trajectory", "reference_models": ("earlier",)}
    with pytest.raises(ValueError, match="has not been fetched"):
        make(0.5, **knobs)
    write_trajectory(tmp_path, {"layer.weight": Direction(torch.zeros(5, 6))})
    with pytest.raises(ValueError, match=r"progressive: the reference's layer.weight has shape"):
        make(0.5, models={"earlier": str(tmp_path)}, **knobs)
    stage, strategy, _ = make(0.5, mode="cone", reference="general", start=False)
    stage.ctx.num_general_rows = 0
    with pytest.raises(ValueError, match="no general rows"):
        strategy.on_task_start(stage.ctx)
    stage, strategy, _ = make(mode="gpm", start=False)
    stage.ctx.num_general_rows = 0
    with pytest.raises(ValueError, match="no general rows"):
        strategy.on_task_start(stage.ctx)


def test_a_trajectory_is_published_whatever_the_strength(tmp_path):
    stage, strategy, _ = make(0.0, mode="none", record_trajectory=True, start=False)
    strategy.on_task_start(stage.ctx)
    plain = Stage([], {}).train(3)
    stage.train(3)
    assert same(stage.weights(), plain.weights())
    strategy.export_files(stage.ctx, tmp_path)
    assert (tmp_path / "trajectory.safetensors").is_file()
    silent = Progressive(mode="none")
    silent.export_files(stage.ctx, tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["held/layer.weight", "start/unknown", "basis/layer.weight"])
def test_a_state_that_does_not_fit_is_refused(key):
    _, strategy, _ = make(mode="cone", warmup_ref_steps=1)
    state = strategy.state_dict()
    state["tensors"] = {key: torch.zeros(2, 1)}
    with pytest.raises(ValueError, match="state of progressive"):
        strategy.load_state_dict(state)
    state["tensors"] = {"difficulty/training": torch.zeros(3)}
    with pytest.raises(ValueError, match="difficulties of 3 rows"):
        strategy.load_state_dict(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "a_gem", "reference": "ema"}, "is not for mode 'a_gem'"),
        ({"mode": "gpm", "reference": "general"}, "is not for mode 'gpm'"),
        ({"mode": "cone", "reference": "trajectory"}, "names 1 models"),
        (
            {"mode": "cone", "reference": "difference", "reference_models": ("a",)},
            "names 2 models",
        ),
        ({"reference_models": ("a",)}, "names 0 models"),
        ({"mode": "cone", "armed": True}, "a cone's strength is a cosine"),
        ({"mode": "none", "curriculum": "none", "mix_start": None}, "'none' needs"),
        ({"strength": 1.5}, "less than or equal to 1"),
        ({"mix_end": 0.01}, "greater than or equal to 0.05"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ProgressiveConfig(**fields)


def test_what_a_configuration_says_of_itself():
    assert ProgressiveConfig(mode="cone").strength == 0.8
    assert ProgressiveConfig(mode="cone", strength=0.0).strength == 0.0
    assert ProgressiveConfig().strength is None
    named = ProgressiveConfig(mode="cone", reference="difference", reference_models=("b", "a"))
    assert named.named_models() == (("reference_models", "b"), ("reference_models", "a"))
    alone = {"curriculum": "nll", "mix_start": None}
    assert ProgressiveConfig(mode="none", **alone).reads_general_rows is False
    assert ProgressiveConfig(mode="cone", **alone).reads_general_rows is False
    for fields in ({"mode": "none"}, {"mode": "gpm", **alone}, alone):
        assert ProgressiveConfig(**fields).reads_general_rows
    general = ProgressiveConfig(mode="cone", reference="general", **alone)
    assert general.reads_general_rows
