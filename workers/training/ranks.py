"""The ranks of a run: sums and broadcasts; one rank needs no torch.distributed."""

import datetime
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

TIMEOUT = datetime.timedelta(hours=2)  # the other ranks wait while rank 0 waits for a decision


class Ranks:
    """What a run asks of its ranks; every method but `is_speaker` is collective."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self._control: Any = None  # a gloo group for host tensors and Python objects

    @classmethod
    def join(cls, device: torch.device) -> "Ranks":
        """The ranks that torchrun described in the environment; a single one without it."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        from torch import distributed

        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=TIMEOUT)
        ranks = cls(distributed.get_rank(), distributed.get_world_size())
        ranks._control = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        return ranks

    @property
    def is_speaker(self) -> bool:
        """Rank 0, which alone talks to the supervisor and writes files."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums a tensor over ranks, in place."""
        if self.world_size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)

    def sum_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Sums gradients over ranks in one all-reduce a dtype; a rank without one counts as zero."""
        if self.world_size == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in params:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            flat = torch.cat([p.grad.reshape(-1) for p in group if p.grad is not None])
            self.all_reduce(flat)
            offset = 0
            for parameter in group:
                grad = parameter.grad
                if grad is not None:
                    grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
                    offset += grad.numel()

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Sums by key over ranks; ranks may hold different keys."""
        if self.world_size == 1:
            return dict(counts)
        from torch import distributed

        gathered: list[dict[str, float]] = [{} for _ in range(self.world_size)]
        distributed.all_gather_object(gathered, dict(counts), group=self._control)
        total: dict[str, float] = {}
        for part in gathered:
            for key, count in part.items():
                total[key] = total.get(key, 0.0) + count
        return total

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - whatever each rank has
        """Every rank's value, in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, value, group=self._control)
        return gathered

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401 - whatever rank 0 decided
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def merge_scores(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Joins arrays of which every rank filled its own share and left NaN elsewhere."""
        if self.world_size == 1:
            return scores
        from torch import distributed

        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, scores, group=self._control)
        merged: NDArray[np.float32] = gathered[0].copy()
        for part in gathered[1:]:
            merged = np.where(np.isnan(merged), part, merged)
        return merged

    def leave(self) -> None:
        """Takes the process group down, once every rank is done with it."""
        if self.world_size > 1:
            from torch import distributed

            distributed.barrier(group=self._control)
            distributed.destroy_process_group()
