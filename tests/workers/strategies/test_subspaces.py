"""Bases of old inputs: what they hold, and gradients that leave old inputs alone."""

import pytest
import torch

from tests.workers.strategies.stage import Stage
from workers.strategies.subspaces import InputBases, extend_basis, leave_out

F64 = torch.float64


def inputs(count, size, seed, decay=0.6):
    generator = torch.Generator().manual_seed(seed)
    spread = decay ** torch.arange(size, dtype=F64)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q
    return torch.randn(count, size, generator=generator, dtype=F64) * spread @ mixing


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 0.999])
def test_a_basis_holds_the_energy_asked_for_with_the_fewest_directions(threshold):
    x = inputs(200, 9, 1)
    basis = extend_basis(torch.zeros(9, 0, dtype=F64), x.T @ x, threshold)
    count = basis.shape[1]
    singular = torch.linalg.svdvals(x)  # an independent way to the same count
    energy = singular.square().cumsum(0) / singular.square().sum()
    assert count == int((energy < threshold).sum()) + 1
    assert (basis.T @ basis - torch.eye(count, dtype=F64)).abs().max() < 1e-14
    assert float((x @ basis).square().sum() / x.square().sum()) == pytest.approx(
        float(energy[count - 1])
    )


def test_a_second_task_adds_only_what_the_first_left_open():
    first, second = inputs(200, 9, 1), inputs(300, 9, 2)
    basis = extend_basis(torch.zeros(9, 0, dtype=F64), first.T @ first, 0.9)
    longer = extend_basis(basis, second.T @ second, 0.95)
    assert torch.equal(longer[:, : basis.shape[1]], basis)
    count = longer.shape[1]
    assert (longer.T @ longer - torch.eye(count, dtype=F64)).abs().max() < 1e-13
    assert (second @ longer).square().sum() >= 0.95 * second.square().sum()
    fewer = longer[:, :-1]
    assert (second @ fewer).square().sum() < 0.95 * second.square().sum()
    assert torch.equal(extend_basis(longer, second.T @ second, 0.95), longer)
    assert torch.equal(extend_basis(basis, torch.zeros(9, 9, dtype=F64), 0.9), basis)


def test_what_is_left_of_a_gradient_maps_old_inputs_to_nothing_and_is_idempotent():
    x = inputs(3, 9, 3)
    basis = extend_basis(torch.zeros(9, 0, dtype=F64), x.T @ x, 1 - 1e-15)
    gradient = inputs(5, 9, 4)
    left = leave_out(gradient, basis)
    assert (left @ x.T).abs().max() <= 1e-14 * float(gradient.norm() * x.norm())
    assert (left @ basis).abs().max() <= 1e-15 * float(gradient.norm())
    assert (leave_out(left, basis) - left).abs().max() <= 1e-15 * float(gradient.norm())
    assert left.norm() > 0.1 * gradient.norm()
    half = leave_out(gradient, basis, 0.5)
    assert torch.allclose(half, (gradient + left) / 2, atol=1e-14)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_inputs_are_those_that_real_tokens_give_whatever_the_micro_batches(lora):
    """Against the layer's inputs written out by hand, without padding."""
    found = []
    stage = Stage([], {}, lora=lora)
    for size in (16, 3, 1):
        stage = Stage([], {}, lora=lora, micro_rows=size)
        bases = InputBases(0.9)
        bases.learn(stage.ctx, stage.ctx.general_micros(range(20)))
        found.append(bases.bases)
    name = "layer.lora_A" if lora else "layer.weight"
    rows = []
    for ids in stage.general:
        hidden = stage.model.embedding(torch.tensor(ids[:-1])).cumsum(0)
        rows.append(hidden / torch.arange(1, len(ids), dtype=F64)[:, None])
    x = torch.cat(rows).detach()
    expected = extend_basis(torch.zeros(6, 0, dtype=F64), x.T @ x, 0.9)
    for learned in found:
        assert set(learned) == ({name} if lora else {name, "head.weight"})
        both = (learned[name] @ learned[name].T, expected @ expected.T)
        assert (both[0] - both[1]).abs().max() < 1e-10
