"""The shared mathematics against closed forms, linear solves and autograd."""

import math

import pytest
import torch
from torch import nn

from workers.strategies import penalties
from workers.strategies.penalties import (
    add_lora_gradient,
    add_pull_gradients,
    apply_pulls,
    divergence_sum,
    layer_cap,
    lora_penalty,
    quadratic_gradient,
    quadratic_penalty,
)
from workers.strategies.pulls import Pull, Tally

F64 = torch.float64


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


def normal(rng, *shape, dtype=F64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def uniform(rng, *shape, dtype=F64):
    return torch.rand(*shape, generator=rng, dtype=dtype)


@pytest.mark.parametrize("with_importance", [True, False])
def test_quadratic_gradient_is_that_of_the_penalty(rng, with_importance):
    theta = normal(rng, 4, 5).requires_grad_()
    anchor, importance = normal(rng, 4, 5), uniform(rng, 4, 5) if with_importance else None
    quadratic_penalty(theta, anchor, importance).backward()
    closed = quadratic_gradient(theta.detach(), anchor, importance)
    torch.testing.assert_close(theta.grad, closed, rtol=0, atol=1e-15)


def test_the_half_is_kept(rng):
    assert float(quadratic_penalty(torch.tensor([3.0]), torch.tensor([1.0]), None)) == 2.0


def added_gradient(parameter):
    assert parameter.grad is not None
    return parameter.grad


def descend(problem, rho, steps=400, rate=0.1):
    """Gradient descent on 1/2 (t-a)'A(t-a), with the pull added by the code under test."""
    matrix, target, anchor, fisher, strength = problem
    params = {"w": nn.Parameter(torch.zeros_like(target))}
    for _ in range(steps):
        params["w"].grad = matrix @ (params["w"].detach() - target)
        add_pull_gradients(params, {"w": Pull(strength, fisher, anchor)}, rho=rho)
        params["w"].data.sub_(params["w"].grad, alpha=rate)
    return params["w"].detach()


@pytest.fixture
def quadratic(rng):
    root = normal(rng, 6, 6)
    matrix = root @ root.T / 6 + torch.eye(6, dtype=F64)
    target, anchor, fisher = normal(rng, 6), normal(rng, 6), uniform(rng, 6)
    strength = 3.0
    weighted = strength * torch.diag(fisher)
    solved = torch.linalg.solve(matrix + weighted, matrix @ target + weighted @ anchor)
    return matrix, target, anchor, fisher, strength, solved


@pytest.mark.parametrize("rho", [None, 5.0, 1.5])
def test_the_minimiser_is_that_of_the_linear_solve_also_under_a_cap_above_one(quadratic, rho):
    *problem, solved = quadratic
    torch.testing.assert_close(descend(problem, rho), solved, rtol=0, atol=1e-9)


def test_a_cap_below_one_moves_the_minimiser(quadratic):
    *problem, solved = quadratic
    assert (descend(problem, 0.5) - solved).norm() > 0.1


def test_layer_cap_only_ever_shrinks():
    one = torch.tensor(1.0)
    assert float(layer_cap(one, one, 5.0)) == 1.0
    assert float(layer_cap(one, 10 * one, 5.0)) == 0.5
    assert float(layer_cap(one, 0 * one, 5.0)) == 1.0
    assert float(layer_cap(0 * one, one, 5.0)) == 0.0


def test_capped_pull_reports_what_it_added(rng):
    params = {"w": nn.Parameter(normal(rng, 30)), "v": nn.Parameter(normal(rng, 7))}
    task = {name: normal(rng, *p.shape) for name, p in params.items()}
    tally = Tally()
    for name, p in params.items():
        p.grad = task[name].clone()
    pulls = {
        "w": Pull(100.0, uniform(rng, 30), normal(rng, 30), tally),  # far above the cap
        "v": Pull(1e-3, uniform(rng, 7), normal(rng, 7), tally),  # far below it
    }
    add_pull_gradients(params, pulls, rho=2.0)
    added = {name: params[name].grad - task[name] for name in params}
    torch.testing.assert_close(added["w"].norm(), 2.0 * task["w"].norm())
    expected = 1e-3 * quadratic_gradient(
        params["v"].detach(), pulls["v"].anchor, pulls["v"].importance
    )
    torch.testing.assert_close(added["v"], expected)
    report = tally.read()
    norm = float(torch.cat([added["w"], added["v"]]).norm())
    assert report["applied_norm"] == pytest.approx(norm)
    assert report["capped_share"] == 0.5
    value = sum(
        pull.strength
        * float(quadratic_penalty(params[name].detach(), pull.anchor, pull.importance))
        for name, pull in pulls.items()
    )
    assert report["penalty"] == pytest.approx(value)


def test_a_parameter_without_a_gradient_gets_the_pull_alone(rng):
    params = {"w": nn.Parameter(normal(rng, 5))}
    add_pull_gradients(params, {"w": Pull(2.0, None, torch.zeros(5, dtype=F64))}, rho=None)
    torch.testing.assert_close(params["w"].grad, 2.0 * params["w"].detach())


@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e3, 1e12])
def test_implicit_step_is_the_closed_form_and_stable_for_any_strength(rng, strength):
    start, anchor, fisher = normal(rng, 40), normal(rng, 40), 10 * uniform(rng, 40)
    params = {"w": nn.Parameter(start.clone())}
    apply_pulls(params, [{"w": Pull(strength, fisher, anchor)}], {"w": 0.1})
    weight = 0.1 * strength * fisher
    torch.testing.assert_close(params["w"].detach(), (start + weight * anchor) / (1 + weight))
    for _ in range(50):
        apply_pulls(params, [{"w": Pull(strength, fisher, anchor)}], {"w": 0.1})
    assert (params["w"].detach() - anchor).norm() <= (start - anchor).norm()


