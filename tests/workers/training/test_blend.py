"""The line from base to now: of adapters that act, and of a backbone that was trained before an adapter."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import make_tokenizer
from tests.workers.training.runs import CPU, make_plan, make_run
from tests.workers.training.staged import (
    NAMES,
    STEPS,
    adapters,
    all_weights,
    make_staged_plan,
    make_staged_run,
)
from workers.export.merge import active_adapters, base_name, merged_weights
from workers.training.blend import line_from_base
from workers.training.exporting import write_artifact
from workers.training.loop import train_step
from workers.training.models import load_base, lora_pairs

IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_model():
    return load_base(make_plan("unused").base, CPU, torch.float32).eval()


def trained(scratch, *configs, steps, **more):
    run = make_staged_run(scratch, *configs, **more)
    for _ in range(steps):
        train_step(run)
    run.model.eval()
    return run


def late_run(scratch, steps=2 * STEPS):
    """A backbone, then an adapter on it, in one model."""
    return trained(
        scratch,
        names=("tuned", "late"),
        kind="full",
        trains=("backbone", "adapter"),
        training={"late_adapter": True},
        steps=steps,
    )


def line_of(run):
    plan = make_plan("unused")
    return line_from_base(run.model, run.all_params, plan.base, is_lora=run.training.type == "lora")


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("compose", ["separate", "stacked"])
def test_the_active_adapters_alone_are_scaled(tmp_path, kind, compose):
    run = trained(tmp_path, adapters(kind=kind, compose=compose), steps=2 * STEPS + 2)
    before, tuned, base = all_weights(run), logits(run.model), logits(base_model())
    active = NAMES if compose == "stacked" else NAMES[2:]
    with line_of(run) as line:
        line.set(0.0)
        assert torch.equal(logits(run.model), base)
        line.set(0.25)
        scaled = {n for name in active for n in run.ctx.adapters.params[name]}
        for name, parameter in run.all_params.items():
            is_scaled = name in scaled and ("lora_B" in name or name.endswith(".up"))
            expected = before[name] * 0.25 if is_scaled else before[name]
            assert torch.equal(parameter, expected), name
    assert torch.equal(logits(run.model), tuned)
    assert not torch.equal(tuned, base)


def test_a_backbone_and_a_late_adapter_go_back_to_the_base_together(tmp_path):
    run = late_run(tmp_path)
    base = base_model()
    start = dict(base.named_parameters())
    tuned = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    moved = [
        n for n, w in tuned.items() if ".lora_" not in n and not torch.equal(w, start[base_name(n)])
    ]
    assert moved
    assert any("base_layer" in name for name in moved)
    assert all(bool(pair.lora_B.any()) for pair in run.all_pairs)
    before = logits(run.model)
    with run.model.disable_adapter():
        assert not torch.equal(logits(run.model), logits(base))  # that is the tuned backbone
    line = line_of(run)
    line.set(0.0)
    assert torch.equal(logits(run.model), logits(base))
    line.set(0.3)
    for pair in lora_pairs(run.model):
        name = f"{pair.name}.base_layer.weight"
        w0, w1 = start[base_name(name)].detach().double(), tuned[name].double()
        b, a = (
            tuned[f"{pair.name}.lora_B.default.weight"],
            tuned[f"{pair.name}.lora_A.default.weight"],
        )
        expected = 0.7 * w0 + 0.3 * w1 + 0.3 * pair.scale * (b.double() @ a.double())
        found = pair.base_weight.double() + pair.scale * (
            pair.lora_B.double() @ pair.lora_A.double()
        )
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
    line.restore()
    assert all(torch.equal(p, tuned[n]) for n, p in run.model.named_parameters())
    assert torch.equal(logits(run.model), before)


def test_before_the_late_adapter_begins_the_line_is_that_of_the_backbone(tmp_path):
    run = late_run(tmp_path, steps=STEPS)
    tuned = logits(run.model)
    with line_of(run) as line:
        line.set(0.0)
        assert torch.equal(logits(run.model), logits(base_model()))
    assert torch.equal(logits(run.model), tuned)


def test_a_late_adapter_is_published_merged_into_the_tuned_weights(tmp_path):
    run = late_run(tmp_path)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    line = line_of(run)
    for alpha in (1.0, 0.5):
        line.set(alpha)
        plan = make_staged_plan(
            tmp_path, names=("tuned", "late"), kind="full", trains=("backbone", "adapter")
        )
        directory = tmp_path / f"artifact-{alpha}"
        write_artifact(plan, run.model, make_tokenizer(), directory, alpha=alpha)
        loaded = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True).eval()
        assert {n for n, _ in loaded.named_parameters()} == {
            n for n, _ in base_model().named_parameters()
        }
        torch.testing.assert_close(logits(loaded), logits(run.model), rtol=1e-5, atol=1e-5)
        pair = run.all_pairs[0]
        expected = pair.base_weight + pair.scale * pair.lora_B @ pair.lora_A
        found = dict(loaded.named_parameters())[f"{base_name(pair.name)}.weight"]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)
    line.restore()
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def test_merged_weights_add_every_active_adapter_and_only_those(tmp_path):
    run = trained(tmp_path, adapters(compose="stacked"), steps=2 * STEPS)
    assert active_adapters(run.model) == NAMES[:2]
    base = base_model()
    merged = merged_weights(run.model)
    assert merged.keys() == base.state_dict().keys()
    expected = dict(base.state_dict())
    for pair in run.all_pairs:
        key = f"{base_name(pair.name.removesuffix(f'.{pair.adapter}'))}.weight"
        expected[key] = expected[key] + (pair.scale * pair.lora_B @ pair.lora_A).detach()
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    base.load_state_dict(merged)
    torch.testing.assert_close(logits(base), logits(run.model), rtol=1e-5, atol=1e-5)


def test_without_adapters_the_line_is_that_of_the_weights(tmp_path):
    run = make_run(make_plan(tmp_path))
    train_step(run)
    run.model.eval()
    with line_of(run) as line:
        line.set(0.0)
        assert torch.equal(logits(run.model), logits(base_model()))
