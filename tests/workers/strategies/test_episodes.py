"""Meta-gradients against closed forms and finite differences; rows of a step chosen alike on every rank."""

import pytest
import torch
from torch import nn

from tests.workers.strategies.stage import F64, Stage, make_micro, make_model, make_rows
from workers.strategies.episodes import (
    conjugate_gradients,
    excursion,
    implicit_gradient,
    inner_step,
    meta_gradient,
    row_key,
    select_rows,
    step_rows,
)

SIZE = 6
SETTINGS = [(0.1, 1, 0.0), (0.1, 5, 0.0), (0.1, 5, 0.5), (0.05, 10, 2.0)]  # alpha, K, mu
every_setting = pytest.mark.parametrize(("rate", "steps", "prox"), SETTINGS)


def quadratic(seed):
    """Hessian, minimiser and the loss 1/2 (x - t)' A (x - t)."""
    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(SIZE, SIZE, generator=rng, dtype=F64)
    hessian = root @ root.T / SIZE + 0.1 * torch.eye(SIZE, dtype=F64)
    target = torch.randn(SIZE, generator=rng, dtype=F64)

    def loss(x):
        return 0.5 * (x - target) @ hessian @ (x - target)

    return hessian, target, loss


@pytest.fixture
def problem():
    """(support Hessian, support minimiser, support, query Hessian, query minimiser, query, theta)."""
    rng = torch.Generator().manual_seed(3)
    theta = torch.randn(SIZE, generator=rng, dtype=F64)
    return (*quadratic(1), *quadratic(2), theta)


def inner_end(hessian, target, theta, rate, steps, prox):
    """phi_K in closed form: the prox minimiser, and what is left of the way to it."""
    eye = torch.eye(SIZE, dtype=F64)
    full = hessian + prox * eye
    fixed = torch.linalg.solve(full, hessian @ target + prox * theta)
    left = torch.linalg.matrix_power(eye - rate * full, steps)
    return fixed + left @ (theta - fixed)


@every_setting
def test_the_second_order_gradient_is_the_closed_form(problem, rate, steps, prox):
    A, t, support, Q, q, query, theta = problem
    phi = inner_end(A, t, theta, rate, steps, prox)
    eye = torch.eye(SIZE, dtype=F64)
    M = eye - rate * (A + prox * eye)
    powers = sum(torch.linalg.matrix_power(M, i) for i in range(steps))
    jacobian = torch.linalg.matrix_power(M, steps) + rate * prox * powers
    ours = meta_gradient(support, query, theta, rate=rate, steps=steps, prox=prox, order="second")
    torch.testing.assert_close(ours, jacobian.T @ (Q @ (phi - q)), rtol=0, atol=1e-13)


@every_setting
def test_the_second_order_gradient_is_that_of_finite_differences(problem, rate, steps, prox):
    A, t, support, _, _, query, theta = problem
    ours = meta_gradient(support, query, theta, rate=rate, steps=steps, prox=prox, order="second")
    width = 1e-5
    for index in range(SIZE):
        step = torch.zeros(SIZE, dtype=F64)
        step[index] = width
        ahead, behind = (
            query(inner_end(A, t, theta + sign * step, rate, steps, prox)) for sign in (1, -1)
        )
        assert float(ours[index]) == pytest.approx(float((ahead - behind) / (2 * width)), abs=1e-8)


@every_setting
def test_the_first_order_gradient_is_the_querys_at_the_end_of_the_loop(problem, rate, steps, prox):
    A, t, support, Q, q, query, theta = problem
    phi = inner_end(A, t, theta, rate, steps, prox)
    ours = meta_gradient(support, query, theta, rate=rate, steps=steps, prox=prox, order="first")
    torch.testing.assert_close(ours, Q @ (phi - q), rtol=0, atol=1e-13)


