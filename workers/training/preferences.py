"""Direct preference optimisation (Rafailov et al. 2023): which rows of a step are pairs, and the loss of a pair."""

# Shape letters: B rows, N supervised positions of a micro-batch, P pairs.

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from workers.data.batches import DOMAIN, DrawnRow, split_micros
from workers.strategies.batch import Micro

CHOSEN = "training"  # the store of the preferred answers
REJECTED = "rejected"  # store and source of the others
PAIRS, TASK_ROWS = "pairs", "task_rows"  # what the terms of a step are divided by
NUMBERS = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
REWARDS = tuple(f"{part}_{name}" for part in ("train", "valid") for name in NUMBERS)


class Judged(NamedTuple):
    """Pairs under the policy: the loss of each, and the implicit rewards of its two answers."""

    losses_P: Tensor
    chosen_P: Tensor
    rejected_P: Tensor

    def sums(self) -> dict[str, Tensor]:
        """Over the pairs, without gradient."""
        margins_P = (self.chosen_P - self.rejected_P).detach()
        return {
            "reward_margin": margins_P.sum(),
            "reward_accuracy": (margins_P > 0).sum(),
            "reward_chosen": self.chosen_P.detach().sum(),
            "reward_rejected": self.rejected_P.detach().sum(),
        }


def sum_log_probs(micro: Micro, nats_N: Tensor) -> Tensor:
    """Log-probability (B,) of what is compared of each row, float64: a sum over its supervised tokens."""
    weighted_N = (nats_N * micro.weights_N).double()
    zeros_B = weighted_N.new_zeros(len(micro.sources))
    return -zeros_B.index_add(0, micro.row_of_N, weighted_N)


def judge(
    policy_2P: tuple[Tensor, Tensor], reference_2P: tuple[Tensor, Tensor], beta: float
) -> Judged:
    """Equation 7: -log sigmoid(beta (log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l))).

    Args:
        policy_2P: Log-probabilities (P,) of the preferred and of the other answers.
        reference_2P: The same under the model that the job started from.
        beta: Above 0.
    """
    chosen_P = beta * (policy_2P[0] - reference_2P[0])
    rejected_P = beta * (policy_2P[1] - reference_2P[1])
    return Judged(-F.logsigmoid(chosen_P - rejected_P), chosen_P, rejected_P)


class Preferences:
    """What a run knows of its pairs.

    Args:
        beta: Of the loss.
        lengths: Tokens of each pair's longer side.
    """

    def __init__(self, beta: float, lengths: NDArray[np.int64]) -> None:
        self.beta = beta
        self.lengths = lengths
        self.reference_P2: Tensor | None = None  # float64; preferred first

    def plan(
        self,
        drawn: Sequence[DrawnRow],
        lengths: Mapping[str, NDArray[np.int64]],
        *,
        max_tokens: int,
        spare_padding: int | None,
    ) -> list[list[DrawnRow]]:
        """Micro-batches of pairs, both sides of each in one forward, then those of other rows."""
        pairs = [row._replace(is_task=False) for row in drawn if row.source == DOMAIN]
        others = [row for row in drawn if row.source != DOMAIN]
        planned = split_micros(
            pairs,
            {CHOSEN: self.lengths},
            max_tokens=max_tokens // 2,
            spare_padding=None if spare_padding is None else spare_padding // 2,
        )
        whole = [
            [*rows, *(row._replace(source=REJECTED, store=REJECTED) for row in rows)]
            for rows in planned
        ]
        return whole + split_micros(
            others, lengths, max_tokens=max_tokens, spare_padding=spare_padding
        )

    def count(self, micro: Micro) -> dict[str, float]:
        """Pairs, and rows of the task's cross-entropy beside them."""
        return {
            PAIRS: float(sum(source == REJECTED for source in micro.sources)),
            TASK_ROWS: float(micro.is_task_B.sum()),
        }

    def loss(
        self, micro: Micro, nats_N: Tensor, shown: Tensor, counts: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's part of the step's loss, and its sums.

        The loss is the mean over pairs. Rows that show an answer (replayed ones) add the mean nats of their
        tokens, by as many of them as come to a pair: a mix ratio is their weight.

        Args:
            micro: With pairs, with other rows, or with both.
            nats_N: Cross-entropy of its positions.
            shown: This micro-batch's part of the mean over the tokens of rows that show an answer.
            counts: Of the step.
        """
        num_pairs = max(counts[PAIRS], 1.0)
        total = shown * (counts[TASK_ROWS] / num_pairs)
        judged = self.judge_micro(micro, nats_N)
        if judged is None:
            return total, {}
        losses = judged.losses_P.sum()
        sums = {
            **judged.sums(),
            "domain_nats": losses.detach(),
            "domain_weight": losses.new_tensor(float(len(judged.losses_P))),
        }
        return total + losses / num_pairs, sums

    def judge_micro(self, micro: Micro, nats_N: Tensor) -> Judged | None:
        """The pairs of a micro-batch, in order; None where it has none.

        Raises:
            ValueError: Nothing is known of the reference, or the sides do not belong together.
        """
        sides = [
            [row for row, source in enumerate(micro.sources) if source == name]
            for name in (DOMAIN, REJECTED)
        ]
        chosen, rejected = ([micro.sample_ids[row] for row in side] for side in sides)
        if not rejected:
            return None
        if chosen != rejected or self.reference_P2 is None:
            raise ValueError("the two sides of the pairs, or their reference, are not all there")
        log_probs_B = sum_log_probs(micro, nats_N)
        own_P2 = self.reference_P2[chosen]
        return judge(
            (log_probs_B[sides[0]], log_probs_B[sides[1]]), (own_P2[:, 0], own_P2[:, 1]), self.beta
        )


def means(totals: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Rewards of a mean pair from the sums of many."""
    pairs = totals.get("domain_weight")
    if not pairs:
        return {}
    return {f"{prefix}_{name}": totals[name] / pairs for name in NUMBERS if name in totals}
