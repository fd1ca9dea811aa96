"""Other libraries' methods against forgetting, each taught the board's domains through its own trainer."""

# Shape letters: B rows, T tokens, V vocabulary.

import math
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from tests.benchmarks.board.material import Material, TokenRows
from tests.benchmarks.board.methods import FULL_RATE, STEPS

BATCH_SIZE, IGNORED = 32, -100
WARM_UP, CLIP_NORM = 0.05, 1.0
EPOCHS_OF_REPAIR = 1  # of TRL's distillation on general prompts after each domain

Knobs = Mapping[str, float]
Learn = Callable[[Any, Material, Knobs, int], Iterator[Any]]


def avalanche_ewc(model: Any, material: Material, knobs: Knobs, num_stages: int) -> Iterator[Any]:
    """Avalanche's EWC, separate penalties; the general rows are an experience whose training has no steps.

    So it anchors to the base as Retain's does, which its plugin alone would not.

    Yields:
        The model after each domain.
    """
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import DataAttribute, make_avalanche_dataset
    from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, SupervisedPlugin
    from avalanche.training.supervised import Naive
    from torch.utils.data import TensorDataset

    def dataset(rows: TokenRows) -> Any:
        inputs_BT, labels_BT = padded(rows)
        task = DataAttribute([0] * len(inputs_BT), "targets_task_labels", use_in_getitem=True)
        return make_avalanche_dataset(TensorDataset(inputs_BT, labels_BT), data_attributes=[task])

    class EachStep(SupervisedPlugin):  # type: ignore[misc]
        """Clips gradients and sets the board's learning rate, which Avalanche leaves to plugins."""

        step = 0

        def before_training_exp(self, strategy: Any, **_: Any) -> None:
            self.step = 0

        def before_update(self, strategy: Any, **_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), CLIP_NORM)
            for group in strategy.optimizer.param_groups:
                group["lr"] = FULL_RATE * knobs["rate"] * schedule(self.step)
            self.step += 1

    stores = [material.general, *material.training[:num_stages]]
    experiences = benchmark_from_datasets(train=[dataset(rows) for rows in stores]).train_stream
    wrapped = _Classifier(model)
    strategy = Naive(
        model=wrapped,
        optimizer=torch.optim.AdamW(wrapped.parameters(), FULL_RATE, weight_decay=0.0),
        criterion=torch.nn.CrossEntropyLoss(ignore_index=IGNORED),
        train_mb_size=BATCH_SIZE,
        plugins=[EWCPlugin(knobs["strength"]), EachStep()],
        evaluator=EvaluationPlugin(),
    )
    for index, experience in enumerate(experiences):
        strategy.train_epochs = 0 if index == 0 else _epochs(stores[index])
        strategy.train([experience], num_workers=0)
        if index:
            yield model


