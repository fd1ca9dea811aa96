"""An evaluation job: a published version scored on the report items, and its base where that was never done."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from app.domain.benchmarks import DEFAULT_GATE_ITEMS, BenchmarkScores
from app.domain.messages import EvaluationFinished
from app.domain.runplan import EvaluationPlan
from app.errors import TrainingFailed
from workers.evaluation.adapters import load_adapter
from workers.export.artifact import load_provenance
from workers.export.bottleneck import CONFIG_FILE, load_bottlenecks
from workers.training.conversation import Conversation
from workers.training.forward import SelectedLogits
from workers.training.models import autocast_type, load_base, load_tokenizer
from workers.training.opening import chat_template, make_score
from workers.training.ranks import Ranks
from workers.training.suite import Indices, Marks, Suite, Watched


def evaluate_version(
    plan: EvaluationPlan, talk: Conversation, ranks: Ranks, device: torch.device
) -> None:
    """Scores the base's missing report items, then the version, and reports both.

    Raises:
        TrainingFailed: The artifact is damaged, or of another base.
    """
    _say(plan, talk, 0)
    started = time.perf_counter()
    baseline = _measure_base(plan, talk, ranks, device)
    between = time.perf_counter()
    suite = _suite(plan, load_version(plan, device), ranks, device)
    marks: Marks = {}
    for place, watched in enumerate(suite.benchmarks):
        indices = suite.indices(watched, "report")
        marks[watched.plan.benchmark_version_id] = suite.score(watched.plan, indices)
        _say(plan, talk, place + 1)
    talk.ask(
        EvaluationFinished(
            id=talk.next_id(),
            scores=suite.packed(marks, "report"),
            baseline=baseline,
            seconds={"baseline": between - started, "version": time.perf_counter() - between},
        )
    )


def load_version(plan: EvaluationPlan, device: torch.device) -> nn.Module:
    """The published weights: full ones, or an adapter over its base, as others load them.

    Raises:
        TrainingFailed: The artifact is damaged, or its adapter is of another base.
    """
    directory = Path(plan.artifact_directory)
    record = load_provenance(directory)
    if record.get("base_sha256") not in {None, plan.base.sha256}:
        raise TrainingFailed(
            "artifact: it was made on another base model", None, "damaged_artifact"
        )
    if plan.artifact_kind == "full":
        own = plan.base.model_copy(update={"directory": str(directory)})
        return load_base(own, device, torch.float32).eval()
    base = load_base(plan.base, device, torch.float32)
    if (directory / CONFIG_FILE).exists():
        return load_bottlenecks(base, directory).to(device).eval()
    return load_adapter(base, directory).to(device).eval()


def _measure_base(
    plan: EvaluationPlan, talk: Conversation, ranks: Ranks, device: torch.device
) -> tuple[BenchmarkScores, ...]:
    """Scores of the base on report items without a baseline; none where all have one."""
    benchmarks = [Watched.read(benchmark) for benchmark in plan.benchmarks]
    missing = [(watched, _without_baseline(watched)) for watched in benchmarks]
    if not any(indices.size for _, indices in missing):
        return ()
    suite = _suite(plan, load_base(plan.base, device, torch.float32).eval(), ranks, device)
    found = []
    for watched, indices in missing:
        if indices.size:
            measured = suite.score(watched.plan, indices)
            found.append(measured.packed(watched.plan.benchmark_version_id, "report"))
            _say(plan, talk, 0)
    return tuple(found)


def _without_baseline(watched: Watched) -> Indices:
    report = watched.half("report", DEFAULT_GATE_ITEMS)
    return report[np.isnan(watched.baseline.scores[report])]


def _suite(plan: EvaluationPlan, model: nn.Module, ranks: Ranks, device: torch.device) -> Suite:
    score = make_score(
        SelectedLogits(model, autocast=autocast_type(plan.training, device)),
        load_tokenizer(plan.base),
        chat_template(plan.base),
        plan.training.max_tokens_per_micro_batch,
        ranks,
    )
    return Suite.read(plan.benchmarks, score, DEFAULT_GATE_ITEMS)


def _say(plan: EvaluationPlan, talk: Conversation, done: int) -> None:
    """That the evaluation is alive, with the benchmarks that are done in place of steps."""
    talk.progress(
        now=True,
        branch=0,
        step=done,
        total_steps=len(plan.benchmarks),
        seconds_remaining=None,
        trained_tokens=0,
        phase="evaluating",
    )
