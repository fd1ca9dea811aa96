"""The loss surface: its directions, its centre, its number, and the command that draws it."""

import json
import math

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.tiny import make_llama, make_tiny_model
from tests.workers.training.rows import write_rows
from tests.workers.training.runs import ListRows
from workers.evaluation.contours import contour_levels
from workers.evaluation.landscape import (
    Axes,
    Sharpness,
    Subset,
    Surface,
    difference,
    displaced,
    filter_norms,
    loss_of,
    random_direction,
    sharpness,
    surface,
)
from workers.evaluation.surface import load_model, main

NO_SHARPNESS = Sharpness(0.0, 0.0, 0.1, 1)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(left, right):
    return all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def llama():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make_llama().eval()


def test_filters_of_a_direction_are_as_long_as_those_of_the_weights(llama):
    direction = random_direction(llama, 3)
    params = dict(llama.named_parameters())
    for name, step in direction.items():
        own = torch.linalg.vector_norm(params[name].detach(), dim=1)
        torch.testing.assert_close(torch.linalg.vector_norm(step, dim=1), own, rtol=1e-5, atol=0)
    assert {n for n, p in params.items() if p.ndim == 1} == params.keys() - direction.keys()
    # the tied head and embedding are one parameter, moved once; its padding row is zero and stays
    assert "model.embed_tokens.weight" in direction
    assert not any("lm_head" in name for name in direction)
    assert not direction["model.embed_tokens.weight"][0].any()
    assert same(direction, random_direction(llama, 3))
    assert not same(direction, random_direction(llama, 4))


def test_the_filters_of_transposed_weights_and_convolutions_and_experts():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=16)
    model = GPT2LMHeadModel(config)
    name = "transformer.h.0.mlp.c_fc.weight"  # (inputs, outputs)
    weight = dict(model.named_parameters())[name].detach()
    step = random_direction(model, 0)[name]
    torch.testing.assert_close(step.norm(dim=0), weight.norm(dim=0), rtol=1e-5, atol=0)
    assert (step.norm(dim=1) - weight.norm(dim=1)).abs().max() > 1e-3
    assert filter_norms(torch.ones(6, 3, 5, 5)).flatten().tolist() == pytest.approx([75**0.5] * 6)
    assert filter_norms(torch.ones(4, 6, 9)).flatten().tolist() == pytest.approx([3.0] * 24)


class Pair(nn.Module):
    """Two layers with a ReLU between: scaling one up and the other down changes nothing."""

    def __init__(self, factor):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.first = nn.Parameter(torch.randn(8, 5, generator=generator).double() * factor)
        self.second = nn.Parameter(torch.randn(3, 8, generator=generator).double() / factor)
        self.inputs = torch.randn(20, 5, generator=generator).double()
        self.targets = torch.randn(20, 3, generator=generator).double()

    def loss(self):
        with torch.no_grad():
            out = torch.relu(self.inputs @ self.first.T) @ self.second.T
            return float(((out - self.targets) ** 2).mean())


def test_a_rescaled_relu_pair_has_the_same_surface():
    axes = Axes.grid(5, 1.0, seed=0)
    values, raw = [], []
    for factor in (1.0, 7.0):
        model = Pair(factor)
        values.append(np.asarray(surface("m", model, model.loss, axes, NO_SHARPNESS).loss))
        noise = {n: torch.ones_like(p.detach()) for n, p in model.named_parameters()}
        with displaced(model) as move:
            move([(1.0, noise)])
            raw.append(model.loss())
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)  # directions are float32
    assert values[0].std() > 1
    assert abs(raw[0] - raw[1]) > 1  # not so without the normalisation


def test_the_centre_is_the_plain_evaluation_and_the_weights_come_back_bit_for_bit(llama):
    rows = Subset(ListRows(12), 5, seed=3)
    before, plain = weights(llama), loss_of(llama, rows)
    looked = surface("m", llama, lambda: loss_of(llama, rows), Axes.grid(3, 0.5, 0), NO_SHARPNESS)
    assert looked.loss[1][1] == plain
    assert looked.center_loss == plain
    assert len({value for row in looked.loss for value in row}) == 9
    assert same(weights(llama), before)
    assert loss_of(llama, rows) == plain

    moved = []

    def move_and_fail():
        with displaced(llama) as move:
            move([(1.0, random_direction(llama, 0))])
            moved.append(not same(weights(llama), before))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        move_and_fail()
    assert moved == [True]
    assert same(weights(llama), before)


