"""Direct preference optimisation in the loop, held to written-out references."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from app.domain.configs.adapters import DomainAdaptersConfig
from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.memory import MemoryConfig
from app.domain.configs.progressive import ProgressiveConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig, MasConfig
from app.domain.configs.replay import ReplayConfig
from tests.workers.training.pairs import BETA, log_prob, make_pair_run, make_pairs
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.runs import push_off, same, tiny_base, weights
from workers.training.checkpoints import load_checkpoint, make_carry, save_checkpoint, set_carry
from workers.training.loop import train_step
from workers.training.preferences import judge

KINDS = ("full", "lora")
kind = pytest.mark.parametrize("kind", KINDS)

STRATEGIES = {
    "ewc": EwcConfig(fisher_samples=16),
    "mas": MasConfig(importance_samples=16),
    "l2sp": L2SpConfig(),
    "replay": ReplayConfig(strength=0.25),
    "replay_generated": ReplayConfig(strength=0.25, source="generated", generated_rows=8, generated_tokens=4),
    "replay_der": ReplayConfig(strength=0.25, weighting="fixed", der_alpha=0.5, top_k=8),
    "distillation": DistillationConfig(on=("general", "domain")),
    "distillation_generated": DistillationConfig(on=("generated",), generated_rows=8, generated_tokens=4),
    "progressive": ProgressiveConfig(ref_rows=8, curriculum="none", mix_start=None),
    "progressive_paced": ProgressiveConfig(mode="none", curriculum="nll"),
    "memory": MemoryConfig(strength=0.25, capacity=32),
    "hybrid_optimizer": HybridOptimizerConfig(optimizer="radam"),
    "freeze": FreezeConfig(),
    "domain_adapters": DomainAdaptersConfig(r=2),
}  # fmt: skip


def columns(*values):
    return torch.tensor(values, dtype=torch.float64)


def train(run, steps):
    for _ in range(steps):
        train_step(run)
    return run


def gradients(run):
    """Of the first step's loss, before the optimiser moves."""
    run.optimizer.step = lambda *_, **__: None
    found = {}
    run.optimizer.zero_grad = lambda **_: found.update(
        {name: p.grad.clone() for name, p in run.ctx.params.items() if p.grad is not None}
    )
    train_step(run)
    return found


# ---- the loss of a pair


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_the_loss_is_log_2_where_policy_and_reference_are_one(beta):
    policy = (columns(-3.0, -700.0, 0.0), columns(-9.0, -1.0, 0.0))
    found = judge(policy, policy, beta)
    assert found.losses_P.tolist() == [math.log(2)] * 3
    assert found.sums()["reward_margin"] == 0


def test_the_loss_is_equation_7():
    policy, reference = ((-2.0, -5.0), (-4.0, -3.0)), ((-3.0, -4.5), (-2.5, -3.5))
    won_and_lost = [(columns(*pair[0]), columns(*pair[1])) for pair in (policy, reference)]
    found = judge(won_and_lost[0], won_and_lost[1], 0.4)
    for place in range(2):
        won = policy[0][place] - reference[0][place]
        lost = policy[1][place] - reference[1][place]
        loss = -math.log(1 / (1 + math.exp(-0.4 * (won - lost))))
        assert float(found.losses_P[place]) == pytest.approx(loss, rel=1e-12)
        assert float(found.chosen_P[place]) == pytest.approx(0.4 * won)
        assert float(found.rejected_P[place]) == pytest.approx(0.4 * lost)


def test_the_gradient_of_the_loss_is_right():
    generator = torch.Generator().manual_seed(3)
    policy = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    first, second = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    reference = (first, second)
    for side in policy:
        side.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda won, lost: judge((won, lost), reference, 0.7).losses_P.sum(), policy
    )


def test_far_margins_neither_overflow_nor_lose_their_gradient():
    policy = (columns(-1e4, 0.0).requires_grad_(), columns(0.0, -1e4))
    zeros = (columns(0.0, 0.0), columns(0.0, 0.0))
    losses = judge(policy, zeros, 1.0).losses_P
    losses.sum().backward()
    assert losses.tolist() == [1e4, 0.0]
    assert policy[0].grad.tolist() == [-1.0, 0.0]


