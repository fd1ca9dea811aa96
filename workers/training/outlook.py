"""What strategies see of a run: passes over rows, forwards of student and teacher, and a cache across jobs."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.domain.runplan import RunPlan
from workers.data.batches import DOMAIN, DrawnRow, build_micro, split_micros
from workers.data.tokens import TokenStore
from workers.evaluation.forward import token_batches
from workers.evaluation.routing import pool, prompt_mask
from workers.strategies.batch import Forward, Micro, TokenRow
from workers.strategies.context import Decoding
from workers.strategies.modes import evaluating
from workers.training.adapters import adapter_names, find_config
from workers.training.embedding import show_embeddings
from workers.training.loop import Run
from workers.training.models import autocast_type
from workers.training.ranks import Ranks
from workers.training.sampling import sample_rows

OF_THE_BASE = (
    "base/"  # keys of what follows from the base and the key alone, whatever the job's adapters
)


class ListedRows:
    """A store of rows that a strategy made."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self._rows = [
            (np.asarray(ids, dtype=np.int32), np.asarray(weights, dtype=np.float32))
            for ids, weights in rows
        ]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.asarray([len(ids) for ids, _ in self._rows], dtype=np.int64)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Token ids of a row and the loss weight of each token as a target."""
        return self._rows[index]


def show_the_run(plan: RunPlan, run: Run) -> None:
    """Gives strategies their view of the run."""
    ctx = run.ctx

    def store_micros(store: str, rows: Sequence[int]) -> Iterator[Micro]:
        drawn = [DrawnRow(_source(store), store, row, is_task=False) for row in rows]
        planned = split_micros(
            drawn,
            {store: run.stores[store].lengths},
            max_tokens=run.training.max_tokens_per_micro_batch,
            spare_padding=run.spare_padding,
        )
        for part in planned[run.ranks.rank :: run.ranks.world_size]:
            yield build_micro(part, run.stores, ctx.device)

    def rows_micro(source: str, store: str, rows: Sequence[int]) -> Micro:
        drawn = [DrawnRow(source, store, row, is_task=False) for row in rows]
        return build_micro(drawn, run.stores, ctx.device)

    def represent(store: str, rows: Sequence[int]) -> Tensor:
        return _represent(run, store, rows)

    def add_store(name: str, rows: Sequence[TokenRow]) -> None:
        made = ListedRows(rows)
        run.stores[name] = made
        run.sampler.add_store(name, made.lengths)
        ctx.store_sizes = {n: len(store.lengths) for n, store in run.stores.items()}

    def forward(micro: Micro, layers: frozenset[int] = frozenset()) -> Forward:
        logits, hidden = run.student.with_hidden(micro.input_ids_BT, micro.positions_N, layers)
        return Forward(logits_NV=logits, hidden_BTD=hidden)

    def sample(
        store: str,
        rows: Sequence[int],
        decoding: Decoding,
        generator: torch.Generator,
        *,
        base: bool = False,
    ) -> list[TokenRow]:
        return sample_rows(run, store, rows, decoding, generator, base=base)

    ctx.all_reduce = run.ranks.all_reduce
    ctx.store_sizes = {name: len(store.lengths) for name, store in run.stores.items()}
    ctx.environments = {
        name: store.environments
        for name, store in run.stores.items()
        if isinstance(store, TokenStore) and store.environments
    }
    ctx.store_micros = store_micros
    ctx.general_micros = lambda rows: store_micros("general", rows)
    ctx.rows_micro = rows_micro
    ctx.add_store = add_store
    ctx.represent = represent
    ctx.forward = forward
    ctx.base_forward = run.teacher
    ctx.base_hidden = run.teacher.hidden
    ctx.release_base = run.teacher.release
    ctx.sample = sample
    show_embeddings(plan, run)
    ctx.cached = _Cache(plan, run.model, run.ranks, ctx.device)


def _represent(run: Run, store: str, rows: Sequence[int]) -> Tensor:
    """Unit-norm means (rows, D) of the starting model's last hidden states over the rows' prompts."""
    lengths = [int(run.stores[store].lengths[row]) for row in rows]
    nowhere = torch.zeros(0, dtype=torch.int64, device=run.ctx.device)
    order = sorted(range(len(rows)), key=lambda place: lengths[place])
    found: dict[int, Tensor] = {}
    with torch.no_grad(), run.teacher.starting_model() as model, evaluating(model.model):
        layer = model.num_layers
        for part in token_batches(order, lengths, run.training.max_tokens_per_micro_batch):
            ids = np.zeros((len(part), lengths[part[-1]]), np.int64)
            mask = np.zeros(ids.shape, np.float32)
            for k, place in enumerate(part):
                tokens, weights = run.stores[store].row(rows[place])
                ids[k, : len(tokens)] = tokens
                mask[k, : len(tokens)] = prompt_mask(weights)
            ids_BT, mask_BT = (torch.from_numpy(a).to(run.ctx.device) for a in (ids, mask))
            _, hidden = model.with_hidden(ids_BT, nowhere, frozenset({layer}))
            found |= dict(zip(part, pool(hidden[layer], mask_BT), strict=True))
    return torch.stack([found[place] for place in range(len(rows))])


def _source(store: str) -> str:
    """What the rows of a store are called when a strategy reads them of its own accord."""
    return DOMAIN if store.startswith("training") else store


class _Cache:
    """Tensors that follow from (base, general rows, settings), kept under the cache directory."""

    def __init__(self, plan: RunPlan, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        training = plan.training
        settings = {
            "base": plan.base.sha256,
            "default_template": plan.base.default_template,
            "general": None if plan.general_rows is None else plan.general_rows.sha256,
            "max_seq_length": training.max_seq_length,
            "type": training.type,
            "precision": str(autocast_type(training, device)),
            "device": device.type,
            "lora": training.lora.model_dump() if training.type == "lora" else None,
            "seed": training.seed,
            "dtype": str(next(model.parameters()).dtype),
        }
        if plan.base.quantization != "none":
            settings["quantization"] = plan.base.quantization
        if find_config(plan.strategies) is not None:  # adapted layers go by their adapters' names
            settings["adapters"] = adapter_names([stage.name for stage in plan.stages])
        self._settings = json.dumps(settings, sort_keys=True)
        of_the_base = {
            k: v for k, v in settings.items() if k not in ("general", "lora", "seed", "adapters")
        }
        self._base_settings = json.dumps(of_the_base, sort_keys=True)
        self._directory = Path(plan.cache_directory) / "strategies"
        self._ranks = ranks
        self._device = device

    def __call__(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        settings = self._base_settings if key.startswith(OF_THE_BASE) else self._settings
        name = hashlib.sha256(f"{settings}/{key}".encode()).hexdigest()
        path = self._directory / f"{name}.safetensors"
        found = self._load(path)
        seen = self._ranks.sum_counts({"found": float(found is not None)})
        if found is not None and seen["found"] == self._ranks.world_size:
            return found
        made = make()
        if self._ranks.is_speaker:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({k: v.detach().cpu().contiguous() for k, v in made.items()}, temporary)
            temporary.replace(path)
        return made

    def _load(self, path: Path) -> dict[str, Tensor] | None:
        """None where nothing readable lies there: a torn file is made again."""
        try:
            return dict(load_file(path, device=str(self._device)))
        except (OSError, safetensors.SafetensorError):
            return None
