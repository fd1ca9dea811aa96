"""One adapter a stage on the real loop: what is trained, what stays, what is kept, merged and published."""

import pytest
import torch

from app.domain.configs.adapters import RESERVED_NAMES
from app.domain.configs.distillation import DistillationConfig
from app.domain.spec import LoraConfig
from app.errors import TrainingFailed
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.runs import CPU, make_plan, make_run, push_off, same, tiny_base
from tests.workers.training.staged import (
    NAMES,
    STEPS,
    adapters,
    all_weights,
    make_staged_run,
)
from workers.export.merge import active_adapters
from workers.training.adapters import adapt, count_widths, derive_rank
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.footprint import expected_footprint, measure_footprint
from workers.training.loop import train_step
from workers.training.models import load_base

IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])
KINDS = ("lora", "bottleneck")
kinds = pytest.mark.parametrize("kind", KINDS)


def train(run, steps):
    return [train_step(run) for _ in range(steps)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_model(run=None):
    return load_base(make_plan("unused").base, CPU, torch.float32).eval()


@kinds
@pytest.mark.parametrize("compose", ["separate", "stacked"])
def test_only_the_adapter_of_the_stage_changes(tmp_path, kind, compose):
    run = make_staged_run(tmp_path, adapters(kind=kind, compose=compose))
    everything = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for index, name in enumerate(NAMES):
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        train(run, STEPS)
        assert run.ctx.task_index == index
        own = run.ctx.adapters.params[name]
        assert own == run.ctx.params.keys()
        for key, value in run.model.named_parameters():
            assert value.requires_grad == (key in own), key
            if key not in own:
                assert torch.equal(value, before[key]), key
        assert any(not torch.equal(run.all_params[n], before[n]) for n in own)
        active = NAMES[: index + 1] if compose == "stacked" else (name,)
        assert active_adapters(run.model) == active
        moved = {id(p) for g in run.optimizer.param_groups for p in g["params"]}
        assert moved == {id(run.all_params[n]) for n in own}
    adapted = frozenset().union(*run.ctx.adapters.params.values())
    for key, value in run.model.named_parameters():
        assert torch.equal(value, everything[key]) == (key not in adapted), key
    run.teacher.check()


@kinds
def test_a_second_stage_starts_at_the_base_when_adapters_are_separate(tmp_path, kind):
    run = make_staged_run(tmp_path, adapters(kind=kind))
    base = logits(base_model())
    run.model.eval()
    assert torch.equal(logits(run.model), base)
    run.model.train()
    train(run, STEPS)
    run.model.eval()
    assert not torch.equal(logits(run.model), base)
    run.enter(1)
    assert torch.equal(logits(run.model), base)
    run.enter(0)
    assert not torch.equal(logits(run.model), base)


def test_the_teacher_leaves_frozen_adapters_frozen(tmp_path):
    """Switching adapters off and on again would let peft train all active ones."""
    run = make_staged_run(tmp_path, adapters(compose="stacked"), DistillationConfig(on=("domain",)))
    train(run, STEPS + 2)
    first = run.ctx.adapters.params["law"]
    assert not any(
        run.all_params[n].requires_grad or run.all_params[n].grad is not None for n in first
    )
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == run.ctx.params.keys()


def test_one_adapter_of_the_same_rank_trains_as_without_the_strategy(tmp_path):
    plain = make_run(make_plan(tmp_path, training={"type": "lora"}))
    train(plain, 6)
    ours = make_run(make_plan(tmp_path, strategies=(adapters(r=4),), training={"type": "lora"}))
    assert ours.ctx.adapters.names == ("default",)
    train(ours, 6)
    assert same(all_weights(ours), all_weights(plain))


@kinds
@pytest.mark.parametrize("orthogonality", ["penalty", "hard"])
def test_a_kill_in_the_second_stage_goes_on_bit_identically(tmp_path, kind, orthogonality):
    config = adapters(kind=kind, orthogonality=orthogonality, compose="stacked")
    first = make_staged_run(tmp_path, config)
    train(first, STEPS + 2)
    saved = save_checkpoint(first, tmp_path, 1)
    train(first, STEPS)  # into the third
    torch.manual_seed(99)
    second = make_staged_run(tmp_path, config, start=False)
    load_checkpoint(second, saved.directory)
    assert second.ctx.task_index == 1
    assert active_adapters(second.model) == NAMES[:2]
    train(second, STEPS)
    assert same(all_weights(second), all_weights(first))
    assert same(second.strategies[0].centroids, first.strategies[0].centroids)
    assert second.strategies[0].routing == first.strategies[0].routing
    told = [[row.model_copy(update={"seconds": 0.0}) for row in r.history] for r in (first, second)]
    assert told[0] == told[1]


def test_a_rollback_into_the_stage_before_activates_its_adapter(tmp_path):
    run = make_staged_run(tmp_path, adapters())
    train(run, 2)
    saved = save_checkpoint(run, tmp_path, 1)
    train(run, STEPS)
    load_checkpoint(run, saved.directory, keep_carry=True)
    assert active_adapters(run.model) == ("law",)
    assert run.ctx.params.keys() == run.ctx.adapters.params["law"]
    assert run.strategies[0].centroids == {}


def gradients_of_second_stage(scratch, ranks=None, base=None):
    """In float64, off the start, in the second stage."""
    run = make_staged_run(
        scratch, adapters(strength=5.0, route=False), ranks=ranks, dtype=torch.float64, base=base
    )
    run.spare_padding = None
    run.enter(1)
    run.step = STEPS
    push_off(run.all_params)
    found = {}

    def keep(ctx):
        found.update({n: p.grad.detach().clone() for n, p in ctx.params.items()})

    run.strategies[0].edit_grads = keep
    metrics = train_step(run)
    assert (metrics.values["strategy/domain_adapters/applied_norm"] or 0.0) > 0
    return found


def rank_gradients(ranks, scratch, base):
    found = gradients_of_second_stage(scratch, ranks, base)
    return {name: g.numpy() for name, g in found.items()}


def test_the_penalty_is_the_same_on_two_ranks(tmp_path):
    two = on_two_ranks(rank_gradients, str(tmp_path), str(tiny_base()))
    whole = gradients_of_second_stage(tmp_path, base=tiny_base())
    for rank in range(2):
        for name, gradient in whole.items():
            assert (torch.from_numpy(two[rank][name]) - gradient).abs().max() < 1e-12
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4


def test_the_rank_follows_from_the_budget(tmp_path):
    base = base_model()
    size = sum(p.numel() for p in base.parameters())
    widths = count_widths(base, "all-linear")
    run = make_run(
        make_plan(tmp_path, strategies=(adapters(r=None, budget=0.08),), training={"type": "lora"})
    )
    own = sum(p.numel() for p in run.ctx.params.values())
    rank = derive_rank(0.08, size, widths)
    assert rank > 1
    assert own == rank * widths  # what peft made is what was counted
    assert own / size <= 0.08 < (rank + 1) * widths / size
    assert run.ctx.adapters.share == pytest.approx(own / size)
    assert run.ctx.lora_pairs[0].scale == 2.0  # alpha / r as the job asked for
    assert derive_rank(0.005, 100, 1000) == 1
    some = count_widths(base, ["q_proj", "up_proj"])
    assert some == 2 * (32 + 32) + 2 * (32 + 64)


@pytest.mark.parametrize(("size", "r", "rank"), [(6_738_415_616, 8, 8), (6_738_415_616, 16, 16)])
def test_the_cards_ranks_of_a_7b_model(size, r, rank):
    """32 layers of 4 attention and 3 MLP matrices of 4096 and 11008."""
    widths = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    share = r * widths / size
    assert share == pytest.approx({8: 0.0030, 16: 0.0059}[r], abs=1e-4)
    assert derive_rank(share * 1.0001, size, widths) == rank


def test_a_large_model_is_refused_a_share_out_of_bounds(monkeypatch, tmp_path):
    monkeypatch.setattr("workers.training.adapters.REFUSED_FROM_PARAMETERS", 1000)
    with pytest.raises(TrainingFailed, match="allow_any_share") as caught:
        make_staged_run(tmp_path, adapters())
    assert caught.value.code == "adapter_share"
    run = make_staged_run(tmp_path, adapters(allow_any_share=True))
    assert run.ctx.adapters.share > 0.01


@pytest.mark.parametrize("name", ["mlp", "lora", "keys", "merged", "training"])
def test_a_stage_whose_name_an_adapter_can_not_have_is_refused(tmp_path, name):
    with pytest.raises(TrainingFailed, match=f"'{name}' can't name an adapter"):
        make_staged_run(tmp_path, adapters(), names=("law", name))


def test_names_that_peft_could_not_keep_are_known_at_submit():
    public = {name for name in dir(torch.nn.ModuleDict()) if not name.startswith("_")}
    assert public <= RESERVED_NAMES


def test_full_training_and_unknown_layers_are_refused(tmp_path):
    with pytest.raises(TrainingFailed, match=r"needs training\.type 'lora'"):
        make_staged_run(tmp_path, adapters(), kind="full")
    lora = LoraConfig(r=4, target_modules=("nowhere",))
    with pytest.raises(TrainingFailed, match="no linear layer"):
        make_staged_run(tmp_path, adapters(), training={"lora": lora})


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_hold_far_less_memory_than_full_training(tmp_path, kind):
    full = make_run(make_plan(tmp_path, training={"type": "full"}))
    ours = make_staged_run(tmp_path, adapters(kind=kind, r=1))
    before = measure_footprint(ours)
    for run in (full, ours):
        train_step(run)
    size = sum(p.numel() for p in full.model.parameters())
    found = measure_footprint(full)
    steps = 4 * len(full.ctx.params)  # AdamW keeps a step count a parameter
    assert (found.weights, found.gradients, found.moments) == (4 * size, 4 * size, 8 * size + steps)
    assert expected_footprint(full.model).total == 16 * size
    adapted = measure_footprint(ours)
    own = sum(p.numel() for p in ours.ctx.params.values())
    assert adapted.weights == 4 * (size + 3 * own)
    assert adapted.gradients == 4 * own
    assert adapted.moments == 8 * own + 4 * len(ours.ctx.params)
    assert before.moments == 8 * own
    assert adapted.saving(found) > 0.5


def test_a_base_without_adapters_stays_as_it_is_for_full_training():
    base = base_model()
    plan = make_plan("unused", training={"type": "full"})
    assert adapt(base, plan.training, (), ()) is base


def test_gradient_checkpointing_changes_nothing_for_bottlenecks(tmp_path):
    results = []
    for checkpointing in (False, True):
        config = adapters(kind="bottleneck", compose="stacked")
        run = make_staged_run(tmp_path, config, training={"gradient_checkpointing": checkpointing})
        train(run, STEPS + 2)
        results.append(all_weights(run))
    for key, value in results[0].items():
        assert torch.allclose(value, results[1][key], atol=1e-6)
