"""Episodes of meta-learning: which rows of a step they read, inner loops in place, and exact meta-gradients."""

# Shape letters: B rows, N supervised positions of a micro-batch, P parameters as one vector.

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from workers.strategies.batch import Micro
from workers.strategies.context import Context

DOMAIN = "domain"  # source of the task's own rows

Objective = Callable[[Tensor], Tensor]  # scalar of a vector (P,)


class RowKey(NamedTuple):
    """Tells a row of a step from the others, alike on every rank."""

    source: int  # hash of its name
    sample_id: int


def row_key(source: str, sample_id: int) -> RowKey:
    """The key of a row."""
    return RowKey(zlib.crc32(source.encode()), sample_id)


def step_rows(ctx: Context, micros: Sequence[Micro]) -> list[RowKey]:
    """The step's rows with a supervised token over all ranks, sorted; a row drawn twice stands twice.

    Collective: two small all-reduces where there is more than one rank.
    """
    own = [
        row_key(micro.sources[row], micro.sample_ids[row])
        for micro in micros
        for row in torch.unique(micro.row_of_N).tolist()
    ]
    if ctx.world_size == 1:
        return sorted(own)
    counts = torch.zeros(ctx.world_size, dtype=torch.float64, device=ctx.device)
    counts[ctx.rank] = len(own)
    ctx.all_reduce(counts)
    # Float64 holds both numbers exactly.
    shape = (ctx.world_size, max(int(counts.max()), 1), 2)
    table = torch.zeros(shape, dtype=torch.float64, device=ctx.device)
    if own:
        table[ctx.rank, : len(own)] = torch.tensor(own, dtype=torch.float64, device=ctx.device)
    ctx.all_reduce(table)
    rows = [pair for part, n in zip(table, counts.tolist(), strict=True) for pair in part[: int(n)]]
    return sorted(RowKey(int(pair[0]), int(pair[1])) for pair in rows)


def select_rows(micros: Sequence[Micro], keep: Callable[[str, int, bool], bool]) -> list[Micro]:
    """The rows that are kept of each micro-batch; those of which none with a supervised token is kept fall away.

    Args:
        micros: Of this rank.
        keep: Of (source, sample id, whether the row counts as task).
    """
    selected = []
    for micro in micros:
        facts = zip(micro.sources, micro.sample_ids, micro.is_task_B.tolist(), strict=True)
        kept = [index for index, fact in enumerate(facts) if keep(*fact)]
        if len(kept) == len(micro.sources):
            selected.append(micro)
        elif kept:
            part = _take(micro, kept)
            if part.positions_N.numel():
                selected.append(part)
    return selected


def _take(micro: Micro, kept: Sequence[int]) -> Micro:
    """Some rows of a micro-batch, without the columns behind their last supervised position."""
    device, width = micro.row_of_N.device, micro.input_ids_BT.shape[1]
    rows = torch.tensor(kept, dtype=torch.int64, device=device)
    new_row = torch.full((len(micro.sources),), -1, dtype=torch.int64, device=device)
    new_row[rows] = torch.arange(len(kept), device=device)
    own = new_row[micro.row_of_N] >= 0
    columns_N = micro.positions_N[own] % width
    row_of_N = new_row[micro.row_of_N[own]]
    new_width = int(columns_N.max()) + 1 if columns_N.numel() else 1
    return replace(
        micro,
        input_ids_BT=micro.input_ids_BT[rows, :new_width],
        positions_N=row_of_N * new_width + columns_N,
        targets_N=micro.targets_N[own],
        row_of_N=row_of_N,
        weights_N=micro.weights_N[own],
        sources=tuple(micro.sources[k] for k in kept),
        sample_ids=tuple(micro.sample_ids[k] for k in kept),
        is_task_B=micro.is_task_B[rows],
    )


