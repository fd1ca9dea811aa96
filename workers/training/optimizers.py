"""The optimiser of a task: its parameter groups, and the algorithm that moves them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from app.domain.spec import ResolvedTraining

if TYPE_CHECKING:
    from workers.training.loop import Run

BETAS = (0.9, 0.999)


def make_optimizer(run: "Run") -> torch.optim.Optimizer:
    """AdamW over the task's parameters, in the groups that the strategies ask for."""
    training = run.tasks[run.ctx.task_index].training
    groups = param_groups(run.ctx.params, training)
    for strategy in run.strategies:
        groups = strategy.edit_param_groups(run.ctx, groups)
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=BETAS, fused=True)


def param_groups(
    params: Mapping[str, nn.Parameter], training: ResolvedTraining
) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without; names beside the parameters."""
    groups = []
    for is_matrix, decay in ((True, training.weight_decay), (False, 0.0)):
        names = [name for name, p in params.items() if (p.ndim >= 2) == is_matrix]
        if names:
            groups.append(
                {
                    "params": [params[name] for name in names],
                    "names": names,
                    "lr": training.learning_rate,
                    "base_lr": training.learning_rate,
                    "weight_decay": decay,
                }
            )
    return groups
