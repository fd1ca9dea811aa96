"""Domain adapters as they are deployed: each question goes to the nearest domain's adapter, or to the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks.board.scoring import Prepared, Scores, score, subset
from workers.evaluation.routing import Router, base_representations
from workers.training.loop import Run


@dataclass(frozen=True)
class RoutedModel:
    """A run's adapters behind the router that its strategy fitted."""

    run: Run
    router: Router[NDArray[np.int32]]

    def score(self, prepared: Prepared) -> Scores:
        """Scores with each item answered by the adapter that its prompt is routed to."""
        adapters = self.run.ctx.adapters
        assert adapters is not None
        routes = self.router.route_all(prepared.prompts())
        parts: list[tuple[NDArray[np.int64], Scores]] = []
        for name in sorted({route or "" for route in routes}):
            items = np.asarray([i for i, route in enumerate(routes) if (route or "") == name])
            adapters.activate([name] if name else [])
            parts.append((items, score(self.run.student, subset(prepared, items))))
        adapters.activate([adapters.names[self.run.ctx.task_index]])
        return _join(parts, prepared.num_items)


def fit_routed(run: Run) -> RoutedModel:
    """The adapters learnt so far, the one at hand among them, behind centroids and threshold."""
    strategy: Any = next(s for s in run.strategies if s.kind == "domain_adapters")
    strategy.on_task_end(run.ctx)  # the loop asks again when it leaves the task, to the same end
    names = tuple(strategy.centroids)
    centroids = torch.stack([strategy.centroids[name] for name in names])
    threshold = float(strategy.routing["threshold"])

    def represent(prompts: Sequence[NDArray[np.int32]]) -> torch.Tensor:
        return base_representations(run.model, prompts)

    return RoutedModel(run, Router(names, centroids, threshold, represent))


def _join(parts: Sequence[tuple[NDArray[np.int64], Scores]], num_items: int) -> Scores:
    exact, choice = np.zeros(num_items, bool), np.zeros(num_items, bool)
    loss = 0.0
    for items, scores in parts:
        exact[items], choice[items] = scores.exact_match, scores.multiple_choice
        loss += scores.loss_nats * len(items) / num_items
    return Scores(exact, choice, loss)
