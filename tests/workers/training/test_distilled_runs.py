"""Distillation and replay in the real loop: over stages, after a kill, with and without the starting model at hand."""

import pytest
import torch
from torch.nn import functional as F

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.runplan import StagePlan
from tests.workers.training.runs import (
    ListRows,
    make_plan,
    make_run,
    make_stores,
    make_training,
    same,
    weights,
)
from workers.strategies.base import Strategy
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.loop import train_step

KINDS = ("full", "lora")
kind = pytest.mark.parametrize("kind", KINDS)
SEQUENCE = (
    DistillationConfig(on=("generated",), generated_rows=6, generated_tokens=5, every=2),
    ReplayConfig(strength=0.5, domain_store_fraction=0.25, der_alpha=0.3, top_k=6),
)
ALONE = (
    DistillationConfig(on=("replay",), teacher="cached", top_k=6),
    ReplayConfig(strength=0.5, source="generated", generated_rows=6, generated_tokens=5),
)


def train(run, steps):
    return [train_step(run) for _ in range(steps)]


def two_stages(scratch, kind, configs, *, start=True):
    """Stages of four steps each, on rows of their own."""
    plan = make_plan(scratch, strategies=configs, training={"type": kind, "total_steps": 8})
    own = make_training(type=kind, total_steps=4)
    stages = tuple(
        StagePlan(name=name, training_rows=plan.training_rows, training=own) for name in "ab"
    )
    stores = {**make_stores(), "training-1": ListRows(40, seed=3)}
    return make_run(plan.model_copy(update={"stages": stages}), stores=stores, start=start)


@kind
@pytest.mark.parametrize("configs", [SEQUENCE, ALONE], ids=["sequence", "alone"])
@pytest.mark.parametrize("kill_at", [pytest.param(3, marks=pytest.mark.slow), 6])
def test_a_killed_sequence_goes_on_bit_for_bit(tmp_path, kind, configs, kill_at):
    whole = two_stages(tmp_path, kind, configs)
    train(whole, kill_at)
    saved = save_checkpoint(whole, tmp_path, 1)
    train(whole, 8 - kill_at)
    torch.manual_seed(99)
    resumed = two_stages(tmp_path, kind, configs, start=False)
    load_checkpoint(resumed, saved.directory)
    train(resumed, 8 - kill_at)
    assert same(weights(resumed), weights(whole))
    untimed = [row.model_copy(update={"seconds": 0.0}) for row in whole.history]
    assert [row.model_copy(update={"seconds": 0.0}) for row in resumed.history] == untimed
    if configs is SEQUENCE:
        assert {s.name for s in whole.streams} >= {"domain", "earlier-0", "replay"}
        assert whole.history[-1].values["strategy/replay/der_nats"] > 0


def test_rows_that_the_base_decodes_need_no_general_rows_and_the_same_in_every_stage(tmp_path):
    stores = {"training": ListRows(24, seed=1)}
    plan = make_plan(tmp_path, strategies=ALONE, general_rows=None)
    run = make_run(plan, stores=stores)
    values = train(run, 3)[-1].values
    assert values["strategy/replay/rows"] == 4
    assert values["strategy/distillation/kd_tokens"] > 0
    assert set(run.stores) == {"training", "replay-generated-0"}
    assert run.teacher._copy is None


@kind
def test_the_data_free_form_keeps_neither_rows_nor_logits(tmp_path, kind):
    config = DistillationConfig(on=("domain",), every=2)
    plan = make_plan(tmp_path, strategies=(config,), general_rows=None, training={"type": kind})
    run = make_run(plan, stores={"training": ListRows(24, seed=1)})
    values = [row.values["strategy/distillation/kd_tokens"] for row in train(run, 4)]
    assert values[0] == 0 < values[1]
    assert values[2] == values[1]  # the numbers of the last step that distilled
    saved = save_checkpoint(run, tmp_path, 1)
    assert run.strategies[0].state_dict()["tensors"] == {}
    assert (saved.directory / "strategy-distillation.safetensors").stat().st_size < 100
    assert set(run.stores) == {"training"}
    assert not list(tmp_path.glob("cache/strategies/*"))


