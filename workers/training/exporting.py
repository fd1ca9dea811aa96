"""An export job: one point of the line from base to tuned, measured and written as an artifact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.domain.messages import ExportFinished
from app.domain.policy import Policy
from app.domain.runplan import ExportPlan, RunPlan
from workers.export.adapter_files import join_adapters
from workers.export.artifact import ArtifactKind, save_artifact
from workers.strategies.context import Context
from workers.training.adapters import adapt, adapter_names, find_config, show_adapters
from workers.training.blend import line_from_base
from workers.training.checkpoints import set_weights
from workers.training.conversation import Conversation
from workers.training.forward import SelectedLogits
from workers.training.merging import merge_into_whole
from workers.training.models import autocast_type, load_base, load_tokenizer
from workers.training.opening import chat_template, make_score
from workers.training.ranks import Ranks
from workers.training.strategies import build_strategies
from workers.training.suite import Suite, most_gate_items


def export(plan: ExportPlan, talk: Conversation, ranks: Ranks, device: torch.device) -> None:
    """Loads the checkpoint, goes to `alpha`, scores the report items and writes the artifact.

    Raises:
        TrainingFailed: The checkpoint is torn or of another base.
    """
    model = load_base(plan.base, device, torch.float32)
    is_lora = plan.training.type == "lora"
    model = adapt(model, plan.training, plan.strategies, plan.stage_names)
    params = set_weights(model, Path(plan.checkpoint_directory))
    _settle_adapters(plan, model, device)
    line_from_base(model, params, plan.base, is_lora=is_lora).set(plan.alpha)
    tokenizer = load_tokenizer(plan.base)
    student = SelectedLogits(model.eval(), autocast=autocast_type(plan.training, device))
    score = make_score(
        student,
        tokenizer,
        chat_template(plan.base),
        plan.training.max_tokens_per_micro_batch,
        ranks,
    )
    suite = Suite.read(plan.benchmarks, score, most_gate_items(Policy()))
    report = suite.packed(suite.measure("report"), "report")
    directory = Path(plan.scratch_directory) / f"artifact-a{plan.attempt}"
    merged = None
    if needs_merging(plan):
        merged = merge_into_whole(plan, model, suite, tokenizer, ranks)
        model, report = merged.model, merged.report
    write_artifact(plan, model, tokenizer, directory, alpha=plan.alpha)
    talk.ask(
        ExportFinished(
            id=talk.next_id(),
            artifact_directory=str(directory),
            artifact_kind=artifact_kind(plan),
            report=report,
            merged_baseline=() if merged is None else merged.baseline,
        )
    )


def _settle_adapters(plan: ExportPlan, model: nn.Module, device: torch.device) -> None:
    """Lets those adapters act, or merges them, that did when the checkpoint was published."""
    config = find_config(plan.strategies)
    if config is None:
        return
    state = json.loads((Path(plan.checkpoint_directory) / "state.json").read_text())
    names = adapter_names(plan.stage_names)
    ctx = Context(
        model=model,
        params={},
        lora_pairs=(),
        coefs={config.type: 0.0},
        run_seed=plan.training.seed,
        device=device,
        batch_size=plan.training.batch_size,
        num_training_rows=0,
        num_general_rows=0,
        num_tasks=len(names),
        task_index=state["task_index"],
        adapters=show_adapters(model, names, plan.training.lora),
    )
    (strategy,) = build_strategies([config])
    strategy.on_publish(ctx)


def artifact_kind(plan: RunPlan | ExportPlan) -> ArtifactKind:
    """Adapters where they are told relative to the registered base model; whole weights over other weights."""
    return "adapter" if plan.training.type == "lora" and plan.base.takes_adapters else "full"


def needs_merging(plan: RunPlan | ExportPlan) -> bool:
    """Whether what is published are whole weights, which a run on a quantised base has never held."""
    return plan.base.quantization != "none" and artifact_kind(plan) == "full"


def write_artifact(
    plan: RunPlan | ExportPlan,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 - transformers has no types
    directory: Path,
    *,
    alpha: float,
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Writes the weights as they stand, with where they came from and what is published beside them."""
    kind = artifact_kind(plan)

    def beside(partial: Path) -> None:
        # The layers lie in the weights that the run started from, and not in the registered base's.
        if kind == "adapter" and plan.base.layers:
            join_adapters(partial, [Path(layer.directory) for layer in plan.base.layers])
        if extras is not None:
            extras(partial)

    save_artifact(
        directory,
        model,
        tokenizer,
        kind=kind,
        provenance={
            "alpha": alpha,
            "job": plan.job_id,
            "base_model": plan.base.name,
            "base_sha256": plan.base.registered_sha256,
            "template": "built-in" if plan.base.default_template else "base",
            "quantization": plan.base.quantization,  # of the base that the adapters were trained on
        },
        chat_template=chat_template(plan.base),
        extras=beside,
    )