def test_trl_finds_the_same_loss_and_rewards():
    trainer = pytest.importorskip("trl", reason="trl is in the extra `bench`").DPOTrainer
    generator = torch.Generator().manual_seed(5)
    log_p = -torch.rand(6, 7, generator=generator)
    mask = (torch.rand(6, 8, generator=generator) > 0.4).long()
    mask[:, 2] = 1
    log_p = log_p * mask[:, 1:]
    reference = -torch.rand(2, 3, generator=generator) * 5
    inputs = {
        "input_ids": torch.zeros(6, 8, dtype=torch.long),
        "attention_mask": torch.ones(6, 8),
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    out = SimpleNamespace(
        log_probs=log_p,
        entropy=log_p,
        mean_logits=log_p,
        is_top1=torch.ones(6, 7, dtype=torch.bool),
    )
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    state = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
        beta=BETA,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    theirs = trainer._compute_loss(state, lambda **_: out, inputs, return_outputs=False)
    won, lost = log_p.sum(1).chunk(2)
    ours = judge((won, lost), (reference[0], reference[1]), BETA)
    assert float(ours.losses_P.mean()) == pytest.approx(float(theirs), rel=1e-6)
    told = {name: values[0] for name, values in metrics["train"].items() if "rewards" in name}
    sums = {name: float(value) / 3 for name, value in ours.sums().items()}
    assert told["rewards/margins"] == pytest.approx(sums["reward_margin"], rel=1e-5)
    assert told["rewards/accuracies"] == pytest.approx(sums["reward_accuracy"])


# ---- a step


@kind
def test_the_first_step_costs_log_2(tmp_path, kind):
    run = make_pair_run(tmp_path, kind=kind)
    metrics = train_step(run)
    assert metrics.train_loss == pytest.approx(math.log(2), abs=1e-6)
    assert metrics.values["train_reward_margin"] == pytest.approx(0, abs=1e-5)
    assert metrics.values["loss"] == pytest.approx(math.log(2), abs=1e-6)


@kind
def test_a_step_is_the_mean_loss_of_its_pairs_written_out(tmp_path, kind):
    pairs = make_pairs()
    run = make_pair_run(tmp_path, pairs=pairs, kind=kind, dtype=torch.float64, general=False)
    drawn: list[Any] = []
    plan_pairs = run.preferences.plan

    def plan(rows, *arguments, **named):
        drawn.extend(rows)
        return plan_pairs(rows, *arguments, **named)

    run.preferences.plan = plan
    reference = run.preferences.reference_P2.clone()
    for row in range(len(pairs)):
        with torch.no_grad():
            own = [log_prob(run.model, *s.row(row)) for s in (pairs.chosen, pairs.rejected)]
        assert reference[row].tolist() == pytest.approx([float(x) for x in own], abs=1e-9)
    push_off(run.ctx.params, alpha=0.02)
    losses: list[torch.Tensor] = []
    margins: list[float] = []
    run.optimizer.step = lambda *_, **__: None
    kept = run.optimizer.zero_grad
    run.optimizer.zero_grad = lambda **_: None
    metrics = train_step(run)
    found = {name: p.grad.clone() for name, p in run.ctx.params.items()}
    kept(set_to_none=True)
    for row in drawn:
        won, lost = (
            log_prob(run.model, *side.row(row.row)) - reference[row.row, place]
            for place, side in enumerate((pairs.chosen, pairs.rejected))
        )
        losses.append(-F.logsigmoid(BETA * (won - lost)))
        margins.append(float(BETA * (won - lost).detach()))
    assert len(losses) == run.training.batch_size
    mean = torch.stack(losses).mean()
    mean.backward()
    assert metrics.train_loss == pytest.approx(float(mean.detach()), rel=1e-9)
    assert metrics.values["train_reward_margin"] == pytest.approx(sum(margins) / len(margins))
    assert metrics.values["train_reward_accuracy"] == sum(m > 0 for m in margins) / len(margins)
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in run.ctx.params.values()))
    scale = min(1.0, run.training.max_grad_norm / (norm + 1e-6))
    for name, p in run.ctx.params.items():
        assert (found[name] - scale * p.grad).abs().max() < 1e-9
    assert max(float(g.abs().max()) for g in found.values()) > 1e-4


@kind
def test_gradients_do_not_depend_on_micro_batches(tmp_path, kind):
    found = []
    for tokens in (100_000, 60, 1):
        run = make_pair_run(
            tmp_path,
            kind=kind,
            dtype=torch.float64,
            training={"max_tokens_per_micro_batch": tokens},
            strategies=(STRATEGIES["replay"],),
        )
        push_off(run.ctx.params)
        found.append(gradients(run))
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert (other[name] - gradient).abs().max() < 1e-12
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-4


def rank_gradients(ranks, scratch, base):
    """Gradients of a pair run with replay, on each rank."""
    found = {}
    for name in KINDS:
        run = make_pair_run(
            scratch,
            kind=name,
            dtype=torch.float64,
            ranks=ranks,
            strategies=(STRATEGIES["replay"],),
            plan={"base": base},
            training={"max_tokens_per_micro_batch": 60},
        )
        push_off(run.ctx.params)
        reference = run.preferences.reference_P2.numpy()
        own = gradients(run)
        values = run.history[-1].values | {"train_loss": run.history[-1].train_loss}
        found[name] = ({k: g.numpy() for k, g in own.items()}, reference, values)
    return found


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path):
    from workers.training.ranks import Ranks

    whole = rank_gradients(Ranks(), str(tmp_path / "one"), str(tiny_base()))
    for rank in on_two_ranks(rank_gradients, str(tmp_path / "two"), str(tiny_base())):
        for name in KINDS:
            (mine, reference, values), (theirs, other, told) = whole[name], rank[name]
            assert (abs(reference - other)).max() < 1e-12
            for key, gradient in mine.items():
                assert abs(theirs[key] - gradient).max() < 1e-12
            for key in ("train_loss", "train_reward_margin", "train_reward_accuracy", "grad_norm"):
                assert told[key] == pytest.approx(values[key], rel=1e-9, abs=1e-12)


