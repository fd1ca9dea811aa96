"""The optimiser of a task: its parameter groups, and the algorithm that moves them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, assert_never

import torch
from torch import nn

from app.domain.spec import ResolvedTraining
from workers.strategies.base import OptimizerChoice

if TYPE_CHECKING:
    from workers.training.loop import Run


def make_optimizer(run: "Run") -> torch.optim.Optimizer:
    """AdamW over the task's parameters, or what a strategy chooses, in the groups that strategies ask for.

    Raises:
        ValueError: Two strategies choose the algorithm.
    """
    training = run.tasks[run.ctx.task_index].training
    groups = param_groups(run.ctx.params, training)
    for strategy in run.strategies:
        groups = strategy.edit_param_groups(run.ctx, groups)
    choices = {s.kind: c for s in run.strategies if (c := s.choose_optimizer(run.ctx)) is not None}
    if len(choices) > 1:
        raise ValueError(f"{' and '.join(choices)} both choose the optimiser")
    choice = next(iter(choices.values()), OptimizerChoice())
    return build_optimizer(choice, groups, training.learning_rate)


def build_optimizer(
    choice: OptimizerChoice, groups: list[dict[str, Any]], learning_rate: float
) -> torch.optim.Optimizer:
    """The algorithm over groups that carry their own `lr` and `weight_decay`."""
    match choice.name:
        case "adamw":
            return torch.optim.AdamW(
                groups, lr=learning_rate, betas=choice.betas, eps=choice.epsilon, fused=True
            )
        case "radam":
            return torch.optim.RAdam(
                groups,
                lr=learning_rate,
                betas=choice.betas,
                eps=choice.epsilon,
                decoupled_weight_decay=True,
            )
        case "sgd":
            return torch.optim.SGD(groups, lr=learning_rate, momentum=choice.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=learning_rate)
        case _:
            assert_never(choice.name)


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
