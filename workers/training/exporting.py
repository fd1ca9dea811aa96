"""An export job: one point of the line from base to tuned, measured and written as an artifact."""

from pathlib import Path

import torch

from app.domain.messages import ExportFinished
from app.domain.policy import Policy
from app.domain.runplan import ExportPlan
from app.errors import TrainingFailed
from workers.training.artifact import write_artifact
from workers.training.blend import make_blend
from workers.training.build import (
    add_adapters,
    autocast_type,
    load_base,
    load_tokenizer,
    lora_pairs,
)
from workers.training.checkpoints import load_weights
from workers.training.conversation import Conversation
from workers.training.forward import SelectedLogits
from workers.training.opening import chat_template, make_score
from workers.training.ranks import Ranks
from workers.training.suite import Suite, most_gate_items


def export(plan: ExportPlan, talk: Conversation, ranks: Ranks, device: torch.device) -> None:
    """Loads the checkpoint, goes to `alpha`, scores the report items and writes the artifact.

    Raises:
        TrainingFailed: The checkpoint is torn or of another base.
    """
    model = load_base(plan.base, device, torch.float32)
    is_lora = plan.training.type == "lora"
    if is_lora:
        model = add_adapters(model, plan.training.lora, seed=plan.training.seed)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = load_weights(Path(plan.checkpoint_directory), device)
    if saved.keys() != params.keys() or any(saved[n].shape != p.shape for n, p in params.items()):
        raise TrainingFailed("The checkpoint does not fit the base model.", code="bad_checkpoint")
    with torch.no_grad():
        for name, parameter in params.items():
            parameter.copy_(saved[name])
    make_blend(params, lora_pairs(model), plan.base).apply(plan.alpha)
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
    directory = write_artifact(
        model,
        tokenizer,
        Path(plan.scratch_directory) / f"artifact-a{plan.attempt}",
        base=plan.base,
        job_id=plan.job_id,
        alpha=plan.alpha,
        is_lora=is_lora,
    )
    talk.ask(
        ExportFinished(
            id=talk.next_id(),
            artifact_directory=str(directory),
            artifact_kind="adapter" if is_lora else "full",
            report=report,
        )
    )