def test_the_explicit_step_diverges_where_the_implicit_one_does_not():
    params = {"w": nn.Parameter(torch.ones(1, dtype=F64))}
    pull = {"w": Pull(50.0, torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64))}
    for _ in range(50):
        params["w"].grad = None
        add_pull_gradients(params, pull, rho=None)
        params["w"].data.sub_(added_gradient(params["w"]), alpha=0.1)
    assert params["w"].item() > 1e20
    params["w"].data.fill_(1.0)
    for _ in range(50):
        apply_pulls(params, [pull], {"w": 0.1})
    assert params["w"].item() < 1e-30


def test_several_pulls_are_one_implicit_step_and_each_tallies_its_share(rng, monkeypatch):
    monkeypatch.setattr(penalties, "CHUNK_ELEMENTS", 7)  # ragged chunks
    start = normal(rng, 4, 5)
    anchors, fisher = [normal(rng, 4, 5) for _ in range(3)], uniform(rng, 4, 5)
    strengths = [2.0, 0.7, 5.0]
    tallies = [Tally() for _ in strengths]
    importances = [fisher, None, 3 * fisher]
    pulls = [
        {"w": Pull(c, f, a, t)}
        for c, f, a, t in zip(strengths, importances, anchors, tallies, strict=True)
    ]
    params = {"w": nn.Parameter(start.clone())}
    apply_pulls(params, pulls, {"w": 0.3})
    weights = [
        0.3 * c * (torch.ones_like(fisher) if f is None else f)
        for c, f in zip(strengths, importances, strict=True)
    ]
    numerator = start + sum(w * a for w, a in zip(weights, anchors, strict=True))
    expected = numerator / (1 + sum(weights))
    torch.testing.assert_close(params["w"].detach(), expected)
    shares = [w * (a - expected) for w, a in zip(weights, anchors, strict=True)]
    torch.testing.assert_close(sum(shares), expected - start)  # the shares are the displacement
    for share, tally in zip(shares, tallies, strict=True):
        assert tally.read()["applied_norm"] == pytest.approx(float(share.norm()))


