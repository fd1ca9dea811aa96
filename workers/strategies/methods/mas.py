"""Memory-aware synapses: a quadratic anchor weighted by how far each weight moves the outputs."""

# Shape letters: N supervised positions, V vocabulary.

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from workers.strategies.anchors import AnchorPlace, SequenceAnchor
from workers.strategies.batch import Micro
from workers.strategies.context import Context
from workers.strategies.importance import GENERAL, Normalize, Pass, measure_importance


class Mas(SequenceAnchor):
    """Penalty strength / 2 * sum of Omega (theta - anchor)^2, Omega the sensitivity of the squared logits.

    Omega is the mean over documents of |d/d theta of the sum over positions of |z|^2|, per token, with z
    the logits less their mean (softmax ignores a shift of all, the norm does not). No labels are read.

    With adapters the penalty is on the effective change of each adapted weight, anchored at the frozen
    base weight, with Omega factored into the means of its rows and columns.

    Args:
        penalty_mode: `implicit` takes a decoupled step that is stable for any strength; `gradient` adds the
            penalty's gradient before clipping. Adapters always use the gradient.
        importance_samples: General rows that are read, and rows of each finished task.
        importance_normalize: `mean` and `max` scale Omega so that its mean or maximum over all weights is 1.
        importance_clip: Quantile above which Omega is cut off, before it is normalised; 1 is off.
        anchor: `base` keeps the general anchor where the job started; `latest` moves all to the latest task's
            end.
        online: Whether finished tasks are anchored, too.
        gamma: Decay of the finished tasks' importance; with `latest` of all former ones.
        rho: In gradient mode the pull of a block is at most so many times its task gradient; None is off.
    """

    kind: ClassVar[str] = "mas"

    def __init__(  # noqa: PLR0913 - the fields of its configuration
        self,
        *,
        penalty_mode: Literal["implicit", "gradient"] = "implicit",
        importance_samples: int = 1024,
        importance_normalize: Normalize = "mean",
        importance_clip: float = 0.999,
        anchor: AnchorPlace = "base",
        online: bool = True,
        gamma: float = 1.0,
        rho: float | None = 5.0,
    ) -> None:
        super().__init__(
            penalty_mode,
            rho,
            samples=importance_samples,
            normalize=importance_normalize,
            clip=importance_clip,
            place=anchor,
            online=online,
            gamma=gamma,
        )

    def measure(
        self, ctx: Context, store: str, rows: Sequence[int], seed: int, only: frozenset[str]
    ) -> dict[str, Tensor]:
        """The sensitivity on these rows."""
        return measure_sensitivity(ctx, rows, store=store, only=only)

    def cache_key(self, num_rows: int) -> str:
        """What the starting model's importance follows from, beside model and rows."""
        return f"mas/importance/1/{num_rows}"


def measure_sensitivity(
    ctx: Context,
    rows: Sequence[int],
    *,
    store: str = GENERAL,
    only: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """Mean over documents of |gradient of the summed squared centred logits|, per token.

    Aljundi et al. 2018, equation 3, with a document as the sample: its positions share one absolute value.

    Returns:
        As `measure_importance`, neither clipped nor normalised.

    Raises:
        ValueError: No supervised token among the rows, or an importance that is zero or not finite.
    """

    def loss(logits_NV: Tensor, _: Micro) -> Tensor:
        return (logits_NV - logits_NV.mean(-1, keepdim=True)).square().sum()

    return measure_importance(ctx, Pass("mas", store, rows, 1, loss, torch.abs, only))