def test_replayed_rows_add_their_mean_nats_by_the_mix_ratio(tmp_path):
    plain = make_pair_run(tmp_path / "a", dtype=torch.float64)
    mixed = make_pair_run(
        tmp_path / "b", dtype=torch.float64, strategies=(ReplayConfig(strength=0.25),)
    )
    alone, both = train_step(plain), train_step(mixed)
    assert both.train_loss == pytest.approx(alone.train_loss)  # the pairs' own
    with_rows, without = both.values["loss"], alone.values["loss"]
    assert with_rows is not None
    assert without is not None
    added = with_rows - without
    assert added == pytest.approx(0.25 * math.log(300), rel=0.02)  # an untrained model's nats
    assert mixed.history[-1].values["strategy/replay/rows"] == 2


# ---- a run


@kind
def test_what_is_preferred_comes_to_be_preferred(tmp_path, kind):
    rate = {"learning_rate": 3e-3 if kind == "full" else 1e-2}
    run = train(make_pair_run(tmp_path, kind=kind, training=rate), 20)
    first, last = run.history[0], run.history[-1]
    assert last.train_loss < 0.5 < first.train_loss
    assert last.values["train_reward_margin"] > 0.5 > first.values["train_reward_margin"]
    assert last.values["train_reward_accuracy"] == 1.0
    assert last.values["train_reward_margin"] == pytest.approx(
        last.values["train_reward_chosen"] - last.values["train_reward_rejected"]
    )


def test_a_higher_beta_holds_the_model_nearer_to_its_start(tmp_path):
    moved = {}
    for beta in (0.05, 1.0):
        run = make_pair_run(tmp_path / str(beta), beta=beta, training={"learning_rate": 3e-3})
        train(run, 20)
        ratio = run.history[-1].values["train_reward_margin"] / beta
        moved[beta] = ratio
    assert moved[1.0] < moved[0.05]


@kind
def test_a_seed_says_everything(tmp_path, kind):
    runs = [
        train(make_pair_run(tmp_path / str(k), kind=kind, training={"seed": seed}), 4)
        for k, seed in enumerate((7, 7, 8))
    ]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


@kind
@pytest.mark.parametrize("is_cached", [True, False], ids=["reference_cached", "reference_lost"])
def test_a_kill_goes_on_bit_identically(tmp_path, kind, is_cached):
    with_replay = {"kind": kind, "strategies": (ReplayConfig(strength=0.25),)}
    whole = train(make_pair_run(tmp_path / "a", **with_replay), 6)
    first = train(make_pair_run(tmp_path / "b", **with_replay), 3)
    saved = save_checkpoint(first, tmp_path / "b", 1)
    elsewhere = tmp_path / ("b" if is_cached else "c")
    resumed = make_pair_run(elsewhere, start=False, **with_replay)
    load_checkpoint(resumed, saved.directory)
    train(resumed, 3)
    assert same(weights(resumed), weights(whole))
    assert [row.train_loss for row in resumed.history] == [row.train_loss for row in whole.history]


def test_a_rollback_takes_up_the_weights_and_keeps_the_reference(tmp_path):
    run = make_pair_run(tmp_path)
    reference = run.preferences.reference_P2.clone()
    train(run, 2)
    saved, then = save_checkpoint(run, tmp_path, 1), weights(run)
    train(run, 2)
    carry = make_carry(run)
    load_checkpoint(run, saved.directory, keep_carry=True)
    assert same(weights(run), then)
    assert make_carry(run).cursors == carry.cursors
    assert torch.equal(run.preferences.reference_P2, reference)
    set_carry(run, carry)
    loss = train_step(run).train_loss
    assert loss is not None
    assert math.isfinite(loss)


def test_the_reference_is_read_once_for_a_model_and_a_file(tmp_path):
    make_pair_run(tmp_path)
    run = make_pair_run(tmp_path, pairs=make_pairs(), start=False)
    (kept,) = (tmp_path / "cache" / "strategies").glob("*.safetensors")
    made = kept.stat().st_mtime_ns
    make_pair_run(tmp_path, beta=1.0)  # beta is no part of it
    assert kept.stat().st_mtime_ns == made
    make_pair_run(tmp_path, pairs=make_pairs(seed=1))
    assert len(list(kept.parent.glob("*.safetensors"))) == 2
    assert run.preferences.reference_P2.shape == (24, 2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_work_beside_pairs(tmp_path, name):
    kind = "lora" if name == "domain_adapters" else "full"
    config = STRATEGIES[name]
    run = make_pair_run(tmp_path / "on", kind=kind, strategies=(config,))
    train(run, 2)
    for strategy in run.strategies:
        strategy.on_task_end(run.ctx)
    assert all(math.isfinite(value) for row in run.history for value in row.values.values())
    plain = train(make_pair_run(tmp_path / "plain", kind=kind), 2)
    if name != "domain_adapters":  # its adapter has another shape
        assert not same(weights(run), weights(plain))