def peft_osf(model: Any, material: Material, knobs: Knobs, num_stages: int) -> Iterator[Any]:
    """peft's orthogonal subspace fine-tuning: each domain trains the directions of small singular values.

    As its documentation has it, the share that is kept grows from domain to domain and the adapter is
    merged before the next.

    Yields:
        The model after each domain.
    """
    from peft import OSFConfig, get_peft_model

    for stage in range(num_stages):
        share = knobs["preserved"] + (1.0 - knobs["preserved"]) * stage / (num_stages + 1)
        tuned = get_peft_model(
            model,
            OSFConfig(effective_rank=share, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        _train(tuned, material.training[stage], FULL_RATE * knobs["rate"], material.seed + stage)
        model = tuned.merge_and_unload()
        yield model


def trl_distillation(
    model: Any, material: Material, knobs: Knobs, num_stages: int
) -> Iterator[Any]:
    """TRL's trainers: SFT on each domain, then on-policy distillation from the base on general prompts.

    TRL's distillation has no loss on given answers, so it can't learn a domain by itself.

    Yields:
        The model after each domain.
    """
    import pyarrow as pa
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

    def dataset(rows: Sequence[dict[str, Any]]) -> Any:
        # With a fingerprint of its own: hashing one pickles parts of pyarrow, which not every build allows.
        return Dataset(pa.Table.from_pylist(list(rows)), fingerprint=f"{len(rows)}-{id(rows):x}")

    teacher = AutoModelForCausalLM.from_pretrained(str(material.directory), local_files_only=True)
    prompts = [{"prompt": text} for text in _prompts(material)]
    common = {
        "per_device_train_batch_size": BATCH_SIZE,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "cosine",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "max_grad_norm": CLIP_NORM,
    }
    for stage in range(num_stages):
        rows = dataset(_as_columns(material.training[stage]))
        with tempfile.TemporaryDirectory() as scratch:
            settings = SFTConfig(
                **common,
                output_dir=scratch,
                max_steps=STEPS,
                learning_rate=FULL_RATE * knobs["rate"],
                warmup_steps=round(WARM_UP * STEPS),
                completion_only_loss=True,
                max_length=64,
                seed=material.seed + stage,
            )
            SFTTrainer(
                model, settings, train_dataset=rows, processing_class=material.tokenizer
            ).train()
            repair = DistillationConfig(
                **common,
                output_dir=scratch,
                num_train_epochs=EPOCHS_OF_REPAIR,
                learning_rate=FULL_RATE * knobs["repair_rate"],
                max_completion_length=8,
                beta=0.0,
                seed=material.seed + stage,
            )
            DistillationTrainer(
                model,
                teacher,
                repair,
                train_dataset=dataset(prompts),
                processing_class=material.tokenizer,
            ).train()
        yield model


def padded(rows: TokenRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (B, T), right-padded; labels of prompts and padding are ignored."""
    given = [rows.row(index) for index in range(len(rows.lengths))]
    width = max(len(ids) for ids, _ in given) - 1
    inputs_BT = torch.zeros(len(given), width, dtype=torch.long)
    labels_BT = torch.full((len(given), width), IGNORED)
    for index, (ids, weights) in enumerate(given):
        tokens, counted = torch.from_numpy(ids).long(), torch.from_numpy(weights)[1:] > 0
        inputs_BT[index, : len(ids) - 1] = tokens[:-1]
        labels_BT[index, : len(ids) - 1] = torch.where(counted, tokens[1:], IGNORED)
    return inputs_BT, labels_BT


def schedule(step: int) -> float:
    """The board's: linear warm-up, then cosine to zero; 1 at the peak."""
    warm_up = max(1, round(WARM_UP * STEPS))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, STEPS - warm_up)))


class _Classifier(torch.nn.Module):
    """A causal model as Avalanche's cross-entropy expects one: logits (B, V, T)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: torch.Tensor) -> torch.Tensor:
        """Logits with the classes in the second dimension."""
        logits: torch.Tensor = self.model(input_ids=inputs_BT).logits
        return logits.transpose(1, 2)


def _train(model: Any, rows: TokenRows, rate: float, seed: int) -> None:
    """As many steps as every method of the board has, for peers that bring no trainer of their own."""
    inputs_BT, labels_BT = padded(rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(STEPS):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(inputs_BT), generator=generator).tolist()
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step)
        logits = model(input_ids=inputs_BT[batch]).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels_BT[batch].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()


def _epochs(rows: TokenRows) -> int:
    """So many that the steps are the board's."""
    return max(1, round(STEPS / math.ceil(len(rows.lengths) / BATCH_SIZE)))


def _as_columns(rows: TokenRows) -> Sequence[dict[str, list[int]]]:
    given = (rows.row(index) for index in range(len(rows.lengths)))
    return [
        {"input_ids": ids.tolist(), "completion_mask": (weights > 0).astype(int).tolist()}
        for ids, weights in given
    ]


def _prompts(material: Material) -> list[str]:
    """Text of the general rows up to the answer."""
    found = []
    for index in range(len(material.general.lengths)):
        ids, weights = material.general.row(index)
        found.append(material.tokenizer.decode(ids[: int((weights > 0).argmax())]))
    return found


def stand_in_for_torchvision() -> None:
    """Lets Avalanche import torchvision's build for CUDA beside a torch for CPU: no operator of it is used.

    To be called before transformers is imported, which looks for torchvision as well.
    """
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
