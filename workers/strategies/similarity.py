"""How alike representations are: the distance that distillation pulls at, and linear CKA against the base."""

# Shape letters: N examples, P and Q widths, S positions, D width.

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.context import Context
from workers.strategies.modes import evaluating

NUM_POSITIONS = 1024  # compared at most
TINY = 1e-12


def hidden_distance_sum(
    student_SD: Mapping[int, Tensor],
    teacher_SD: Mapping[int, Tensor],
    *,
    kind: Literal["mse", "cosine"] = "mse",
) -> Tensor:
    """Sum over positions of the mean over layers of how far hidden states are from the teacher's.

    `mse` is |h_s - h_t|^2 / |h_t|^2 of each position, `cosine` 1 - cos(h_s, h_t); in float32 or wider. The
    norm is each position's own, so that the sum does not depend on how a step is split.

    Args:
        student_SD: By layer; the layers that count.
        teacher_SD: By layer, at the same positions; no gradient flows into them.
        kind: Which.
    """
    parts = []
    for layer, states in student_SD.items():
        own = states.to(torch.promote_types(states.dtype, torch.float32))
        other = teacher_SD[layer].detach().to(own.dtype)
        if kind == "cosine":
            parts.append((1.0 - F.cosine_similarity(own, other, dim=-1)).sum())
        else:
            parts.append(((own - other).square().sum(-1) / (other.square().sum(-1) + TINY)).sum())
    return torch.stack(parts).sum() / len(parts)


def linear_cka(left_NP: Tensor, right_NQ: Tensor) -> float:
    """|Yc' Xc|_F^2 / (|Xc' Xc|_F |Yc' Yc|_F) of the centred representations, in float64; 0 to 1.

    Kornblith et al. 2019 (arXiv 1905.00414, eq. 4 with linear kernels).

    It is 1 where one set is a rotation, shift or scaling of the other. By the smaller of the Gram matrices:
    over examples or over features, which give the same number. NaN where a set is constant.

    Args:
        left_NP: One row an example.
        right_NQ: The same examples.
    """
    left, right = (x.double() - x.double().mean(0) for x in (left_NP, right_NQ))
    if len(left) < max(left.shape[1], right.shape[1]):
        gram_left, gram_right = left @ left.T, right @ right.T
        shared = (gram_left * gram_right).sum()
    else:
        gram_left, gram_right = left.T @ left, right.T @ right
        shared = (left.T @ right).square().sum()
    return float(shared / (torch.linalg.norm(gram_left) * torch.linalg.norm(gram_right)))


def cka_to_base(ctx: Context, store: str, rows: Sequence[int]) -> dict[int, float]:
    """Linear CKA of every layer between the model as it stands and the starting one, at supervised positions.

    The rows are read whole on every rank, one at a time, until 1,024 positions are found.

    Args:
        ctx: Of the run.
        store: Where the rows lie.
        rows: Indices into it.

    Raises:
        ValueError: The run gives no access to rows, hidden states or the starting model.
    """
    if ctx.rows_micro is None or ctx.forward is None or ctx.base_hidden is None:
        raise ValueError("this run shows no hidden states")
    layers = frozenset(range(ctx.num_layers + 1))
    own: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    base: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    found = 0
    for row in rows:
        micro = ctx.rows_micro(store, store, [row])
        everything = torch.ones_like(micro.row_of_N, dtype=torch.bool)
        if found >= NUM_POSITIONS or not everything.numel():
            continue
        found += everything.numel()
        with torch.no_grad(), evaluating(ctx.model):
            hidden = ctx.forward(micro, layers).hidden_BTD
            taught = ctx.base_hidden(micro, everything, layers)
        for layer in layers:
            flat = hidden[layer].reshape(-1, hidden[layer].shape[-1])
            own[layer].append(flat[micro.positions_N].cpu())
            base[layer].append(taught[layer].cpu())
    if not found:
        return {}
    return {
        layer: linear_cka(torch.cat(own[layer]), torch.cat(base[layer])) for layer in sorted(layers)
    }
