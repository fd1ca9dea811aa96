"""Distillation: which rows, divided by what, against a written-out loss."""

import pytest
import torch

from tests.workers.strategies.stage import Stage
from workers.strategies.batch import Forward
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


def test_every_k_steps_distils_and_reads_general_rows_in_those_alone():
    strategy = Distillation(every=3)
    stage = stage_of(strategy)
    tokens, rows = [], []
    for _ in range(7):
        stage.train(1)
        tokens.append(strategy._tokens if strategy._is_due else 0)
        rows.append("general" in {s.name for s in stage.ctx.streams})
        assert bool(strategy.step_needs(stage.ctx).teacher_sources) == strategy._is_due
    assert [t > 0 for t in tokens] == rows == [False, False, True, False, False, True, False]
    assert strategy.metrics()["applied_norm"] > 0  # of the last step that distilled


def test_hidden_layers_are_the_last_and_every_fourth_unless_named():
    stage = stage_of(Distillation(hidden_coef=1.0))
    strategy = stage.strategies[0]
    for layers, expected in ((1, {1}), (4, {4}), (10, {4, 8, 10})):
        stage.ctx.num_layers = layers
        needs = strategy.step_needs(stage.ctx)
        assert needs.hidden_layers == needs.teacher_hidden_layers == expected
    with pytest.raises(ValueError, match="0 to 1, not 3"):
        stage_of(Distillation(hidden_coef=1.0, hidden_layers=(0, 3)))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_states_are_pulled_to_the_teachers_at_the_distilled_positions(kind):
    stage = stage_of(
        Distillation(hidden_coef=0.5, hidden_layers=(0, 1), hidden_loss=kind),
        strength=3.0,
        micro_rows=3,
    )
    shift(stage)
    stage.strategies[0].on_step_start(stage.ctx)
    stage.gradients()
    total, tokens = 0.0, 0
    for micro in stage.micros():
        mask = micro.source_mask_N(frozenset({"general"}))
        at = micro.positions_N[mask]
        with torch.no_grad():
            for model in (stage.model, stage.base):
                model(micro.input_ids_BT, micro.positions_N)
        for layer in (0, 1):
            own, base = (
                m.hidden_BTD[layer].detach().reshape(-1, 6)[at] for m in (stage.model, stage.base)
            )
            if kind == "mse":
                total += float(((own - base).norm(dim=-1) / base.norm(dim=-1)).square().sum()) / 2
            else:
                cosine = (own * base).sum(-1) / own.norm(dim=-1) / base.norm(dim=-1)
                total += float((1 - cosine).sum()) / 2
        tokens += int(mask.sum())
    found = stage.losses[-1]["distillation_hidden"]
    assert found == pytest.approx(3.0 * 0.5 * total / tokens, rel=1e-9)
    assert stage.strategies[0].metrics()["hidden"] == pytest.approx(total / tokens, rel=1e-9)


def test_a_cached_teacher_is_never_run_in_training_and_pulls_like_the_one_that_is():
    cached = stage_of(Distillation(teacher="cached", top_k=11), strength=2.0)
    online = stage_of(Distillation(), strength=2.0)
    for stage in (cached, online):
        shift(stage)
        stage.strategies[0].on_step_start(stage.ctx)
    left, right = online.gradients(), cached.gradients()
    for name, gradient in left.items():  # all 11 ids are kept: half precision is what is left
        assert (right[name] - gradient).norm() < 2e-3 * gradient.norm()
    calls = []
    handle = cached.base.register_forward_hook(lambda *_: calls.append(1))
    cached.train(5)
    handle.remove()
    assert calls == []
    assert cached.strategies[0].metrics()["applied_norm"] > 0


def test_a_cached_student_at_the_start_is_hardly_pulled():
    stage = stage_of(Distillation(teacher="cached", top_k=3))
    stage.gradients()
    assert abs(stage.losses[-1]["distillation"]) < 1e-6  # half precision, normalised anew


