"""Adapters of a quantised base, merged into the whole base for an artifact that has no adapters, and measured there."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from app.domain.benchmarks import BenchmarkScores, unpack_array
from app.domain.runplan import ExportPlan, RunPlan
from workers.export.merge import merge_onto
from workers.training.forward import SelectedLogits
from workers.training.models import autocast_type, load_base
from workers.training.opening import chat_template, make_score
from workers.training.ranks import Ranks
from workers.training.suite import Measured, Suite


@dataclass(frozen=True, slots=True)
class Merged:
    """The whole base with the adapters in its weights, and what it scores beside that base on report items."""

    model: nn.Module
    report: tuple[BenchmarkScores, ...]
    baseline: tuple[BenchmarkScores, ...]


def merge_into_whole(
    plan: RunPlan | ExportPlan,
    model: nn.Module,
    suite: Suite,
    tokenizer: Any,  # noqa: ANN401 - transformers has no types
    ranks: Ranks,
) -> Merged:
    """Merges the active adapters as they stand into the base as its files are.

    The adapters learnt on rounded weights, so the merged model is another one than was evaluated: it gets a
    report test of its own, against the whole base.

    Args:
        plan: With a quantised base.
        model: Of the run; stays as it is.
        suite: Of the run.
        tokenizer: Of the base.
        ranks: Of this run.

    Raises:
        TrainingFailed: An adapter is no plain LoRA (`merge_failed`).
    """
    device = next(model.parameters()).device
    whole = load_base(plan.base.quantized("none"), device, torch.float32).eval()
    student = SelectedLogits(whole, autocast=autocast_type(plan.training, device))
    budget = plan.training.max_tokens_per_micro_batch
    score = make_score(student, tokenizer, chat_template(plan.base), budget, ranks)
    own = dataclasses.replace(suite, score=score)
    baseline = own.packed(own.measure("report"), "report")
    merge_onto(model, whole)
    return Merged(whole, own.packed(own.measure("report"), "report"), baseline)


def report_values(suite: Suite, scores: Sequence[BenchmarkScores]) -> dict[str, float | None]:
    """Means of report items by the benchmarks' names; None where nothing finite was measured."""
    found: dict[str, float | None] = {}
    packed = {one.benchmark_version_id: one for one in scores}
    for watched in suite.benchmarks:
        one = packed.get(watched.plan.benchmark_version_id)
        if one is None:
            continue
        tokens = None if one.tokens is None else unpack_array(one.tokens)
        measured = Measured(unpack_array(one.scores), tokens)
        value = watched.value(measured, suite.indices(watched, "report"))
        found[watched.plan.name] = value if value is not None and math.isfinite(value) else None
    return found
