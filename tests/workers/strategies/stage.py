"""A tiny causal model in float64, its context, and the reference step that strategies are tested under."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.strategies.base import Strategy
from workers.strategies.batch import Forward, Micro, Stream, TokenRow
from workers.strategies.context import Adapters, Context, Decoding, LoraPair, Pairs
from workers.strategies.penalties import apply_pulls

VOCABULARY = 11
WIDTH = 6
F64 = torch.float64


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trained low-rank change that can be switched off."""

    def __init__(self, rank: int = 2, scale: float = 1.5) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False, dtype=F64)
        self.lora_A = nn.Parameter(0.4 * torch.randn(rank, WIDTH, dtype=F64))
        self.lora_B = nn.Parameter(torch.zeros(WIDTH, rank, dtype=F64))
        self.scale = scale
        self.is_adapted = True

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.base(hidden)
        if self.is_adapted:
            out = out + self.scale * (hidden @ self.lora_A.T) @ self.lora_B.T
        return out


def _square() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False, dtype=F64)


class TinyModel(nn.Module):
    """Embedding, running mean over the past, one layer, tied-free head; dropout shows the mode.

    Strategies that tell layers apart get a stack of further blocks behind the one layer.
    """

    def __init__(self, *, lora: bool = False, dropout: float = 0.0, num_blocks: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=F64)
        self.layer: nn.Module = (
            AdaptedLinear() if lora else nn.Linear(WIDTH, WIDTH, bias=False, dtype=F64)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=F64)
        self.hidden_BTD: dict[int, Tensor] = {}  # of the last forward
        make: Any = AdaptedLinear if lora else _square
        self.blocks = nn.ModuleList(make() for _ in range(num_blocks))
        if lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".lora_" in name)

    def forward(self, input_ids_BT: Tensor, positions_N: Tensor) -> Tensor:
        hidden = self.embedding(input_ids_BT)
        self.hidden_BTD = {0: hidden}
        count = torch.arange(1, hidden.shape[1] + 1, dtype=F64)[:, None]
        hidden = hidden + self.dropout(torch.tanh(self.layer(hidden.cumsum(1) / count)))
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        self.hidden_BTD[1] = hidden
        out: Tensor = self.head(hidden.reshape(-1, WIDTH)[positions_N])
        return out


def make_model(
    *, lora: bool = False, dropout: float = 0.0, seed: int = 0, num_blocks: int = 0
) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyModel(lora=lora, dropout=dropout, num_blocks=num_blocks)


