"""What a memory asks of rows: their representations, their texts, and whether they repeat a benchmark."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.domain.configs.memory import MemoryConfig
from app.domain.overlap import drop_overlapping
from app.domain.runplan import RowsPlan, RunPlan
from app.errors import TrainingFailed
from workers.data.tokens import TokenStore, benchmark_texts, overlapping_lines
from workers.evaluation.representations import BaseEncoder, DualEncoder, base_encoder_sha256
from workers.strategies.modes import evaluating
from workers.training.loop import Run
from workers.training.models import load_tokenizer
from workers.training.tasks import store_name

DIM = 512  # where no strategy says


def show_embeddings(plan: RunPlan, run: Run) -> None:
    """Gives strategies their view of the rows' contents; nothing is loaded before it is asked for."""
    reader = RowReader(plan, run)
    run.ctx.embed = reader.embed
    run.ctx.encoder = lambda: reader.encoder_sha256
    run.ctx.texts = reader.texts
    run.ctx.overlaps = reader.overlaps


class RowReader:
    """Reads rows of a run's stores by the encoder that the job names, else by the base model itself."""

    def __init__(self, plan: RunPlan, run: Run) -> None:
        self._plan = plan
        self._run = run
        configs = [c for c in plan.strategies if isinstance(c, MemoryConfig)]
        self._name = configs[0].encoder if configs else None
        self._dim = configs[0].dim if configs else DIM
        self._overlapping: dict[str, frozenset[int]] = {}  # lines, by store

    def embed(self, store: str, rows: Sequence[int]) -> Tensor:
        """Float32 unit representations (rows, dim) on the CPU, the same on every rank."""
        ranks, device = self._run.ranks, self._run.ctx.device
        share = (ranks.rank, ranks.world_size)
        if isinstance(self._encoder, DualEncoder):
            keys = self._encoder.encode_texts(self.texts(store, rows), share=share)
        else:
            ids = [self._run.stores[store].row(row)[0].tolist() for row in rows]
            keys = self._encoder.encode(ids, share=share)
        if ranks.world_size > 1:
            keys = keys.to(device)
            ranks.all_reduce(keys)
        return keys.cpu()

    def texts(self, store: str, rows: Sequence[int]) -> list[str]:
        """The rows' texts, decoded without special tokens."""
        content = self._run.stores[store]
        return [
            str(self._tokenizer.decode(content.row(row)[0].tolist(), skip_special_tokens=True))
            for row in rows
        ]

    def overlaps(self, store: str, rows: Sequence[int]) -> list[bool]:
        """Which rows share text with a watched item: by their lines, or as decoded where they have none.

        General rows that do so were left out when they were tokenised.
        """
        if not self._plan.benchmarks or store == "general":
            return [False] * len(rows)
        content, file = self._run.stores[store], self._file(store)
        if isinstance(content, TokenStore) and file is not None:
            if store not in self._overlapping:
                self._overlapping[store] = overlapping_lines(file, self._plan.benchmarks)
            return [int(content.lines[row]) in self._overlapping[store] for row in rows]
        texts = ([text] for text in self.texts(store, rows))
        kept, _ = drop_overlapping(texts, benchmark_texts(self._plan.benchmarks))
        clean = set(kept)
        return [place not in clean for place in range(len(rows))]

    @property
    def encoder_sha256(self) -> str:
        """What the representations are known by."""
        if self._name is None:
            return base_encoder_sha256(self._plan.base.sha256, self._dim)
        return self._encoder.sha256

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - transformers has no types
        return load_tokenizer(self._plan.base)

    @cached_property
    def _encoder(self) -> BaseEncoder | DualEncoder:
        if self._name is None:
            return BaseEncoder(
                self._base_states,
                dim=self._dim,
                special_ids=self._tokenizer.all_special_ids,
                base_sha256=self._plan.base.sha256,
            )
        if self._name not in self._plan.models:
            raise TrainingFailed(
                f"The encoder '{self._name}' is not among the job's models.", "retention.strategies"
            )
        directory = Path(self._plan.models[self._name])
        try:
            return DualEncoder.load(directory, dim=self._dim, device=self._run.ctx.device)
        except (OSError, ValueError) as error:
            raise TrainingFailed(
                f"The encoder '{self._name}' can't be loaded: {error}", "retention.strategies"
            ) from error

    def _base_states(self, ids_BT: Tensor) -> Tensor:
        device = self._run.ctx.device
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        with torch.no_grad(), self._run.teacher.starting_model() as model, evaluating(model.model):
            layer = model.num_layers
            return model.with_hidden(ids_BT.to(device), nowhere, frozenset({layer}))[1][layer]

    def _file(self, store: str) -> RowsPlan | None:
        files = {store_name(n): stage.training_rows for n, stage in enumerate(self._plan.stages)}
        return (files or {store_name(0): self._plan.training_rows}).get(store)
