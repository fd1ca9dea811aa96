"""From a RunPlan to a run: model, adapters, strategies, tasks and optimiser, put together."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from app.domain.decisions import ControllerState
from app.domain.runplan import RunPlan
from app.domain.strategies import strength_in_force
from workers.data.batches import Rows, RowSampler
from workers.strategies.base import Strategy
from workers.strategies.context import Context
from workers.training.adapters import adapt, adapter_names, find_config, show_adapters
from workers.training.forward import SelectedLogits, Teacher
from workers.training.loop import Run
from workers.training.models import autocast_type, load_base, lora_pairs
from workers.training.optimizers import make_optimizer
from workers.training.outlook import show_the_run
from workers.training.preferences import CHOSEN, REJECTED, Preferences
from workers.training.quantization import count_weights
from workers.training.ranks import Ranks
from workers.training.strategies import build_strategies
from workers.training.tasks import build_tasks, store_name


def first_controller(plan: RunPlan) -> ControllerState:
    """The coefficients at step 0."""
    lora = plan.training.type == "lora"
    first = plan.stages[0].strengths if plan.stages else {}
    return ControllerState(
        strengths={
            c.type: first.get(c.type, strength_in_force(c, lora=lora)) for c in plan.strategies
        },
        branch=plan.branch,
    )


def build_run(
    plan: RunPlan,
    stores: Mapping[str, Rows],
    ranks: Ranks,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    strategies: tuple[Strategy, ...] | None = None,
) -> Run:
    """A run at step 0 of a plan, before `on_task_start`.

    Args:
        plan: What to train.
        stores: Tokenised rows: `training`, and `general` where there are any.
        ranks: Of this run.
        device: Of this rank.
        dtype: Of the weights; None takes float32, or bf16 for a frozen base under bf16.
        strategies: In place of those of the plan.
    """
    training = plan.training
    autocast = autocast_type(training, device)
    is_lora = training.type == "lora"
    frozen_type = torch.bfloat16 if autocast and device.type == "cuda" else torch.float32
    weights_type = dtype or (frozen_type if is_lora else torch.float32)
    model = load_base(plan.base, device, weights_type)
    if training.gradient_checkpointing:
        enable: Any = model.activation_checkpointing_enable
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    probe = SelectedLogits(model, autocast=autocast).probe_hash() if is_lora else None
    model = adapt(model, training, plan.strategies, [stage.name for stage in plan.stages])

    def load_copy() -> SelectedLogits:
        copy = load_base(plan.base, device, dtype or frozen_type).eval()
        return SelectedLogits(copy.requires_grad_(requires_grad=False), autocast=autocast)

    def find_teacher(student: SelectedLogits) -> Teacher:
        teacher = Teacher(student, None if is_lora else load_copy)
        teacher.probe = probe
        return teacher

    if strategies is None:
        strategies = build_strategies(plan.strategies)
    return assemble_run(plan, model, find_teacher, stores, ranks, strategies)


def assemble_run(
    plan: RunPlan,
    model: nn.Module,
    find_teacher: Callable[[SelectedLogits], Teacher],
    stores: Mapping[str, Rows],
    ranks: Ranks,
    strategies: tuple[Strategy, ...],
) -> Run:
    """A run of a model that is there.

    Args:
        plan: What to train; where the model came from is not asked again.
        model: On this rank's device; what requires a gradient is trained.
        find_teacher: The model that strategies compare the student with.
        stores: Tokenised rows by store.
        ranks: Of this run.
        strategies: Sorted by kind.
    """
    training = plan.training
    device = next(model.parameters()).device
    ctx = Context(
        model=model,
        params={},
        lora_pairs=(),
        coefs={},
        run_seed=training.seed,
        device=device,
        batch_size=training.batch_size,
        num_training_rows=len(stores["training"].lengths),
        num_general_rows=len(stores["general"].lengths) if "general" in stores else 0,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    ctx.num_tasks = max(len(plan.stages), 1)
    ctx.models = plan.models
    if find_config(plan.strategies) is not None:
        names = adapter_names([stage.name for stage in plan.stages])
        ctx.adapters = show_adapters(model, names, training.lora)
    for strategy in strategies:
        model = strategy.edit_model(ctx, model)
    model.train()
    ctx.model = model
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    student = SelectedLogits(model, autocast=autocast_type(training, device))
    ctx.num_layers = student.num_layers
    num_rows = [len(stores[store_name(stage)].lengths) for stage in range(ctx.num_tasks)]
    lengths = {name: store.lengths for name, store in stores.items()}
    preferences = None
    if training.beta is not None:
        # A pair is as long as the longer of its answers.
        lengths[CHOSEN] = np.maximum(lengths[CHOSEN], lengths[REJECTED])
        preferences = Preferences(training.beta, lengths[CHOSEN])
    run = Run(
        training=training,
        model=model,
        student=student,
        teacher=find_teacher(student),
        strategies=strategies,
        ctx=ctx,
        ranks=ranks,
        stores=dict(stores),
        sampler=RowSampler(
            seed=training.seed,
            batch_size=training.batch_size,
            lengths=lengths,
        ),
        tasks=build_tasks(plan, num_rows, _trained(plan, params)),
        all_params=params,
        all_pairs=lora_pairs(model),
        make_optimizer=make_optimizer,
        controller=first_controller(plan),
        spare_padding=_spare_padding(model, device),
        branch=plan.branch,
        preferences=preferences,
    )
    show_the_run(plan, run)
    run.enter(0)
    return run


def _trained(plan: RunPlan, params: Mapping[str, nn.Parameter]) -> list[frozenset[str] | None]:
    """What each stage trains, where full fine-tuning is followed by an adapter; else everything."""
    if not plan.training.late_adapter:
        return [None] * max(len(plan.stages), 1)
    adapter = frozenset(name for name in params if ".lora_" in name)
    backbone = frozenset(params) - adapter
    return [adapter if stage.trains == "adapter" else backbone for stage in plan.stages]


def _spare_padding(model: nn.Module, device: torch.device) -> int:
    """Padded tokens worth another forward: about 10 ms of a core, or of a GPU, at 6 operations a parameter."""
    operations = 1e12 if device.type == "cuda" else 5e8
    return max(64, int(operations / (6 * count_weights(model))))