def make_rows(count: int, seed: int) -> list[list[int]]:
    """Token ids of unequal lengths."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (1,), generator=rng))
        rows.append(torch.randint(1, VOCABULARY, (length,), generator=rng).tolist())
    return rows


def make_micro(
    rows: Sequence[tuple[str, int, list[int], bool]],
) -> Micro:
    """One micro-batch of (source, sample id, ids, is task); the first token of a row is a prompt."""
    width = max(len(ids) for _, _, ids, _ in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    positions, targets, owners = [], [], []
    for index, (_, _, ids, _) in enumerate(rows):
        inputs[index, : len(ids) - 1] = torch.tensor(ids[:-1])
        for column in range(1, len(ids) - 1):
            positions.append(index * width + column)
            targets.append(ids[column + 1])
            owners.append(index)
    return Micro(
        input_ids_BT=inputs,
        positions_N=torch.tensor(positions, dtype=torch.int64),
        targets_N=torch.tensor(targets, dtype=torch.int64),
        row_of_N=torch.tensor(owners, dtype=torch.int64),
        weights_N=torch.ones(len(positions)),
        sources=tuple(source for source, _, _, _ in rows),
        sample_ids=tuple(sample_id for _, sample_id, _, _ in rows),
        is_task_B=torch.tensor([is_task for _, _, _, is_task in rows]),
    )


@dataclass
class Stage:
    """A run of strategies on the tiny model. One step reads every stream in order, by plain cursors."""

    strategies: Sequence[Strategy]
    coefs: dict[str, float]
    lora: bool = False
    dropout: float = 0.0
    micro_rows: int = 8
    learning_rate: float = 0.02
    batch_size: int = 8
    training: list[list[int]] = field(default_factory=lambda: make_rows(24, 1))
    general: list[list[int]] = field(default_factory=lambda: make_rows(20, 2))
    cached: Any = None
    start: bool = True
    is_sorted: bool = True
    boundary: int = 0  # steps of a first task, after which a second one begins; 0: there is one
    num_blocks: int = 0
    task_index: int = 0  # 1: the second of two tasks, the first of which has left an adapter

    def __post_init__(self) -> None:
        self.model = make_model(lora=self.lora, dropout=self.dropout, num_blocks=self.num_blocks)
        self.base = make_model(lora=self.lora, num_blocks=self.num_blocks).eval()
        if self.is_sorted:
            self.strategies = sorted(self.strategies, key=lambda s: s.kind)
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        adapted: dict[str, Any] = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, AdaptedLinear)
        }
        pairs = tuple(
            LoraPair(name, layer.lora_A, layer.lora_B, layer.scale, layer.base.weight)
            for name, layer in adapted.items()
        )
        self.ctx = Context(
            model=self.model,
            params=self.params,
            lora_pairs=pairs,
            coefs=dict(self.coefs),
            run_seed=5,
            device=torch.device("cpu"),
            batch_size=self.batch_size,
            num_training_rows=len(self.training),
            num_general_rows=len(self.general),
            general_micros=self._general_micros,
            forward=self._plain_forward,
            num_layers=1,
            task_steps=100,
            store_micros=self._store_micros,
            rows_micro=self._rows_micro,
            add_store=self._add_store,
            base_forward=lambda micro, mask: self._taught(micro, mask)[0],
            base_hidden=self._base_hidden,
            sample=self._sample,
            embed=self._embed,
            encoder=lambda: "bag of tokens",
            texts=self._texts,
        )
        self.ctx.task_index = self.task_index
        self.ctx.num_tasks = 2 if self.boundary else self.task_index + 1
        self.ctx.adapters = self._adapters()
        # A counterpart differs in its prompt, a row's first token.
        others = [[row[0] % (VOCABULARY - 1) + 1, *row[1:]] for row in self.training]
        self.ctx.pairs = {"training": Pairs("counterfactual", range(len(others)), "made")}
        self.stores = {
            "training": self.training,
            "general": self.general,
            "counterfactual": others,
        }
        self._count_stores()
        if self.cached is not None:
            self.ctx.cached = self.cached
        self._keep_trainable()
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=self.learning_rate)
        groups: list[dict[str, Any]] = [  # shown alone: the optimiser moves all at one rate
            {
                "params": list(self.params.values()),
                "names": list(self.params),
                "lr": self.learning_rate,
                "base_lr": self.learning_rate,
                "weight_decay": 0.0,
            }
        ]
        for strategy in self.strategies:
            groups = strategy.edit_param_groups(self.ctx, groups)
        if self.start:
            for strategy in self.strategies:
                strategy.on_task_start(self.ctx)
        self.step = 0
        self.losses: list[dict[str, float]] = []

    def _adapters(self) -> Adapters:
        """The trained parameters as the last task's adapter; full training reads by the layer's own rows."""
        layer: Any = self.model.layer
        own = layer.lora_A if self.lora else layer.weight
        rng = torch.Generator().manual_seed(4)
        rows = torch.randn(2, WIDTH, generator=rng, dtype=F64)
        earlier = nn.Parameter(rows, requires_grad=False)
        names = ("earlier", "own")[1 - self.task_index :]
        readers = {"earlier": {"layer": earlier}, "own": {"layer": own}}
        return Adapters(
            names=names,
            params={"earlier": frozenset(), "own": frozenset(self.params)},
            readers={name: readers[name] for name in names},
            share=0.005,
            activate=lambda _: None,
            merge=lambda *_, **__: {},
        )

    def _keep_trainable(self) -> None:
        names = frozenset(self.params)
        for strategy in self.strategies:
            names = strategy.edit_trainable(self.ctx, names)
        for name, parameter in self.params.items():
            parameter.requires_grad_(name in names)
        self.params = {name: p for name, p in self.params.items() if name in names}
        self.ctx.params = self.params
        self.ctx.lora_pairs = tuple(p for p in self.ctx.lora_pairs if p.lora_B.requires_grad)

    def _general_micros(self, rows: Sequence[int]) -> Any:
        for begin in range(0, len(rows), self.micro_rows):
            part = rows[begin : begin + self.micro_rows]
            yield make_micro([("general", row, self.general[row], False) for row in part])

    def _store_micros(self, store: str, rows: Sequence[int]) -> Any:
        source = "domain" if store.startswith("training") else store
        for begin in range(0, len(rows), self.micro_rows):
            yield self._rows_micro(source, store, rows[begin : begin + self.micro_rows])

    def _rows_micro(self, source: str, store: str, rows: Sequence[int]) -> Micro:
        return make_micro([(source, row, self.stores[store][row], False) for row in rows])

    def _embed(self, store: str, rows: Sequence[int]) -> Tensor:
        bags = torch.zeros(len(rows), VOCABULARY)
        for index, row in enumerate(rows):
            bags[index].index_add_(
                0, torch.tensor(self.stores[store][row]), torch.ones(len(self.stores[store][row]))
            )
        unit: Tensor = bags / bags.norm(dim=1, keepdim=True)
        return unit

    def _texts(self, store: str, rows: Sequence[int]) -> list[str]:
        return [" ".join(map(str, self.stores[store][row])) for row in rows]

    def _add_store(self, name: str, rows: Any) -> None:
        self.stores[name] = [ids for ids, _ in rows]
        self._count_stores()

    def _count_stores(self) -> None:
        self.ctx.store_sizes = {name: len(rows) for name, rows in self.stores.items()}

    def _plain_forward(self, micro: Micro, layers: frozenset[int] = frozenset()) -> Forward:
        logits = self.model(micro.input_ids_BT, micro.positions_N)
        return Forward(logits, hidden_BTD={n: self.model.hidden_BTD[n] for n in layers})

    def streams(self) -> tuple[Stream, ...]:
        domain = Stream("domain", tuple(range(len(self.training))), "training", 1.0, True)
        streams: tuple[Stream, ...] = (domain,)
        for strategy in self.strategies:
            streams = strategy.edit_streams(self.ctx, streams)
        self.ctx.streams = streams
        return streams

    def micros(self) -> list[Micro]:
        drawn = []
        for stream in self.streams():
            store = self.stores[stream.store]
            count = round(stream.rows_per_step * self.batch_size)
            for k in range(count):
                row = stream.rows[(self.step * count + k) % len(stream.rows)]
                drawn.append((stream.name, row, store[row], stream.counts_as_task))
        size = self.micro_rows
        micros = [make_micro(drawn[i : i + size]) for i in range(0, len(drawn), size)]
        for index in range(len(micros)):
            for strategy in self.strategies:
                micros[index] = strategy.edit_batch(self.ctx, micros[index])
        for strategy in self.strategies:
            strategy.before_backward(self.ctx, micros)
        return micros

    def forward(self, micro: Micro) -> Forward:
        needs = [strategy.step_needs(self.ctx) for strategy in self.strategies]
        sources: frozenset[str] = frozenset().union(*(n.teacher_sources for n in needs))
        layers: frozenset[int] = frozenset().union(*(n.hidden_layers for n in needs))
        out = self._plain_forward(micro, layers)
        mask = micro.source_mask_N(sources)
        if not mask.any():
            return out
        teacher, taught = self._taught(micro, mask)
        return Forward(out.logits_NV, teacher, mask, out.hidden_BTD, taught)

    def _taught(self, micro: Micro, mask: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        with torch.no_grad():
            logits = self.base(micro.input_ids_BT, micro.positions_N)[mask]
        at = micro.positions_N[mask]
        return logits, {n: h.reshape(-1, WIDTH)[at] for n, h in self.base.hidden_BTD.items()}

    def _base_hidden(self, micro: Micro, mask: Tensor, layers: frozenset[int]) -> Any:
        taught = self._taught(micro, mask)[1]
        return {layer: taught[layer] for layer in layers}

    def _sample(
        self,
        store: str,
        rows: Sequence[int],
        decoding: Decoding,
        generator: torch.Generator,
        *,
        base: bool = False,
    ) -> list[TokenRow]:
        """Continues the first two tokens of each row, one row and token at a time."""
        model = self.base if base else self.model
        was_training = model.training
        model.eval()
        made = []
        for row in rows:
            ids = list(self.stores[store][row][:2])
            for _ in range(decoding.num_tokens):
                last = torch.tensor([len(ids) - 1])
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), last)[0] / decoding.temperature
                ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            made.append((ids, [0.0, 0.0] + [1.0] * decoding.num_tokens))
        model.train(was_training)
        return made

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the next step before hook 9, left in `grad`; the loss's parts go to `losses`."""
        micros = self.micros()
        parts: dict[str, float] = {}
        owners = [s for s in self.strategies if s.step_needs(self.ctx).step_owner]
        if owners:

            def backward(some: Sequence[Micro], *, task_only: bool = False) -> None:
                self._backward(some, parts, () if task_only else self.strategies)

            owners[0].compute_grads(self.ctx, micros, backward)
        else:
            self._backward(micros, parts, self.strategies)
        self.losses.append(parts)
        return {n: p.grad.clone() for n, p in self.params.items() if p.grad is not None}

    def _backward(
        self, micros: Sequence[Micro], parts: dict[str, float], strategies: Sequence[Strategy]
    ) -> None:
        counts: dict[str, float] = {"task": 0.0}
        for micro in micros:
            counts["task"] += float(micro.is_task_B[micro.row_of_N].sum())
            for strategy in strategies:
                for key, count in strategy.count_terms(self.ctx, micro).items():
                    counts[key] = counts.get(key, 0.0) + count
        for micro in micros:
            out = self.forward(micro)
            nats_N = F.cross_entropy(out.logits_NV, micro.targets_N, reduction="none")
            own = (nats_N * micro.is_task_B[micro.row_of_N]).sum()
            addends = {"task": own / max(counts["task"], 1e-12)}
            for strategy in strategies:
                for term in strategy.loss_terms(self.ctx, micro, out):
                    addends[term.name] = term.coef * term.numerator / counts[term.denominator_key]
            torch.stack(list(addends.values())).sum().backward()
            for name, addend in addends.items():
                parts[name] = parts.get(name, 0.0) + addend.item()

    def enter_due_task(self) -> None:
        """Strategies take leave of the first task and look at the second where it is due."""
        if not self.boundary or self.step < self.boundary or self.ctx.task_index > 0:
            return
        if self.step == self.boundary:
            for strategy in self.strategies:
                strategy.on_task_end(self.ctx)
        self.ctx.task_index = 1
        for strategy in self.strategies:
            strategy.edit_param_groups(self.ctx, [])
            if self.step == self.boundary:
                strategy.on_task_start(self.ctx)

    def train(self, steps: int) -> "Stage":
        for _ in range(steps):
            self.enter_due_task()
            self.ctx.step = self.step
            self.ctx.learning_rates = dict.fromkeys(self.params, self.learning_rate)
            for strategy in self.strategies:
                strategy.on_step_start(self.ctx)
            self.gradients()
            for strategy in self.strategies:
                strategy.read_grads(self.ctx)
            for strategy in self.strategies:
                strategy.add_grads(self.ctx)
            for strategy in self.strategies:
                strategy.edit_grads(self.ctx)
            held: frozenset[str] = frozenset().union(*(s.held(self.ctx) for s in self.strategies))
            for name in held & self.params.keys():
                self.params[name].grad = None
            nn.utils.clip_grad_norm_(list(self.params.values()), 1.0)
            old = {name: p.detach().clone() for name, p in self.params.items()}
            self.optimizer.step()
            pulls = [
                {n: pull for n, pull in s.prox_pulls(self.ctx).items() if n not in held}
                for s in self.strategies
            ]
            apply_pulls(self.params, pulls, self.ctx.learning_rates)
            self._edit_displacement(old, held)
            for strategy in self.strategies:
                strategy.on_step_end(self.ctx)
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return self

    def _edit_displacement(self, old: dict[str, Tensor], held: frozenset[str]) -> None:
        first = {name: p.detach() - old[name] for name, p in self.params.items()}
        delta = dict(first)
        for strategy in sorted(self.strategies, key=lambda s: (s.update_rank, s.kind)):
            if strategy.step_needs(self.ctx).snapshot:
                delta = strategy.edit_update(self.ctx, old, delta)
        with torch.no_grad():
            for name, parameter in self.params.items():
                if delta[name] is not first[name] and name not in held:
                    parameter.copy_(old[name] + delta[name])

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
