"""The generic oracles G1 to G7 of the strategies, on the real loop; and the loop's own contract."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.strategies import StrategyConfig
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.runs import (
    ListRows,
    make_plan,
    make_run,
    make_stores,
    push_off,
    same,
    tiny_base,
    weights,
)
from workers.data.batches import split_micros
from workers.strategies.base import Strategy
from workers.training.checkpoints import load_checkpoint, make_carry, save_checkpoint, set_carry
from workers.training.loop import train_step

CASES: dict[str, StrategyConfig] = {
    "ewc": EwcConfig(fisher_samples=24),
    "ewc_gradient": EwcConfig(fisher_samples=24, penalty_mode="gradient"),
    "l2sp": L2SpConfig(),
    "l2sp_implicit": L2SpConfig(penalty_mode="implicit"),
    "replay": ReplayConfig(strength=0.25),
    "distillation": DistillationConfig(on=("domain", "general")),
    "distillation_hidden": DistillationConfig(on=("general",), hidden_coef=0.5, every=2),
    "distillation_cached": DistillationConfig(teacher="cached", top_k=8, temperature=2.0),
    "distillation_generated": DistillationConfig(
        on=("generated",), generated_rows=12, generated_tokens=9, generate_every=5
    ),
    "replay_der": ReplayConfig(strength=0.25, der_alpha=0.5, der_beta=0.5, top_k=8),
    "replay_generated": ReplayConfig(
        strength=0.25, source="generated", weighting="fixed", generated_rows=12, generated_tokens=9
    ),
}
KINDS = ("full", "lora")
ALL = tuple(CASES[name] for name in ("ewc", "l2sp", "replay", "distillation"))

case = pytest.mark.parametrize("name", CASES)
kind = pytest.mark.parametrize("kind", KINDS)


def train(run, steps=20):
    return [train_step(run) for _ in range(steps)]


def run_of(scratch, *configs, kind="full", **overrides):
    training = {"type": kind, **overrides.pop("training", {})}
    return make_run(make_plan(scratch, strategies=configs, training=training), **overrides)


@pytest.fixture(scope="module", params=KINDS)
def plain(request, tmp_path_factory):
    """A run without strategies, twenty steps on."""
    run = run_of(tmp_path_factory.mktemp("plain"), kind=request.param)
    metrics = train(run)
    return request.param, weights(run), metrics


@case
def test_g1_strength_zero_is_bit_identical_to_plain_training(tmp_path, plain, name):
    kind, expected, _ = plain
    armed = CASES[name].model_copy(update={"armed": True, "strength": None})
    run = run_of(tmp_path, armed, kind=kind)
    train(run)
    assert same(weights(run), expected)


@case
def test_g2_strength_moves_the_weights_and_says_so(tmp_path, plain, name):
    kind, expected, _ = plain
    run = run_of(tmp_path, CASES[name], kind=kind)
    metrics = train(run)
    assert not same(weights(run), expected)
    label = "rows" if "replay" in name else "applied_norm"
    values = [row.values[f"strategy/{CASES[name].type}/{label}"] for row in metrics]
    assert max(values) > 0


@kind
@case
def test_g3_a_loaded_checkpoint_goes_on_bit_identically(tmp_path, name, kind):
    dropout = {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}}
    first = run_of(tmp_path, CASES[name], kind=kind, training=dropout)
    train(first, 7)
    saved = save_checkpoint(first, tmp_path, 1)
    train(first, 8)
    torch.manual_seed(99)
    second = run_of(tmp_path, CASES[name], kind=kind, training=dropout, start=False)
    load_checkpoint(second, saved.directory)
    train(second, 8)
    assert same(weights(second), weights(first))
    # times differ, numbers do not
    untimed = [row.model_copy(update={"seconds": 0.0}) for row in first.history]
    assert [row.model_copy(update={"seconds": 0.0}) for row in second.history] == untimed


@kind
def test_g3_a_rollback_goes_on_bit_identically_in_another_run(tmp_path, kind):
    first = run_of(tmp_path, *ALL, kind=kind)
    train(first, 4)
    target = save_checkpoint(first, tmp_path, 1)
    train(first, 6)
    carry = make_carry(first)
    raised = first.controller.model_copy(
        update={"strengths": {**first.controller.strengths, "ewc": 400.0}, "branch": 1}
    )
    load_checkpoint(first, target.directory, keep_carry=True)
    first.branch = 1
    first.use(raised)
    assert first.step == 4
    assert first.executed == 10
    assert len(first.history) == 4
    train(first, 5)
    second = run_of(tmp_path, *ALL, kind=kind, start=False)
    load_checkpoint(second, target.directory)
    second.branch = 1
    set_carry(second, carry)
    second.use(raised)
    train(second, 5)
    assert same(weights(second), weights(first))


def gradients(run):
    """Gradients of one step, before clipping could change them."""
    found = {}

    class Spy(Strategy):
        kind = "zz_spy"

        def edit_grads(self, ctx):
            found.update({n: p.grad.detach().clone() for n, p in ctx.params.items()})

    run.strategies = (*run.strategies, Spy())
    run.use(run.controller)
    train_step(run)
    return found


def run_in_float64(scratch, name, kind, max_tokens, ranks=None, base=None):
    training = {"max_tokens_per_micro_batch": max_tokens, "type": kind}
    strategies = (CASES[name],) if name else ()
    plan = make_plan(scratch, base=base, strategies=strategies, training=training)
    run = make_run(plan, dtype=torch.float64, ranks=ranks)
    run.spare_padding = None
    push_off(run.ctx.params)
    return run


def rank_gradients(ranks, scratch, base, names):
    found = {}
    for name, kind in names:
        run = run_in_float64(scratch, name, kind, 120, ranks, base=base)
        found[name, kind] = {k: v.numpy() for k, v in gradients(run).items()}
    return found


@pytest.fixture(scope="module")
def scratch_g4(tmp_path_factory):
    """Where all of G4's runs find one Fisher: it is float32, so its own sums depend on how rows are shared."""
    scratch = tmp_path_factory.mktemp("g4")
    for name in ("ewc", "ewc_gradient"):
        for kind in KINDS:
            run_in_float64(scratch, name, kind, 1_000_000)
    return scratch


