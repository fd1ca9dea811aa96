"""Progressive tuning in the real loop: resumed mid-way, on two ranks, over two tasks, and from job to job."""

from collections import Counter

import pytest
import torch

from app.domain.configs.progressive import ProgressiveConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.runplan import StagePlan
from app.errors import TrainingFailed
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.runs import (
    ListRows,
    make_plan,
    make_run,
    make_stores,
    make_training,
    same,
    tiny_base,
    weights,
)
from workers.strategies.base import Strategy
from workers.training.checkpoints import load_checkpoint, make_carry, save_checkpoint, set_carry
from workers.training.loop import start_task, train_step

CONFIGS = {
    "cone": ProgressiveConfig(
        mode="cone", warmup_ref_steps=5, record_trajectory=True, curriculum_steps=0.8
    ),
    "cone_general": ProgressiveConfig(
        mode="cone", strength=0.5, reference="general", scope="global", ref_refresh=4, ref_rows=12
    ),
    "a_gem": ProgressiveConfig(strength=1.0, ref_refresh=2, ref_rows=12, curriculum="length"),
    "gpm": ProgressiveConfig(mode="gpm", strength=1.0, gpm_rows=12, curriculum="none"),
    "none": ProgressiveConfig(mode="none", strength=0.8, curriculum_steps=0.9, c0=0.2),
}
KINDS = ("full", "lora")
case = pytest.mark.parametrize("name", CONFIGS)
kind = pytest.mark.parametrize("kind", KINDS)


def run_of(scratch, config, *, kind="full", strategies=None, **overrides):
    configs = (config,) if strategies is None else strategies
    training = {"type": kind, **overrides.pop("training", {})}
    plans = {key: overrides.pop(key) for key in ("stages", "models") if key in overrides}
    return make_run(make_plan(scratch, strategies=configs, training=training, **plans), **overrides)


def train(run, steps):
    return [train_step(run) for _ in range(steps)]


@kind
@case
def test_g1_armed_at_nothing_is_plain_training(tmp_path, name, kind):
    off = CONFIGS[name].model_copy(update={"strength": 0.0})
    run, plain = run_of(tmp_path, off, kind=kind), run_of(tmp_path, None, kind=kind, strategies=())
    train(run, 8)
    train(plain, 8)
    assert same(weights(run), weights(plain))
    assert run.sampler.state() == plain.sampler.state()


@kind
@case
@pytest.mark.parametrize("left_at", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_g3_a_run_left_in_the_middle_goes_on_bit_for_bit(tmp_path, name, kind, left_at):
    """Within the warm-up and the curriculum, and behind the former."""
    dropout = {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}}
    first = run_of(tmp_path, CONFIGS[name], kind=kind, training=dropout)
    train(first, left_at)
    saved = save_checkpoint(first, tmp_path, 1)
    train(first, 6)
    torch.manual_seed(99)
    second = run_of(tmp_path, CONFIGS[name], kind=kind, training=dropout, start=False)
    load_checkpoint(second, saved.directory)
    train(second, 6)
    assert same(weights(second), weights(first))
    untimed = [row.model_copy(update={"seconds": 0.0}) for row in first.history]
    assert [row.model_copy(update={"seconds": 0.0}) for row in second.history] == untimed


def test_a_rollback_takes_the_reference_back_and_lets_the_rows_run_on(tmp_path):
    first = run_of(tmp_path, CONFIGS["cone"])
    train(first, 3)
    target = save_checkpoint(first, tmp_path, 1)
    train(first, 6)
    carry = make_carry(first)
    load_checkpoint(first, target.directory, keep_carry=True)
    assert not first.strategies[0].reference.held
    train(first, 4)
    second = run_of(tmp_path, CONFIGS["cone"], start=False)
    load_checkpoint(second, target.directory)
    set_carry(second, carry)
    train(second, 4)
    assert same(weights(second), weights(first))


def run_in_float64(scratch, name, kind, *, ranks=None, base=None, max_tokens=1_000_000):
    training = {"max_tokens_per_micro_batch": max_tokens, "type": kind}
    plan = make_plan(scratch, base=base, strategies=(CONFIGS[name],), training=training)
    run = make_run(plan, dtype=torch.float64, ranks=ranks)
    run.spare_padding = None
    return run


