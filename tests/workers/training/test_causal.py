"""Causal on the real loop: any micro-batches, two ranks, checkpoints, and the pairs of a job from its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.domain.configs.causal import CausalConfig
from app.domain.runplan import RowsPlan
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import (
    CPU,
    ListRows,
    make_plan,
    make_run,
    make_stores,
    push_off,
    same,
    tiny_base,
    weights,
)
from tests.workers.training.supervised import SIGKILLED
from tests.workers.training.test_loop import gradients
from workers.strategies.context import Pairs
from workers.training.checkpoints import load_checkpoint, load_weights, save_checkpoint
from workers.training.loop import train_step

EVERYTHING = CausalConfig(
    consistency_coef=1.0,
    cf_fraction=0.5,
    vrex_beta=2.0,
    irm_lambda=1.0,
    coral_coef=1.0,
    general_ratio=1.0,
    anneal=0.1,
)
ANSWERS = CausalConfig(consistency="answer_kl", consistency_coef=1.0, vrex_beta=0.0)
QUEUED = EVERYTHING.model_copy(update={"coral_queue": 64})
CASES = {"everything": EVERYTHING, "answers": ANSWERS, "queued": QUEUED}
KINDS = ("full", "lora")


class Reworded(ListRows):
    """The rows of another store with other prompts."""

    def __init__(self, store):
        self.rows = []
        for ids, token_weights in store.rows:
            changed = ids.copy()
            changed[: len(ids) // 3] = (changed[: len(ids) // 3] + 7) % 300
            self.rows.append((changed, token_weights))


def run_of(scratch, config, *, kind="full", max_tokens=4096, start=True, **options):
    training = {
        "type": kind,
        "batch_size": 32,
        "max_tokens_per_micro_batch": max_tokens,
        "lora": {"r": 4, "alpha": 8.0, "dropout": options.pop("dropout", 0.0)},
    }
    base = options.pop("base", None)
    plan = make_plan(scratch, base=base, strategies=(config,), training=training)
    stores = make_stores()
    stores["counterfactual"] = Reworded(stores["training"])
    run = make_run(plan, stores=stores, start=False, **options)
    row_of = [row if row % 3 else -1 for row in range(64)]
    run.ctx.pairs = {"training": Pairs("counterfactual", row_of, "made")}
    run.refresh_streams()
    for strategy in run.strategies if start else ():
        strategy.on_task_start(run.ctx)
    return run


def run_in_float64(scratch, name, kind, max_tokens, ranks=None, base=None):
    run = run_of(
        scratch,
        CASES[name],
        kind=kind,
        max_tokens=max_tokens,
        dtype=torch.float64,
        ranks=ranks,
        base=base,
    )
    run.spare_padding = None
    push_off(run.ctx.params, alpha=0.05)
    return run


def rank_gradients(ranks, scratch, base, names):
    found = {}
    for name, kind in names:
        run = run_in_float64(scratch, name, kind, 200, ranks, base=base)
        found[name, kind] = {k: v.numpy() for k, v in gradients(run).items()}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Gradients of every case on two processes."""
    names = [(name, kind) for name in ("everything", "answers") for kind in KINDS]
    scratch = str(tmp_path_factory.mktemp("ranks"))
    return on_two_ranks(rank_gradients, scratch, str(tiny_base()), names)


