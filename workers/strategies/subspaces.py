"""Bases of a linear layer's old inputs, and gradients that leave what it does to them alone (GPM)."""

# Shape letters: B rows, T tokens, S positions, O outputs and I inputs of a linear layer, K vectors of a basis.

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workers.strategies.batch import Micro
from workers.strategies.context import Context
from workers.strategies.modes import evaluating


def extend_basis(basis_IK: Tensor, gram_II: Tensor, threshold: float) -> Tensor:
    """Adds the fewest directions with which the basis holds a share of the inputs' energy.

    Args:
        basis_IK: Orthonormal columns from before; none at first.
        gram_II: Sum of x x' over the new inputs; its eigenvalues are their squared singular values.
        threshold: Share of the energy tr(gram) to be held.

    Returns:
        Orthonormal columns, those of the former basis first.
    """
    gram = gram_II.double()
    basis = basis_IK.double()
    residual = gram - basis @ (basis.T @ gram)
    residual = residual - (residual @ basis) @ basis.T
    total = float(torch.trace(gram))
    missing = threshold * total - (total - float(torch.trace(residual)))
    if total <= 0.0 or missing <= 0.0:
        return basis_IK
    values, vectors = torch.linalg.eigh((residual + residual.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    count = int((values.cumsum(0) < missing).sum()) + 1
    room = gram.shape[0] - basis.shape[1]
    added = vectors[:, : min(count, room)]
    for _ in range(2):  # rounding leaves some of the former basis in what is added
        added = added - basis @ (basis.T @ added)
        added = torch.linalg.qr(added).Q
    return torch.cat([basis, added], 1).to(basis_IK.dtype)


def leave_out(matrix_OI: Tensor, basis_IK: Tensor, strength: float = 1.0) -> Tensor:
    """G - strength * G M M': with strength 1 what is left maps every old input to 0."""
    left = matrix_OI
    for _ in range(
        2 if strength == 1.0 else 1
    ):  # twice: residuals at rounding, not at its square root
        left = left - strength * ((left @ basis_IK) @ basis_IK.T)
    return left


class InputBases:
    """The bases of a run, by the name of the trained weight that reads the inputs.

    Full weights: every linear layer whose weight is trained, but for a head that is the embedding, too.
    Adapters: `lora_A`, which reads the layer's inputs.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.bases: dict[str, Tensor] = {}

    def names(self, ctx: Context) -> dict[str, nn.Module]:
        """Linear layers by the name of their trained weight."""
        by_parameter = {id(p): name for name, p in ctx.params.items()}
        modules = list(ctx.model.modules())
        embedded = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
        found: dict[str, nn.Module] = {}
        for module in modules:
            weights = [getattr(module, "weight", None)] if isinstance(module, nn.Linear) else []
            # an adapter's factors may be bare parameters of the layer that holds them
            weights += [getattr(module, "lora_A", None)]
            for weight in weights:
                name = by_parameter.get(id(weight))
                is_read = isinstance(weight, nn.Parameter) and id(weight) not in embedded
                if is_read and name is not None and ".lora_B" not in name:
                    found[name] = module
        return found

    def missing(self, ctx: Context) -> frozenset[str]:
        """Trained weights of linear layers whose inputs have not been learnt, such as a new adapter's."""
        return frozenset(self.names(ctx)) - self.bases.keys()

    def learn(
        self, ctx: Context, micros: Iterable[Micro], only: frozenset[str] | None = None
    ) -> None:
        """Extends the bases by the inputs that the rows give the layers as they are now; summed over ranks.

        Args:
            ctx: Of the run.
            micros: This rank's share of the rows.
            only: Weights whose bases are extended; None: all.
        """
        if ctx.forward is None:
            raise ValueError("progressive: the context gives no forward")
        layers = {n: m for n, m in self.names(ctx).items() if only is None or n in only}
        width = {name: ctx.params[name].shape[1] for name in layers}
        grams = {
            name: torch.zeros(k, k, dtype=torch.float64, device=ctx.device)
            for name, k in width.items()
        }
        with evaluating(ctx.model), torch.no_grad():
            for micro in micros:
                if micro.positions_N.numel():
                    with _watching(layers, grams, _real_tokens(micro)):
                        ctx.forward(micro)
        for name, gram in grams.items():
            ctx.all_reduce(gram)
            dtype = torch.promote_types(ctx.params[name].dtype, torch.float32)
            former = self.bases.get(name, gram.new_zeros(width[name], 0, dtype=dtype))
            self.bases[name] = extend_basis(former, gram, self.threshold)

    def share(self) -> float:
        """The mean share of a layer's input directions that are closed to it."""
        shares = [basis.shape[1] / basis.shape[0] for basis in self.bases.values()]
        return sum(shares) / len(shares) if shares else 0.0

    def load(self, tensors: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
        """Takes up saved bases.

        Raises:
            ValueError: One belongs to no trained weight, or to one of another width.
        """
        for name, basis in tensors.items():
            if widths.get(name) != basis.shape[0]:
                raise ValueError(
                    f"state of progressive: the basis of {name} fits no trained weight"
                )
        self.bases = dict(tensors)


def _real_tokens(micro: Micro) -> Tensor:
    """Bool (B, T): columns up to a row's last supervised one; behind it there may be padding."""
    num_rows, width = micro.input_ids_BT.shape
    last_B = torch.full((num_rows,), -1, device=micro.positions_N.device)
    last_B.scatter_reduce_(0, micro.row_of_N, micro.positions_N % width, "amax")
    return torch.arange(width, device=last_B.device)[None] <= last_B[:, None]


@contextlib.contextmanager
def _watching(
    layers: Mapping[str, nn.Module], grams: Mapping[str, Tensor], real_BT: Tensor
) -> Iterator[None]:
    def watch(name: str) -> Any:  # noqa: ANN401 - torch's own type of a hook
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given = inputs[0].detach()
            if given.shape[:-1] == real_BT.shape:
                given = given[real_BT]
            flat_SI = given.reshape(-1, given.shape[-1]).double()
            grams[name].addmm_(flat_SI.T, flat_SI)

        return hook

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
