"""The learning rate of a step: warm-up, then constant, linear or cosine; a pure function of the step."""

import math

from app.domain.spec import ResolvedTraining


def learning_rate_factor(training: ResolvedTraining, step: int) -> float:
    """What the learning rate is multiplied by in the step after `step` accepted ones.

    The curves are those of transformers' schedulers of the same names, one step later: with warm-up the
    first step already moves.
    """
    total = training.total_steps
    warmup = math.ceil(training.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if training.lr_scheduler == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if training.lr_scheduler == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
