"""A run's state at one moment, apart from the run: so that it can be written while training goes on."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.domain.messages import Carry, StepMetrics
from workers.training.loop import Run

MEMINFO = Path("/proc/meminfo")
SPARE_FACTOR = 2.0  # of a snapshot's size must be free in memory before it is taken beside the run


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint is written from.

    Attributes:
        tensors: By file and name; on the host.
        history: Of the accepted steps; its rows never change.
        carry: What a rollback does not rewind.
        state: Everything else, as JSON has it.
    """

    step: int
    branch: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    history: tuple[StepMetrics, ...]
    carry: Carry
    state: Mapping[str, Any]


def take_snapshot(run: Run, carry: Carry, *, is_copy: bool) -> Snapshot:
    """The state of a run between two steps.

    Args:
        run: Whose state.
        carry: Its cursors and RNGs.
        is_copy: Shares no memory with the run, which may go on; else it is to be written before the next step.
    """
    strategies = {strategy.kind: dict(strategy.state_dict()) for strategy in run.strategies}
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": run.all_params,
        "optimizer": optimizer_tensors(run),
    }
    for kind, own in strategies.items():
        tensors[f"strategy-{kind}"] = own.pop("tensors")
    return Snapshot(
        step=run.step,
        branch=run.branch,
        tensors={
            file: {name: _on_host(value, is_copy=is_copy) for name, value in content.items()}
            for file, content in tensors.items()
        },
        history=tuple(run.history),
        carry=carry,
        state={
            "step": run.step,
            "branch": run.branch,
            "task_index": run.ctx.task_index,
            "controller": run.controller.model_dump(mode="json"),
            "not_finite_in_a_row": run.not_finite_in_a_row,
            "strategies": deepcopy(strategies) if is_copy else strategies,
        },
    )


def has_memory_for_copy(run: Run) -> bool:
    """Whether the host has room for a second copy of what a run trains and its optimiser's state."""
    params = sum(p.numel() * p.element_size() for p in run.all_params.values())
    moments = sum(v.numel() * v.element_size() for v in optimizer_tensors(run).values())
    available = available_bytes()
    return available is None or available > SPARE_FACTOR * (params + moments)


def available_bytes() -> int | None:
    """Memory that can still be had on this host; None where nothing says so."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found[1]) * 1024


def optimizer_tensors(run: Run) -> dict[str, Tensor]:
    """Moments by parameter name; empty before the first step."""
    tensors = {}
    for name, parameter in run.ctx.params.items():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    return tensors


def _on_host(value: Tensor, *, is_copy: bool) -> Tensor:
    plain = value.detach()
    return (plain.to("cpu", copy=True) if is_copy else plain.cpu()).contiguous()
