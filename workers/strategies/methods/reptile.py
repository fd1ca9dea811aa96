"""Reptile: the way that a few SGD steps on the task take, given to the optimiser as the gradient."""

from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import ClassVar

from torch import Tensor

from workers.strategies.base import Cost, Needs, Strategy
from workers.strategies.batch import Backward, Micro
from workers.strategies.context import Context
from workers.strategies.episodes import (
    RowKey,
    distance,
    excursion,
    inner_step,
    row_key,
    select_rows,
    step_rows,
    take_gradients,
)


class Reptile(Strategy):
    """Splits a step's rows into K slices, takes an SGD step on each, and hands the way to the optimiser.

    phi_{j+1} = phi_j - alpha grad L_j(phi_j) from phi_0 = theta, with L_j the loss, other strategies' terms
    included, over slice j. The optimiser gets strength * (theta - phi_K) / (alpha K) as its gradient (Nichol et
    al. 2018, section 2), after theta has been put back bit for bit. So K = 1 at strength 1 is the plain step,
    and clipping, decay, schedule and the pulls of other strategies act as in any step. At strength 0 the
    strategy is off.

    Args:
        inner_lr: alpha; no schedule.
        inner_steps: K; a step with fewer rows takes as many as it has.
    """

    kind: ClassVar[str] = "reptile"

    def __init__(self, *, inner_lr: float = 1e-3, inner_steps: int = 3) -> None:
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self._norm: Tensor | None = None  # of phi_K - theta

    def needs(self) -> Needs:
        """To own the step."""
        return Needs(step_owner=True)

    def cost(self) -> Cost:
        """Every row is read once; smaller batches, a copy of the weights and a pass over them each step."""
        return Cost(step_share=0.5, trainable_copies=2.0)

    def on_step_start(self, ctx: Context) -> None:
        """Forgets the last step's number."""
        self._norm = None

    def compute_grads(self, ctx: Context, micros: Sequence[Micro], backward: Backward) -> None:
        """Leaves the way in `grad`."""
        slice_of, count = self._slices(step_rows(ctx, micros))
        if not count:
            backward(micros)
            return
        params, total = ctx.params, dict[str, Tensor]()
        with excursion(params) as start:
            for index in range(count):
                keys = {key for key, place in slice_of.items() if place == index}
                own = select_rows(micros, partial(_is_in, keys))
                backward(own)
                gradients = take_gradients(params)
                inner_step(params, gradients, start, rate=self.inner_lr)
                for name, gradient in gradients.items():
                    # The sum of the gradients is the way divided by alpha, without its rounding.
                    total[name] = total[name].add_(gradient) if name in total else gradient
            self._norm = distance(params, start)
        factor = ctx.strength(self.kind) / count
        for name, gradient in total.items():
            params[name].grad = gradient if factor == 1 else gradient.mul_(factor)

    def metrics(self) -> Mapping[str, float]:
        """`applied_norm`: how far phi_K was from theta."""
        return {"applied_norm": 0.0 if self._norm is None else float(self._norm)}

    def _slices(self, drawn: Sequence[RowKey]) -> tuple[dict[RowKey, int], int]:
        """The slice of each row, every source spread over all of them; and how many there are."""
        distinct = sorted(set(drawn))
        count = min(self.inner_steps, len(distinct))
        return {key: place % count for place, key in enumerate(distinct)}, count


def _is_in(keys: Set[RowKey], source: str, sample_id: int, _: bool) -> bool:  # noqa: FBT001
    return row_key(source, sample_id) in keys