def test_the_cache_holds_no_more_general_rows_than_asked_for_spread_over_the_file():
    stage = stage_of(Distillation(teacher="cached", cache_rows=5))
    (stream,) = [s for s in stage.streams() if s.name == "general"]
    assert stream.rows == (0, 4, 8, 12, 16)


def generated_of(**knobs):
    settings = {"generated_rows": 5, "generated_tokens": 3, **knobs}
    return stage_of(Distillation(on=("generated",), **settings))


def test_rows_that_the_student_decodes_are_read_by_the_teacher_and_are_no_task():
    stage = generated_of().train(1)
    (stream,) = [s for s in stage.streams() if s.name == "generated"]
    assert (stream.store, stream.counts_as_task) == ("distillation-generated-0", False)
    assert stream.rows == (0, 1, 2, 3, 4)
    assert not stage.strategies[0].needs().general_rows
    prompts = [tuple(row[:2]) for row in stage.training]
    made = stage.stores[stream.store]
    assert all(tuple(row[:2]) in prompts and len(row) == 5 for row in made)
    assert stage.strategies[0].metrics()["kd_tokens"] > 0


def test_rows_are_decoded_anew_every_so_many_steps_and_in_every_task():
    stage = generated_of(generate_every=2)
    strategy = stage.strategies[0]
    seen = []
    for _ in range(5):
        stage.train(1)
        seen.append(strategy.generated.made_at)
    assert seen == [(0, 0), (0, 0), (0, 2), (0, 2), (0, 4)]
    once = generated_of()
    once.train(4)
    assert once.strategies[0].generated.made_at == (0, 0)
    once.ctx.task_index = 1
    once.stores["training-1"] = once.training
    once.train(1)
    assert once.strategies[0].generated.made_at == (1, 4)


def test_decoded_rows_that_are_not_all_there_are_refused():
    stage = generated_of().train(2)
    state = stage.strategies[0].state_dict()
    other = generated_of().strategies[0]
    for name in ("generated/ids", "generated/lengths"):
        tensors = {k: v for k, v in state["tensors"].items() if k != name}
        with pytest.raises(ValueError, match="not all there"):
            other.load_state_dict({**state, "tensors": tensors})
    cut = {**state["tensors"], "generated/ids": state["tensors"]["generated/ids"][:-1]}
    with pytest.raises(ValueError, match="wrong lengths"):
        other.load_state_dict({**state, "tensors": cut})


def test_cka_to_the_base_is_told_as_a_task_ends():
    stage = stage_of(Distillation())
    told = []
    stage.ctx.note = lambda *parts: told.append(parts)
    strategy = stage.strategies[0]
    strategy.on_task_end(stage.ctx)
    assert strategy.metrics()["cka_min"] == pytest.approx(1.0, abs=1e-9)
    shift(stage)
    strategy.on_task_end(stage.ctx)
    code, message, data = told[1]
    assert code == "cka"
    assert data["store"] == "general"
    assert set(data["layers"]) == {"0", "1"}
    assert strategy.metrics()["cka_min"] == min(data["layers"].values()) < 0.999
    assert f"{min(data['layers'].values()):.4f}" in message
    restored = stage_of(Distillation()).strategies[0]
    restored.load_state_dict(strategy.state_dict())
    assert restored.metrics()["cka_min"] == strategy.metrics()["cka_min"]


def test_without_general_rows_cka_is_measured_on_domain_rows():
    stage = stage_of(Distillation(on=("domain",)), general=[])
    told = []
    stage.ctx.note = lambda *parts: told.append(parts)
    stage.strategies[0].on_task_end(stage.ctx)
    assert told[0][2]["store"] == "training"
    silent = stage_of(Distillation(cka_rows=0))
    silent.ctx.note = lambda *parts: told.append(parts)
    silent.strategies[0].on_task_end(silent.ctx)
    assert len(told) == 1