def test_the_implicit_gradient_is_the_limit_of_many_steps(problem):
    A, t, support, Q, q, query, theta = problem
    prox = 0.7
    eye = torch.eye(SIZE, dtype=F64)
    phi = torch.linalg.solve(A + prox * eye, A @ t + prox * theta)
    exact = torch.linalg.solve(eye + A / prox, Q @ (phi - q))
    unrolled = meta_gradient(support, query, theta, rate=0.2, steps=2000, prox=prox, order="second")
    torch.testing.assert_close(unrolled, exact, rtol=0, atol=1e-13)
    errors = [
        float((implicit_gradient(support, query, phi, prox=prox, solver_steps=k) - exact).norm())
        for k in (1, 2, 3, SIZE)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12


def test_conjugate_gradients_stop_at_a_goal_of_zero():
    zero = torch.zeros(3, dtype=F64)
    assert torch.equal(conjugate_gradients(lambda x: x, zero, 4), zero)


@pytest.mark.parametrize("order", ["first", "second"])
def test_without_inner_steps_in_effect_it_is_the_plain_query_gradient(problem, order):
    _, _, support, Q, q, query, theta = problem
    plain = Q @ (theta - q)
    still = meta_gradient(support, query, theta, rate=0.0, steps=3, prox=0.5, order=order)
    torch.testing.assert_close(still, plain, rtol=0, atol=1e-14)


def test_a_prox_without_bound_leaves_theta_where_it_is(problem):
    """mu to infinity at alpha * mu = 1/2: phi_K tends to theta, and the gradient to the plain one."""
    _, _, support, Q, q, query, theta = problem
    errors = []
    for prox in (1e2, 1e4, 1e6):
        found = meta_gradient(
            support, query, theta, rate=0.5 / prox, steps=5, prox=prox, order="first"
        )
        errors.append(float((found - Q @ (theta - q)).norm()))
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]


def test_an_inner_step_in_place_is_proximal_descent_and_is_undone_bit_for_bit(problem):
    A, t, *_, theta = problem
    params = {"w": nn.Parameter(theta.clone())}
    with excursion(params) as start:
        for _ in range(4):
            gradient = {"w": A @ (params["w"].detach() - t)}
            inner_step(params, gradient, start, rate=0.1, prox=0.3)
        expected = inner_end(A, t, theta, 0.1, 4, 0.3)
        torch.testing.assert_close(params["w"].detach(), expected, rtol=0, atol=1e-14)
    assert torch.equal(params["w"].detach(), theta)


def test_an_error_inside_an_excursion_leaves_the_weights_as_they_were():
    params = {"w": nn.Parameter(torch.ones(2))}

    def fail():
        with excursion(params):
            params["w"].data.fill_(7.0)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert params["w"].tolist() == [1.0, 1.0]


def test_selected_rows_give_the_logits_and_labels_they_had():
    rows = [("domain", i, row, True) for i, row in enumerate(make_rows(5, 1))]
    rows.append(("replay", 0, make_rows(1, 8)[0], True))
    micro = make_micro(rows)
    model = make_model()
    logits = model(micro.input_ids_BT, micro.positions_N)
    (part,) = select_rows([micro], lambda s, i, _: s == "replay" or i in (1, 3))
    assert part.sources == ("domain", "domain", "replay")
    assert part.sample_ids == (1, 3, 0)
    own = torch.isin(micro.row_of_N, torch.tensor([1, 3, 5]))
    assert torch.equal(part.targets_N, micro.targets_N[own])
    torch.testing.assert_close(model(part.input_ids_BT, part.positions_N), logits[own])
    assert select_rows([micro], lambda *_: True) == [micro]
    assert select_rows([micro], lambda *_: False) == []


def test_rows_of_two_ranks_are_the_rows_of_one():
    rows = [("domain", i, row, True) for i, row in enumerate(make_rows(5, 1))]
    rows += [("replay", 3, make_rows(1, 8)[0], True)]
    ctx = Stage([], {}).ctx
    whole = step_rows(ctx, [make_micro(rows)])
    assert whole == sorted([*(row_key("domain", i) for i in range(5)), row_key("replay", 3)])
    shares = ([make_micro(rows[:2])], [make_micro(rows[2:])])
    ctx.world_size = 2
    sums: list[torch.Tensor] = []  # what rank 0 brings to each all-reduce

    def record(tensor):
        sums.append(tensor.clone())
        if len(sums) == 1:
            tensor[1] = 4  # what the other one says it has

    ctx.all_reduce = record
    step_rows(ctx, shares[0])
    seen = iter(sums)

    def add(tensor):
        tensor += next(seen)

    ctx.rank, ctx.all_reduce = 1, add
    assert step_rows(ctx, shares[1]) == whole