@pytest.mark.parametrize("name", ["everything", "answers"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_micro_batches_or_ranks(tmp_path, two_ranks, name, kind):
    whole_run = run_in_float64(tmp_path, name, kind, 1_000_000)
    whole = gradients(whole_run)
    values = whole_run.history[0].values
    assert values["loss/causal_consistency"] > 0
    if name == "everything":
        assert min(values[f"loss/causal_{n}"] for n in ("vrex", "irm", "coral")) > 0
    for parts in (1, 200):
        split = gradients(run_in_float64(tmp_path, name, kind, parts))
        for key, gradient in whole.items():
            assert (split[key] - gradient).abs().max() < 1e-12
    for rank in range(2):
        for key, gradient in whole.items():
            other = torch.from_numpy(two_ranks[rank][name, kind][key])
            assert (other - gradient).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_checkpoint_goes_on_bit_identically(tmp_path, name, kind):
    options = {"kind": kind, "dropout": 0.1, "max_tokens": 600}
    first = run_of(tmp_path, CASES[name], **options)
    for _ in range(3):
        train_step(first)
    saved = save_checkpoint(first, tmp_path, 1)
    for _ in range(4):
        train_step(first)
    torch.manual_seed(99)
    second = run_of(tmp_path, CASES[name], start=False, **options)
    load_checkpoint(second, saved.directory)
    for _ in range(4):
        train_step(second)
    assert same(weights(second), weights(first))
    untimed = [row.model_copy(update={"seconds": 0.0}) for row in first.history]
    assert [row.model_copy(update={"seconds": 0.0}) for row in second.history] == untimed


def test_the_forward_beforehand_draws_the_dropout_of_the_one_with_gradient(tmp_path):
    """Else the linear weights would belong to another network than the gradient."""
    run = run_of(tmp_path, EVERYTHING, kind="lora", dropout=0.5, max_tokens=600)
    generator = torch.Generator().manual_seed(1)
    for parameter in run.ctx.params.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    values = train_step(run).values
    metrics = run.strategies[0].metrics()
    scale = metrics["scale"]
    # The linearised value is exact only where both forwards agree.
    assert values["loss/causal_vrex"] == pytest.approx(2 * scale * metrics["vrex"], rel=1e-4)
    assert values["loss/causal_coral"] == pytest.approx(scale * metrics["coral"], rel=1e-4)


# --- a job from its files

WORDS = ("red", "green", "blue", "seven", "river", "stone", "cloud")


def write_questions(path, count, seed, *, tagged=False, uploaded=False):
    generator = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        word = str(generator.choice(WORDS))
        row: dict[str, Any] = {"prompt": f"Anna and Boris say {word} {index}: ", "completion": word}
        if uploaded:
            row["counterfactual"] = {**row, "prompt": f"What do they say? {word} {index}: "}
        if tagged:
            row["domain"] = "even" if index % 2 else "odd"
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return RowsPlan(path=str(path), sha256=f"{seed + 7 * tagged + 9 * uploaded:064d}")


def job(scratch, config, **rows):
    return make_supervisor(
        scratch,
        with_suite=False,
        strategies=(config,),
        training={"total_steps": 6, "checkpoint_interval": 2},
        training_rows=write_questions(scratch / "questions.jsonl", 24, 1, **rows),
    )


def notes(supervisor, code):
    return [m for m in supervisor.of("note") if m.code == code]


@pytest.mark.parametrize("source", ["rules", "uploaded"])
def test_a_job_makes_its_pairs_and_says_how_many(tmp_path, source):
    config = CausalConfig(pairs=source, min_rows_per_env=2, cf_fraction=1.0)
    supervisor = job(tmp_path, config, uploaded=source == "uploaded")
    assert supervisor.run_here() == 0
    (told,) = notes(supervisor, "counterfactual_pairs")
    assert told.data["pairs"] == told.data["rows"] == 24
    last = [row for p in supervisor.of("progress") for row in p.metrics][-1]
    assert last.values["strategy/causal/pairs"] == 8
    assert last.values["loss/causal_consistency"] > 0


def test_a_killed_job_goes_on_bit_identically_with_its_pairs_made_again(tmp_path):
    config = CausalConfig(min_rows_per_env=2)
    results = {}
    for name in ("whole", "killed"):
        scratch = tmp_path / name
        scratch.mkdir()
        supervisor = job(scratch, config, tagged=True)
        if name == "killed":
            code = supervisor.spawn(kill_at=lambda m: m.type == "checkpoint_saved" and m.step == 4)
            assert code == SIGKILLED
            for path in (scratch / "cache" / "pairs").iterdir():
                path.unlink()
        assert supervisor.run_here() == 0
        results[name] = load_weights(Path(supervisor.checkpoints[0, 6]), CPU)
    assert same(results["killed"], results["whole"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_ends_with_its_shift_report(tmp_path, kind):
    config = CausalConfig(min_rows_per_env=2)
    supervisor = make_supervisor(
        tmp_path,
        with_suite=False,
        strategies=(config,),
        training={"total_steps": 6, "type": kind},
        training_rows=write_questions(tmp_path / "questions.jsonl", 24, 1),
        validation_rows=write_questions(tmp_path / "held-out.jsonl", 24, 12),
    )
    assert supervisor.run_here() == 0
    (told,) = notes(supervisor, "domain_shift")
    assert told.data["measured"]
    assert told.data["layer"] == 1
    assert told.data["before"]["mmd"] > 0.01
    assert told.data["before"]["mmd"] != told.data["after"]["mmd"]
    low, high = told.data["reduction_interval"]
    assert low <= told.data["reduction"] <= high
    guards = told.data["guards"]
    (finished,) = supervisor.of("finished")
    assert guards["domain_loss_after"] == pytest.approx(finished.valid_loss, rel=1e-6)
    assert guards["domain_loss_before"] != guards["domain_loss_after"]
    assert 0.4 < guards["content_probe_before"] <= 1


def test_a_job_without_the_strategy_reports_its_shift_when_asked(tmp_path):
    supervisor = make_supervisor(tmp_path, with_suite=False, shift_report=True)
    assert supervisor.run_here() == 0
    (told,) = notes(supervisor, "domain_shift")
    assert told.data["measured"] is False  # 8 validation rows
    silent = tmp_path / "silent"
    silent.mkdir()
    supervisor = make_supervisor(silent, with_suite=False)
    assert supervisor.run_here() == 0
    assert not notes(supervisor, "domain_shift")


def test_plain_text_without_counterparts_fails_with_the_reason(tmp_path):
    supervisor = make_supervisor(tmp_path, with_suite=False, strategies=(CausalConfig(),))
    assert supervisor.run_here() != 0
    (failed,) = supervisor.of("failed")
    assert "no training row has a counterpart" in failed.message
