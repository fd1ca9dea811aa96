"""Routing: the nearest centroid, the base below the threshold, and one adapter at a time."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app.domain.spec import LoraConfig
from app.errors import TrainingFailed
from tests.workers.export.cases import make_adapted, make_model
from workers.evaluation.routing import (
    Router,
    base_representations,
    load_router,
    pool,
    prompt_mask,
    run_by_route,
)
from workers.training.adapters import activate
from workers.training.models import add_adapters, lora_pairs

ROWS = [[7, 20, 33], [5, 6, 7, 8, 9], [46, 59], [9, 8, 7]]


def make_two_adapters():
    model = make_adapted()
    add_adapters(model, LoraConfig(r=4, alpha=8.0), seed=3, name="second")
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for pair in lora_pairs(model):
            if pair.adapter == "second":
                pair.lora_B.copy_(0.1 * torch.randn(pair.lora_B.shape, generator=rng))
    return model.eval()


def logits_of(model, rows):
    """One row at a time, so that batching can't tell."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0] for row in rows]


def test_the_nearest_centroid_is_taken_and_the_base_below_the_threshold():
    router = Router(("x", "y"), torch.eye(2), 0.8, torch.tensor)
    assert router.route([1.0, 0.0]) == "x"
    assert router.route([0.1, 0.995]) == "y"
    assert router.route([0.7071, 0.7071]) is None
    assert router.route_all([]) == []
    at_threshold = Router(("x",), torch.eye(1), 1.0, torch.tensor)
    assert at_threshold.route([1.0]) == "x"


def test_one_hot_routing_equals_the_single_adapter_and_a_mixed_batch_equals_rows_alone():
    model = make_two_adapters()

    def run(rows):
        return logits_of(model, rows)

    def switch(names):
        activate(model, names)

    alone = {}
    for name in ("default", "second"):
        activate(model, [name])
        alone[name] = run(ROWS)
        routed = run_by_route(ROWS, [name] * len(ROWS), switch, run)
        for left, right in zip(routed, alone[name], strict=True):
            assert torch.equal(left, right)
    base = logits_of(make_model(), ROWS)
    routes = ["second", None, "default", "second"]
    mixed = run_by_route(ROWS, routes, switch, run)
    for place, route in enumerate(routes):
        expected = base[place] if route is None else alone[route][place]
        assert torch.equal(mixed[place], expected)
    assert not torch.equal(alone["default"][0], alone["second"][0])
    assert not torch.equal(alone["default"][0], base[0])


def test_the_fallback_is_the_base_bit_for_bit_and_the_adapters_come_back():
    model = make_two_adapters()
    base = logits_of(make_model(), ROWS)
    activate(model, ["second"])
    before = logits_of(model, ROWS)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    activate(model, [])
    for left, right in zip(logits_of(model, ROWS), base, strict=True):
        assert torch.equal(left, right)
    activate(model, ["second"])
    for left, right in zip(logits_of(model, ROWS), before, strict=True):
        assert torch.equal(left, right)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_two_active_adapters_add_their_changes():
    model = make_two_adapters()
    activate(model, ["default", "second"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    changes = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    expected = hidden @ (layer.get_base_layer().weight + changes).T
    torch.testing.assert_close(layer(hidden), expected)


def test_representations_are_the_bases_unit_means_whatever_is_active():
    base = make_model()
    with torch.no_grad():
        means = torch.stack(
            [base.model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in ROWS]
        )
    expected = means / means.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(base_representations(base, ROWS), expected, rtol=1e-5, atol=1e-6)
    model = make_two_adapters()
    activate(model, ["second"])
    flags = [p.requires_grad for p in model.parameters()]
    found = base_representations(model, ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_only_weighted_tokens_enter_the_mean():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = pool(hidden, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    for row, mean in enumerate((hidden[0, :2].mean(0), hidden[1, 2])):
        torch.testing.assert_close(found[row], mean / mean.norm())


def test_a_prompt_ends_where_learning_begins():
    chat = prompt_mask(np.asarray([0, 0, 0, 1, 1, 0, 1], np.float32))
    assert chat.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert prompt_mask(np.ones(3, np.float32)).tolist() == [1, 1, 1]
    assert prompt_mask(np.asarray([0, 1, 1], np.float32)).tolist() == [1, 1, 1]
    assert prompt_mask(np.zeros(2, np.float32)).tolist() == [1, 1]


def test_a_router_is_read_from_an_artifact_and_must_fit_its_centroids(tmp_path):
    record = {"format": 1, "names": ["b", "a"], "threshold": 0.5}
    (tmp_path / "routing.json").write_text(json.dumps(record))
    save_file(
        {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])},
        tmp_path / "routing.safetensors",
    )
    router = load_router(tmp_path, torch.tensor)
    assert router.route_all([[1.0, 0.0], [0.0, 1.0], [0.1, 0.2]]) == ["a", "b", None]
    (tmp_path / "routing.json").write_text(json.dumps({**record, "names": ["a"]}))
    with pytest.raises(TrainingFailed, match="other adapters") as caught:
        load_router(tmp_path, torch.tensor)
    assert caught.value.code == "damaged_artifact"