@pytest.mark.parametrize("with_importance", [True, False])
def test_chunks_and_tally_change_nothing(rng, monkeypatch, with_importance):
    start, anchor = normal(rng, 100, dtype=torch.float32), normal(rng, 100, dtype=torch.float32)
    fisher = uniform(rng, 100, dtype=torch.float32) if with_importance else None
    results = []
    for size, tally in ((1 << 18, None), (16, None), (16, Tally())):
        monkeypatch.setattr(penalties, "CHUNK_ELEMENTS", size)
        params = {"w": nn.Parameter(start.clone())}
        apply_pulls(params, [{"w": Pull(2.0, fisher, anchor, tally)}], {"w": 0.1})
        params["w"].grad = start.clone()
        add_pull_gradients(params, {"w": Pull(2.0, fisher, anchor, tally)}, rho=None)
        results.append((params["w"].detach().clone(), params["w"].grad))
    for moved, grad in results[1:]:
        assert torch.equal(moved, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_a_rate_of_zero_and_an_anchor_where_it_is_move_nothing(rng):
    start, fisher = normal(rng, 50, dtype=torch.float32), uniform(rng, 50, dtype=torch.float32)
    params = {"w": nn.Parameter(start.clone())}
    apply_pulls(params, [{"w": Pull(3.0, fisher, -start)}], {"w": 0.0})
    assert torch.equal(params["w"].detach(), start)
    apply_pulls(params, [{"w": Pull(3.0, fisher, start.clone())}], {"w": 0.1})
    torch.testing.assert_close(params["w"].detach(), start, rtol=2e-7, atol=0)


def test_half_precision_parameters_are_pulled_in_float32():
    start = torch.linspace(-1, 1, 33).bfloat16()
    params = {"w": nn.Parameter(start.clone())}
    anchor = torch.zeros(33)
    apply_pulls(params, [{"w": Pull(1.0, torch.ones(33), anchor)}], {"w": 0.25})
    assert torch.equal(params["w"].detach(), (start.float() / 1.25).bfloat16())
    params["w"].grad = torch.zeros_like(start)
    add_pull_gradients(params, {"w": Pull(1.0, None, anchor, Tally())}, rho=2.0)
    assert params["w"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("factored", [True, False])
def test_lora_penalty_and_gradients_are_those_of_the_effective_weight(rng, factored):
    A, B = normal(rng, 3, 7).requires_grad_(), normal(rng, 5, 3).requires_grad_()
    rows, columns = uniform(rng, 5), uniform(rng, 7)
    importance = torch.outer(rows, columns) if factored else torch.ones(5, 7, dtype=F64)
    if not factored:
        rows = columns = None
    change = 0.8 * B @ A
    full = 0.5 * (importance * change * change).sum()
    full.backward()
    closed = lora_penalty(A.detach(), B.detach(), 0.8, rows_O=rows, columns_I=columns)
    torch.testing.assert_close(closed.value, full.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(closed.grad_A_RI, A.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(closed.grad_B_OR, B.grad, rtol=1e-12, atol=1e-13)


def test_lora_penalty_does_not_see_how_a_change_is_factored(rng):
    A, B, mixing = normal(rng, 3, 7), normal(rng, 5, 3), normal(rng, 3, 3)
    rows, columns = uniform(rng, 5), uniform(rng, 7)
    value = lora_penalty(A, B, 2.0, rows_O=rows, columns_I=columns).value
    other = lora_penalty(
        torch.linalg.inv(mixing) @ A, B @ mixing, 2.0, rows_O=rows, columns_I=columns
    ).value
    torch.testing.assert_close(value, other, rtol=1e-11, atol=0)
    entries = (A * A).sum() + (B * B).sum()  # what a penalty on the factors would see
    mixed = ((torch.linalg.inv(mixing) @ A) ** 2).sum() + ((B @ mixing) ** 2).sum()
    assert abs(float(mixed / entries) - 1) > 0.1


def test_lora_penalty_is_zero_at_the_start(rng):
    penalty = lora_penalty(normal(rng, 3, 7), torch.zeros(5, 3, dtype=F64), 2.0)
    assert float(penalty.value) == 0.0
    assert not penalty.grad_A_RI.any()
    assert not penalty.grad_B_OR.any()


def test_lora_pair_is_one_block_under_the_cap(rng):
    A, B = nn.Parameter(normal(rng, 3, 7)), nn.Parameter(normal(rng, 5, 3))
    task = {"A": normal(rng, 3, 7), "B": normal(rng, 5, 3)}
    A.grad, B.grad = task["A"].clone(), task["B"].clone()
    penalty = lora_penalty(A.detach(), B.detach(), 1.0)
    tally = Tally()
    add_lora_gradient(A, B, penalty, 1e4, tally, rho=3.0)
    added = torch.cat([(A.grad - task["A"]).flatten(), (B.grad - task["B"]).flatten()])
    whole = torch.cat([task["A"].flatten(), task["B"].flatten()])
    torch.testing.assert_close(added.norm(), 3.0 * whole.norm())
    direction = torch.cat([penalty.grad_A_RI.flatten(), penalty.grad_B_OR.flatten()])
    torch.testing.assert_close(added / added.norm(), direction / direction.norm())
    report = tally.read()
    assert report["capped_share"] == 1.0
    assert report["applied_norm"] == pytest.approx(float(added.norm()))


def reference_divergence(student, teacher, kind, temperature, beta):
    """From probabilities, by the definition; autograd gives its gradient."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if kind == "forward_kl":
        value = (p * (p / q).log()).sum()
    elif kind == "reverse_kl":
        value = (q * (q / p).log()).sum()
    else:
        m = beta * p + (1 - beta) * q
        value = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
        value = value / (beta * (1 - beta))
    return temperature**2 * value


KINDS = ("forward_kl", "reverse_kl", "jsd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_divergence_and_its_gradient_are_those_of_the_definition(
    rng, monkeypatch, kind, temperature
):
    monkeypatch.setattr(penalties, "CHUNK_LOGITS", 40)  # three tokens a chunk
    teacher, student = 2 * normal(rng, 8, 13), 2 * normal(rng, 8, 13)
    ours, reference = student.clone().requires_grad_(), student.clone().requires_grad_()
    value, squared = divergence_sum(
        ours, teacher, divergence=kind, temperature=temperature, beta=0.3
    )
    expected = reference_divergence(reference, teacher, kind, temperature, 0.3)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (0.25 * value).backward()
    (0.25 * expected).backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-10, atol=1e-13)
    assert float(squared) == pytest.approx(16 * float(reference.grad.square().sum()))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_forward_gradient_is_t_times_q_minus_p(rng, temperature):
    teacher, student = normal(rng, 3, 6), normal(rng, 3, 6).requires_grad_()
    divergence_sum(student, teacher, temperature=temperature)[0].backward()
    q, p = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, temperature * (q - p), rtol=0, atol=1e-14)


def test_at_high_temperature_forward_kl_is_the_distance_of_centred_logits(rng):
    teacher, student = normal(rng, 4, 9), normal(rng, 4, 9)
    value, _ = divergence_sum(student, teacher, temperature=1e4)
    apart = student - teacher
    centred = apart - apart.mean(-1, keepdim=True)
    assert float(value) == pytest.approx(float((centred**2).sum()) / 18, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_identical_logits_have_no_loss_and_no_gradient(rng, kind, dtype):
    logits = 3 * normal(rng, 5, 11, dtype=dtype)
    student = logits.clone().requires_grad_()
    value, squared = divergence_sum(student, logits, divergence=kind, beta=0.3)
    value.backward()
    precision = torch.finfo(dtype).eps
    assert abs(value.item()) <= 20 * precision
    assert float(student.grad.abs().max()) <= 20 * precision
    assert float(squared) <= (100 * precision) ** 2


def test_jsd_tends_to_the_two_divergences_when_rescaled_and_to_nothing_when_not(rng):
    teacher, student = normal(rng, 4, 9), normal(rng, 4, 9)

    def jsd(beta, *, rescale):
        return float(
            divergence_sum(student, teacher, divergence="jsd", beta=beta, rescale=rescale)[0]
        )

    forward = float(divergence_sum(student, teacher)[0])
    reverse = float(divergence_sum(student, teacher, divergence="reverse_kl")[0])
    assert jsd(1e-5, rescale=True) == pytest.approx(forward, rel=1e-3)
    assert jsd(1 - 1e-5, rescale=True) == pytest.approx(reverse, rel=1e-3)
    assert jsd(1e-5, rescale=False) < 1e-3 * forward
    assert jsd(0.5, rescale=True) == pytest.approx(4 * jsd(0.5, rescale=False))


def test_jsd_is_symmetric_at_a_half_and_at_most_log_two():
    student, teacher = torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0.0, 60.0, 0.0]])
    there, _ = divergence_sum(student, teacher, divergence="jsd", rescale=False)
    back, _ = divergence_sum(teacher, student, divergence="jsd", rescale=False)
    assert float(there) == float(back)
    assert float(there) == pytest.approx(math.log(2), abs=1e-6)


def test_half_precision_logits_are_compared_in_float32(rng):
    teacher, student = normal(rng, 6, 50).bfloat16(), normal(rng, 6, 50).bfloat16()
    value, _ = divergence_sum(student, teacher)
    assert value.dtype == torch.float32
    expected = reference_divergence(student.double(), teacher.double(), "forward_kl", 1.0, 0.5)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_no_gradient_flows_into_the_teacher(rng):
    teacher, student = normal(rng, 2, 5).requires_grad_(), normal(rng, 2, 5).requires_grad_()
    divergence_sum(student, teacher)[0].backward()
    assert teacher.grad is None


def test_logits_of_other_shapes_are_refused(rng):
    with pytest.raises(ValueError, match="teacher logits"):
        divergence_sum(normal(rng, 2, 5), normal(rng, 2, 6))
