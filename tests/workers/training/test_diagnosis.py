"""Planted damage is told apart, and a diagnosis leaves the training as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.domain.benchmarks import pack_array
from app.domain.configs.quadratic import L2SpConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.decisions import Damage, Diagnosis
from app.domain.diagnosis import kind_of
from app.domain.messages import EXIT_DONE
from app.domain.policy import Policy
from tests.workers.training.planted import (
    FORMAT,
    KNOWLEDGE,
    POLICY,
    FactRows,
    diagnose_planted,
    learn_facts,
    make_fact_run,
    make_fact_suite,
    plant,
)
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import CPU, make_plan, same, weights
from workers.training.build import build_run
from workers.training.diagnosis import (
    ROWS_PER_STEP,
    STEPS,
    diagnose,
    find_regression,
    held_loss,
    plan_replay,
    rehearse,
    replay_steps,
    throw_away,
)
from workers.training.loop import train_step

DAMAGES = [(kind, Damage.FORMAT) for kind in FORMAT] + [
    (kind, Damage.KNOWLEDGE) for kind in KNOWLEDGE
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_planted_damage_is_told_apart(tmp_path, damage, expected) -> None:
    found = diagnose_planted(tmp_path, damage, 0, 0.6)
    assert kind_of(found) is expected
    assert found.benchmarks == ("facts",)
    assert (found.n_items, found.steps) == (64, STEPS)
    assert found.rows <= STEPS * ROWS_PER_STEP[0]
    assert found.seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("expected", [Damage.FORMAT, Damage.KNOWLEDGE])
def test_of_planted_damage_nine_in_ten_are_told_right_and_the_others_are_unclear(
    tmp_path_factory, expected
) -> None:
    told = [
        kind_of(diagnose_planted(tmp_path_factory.mktemp("run"), damage, seed, depth))
        for seed in range(10)
        for damage, kind in DAMAGES
        if kind is expected
        for depth in (0.3, 0.6)
    ]
    assert len(told) == 40
    assert told.count(expected) >= 36
    assert set(told) <= {expected, Damage.UNCLEAR}


def run_supervised(scratch, *, diagnosis, **rest):
    """A run whose every evaluation regresses, for its baseline is one that no model reaches; all are kept."""
    scratch.mkdir()
    policy = Policy(eval_interval=4, gate_items=24, max_drop=0.01, diagnosis=diagnosis)
    supervisor = make_supervisor(scratch, policy=policy, **rest)
    choice, text = supervisor.plan.benchmarks
    perfect = choice.model_copy(update={"baseline_scores": pack_array(np.ones(24, np.float32))})
    few = {
        "baseline_scores": pack_array(np.full(24, 0.5, np.float32)),
        "baseline_tokens": pack_array(np.full(24, 20, np.float32)),
    }
    easy = text.model_copy(update=few)
    supervisor.plan = supervisor.plan.model_copy(update={"benchmarks": (perfect, easy)})
    assert supervisor.run_here() == EXIT_DONE
    return supervisor


@pytest.mark.parametrize(
    ("strategies", "training"),
    [
        ((), {"type": "full"}),
        ((ReplayConfig(strength=0.5), L2SpConfig()), {"type": "full"}),
        ((), {"type": "lora", "lora": {"r": 4, "alpha": 8.0, "dropout": 0.2}}),
    ],
)
def test_training_is_bit_identical_with_diagnosis_on_and_off(
    tmp_path, strategies, training
) -> None:
    on, off = (
        run_supervised(tmp_path / name, diagnosis=is_on, strategies=strategies, training=training)
        for name, is_on in (("on", True), ("off", False))
    )
    diagnoses = [m.diagnosis for m in on.of("evaluated")]
    assert len(diagnoses) == 3
    assert all(d is not None and d.share is not None and d.drop > 1 for d in diagnoses)
    assert [m.diagnosis for m in off.of("evaluated")] == [None] * 3
    for left, right in zip(on.of("evaluated"), off.of("evaluated"), strict=True):
        assert left.carry == right.carry
        assert left.scores == right.scores
    for point, directory in on.checkpoints.items():
        for part in ("model", "optimizer"):
            files = [f"{d}/{part}.safetensors" for d in (directory, off.checkpoints[point])]
            assert same(*map(load_file, files))
    (finished,) = on.of("finished")
    assert finished.seconds["diagnosis"] > 0
    assert "diagnosis" not in off.of("finished")[0].seconds
    assert "diagnosis" in {m.phase for m in on.of("progress")}


def test_without_general_rows_it_is_unclear_and_says_so(tmp_path) -> None:
    supervisor = run_supervised(tmp_path / "run", diagnosis=True, general_rows=None)
    first = supervisor.of("evaluated")[0].diagnosis
    assert (kind_of(first), first.share) == (Damage.UNCLEAR, None)
    assert first.reason == "the job has no general data to replay"


def test_few_general_rows_and_broken_scores_are_unclear(tmp_path) -> None:
    facts = learn_facts(0)
    run = make_fact_run(tmp_path, facts)
    suite = make_fact_suite(run, facts)
    run.stores["general"] = FactRows(facts.general[:15], facts.answers[facts.general[:15]])
    plant("noise", run.model, facts, np.random.default_rng(0), 0.5)
    marks = suite.measure("gate")
    reading = find_regression(run, suite, POLICY, marks)
    assert reading is not None
    few = diagnose(run, suite, POLICY, reading, marks)
    assert few.reason == "there are fewer than 16 general rows to replay"
    broken = diagnose(run, suite, POLICY, reading.model_copy(update={"not_finite": True}), marks)
    assert broken.reason == "a score is not a finite number"
    assert kind_of(few) is kind_of(broken) is Damage.UNCLEAR


def test_only_a_regression_is_diagnosed_and_only_where_the_policy_asks(tmp_path) -> None:
    facts = learn_facts(0)
    run = make_fact_run(tmp_path, facts)
    suite = make_fact_suite(run, facts)
    assert find_regression(run, suite, POLICY, suite.measure("gate")) is None
    plant("noise", run.model, facts, np.random.default_rng(0), 0.5)
    marks = suite.measure("gate")
    assert find_regression(run, suite, POLICY, marks) is not None
    assert find_regression(run, suite, Policy(diagnosis=False), marks) is None
    assert find_regression(run, suite, None, marks) is None


def test_what_is_thrown_away_comes_back_exactly_also_after_an_error(tmp_path) -> None:
    run = make_fact_run(tmp_path, learn_facts(0))
    train_step(run)
    before, state = weights(run), torch.get_rng_state()
    replay = plan_replay(run)

    def fall() -> None:
        with throw_away(run):
            replay_steps(run, replay, 3.0)
            assert not same(before, weights(run))
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fall()
    assert same(before, weights(run))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in run.ctx.params.values())
    assert run.model.training


def test_the_rows_of_the_steps_and_those_that_judge_them_are_apart_and_follow_from_the_point(
    tmp_path,
) -> None:
    run = make_fact_run(tmp_path, learn_facts(0))
    replay = plan_replay(run)
    read = np.concatenate(replay.steps)
    assert not np.intersect1d(read, replay.held).size
    assert len(replay.held) == 14  # a quarter of 56
    assert np.array_equal(np.concatenate(plan_replay(run).steps), read)
    run.step += 1
    assert not np.array_equal(np.concatenate(plan_replay(run).steps), read)


def rehearsed(scratch, facts):
    """What is known, in shares of the benchmark, before and after a rehearsal of planted format damage; the run."""
    run = make_fact_run(scratch, facts)
    suite = make_fact_suite(run, facts)
    plant("shifted", run.model, facts, np.random.default_rng(1), 0.6)
    before = suite.measure("gate")["benchv_facts"].scores.mean()
    assert rehearse(run, 1.0) == STEPS
    return before, suite.measure("gate")["benchv_facts"].scores.mean(), run


def test_a_rehearsal_brings_lost_format_back_for_good_and_alike_when_it_is_done_again(
    tmp_path,
) -> None:
    facts = learn_facts(0)
    state = torch.get_rng_state()
    before, after, run = rehearsed(tmp_path, facts)
    assert before < 0.45
    assert after > 0.85
    assert torch.equal(state, torch.get_rng_state())
    assert same(weights(run), weights(rehearsed(tmp_path, facts)[2]))


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_repair_begins_with_replay_steps_and_scales_back_only_where_they_do_not_suffice(
    tmp_path, is_enough
) -> None:
    policy = Policy(
        eval_interval=4,
        gate_items=10,
        max_drop=0.9,
        max_nll_increase=50.0 if is_enough else 0.05,
        diagnosis=False,
    )
    supervisor = make_supervisor(
        tmp_path,
        decide=lambda _, m: (
            {"repair": True, "replay_rate": 1.0 if is_enough else 1e-6} if m.step == 8 else {}
        ),
        training={"learning_rate": 3e-2, "lr_scheduler": "constant"},
        policy=policy,
    )
    digits = "\n".join(json.dumps({"text": "0123456789 " * 3}) for _ in range(40))
    Path(supervisor.plan.training_rows.path).write_text(digits)
    assert supervisor.run_here() == EXIT_DONE
    (repaired,) = supervisor.of("repaired")
    assert repaired.replay_steps == STEPS
    assert next(iter(repaired.tried)) == "1"
    if is_enough:
        assert (repaired.alpha, repaired.holds, len(repaired.tried)) == (1.0, True, 1)
    else:
        assert len(repaired.tried) > 1
        assert repaired.holds is (repaired.alpha < 1)


def replay_as_rank(ranks, scratch, facts):
    """The held loss after replay steps of one rank's run, and one of its weights."""
    plan = make_plan(scratch, base=facts.directory)
    general = FactRows(facts.general, facts.answers[facts.general])
    run = build_run(plan, {"training": general, "general": general}, ranks, CPU)
    replay = plan_replay(run)
    with throw_away(run):
        replay_steps(run, replay, 1.0)
        loss = held_loss(run, replay)
        norm = next(iter(run.ctx.params.values())).detach().clone().numpy()
    return loss, norm


def test_two_ranks_replay_alike(tmp_path) -> None:
    (first, norm), (second, other) = on_two_ranks(replay_as_rank, tmp_path, learn_facts(0))
    assert first == second
    assert np.array_equal(norm, other)


def test_a_diagnosis_without_numbers_travels() -> None:
    found = Diagnosis(reason="the job has no general data to replay")
    assert Diagnosis.model_validate(found.model_dump(mode="json")) == found