def test_sharpness_of_a_quadratic_is_its_closed_form():
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[3.0, 4.0]]).double())

        def loss(self):
            with torch.no_grad():  # sloping: that cancels over both signs
                return float((self.weight**2).sum())

    model = Bowl()
    found = sharpness(model, model.loss, relative_radius=0.2, num_directions=4)
    assert found.value == pytest.approx((0.2 * 5.0) ** 2, rel=1e-6)  # r^2 |w|^2, any direction
    assert found.stderr == pytest.approx(0, abs=1e-6)
    assert "both signs" in found.definition
    assert math.isnan(sharpness(model, model.loss, num_directions=1).stderr)


def test_the_way_to_another_model_leads_there(llama):
    with torch.random.fork_rng():
        torch.manual_seed(9)
        other = make_llama().eval()
    rows = Subset(ListRows(12), 5, seed=3)
    axes = Axes.grid(3, 1.0, 0, difference(llama, other))
    looked = surface("base", llama, lambda: loss_of(llama, rows), axes, NO_SHARPNESS)
    assert looked.loss[2][1] == pytest.approx(loss_of(other, rows), rel=1e-5)
    assert looked.first_direction == "from base to tuned"
    with pytest.raises(ValueError, match="differ in their parameters"):
        difference(llama, make_llama(layers=1))


def test_rows_are_drawn_once_and_alike():
    store = ListRows(30)
    one, two, other = (Subset(store, 10, seed) for seed in (1, 1, 2))
    assert one.indices.tolist() == two.indices.tolist() != other.indices.tolist()
    assert len(set(one.indices.tolist())) == 10
    assert one.lengths.tolist() == [len(one.row(k)[0]) for k in range(10)]
    assert len(Subset(store, 100, 1).indices) == 30


def test_an_even_or_flat_grid_is_refused():
    assert Axes.grid(5, 2.0, 0).first == [-2.0, -1.0, 0.0, 1.0, 2.0]
    for points, radius in ((4, 1.0), (1, 1.0), (5, 0.0)):
        with pytest.raises(ValueError, match=r"grid|radius"):
            Axes.grid(points, radius, 0)


def test_levels_leave_out_what_is_no_number():
    looked = Surface("m", 1.0, [0.0], [0.0], [[1.0, math.inf], [2.0, math.nan]], NO_SHARPNESS, "x")
    levels = contour_levels([looked])
    assert levels[0] == 1.0
    assert levels[-1] == pytest.approx(1.9)
    assert (np.diff(levels) > 0).all()
    flat = Surface("m", 1.0, [0.0], [0.0], [[1.0]], NO_SHARPNESS, "x")
    assert (np.diff(contour_levels([flat])) > 0).all()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, an adapter of it that changes something, and another model of the same shapes."""
    directory = tmp_path_factory.mktemp("models")
    base = make_tiny_model(directory / "base")
    plain = make_tiny_model(directory / "plain", seed=4)
    model = load_model(base, base)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    adapted.save_pretrained(directory / "tuned")
    rows = directory / "rows.jsonl"
    write_rows(rows, 20, 1)
    return {"base": base, "tuned": directory / "tuned", "plain": plain, "rows": rows}


def test_an_adapter_is_looked_at_through_its_effective_weights(models):
    base, tuned = (load_model(models[name], models["base"]) for name in ("base", "tuned"))
    way = difference(base, tuned)
    changed = {name for name, step in way.items() if step.any()}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "up_proj"}


def test_the_command_writes_numbers_and_a_picture(models, tmp_path, capsys):
    options = [f"--{name}={path}" for name, path in models.items()]
    options += ["--grid=3", "--num-rows=6", "--directions=2", "--first=tuned", "--device=cpu"]
    assert main([*options, f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "surface.json").read_text())
    assert list(found["surfaces"]) == ["tuned", "plain", "base"]
    assert found["num_rows"] == 6
    for looked in found["surfaces"].values():
        assert looked["loss"][1][1] == looked["center_loss"]
        assert looked["sharpness"]["relative_radius"] == 0.1
    tuned, base = (np.asarray(found["surfaces"][name]["loss"]) for name in ("tuned", "base"))
    assert base[2, 1] == pytest.approx(tuned[1, 1], rel=1e-5)
    assert tuned[0, 1] == pytest.approx(base[1, 1], rel=1e-5)
    assert (tmp_path / "surface.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "base: 9 of 9 points" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(models, tmp_path, capsys):
    options = [f"--{name}={path}" for name, path in models.items()]
    assert main([*options, f"--out={tmp_path}", "--grid=4"]) == 1
    assert "not an odd number" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "filter-normalised" in capsys.readouterr().out
