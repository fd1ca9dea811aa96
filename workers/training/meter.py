"""What a step counts of itself, kept on the device until it is read."""

# Shape letters: N supervised positions of a micro-batch, V vocabulary.

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.data.batches import DOMAIN
from workers.strategies.batch import Micro


class Meter:
    """Sums of a step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.tokens = 0  # read by all ranks, supervised and not

    def count(self, counts: Mapping[str, float]) -> None:
        """Counts of micro-batches that are about to be read, over all ranks."""
        self.tokens += int(counts.get("tokens", 0))

    def add(self, micro: Micro, logits_NV: Tensor, values: Mapping[str, Tensor]) -> None:
        """Adds values of a micro-batch, and how many domain tokens the model got right."""
        with torch.no_grad():
            is_domain_N = micro.source_mask_N(frozenset({DOMAIN}))
            right_N = (logits_NV.argmax(-1) == micro.targets_N) & is_domain_N
            sums = {
                **values,
                "domain_right": right_N.sum(),
                "domain_tokens": is_domain_N.sum(),
            }
            for key, value in sums.items():
                self._sums[key] = self._sums[key] + value if key in self._sums else value

    def read(self) -> dict[str, float]:
        """This rank's sums."""
        if not self._sums:
            return {}
        numbers = torch.stack([value.double() for value in self._sums.values()]).tolist()
        return dict(zip(self._sums, numbers, strict=True))


def task_weights(micro: Micro) -> Tensor:
    """Weights (N,) in the task's cross-entropy; 0 for rows of other terms."""
    return micro.weights_N * micro.is_task_B[micro.row_of_N]


def domain_sums(micro: Micro, weighted_N: Tensor) -> dict[str, Tensor]:
    """Nats and weight of the domain's tokens, of which the training loss is made."""
    with torch.no_grad():
        is_domain_N = micro.source_mask_N(frozenset({DOMAIN}))
        return {
            "domain_nats": (weighted_N.detach() * is_domain_N).sum(),
            "domain_weight": (task_weights(micro) * is_domain_N).sum(),
        }
