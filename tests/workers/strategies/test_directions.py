"""Directions of displacement: written, read, and seen from an adapter's factors."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.workers.training.runs import make_plan, make_run, tiny_base
from workers.strategies.directions import (
    Direction,
    base_name,
    displacement,
    fit,
    read_difference,
    read_trajectory,
    write_trajectory,
)
from workers.training.loop import train_step

F64 = torch.float64


def test_a_pulled_back_direction_is_the_adjoint_of_the_effective_change():
    """<s (dB A + B dA), D> = <dA, s B' D> + <dB, s D A'>, dense and in factors."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    lora_A, lora_B, left, right = draw(2, 7), draw(5, 2), draw(5, 3), draw(3, 7)
    for direction in (Direction(left @ right), Direction(None, left, right)):
        assert direction.shape == (5, 7)
        along_A, along_B = direction.pulled_back(lora_A, lora_B, 1.5)
        for _ in range(5):
            dA, dB = draw(2, 7), draw(5, 2)
            effective = 1.5 * (dB @ lora_A + lora_B @ dA)
            inner = float((effective * direction.whole()).sum())
            assert float((dA * along_A).sum() + (dB * along_B).sum()) == pytest.approx(inner)


def test_names_are_those_of_the_bare_base_model():
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert base_name(name) == "model.layers.0.self_attn.q_proj.weight"
    assert base_name("model.norm.weight") == "model.norm.weight"


def trained(scratch, kind, *, steps=3, seed=7, **training):
    run = make_run(make_plan(scratch, training={"type": kind, "seed": seed, **training}))
    start = {name: p.detach().clone() for name, p in run.ctx.params.items()}
    for _ in range(steps):
        train_step(run)
    return run, start


def publish(run, start, directory):
    directory.mkdir()
    run.model.save_pretrained(directory)
    write_trajectory(directory, displacement(run.ctx, start))
    return directory


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A full model and an adapter, each with its trajectory."""
    scratch = tmp_path_factory.mktemp("published")
    found = {}
    for kind in ("full", "lora"):
        run, start = trained(scratch, kind)
        found[kind] = publish(run, start, scratch / kind)
    return found


def test_a_full_models_trajectory_is_how_far_each_weight_came(published):
    base = AutoModelForCausalLM.from_pretrained(tiny_base())
    tuned = AutoModelForCausalLM.from_pretrained(published["full"])
    before = dict(base.named_parameters())
    found = read_trajectory(published["full"])
    assert found.keys() == before.keys()
    for name, after in tuned.named_parameters():
        assert torch.allclose(found[name].whole(), after - before[name], atol=1e-7)
    difference = read_difference(published["full"], tiny_base())
    for name, direction in difference.items():
        assert torch.allclose(direction.whole(), found[name].whole(), atol=1e-7)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapters_trajectory_is_the_change_of_the_merged_weights(published):
    base = AutoModelForCausalLM.from_pretrained(tiny_base())
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, published["lora"]).merge_and_unload()
    after = dict(merged.named_parameters())
    found = read_trajectory(published["lora"])
    assert {n for n in before if not torch.equal(before[n], after[n])} == found.keys()
    for name, direction in found.items():
        assert torch.allclose(direction.whole(), after[name] - before[name], atol=1e-6)
    files = load_file(published["lora"] / "trajectory.safetensors")
    assert all(tensor.shape[0] <= 128 and 4 in tensor.shape for tensor in files.values())


def test_an_adapter_without_a_trajectory_is_its_own(published, tmp_path):
    recorded = read_trajectory(published["lora"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((published["lora"] / name).read_bytes())
    for name, direction in read_trajectory(tmp_path).items():
        assert torch.allclose(direction.whole(), recorded[name].whole(), atol=1e-6)


def test_the_difference_of_two_adapters_is_that_of_their_changes(published, tmp_path):
    run, start = trained(tmp_path, "lora", steps=5, seed=11)
    later = publish(run, start, tmp_path / "later")
    new, old = read_trajectory(later), read_trajectory(published["lora"])
    for name, direction in read_difference(later, published["lora"]).items():
        assert torch.allclose(direction.whole(), new[name].whole() - old[name].whole(), atol=1e-6)


@pytest.mark.parametrize("source", ["full", "lora"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_any_trajectory_fits_any_job_on_the_same_base(published, tmp_path, source, kind):
    run = make_run(make_plan(tmp_path, training={"type": kind}))
    fitting = fit(run.ctx, read_trajectory(published[source]))
    adapted = {name for name in fitting if "q_proj" in name or "v_proj" in name}
    assert adapted
    if source == kind == "full":
        assert len(fitting) == len(run.ctx.params)
    else:
        assert all("proj" in name for name in fitting)


def test_a_reference_that_does_not_fit_is_refused(published, tmp_path):
    run = make_run(make_plan(tmp_path))
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="no weight of this model"):
        fit(run.ctx, {"model.layers.9.self_attn.q_proj.weight": Direction(torch.zeros(32, 32))})
    with pytest.raises(ValueError, match=r"has shape \(32, 31\)"):
        fit(run.ctx, {name: Direction(torch.zeros(32, 31))})
    lora = make_run(make_plan(tmp_path, training={"type": "lora"}))
    with pytest.raises(ValueError, match="no direction for any weight"):
        fit(lora.ctx, {"model.norm.weight": Direction(torch.zeros(32))})


def test_models_that_can_not_be_compared_are_refused(published, tmp_path):
    with pytest.raises(ValueError, match="two adapters or two full models"):
        read_difference(published["full"], published["lora"])
    with pytest.raises(ValueError, match=r"no trajectory.safetensors"):
        read_trajectory(tiny_base())
    weights = load_file(tiny_base() / "model.safetensors")
    name = next(iter(weights))
    other = tmp_path / "other"
    other.mkdir()
    save_file({**weights, name: weights[name][:-1].contiguous()}, other / "model.safetensors")
    with pytest.raises(ValueError, match="shape"):
        read_difference(other, tiny_base())
    weights.pop(name)
    save_file(weights, other / "model.safetensors")
    with pytest.raises(ValueError, match="in one of them alone"):
        read_difference(other, tiny_base())
    (other / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="can't be read"):
        read_difference(other, tiny_base())


@pytest.mark.parametrize("knob", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 4}}])
def test_only_plain_adapters_are_read(published, tmp_path, knob):
    config = json.loads((published["lora"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **knob}))
    with pytest.raises(ValueError, match="only plain LoRA"):
        read_trajectory(tmp_path)
    weights = load_file(published["lora"] / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    name, direction = next(iter(read_trajectory(tmp_path).items()))
    plain = Direction(None, *_factors(published["lora"], name)).whole()
    rank = config["r"]
    assert torch.allclose(direction.whole(), plain * config["lora_alpha"] / rank**0.5)


def _factors(directory, name):
    weights = load_file(directory / "adapter_model.safetensors")
    layer = "base_model.model." + name.removesuffix(".weight")
    return weights[f"{layer}.lora_B.weight"], weights[f"{layer}.lora_A.weight"]


def test_an_index_names_the_files_of_full_weights(published, tmp_path):
    weights = load_file(published["full"] / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({n: weights[n] for n in own}, tmp_path / file)
    index = {"weight_map": {n: file for file, own in parts.items() for n in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_difference(tmp_path, published["full"])
    assert sorted(found) == names
    assert not any(direction.whole().any() for direction in found.values())