@pytest.fixture(scope="module")
def two_ranks(scratch_g4):
    """Gradients of every case on two processes."""
    names = [(name, kind) for name in (None, *CASES) for kind in KINDS]
    return on_two_ranks(rank_gradients, str(scratch_g4), str(tiny_base()), names)


@pytest.mark.parametrize("name", [None, *CASES])
@kind
def test_g4_gradients_do_not_depend_on_micro_batches_or_ranks(scratch_g4, two_ranks, name, kind):
    whole = gradients(run_in_float64(scratch_g4, name, kind, 1_000_000))
    for parts in (1, 120):
        split = gradients(run_in_float64(scratch_g4, name, kind, parts))
        for key, gradient in whole.items():
            assert (split[key] - gradient).abs().max() < 1e-12
    for rank in range(2):
        for key, gradient in whole.items():
            other = torch.from_numpy(two_ranks[rank][name, kind][key])
            assert (other - gradient).abs().max() < 1e-12
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4


@kind
def test_g5_the_order_in_which_strategies_are_listed_does_not_matter(tmp_path, kind):
    results = []
    for order in itertools.islice(itertools.permutations(ALL), 0, 24, 7):
        run = run_of(tmp_path, *order, kind=kind)
        train(run, 6)
        results.append(weights(run))
    assert all(same(results[0], other) for other in results[1:])


@kind
@pytest.mark.parametrize("pair", [("l2sp", "distillation"), ("ewc_gradient", "l2sp")])
def test_g6_gradients_of_added_losses_add_up(tmp_path, kind, pair):
    def gradient_of(*names):
        configs = tuple(
            CASES[n].model_copy(update={"rho": None}) if "ewc" in n else CASES[n] for n in names
        )
        plan = make_plan(tmp_path, strategies=configs, training={"type": kind})
        run = make_run(plan, dtype=torch.float64)
        push_off(run.ctx.params)
        return gradients(run)

    none, both = gradient_of(), gradient_of(*pair)
    left, right = (gradient_of(name) for name in pair)
    for key, gradient in both.items():
        expected = left[key] + right[key] - none[key]
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@kind
@case
def test_g7_what_is_frozen_stays_frozen_and_the_teacher_stays_the_same(tmp_path, name, kind):
    run = run_of(tmp_path, CASES[name], kind=kind)
    everything = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    micro = next(run.ctx.general_micros([0, 1, 2]))
    mask = torch.ones(len(micro.positions_N), dtype=torch.bool)
    before = run.teacher(micro, mask)
    train(run, 5)
    for key, value in run.model.named_parameters():
        assert torch.equal(value, everything[key]) == (key not in run.ctx.params), key
    assert torch.equal(run.teacher(micro, mask), before)
    run.teacher.check()