@kind
def test_with_the_cache_the_teacher_is_not_run_in_training_and_jobs_share_it(
    tmp_path, kind, monkeypatch
):
    config = DistillationConfig(teacher="cached", top_k=8)
    first = make_run(make_plan(tmp_path, strategies=(config,), training={"type": kind}))
    files = list(tmp_path.glob("cache/strategies/*"))
    assert len(files) == 1
    assert first.teacher._copy is None  # let go of, once the cache is there

    def refuse(*_):
        raise AssertionError("the teacher was run")

    training = {"type": kind, "seed": 8, "lora": {"r": 2, "alpha": 4.0}}
    other = make_plan(tmp_path, strategies=(config,), training=training)
    for run in (first, make_run(other)):
        monkeypatch.setattr(run.teacher, "with_hidden", refuse)
        assert train(run, 3)[-1].values["strategy/distillation/applied_norm"] > 0
    assert list(tmp_path.glob("cache/strategies/*")) == files


@kind
def test_hidden_states_are_those_that_the_model_itself_gives(tmp_path, kind):
    run = make_run(make_plan(tmp_path, training={"type": kind}))
    micro = run.ctx.rows_micro("general", "general", [0, 1, 2])
    everything = torch.ones(len(micro.positions_N), dtype=torch.bool)
    layers = frozenset({0, 1, 2})
    started = run.ctx.base_hidden(micro, everything, layers)
    with torch.no_grad():
        for parameter in run.ctx.params.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found = run.ctx.forward(micro, layers).hidden_BTD
        own = run.model(
            micro.input_ids_BT, output_hidden_states=True, use_cache=False
        ).hidden_states
    assert run.ctx.num_layers == 2
    for layer in layers:
        torch.testing.assert_close(found[layer], own[layer])
        base = run.ctx.base_hidden(micro, everything, layers)[layer]
        assert torch.equal(base, started[layer])
        moved = own[layer].reshape(-1, own[layer].shape[-1])[micro.positions_N]
        assert (layer == 0 and kind == "lora") or not torch.allclose(base, moved, atol=1e-4)


class Spy(Strategy):
    """Keeps a step's gradients from before clipping, and its micro-batches."""

    kind = "zz_spy"

    def before_backward(self, ctx, micros):
        self.micros = list(micros)

    def edit_grads(self, ctx):
        self.found = {n: p.grad.detach().clone() for n, p in ctx.params.items()}


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_replayed_tokens_count_as_beta_tokens_in_the_one_mean(tmp_path, beta):
    config = ReplayConfig(strength=0.5, der_beta=beta)
    run = make_run(make_plan(tmp_path, strategies=(config,)), dtype=torch.float64)
    spy = Spy()
    run.strategies = (*run.strategies, spy)
    run.use(run.controller)
    reference = make_run(make_plan(tmp_path), dtype=torch.float64)
    train_step(run)
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for micro in spy.micros:
        logits = reference.student(micro.input_ids_BT, micro.positions_N)
        nats = F.cross_entropy(logits, micro.targets_N, reduction="none")
        weight = torch.where(micro.source_mask_N(frozenset({"replay"})), beta, 1.0)
        total, count = total + (nats * weight).sum(), count + float(weight.sum())
    expected = torch.autograd.grad(total / count, list(reference.ctx.params.values()))
    for gradient, right in zip(spy.found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-7)  # weights are float32
    if beta == 0.0:  # DER++ without its two terms is plain training on the same domain rows
        plain = make_run(make_plan(tmp_path), dtype=torch.float64, strategies=(other := Spy(),))
        train_step(plain)
        for name, gradient in other.found.items():
            torch.testing.assert_close(spy.found[name], gradient, rtol=0, atol=1e-12)
