"""Freezing on a real Llama: what is frozen does not move by a bit, whatever else pulls at it."""

import pytest
import torch

from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.quadratic import L2SpConfig
from app.errors import TrainingFailed
from tests.tiny import make_tiny_model
from tests.workers.strategies.stage import Stage
from tests.workers.training.runs import make_plan, make_run, same, weights
from workers.strategies.base import Needs, Strategy
from workers.strategies.methods.freeze import Freeze
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.loop import train_step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"), layers=4)


def run_of(scratch, base, *configs, kind="full", strategies=None, start=True):
    plan = make_plan(scratch, base=base, strategies=configs, training={"type": kind})
    return make_run(plan, strategies=strategies, start=start)


def turn(run, strength):
    run.use(run.controller.model_copy(update={"strengths": {"freeze": strength}}))


def everything(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def moved(run, before):
    """Layers, `embed` and `norm`, whatever moved since."""
    found = set()
    for name, value in run.model.named_parameters():
        if not torch.equal(value, before[name]):
            parts = name.split(".")
            found.add(parts[parts.index("layers") + 1] if "layers" in parts else parts[-2])
    return found


def test_the_bottom_layers_have_neither_gradients_nor_optimiser_state(tmp_path, base):
    run = run_of(tmp_path, base, FreezeConfig(strength=0.5))
    before = everything(run)
    row = [train_step(run) for _ in range(3)][-1]
    assert moved(run, before) == {"2", "3", "norm"}
    assert row.values["strategy/freeze/frozen_layers"] == 2
    frozen = [p for n, p in run.all_params.items() if n not in run.ctx.params]
    assert row.values["strategy/freeze/frozen_parameters"] == sum(p.numel() for p in frozen)
    assert len(run.optimizer.state) == len(run.ctx.params)
    assert not any(p.requires_grad or p in run.optimizer.state for p in frozen)


def test_with_adapters_those_of_the_bottom_layers_stay_without_effect(tmp_path, base):
    run = run_of(tmp_path, base, FreezeConfig(strength=0.5), kind="lora")
    before = everything(run)
    for _ in range(3):
        train_step(run)
    assert moved(run, before) <= {"2", "3"}
    pairs = {pair.name: pair for pair in run.all_pairs}
    assert len(run.ctx.lora_pairs) == len(pairs) // 2
    for name, pair in pairs.items():
        is_frozen = any(f".layers.{k}." in name for k in (0, 1))
        assert bool(pair.lora_B.any()) != is_frozen


def test_embeddings_may_go_on_learning(tmp_path, base):
    run = run_of(tmp_path, base, FreezeConfig(strength=0.25, embeddings=False))
    before = everything(run)
    train_step(run)
    assert moved(run, before) == {"embed_tokens", "1", "2", "3", "norm"}


class Pusher(Strategy):
    """Moves every parameter at the very end of a step."""

    kind = "zz_pusher"

    def step_needs(self, ctx):
        return Needs(snapshot=True)

    def edit_update(self, ctx, old, delta):
        return {name: step + 0.01 for name, step in delta.items()}


def test_the_controller_freezes_further_layers_and_nothing_moves_them(tmp_path, base):
    """Neither momentum, nor another strategy's pull, gradient or last word."""
    from workers.strategies.methods.l2sp import L2Sp

    strategies = (Freeze(), L2Sp(penalty_mode="implicit"), Pusher())
    run = run_of(tmp_path, base, strategies=strategies)
    strengths = {"freeze": 0.25, "l2sp": 3.0}
    run.use(run.controller.model_copy(update={"strengths": strengths}))
    train_step(run)
    before = everything(run)
    strengths = {"freeze": 0.75, "l2sp": 3.0}
    run.use(run.controller.model_copy(update={"strengths": strengths}))
    row = [train_step(run) for _ in range(3)][-1]
    assert moved(run, before) == {"3", "norm"}
    assert row.values["strategy/freeze/frozen_layers"] == 3


def test_lowered_again_they_go_on_but_what_the_job_froze_does_not(tmp_path, base):
    run = run_of(tmp_path, base, FreezeConfig(strength=0.25))
    before = everything(run)
    turn(run, 0.9)
    train_step(run)
    assert moved(run, before) == {"3", "norm"}
    turn(run, 0.0)  # below what was asked: the controller never does that
    row = train_step(run)
    assert moved(run, before) == {"1", "2", "3", "norm"}
    assert row.values["strategy/freeze/frozen_layers"] == 1


def test_the_top_layer_always_learns(tmp_path, base):
    run = run_of(tmp_path, base, FreezeConfig(strength=0.5))
    before = everything(run)
    turn(run, 1.0)
    train_step(run)
    assert moved(run, before) == {"3", "norm"}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_whose_freezing_was_raised_resumes_bit_for_bit(tmp_path, base, kind):
    configs = (FreezeConfig(strength=0.25), L2SpConfig(penalty_mode="gradient"))
    first = run_of(tmp_path, base, *configs, kind=kind)
    train_step(first)
    strengths = {**first.controller.strengths, "freeze": 0.5}
    first.use(first.controller.model_copy(update={"strengths": strengths}))
    train_step(first)
    saved = save_checkpoint(first, tmp_path, 1)
    second = run_of(tmp_path, base, *configs, kind=kind, start=False)
    load_checkpoint(second, saved.directory)
    for run in (first, second):
        for _ in range(3):
            train_step(run)
    assert same(weights(second), weights(first))
    assert first.history[-1].values == second.history[-1].values


def test_nothing_left_to_train_is_refused(tmp_path, base):
    run = run_of(tmp_path, base, FreezeConfig(strength=0.5))
    strategy = run.strategies[0]
    lowest = frozenset(n for n in run.all_params if ".layers.0." in n)
    with pytest.raises(ValueError, match="none of the weights"):
        strategy.edit_trainable(run.ctx, lowest)


def test_a_model_without_layers_is_refused_when_the_run_begins():
    with pytest.raises(ValueError, match="no list of layers"):
        Stage([Freeze()], {"freeze": 0.5})


def test_where_a_strategy_does_not_fit_the_run_says_so(tmp_path, base):
    class Unfit(Strategy):
        kind = "unfit"

        def edit_trainable(self, ctx, names):
            raise ValueError("does not fit")

    with pytest.raises(TrainingFailed, match="does not fit"):
        run_of(tmp_path, base, strategies=(Unfit(),))