def test_the_step_is_the_mean_over_its_supervised_tokens(tmp_path):
    plan = make_plan(tmp_path, training={"max_tokens_per_micro_batch": 60})
    run = make_run(plan, dtype=torch.float64)
    drawn = make_run(plan, dtype=torch.float64).sampler.draw(run.streams)
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for row in drawn:  # by transformers' own forward, one row at a time, whole logits
        ids, token_weights = run.stores["training"].row(row.row)
        ids = torch.from_numpy(ids.astype("int64"))
        logits = run.model(input_ids=ids[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        mask = torch.from_numpy(token_weights[1:].astype("float64"))
        total, count = total + (losses * mask).sum(), count + float(mask.sum())
    expected = torch.autograd.grad(total / count, list(run.ctx.params.values()))
    found = gradients(run)
    for gradient, right in zip(found.values(), expected, strict=True):
        assert (gradient - right).abs().max() < 1e-12
    assert run.history[0].train_loss == pytest.approx(float((total / count).detach()), abs=1e-12)


def test_replay_gives_its_share_and_every_store_row_once_an_epoch(tmp_path):
    run = run_of(tmp_path, ReplayConfig(strength=0.3, store_fraction=0.5))
    seen = []
    for step in range(1, 60):
        drawn = run.sampler.draw(run.streams)
        seen += [row.row for row in drawn if row.source == "replay"]
        assert abs(len(seen) - 0.3 * 8 * step) <= 1
    store = Counter(run.strategies[0].store)
    assert Counter(seen[: store.total()]) == store


def test_a_strategy_turned_on_later_acts_from_that_step(tmp_path):
    armed = CASES["distillation"].model_copy(update={"armed": True})
    run, other = run_of(tmp_path, armed), run_of(tmp_path)
    train(run, 5)
    train(other, 5)
    assert same(weights(run), weights(other))
    run.use(run.controller.model_copy(update={"strengths": {"distillation": 1.0}}))
    last = train(run, 3)[-1]
    assert last.values["loss/distillation"] > 0
    train(other, 3)
    assert not same(weights(run), weights(other))


def test_the_learning_rate_scale_and_the_schedule_multiply(tmp_path):
    run = run_of(tmp_path)
    run.use(run.controller.model_copy(update={"learning_rate_scale": 0.5}))
    rates = [row.learning_rate for row in train(run, 20)]
    assert rates[0] == pytest.approx(1e-3 * 0.5 / 3)
    assert max(rates) == pytest.approx(5e-4)
    assert rates[-1] < 0.1 * 5e-4


def test_losses_that_are_not_finite_leave_the_weights_alone_and_are_counted(tmp_path):
    class Breaking(Strategy):
        kind = "breaking"

        def edit_grads(self, ctx):
            if 1 <= ctx.step <= 3:
                next(iter(ctx.params.values())).grad.fill_(math.nan)

    run = make_run(make_plan(tmp_path), strategies=(Breaking(),))
    train(run, 1)
    before = weights(run)
    counts = []
    for _ in range(3):
        row = train_step(run)
        counts.append(run.not_finite_in_a_row)
        assert row.values["grad_norm"] is None
    assert counts == [1, 2, 3]
    assert same(weights(run), before)
    train_step(run)
    assert run.not_finite_in_a_row == 0
    assert not same(weights(run), before)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        run = run_of(tmp_path, kind="lora", training={"gradient_checkpointing": checkpointing})
        train(run, 4)
        results.append(weights(run))
    for key, value in results[0].items():
        assert torch.allclose(value, results[1][key], atol=1e-6)


def test_micro_batches_are_planned_alike_on_every_rank(tmp_path):
    stores = make_stores()
    lengths = {name: store.lengths for name, store in stores.items()}
    run = run_of(tmp_path, ReplayConfig(strength=0.5), stores=stores)
    drawn = run.sampler.draw(run.streams)
    planned = split_micros(drawn, lengths, max_tokens=80)
    shares = [planned[rank::2] for rank in range(2)]
    assert sorted(row for share in shares for micro in share for row in micro) == sorted(drawn)


def test_a_curve_falls(tmp_path):
    run = run_of(
        tmp_path,
        stores={"training": ListRows(16, seed=4), "general": ListRows(8, seed=5)},
        training={"total_steps": 60, "learning_rate": 1e-2, "lr_scheduler": "constant"},
    )
    losses = [row.train_loss for row in train(run, 60)]
    assert sum(losses[-8:]) / 8 < 0.6 * losses[0]