def train_on_a_rank(ranks, scratch, base):
    found = {}
    for name in CONFIGS:
        for kind in KINDS:
            run = run_in_float64(scratch, name, kind, ranks=ranks, base=base, max_tokens=120)
            train(run, 7)
            found[name, kind] = {k: v.numpy() for k, v in weights(run).items()}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Weights after seven steps of every configuration on two processes."""
    scratch = str(tmp_path_factory.mktemp("ranks"))
    return on_two_ranks(train_on_a_rank, scratch, str(tiny_base()))


@kind
@case
def test_g4_neither_ranks_nor_micro_batches_matter(tmp_path, two_ranks, name, kind):
    whole = run_in_float64(tmp_path, name, kind)
    start = weights(whole)
    train(whole, 7)
    for rank in range(2):
        for key, expected in weights(whole).items():
            found = torch.from_numpy(two_ranks[rank][name, kind][key])
            # Adam divides by the root of gradients near 0, which magnifies their last digits
            assert (found - expected).abs().max() < 1e-8
            assert not torch.equal(expected, start[key]) or "embed" in key or kind == "lora"


class Spy(Strategy):
    """Real displacements, as weights differ from step to step."""

    kind = "zz_spy"

    def __init__(self):
        self.old, self.deltas = {}, []

    def on_step_start(self, ctx):
        self.old = {name: p.detach().clone() for name, p in ctx.params.items()}

    def on_step_end(self, ctx):
        self.deltas.append({name: p.detach() - self.old[name] for name, p in ctx.params.items()})


def cosine(left, right):
    left, right = left.double().reshape(-1), right.double().reshape(-1)
    return float(torch.dot(left, right) / (left.norm() * right.norm()))


def test_weights_in_float32_move_within_the_cone_of_their_block(tmp_path):
    """The weights round what is written: the cosine of what really moved is off by that much."""
    run = run_of(tmp_path, CONFIGS["cone"])
    spy = Spy()
    run.strategies = (*run.strategies, spy)
    run.use(run.controller)
    train(run, 12)
    held = run.strategies[0].reference.held
    free = sum(d["model.norm.weight"].abs().max() > 0 for d in spy.deltas)
    assert free == 12
    below = 1.0
    for delta in spy.deltas[5:]:
        below = min(below, *(cosine(delta[name], r) for name, r in held.items()))
    assert 0.79 < below < 0.81


@kind
def test_the_domain_rows_of_a_run_are_its_easiest_and_then_each_once_an_epoch(tmp_path, kind):
    config = CONFIGS["none"].model_copy(update={"mix_start": None, "curriculum_steps": 0.5})
    run = run_of(tmp_path, config, kind=kind)
    strategy = run.strategies[0]
    values = strategy.curriculum.values["training"]
    easiest = values.argsort(stable=True).tolist()
    seen = []
    original = run.sampler.draw

    def draw(streams):
        drawn = original(streams)
        seen.append([row.row for row in drawn])
        return drawn

    run.sampler.draw = draw
    held_back = [row.values["strategy/progressive/held_back"] for row in train(run, 18)]
    for step in range(10):
        count = round((1 - held_back[step]) * 64)
        assert set(seen[step]) <= set(easiest[:count])
        assert count >= 12
    assert held_back[10:] == [0.0] * 8
    assert Counter(row for rows in seen[10:] for row in rows) == Counter(range(64))


def test_the_difficulty_is_the_loss_that_the_model_itself_reports(tmp_path):
    run = run_of(tmp_path, CONFIGS["none"], training={"max_tokens_per_micro_batch": 100})
    values = run.strategies[0].curriculum.values["training"]
    for index in (0, 17, 63):
        ids, token_weights = run.stores["training"].row(index)
        tokens = torch.from_numpy(ids.astype("int64"))[None]
        labels = tokens.clone()
        labels[0, torch.from_numpy(token_weights) == 0] = -100
        expected = run.model(input_ids=tokens, labels=labels).loss
        assert float(values[index]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_replayed_and_mixed_rows_together_have_the_share_asked_for(tmp_path):
    config = CONFIGS["none"].model_copy(update={"strength": 1.0, "curriculum": "none"})
    run = run_of(tmp_path, None, strategies=(config, ReplayConfig(strength=0.25)))
    rows = train(run, 20)
    general = [row.values["strategy/progressive/general_rows"] for row in rows[:2]]
    replayed = [row.values["strategy/replay/rows"] for row in rows[:2]]
    assert [g + r for g, r in zip(general, replayed, strict=True)] == [8, 8]
    assert rows[-1].values["strategy/progressive/general_share"] == 0.0  # replay alone is more


def two_stages(scratch, *, kind="full"):
    whole = make_training(type=kind, total_steps=12)
    plan = make_plan(scratch).training_rows
    stages = tuple(
        StagePlan(
            name=name,
            training_rows=plan,
            training=whole.model_copy(update={"total_steps": 6}),
        )
        for name in ("one", "two")
    )
    stores = {**make_stores(), "training-1": ListRows(40, seed=8)}
    return {"stages": stages, "stores": stores, "kind": kind, "training": {"total_steps": 12}}


@kind
def test_the_second_stage_is_held_to_what_the_first_recorded(tmp_path, kind):
    config = CONFIGS["cone"].model_copy(update={"warmup_ref_steps": 100, "mix_start": None})
    run = run_of(tmp_path, config, **two_stages(tmp_path, kind=kind))
    spy = Spy()
    run.strategies = (*run.strategies, spy)
    run.use(run.controller)
    first = train(run, 6)
    assert {row.values["strategy/progressive/applied_norm"] for row in first} == {0.0}
    recorded = {name: r.clone() for name, r in run.strategies[0].reference.recorded.items()}
    second = train(run, 6)
    assert all(row.values["strategy/progressive/applied_norm"] > 0 for row in second)
    assert same(run.strategies[0].reference.held, recorded)
    assert set(run.strategies[0].curriculum.values) == {"training", "training-1"}
    for row in second:
        assert row.values["strategy/progressive/cos_block_min"] >= 0.8 - 1e-6


@kind
@pytest.mark.parametrize("name", ["cone", "gpm"])
def test_a_run_left_in_its_second_stage_goes_on_bit_for_bit(tmp_path, name, kind):
    first = run_of(tmp_path, CONFIGS[name], **two_stages(tmp_path, kind=kind))
    train(first, 8)
    saved = save_checkpoint(first, tmp_path, 1)
    train(first, 4)
    second = run_of(tmp_path, CONFIGS[name], start=False, **two_stages(tmp_path, kind=kind))
    load_checkpoint(second, saved.directory)
    train(second, 4)
    assert same(weights(second), weights(first))


@kind
@pytest.mark.parametrize("source", KINDS)
def test_a_later_job_is_held_to_the_trajectory_of_an_earlier_one(tmp_path, kind, source):
    earlier = run_of(tmp_path, CONFIGS["cone"], kind=source)
    train(earlier, 6)
    published = tmp_path / "published"
    published.mkdir()
    earlier.strategies[0].export_files(earlier.ctx, published)
    config = ProgressiveConfig(
        mode="cone",
        reference="trajectory",
        reference_models=("earlier",),
        curriculum="none",
        mix_start=None,
    )
    later = {"kind": kind, "models": {"earlier": str(published)}, "training": {"seed": 23}}
    run = run_of(tmp_path, config, **later)
    rows = train(run, 5)
    values = [row.values for row in rows]
    assert all(v["strategy/progressive/applied_norm"] > 0 for v in values)
    assert all(v["strategy/progressive/cos_block_min"] >= 0.8 - 1e-6 for v in values)
    free = values[0]["strategy/progressive/blocks_free"]
    assert (free == 0) == (kind == "lora" or source == "full")
    saved = save_checkpoint(run, tmp_path, 1)
    train(run, 3)
    second = run_of(tmp_path, config, start=False, **later)
    load_checkpoint(second, saved.directory)
    train(second, 3)
    assert same(weights(second), weights(run))


def test_a_reference_that_does_not_fit_ends_the_run_with_a_reason(tmp_path):
    config = ProgressiveConfig(
        mode="cone", reference="difference", reference_models=("new", "old"), mix_start=None
    )
    models = {"new": str(tiny_base()), "old": str(tmp_path)}
    run = run_of(tmp_path, config, models=models, start=False)
    with pytest.raises(TrainingFailed, match=r"progressive: .* can't be read"):
        start_task(run)
