"""Anchors over stages, and step owners, on the real loop: resumes bit by bit, and two ranks are one."""

import pytest
import torch

from app.domain.configs.meta import MamlProxConfig, ReptileConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig, MasConfig, SiConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.runplan import RowsPlan, StagePlan
from app.domain.strategies import StrategyConfig
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.runs import (
    ListRows,
    make_plan,
    make_run,
    make_stores,
    make_training,
    push_off,
    same,
    tiny_base,
    weights,
)
from workers.strategies.base import Strategy
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.loop import train_step

STAGE_STEPS = 4
CASES: dict[str, tuple[StrategyConfig, ...]] = {
    "ewc": (EwcConfig(fisher_samples=12),),
    "ewc_latest": (EwcConfig(fisher_samples=12, anchor="latest", penalty_mode="gradient"),),
    "mas": (MasConfig(importance_samples=12),),
    "si": (SiConfig(),),
    "l2sp": (L2SpConfig(),),
    "maml_prox": (MamlProxConfig(inner_lr=0.05), ReplayConfig(strength=0.25)),
    "reptile": (ReptileConfig(inner_lr=0.05), ReplayConfig(strength=0.25)),
}
RUNS = [
    (name, kind) for name in CASES for kind in ("full", "lora") if (name, kind) != ("si", "lora")
]
every_run = pytest.mark.parametrize(("name", "kind"), RUNS)


def run_of(scratch, name, kind, *, start=True, **overrides):
    """Three stages with rows of their own."""
    training = {"type": kind, "total_steps": 3 * STAGE_STEPS}
    stage = make_training(**{**training, "total_steps": STAGE_STEPS})
    stores = make_stores()
    stores |= {f"training-{index}": ListRows(40, seed=10 + index) for index in (1, 2)}
    stages = tuple(
        StagePlan(
            name=f"stage{index}",
            training_rows=RowsPlan(path=f"{scratch}/rows{index}.jsonl", sha256=f"{index}" * 64),
            training=stage,
        )
        for index in range(3)
    )
    plan = make_plan(scratch, strategies=CASES[name], training=training, stages=stages)
    return make_run(plan, stores=stores, start=start, **overrides)


def train(run, steps):
    return [train_step(run) for _ in range(steps)]


@every_run
@pytest.mark.parametrize(
    "saved_at",
    [
        pytest.param(STAGE_STEPS, id="boundary"),
        pytest.param(STAGE_STEPS + 2, id="within", marks=pytest.mark.slow),
    ],
)
def test_a_loaded_checkpoint_goes_on_bit_identically_through_the_stages(
    tmp_path, name, kind, saved_at
):
    first = run_of(tmp_path, name, kind)
    train(first, saved_at)
    saved = save_checkpoint(first, tmp_path, 1)
    rest = train(first, 3 * STAGE_STEPS - saved_at)
    torch.manual_seed(99)
    second = run_of(tmp_path, name, kind, start=False)
    load_checkpoint(second, saved.directory)
    again = train(second, 3 * STAGE_STEPS - saved_at)
    assert same(weights(second), weights(first))
    untimed = [[row.model_copy(update={"seconds": 0.0}) for row in rows] for rows in (rest, again)]
    assert untimed[0] == untimed[1]
    label = f"strategy/{CASES[name][0].type}/applied_norm"
    assert max(row.values[label] for row in rest) > 0


@every_run
def test_strength_zero_is_bit_identical_to_plain_training_through_the_stages(tmp_path, name, kind):
    run = run_of(tmp_path, name, kind)
    run.use(run.controller.model_copy(update={"strengths": {c.type: 0.0 for c in CASES[name]}}))
    train(run, 2 * STAGE_STEPS + 1)
    plain = run_of(tmp_path, name, kind, strategies=())
    train(plain, 2 * STAGE_STEPS + 1)
    assert same(weights(run), weights(plain))


def gradients_on_ranks(scratch, name, kind, max_tokens, ranks=None, base=None):
    """Gradients before clipping of a step in the first stage and of one in the second, in float64."""
    found = {}

    class Spy(Strategy):
        kind = "zz_spy"

        def edit_grads(self, ctx):
            found.update(
                {f"{ctx.task_index}/{n}": p.grad.detach().clone() for n, p in ctx.params.items()}
            )

    plan = make_plan(
        scratch,
        base=base,
        strategies=CASES[name],
        training={"type": kind, "total_steps": 2, "max_tokens_per_micro_batch": max_tokens},
        stages=tuple(
            StagePlan(
                name=f"stage{index}",
                training_rows=RowsPlan(path=f"{scratch}/rows{index}.jsonl", sha256=f"{index}" * 64),
                training=make_training(
                    type=kind, total_steps=1, max_tokens_per_micro_batch=max_tokens
                ),
            )
            for index in range(2)
        ),
    )
    stores = {**make_stores(), "training-1": ListRows(40, seed=11)}
    run = make_run(plan, dtype=torch.float64, ranks=ranks, stores=stores, start=False)
    run.spare_padding = None
    run.ctx.cached = lambda _, make: make()  # measured here, by as many ranks as there are
    run.strategies = (*run.strategies, Spy())
    run.use(run.controller)
    for strategy in run.strategies:
        strategy.on_task_start(run.ctx)
    push_off(run.ctx.params)
    train(run, 2)
    found.update({f"end/{n}": p for n, p in weights(run).items()})
    return found


def rank_gradients(ranks, scratch, base, names):
    results = {}
    for name, kind in names:
        found = gradients_on_ranks(scratch, name, kind, 120, ranks, base=base)
        results[name, kind] = {k: v.numpy() for k, v in found.items()}
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Gradients of every run on two processes."""
    scratch = str(tmp_path_factory.mktemp("ranks"))
    return on_two_ranks(rank_gradients, scratch, str(tiny_base()), RUNS)


@every_run
def test_gradients_and_importance_do_not_depend_on_micro_batches_or_ranks(
    tmp_path, two_ranks, name, kind
):
    whole = gradients_on_ranks(tmp_path, name, kind, 1_000_000)
    others = [gradients_on_ranks(tmp_path, name, kind, 120)]
    others += [{k: torch.from_numpy(v) for k, v in rank[name, kind].items()} for rank in two_ranks]
    for other in others:
        for key, value in whole.items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-9)
    assert max(float(g.abs().max()) for k, g in whole.items() if not k.startswith("end")) > 1e-4
