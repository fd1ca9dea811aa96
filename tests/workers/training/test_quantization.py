"""A quantised base: what its layers compute, what they weigh, and that runs on it are exact and repeatable."""

import importlib.util

import numpy as np
import peft
import pytest
import torch
from scipy.stats import norm
from torch import nn

from app.domain.configs.quadratic import EwcConfig
from app.domain.estimates_job import find_trained
from app.domain.estimates_memory import MicroSize, Numbers, base_bytes, measure_memory
from app.domain.estimates_shapes import describe_shape
from app.errors import TrainingFailed
from tests.workers.training.runs import CPU, make_plan, make_run, same, weights
from workers.strategies.modes import evaluating
from workers.training.blend import line_from_base
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.footprint import measure_footprint
from workers.training.loop import train_step
from workers.training.models import load_base, lora_pairs
from workers.training.quantization import (
    QuantizedLinear,
    count_weights,
    quantize_model,
)

KINDS = ("int8", "nf4")
SHAPES = ((64, 64), (48, 24), (7, 33), (5, 10), (1, 1))
IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])


def levels():
    """NF4's sixteen: 0, and normal quantiles at equal steps on either side, eight above and seven below."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0.0], below]))
    return torch.tensor(values / values.max(), dtype=torch.float32)


def nf4_oracle(weight):
    """Every weight to the nearest level times the largest magnitude among its 64."""
    flat = weight.reshape(-1)
    blocks = nn.functional.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(levels()).abs().argmin(-1)
    found = levels()[nearest] * largest
    return found.reshape(-1)[: flat.numel()].view_as(weight)


def int8_oracle(weight):
    """Every weight to the nearest of 255 steps of its row, whose ends are at the largest magnitude."""
    step = weight.half().float().abs().amax(1, keepdim=True) / 127
    return torch.round(weight.half().float() / step) * step


def layer_of(shape, kind, seed=0):
    torch.manual_seed(seed)
    plain = nn.Linear(shape[1], shape[0])
    return plain, QuantizedLinear(plain, kind, CPU)


def quantized_plan(scratch, kind="nf4", **overrides):
    training = {"type": "lora", "learning_rate": 0.02, "quantization": kind}
    training |= overrides.pop("training", {})
    plan = make_plan(scratch, training=training, **overrides)
    return plan.model_copy(update={"base": plan.base.quantized(kind)})


def base_of(scratch, kind):
    return load_base(make_plan(scratch).base.quantized(kind), CPU, torch.float32)


def logits(model):
    with torch.no_grad(), evaluating(model):
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_of_sixteen_levels(shape):
    plain, layer = layer_of(shape, "nf4")
    torch.testing.assert_close(
        layer.dequantized(torch.float32), nf4_oracle(plain.weight), rtol=1e-5, atol=1e-6
    )
    widest = levels().diff().max() / 2
    error = (layer.dequantized(torch.float32) - plain.weight).abs().max()
    assert error <= widest * plain.weight.abs().max() * 1.0001


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_step_of_the_row(shape):
    plain, layer = layer_of(shape, "int8")
    found = layer.dequantized(torch.float32)
    step = plain.weight.detach().abs().amax(1, keepdim=True) / 127
    assert bool(((found - int8_oracle(plain.weight.detach())).abs() <= step * 1.01).all())
    assert bool(((found - plain.weight).abs() <= step * 0.5 + plain.weight.abs() / 1024).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_linear_map_of_its_dequantised_weight(kind):
    plain, layer = layer_of((48, 24), kind)
    inputs = torch.randn(5, 3, 24, requires_grad=True)
    found = layer(inputs)
    wanted = nn.functional.linear(inputs, layer.dequantized(torch.float32), plain.bias)
    torch.testing.assert_close(found, wanted)
    seed = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, inputs, seed, create_graph=True)
    torch.testing.assert_close(grad, seed @ layer.dequantized(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    with layer.dense() as whole:
        whole.requires_grad_(True)
        torch.testing.assert_close(layer(inputs), wanted)
        (slope,) = torch.autograd.grad(layer(inputs), whole, seed)
    torch.testing.assert_close(slope, torch.einsum("bto,bti->oi", seed, inputs.detach()))
    assert layer.training
    assert torch.equal(layer(inputs), layer.eval()(inputs))


@pytest.mark.parametrize(("kind", "most"), [("int8", 1 + 4 / 24), ("nf4", 0.5 + 4 / 64)])
def test_weights_take_less_memory(tmp_path, kind, most):
    whole, small = base_of(tmp_path, "none"), base_of(tmp_path, kind)
    layers = {n: m for n, m in small.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers
    held = sum(p.untyped_storage().nbytes() for m in layers.values() for p in m.parameters())
    numbers = sum(m.shape_alone.numel() for m in layers.values())
    assert held <= numbers * most * 1.01  # bytes each, where float32 takes 4
    assert count_weights(small) == count_weights(whole)
    kept = [n for n, m in small.named_modules() if type(m) is nn.Linear]
    assert kept == ["lm_head"]
    assert all(
        p.dtype == torch.float32
        for n, p in small.named_parameters()
        if "norm" in n or "embed" in n or "lm_head" in n
    )
    plans = [make_plan(tmp_path, training={"type": "lora"}), quantized_plan(tmp_path, kind)]
    sizes = [measure_footprint(make_run(plan)).weights for plan in plans]
    saved = sum(p.numel() * 4 for n, p in whole.named_parameters()) - sum(
        p.numel() * p.element_size() for p in small.parameters()
    )
    assert sizes[0] - sizes[1] == saved


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_gradients_of_the_dequantised_model(tmp_path, kind):
    grads = []
    for is_whole in (False, True):
        model = base_of(tmp_path, kind)
        if is_whole:
            for name, layer in list(model.named_modules()):
                if isinstance(layer, QuantizedLinear):
                    plain = nn.Linear(*layer.shape[::-1], bias=layer.bias is not None)
                    plain.weight = nn.Parameter(layer.dequantized(torch.float32))
                    plain.bias = layer.bias
                    parent, _, own = name.rpartition(".")
                    setattr(model.get_submodule(parent), own, plain)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
            wrapped = peft.get_peft_model(model, config)
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)
        assert grad is not None
        assert bool(grad.any())


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_quantised_base(tmp_path, kind):
    run = make_run(quantized_plan(tmp_path, kind))
    for _ in range(3):
        train_step(run)
    run.teacher.check()
    base = base_of(tmp_path, kind)
    with run.teacher.starting_model() as teacher:
        assert torch.equal(logits(teacher.model), logits(base))
    assert not torch.equal(logits(run.model), logits(base))
    assert not torch.equal(logits(base), logits(base_of(tmp_path, "none")))
    next(m for m in run.model.modules() if isinstance(m, QuantizedLinear)).scales.data *= 1.5
    with pytest.raises(TrainingFailed, match="differs from the base"):
        run.teacher.check()


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    plan = quantized_plan(tmp_path, strategies=(EwcConfig(strength=10.0),))
    whole = make_run(plan)
    for _ in range(4):
        train_step(whole)
    saved = save_checkpoint(whole, tmp_path / "saved", 1)
    assert not any(".base_layer." in name for name in whole.all_params)  # the base is never saved
    for _ in range(4):
        train_step(whole)
    torch.manual_seed(99)
    resumed = make_run(plan)
    load_checkpoint(resumed, saved.directory)
    assert resumed.step == 4
    for _ in range(4):
        train_step(resumed)
    assert same(weights(whole), weights(resumed))
    load_checkpoint(whole, saved.directory, keep_carry=True)  # and a rollback goes there
    assert whole.step == 4
    assert not same(weights(whole), weights(resumed))


def test_anchors_measure_the_quantised_weights(tmp_path):
    """Importance by factors, of gradients of the whole weights that the codes stand for."""
    run = make_run(quantized_plan(tmp_path, strategies=(EwcConfig(strength=10.0),)))
    pairs = lora_pairs(run.model)
    assert all(pair.base_weight.is_meta and pair.dense is not None for pair in pairs)
    found = {n for n in run.strategies[0].state_dict()["tensors"] if n.startswith("rows/")}
    assert found == {f"rows/{pair.name}" for pair in pairs}
    assert all(
        layer._dense is None for layer in run.model.modules() if isinstance(layer, QuantizedLinear)
    )
    before = [pair.lora_B.detach().clone() for pair in pairs]
    train_step(run)
    assert any(not torch.equal(b, p.lora_B) for b, p in zip(before, pairs, strict=True))


def test_the_line_goes_back_to_the_quantised_base(tmp_path):
    plan = quantized_plan(tmp_path)
    run = make_run(plan)
    for _ in range(3):
        train_step(run)
    tuned = logits(run.model)
    line = line_from_base(run.model, run.all_params, plan.base, is_lora=True)
    line.set(0.0)
    assert torch.equal(logits(run.model), logits(base_of(tmp_path, "nf4")))
    line.restore()
    assert torch.equal(logits(run.model), tuned)


def test_without_the_library_nothing_is_trained(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(TrainingFailed, match="extra 'quantization'") as caught:
        make_run(quantized_plan(tmp_path))
    assert (caught.value.param, caught.value.code) == (
        "training.quantization",
        "quantization_unavailable",
    )


def test_a_model_without_linear_layers_is_refused():
    class Table(nn.Embedding):
        def get_output_embeddings(self):
            return None

    with pytest.raises(TrainingFailed, match="no plain linear layer"):
        quantize_model(Table(3, 2), "nf4", CPU)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_the_estimate_counts_the_bytes_that_there_are(tmp_path, kind):
    model = base_of(tmp_path, kind)
    shape = describe_shape(
        model.config.to_dict(),
        {n: tuple(p.shape) for n, p in base_of(tmp_path, "none").named_parameters()},
    )
    assert shape is not None
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    numbers = Numbers.of(device="cpu", precision="fp32", lora=True)
    assert base_bytes(shape, kind, numbers) == held
    asked = make_plan(tmp_path, training={"type": "lora", "quantization": kind}).training
    trained = find_trained(shape, asked, ())
    memory = measure_memory(shape, trained, numbers, MicroSize(1, 8, 8))
    assert memory.weights == held + 4 * trained.parameters
