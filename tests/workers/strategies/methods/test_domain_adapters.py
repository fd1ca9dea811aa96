"""Domain adapters: the orthogonality penalty and projection, the routing threshold, and what is kept."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.workers.strategies.stage import F64, WIDTH, Stage, same
from workers.strategies.context import Adapters
from workers.strategies.methods.domain_adapters import (
    DomainAdapters,
    fit_threshold,
    overlap,
    row_space,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def stage_of(strength, **knobs):
    return Stage([DomainAdapters(**knobs)], {"domain_adapters": strength}, lora=True, task_index=1)


def test_the_penalty_is_the_normalised_product_and_its_gradient_that_of_autograd():
    own = rand(3, 8).requires_grad_()
    earlier = [rand(2, 8, seed=1), rand(4, 8, seed=2)]
    expected = sum(
        (a @ own.T).square().sum() / (a.square().sum() * own.square().sum()) for a in earlier
    )
    (gradient,) = torch.autograd.grad(expected, own)
    found = overlap(own.detach(), earlier)
    torch.testing.assert_close(found.value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.grad_RI, gradient, rtol=1e-12, atol=1e-15)


def test_an_addend_lies_between_zero_and_one_and_does_not_know_scale_or_width():
    row = rand(1, 6)
    assert float(overlap(row, [3.0 * row]).value) == pytest.approx(1.0)
    q = torch.linalg.qr(rand(6, 6))[0]
    assert float(overlap(q[:2], [q[2:4]]).value) == pytest.approx(0.0, abs=1e-15)
    own, other = rand(3, 6, seed=3), rand(2, 6, seed=4)
    value = overlap(own, [other]).value
    torch.testing.assert_close(overlap(5.0 * own, [0.1 * other]).value, value)
    wider = [torch.cat([m, torch.zeros(m.shape[0], 9, dtype=F64)], 1) for m in (own, other)]
    torch.testing.assert_close(overlap(wider[0], [wider[1]]).value, value)
    gradient = overlap(own, [other]).grad_RI
    assert float((gradient * own).sum()) == pytest.approx(0.0, abs=1e-12)  # scale is free


def test_the_gradient_is_added_once_a_step_with_the_strength():
    plain, ours = stage_of(0.0), stage_of(2.0)
    for stage in (plain, ours):
        stage.gradients()
        stage.strategies[0].add_grads(stage.ctx)
    reader = ours.ctx.adapters.readers
    expected = 2.0 * overlap(reader["own"]["layer"].detach(), [reader["earlier"]["layer"]]).grad_RI
    difference = ours.params["layer.lora_A"].grad - plain.params["layer.lora_A"].grad
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-14)
    assert torch.equal(ours.params["layer.lora_B"].grad, plain.params["layer.lora_B"].grad)
    told = ours.strategies[0].metrics()
    assert told["applied_norm"] == pytest.approx(float(expected.norm()))
    assert 0 < told["overlap"] < 1


def test_the_first_task_has_nothing_to_keep_off():
    stage = Stage([DomainAdapters()], {"domain_adapters": 5.0}, lora=True).train(3)
    assert same(stage.weights(), Stage([], {}, lora=True).train(3).weights())
    assert stage.strategies[0].metrics() == {"applied_norm": 0.0, "overlap": 0.0}


def test_a_strong_penalty_lowers_the_overlap():
    weak, strong = (stage_of(s).train(150) for s in (0.0, 100.0))
    value = {}
    for name, stage in (("weak", weak), ("strong", strong)):
        readers = stage.ctx.adapters.readers
        value[name] = float(
            overlap(readers["own"]["layer"].detach(), [readers["earlier"]["layer"]]).value
        )
    assert value["strong"] < 0.05 * value["weak"]


def test_a_hard_adapter_changes_nothing_on_what_earlier_ones_read():
    stage = stage_of(1.0, orthogonality="hard").train(10)
    layer: Any = stage.model.layer
    earlier = stage.ctx.adapters.readers["earlier"]["layer"].detach()
    seen = rand(5, 2, seed=9) @ earlier  # inputs in the span of the earlier rows
    change = layer.scale * seen @ layer.lora_A.detach().T @ layer.lora_B.detach().T
    assert float(change.abs().max()) < 1e-12
    elsewhere = rand(5, WIDTH, seed=8) @ layer.lora_A.detach().T @ layer.lora_B.detach().T
    assert float(elsewhere.abs().max()) > 1e-4
    assert stage.strategies[0].metrics()["overlap"] < 1e-20


def test_a_hard_adapter_that_is_turned_on_late_comes_back_in_one_step():
    stage = stage_of(0.0, orthogonality="hard").train(3)
    stage.ctx.coefs["domain_adapters"] = 1.0
    stage.train(1)
    readers = stage.ctx.adapters.readers
    inner = readers["own"]["layer"].detach() @ readers["earlier"]["layer"].T
    assert float(inner.abs().max()) < 1e-12


def test_a_share_of_the_projection_is_taken_below_strength_one():
    stage = stage_of(0.25, orthogonality="hard")
    readers = stage.ctx.adapters.readers
    q = row_space([readers["earlier"]["layer"].detach()])
    layer: Any = Stage([], {}, lora=True).model.layer
    before = layer.lora_A.detach()
    kept = before - 0.25 * before @ q @ q.T
    torch.testing.assert_close(readers["own"]["layer"].detach(), kept, rtol=0, atol=1e-14)


def test_the_row_space_is_orthonormal_and_as_large_as_the_rank():
    rows = rand(3, 7)
    doubled = torch.cat([rows, rows[:2] * 2.0])
    basis = row_space([rows[:2], doubled])
    assert basis.shape == (7, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=F64))
    torch.testing.assert_close(rows @ basis @ basis.T, rows)


def test_no_room_for_a_hard_adapter_is_refused():
    strategy = DomainAdapters(orthogonality="hard")
    stage = Stage([strategy], {"domain_adapters": 1.0}, lora=True, task_index=1, start=False)
    assert stage.ctx.adapters is not None
    full = nn.Parameter(torch.eye(WIDTH, dtype=F64), requires_grad=False)
    readers = {**stage.ctx.adapters.readers, "earlier": {"layer": full}}
    stage.ctx.adapters = Adapters(
        ("earlier", "own"), stage.ctx.adapters.params, readers, 0.005, lambda _: None, dict
    )
    with pytest.raises(ValueError, match=r"read all 6 inputs of layer"):
        strategy.on_task_start(stage.ctx)
    stage.ctx.adapters = None
    with pytest.raises(ValueError, match=r"needs training\.type 'lora'"):
        strategy.on_task_start(stage.ctx)


@pytest.mark.parametrize("count", [2, 19, 20, 40, 101])
def test_the_threshold_lets_five_per_cent_through_and_not_one_more(count):
    similarities = torch.rand(count, generator=torch.Generator().manual_seed(count))
    threshold = fit_threshold(similarities)
    accepted = int((similarities >= threshold).sum())
    assert accepted == int(0.05 * count)
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(-1.0))
    assert int((similarities >= below).sum()) == accepted + 1


def with_rows(strategy, *, num_general=40):
    """A stage whose rows are points: those of the task near one axis, general ones anywhere."""
    stage = Stage([strategy], {"domain_adapters": 1.0}, lora=True, task_index=1)

    def represent(store, rows):
        rng = torch.Generator().manual_seed(len(store))
        points = 0.1 * torch.randn(len(rows), 4, generator=rng)
        if store == "general":
            points = torch.randn(len(rows), 4, generator=rng)
        else:
            assert store == "training-1"
            points[:, 1] += 1.0
        return torch.nn.functional.normalize(points, dim=-1)

    stage.ctx.represent = represent
    stage.ctx.num_general_rows = num_general
    strategy.on_task_end(stage.ctx)
    return stage


def test_a_finished_task_leaves_a_centroid_and_a_threshold_of_half_the_general_rows(tmp_path):
    strategy = DomainAdapters()
    stage = with_rows(strategy)
    rows = stage.ctx.represent("training-1", range(24))
    mean = rows.mean(0)
    torch.testing.assert_close(strategy.centroids["own"], mean / mean.norm())
    nearest = stage.ctx.represent("general", range(40)) @ strategy.centroids["own"]
    assert strategy.routing["threshold"] == pytest.approx(fit_threshold(nearest[::2]))
    held_out = float((nearest[1::2] >= strategy.routing["threshold"]).float().mean())
    assert strategy.routing["false_accept"] == pytest.approx(held_out)
    assert strategy.routing["rows"] == {"own": 24}
    strategy.export_files(stage.ctx, tmp_path)
    record = json.loads((tmp_path / "routing.json").read_text())
    assert record["names"] == ["own"]
    assert record["representation"] == "base"
    saved = load_file(tmp_path / "routing.safetensors")
    assert torch.equal(saved["own"], strategy.centroids["own"])


def test_without_general_rows_there_is_no_fallback_and_without_routing_nothing_is_made(tmp_path):
    strategy = DomainAdapters()
    with_rows(strategy, num_general=0)
    assert strategy.routing["threshold"] == -1.0
    silent = DomainAdapters(route=False)
    stage = with_rows(silent)
    silent.export_files(stage.ctx, tmp_path)
    assert not silent.centroids
    assert not list(tmp_path.iterdir())


def test_centroids_survive_a_resume_and_those_of_another_run_are_refused():
    first, second = DomainAdapters(), DomainAdapters()
    with_rows(first)
    Stage([second], {"domain_adapters": 1.0}, lora=True, task_index=1)
    second.load_state_dict(first.state_dict())
    assert same(second.centroids, first.centroids)
    assert second.routing == first.routing
    state = first.state_dict()
    odd = {**state, "tensors": {"centroid/other": torch.zeros(4)}}
    with pytest.raises(ValueError, match="not of this run's adapters"):
        second.load_state_dict(odd)


def published(strategy, task_index):
    """What is active and merged when a run of three tasks is published in one of them."""
    told: list[Any] = []

    def merge(names, method, **more):
        told.append((method, tuple(names), more))
        return {"rank": 6.0, "relative_error": 0.0}

    adapters = Adapters(
        ("a", "b", "c"),
        {},
        {},
        0.005,
        lambda names: told.append(tuple(names)),
        merge,
    )
    stage = Stage([strategy], {"domain_adapters": 1.0}, lora=True)
    stage.ctx.adapters, stage.ctx.task_index = adapters, task_index
    stage.ctx.note = lambda code, text, data: told.append(code)
    strategy.on_publish(stage.ctx)
    return told


def test_publishing_merges_the_finished_adapters_alone():
    assert published(DomainAdapters(), 2) == [("c",)]
    assert published(DomainAdapters(merge="svd"), 0) == [("a",)]
    active, merged, note = published(
        DomainAdapters(merge="ties", merge_weights=(0.5, 0.2, 0.3), density=0.3, merge_rank=4), 1
    )
    assert active == ("b",)
    assert merged[:2] == ("ties", ("a", "b"))
    assert {k: v for k, v in merged[2].items() if k != "seed"} == {
        "weights": (0.5, 0.2),
        "density": 0.3,
        "rank": 4,
    }
    assert note == "adapters_merged"


def test_stacked_adapters_are_published_as_their_sum():
    active, merged, _ = published(DomainAdapters(compose="stacked"), 2)
    assert active == ("a", "b", "c")
    assert merged[:2] == ("cat", ("a", "b", "c"))
    assert list(merged[2]["weights"]) == [1.0, 1.0, 1.0]


def test_an_unusual_share_is_told_once_unless_it_was_asked_for():
    def notes(share, index, **knobs):
        told = []
        strategy = DomainAdapters(**knobs)
        ctx: Any = SimpleNamespace(
            adapters=SimpleNamespace(share=share),
            task_index=index,
            note=lambda code, *_: told.append(code),
            strength=lambda _: 1.0,
        )
        strategy.on_task_start(ctx)
        return told

    assert notes(0.015, 0) == ["adapter_share"]
    assert notes(0.001, 0) == ["adapter_share"]
    assert notes(0.005, 0) == notes(0.015, 1) == notes(0.015, 0, allow_any_share=True) == []
