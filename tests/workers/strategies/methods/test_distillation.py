"""Distillation: which rows, divided by what, against a written-out loss."""

import pytest
import torch

from tests.workers.strategies.stage import Stage
from workers.strategies.base import Forward
from workers.strategies.methods.distillation import Distillation
from workers.strategies.methods.replay import Replay


def stage_of(strategy, *others, strength=1.0, **overrides):
    coefs = {"distillation": strength, "replay": 0.25}
    return Stage([strategy, *others], coefs, **overrides)


def shift(stage):
    """Moves the student away from its teacher."""
    with torch.no_grad():
        for index, p in enumerate(stage.params.values()):
            wave = torch.cos(torch.arange(p.numel(), dtype=p.dtype) + index)
            p.add_(0.2 * wave.view_as(p))


def test_auto_distils_general_rows_and_replayed_ones_where_there_are_any():
    alone, beside = stage_of(Distillation()), stage_of(Distillation(), Replay())
    assert [s.name for s in alone.streams()] == ["domain", "general"]
    assert {s.name for s in beside.streams()} == {"domain", "general", "replay"}
    for stage in (alone, beside):
        distilled = stage.strategies[0]
        expected = sum(
            int((micro.source_mask_N(frozenset({"general", "replay"}))).sum())
            for micro in stage.micros()
        )
        counted = sum(
            distilled.count_terms(stage.ctx, micro)["kd_tokens"] for micro in stage.micros()
        )
        assert counted == expected > 0


def test_general_rows_stay_outside_the_cross_entropy():
    stage = stage_of(Distillation(general_ratio=0.5))
    (stream,) = [s for s in stage.streams() if s.name == "general"]
    assert not stream.counts_as_task
    assert stream.rows_per_step == 0.5
    assert stream.rows == tuple(range(20))


@pytest.mark.parametrize("on", [("domain",), ("replay",), ("domain", "replay")])
def test_no_general_stream_where_none_is_asked_for(on):
    strategy = Distillation(on=on)
    assert [s.name for s in stage_of(strategy).streams()] == ["domain"]
    assert strategy.needs().teacher_sources == frozenset(on)
    assert not strategy.needs().general_rows  # replayed rows are the replay strategy's


def test_strength_zero_asks_for_nothing():
    stage = stage_of(Distillation(), strength=0.0)
    (micro,) = stage.micros()
    strategy = stage.strategies[0]
    assert [s.name for s in stage.streams()] == ["domain"]
    assert strategy.count_terms(stage.ctx, micro) == {}
    assert strategy.loss_terms(stage.ctx, micro, stage.forward(micro)) == ()


def test_loss_is_the_mean_over_distilled_tokens_times_the_strength():
    stage = stage_of(Distillation(temperature=2.0), strength=3.0, micro_rows=3)
    shift(stage)
    stage.strategies[0].on_step_start(stage.ctx)
    stage.gradients()
    total, tokens = 0.0, 0
    for micro in stage.micros():
        mask = micro.source_mask_N(frozenset({"general"}))
        with torch.no_grad():
            student = stage.model(micro.input_ids_BT, micro.positions_N)[mask] / 2
            teacher = stage.base(micro.input_ids_BT, micro.positions_N)[mask] / 2
        p, q = teacher.softmax(-1), student.softmax(-1)
        total += 4 * float((p * (p.log() - q.log())).sum())
        tokens += int(mask.sum())
    assert stage.losses[-1]["distillation"] == pytest.approx(3 * total / tokens)
    metrics = stage.strategies[0].metrics()
    assert metrics["kd_nats"] == pytest.approx(total / tokens)
    assert metrics["penalty"] == pytest.approx(3 * total / tokens)
    assert metrics["kd_tokens"] == tokens


def test_applied_norm_is_that_of_the_gradient_at_the_logits():
    stage = stage_of(Distillation(on=("domain",)), strength=0.5)
    shift(stage)
    strategy = stage.strategies[0]
    strategy.on_step_start(stage.ctx)
    (micro,) = stage.micros()
    out = stage.forward(micro)
    logits = out.logits_NV.detach().requires_grad_()
    given = Forward(logits, out.teacher_logits_NV, out.teacher_mask_N)
    (term,) = strategy.loss_terms(stage.ctx, micro, given)
    (term.coef * term.numerator / len(logits)).backward()
    assert strategy.metrics()["applied_norm"] == pytest.approx(logits.grad.norm().item())


def test_rows_that_the_teacher_read_for_others_are_left_out():
    stage = stage_of(Distillation(on=("general",)))
    shift(stage)
    strategy = stage.strategies[0]
    micro = next(m for m in stage.micros() if "general" in m.sources)
    own = micro.source_mask_N(frozenset({"general"}))
    with torch.no_grad():
        teacher = stage.base(micro.input_ids_BT, micro.positions_N)
    logits = stage.model(micro.input_ids_BT, micro.positions_N)
    everything = torch.ones_like(own)
    (wide,) = strategy.loss_terms(stage.ctx, micro, Forward(logits, teacher, everything))
    (narrow,) = strategy.loss_terms(stage.ctx, micro, Forward(logits, teacher[own], own))
    assert torch.equal(wide.numerator, narrow.numerator)


def test_a_forward_without_the_teacher_is_an_error():
    stage = stage_of(Distillation(on=("domain",)))
    (micro,) = stage.micros()
    out = stage.forward(micro)
    strategy = stage.strategies[0]
    with pytest.raises(ValueError, match="without the teacher"):
        strategy.loss_terms(stage.ctx, micro, Forward(out.logits_NV))
    assert out.teacher_mask_N is not None
    assert out.teacher_logits_NV is not None
    partly = out.teacher_mask_N.clone()
    partly[0] = False
    with pytest.raises(ValueError, match="not read all"):
        strategy.loss_terms(
            stage.ctx, micro, Forward(out.logits_NV, out.teacher_logits_NV[1:], partly)
        )


def test_without_general_rows_it_says_so():
    with pytest.raises(ValueError, match="no general rows"):
        stage_of(Distillation(), general=[]).streams()


def test_student_at_the_start_has_no_loss():
    stage = stage_of(Distillation())
    stage.gradients()
    assert abs(stage.losses[-1]["distillation"]) < 1e-14


def test_strength_holds_the_student_nearer_to_its_teacher():
    nats = []
    for strength in (1e-9, 3.0):
        stage = stage_of(Distillation(general_ratio=1.0), strength=strength).train(30)
        nats.append(stage.strategies[0].metrics()["kd_nats"])
    assert nats[1] < 0.6 * nats[0]
