"""Elastic weight consolidation: a quadratic anchor weighted by the Fisher information."""

# Shape letters: N supervised positions, V vocabulary.

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.anchors import AnchorPlace, SequenceAnchor
from workers.strategies.batch import Micro
from workers.strategies.context import Context
from workers.strategies.importance import GENERAL, Normalize, Pass, measure_importance

CHUNK_LOGITS = 1 << 22
NUM_SQUARES = 128  # of a sampled-label pass: an entry's relative error is about sqrt(2 / 128)

FisherType = Literal["true", "empirical"]
FisherEstimator = Literal["batch", "document"]


class Ewc(SequenceAnchor):
    """Penalty strength / 2 * sum of F (theta - anchor)^2 with F the diagonal Fisher per token.

    With adapters the penalty is on the effective change of each adapted weight, anchored at the frozen
    base weight, with F factored into the means of its rows and columns.

    The Fisher of the starting model is measured on general rows (cached across jobs). At the end of each
    task but the last it is measured on that task's own rows, and joins as `SequenceAnchor` says.

    Args:
        penalty_mode: `implicit` takes a decoupled step that is stable for any strength; `gradient` adds the
            penalty's gradient before clipping. Adapters always use the gradient.
        fisher_type: `true` samples labels from the model; `empirical` takes those of the data, always
            document by document.
        fisher_estimator: What is squared. `batch`: the gradient of the summed loss of a group of documents,
            at most 128 groups: unbiased for sampled labels, and fast. `document`: each document's own score,
            exact for the labels drawn, at one backward a document.
        fisher_samples: General rows that are read, and rows of each finished task.
        fisher_normalize: `mean` and `max` scale F so that its mean or maximum over all weights is 1.
        fisher_clip: Quantile above which F is cut off, before it is normalised; 1 is off.
        anchor: `base` keeps the general anchor where the job started; `latest` moves all to the latest task's
            end (Schwarz et al. 2018).
        online: Whether finished tasks are anchored, too.
        gamma: Decay of the finished tasks' Fisher; with `latest` of all former ones.
        rho: In gradient mode the pull of a block is at most so many times its task gradient; None is off.
    """

    kind: ClassVar[str] = "ewc"

    def __init__(  # noqa: PLR0913 - the fields of its configuration
        self,
        *,
        penalty_mode: Literal["implicit", "gradient"] = "implicit",
        fisher_type: FisherType = "true",
        fisher_estimator: FisherEstimator = "batch",
        fisher_samples: int = 1024,
        fisher_normalize: Normalize = "mean",
        fisher_clip: float = 0.999,
        anchor: AnchorPlace = "base",
        online: bool = True,
        gamma: float = 0.95,
        rho: float | None = 5.0,
    ) -> None:
        super().__init__(
            penalty_mode,
            rho,
            samples=fisher_samples,
            normalize=fisher_normalize,
            clip=fisher_clip,
            place=anchor,
            online=online,
            gamma=gamma,
        )
        self.fisher_type: FisherType = fisher_type
        self.fisher_estimator: FisherEstimator = fisher_estimator

    def measure(
        self, ctx: Context, store: str, rows: Sequence[int], seed: int, only: frozenset[str]
    ) -> dict[str, Tensor]:
        """The Fisher on these rows."""
        return measure_fisher(
            ctx,
            rows,
            self.fisher_type,
            seed,
            store=store,
            estimator=self.fisher_estimator,
            only=only,
        )

    def cache_key(self, num_rows: int) -> str:
        """What the starting model's Fisher follows from, beside model and rows."""
        estimator = "document" if self.fisher_type == "empirical" else self.fisher_estimator
        return f"ewc/fisher/3/{self.fisher_type}/{estimator}/{num_rows}"


def measure_fisher(
    ctx: Context,
    rows: Sequence[int],
    fisher_type: FisherType,
    seed: int,
    *,
    store: str = GENERAL,
    estimator: FisherEstimator = "batch",
    only: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher per token at the weights as they are, neither clipped nor normalised.

    `true`: labels are sampled from the model at every position, so scores are independent with mean zero,
    and the square of the gradient of a group of rows' *summed* loss is an unbiased sum of squares.
    `empirical`: the gradient of each document's own loss is squared. Of the rows every rank reads its share;
    the seed fixes the sampled labels row by row, whatever the micro-batches.

    Args:
        ctx: Of the run.
        rows: Of the store.
        fisher_type: Whose labels.
        seed: Of the sampled labels.
        store: Whose rows.
        estimator: `document` squares each document's own score with sampled labels, too.
        only: Parameters or adapted layers to measure; None: all of the task's.

    Returns:
        As `measure_importance`.

    Raises:
        ValueError: No supervised token among the rows, or a Fisher that is zero or not finite.
    """

    def loss(logits_NV: Tensor, part: Micro) -> Tensor:
        targets_N = part.targets_N
        if fisher_type == "true":
            targets_N = sample_labels(logits_NV.detach(), part, seed)
        return F.cross_entropy(logits_NV, targets_N, reduction="sum")

    by_document = fisher_type == "empirical" or estimator == "document"
    group = 1 if by_document else max(math.ceil(len(rows) / NUM_SQUARES), 1)
    what = Pass("ewc", store, rows, group, loss, torch.square, only)
    return measure_importance(ctx, what)


def sample_labels(logits_NV: Tensor, micro: Micro, seed: int) -> Tensor:
    """A label for each position, drawn from the model by inverting its distribution function.

    The draws of a row follow from (seed, sample id) alone, so they do not depend on how rows are grouped.
    """
    generator = torch.Generator()
    counts = torch.bincount(micro.row_of_N, minlength=len(micro.sample_ids)).tolist()
    draws = []
    for sample_id, count in zip(micro.sample_ids, counts, strict=True):
        generator.manual_seed((seed + 1_000_003 * (sample_id + 1)) % (2**63 - 25))
        draws.append(torch.rand(count, generator=generator, dtype=torch.float64))
    uniform_N = torch.cat(draws).to(logits_NV.device)
    chunk = max(CHUNK_LOGITS // logits_NV.shape[-1], 1)
    labels = []
    for logits, uniform in zip(logits_NV.split(chunk), uniform_N.split(chunk), strict=True):
        cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
        target = uniform[:, None] * cumulative[:, -1:]
        label = torch.searchsorted(cumulative, target, right=True)[:, 0]
        labels.append(label.clamp(max=logits.shape[-1] - 1))
    return torch.cat(labels)
