"""The model a run of pairs starts from: its log-probabilities, taken once, and the pairs of validation held to it."""

# Shape letters: P pairs.

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.data.batches import DOMAIN, DrawnRow, build_micro
from workers.data.preferences import PairTokens
from workers.strategies.batch import Micro
from workers.strategies.modes import evaluating
from workers.training.forward import wide
from workers.training.loop import Run
from workers.training.outlook import OF_THE_BASE
from workers.training.preferences import CHOSEN, REJECTED, Preferences, means, sum_log_probs
from workers.training.session import Validated

VERSION = 1  # part of the cache's key


def meet_reference(
    run: Run, training: PairTokens, validation: PairTokens | None
) -> Callable[[], Validated]:
    """Holds a run that stands at its start to its own log-probabilities there; how to validate it from then on."""
    if run.preferences is None:
        raise ValueError("the run compares no answers")
    take_reference(run, run.preferences, training)
    if validation is None:
        return Validated
    held_out = Preferences(run.preferences.beta, validation.lengths)
    take_reference(run, held_out, validation)
    return lambda: validate_pairs(run, held_out, validation)


def take_reference(run: Run, preferences: Preferences, pairs: PairTokens) -> None:
    """Gives pairs the log-probabilities of the weights as they are: the run must stand where it starts.

    They are taken once for a model and a file, and kept across jobs and attempts. Every rank calls it.
    """
    start = run.student.probe_hash()
    budget = (run.training.max_tokens_per_micro_batch, run.spare_padding)
    key = f"{OF_THE_BASE}dpo/{VERSION}/{start}/{budget}/{pairs.digest()}"
    made = run.ctx.cached(key, lambda: {"log_probs_P2": _log_probs(run, preferences, pairs)})
    preferences.reference_P2 = made["log_probs_P2"]


def validate_pairs(run: Run, preferences: Preferences, pairs: PairTokens) -> Validated:
    """The mean loss of the pairs, their rewards, and the share of the preferred answers' tokens predicted right."""
    totals: dict[str, float] = {}
    with torch.no_grad(), evaluating(run.model):
        for micro in _micros(run, preferences, pairs, rank=0, world_size=1):
            logits_NV = run.student(micro.input_ids_BT, micro.positions_N)
            nats_N = F.cross_entropy(wide(logits_NV), micro.targets_N, reduction="none")
            judged = preferences.judge_micro(micro, nats_N)
            if judged is None:
                raise ValueError("a micro-batch of pairs has none")
            is_chosen_N = micro.source_mask_N(frozenset({DOMAIN}))
            right_N = (logits_NV.argmax(-1) == micro.targets_N) & is_chosen_N
            own = {
                **judged.sums(),
                "loss": judged.losses_P.sum(),
                "domain_weight": judged.losses_P.new_tensor(float(len(judged.losses_P))),
                "right": right_N.sum(),
                "tokens": is_chosen_N.sum(),
            }
            for name, value in own.items():
                totals[name] = totals.get(name, 0.0) + float(value)
    return Validated(
        loss=totals["loss"] / totals["domain_weight"],
        token_accuracy=totals["right"] / totals["tokens"],
        values=means(totals, "valid"),
    )


def _log_probs(run: Run, preferences: Preferences, pairs: PairTokens) -> Tensor:
    """Every rank reads its share, and has the whole afterwards."""
    values_P2 = torch.zeros((len(pairs), 2), dtype=torch.float64, device=run.ctx.device)
    ranks = run.ranks
    with torch.no_grad(), evaluating(run.model):
        for micro in _micros(run, preferences, pairs, rank=ranks.rank, world_size=ranks.world_size):
            logits_NV = run.student(micro.input_ids_BT, micro.positions_N)
            nats_N = F.cross_entropy(wide(logits_NV), micro.targets_N, reduction="none")
            log_probs_2P = sum_log_probs(micro, nats_N).reshape(2, -1)
            values_P2[list(micro.sample_ids[: log_probs_2P.shape[1]])] = log_probs_2P.T
    ranks.all_reduce(values_P2)
    return values_P2


def _micros(
    run: Run, preferences: Preferences, pairs: PairTokens, *, rank: int, world_size: int
) -> Iterator[Micro]:
    """All pairs, as a step would read them: the preferred answers of a micro-batch, then the others."""
    planned = preferences.plan(
        [DrawnRow(DOMAIN, CHOSEN, row, is_task=False) for row in range(len(pairs))],
        {},
        max_tokens=run.training.max_tokens_per_micro_batch,
        spare_padding=run.spare_padding,
    )
    stores = {CHOSEN: pairs.chosen, REJECTED: pairs.rejected}
    for rows in planned[rank::world_size]:
        yield build_micro(rows, stores, run.ctx.device)
