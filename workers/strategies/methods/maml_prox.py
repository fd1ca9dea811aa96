"""First-order MAML with a proximal inner loop: a step is judged after looking a few steps ahead."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import ClassVar, Literal

import torch
from torch import Tensor

from workers.strategies.base import Cost, Needs, Strategy
from workers.strategies.batch import Backward, Micro
from workers.strategies.context import Context
from workers.strategies.episodes import (
    DOMAIN,
    distance,
    excursion,
    inner_step,
    row_key,
    select_rows,
    step_rows,
    take_gradients,
)

QueryRows = Literal["shuffled", "later"]


class MamlProx(Strategy):
    """Takes K proximal SGD steps on some of the step's domain rows, and the gradient of the others there.

    Support: some of the step's domain rows. Query: the others ("future"), and the step's rows of other sources
    that count as task (replay, memory): L_Q = L_future + memory_coef * L_memory, each a mean over its own
    tokens. What other strategies add to the loss is in L_Q alone.

    phi_0 = theta; phi_{j+1} = phi_j - alpha (grad L_S(phi_j) + mu (phi_j - theta)); the gradient that the
    optimiser gets is grad L_Q(phi_K), first order; theta itself is put back bit for bit before. The strength is
    mu; at 0 the strategy is off and the step plain.

    Args:
        inner_lr: alpha; no schedule.
        inner_steps: K.
        query_rows: Which domain rows are query. `shuffled`: drawn anew in each step, so that every row is at
            times. `later`: those that come later in the file, for files in the order of time; as a first-order
            step learns from its query alone, the file's first rows are then hardly learnt.
        query_share: Share of the step's domain rows that is query; at least one row is on each side.
        memory_coef: Weight of L_memory.
    """

    kind: ClassVar[str] = "maml_prox"

    def __init__(
        self,
        *,
        inner_lr: float = 1e-3,
        inner_steps: int = 3,
        query_rows: QueryRows = "shuffled",
        query_share: float = 0.5,
        memory_coef: float = 0.5,
    ) -> None:
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.query_rows: QueryRows = query_rows
        self.query_share = query_share
        self.memory_coef = memory_coef
        self._norm: Tensor | None = None  # of phi_K - theta
        self._rows = (0, 0, 0)  # of all ranks: support, future, memory

    def needs(self) -> Needs:
        """To own the step."""
        return Needs(step_owner=True)

    def cost(self) -> Cost:
        """K passes over the support and one over the query; a copy of the weights."""
        share = (1 - self.query_share) * self.inner_steps + self.query_share
        return Cost(step_share=max(share - 1, 0.0), trainable_copies=1.0)

    def on_step_start(self, ctx: Context) -> None:
        """Forgets the last step's numbers."""
        self._norm, self._rows = None, (0, 0, 0)

    def compute_grads(self, ctx: Context, micros: Sequence[Micro], backward: Backward) -> None:
        """Leaves grad L_Q(phi_K) in `grad`; the plain gradient where a step has but one domain row."""
        drawn = step_rows(ctx, micros)
        name_hash = row_key(DOMAIN, 0).source
        domain = [key.sample_id for key in drawn if key.source == name_hash]
        ahead = self._query_ids(ctx, domain)
        if not 0 < len(ahead) < len(set(domain)):
            backward(micros)
            return

        def is_memory(source: str, is_task: bool) -> bool:  # noqa: FBT001 - a predicate's fact
            return is_task and source != DOMAIN

        support = select_rows(micros, lambda s, i, _: s == DOMAIN and i not in ahead)
        # Rows that do not count as task carry other strategies' terms.
        future = select_rows(
            micros, lambda s, i, t: not is_memory(s, t) and (s != DOMAIN or i in ahead)
        )
        memory = select_rows(micros, lambda s, _, t: is_memory(s, t))
        params, mu = ctx.params, ctx.strength(self.kind)
        with excursion(params) as start:
            for _ in range(self.inner_steps):
                backward(support, task_only=True)
                gradients = take_gradients(params)
                inner_step(params, gradients, start, rate=self.inner_lr, prox=mu)
            self._norm = distance(params, start)
            backward(future)
            query = take_gradients(params)
            num_memory = self._count_memory(ctx, memory)
            if num_memory and self.memory_coef > 0:
                backward(memory)
                for name, gradient in take_gradients(params).items():
                    weighted = gradient.mul_(self.memory_coef)
                    query[name] = query[name].add_(weighted) if name in query else weighted
        for name, gradient in query.items():
            params[name].grad = gradient
        num_query = sum(sample_id in ahead for sample_id in domain)
        self._rows = (len(domain) - num_query, num_query, num_memory)

    def metrics(self) -> Mapping[str, float]:
        """`applied_norm`, how far phi_K was from theta; rows of support, future and memory."""
        support, future, memory = self._rows
        return {
            "applied_norm": 0.0 if self._norm is None else float(self._norm),
            "support_rows": float(support),
            "future_rows": float(future),
            "memory_rows": float(memory),
        }

    def _query_ids(self, ctx: Context, domain: Sequence[int]) -> frozenset[int]:
        """The domain rows that are query, alike on every rank; a row drawn twice is on one side."""
        ids = sorted(set(domain))
        if self.query_rows == "shuffled":
            ids.sort(key=lambda i: (sha256(f"{ctx.run_seed}/{ctx.step}/{i}".encode()).digest(), i))
        wanted = min(max(round(self.query_share * len(ids)), 1), len(ids) - 1)
        return frozenset(ids[len(ids) - wanted :]) if wanted > 0 else frozenset()

    def _count_memory(self, ctx: Context, memory: Sequence[Micro]) -> int:
        """Memory rows over all ranks, which must agree on whether to read them."""
        own = sum(len(torch.unique(micro.row_of_N)) for micro in memory)
        count = torch.tensor(float(own), dtype=torch.float64, device=ctx.device)
        ctx.all_reduce(count)
        return int(count)
