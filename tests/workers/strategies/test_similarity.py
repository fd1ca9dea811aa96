"""CKA and the distance of hidden states against written-out formulas."""

import math

import pytest
import torch

from tests.workers.strategies.stage import Stage
from workers.strategies.similarity import cka_to_base, hidden_distance_sum, linear_cka

F64 = torch.float64


def states(seed, rows=30, width=6):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("rows", [4, 30])
def test_cka_is_the_normalised_hsic_of_linear_kernels(rows):
    left, right = states(1, rows, 5), states(2, rows, 8) + states(1, rows, 8)
    centre = torch.eye(rows, dtype=F64) - 1 / rows

    def hsic(x, y):
        return torch.trace(x @ x.T @ centre @ y @ y.T @ centre)

    expected = hsic(left, right) / (hsic(left, left) * hsic(right, right)).sqrt()
    assert linear_cka(left, right) == pytest.approx(float(expected), abs=1e-12)


def test_cka_is_one_under_rotation_scale_and_shift_and_near_zero_of_unrelated_states():
    left = states(3, 400, 6)
    rotation, _ = torch.linalg.qr(states(4, 6, 6))
    assert linear_cka(left, 3.0 * left @ rotation + 2.0) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(left, states(5, 400, 6)) < 0.1
    assert math.isnan(linear_cka(left, torch.ones_like(left)))


def test_cka_to_the_base_is_one_at_the_start_and_falls_with_the_weights():
    stage = Stage([], {})
    rows = range(10)
    start = cka_to_base(stage.ctx, "general", rows)
    assert set(start) == {0, 1}
    assert list(start.values()) == pytest.approx([1.0, 1.0], abs=1e-12)
    with torch.no_grad():
        stage.params["layer.weight"].add_(states(6, 6, 6))
    moved = cka_to_base(stage.ctx, "general", rows)
    assert moved[0] == pytest.approx(1.0, abs=1e-12)  # the embeddings are as they were
    assert moved[1] < 0.99
    assert cka_to_base(stage.ctx, "general", []) == {}


def test_hidden_distances_are_relative_to_the_teachers_and_averaged_over_layers():
    student, teacher = ({4: states(s), 8: states(s + 1)} for s in (10, 20))
    relative = [
        ((s - t) ** 2).sum(-1) / (t**2).sum(-1)
        for s, t in ((student[n], teacher[n]) for n in (4, 8))
    ]
    expected = sum(float(r.sum()) for r in relative) / 2
    assert float(hidden_distance_sum(student, teacher)) == pytest.approx(expected, rel=1e-10)
    cosine = [
        1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
        for s, t in ((student[n], teacher[n]) for n in (4, 8))
    ]
    expected = sum(float(c.sum()) for c in cosine) / 2
    found = hidden_distance_sum(student, teacher, kind="cosine")
    assert float(found) == pytest.approx(expected, rel=1e-10)
    for kind in ("mse", "cosine"):
        assert abs(float(hidden_distance_sum(teacher, teacher, kind=kind))) < 1e-12


def test_no_gradient_flows_into_the_teacher():
    student, teacher = states(1).requires_grad_(), states(2).requires_grad_()
    hidden_distance_sum({1: student}, {1: teacher}).backward()
    assert student.grad is not None
    assert teacher.grad is None
