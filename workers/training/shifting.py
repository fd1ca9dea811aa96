"""The domain-shift report of a job: the base and what is published, over held-out rows."""

import math
from typing import Any

import torch
from torch import Tensor

from app.domain.configs.causal import CausalConfig
from workers.data.batches import Rows
from workers.evaluation.shift import (
    FEWEST_ROWS,
    Read,
    States,
    evenly,
    pooled_states,
    shift_report,
)
from workers.export.interpolate import Interpolation
from workers.strategies.modes import evaluating
from workers.training.session import Session

DEPTH = 2 / 3  # where no strategy says which layer


def report_shift(session: Session, line: Interpolation, alpha: float) -> dict[str, Any] | None:
    """Tells the shift between validation and general rows at the base and at the point of the line.

    Asked for by `causal` or by the job; None where it is not. The model stands at `alpha` afterwards.
    """
    plan = session.plan
    configs = [c for c in plan.strategies if isinstance(c, CausalConfig)]
    if not configs and not plan.shift_report:
        return None
    domain, general = session.validation, session.run.stores.get("general")
    if domain is None or general is None:
        _tell_why_not(session, "it needs a validation file and general data")
        return None
    layer = max(1, round((configs[0].layer if configs else DEPTH) * session.run.ctx.num_layers))
    line.set(0.0)
    base, base_loss = _states(session, domain, general, layer), session.validate()[0]
    line.set(alpha)
    tuned, tuned_loss = _states(session, domain, general, layer), session.validate()[0]
    if not session.run.ranks.is_speaker:
        return None
    found = shift_report(
        base,
        tuned,
        domain_ids=[domain.row(row)[0] for row in evenly(len(domain))],
        base_loss=base_loss,
        tuned_loss=None if tuned_loss is None or not math.isfinite(tuned_loss) else tuned_loss,
        seed=plan.training.seed,
    )
    if not found["measured"]:
        _tell_why_not(session, found["reason"])
        return found
    session.talk.note("info", "domain_shift", _sentence(found), layer=layer, alpha=alpha, **found)
    return found


def _states(session: Session, domain: Rows, general: Rows, layer: int) -> States:
    """By rank 0 alone: every rank has the whole model."""
    run = session.run
    if not run.ranks.is_speaker:
        return States(*(torch.zeros(0, 1).double().numpy() for _ in range(2)))
    budget = run.training.max_tokens_per_micro_batch

    def read(ids_BT: Tensor) -> Tensor:
        nowhere = torch.zeros(0, dtype=torch.int64, device=run.ctx.device)
        hidden = run.student.with_hidden(ids_BT.to(run.ctx.device), nowhere, frozenset({layer}))
        return hidden[1][layer]

    with evaluating(run.model):
        return States(*(_pooled(read, store, budget) for store in (domain, general)))


def _pooled(read: Read, store: Rows, token_budget: int) -> Any:  # noqa: ANN401 - an array
    return pooled_states(read, store, evenly(len(store.lengths)), token_budget=token_budget)


def _sentence(found: dict[str, Any]) -> str:
    before, after = found["before"]["mmd"], found["after"]["mmd"]
    text = f"Shift between domain and general rows (MMD^2): {before:.4g} at the base, {after:.4g} after"
    if found["reduction"] is None:
        return f"{text}; the base shows none that could be reduced."
    low, high = found["reduction_interval"]
    claimed = "claimed" if found["claims_40_percent"] else "not claimed"
    return (
        f"{text}: {found['reduction']:.1%} less (95 % interval {low:.1%} to {high:.1%}); a reduction of "
        f"40 % is {claimed}."
    )


def _tell_why_not(session: Session, reason: str) -> None:
    session.talk.note(
        "info",
        "domain_shift",
        f"The shift between domain and general rows was not measured: {reason}.",
        measured=False,
        fewest_rows=FEWEST_ROWS,
    )
