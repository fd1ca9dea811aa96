"""The line from base to tuned: exact at both ends, linear between, and back afterwards."""

import pytest
import torch

from app.errors import TrainingFailed
from tests.workers.export.cases import logits, make_adapted, make_model
from workers.export.interpolate import Interpolation


def full_pair():
    model, base = make_model(1), make_model(0)
    return model, dict(model.named_parameters()), dict(base.named_parameters()), base


def test_full_weights_are_bit_equal_at_both_ends_and_linear_between() -> None:
    model, params, base, base_model = full_pair()
    tuned = {name: p.detach().clone() for name, p in params.items()}
    tuned_logits = logits(model)
    line = Interpolation.of_weights(params, base)
    line.set(0.0)
    assert torch.equal(logits(model), logits(base_model))
    line.set(0.3)
    for name, parameter in params.items():
        wanted = 0.7 * base[name].double() + 0.3 * tuned[name].double()
        torch.testing.assert_close(parameter.double(), wanted, rtol=1e-6, atol=1e-7)
    line.restore()
    assert all(torch.equal(params[name], tuned[name]) for name in params)
    assert torch.equal(logits(model), tuned_logits)


def test_an_adapter_is_bit_equal_at_both_ends_and_linear_between() -> None:
    model = make_adapted()
    tuned = logits(model)
    line = Interpolation.of_adapter(model)
    line.set(0.0)
    assert torch.equal(logits(model), logits(make_model()))
    line.set(0.25)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    quarter = layer.get_delta_weight("default").detach().clone()
    line.set(1.0)
    torch.testing.assert_close(4 * quarter, layer.get_delta_weight("default"))
    assert torch.equal(logits(model), tuned)


def test_the_tuned_weights_are_back_even_after_an_error() -> None:
    model = make_adapted()
    tuned = logits(model)
    seen = []

    def measure(_: float) -> None:
        seen.append(logits(model))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Interpolation.of_adapter(model).over([0.5], measure)
    assert not torch.equal(seen[0], tuned)
    assert torch.equal(logits(model), tuned)


def test_points_are_measured_in_turn() -> None:
    model = make_adapted()
    tuned = logits(model)
    found = Interpolation.of_adapter(model).over((0.0, 0.5, 1.0), lambda _: logits(model))
    assert torch.equal(found[1.0], tuned)
    assert torch.equal(found[0.0], logits(make_model()))
    assert not torch.equal(found[0.5], tuned)
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_points_off_the_line_are_refused(alpha) -> None:
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        Interpolation.of_adapter(make_adapted()).set(alpha)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"use_dora": True}, "is no plain LoRA"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "trains biases"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "replaces this module"),
    ],
)
def test_adapters_that_are_not_linear_in_one_factor_are_refused(config, problem) -> None:
    with pytest.raises(TrainingFailed, match=problem) as caught:
        Interpolation.of_adapter(make_adapted(**config))
    assert caught.value.code == "not_interpolable"


def test_a_model_without_adapter_and_weights_without_base_are_refused() -> None:
    with pytest.raises(TrainingFailed, match="no adapter 'default'"):
        Interpolation.of_adapter(make_model())
    _, params, base, _ = full_pair()
    name = next(iter(base))
    with pytest.raises(TrainingFailed, match="no such weight of shape"):
        Interpolation.of_weights(params, {**base, name: base[name][:1]})