@contextmanager
def excursion(params: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Copies of the weights to start from; what happens to the weights inside is undone, bit for bit."""
    start = {name: p.detach().clone() for name, p in params.items()}
    try:
        yield start
    finally:
        with torch.no_grad():
            for name, value in start.items():
                params[name].copy_(value)


def take_gradients(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients, which are taken away from the parameters."""
    found = {name: p.grad for name, p in params.items() if p.grad is not None}
    for parameter in params.values():
        parameter.grad = None
    return found


def inner_step(
    params: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    *,
    rate: float,
    prox: float = 0.0,
) -> None:
    """phi <- phi - rate * (gradient + prox * (phi - theta)), in place."""
    with torch.no_grad():
        for name, gradient in gradients.items():
            phi = params[name]
            if prox:
                gradient = torch.add(gradient, phi - start[name], alpha=prox)  # noqa: PLW2901
            phi.sub_(gradient, alpha=rate)


def distance(params: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]) -> Tensor:
    """Norm of the weights' distance from where they started; a scalar on the device."""
    squares = [(p.detach() - start[n]).float().square().sum() for n, p in params.items()]
    return torch.stack(squares).sum().sqrt()


def meta_gradient(
    support: Objective,
    query: Objective,
    theta_P: Tensor,
    *,
    rate: float,
    steps: int,
    prox: float,
    order: Literal["first", "second"],
) -> Tensor:
    """The gradient of query(phi_K) with respect to theta, with phi_K the end of the proximal inner loop.

    `first` takes d phi_K / d theta for the identity; `second` differentiates through the loop, which keeps the
    graphs of all its steps. Finn et al. 2017, equation 1; the prox term is that of iMAML's equation 3.

    Args:
        support: Loss of the inner loop.
        query: Loss at its end.
        theta_P: Where it starts.
        rate: alpha of the inner SGD.
        steps: K.
        prox: mu of mu / 2 * |phi - theta|^2.
        order: Of the derivative.
    """
    theta = theta_P.detach().clone().requires_grad_()
    phi = _inner_loop(support, theta, rate, steps, prox, is_graph_kept=order == "second")
    if order == "first":
        phi = phi.detach().requires_grad_()
        return torch.autograd.grad(query(phi), phi)[0]
    return torch.autograd.grad(query(phi), theta)[0]


def implicit_gradient(
    support: Objective,
    query: Objective,
    phi_P: Tensor,
    *,
    prox: float,
    solver_steps: int,
) -> Tensor:
    """The meta-gradient at an inner minimiser: x with (I + H / prox) x = grad query(phi).

    H is the support's Hessian at phi; the system is solved by conjugate gradients on Hessian-vector products
    (Rajeswaran et al. 2019, equation 6).

    Args:
        support: Loss of the inner problem, without its prox term.
        query: Loss at its end.
        phi_P: Where the inner problem, prox term included, is stationary.
        prox: mu, above 0.
        solver_steps: Iterations; as many as dimensions are exact.
    """
    phi = phi_P.detach().clone().requires_grad_()
    slope = torch.autograd.grad(support(phi), phi, create_graph=True)[0]
    goal = torch.autograd.grad(query(phi), phi)[0]

    def product(vector: Tensor) -> Tensor:
        curved = torch.autograd.grad(slope, phi, vector, retain_graph=True)[0]
        return vector + curved / prox

    return conjugate_gradients(product, goal, solver_steps)


def conjugate_gradients(product: Objective, goal_P: Tensor, steps: int) -> Tensor:
    """x with product(x) = goal, for a symmetric positive definite product, by so many iterations."""
    solution = torch.zeros_like(goal_P)
    residual, direction = goal_P.clone(), goal_P.clone()
    energy = residual @ residual
    for _ in range(steps):
        if not energy > 0:
            break
        image = product(direction)
        length = energy / (direction @ image)
        solution += length * direction
        residual = residual - length * image
        new_energy = residual @ residual
        direction = residual + (new_energy / energy) * direction
        energy = new_energy
    return solution


def _inner_loop(
    support: Objective,
    theta: Tensor,
    rate: float,
    steps: int,
    prox: float,
    *,
    is_graph_kept: bool,
) -> Tensor:
    phi = theta if is_graph_kept else theta.detach().clone().requires_grad_()
    for _ in range(steps):
        slope = torch.autograd.grad(support(phi), phi, create_graph=is_graph_kept)[0]
        phi = phi - rate * (slope + prox * (phi - theta))
        if not is_graph_kept:
            phi = phi.detach().requires_grad_()
    return phi
